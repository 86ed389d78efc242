"""What is known of every file: probing, renewal, filters, and five million rows."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numbered_video import make_video, promise

import taehv.data
import taehv.index
from taehv.errors import UserError
from taehv.files import FileList, Source
from taehv.index import (
    BAD,
    GOOD,
    KEPT,
    ROW,
    build_file_lists,
    list_files,
    open_index,
    update_index,
)
from taehv.sections import Data
from taehv.video import VideoError

ROOT = Path(taehv.index.__file__).parent.parent


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Three good files of different kinds and four bad ones."""
    root = tmp_path / "videos"
    (root / "more").mkdir(parents=True)
    make_video(root / "small.mp4", options={"g": "10", "sc_threshold": "0"})
    make_video(root / "more" / "wide.mkv", frames=30, size=(48, 96))
    make_video(root / "more" / "turned.mp4", size=(64, 96), rotation=90)
    (root / "empty.mp4").write_bytes(b"")
    (root / "text.mp4").write_text("no video\n" * 100)
    (root / "cut.mp4").write_bytes((root / "small.mp4").read_bytes()[:300])
    (root / "gone.mp4").symlink_to(root / "nothing.mp4")
    return root


def settings(videos: Path, **changes: object) -> Data:
    index = str(videos.parent / "index")
    return Data(root=str(videos), index=index, workers=0, **changes)


def source(videos: Path) -> Source:
    return Source.of(str(videos), "")


def names(files: FileList) -> list[str]:
    return [files.relative(i) for i in range(len(files))]


def test_every_file_is_described(videos: Path):
    index = open_index(settings(videos), source(videos))
    rows = {
        path: row for path, row in zip(names(index.files), index.table, strict=True)
    }
    small = rows["small.mp4"]
    assert (small["status"], small["codec"], small["frames"]) == (GOOD, b"h264", 40)
    assert (small["width"], small["height"], small["rate"]) == (64, 48, 25)
    assert small["keyframe_interval"] == 10 and abs(small["duration"] - 1.6) < 1e-6
    assert small["size"] == (videos / "small.mp4").stat().st_size
    turned = rows["more/turned.mp4"]
    assert (turned["width"], turned["height"], turned["rotation"]) == (64, 96, 90)
    bad = {names(index.files)[i]: index.reason(i) for i in index.bad}
    assert bad.keys() == {"empty.mp4", "text.mp4", "cut.mp4", "gone.mp4"}
    assert bad["gone.mp4"] == "No such file or directory"
    assert "Invalid data" in bad["text.mp4"] and str(videos) not in bad["text.mp4"]


def test_bad_files_are_left_out_and_listed(videos: Path, caplog, monkeypatch):
    monkeypatch.setattr(taehv.index.log, "propagate", True)
    train, held = build_file_lists(settings(videos, holdout=["small*"]))
    assert names(train) == ["more/turned.mp4", "more/wide.mkv"]
    assert names(held) == ["small.mp4"]
    assert "left out 4 bad files of 7" in caplog.text
    (listed,) = (videos.parent / "index").rglob("bad_files.txt")
    lines = listed.read_text().splitlines()
    assert len(lines) == 4 and lines[0].startswith(f"{videos / 'cut.mp4'}: ")


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        ({"min_size": 64}, ["more/turned.mp4"]),
        ({"min_frames": 31}, ["more/turned.mp4", "small.mp4"]),
        ({"min_rate": 25.5}, None),
        ({"aspect": [1.0, 1.5]}, ["small.mp4"]),
        ({"aspect": [1.5, 3.0]}, ["more/wide.mkv"]),
    ],
)
def test_filters(videos: Path, filters: dict, left: list[str] | None):
    data = settings(videos, **filters)
    if left is None:
        with pytest.raises(UserError, match="4 are bad .* 3 do not pass data.min_"):
            list_files(data, source(videos))
    else:
        assert names(list_files(data, source(videos))) == left


def test_only_what_changed_is_probed_again(videos: Path, monkeypatch):
    data = settings(videos)
    open_index(data, source(videos))
    probed = []

    def probe(path: str):
        probed.append(os.path.basename(path))
        return real(path)

    real = taehv.index.probe
    monkeypatch.setattr(taehv.index, "probe", probe)
    open_index(data, source(videos))
    update_index(data, source(videos))
    assert probed == []
    make_video(videos / "new.mp4")
    make_video(videos / "empty.mp4")
    (videos / "small.mp4").unlink()
    # A run that looks again goes by the index alone.
    assert len(open_index(data, source(videos)).files) == 7
    index = update_index(data, source(videos))
    assert sorted(probed) == ["empty.mp4", "new.mp4"]
    assert "small.mp4" not in names(index.files) and len(index.bad) == 3


def test_a_killed_index_goes_on(videos: Path, monkeypatch):
    for i in range(6):
        make_video(videos / f"{i}.mp4", frames=2)
    monkeypatch.setattr(taehv.index, "CHUNK", 1)
    real, probed = taehv.index.probe, []

    def probe(path: str):
        probed.append(path)
        if len(probed) == 5:
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(taehv.index, "probe", probe)
    with pytest.raises(KeyboardInterrupt):
        open_index(settings(videos), source(videos))
    assert not list((videos.parent / "index").rglob("about.json"))
    index = open_index(settings(videos), source(videos))
    assert len(probed) == 5 + 12 - 4  # one is missing and four were done
    assert len(index.bad) == 4 and len(index.files) == 13


def test_processes_find_the_same(videos: Path, monkeypatch, tmp_path: Path):
    alone = open_index(settings(videos), source(videos))
    monkeypatch.setattr(taehv.index, "SERIAL", 1)
    data = settings(videos)
    data.index, data.workers = str(tmp_path / "other"), 2
    together = open_index(data, source(videos))
    for name in set(ROW.names) - {"reason"}:
        np.testing.assert_array_equal(alone.table[name], together.table[name])
    assert [alone.reason(i) for i in alone.bad] == [
        together.reason(i) for i in together.bad
    ]


def test_a_file_that_crashes_its_reader_is_bad(videos: Path, monkeypatch):
    monkeypatch.setattr(taehv.index, "SERIAL", 1)
    monkeypatch.setattr(taehv.index, "shared", lambda call, starts, *_: [(0, None)])

    def crashing(call, i):
        (answer,) = call(i)
        return None if answer[0]["keyframe_interval"] == 10 else [answer]

    monkeypatch.setattr(taehv.index, "alone", crashing)
    data = settings(videos)
    data.workers = 2
    index = open_index(data, source(videos))
    reasons = {names(index.files)[i]: index.reason(i) for i in index.bad}
    assert reasons["small.mp4"] == "ends the process that reads it"
    assert len(reasons) == 5 and len(index.files) == 7


def test_a_changed_list_makes_another_index(videos: Path):
    listed = videos / "list.txt"
    listed.write_text("small.mp4\n")
    data = Data(annotations=str(listed), index=str(videos / "index"), workers=0)
    assert len(build_file_lists(data)[0]) == 1
    listed.write_text("small.mp4\nmore/wide.mkv\n")
    assert sum(map(len, build_file_lists(data))) == 2


def test_runs_go_on_while_the_index_is_renewed(videos: Path):
    data = settings(videos)
    files = open_index(data, source(videos)).select(data)
    for _ in range(KEPT):
        assert names(pickle.loads(pickle.dumps(files))) == names(files)
        update_index(data, source(videos))
    assert len(list((videos.parent / "index").rglob("arrays-*"))) == KEPT


def test_only_reasons_in_use_are_kept_and_the_last_is_of_all_others(
    tmp_path: Path, monkeypatch
):
    def probe(path: str) -> None:
        raise VideoError(f"{path}: kind {Path(path).stem}")

    def reasons(add: str, remove: str) -> list[str]:
        for name in add:
            (tmp_path / "videos" / f"{name}.mp4").write_text("no video")
        for name in remove:
            (tmp_path / "videos" / f"{name}.mp4").unlink()
        index = update_index(settings(tmp_path / "videos"), source(tmp_path / "videos"))
        assert len(index.bad) == len(index.files)
        return [index.reason(i) for i in index.bad]

    (tmp_path / "videos").mkdir()
    monkeypatch.setattr(taehv.index, "probe", probe)
    monkeypatch.setattr(taehv.index, "REASONS", 3)
    other = "another reason"
    assert reasons("abcd", "") == ["kind a", "kind b", other, other]
    assert reasons("e", "a") == ["kind b", other, other, other]
    assert reasons("af", "b") == ["kind a", other, other, other, other]


def test_a_missing_list_is_told_in_one_line(tmp_path: Path):
    data = Data(annotations=str(tmp_path / "no.txt"), index=str(tmp_path / "index"))
    with pytest.raises(UserError, match="annotations = .*no.txt cannot be read"):
        build_file_lists(data)


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(UserError, match=r"list.txt cannot be read \(a pipe"):
        build_file_lists(Data(annotations=str(tmp_path / "list.txt")))


@pytest.mark.parametrize("place", ["videos/a.mp4", "/proc/none"])
def test_a_place_without_room_for_an_index_is_told_in_one_line(
    tmp_path: Path, place: str
):
    root = tmp_path / "videos"
    root.mkdir()
    make_video(root / "a.mp4", frames=3)
    data = Data(root=str(root), index=str(tmp_path / place), workers=0)
    for make in (
        lambda: build_file_lists(data),
        lambda: update_index(data, source(root)),
    ):
        with pytest.raises(UserError, match=f"data.index: cannot write to .*{place}"):
            make()


@pytest.mark.parametrize(("seconds", "frames"), [(9e12, 2**32 - 1), (-9e12, 0)])
def test_a_header_may_promise_anything(tmp_path: Path, seconds: float, frames: int):
    promise(make_video(tmp_path / "a.mkv", frames=3), seconds)
    index = open_index(settings(tmp_path), source(tmp_path))
    assert (index.table["status"][0], index.table["frames"][0]) == (GOOD, frames)


def test_a_full_disk_is_told_in_one_line(videos: Path, monkeypatch):
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(taehv.index, "write_text", full)
    told = r"cannot write to .*index/\w+/.* \(No space left on device\): mend that, or"
    with pytest.raises(UserError, match=told):
        update_index(settings(videos), source(videos))


def test_a_folder_without_locks_is_refused(videos: Path, monkeypatch):
    def unsupported(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(
        UserError, match=r"cannot be locked \(Function not impl.*: name"
    ):
        update_index(settings(videos), source(videos))


def test_no_usable_file_is_told_in_one_line(tmp_path: Path):
    root = tmp_path / "videos"
    root.mkdir()
    (root / "a.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="no usable video: 1 are bad") as caught:
        build_file_lists(settings(root))
    assert "\n" not in str(caught.value)


def test_command_reports(videos: Path):
    command = [sys.executable, "-m", "taehv.data", "index", f"--data.root={videos}"]
    command += [f"--data.index={videos.parent / 'index'}", "--data.workers=0"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert "3 good files" in done.stdout and "4 bad files" in done.stdout
    assert f"{videos / 'gone.mp4'}: No such file" in done.stdout


def test_help(monkeypatch, capsys):
    for words, told in {
        ("--help",): "python -m taehv.data index --data.root FOLDER",
        ("proxy", "--help"): "usage: python -m taehv.data proxy --config FILE",
    }.items():
        monkeypatch.setattr(sys, "argv", ["data.py", *words])
        with contextlib.suppress(SystemExit):  # as argparse ends
            taehv.data.main()
        assert told in capsys.readouterr().out


# --- five million files --------------------------------------------------------------


def write_index(folder: Path, base: str, count: int) -> Data:
    """An index of files that are not there, as `_make` would leave it."""
    data = Data(root=base, index=str(folder))
    place = taehv.index._folder(data, Source.of(base, ""))
    (place / "unfinished").mkdir(parents=True)
    paths = [
        f"{i // 1000:05}/{i:09}-some-longer-name.mp4".encode() for i in range(count)
    ]
    np.save(place / "unfinished" / "paths.npy", np.frombuffer(b"".join(paths), "u1"))
    ends = np.cumsum([0, *map(len, paths)], dtype=np.int64)
    np.save(place / "unfinished" / "ends.npy", ends)
    table = np.zeros(count, ROW)
    table["hash"] = np.random.default_rng(0).integers(0, 2**64, count, np.uint64)
    table["status"] = np.where(np.arange(count) % 100, GOOD, BAD)
    table["frames"], table["width"], table["height"] = 300, 1280, 720
    np.save(place / "unfinished" / "table.npy", table)
    identity = taehv.index._identity(Source.of(base, ""), False)
    about = {**identity, "base": base, "reasons": ["broken"], "arrays": "unfinished"}
    (place / "about.json").write_text(json.dumps(about))
    return data


MEASURE = """
import pickle, sys, time
from taehv.data import ClipDataset
own = lambda: next(int(line.split()[1]) for line in open("/proc/self/smaps_rollup")
    if line.startswith("Anonymous:"))
before = own()
dataset = pickle.load(open(sys.argv[1], "rb"))
begin = time.perf_counter()
for window in range(20000):
    dataset._place(*dataset._shares.part(window), window, 0)
seconds = time.perf_counter() - begin
print(own() - before, seconds / 20000 * 1e6)
"""


@pytest.mark.soak
def test_five_million_files(tmp_path: Path, capsys):
    from taehv.data import ClipDataset

    base = str(tmp_path / "base")
    os.mkdir(base)
    data = write_index(tmp_path / "index", base, 5_000_000)
    begin = time.perf_counter()
    index = open_index(data, Source.of(base, ""))
    opened = time.perf_counter() - begin
    begin = time.perf_counter()
    train, held = build_file_lists(data)
    split_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    assert len(train.fingerprint) == 64
    hashed = time.perf_counter() - begin
    saved = ClipDataset(data, train, 0).mapped(str(tmp_path))
    (tmp_path / "dataset").write_bytes(pickle.dumps(saved))
    assert (tmp_path / "dataset").stat().st_size < 10_000
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "dataset")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    kib, microseconds = map(float, done.stdout.split())
    with capsys.disabled():
        print(
            f"\n{len(index.files)} files: opened in {opened:.3f} s, filtered and split "
            f"in {split_seconds:.2f} s, hashed in {hashed:.2f} s; "
            f"a worker: {kib / 1024:.1f} MiB of its own, "
            f"{microseconds:.1f} microseconds a sample"
        )
    assert len(train) + len(held) == 4_950_000
    assert opened < 1 and kib < 50 * 1024
