"""File lists, the split, the sampler's promises, the loader and augmentation."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import resource
import signal
import threading
import time
import wave
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numbered_video import make_video, numbers_of

import taehv.loader
import taehv.sampler
from taehv.augment import color_transform, to_frames
from taehv.clips import Batch, Clip, Failure, collate
from taehv.data import ClipDataset, ValidationDataset, validation_batches
from taehv.errors import UserError
from taehv.files import FileList, split
from taehv.index import build_file_lists
from taehv.loader import ClipLoader, check_shared_memory, worker_count
from taehv.sampler import Steps, draw, permute
from taehv.sections import Data


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five good files of 40 frames and two bad ones."""
    root = tmp_path_factory.mktemp("videos")
    (root / "more").mkdir()
    for i in range(5):
        folder = root / "more" if i % 2 else root
        make_video(folder / f"good{i}.mp4", options={"g": "10", "bf": "2"})
    (root / "bad_empty.mp4").write_bytes(b"")
    (root / "bad_text.mkv").write_text("not a video")
    (root / "notes.txt").write_text("not listed")
    return root


def settings(root: Path, **changes: object) -> Data:
    small = {"frames": 5, "height": 32, "width": 48, "workers": 0}
    return Data(root=str(root), **(small | changes))


# --- files ---------------------------------------------------------------------------


def relative_paths(files: FileList) -> list[str]:
    return [files.relative(i) for i in range(len(files))]


def test_folder_is_searched_for_videos(videos: Path):
    files = FileList.from_config(settings(videos))
    assert relative_paths(files) == [
        "bad_empty.mp4",
        "bad_text.mkv",
        "good0.mp4",
        "good2.mp4",
        "good4.mp4",
        "more/good1.mp4",
        "more/good3.mp4",
    ]
    assert files[5] == str(videos / "more" / "good1.mp4")


def test_home_is_expanded(videos: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(videos))
    files = FileList.from_config(settings(Path("~/more")))
    assert files[0] == str(videos / "more" / "good1.mp4")


def test_list_is_relative_to_root_or_to_itself(tmp_path: Path):
    listed = tmp_path / "some.txt"
    listed.write_text("b.mp4\n\n  sub/a.mp4  \n/elsewhere/c.mp4\nb.mp4\n")
    files = FileList.from_config(Data(annotations=str(listed)))
    assert files[1] == str(tmp_path / "b.mp4")
    root = tmp_path / "root"
    root.mkdir()
    files = FileList.from_config(Data(root=str(root), annotations=str(listed)))
    assert [files[i] for i in range(3)] == [
        "/elsewhere/c.mp4",
        str(root / "b.mp4"),
        str(root / "sub" / "a.mp4"),
    ]


def test_annotation_paths(tmp_path: Path):
    inside = tmp_path / "x" / "inside.mp4"
    entries = [
        {"path": "a.mp4", "duration": 3.5, "frames": 84},
        {"full_path": "/elsewhere/b.mp4"},
        {"full_path": str(inside)},
    ]
    annotation = tmp_path / "list.json"
    annotation.write_text(json.dumps({"total": 3, "list": entries}))
    files = FileList.from_config(Data(root=str(tmp_path), annotations=str(annotation)))
    assert relative_paths(files) == ["/elsewhere/b.mp4", "a.mp4", "x/inside.mp4"]
    assert files[2] == str(inside)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "a.mp4\nb.mp4\n"),
        ("a.csv", "path,frames\na.mp4,7\nb.mp4,8\n"),
        ("a.jsonl", '{"path": "a.mp4"}\n\n{"path": "b.mp4"}\n'),
        ("a.json", '{"list": [{"path": "a.mp4"}, {"path": "b.mp4"}]}'),
    ],
)
def test_lists_may_begin_with_a_byte_order_mark(
    tmp_path: Path, name: str, content: str
):
    for coding in ("utf-8", "utf-8-sig"):
        (tmp_path / name).write_text(content, coding)
        files = FileList.from_config(Data(annotations=str(tmp_path / name)))
        assert relative_paths(files) == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "no valid JSON"),
        ("a.jsonl", '{"path": "a"}\n\n{"path": b}', "in line 3, column 10"),
        ("a.json", '["a.mp4"]', "must be"),
        ("a.json", '{"list": [{"path": "a"}, {"duration": 1}]}', "entry 1 .* no path"),
        ("a.json", '{"list": [{"path": "\\ud800"}]}', "entry 0 .* no name of a file"),
        ("a.json", '{"list": []}', "no videos"),
        ("a.txt", "\n", "no videos"),
        ("a.txt", None, "cannot be read"),
    ],
)
def test_bad_lists_name_the_cure(
    tmp_path: Path, name: str, content: str | None, message: str
):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        FileList.from_config(Data(annotations=str(tmp_path / name)))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_bad_roots_name_the_cure(tmp_path: Path):
    with pytest.raises(UserError, match="data.root is empty"):
        FileList.from_config(Data())
    with pytest.raises(UserError, match="is no folder"):
        FileList.from_config(Data(root=str(tmp_path / "missing")))
    with pytest.raises(UserError, match="no videos"):
        FileList.from_config(Data(root=str(tmp_path)))


def test_saved_list_is_mapped_and_pickles_by_name(tmp_path: Path):
    paths = [f"folder/{i:05}-é.mp4" for i in range(2000)] + [os.fsdecode(b"\xff.mp4")]
    files = FileList.from_paths("/base", paths)
    saved = files.save(tmp_path)
    copy = pickle.loads(pickle.dumps(saved))
    assert (
        relative_paths(copy) == relative_paths(files) == sorted(paths, key=os.fsencode)
    )
    assert copy.fingerprint == files.fingerprint
    assert len(pickle.dumps(saved)) < 500 < len(pickle.dumps(files))


def test_fingerprint_is_of_the_relative_paths_alone():
    files = FileList.from_paths("/one", ["a.mp4", "b.mp4"])
    assert (
        files.fingerprint == FileList.from_paths("/two", ["b.mp4", "a.mp4"]).fingerprint
    )
    for other in (["a.mp4"], ["a.mp4b.mp4"], ["a.mp4", "c.mp4"], ["a.mp4b", ".mp4"]):
        assert files.fingerprint != FileList.from_paths("/one", other).fingerprint


# --- split ---------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("count", [2, 3, 20, 500])
def test_split_never_overlaps_and_leaves_no_side_empty(count: int, fraction: float):
    paths = [f"{i}.mp4" for i in range(count)]
    sides = split(FileList.from_paths("/", paths), [], fraction)
    train, held = map(relative_paths, sides)
    assert train and held and sorted(train + held) == sorted(paths)
    if count == 500 and 0 < fraction < 1:
        assert abs(len(held) / count - fraction) < 0.05


def test_split_of_a_path_does_not_depend_on_the_others():
    paths = [f"{i}.mp4" for i in range(400)]
    some = FileList.from_paths("/data", paths[::2])
    held_of_all = relative_paths(split(FileList.from_paths("/x", paths), [], 0.2)[1])
    held_of_some = relative_paths(split(some, [], 0.2)[1])
    assert held_of_some == [path for path in held_of_all if path in paths[::2]]


def test_single_file_is_for_training():
    train, held = split(FileList.from_paths("/", ["a.mp4"]), [], 0.5)
    assert (len(train), len(held)) == (1, 0)


def test_holdout_patterns(videos: Path):
    train, held = build_file_lists(settings(videos, holdout=["more/*", "good0*"]))
    assert relative_paths(held) == ["good0.mp4", "more/good1.mp4", "more/good3.mp4"]
    assert relative_paths(train)[-2:] == ["good2.mp4", "good4.mp4"]
    for patterns in (["nothing/*"], ["*"]):
        with pytest.raises(UserError, match="data.holdout"):
            build_file_lists(settings(videos, holdout=patterns))


# --- sampler -------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(1, 40), 64, 65, 255, 256, 257, 300])
def test_permute_is_a_permutation(n: int):
    orders = [[permute(i, n, 3, epoch) for i in range(n)] for epoch in range(2)]
    for order in orders:
        assert sorted(order) == list(range(n))
    if n > 30:
        assert orders[0] != orders[1] != sorted(orders[1])
        assert orders[0] != [permute(i, n, 4, 0) for i in range(n)]


PINNED_ORDER = [4, 0, 3, 6, 7, 1, 8, 5, 9, 2]
PINNED_DRAWS = [0.4169709215763757, 0.7260371657067618]


def test_sampler_values_are_pinned():
    """A change here needs a new SAMPLER_VERSION."""
    assert taehv.sampler.SAMPLER_VERSION == 1
    assert [permute(i, 10, 7, 2) for i in range(10)] == PINNED_ORDER
    assert draw(7, 123456789, 1, 1, 2) == PINNED_DRAWS


def test_draws_differ_in_every_argument():
    base = (1, 2, 3, 1)
    seen = [tuple(draw(*base, 4))]
    for place in range(4):
        changed = [value + (place == i) for i, value in enumerate(base)]
        seen.append(tuple(draw(*changed, 4)))
    assert len(set(seen)) == 5
    assert all(0 <= x < 1 for x in itertools.chain(*seen))


def test_steps_cover_the_global_batch_for_any_world():
    def step_of(world: int, local: int, step: int) -> list[int]:
        numbers = []
        for rank in range(world):
            plan = iter(Steps(100, 24, local, rank, world))
            parts = 24 // world // local
            batches = list(itertools.islice(plan, parts * (step + 1)))[parts * step :]
            numbers += itertools.chain(*batches)
        return numbers

    for world, local in [(1, 24), (1, 6), (2, 12), (3, 4), (4, 2)]:
        assert step_of(world, local, 0) == list(range(100, 124))
        assert step_of(world, local, 2) == list(range(148, 172))
    plan = Steps(100, 24, 4, rank=1, world_size=2)
    assert next(iter(plan.after(7))) == list(itertools.islice(plan, 8))[7]
    with pytest.raises(UserError, match="24 clips"):
        Steps(0, 24, 5, 0, 2)


# --- clips ---------------------------------------------------------------------------


def loader_for(data: Data, **changes: object) -> ClipLoader:
    files = FileList.from_config(data)
    sizes = {"consumed": 0, "global_batch_size": 8, "local_batch_size": 8}
    return ClipLoader(ClipDataset(data, files, seed=5), Steps(**(sizes | changes)))


def read_batches(loader: ClipLoader, count: int) -> list[Batch]:
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def assert_same_clips(left: list[Batch], right: list[Batch]) -> None:
    """Equal clips under equal numbers, however they are cut into batches."""

    def by_number(batches: list[Batch]) -> dict[int, tuple]:
        return {
            number: (batch.frames_NTHWC[i], batch.color_N34[i], batch.sources[i])
            for batch in batches
            for i, number in enumerate(batch.numbers)
        }

    ours, theirs = by_number(left), by_number(right)
    assert ours.keys() == theirs.keys() and ours
    for number, (frames, color, source) in ours.items():
        assert source == theirs[number][2]
        torch.testing.assert_close(frames, theirs[number][0], rtol=0, atol=0)
        torch.testing.assert_close(color, theirs[number][1], rtol=0, atol=0)


def test_other_worlds_and_workers_give_the_same_bytes(videos: Path):
    changes = {"color_jitter": 0.3, "crops_per_window": 2}
    alone = read_batches(loader_for(settings(videos, **changes)), 4)
    shared = []
    for rank in range(2):
        data = settings(videos, workers=2, **changes)
        sizes = {"local_batch_size": 2, "rank": rank, "world_size": 2}
        shared += read_batches(loader_for(data, **sizes), 8)
    assert sorted(itertools.chain(*(batch.numbers for batch in alone))) == list(
        range(32)
    )
    assert_same_clips(alone, shared)


def test_resuming_in_mid_epoch_goes_on_alike(videos: Path):
    whole = read_batches(loader_for(settings(videos)), 4)
    resumed = read_batches(loader_for(settings(videos), consumed=16), 2)
    assert_same_clips(whole[2:], resumed)


def test_an_epoch_visits_every_file_once(videos: Path):
    (batch,) = read_batches(
        loader_for(settings(videos / "more"), global_batch_size=6, local_batch_size=6),
        1,
    )
    for epoch in range(3):
        names = {
            Path(source).name for source in batch.sources[2 * epoch : 2 * epoch + 2]
        }
        assert names == {"good1.mp4", "good3.mp4"}


def test_clips_are_consecutive_frames_within_the_strides(videos: Path):
    data = settings(videos / "more", crop_scale=[1.0, 1.0], flip=0.0, width=44)
    dataset = ClipDataset(data, FileList.from_config(data), seed=1)
    steps, firsts = set(), set()
    for g in range(24):
        numbers = numbers_of(dataset[g].frames_THWC)
        differences = set(np.diff(numbers).tolist())
        assert len(differences) == 1
        steps |= differences
        firsts.add(numbers[0])
    assert steps == {1, 2, 3}
    assert len(firsts) > 8


def test_crops_of_a_window_share_frames_but_not_boxes(videos: Path):
    data = settings(videos / "more", crops_per_window=4)
    files = FileList.from_config(data)
    clips = ClipDataset(data, files, seed=2).__getitems__(list(range(8, 16)))
    singles = [ClipDataset(data, files, seed=2)[g] for g in range(8, 16)]
    for clip, single in zip(clips, singles, strict=True):
        np.testing.assert_array_equal(clip.frames_THWC, single.frames_THWC)
    assert len({clip.source for clip in clips[:4]}) == 1
    assert len({clip.frames_THWC.tobytes() for clip in clips}) == 8
    whole = settings(videos / "more", crops_per_window=4, crop_scale=[1.0, 1.0], flip=0)
    whole.width = 44
    clips = ClipDataset(whole, files, seed=2).__getitems__(list(range(8, 16)))
    windows = [numbers_of(clip.frames_THWC) for clip in clips]
    assert windows[:4] == [windows[0]] * 4 and windows[4:] == [windows[4]] * 4


def test_crops_of_a_longer_window_have_frames_of_their_own(videos: Path):
    whole = {"crop_scale": [1.0, 1.0], "flip": 0, "width": 44, "stride": [2, 2]}
    data = settings(videos / "more", crops_per_window=8, window_frames=12, **whole)
    files = FileList.from_config(data)
    clips = ClipDataset(data, files, seed=2).__getitems__(list(range(16)))
    seen = [numbers_of(clip.frames_THWC) for clip in clips]
    assert all(n == list(range(n[0], n[0] + 9, 2)) for n in seen)
    for window in (seen[:8], seen[8:]):
        firsts = {numbers[0] for numbers in window}
        assert len(firsts) >= 4 and max(firsts) - min(firsts) <= 2 * (12 - 5)
    single = ClipDataset(data, files, seed=2)[11]
    np.testing.assert_array_equal(single.frames_THWC, clips[11].frames_THWC)
    assert clips[0].work.frames == 12
    shared = settings(videos / "more", crops_per_window=8, **whole)
    for clip in ClipDataset(shared, files, seed=2).__getitems__(list(range(8))):
        longer = settings(videos / "more", window_frames=5, crops_per_window=8, **whole)
        same = ClipDataset(longer, files, seed=2)[clip.number]
        np.testing.assert_array_equal(same.frames_THWC, clip.frames_THWC)


def test_bad_files_are_replaced_and_named(videos: Path):
    batches = read_batches(loader_for(settings(videos)), 7)
    sources = {source for batch in batches for source in batch.sources}
    assert sources == {str(path) for path in videos.rglob("good*.mp4")}
    failures = [failure for batch in batches for failure in batch.failures]
    assert {Path(f.path).name for f in failures} == {"bad_empty.mp4", "bad_text.mkv"}
    assert all(f.number in range(56) and f.path in str(f) for f in failures)
    assert_same_clips(
        batches[3:], read_batches(loader_for(settings(videos), consumed=24), 4)
    )


def damaged(root: Path) -> set[str]:
    """Write files of every kind of damage; the names of those without a clip."""
    good = make_video(root / "good.mp4", options={"g": "10", "bf": "2"}).read_bytes()
    (root / "good2.mp4").write_bytes(good)
    flipped = bytearray(good)
    rng = np.random.default_rng(0)
    for place in rng.integers(len(good) // 4, len(good) * 3 // 4, 200):
        flipped[place] ^= int(rng.integers(1, 256))
    (root / "flipped.mp4").write_bytes(flipped)
    (root / "truncated.mp4").write_bytes(good[: len(good) // 2])
    (root / "empty.mp4").write_bytes(b"")
    (root / "text.mp4").write_text("not a video\n" * 100)
    with wave.open(str(root / "sound.mp4"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(8000))
    make_video(root / "one_frame.mp4", frames=1)
    return {"truncated.mp4", "empty.mp4", "text.mp4", "sound.mp4", "one_frame.mp4"}


def test_every_kind_of_damage_costs_its_sample_alone(tmp_path: Path):
    without_clip = damaged(tmp_path)
    data = settings(tmp_path, stride=[1, 1])
    batches = read_batches(loader_for(data), 9)
    assert [len(batch.numbers) for batch in batches] == [8] * 9
    failures = [failure for batch in batches for failure in batch.failures]
    failed = {Path(failure.path).name for failure in failures}
    assert without_clip <= failed <= without_clip | {"flipped.mp4"}
    assert all(failure.path in failure.reason for failure in failures)
    parted = read_batches(loader_for(settings(tmp_path, stride=[1, 1], workers=2)), 9)
    assert_same_clips(batches, parted)
    again = [failure for batch in parted for failure in batch.failures]
    assert [(f.path, f.number) for f in again] == [(f.path, f.number) for f in failures]


@pytest.mark.parametrize("workers", [0, 1])
def test_no_usable_file_is_told_in_one_line(tmp_path: Path, workers: int):
    (tmp_path / "bad.mp4").write_text("not a video")
    loader = loader_for(settings(tmp_path, workers=workers))
    with pytest.raises(UserError, match="no usable file .*bad.mp4") as caught:
        next(loader)
    loader.close()
    assert "\n" not in str(caught.value)


def test_killed_worker_is_replaced_without_a_trace(
    videos: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(taehv.loader.log, "propagate", True)
    expected = read_batches(loader_for(settings(videos)), 12)
    loader = loader_for(settings(videos, workers=2))
    batches = list(itertools.islice(loader, 3))
    workers = active_children()
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGKILL)
    batches += itertools.islice(loader, 9)
    loader.close()
    assert "start anew" in caplog.text
    assert_same_clips(expected, batches)
    for child in active_children():
        child.join(60)
    assert not active_children()


class HangsOnce(ClipDataset):
    """Clips, but the first process to reach sample 16 never comes back."""

    def __init__(self, data: Data, files: FileList, seed: int, mark: Path) -> None:
        super().__init__(data, files, seed)
        self.mark = mark

    def mapped(self, folder: str) -> HangsOnce:
        return self

    def __getitems__(self, numbers: list[int]) -> list[Clip]:
        if numbers[0] == 16 and not self.mark.exists():
            self.mark.touch()
            time.sleep(600)
        return super().__getitems__(numbers)


def test_hung_workers_are_replaced(
    videos: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(taehv.loader.log, "propagate", True)
    monkeypatch.setattr(taehv.loader, "POLL_SECONDS", 1)
    monkeypatch.setattr(taehv.loader, "TIMEOUT_SECONDS", 6)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 1)
    expected = read_batches(loader_for(settings(videos)), 4)
    data = settings(videos, workers=1)
    source = HangsOnce(data, FileList.from_config(data), 5, tmp_path / "hung")
    batches = read_batches(ClipLoader(source, Steps(0, 8, 8)), 4)
    assert "start anew" in caplog.text
    assert_same_clips(expected, batches)


class Cramped(ClipDataset):
    """Clips for whose batches the worker may share too little memory."""

    def mapped(self, folder: str) -> Cramped:
        return self

    def __getitems__(self, numbers: list[int]) -> list[Clip]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        return super().__getitems__(numbers)


def test_batch_that_finds_no_shared_memory_is_told_in_one_line(videos: Path):
    data = settings(videos, workers=1)
    source = Cramped(data, FileList.from_config(data), 5)
    loader = ClipLoader(source, Steps(0, 8, 8))
    with pytest.raises(UserError, match="no shared memory .*File too large") as caught:
        next(loader)
    loader.close()
    assert "\n" not in str(caught.value)


def test_crops_must_divide_the_local_batch(videos: Path):
    with pytest.raises(UserError, match="crops_per_window = 3"):
        loader_for(settings(videos, crops_per_window=3))


def test_loader_leaves_the_random_numbers_of_training_alone(videos: Path):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    read_batches(loader_for(settings(videos)), 1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_small_shared_memory_is_told(monkeypatch: pytest.MonkeyPatch):
    small = SimpleNamespace(f_bavail=16, f_frsize=1 << 20)
    monkeypatch.setattr(taehv.loader.os, "statvfs", lambda path: small)
    batch = 4 * 8 * 128 * 128 * 3
    check_shared_memory(batch, prefetch=2, workers=3)
    with pytest.raises(UserError, match="16 MiB free .*--shm-size"):
        check_shared_memory(batch, prefetch=2, workers=4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="data.workers"):
        check_shared_memory(batch, prefetch=2, workers=3)
    data = Data(frames=8, height=128, width=128, workers=4)
    files = FileList.from_paths("/", ["a.mp4"])
    with pytest.raises(UserError, match="data.workers"):
        ClipLoader(ClipDataset(data, files, 0), Steps(0, 8, 4, 0, 2))


def test_worker_count_shares_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(taehv.loader.os, "sched_getaffinity", lambda pid: range(32))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert worker_count(-1) == 8
    assert worker_count(0) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert worker_count(-1) == 1


# --- validation ----------------------------------------------------------------------


def test_validation_clips_are_fixed_and_spread(videos: Path):
    data = settings(videos / "more", width=44, flip=1.0, color_jitter=0.5)
    dataset = ValidationDataset(data, FileList.from_config(data), clips=7)
    firsts = {"good1.mp4": [], "good3.mp4": []}
    for clip in map(dataset.__getitem__, range(7)):
        numbers = numbers_of(clip.frames_THWC)
        assert numbers == list(range(numbers[0], numbers[0] + 5))
        assert np.array_equal(clip.color_34, np.eye(3, 4))
        firsts[Path(clip.source).name].append(numbers[0])
    assert firsts == {"good1.mp4": [5, 14, 22, 31], "good3.mp4": [6, 18, 30]}


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_drops_bad_files(videos: Path, workers: int):
    data = settings(videos, workers=workers)
    files = FileList.from_config(data)
    batches = list(validation_batches(data, files, range(0, 14, 2), 14, 2))
    assert [number for b in batches for number in b.numbers] == [2, 4, 6, 10, 12]
    failed = [failure for batch in batches for failure in batch.failures]
    assert [(Path(f.path).name, f.number) for f in failed] == [
        ("bad_empty.mp4", 0),
        ("bad_text.mkv", 8),
    ]


def test_validation_that_is_left_early_decodes_no_more(
    videos: Path, monkeypatch: pytest.MonkeyPatch
):
    def decode(_: ValidationDataset, number: int) -> Failure:
        decoded.append(number)
        if number:
            left.wait(60)
            time.sleep(0.02)
        return Failure("a.mp4", "slow", number)

    decoded: list[int] = []
    left = threading.Event()
    monkeypatch.setattr(ValidationDataset, "__getitem__", decode)
    data = settings(videos)
    batches = validation_batches(data, FileList.from_config(data), range(99), 99, 1)
    next(batches)
    threading.Timer(0.2, left.set).start()  # what is being decoded is waited for
    batches.close()
    assert len(decoded) < 50


def test_batch_of_failures_is_empty():
    batch = collate([Failure("a.mp4", "a.mp4: broken", 3)])
    assert len(batch.frames_NTHWC) == len(batch.color_N34) == 0
    assert batch.numbers == [] and len(batch.failures) == 1


# --- colour --------------------------------------------------------------------------


def batch_of(frames_THWC: np.ndarray, *colors_34: np.ndarray) -> Batch:
    return collate([Clip(frames_THWC, color, 0, "a.mp4") for color in colors_34])


ALL_VALUES = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frames_without_jitter_are_exact(dtype: torch.dtype):
    batch = batch_of(ALL_VALUES, color_transform(0, [0.9, 0.1, 0.3, 0.7]))
    frames_NTCHW = to_frames(batch, "cpu", dtype)
    expected = torch.from_numpy(ALL_VALUES).double() / 255
    expected = expected.to(torch.float32).to(dtype).permute(0, 3, 1, 2)[None]
    assert frames_NTCHW.shape == (1, 1, 3, 16, 16) and frames_NTCHW.dtype == dtype
    assert torch.equal(frames_NTCHW, expected)
    assert frames_NTCHW.permute(0, 1, 3, 4, 2).is_contiguous()


def test_color_is_applied_to_each_clip_and_clamped():
    darker = np.eye(3, 4, dtype=np.float32) * 0.5
    swapped = np.eye(3, 4, dtype=np.float32)[[2, 0, 1]]
    brighter = np.eye(3, 4, dtype=np.float32) + np.float32([0, 0, 0, 0.5])
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    out = to_frames(batch_of(frames, darker, swapped, brighter), "cpu")
    plain = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(out[0], plain * 0.5)
    torch.testing.assert_close(out[1], plain[:, [2, 0, 1]])
    torch.testing.assert_close(out[2], (plain + 0.5).clamp(0, 1))
    assert out.permute(0, 1, 3, 4, 2).is_contiguous()


def test_color_transform_parts():
    def apply(draws: list[float], rgb: list[float]) -> np.ndarray:
        return color_transform(0.5, draws) @ np.array([*rgb, 1])

    neutral = 0.5
    color = [0.2, 0.6, 0.4]
    np.testing.assert_allclose(apply([neutral] * 4, color), color, atol=1e-6)
    bright = apply([1.0, neutral, neutral, neutral], color)
    np.testing.assert_allclose(bright, np.multiply(color, 1.5), atol=1e-6)
    contrast = apply([neutral, 0.0, neutral, neutral], color)
    np.testing.assert_allclose(contrast, np.add(color, 0.5) / 2, atol=1e-6)
    luma = np.dot([0.2126, 0.7152, 0.0722], color)
    dull = apply([neutral, neutral, 0.0, neutral], color)
    np.testing.assert_allclose(dull, np.add(color, luma) / 2, atol=1e-6)
    turned = apply([neutral, neutral, neutral, 1.0], color)
    assert abs(turned - color).max() > 0.1
    np.testing.assert_allclose(turned.sum(), sum(color), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(turned), np.linalg.norm(color), atol=1e-6)
    # Saturation and hue leave grey alone.
    grey = apply([neutral, neutral, 0.9, 0.2], [0.3, 0.3, 0.3])
    np.testing.assert_allclose(grey, 0.3, atol=1e-6)
