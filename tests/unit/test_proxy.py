"""Smaller copies: their frames, times and places, and what is done with bad files."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from numbered_video import make_video, numbers_of

from taehv.errors import UserError
from taehv.proxy import proxy_command
from taehv.sections import Config, Data, Proxy
from taehv.video import VideoError, probe, read_frames, reencode

VARIABLE = [i * 40 + i * i % 37 + 500 * (i // 10) for i in range(40)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("b_frames.mp4", {"options": {"bf": "3", "g": "40"}}),
        ("variable.mp4", {"options": {"bf": "2"}, "times": VARIABLE}),
        ("times_are_dts.mp4", {"options": {"bf": "2"}, "times_are_dts": True}),
        ("b_frames.avi", {"options": {"bf": "1"}}),
        ("raw.h264", {"options": {"bf": "2"}}),
        ("deep.mkv", {"pixel_format": "yuv444p10le"}),
        ("mpeg2.mpg", {"codec": "mpeg2video", "options": {"bf": "2"}}),
    ],
)
def test_copies_have_the_same_frames(tmp_path: Path, name: str, kind: dict):
    path, copy = make_video(tmp_path / name, size=(96, 128), **kind), tmp_path / "copy"
    reencode(str(path), str(copy), 48, 8, 18)
    frames = np.stack(list(read_frames(str(copy))))
    assert frames.shape == (40, 48, 64, 3)
    assert numbers_of(frames) == list(range(40))
    info, original = probe(str(copy)), probe(str(path))
    assert info.codec == "h264" and info.keyframe_interval <= 8
    if original.duration and name != "mpeg2.mpg":  # whose header is wrong
        assert abs(info.duration - original.duration) < 0.06
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_copies_stand_upright(tmp_path: Path, rotation: int):
    path = make_video(tmp_path / "turned.mp4", frames=4, rotation=rotation)
    reencode(str(path), str(tmp_path / "copy"), 48, 12, 10)
    expected = np.stack(list(read_frames(str(path)))).astype(int)
    copied = np.stack(list(read_frames(str(tmp_path / "copy")))).astype(int)
    assert (
        copied.shape == expected.shape and probe(str(tmp_path / "copy")).rotation == 0
    )
    assert np.abs(copied - expected).mean() < 8


def test_times_that_no_copy_can_have_are_told(tmp_path: Path):
    times = [i * 40 + 2**57 * (i // 10) for i in range(30)]
    path = make_video(tmp_path / "a.mkv", frames=30, times=times)
    with pytest.raises(VideoError, match="a.mkv: a time is out of range"):
        reencode(str(path), str(tmp_path / "copy"), 48, 12, 18)


def test_small_videos_keep_their_size(tmp_path: Path):
    path = make_video(tmp_path / "odd.mkv", 4, "mpeg4", size=(49, 65))
    reencode(str(path), str(tmp_path / "copy"), 360, 12, 18)
    info = probe(str(tmp_path / "copy"))
    assert (info.height, info.width) == (48, 64)


def config(root: Path, workers: int = 0, **proxy: object) -> Config:
    settings = {"folder": str(root.parent / "copies"), "height": 32, **proxy}
    return Config(data=Data(root=str(root), workers=workers), proxy=Proxy(**settings))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_is_copied_once(tmp_path: Path, capsys, caplog, workers: int):
    root, copies = tmp_path / "videos", tmp_path / "copies"
    (root / "sub").mkdir(parents=True)
    make_video(root / "a.mp4", frames=6)
    make_video(root / "sub" / "b.mkv", frames=6)
    (root / "bad.mp4").write_text("no video")
    cut = make_video(root / "cut.mp4", frames=40, options={"movflags": "+faststart"})
    cut.write_bytes(cut.read_bytes()[:-2000])
    proxy_command(config(root, workers))
    assert f"left out {root / 'bad.mp4'}: Invalid data" in caplog.text
    told = capsys.readouterr().out
    assert "2 copies" in told and "2 bad files" in told
    found = sorted(str(p.relative_to(copies)) for p in copies.rglob("*.m*"))
    assert found == ["a.mp4", "sub/b.mkv"]
    bad = (copies / "bad_files.txt").read_text()
    assert str(root / "bad.mp4") in bad and str(root / "cut.mp4") in bad
    kept = [copies / "a.mp4", copies / "proxy.json"]
    before = [path.stat().st_mtime_ns for path in kept]
    os.remove(copies / "sub" / "b.mkv")
    proxy_command(config(root))
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert probe(str(copies / "sub" / "b.mkv")).height == 32


def test_copies_of_what_is_gone_are_named_and_left(tmp_path: Path, caplog):
    root = tmp_path / "videos"
    root.mkdir()
    make_video(root / "a.mp4", frames=2)
    make_video(root / "b.mp4", frames=2)
    proxy_command(config(root))
    assert not caplog.records
    (root / "b.mp4").unlink()
    proxy_command(config(root))
    (record,) = caplog.records
    copy = tmp_path / "copies" / "b.mp4"
    assert record.message.startswith("1 copies are of videos that are not listed")
    assert record.message.endswith(f"delete {copy}") and copy.exists()


def test_what_is_in_the_way_of_a_copy_is_told(tmp_path: Path):
    root = tmp_path / "videos"
    (root / "sub").mkdir(parents=True)
    make_video(root / "sub" / "b.mp4", frames=2)
    (root / "bad.mp4").write_text("no video")
    proxy_command(config(root))
    shutil.rmtree(tmp_path / "copies" / "sub")
    (tmp_path / "copies" / "sub").write_text("a file")
    with pytest.raises(UserError, match="none of 2 files can be copied: .*bad_files"):
        proxy_command(config(root))
    assert "sub" in (tmp_path / "copies" / "bad_files.txt").read_text()


@pytest.mark.parametrize("write", ["os.makedirs", "pathlib.Path.write_text"])
def test_a_folder_that_is_read_only_by_now_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
):
    root = tmp_path / "videos"
    root.mkdir()
    make_video(root / "a.mp4", frames=2)
    proxy_command(config(root))
    make_video(root / "b.mp4", frames=2)

    def fails(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / "copies"))

    monkeypatch.setattr(write, fails)
    told = rf"^proxy.folder: {tmp_path}/copies cannot be written \(Read-only .*: mend"
    with pytest.raises(UserError, match=told):
        proxy_command(config(root))


def test_copies_of_two_kinds_are_not_mixed(tmp_path: Path):
    root = tmp_path / "videos"
    root.mkdir()
    make_video(root / "a.mp4", frames=2)
    with pytest.raises(UserError, match="proxy.folder is empty"):
        proxy_command(config(root, folder=""))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file cannot be written \(File exists\)"):
        proxy_command(config(root, folder=str(tmp_path / "file")))
    (tmp_path / "link").symlink_to(root)
    for folder in (root, root / "copies", tmp_path / "link" / "copies"):
        with pytest.raises(UserError, match="proxy.folder is data.root or inside it"):
            proxy_command(config(root, folder=str(folder)))
    proxy_command(config(root))
    with pytest.raises(UserError, match="made with .*'height': 32"):
        proxy_command(config(root, height=48))
    with pytest.raises(UserError, match="holds other files"):
        proxy_command(config(root, folder=str(tmp_path)))


def test_a_full_disk_is_not_blamed_on_the_videos(tmp_path: Path):
    root, copies = tmp_path / "videos", tmp_path / "copies"
    root.mkdir()
    make_video(root / "a.mp4", size=(96, 128))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(UserError, match="write .*a.mp4.*too large") as caught:
            proxy_command(config(root, height=96))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    # As a process hands it on.
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert [path.name for path in copies.iterdir()] == ["proxy.json"]
    proxy_command(config(root, height=96))
    assert (copies / "a.mp4").exists()
