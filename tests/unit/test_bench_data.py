"""Decoders side by side on copies of real footage."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from numbered_video import make_video

import taehv.bench_data
from taehv.bench_data import bench_data
from taehv.errors import UserError
from taehv.measure import Report
from taehv.video import probe


def test_every_way_decodes_the_same_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "videos").mkdir()
    make_video(tmp_path / "videos" / "short.mp4", size=(96, 128))
    (tmp_path / "videos" / "bad.mp4").write_text("no video")
    monkeypatch.setattr(taehv.bench_data, "KINDS", ((180, 320, 50),))
    monkeypatch.setattr(taehv.bench_data, "COPIED_FRAMES", 100)
    copies = []
    real = taehv.bench_data._ways

    def ways(path: str, others: list[str]):
        copies.append(probe(path))
        return real(path, others)

    monkeypatch.setattr(taehv.bench_data, "_ways", ways)
    options = SimpleNamespace(root=str(tmp_path / "videos"), seconds=0.2)
    path = tmp_path / "results.json"
    bench = SimpleNamespace(options=options, report=Report({}, path, speaks=True))
    bench_data(bench)
    copy, proxy = copies
    assert (copy.height, copy.width, copy.frames) == (180, 320, 100)
    assert copy.keyframe_interval == 50 > proxy.keyframe_interval
    (rows,) = json.loads(path.read_text())["tables"].values()
    assert {row["video"] for row in rows} == {"320x180 g50", "its proxy, 360 lines"}
    found = {row["way"]: row for row in rows}
    for crops in (1, 4, 8):
        assert found[f"taehv, K = {crops}"]["clips"] % crops == 0
    assert all(row["clips"] > 0 and row["clips/core-s"] > 0 for row in rows)
    assert "plain PyAV" in found
    assert "PyAV" in capsys.readouterr().out


def test_a_decoder_that_does_not_load_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "broken_decoder.py").write_text("raise RuntimeError('no FFmpeg')")
    monkeypatch.syspath_prepend(tmp_path)
    others = {"broken": ("broken_decoder", None), "sound": ("numpy", None)}
    monkeypatch.setattr(taehv.bench_data, "OTHERS", others)
    assert taehv.bench_data._others(Report({}, None)) == ["sound"]
    assert "no broken (no FFmpeg), sound " in capsys.readouterr().out


def test_videos_are_asked_for(tmp_path: Path):
    with pytest.raises(UserError, match="--root"):
        bench_data(SimpleNamespace(options=SimpleNamespace(root=None)))
    (tmp_path / "bad.mp4").write_text("no video")
    options = SimpleNamespace(root=str(tmp_path), seconds=0)
    with pytest.raises(UserError, match="no video that can be decoded"):
        bench_data(SimpleNamespace(options=options, report=Report({}, None)))
