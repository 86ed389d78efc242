"""Checkpoints to weight files and back, through the command line."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import pytest
import torch
from conftest import Run, Running

from taehv import TAEHV
from taehv.checkpoint import load_weights
from taehv.convert import main
from taehv.errors import UserError


def convert(*arguments: object) -> str:
    """Run the command in this process; returns its output."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        main()
    return output.getvalue()


@pytest.fixture(scope="module")
def run(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a few steps with two checkpoints."""
    run = Run(
        tmp_path_factory.mktemp("converted"),
        videos,
        model__variant="taecvx",
        training__steps=2,
        checkpoint__interval=1,
        optim__ema_decay=0.5,
        validation__clips=0,
    )
    run.train()
    return run


def test_a_run_to_files(run: Run, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "taehv.convert", run.folder, tmp_path / "a.pth"]
    assert Running(command).end() == f"{tmp_path}/a.pth: taecvx, fp32\n"
    averaged = torch.load(tmp_path / "a.pth", weights_only=True)
    exported = torch.load(run.folder / "export/taecvx.pth", weights_only=True)
    assert averaged.keys() == exported.keys()
    assert all(torch.equal(averaged[key], exported[key]) for key in exported)
    step = run.folder / "checkpoints/step-1"
    url = f"file://{step}"
    convert(url, tmp_path / "b.safetensors", "--weights", "model", "--dtype", "fp16")
    raw = TAEHV.from_pretrained(tmp_path / "b.safetensors")
    assert raw.variant_name == "taecvx"
    expected, about = load_weights(step, "model")
    assert about["step"] == "1" and about["latent_space"] == "own"
    for key, value in raw.state_dict().items():
        assert torch.equal(value, expected[key].half().float())
        assert not torch.equal(value, averaged[key]) or not value.any()


def test_checkpoints_elsewhere_are_found_from_any_folder(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(tmp_path, videos, training__steps=1, validation__clips=0)
    run.train(checkpoint__folder="kept")
    monkeypatch.chdir("/")
    convert(run.folder, tmp_path / "a.pth")
    assert (tmp_path / "kept/step-1").is_dir() and (tmp_path / "a.pth").is_file()


def test_a_file_to_a_checkpoint_that_training_starts_from(
    run: Run, videos: Path, tmp_path: Path
) -> None:
    weights = run.folder / "export/taecvx.safetensors"
    convert(weights, tmp_path / "start")
    first_losses = []
    for name, checkpoint in (("file", weights), ("folder", tmp_path / "start")):
        settings = {**run.settings, "job.output_dir": tmp_path / name}
        started = Run(tmp_path / name, videos)
        started.settings = {**settings, "model.checkpoint": checkpoint}
        started.train(training__steps=1)
        first_losses.append(started.losses()[0])
    assert first_losses[0] == first_losses[1] != run.losses()[0]


def test_mistakes_are_one_line(run: Run, tmp_path: Path) -> None:
    weights = run.folder / "export/taecvx.pth"
    (tmp_path / "there.pth").write_bytes(b"")
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:-100])
    for told, arguments in {
        "is there already": (run.folder, tmp_path / "there.pth"),
        "no complete checkpoint": (tmp_path, tmp_path / "x.pth"),
        "no such file": (tmp_path / "none.pth", tmp_path / "there.pth"),
        "not a whole, safe weight file": (tmp_path / "cut.pth", tmp_path / "x.pth"),
        "are not of variant": (weights, tmp_path / "x.pth", "--variant", "taeltx_2"),
        "without suffix": (weights, tmp_path / "x.onnx"),
        "is for checkpoints": (weights, tmp_path / "x.pth", "--weights", "ema"),
        r"cannot write /proc/x.s.* \(No such .*\): name a place that you": (
            *(weights, "/proc/x.safetensors"),
        ),
        "target: s3://b/x.pth is a URL: give a local": (weights, "s3://b/x.pth"),
        "cannot write /proc/x/": (weights, "/proc/x/start"),
    }.items():
        with pytest.raises(UserError, match=told) as raised:
            convert(*arguments)
        assert "\n" not in str(raised.value)
