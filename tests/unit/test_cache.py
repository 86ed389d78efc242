"""The latent cache: what is stored, what is cut from it, and what damage costs."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import pytest
import torch
from cache_teachers import Projection
from conftest import Running
from numbered_video import make_video, numbers_of

import taehv.cache
import taehv.precompute
from examples import write_cache
from taehv import TAEHV, VARIANTS
from taehv.augment import to_frames
from taehv.cache import (
    Cache,
    CacheDataset,
    Notes,
    ShardWriter,
    Window,
    cached_batches,
    describe,
    from_jpeg,
    locked,
    to_jpeg,
    write_about,
)
from taehv.clips import Batch, Clip, collate
from taehv.config import read_config
from taehv.data import ClipDataset, ValidationDataset
from taehv.distributed import started
from taehv.errors import UserError
from taehv.index import build_file_lists
from taehv.loader import ClipLoader
from taehv.precompute import check_precompute, precompute
from taehv.sampler import Steps
from taehv.sections import Data, Parallelism, Teacher
from taehv.teacher import load_teacher
from taehv.validate import tell, validate

CPU = torch.device("cpu")
ROOT = Path(taehv.cache.__file__).parent.parent
SMALL = {
    "data.holdout": "held.mp4",
    "data.frames": 9,
    "data.height": 32,
    "data.width": 16,
    "data.color_jitter": 0.2,
    "data.workers": 0,
    "cache.windows": 14,
    "cache.frames": 17,
    "cache.height": 48,
    "cache.width": 64,
    "cache.shard_windows": 6,
    "cache.batch_size": 4,
    "validation.clips": 3,
    "teacher.kind": "cache_teachers:Projection",
    "training.device": "cpu",
    "training.seed": 7,
}
"""Three shards of 4 + 2, 4 + 2 and 2 windows, and one of validation clips."""


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos to train on, one of them bad, and one held out."""
    root = tmp_path_factory.mktemp("videos")
    for name in ("a.mp4", "b.mp4", "held.mp4"):
        make_video(root / name)
    (root / "bad.mp4").write_text("not a video")
    return root


def arguments(videos: Path, folder: Path, **changes: object) -> list[str]:
    """A command line; changes are named section__key."""
    named = {key.replace("__", "."): value for key, value in changes.items()}
    settings = {"data.root": videos, "data.cache": folder, **SMALL, **named}
    return [f"--{key}={value}" for key, value in settings.items()]


def make_cache(videos: Path, folder: Path, **changes: object) -> Path:
    precompute(read_config(arguments(videos, folder, **changes)))
    return folder


@pytest.fixture(scope="module")
def cache(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache, which tests must not change."""
    return make_cache(videos, tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture
def copied(cache: Path, tmp_path: Path) -> Path:
    """A copy to damage, whose files are as old as the original's."""
    return Path(shutil.copytree(cache, tmp_path / "copied"))


def clip_settings(videos: Path, cache: Path, **changes: object) -> Data:
    return read_config(arguments(videos, cache, **changes)).data


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files but the note of what was verified when."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "verified.jsonl"
    }


# --- what is stored ------------------------------------------------------------------


def test_windows_are_the_clips_of_the_sampler_and_their_latents(
    videos: Path, cache: Path
) -> None:
    config = read_config(arguments(videos, cache))
    windows = replace(config.data, frames=17, height=48, width=64)
    clips = ClipDataset(windows, build_file_lists(config.data)[0], seed=7)
    stored = Cache.open(cache, "taehv").train
    assert len(stored) == 14
    teacher = Projection("", CPU)
    for numbers in ([0, 1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11], [12, 13]):
        live = collate(clips.__getitems__(numbers))
        rounded = (to_frames(live, CPU) * 255).round()
        batch = collate([stored.whole(i) for i in numbers])
        assert torch.equal(batch.frames_NTHWC.float(), rounded.permute(0, 1, 3, 4, 2))
        latents_NTCHW = teacher.encode(to_frames(batch, CPU), numbers)
        assert torch.equal(batch.latents_NTCHW, latents_NTCHW.half())
        assert batch.numbers == numbers and batch.lead_N.tolist() == [0] * len(numbers)
        assert [str(videos / name) for name in batch.sources] == live.sources
    assert {Path(name).name for name in live.sources} <= {"a.mp4", "b.mp4"}


def test_blur_and_noise_are_stored_and_not_added_again(
    videos: Path, tmp_path: Path
) -> None:
    changes = {"data__blur": 2, "data__noise": 0.1, "cache__windows": 2}
    folder = make_cache(videos, tmp_path / "cache", **changes)
    windows = Cache.open(folder, "taehv").train
    batch = collate([windows.whole(i) for i in range(2)])
    latents_NTCHW = Projection("", CPU).encode(to_frames(batch, CPU), [0, 1])
    assert torch.equal(batch.latents_NTCHW, latents_NTCHW.half())
    with pytest.raises(UserError, match="data.noise"):
        make_cache(videos, folder, **{**changes, "data__noise": 0.2})


def test_validation_clips_are_those_of_a_live_validation(
    videos: Path, cache: Path
) -> None:
    config = read_config(arguments(videos, cache))
    live = ValidationDataset(config.data, build_file_lists(config.data)[1], 3)
    windows = Cache.open(cache, "taehv").validation
    first, second = cached_batches(windows, range(3), 2)
    assert (first.numbers, second.numbers) == ([0, 1], [2])
    teacher = Projection("", CPU)
    for batch in (first, second):
        clips = collate([live[number] for number in batch.numbers])
        assert torch.equal(batch.frames_NTHWC, clips.frames_NTHWC)
        frames_NTCHW = to_frames(clips, CPU)
        latents_NTCHW = teacher.encode(frames_NTCHW, batch.numbers).half()
        torch.testing.assert_close(batch.latents_NTCHW, latents_NTCHW)
        decoded = teacher.decode(batch.latents_NTCHW.float()).clamp(0, 1)
        error = (decoded - frames_NTCHW).square().mean((1, 2, 3, 4))
        expected = -10 * error.double().log10()
        torch.testing.assert_close(batch.teacher_psnr_N, expected, rtol=1e-4, atol=0)
    assert collate([live[0]]).latents_NTCHW is None


def test_windows_and_validation_clips_may_have_sizes_of_their_own(
    videos: Path, cache: Path, tmp_path: Path
) -> None:
    few = {"cache__windows": 2, "cache__crop_scale": "1,1", "data__color_jitter": 0}
    sizes = {
        "validation__frames": 13,
        "validation__height": 24,
        "validation__width": 48,
    }
    folder = make_cache(videos, tmp_path / "new", **few, **sizes)
    config = read_config(arguments(videos, folder, **few, **sizes))
    opened = Cache.open(folder, "taehv")
    live = ValidationDataset(
        config.validation_data, build_file_lists(config.data)[1], 3
    )
    (batch,) = cached_batches(opened.validation, range(3), 3)
    assert batch.frames_NTHWC.shape == (3, 13, 24, 48, 3)
    clips = collate([live[number] for number in range(3)])
    assert torch.equal(batch.frames_NTHWC, clips.frames_NTHWC)
    # Whole frames, where clips of the videos would show a part.
    mine = opened.train.whole(0).frames_THWC
    files, data = build_file_lists(config.data)[0], config.window_data
    for scale, is_so in (([1.0, 1.0], True), (config.data.crop_scale, False)):
        shown = ClipDataset(replace(data, crop_scale=scale), files, seed=7)[0]
        assert np.array_equal(mine, shown.frames_THWC) == is_so


def test_jpeg_frames_are_what_the_teacher_saw(videos: Path, tmp_path: Path) -> None:
    folder = make_cache(videos, tmp_path / "jpeg", cache__images="jpeg")
    raw = Cache.open(make_cache(videos, tmp_path / "raw"), "taehv").train
    windows = Cache.open(folder, "taehv").train
    frames = folder / "train/shard-000001.frames"
    assert frames.stat().st_size * 2 < raw.frames_THWC(0, *[slice(None)] * 3).size * 6
    batch = collate([windows.whole(i) for i in range(6, 10)])
    latents_NTCHW = Projection("", CPU).encode(to_frames(batch, CPU), batch.numbers)
    assert torch.equal(batch.latents_NTCHW, latents_NTCHW.half())
    for i in range(6, 10):
        jpegs, raws = windows.whole(i).frames_THWC, raw.whole(i).frames_THWC
        assert 0 < np.abs(jpegs.astype(float) - raws).mean() < 6
        assert np.array_equal(jpegs[3], from_jpeg(to_jpeg(raws[3])))
    data = clip_settings(videos, folder)
    assert_crops_are_cut_from_windows(CacheDataset(data, windows, seed=1), 6)


# --- what is cut from it -------------------------------------------------------------


def assert_crops_are_cut_from_windows(dataset: CacheDataset, count: int) -> None:
    """Frames and latents of a clip are the same part of one window, bit for bit."""
    windows = dataset.windows
    by_source: dict[str, list[Clip]] = {}
    for i in range(len(windows)):
        clip = windows.whole(i)
        by_source.setdefault(clip.source, []).append(clip)
    for clip in dataset.__getitems__(list(range(count))):
        found = [
            (start, whole.latents_TCHW[start : start + 3, :, y : y + 4, x : x + 2])
            for whole in by_source[clip.source]
            for start, y, x in itertools.product(range(3), range(3), range(7))
            if np.array_equal(
                clip.frames_THWC,
                whole.frames_THWC[
                    4 * start : 4 * start + 9, 8 * y : 8 * y + 32, 8 * x : 8 * x + 16
                ],
            )
        ]
        ((start, latents_TCHW),) = found
        assert clip.latents_TCHW.dtype == np.float16
        assert np.array_equal(clip.latents_TCHW, latents_TCHW)
        assert clip.lead == (1 if start else 0)


def test_crops_are_cut_from_windows(videos: Path, cache: Path) -> None:
    windows = Cache.open(cache, "taehv").train
    dataset = CacheDataset(clip_settings(videos, cache), windows, seed=1)
    assert_crops_are_cut_from_windows(dataset, 40)
    clips = [dataset[g].frames_THWC.tobytes() for g in range(40)]
    assert len(set(clips)) > 30


ALIGNMENTS = [
    *(
        (name, 33, 13)
        for name in VARIANTS
        if name.startswith(("taehv", "taew", "taeos"))
    ),
    *((name, 41, 17) for name in VARIANTS if name.startswith("taeltx")),
    ("taehv", 13, 1),
    ("taehv", 13, 13),
    ("taecvx", 40, 16),
    ("taecvx", 33, 17),
    ("taeh3", 56, 22),
    ("taeh3", 39, 5),
]


@pytest.mark.parametrize(("name", "window", "clip"), ALIGNMENTS)
def test_no_frame_is_paired_with_the_latent_of_another(
    tmp_path: Path, name: str, window: int, clip: int
) -> None:
    variant = VARIANTS[name]
    make_video(tmp_path / "numbered.mp4", 80, size=(64, 64))
    folder = make_cache(
        tmp_path / "*.mp4",
        tmp_path / "cache",
        **{"data.holdout": "", "teacher.kind": "cache_teachers:Numbered"},
        **{"teacher.path": name, "model.variant": name, "data.color_jitter": 0},
        **{"data.crop_scale": "1,1", "data.flip": 0, "data.stride": "1,1"},
        **{"cache.frames": window, "cache.height": 64, "cache.width": 64},
        **{"data.frames": clip, "data.height": 64, "data.width": 64},
        **{"cache.windows": 3, "data.lead_in": 1 if clip > 1 else 0},
    )
    data = Data(frames=clip, height=64, width=64, lead_in=2 if clip > 5 else 0)
    dataset = CacheDataset(data, Cache.open(folder, name).train, seed=3)
    seen = []
    for g in range(60):
        sample = dataset[g]
        numbers = numbers_of(sample.frames_THWC)
        assert numbers == list(range(numbers[0], numbers[0] + clip))
        spans = sample.latents_TCHW[:, :2, 0, 0].astype(int).tolist()
        assert len(spans) == variant.latents_of(clip)
        # What the student decodes from these latents, raw frame by raw frame.
        factor = variant.time_factor
        runs = variant.kept_frames(len(spans))
        raw = [frame for run in runs for frame in range(run.start, run.stop)]
        decoded = [spans[r // factor][1] - (factor - 1 - r % factor) for r in raw]
        assert decoded == numbers
        assert all(
            spans[r // factor][0] <= number
            for r, number in zip(raw, numbers, strict=True)
        )
        own = [r for r in raw if r // factor < sample.lead]
        assert len(own) == variant.lead_frames(len(spans), sample.lead)
        whole = dataset.windows.whole(item_of(dataset, g))
        seen.append(numbers[0] - numbers_of(whole.frames_THWC)[0])
        assert sample.lead == (data.lead_in if seen[-1] else 0)
    step = {"chunks": 17}.get(variant.trim, variant.time_factor)
    assert set(seen) == set(range(0, window - clip + 1, step))
    assert seen.count(0) >= 60 * 0.25 * 0.6


def item_of(dataset: CacheDataset, g: int) -> int:
    """Which window a sample is of, by the sampler's documented rule."""
    epoch, i = divmod(g // dataset.data.crops_per_window, len(dataset.windows))
    return taehv.cache.permute(i, len(dataset.windows), dataset.seed, epoch)


def test_an_epoch_visits_every_window_once(videos: Path, cache: Path) -> None:
    windows = Cache.open(cache, "taehv").train
    data = clip_settings(videos, cache, data__crops_per_window=2)
    dataset = CacheDataset(data, windows, seed=1)
    # Channel 15 of these latents is the window's number.
    visits = [int(dataset[g].latents_TCHW[0, 15, 0, 0]) for g in range(56)]
    assert visits[0::2] == visits[1::2]
    assert sorted(visits[:28:2]) == sorted(visits[28::2]) == list(range(14))
    assert visits[:28] != visits[28:]


def test_clips_that_begin_with_their_window_have_their_share() -> None:
    uniform = np.random.default_rng(0).random((4000, 2))
    for starts in (1, 2, 3, 9):
        drawn = [taehv.cache._start(*pair, starts) for pair in uniform]
        counts = np.bincount(drawn, minlength=starts) / 4000
        first = max(0.25, 1 / starts)
        rest = (1 - first) / max(1, starts - 1)
        np.testing.assert_allclose(counts, [first] + [rest] * (starts - 1), atol=0.03)


def batches_of(loader: ClipLoader, count: int) -> list[Batch]:
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def test_other_worlds_and_workers_give_the_same_bytes(
    videos: Path, cache: Path
) -> None:
    def read(workers: int, count: int, steps: Steps) -> dict[int, tuple]:
        data = clip_settings(
            videos, cache, data__workers=workers, data__crops_per_window=2
        )
        dataset = CacheDataset(data, Cache.open(cache, "taehv").train, seed=5)
        return {
            number: (
                batch.frames_NTHWC[n].numpy().tobytes(),
                batch.latents_NTCHW[n].numpy().tobytes(),
                int(batch.lead_N[n]),
                batch.sources[n],
            )
            for batch in batches_of(ClipLoader(dataset, steps), count)
            for n, number in enumerate(batch.numbers)
        }

    alone = read(0, 3, Steps(16, 16, 16))
    shared: dict[int, tuple] = {}
    for rank in range(4):
        shared |= read(2, 6, Steps(16, 16, 2, rank, 4))
    assert alone == shared and list(alone) == list(range(16, 64))
    assert len(set(alone.values())) > 40


def test_windows_of_several_sizes_live_in_one_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    variant = VARIANTS["taehv"]
    about = describe(variant, {}, {"train": 1, "validation": 1}, {})
    write_about(tmp_path, about)
    sizes = [(17, 32, 32), (9, 16, 48), (17, 32, 32), (13, 48, 16)]
    for part in ("train", "validation"):
        with ShardWriter(tmp_path, part, 0) as shard:
            for number, (frames, height, width) in enumerate(sizes):
                latents = np.full(
                    (frames // 4 + 1, 16, height // 8, width // 8), number, np.float32
                )
                pictures = np.full((frames, height, width, 3), number, np.uint8)
                shard.add(Window(number, "a.mp4", 0, pictures, latents))
    cache = Cache.open(tmp_path, "taehv")
    data = Data(frames=13, height=16, width=16)
    clips = [CacheDataset(data, cache.train, 0)[g] for g in range(30)]
    assert {int(clip.frames_THWC[0, 0, 0, 0]) for clip in clips} == {0, 2, 3}
    assert all((c.latents_TCHW == c.frames_THWC[0, 0, 0, 0]).all() for c in clips)
    assert "1 of 4 cached windows are left out: data.frames = 13" in caplog.text
    batches = list(cached_batches(cache.validation, [0, 1, 2, 3], 8))
    assert [batch.numbers for batch in batches] == [[0], [1], [2], [3]]
    assert batches[1].frames_NTHWC.shape == (1, 9, 16, 48, 3)
    assert batches[1].teacher_psnr_N.isnan().all()


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("taehv", {"frames": 21}, "data.frames = 21 .* windows of 17 frames: take 17"),
        ("taehv", {"frames": 11}, "data.frames = 11 .* take 9"),
        ("taehv", {"height": 56}, "data.height = 56 .* of 48: take 48 or less"),
        ("taehv", {"width": 72}, "data.width = 72 .* take 64 or less"),
        (
            *("taew2_1", {}),
            r"latent_space HunyuanVideo, and taew2_1 wants Wan 2.1: .* it \(taehv\)$",
        ),
        ("taeh3", {}, "choose a model.variant made for it"),
    ],
)
def test_clips_and_variants_that_do_not_fit(
    videos: Path, cache: Path, name: str, changes: dict[str, int], told: str
) -> None:
    data = replace(clip_settings(videos, cache), **changes)
    with pytest.raises(UserError, match=told) as raised:
        CacheDataset(data, Cache.open(cache, name).train, 0)
    assert "\n" not in str(raised.value)


# --- damage --------------------------------------------------------------------------


def flip_byte(path: Path, at: int) -> None:
    """Change one byte; the time of the file changes with it."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_damaged_and_missing_shards_are_named_and_left_out(
    videos: Path, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip_byte(copied / "train/shard-000001.latents", 77)
    (copied / "train/shard-000002.json").unlink()
    cache = Cache.open(copied, "taehv")
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "\n" not in record.message
    assert f"left out 2 of 4 shards of {copied}" in record.message
    assert "train/shard-000001 (latents are damaged)" in record.message
    assert "train/shard-000002 (missing)" in record.message
    dataset = CacheDataset(clip_settings(videos, copied), cache.train, 1)
    numbers = {int(dataset[g].latents_TCHW[0, 15, 0, 0]) for g in range(12)}
    assert numbers == set(range(6))
    whole = Cache.open(shutil.copytree(copied, copied.with_name("again")), "taehv")
    assert whole.train.fingerprint == cache.train.fingerprint
    (copied / "train/shard-000000.frames").write_bytes(b"")
    with pytest.raises(UserError, match="no usable training window"):
        Cache.open(copied, "taehv")
    assert "train/shard-000000 (frames has 0 of" in caplog.text


def test_damage_changes_the_fingerprint(cache: Path, copied: Path) -> None:
    fingerprint = Cache.open(cache, "taehv").train.fingerprint
    assert Cache.open(copied, "taehv").train.fingerprint == fingerprint
    (copied / "train/shard-000002.json").unlink()
    assert Cache.open(copied, "taehv").train.fingerprint != fingerprint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("number", -1),
        ("number", "5"),
        ("source", 5),
        ("source", ["a.mp4"]),
        ("source", "\ud800.mp4"),
        ("frames_THW", [17, 48]),
        ("frames_THW", [17, 48, 64.0]),
        ("frames_THW", [16, 48, 64]),
        ("frames_THW", [10**12, 0, 8]),
        ("frames_THW", [10**30, 48, 64]),
        ("latents_TCHW", [5, 16, 6, 7]),
        ("latents_TCHW", None),
        ("frames_offset", -8),
        ("frames_offset", 10**9),
        ("latents_offset", True),
        ("latents_offset", 10**30),
        ("jpeg_bytes", [10] * 16),
        ("jpeg_bytes", [10**9] * 17),
        ("jpeg_bytes", 7),
        ("teacher_psnr", "high"),
    ],
)
def test_lists_that_make_no_sense_are_left_out(
    copied: Path, key: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    path = copied / "train/shard-000001.json"
    shard = json.loads(path.read_text())
    shard["windows"][2][key] = value
    path.write_text(json.dumps(shard))
    assert len(Cache.open(copied, "taehv").train) == 8
    (record,) = caplog.records
    assert "left out 1 of 4 shards" in record.message


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "\xff", '{"files": 3, "windows": []}', "[" * 10**5]
)
def test_lists_that_cannot_be_read_are_left_out(copied: Path, text: str) -> None:
    (copied / "train/shard-000001.json").write_text(text, encoding="latin-1")
    assert len(Cache.open(copied, "taehv").train) == 8


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "holds no cache: write one with python -m taehv.precompute"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("[" * 10**5, "cannot be read"),
        ('{"format": 1, "shards": {"train": 1, "validation": 0}}', "cannot be read"),
        (
            '{"format": 2, "shards": {"train": 1, "validation": 0}, "latents": {}, '
            '"teacher": {}}',
            "not of format 1",
        ),
    ],
)
def test_no_cache_and_other_versions(
    tmp_path: Path, text: str | None, told: str
) -> None:
    if text is not None:
        (tmp_path / "cache.json").write_text(text)
    with pytest.raises(UserError, match=told) as raised:
        Cache.open(tmp_path, "taehv")
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


def test_counts_of_shards_take_no_memory(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    about = json.loads((copied / "cache.json").read_text())
    about["shards"]["train"] = 10**15
    flip_byte(copied / "train/shard-000001.latents", 77)
    (copied / "verified.jsonl").write_text("[" * 10**5)
    write_about(copied, about)
    assert len(Cache.open(copied, "taehv").train) == 8
    (record,) = caplog.records
    assert f"left out {10**15 - 2} of {10**15 + 1} shards" in record.message
    assert "train/shard-000001 (latents are damaged), " in record.message
    assert "shard-000003 (missing)" in record.message and len(record.message) < 500
    assert f"shard-000006 (missing) and {10**15 - 7} more; " in record.message
    about["shards"]["train"] = -1
    write_about(copied, about)
    with pytest.raises(UserError, match="is not of format 1"):
        Cache.open(copied, "taehv")


def test_what_is_verified_is_not_read_again(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    original = taehv.cache.sha256_of

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return original(path)

    monkeypatch.setattr(taehv.cache, "sha256_of", counted)
    Cache.open(copied, "taehv")
    assert hashed == []  # what precompute wrote it noted itself
    os.utime(copied / "train/shard-000001.frames")
    Cache.open(copied, "taehv")
    Cache.open(copied, "taehv")
    assert hashed == ["shard-000001.frames"]
    with (copied / "verified.jsonl").open("r+b") as notes:  # as two that write at once
        notes.write(b"{}")
    Cache.open(copied, "taehv")
    Cache.open(copied, "taehv")
    assert sorted(hashed[1:]) == ["shard-000000.frames", "shard-000000.latents"]
    with (copied / "verified.jsonl").open("a") as notes:  # as one that was killed
        notes.write('{"x": [1')
    Notes(copied).add({"y": [1, 2]})
    assert Notes(copied).known["y"] == [1, 2]


def test_a_folder_that_keeps_no_notes_is_verified_each_time(copied: Path) -> None:
    (copied / "verified.jsonl").unlink()
    (copied / "verified.jsonl").mkdir()
    assert len(Cache.open(copied, "taehv").train) == 14
    status = (copied / "train/shard-000001.frames").stat()
    flip_byte(copied / "train/shard-000001.frames", 5)
    os.utime(copied / "train/shard-000001.frames", ns=(0, status.st_mtime_ns))
    assert len(Cache.open(copied, "taehv").train) == 8


def test_files_that_vanish_during_a_run_are_told_in_one_line(
    videos: Path, copied: Path
) -> None:
    windows = Cache.open(copied, "taehv").train
    loader = ClipLoader(
        CacheDataset(clip_settings(videos, copied, data__workers=1), windows, 1),
        Steps(0, 14, 14),
    )
    (copied / "train/shard-000001.latents").write_bytes(b"")
    with pytest.raises(UserError, match="shard-000001.json has changed") as raised:
        next(loader)
    loader.close()
    assert "\n" not in str(raised.value)


def test_jpeg_files_of_another_size_are_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their frames and latents would not be of the same places."""
    monkeypatch.setattr(taehv.cache.Image, "MAX_IMAGE_PIXELS", 64 * 64)
    write_about(
        tmp_path, describe(VARIANTS["taehv"], {}, {"train": 1, "validation": 0}, {})
    )
    frames, latents = np.zeros((5, 32, 32, 3), np.uint8), np.zeros((2, 16, 4, 4))
    with ShardWriter(tmp_path, "train", 0) as shard:
        for number, size in enumerate([(32, 32), (32, 40), (24, 32), (128, 128)]):
            jpegs = [to_jpeg(np.zeros((*size, 3), np.uint8))] * 5
            shard.add(Window(number, "a.mp4", 0, frames, latents, jpegs))
    windows = Cache.open(tmp_path, "taehv").train
    assert windows.whole(0).frames_THWC.shape == (5, 32, 32, 3)
    for number, told in enumerate(["of 32 x 40 in", "of 24 x 32 in", "bomb"], 1):
        with pytest.raises(UserError, match=told) as raised:
            windows.whole(number)
        assert "\n" not in str(raised.value)


# --- writing it ----------------------------------------------------------------------


def test_a_finished_cache_is_left_alone(videos: Path, copied: Path) -> None:
    before = contents(copied)
    times = {path: path.stat().st_mtime_ns for path in copied.rglob("*.frames")}
    make_cache(videos, copied)
    assert contents(copied) == before
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_a_folder_is_written_by_one_command_at_a_time(
    videos: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / "train/shard-000000.json").unlink()
    before = contents(copied)
    with ExitStack() as another:
        another.enter_context(locked(copied))
        with monkeypatch.context() as patch:
            patch.setattr("taehv.lock.PATIENCE", 0.1)
            with pytest.raises(UserError, match="by another command") as raised:
                make_cache(videos, copied)
        assert "\n" not in str(raised.value) and contents(copied) == before
        # As a killed one does while it is waited for.
        waits = SimpleNamespace(
            monotonic=time.monotonic, sleep=lambda seconds: another.close()
        )
        monkeypatch.setattr("taehv.lock.time", waits)
        make_cache(videos, copied)
        assert contents(copied) != before


def test_a_folder_without_locks_is_written(
    videos: Path,
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (copied / "train/shard-000000.json").unlink()

    def unsupported(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    make_cache(videos, copied)
    assert "let no other command write to it" in capfd.readouterr().err
    assert len(Cache.open(copied, "taehv").train) == 14


def test_what_was_deleted_or_damaged_is_written_again(
    videos: Path, cache: Path, copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (copied / "train/shard-000000.json").unlink()
    (copied / "train/shard-000001.frames").write_bytes(b"short")
    (copied / "validation/shard-000000.latents").unlink()
    flip_byte(copied / "train/shard-000002.latents", 77)
    make_cache(videos, copied)
    assert contents(copied) == contents(cache)
    told = capfd.readouterr().err
    assert "anew what is damaged: train/shard-000001 (frames has 5 of" in told
    assert "train/shard-000002 (latents are damaged), valid" in told
    assert "train/shard-000000" not in told


@pytest.mark.parametrize("unread", ["shard-000001.json", "shard-000001.latents"])
def test_what_the_disk_does_not_give_is_neither_removed_nor_left_out(
    videos: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, unread: str
) -> None:
    (copied / "verified.jsonl").unlink()
    before = contents(copied)
    told = "shard-000001.json or a file beside it cannot be read: Stale file handle"
    with monkeypatch.context() as patch:
        fail_to_open(patch, unread)
        with pytest.raises(UserError, match=told):
            make_cache(videos, copied)
        assert "train/shard-000002.frames" in Notes(copied).known
        with pytest.raises(UserError, match=told):
            Cache.open(copied, "taehv")
    assert contents(copied) == before


def fail_to_open(patch: pytest.MonkeyPatch, name: str) -> None:
    """Have a disk not give the files of a name."""
    original = Path.open

    def opened(path: Path, *arguments: Any, **options: Any) -> IO[Any]:
        if path.name == name:
            raise OSError(errno.ESTALE, "Stale file handle")
        return original(path, *arguments, **options)

    patch.setattr(Path, "open", opened)


def test_a_cache_json_that_the_disk_does_not_give_is_not_told_to_be_wrong(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_open(monkeypatch, "cache.json")
    told = r"cache.json cannot be read \(Stale file handle\): mend that$"
    with pytest.raises(UserError, match=told):
        Cache.open(copied, "taehv")


def test_interrupted_precompute_goes_on(
    videos: Path, cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, flag = tmp_path / "cache", tmp_path / "flag"
    flag.touch()
    teacher = {"teacher__kind": "cache_teachers:Interrupted", "teacher__path": flag}
    make_cache(videos, folder, **teacher)
    expected = "stopped with 1 of 4 shards written; the same command goes on"
    assert expected in capfd.readouterr().err and not flag.exists()
    assert [path.name for path in folder.rglob("shard*.json")] == ["shard-000000.json"]
    make_cache(videos, folder, **teacher)
    assert contents(folder / "train") == contents(cache / "train")
    assert contents(folder / "validation") == contents(cache / "validation")


def test_frames_of_a_window_are_those_of_the_cache_alone(
    videos: Path, cache: Path, tmp_path: Path
) -> None:
    few = {"cache__windows": 2, "validation__clips": 1}
    plain = make_cache(videos, tmp_path / "plain", **few)
    other = make_cache(videos, tmp_path / "other", **few, data__window_frames=19)
    assert contents(plain / "train") == contents(other / "train")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data__flip": 0.25}, "made with data.flip = 0.5, not 0.25"),
        ({"cache__windows": 15}, "made with cache.windows = 14, not 15"),
        ({"cache__crop_scale": "0.9,1"}, r"cache.crop_scale = \[0.5, 1.0\], not"),
        ({"validation__height": 48}, "made with validation.height = 32, not 48"),
        ({"cache__images": "jpeg"}, "made with cache.images = raw, not jpeg"),
        ({"training__seed": 8}, "made with training.seed = 7, not 8"),
        ({"data__holdout": "a.mp4"}, "made with held-out videos = "),
        ({"teacher__kind": "cache_teachers:Other"}, "teacher.fingerprint = projection"),
        ({"model__variant": "taew2_1"}, "latent_space = HunyuanVideo, not Wan 2.1"),
    ],
)
def test_other_settings_in_the_same_folder(
    videos: Path, copied: Path, changes: dict[str, object], told: str
) -> None:
    before = contents(copied)
    with pytest.raises(UserError, match=told) as raised:
        make_cache(videos, copied, **changes)
    assert "\n" not in str(raised.value) and str(copied) in str(raised.value)
    assert contents(copied) == before


def test_a_cache_of_an_older_version_goes_on(videos: Path, copied: Path) -> None:
    """Its sizes of validation clips and its crops had other names."""
    path = copied / "cache.json"
    text = path.read_text()
    for name in ("frames", "height", "width"):
        text = text.replace(f'"validation.{name}"', f'"data.{name}"')
    path.write_text(text.replace('"cache.crop_scale"', '"data.crop_scale"'))
    (copied / "train/shard-000000.json").unlink()
    make_cache(videos, copied)
    assert (copied / "train/shard-000000.json").exists()
    with pytest.raises(UserError, match="made with cache.crop_scale = .*, not"):
        make_cache(videos, copied, cache__crop_scale="1,1")


def test_speed_is_told_and_the_teacher_compiled(
    videos: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def spy(settings: Teacher, device: torch.device, compile: bool) -> object:
        asked.append(compile)
        return load_teacher(settings, device, compile)

    monkeypatch.setattr("taehv.precompute.load_teacher", spy)
    make_cache(videos, tmp_path / "a", compile__enable="true")
    make_cache(videos, tmp_path / "b")
    assert asked == [True, False]
    speeds = re.findall(r"encoded at (\d+) frames/s", capfd.readouterr().err)
    assert len(speeds) == 2 and all(map(int, speeds))


def test_batch_size_may_change(videos: Path, cache: Path, copied: Path) -> None:
    (copied / "train/shard-000000.json").unlink()
    make_cache(videos, copied, cache__batch_size=1)
    windows = Cache.open(copied, "taehv").train
    assert len(windows) == 14 == len(Cache.open(cache, "taehv").train)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data__cache": ""}, "data.cache is empty"),
        ({"teacher__kind": ""}, "teacher.kind is empty"),
        ({"cache__frames": 16}, "cache.frames = 16 is no length .* take 13 or 17"),
        ({"cache__height": 50}, "cache.height = 50 .* multiple of 8"),
        ({"data__frames": 21}, "data.frames = 21 cannot be cut .* take 17"),
        ({"data__width": 128}, "data.width = 128 cannot be cut"),
        (
            {"model__variant": "taecvx", "cache__frames": 33, "data__frames": 16},
            "data.frames = 16 cannot be cut from cached windows of 33 frames: take 17",
        ),
        ({"model__variant": "taew2_2"}, "choose the model.variant made for"),
        ({"teacher__kind": "cache_teachers:Wide"}, "the teacher makes latents of"),
        ({"cache__windows": 10**12}, "lower cache.windows, set"),
        ({"data__cache": "/dev/null/x"}, "cannot write to data.cache = /dev/null/x"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(
    videos: Path, tmp_path: Path, changes: dict[str, object], told: str
) -> None:
    with pytest.raises(UserError, match=told) as raised:
        make_cache(videos, tmp_path / "cache", **changes)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.rglob("shard*.json"))


def test_a_full_disk_is_told_unless_nothing_is_to_be_written(
    videos: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(copied)
    # Room for two windows of 17 x 48 x 64 and less than six.
    free = usage._replace(free=2 * 17 * 48 * 64 * 3 + 20_000)
    monkeypatch.setattr(taehv.precompute.shutil, "disk_usage", lambda path: free)
    make_cache(videos, copied)
    (copied / "train/shard-000002.json").unlink()
    make_cache(videos, copied)
    (copied / "train/shard-000001.json").unlink()
    with pytest.raises(UserError, match="0.0 GiB more and the disk .* lower") as raised:
        make_cache(videos, copied)
    assert "\n" not in str(raised.value)


def test_a_write_that_fails_is_told_in_one_line(
    videos: Path, cache: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EFBIG, "File too large")

    (copied / "train/shard-000002.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(taehv.cache._HashedFile, "write", fail)
        with pytest.raises(UserError, match=r"File too large\): mend that") as raised:
            make_cache(videos, copied)
    assert "\n" not in str(raised.value)
    make_cache(videos, copied)
    assert contents(copied) == contents(cache)


def test_a_new_cache_lies_apart_from_the_videos(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(videos)
    for folder in (videos, videos / "cache", videos.parent, tmp_path / "link/cache"):
        with pytest.raises(UserError, match="or lies among them") as raised:
            make_cache(videos, folder)
        assert "\n" not in str(raised.value)
    assert not list(videos.rglob("*.json"))
    listed = {"data__root": "", "data__annotations": tmp_path / "list.txt"}
    check_precompute(read_config(arguments(videos, tmp_path / "cache", **listed)))


def test_latents_beyond_float16_name_their_window(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="window 5 of [ab].mp4 has latents") as raised:
        make_cache(videos, tmp_path / "c", teacher__kind="cache_teachers:Huge")
    assert "\n" not in str(raised.value)
    # Where it was not alone in its shard.
    assert not list(tmp_path.rglob("shard-000000.json"))


# --- caches of others ----------------------------------------------------------------


def test_the_example_writes_a_cache(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    make_video(tmp_path / "videos/a.mp4")
    (tmp_path / "videos/bad.mp4").write_text("not a video")
    folder = tmp_path / "cache"
    done = subprocess.run(
        [sys.executable, "-m", "examples.write_cache", tmp_path / "videos", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert f"1 shards in {folder}" in done.stdout and "left out: " in done.stdout
    windows = Cache.open(folder, "taehv").train
    assert len(windows) == 4
    starts = [numbers_of(windows.whole(i).frames_THWC)[0] for i in range(4)]
    assert starts == sorted(starts) and len(set(starts)) > 1
    data = Data(frames=13, height=64, width=64)
    clip = CacheDataset(data, windows, 0)[0]
    assert clip.latents_TCHW.shape == (4, 16, 8, 8)


@pytest.mark.parametrize(
    ("videos", "cache", "told"),
    [("/none", "cache", "/none has no .mp4"), ("", "a.mp4", "a.mp4: File exists")],
)
def test_the_example_tells_a_mistake_in_one_line(
    tmp_path: Path, videos: str, cache: str, told: str
) -> None:
    (tmp_path / "a.mp4").touch()
    places = [tmp_path / videos, tmp_path / cache]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["write_cache", *map(str, places)])
        with pytest.raises(UserError, match=told) as raised:
            write_cache.main()
    assert "\n" not in str(raised.value)


def test_a_validation_tells_no_psnr_that_the_cache_lacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_about(
        tmp_path, describe(VARIANTS["taehv"], {}, {"train": 1, "validation": 1}, {})
    )
    frames = np.arange(5 * 16 * 16 * 3, dtype=np.uint8).reshape(5, 16, 16, 3)
    for part in ("train", "validation"):
        with ShardWriter(tmp_path, part, 0) as shard:
            shard.add(Window(0, "a.mp4", 0, frames, np.ones((2, 16, 2, 2))))
    batches = cached_batches(Cache.open(tmp_path, "taehv").validation, [0], 1)
    with started(Parallelism(), "cpu"):
        stop = SimpleNamespace(received=0)
        result = validate(TAEHV("taehv"), None, batches, CPU, stop, True, pictures=0)
    assert "teacher_psnr" not in result.means and "decoder_psnr" in result.means
    records = SimpleNamespace(validation=lambda *told: None)
    with caplog.at_level("INFO"):
        tell(result, records, 0, tmp_path)
    assert "the teacher's latents" in caplog.text and "nan" not in caplog.text


# --- kills ---------------------------------------------------------------------------


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]


def start(command: list[str]) -> Running:
    """Run a module as a user does."""
    here = str(Path(__file__).parent)
    return Running([sys.executable, "-m", *command], PYTHONPATH=here)


def kill_amid(command: list[str], folder: Path, shards: int, delay: float) -> None:
    """Start a precompute and kill all of its processes once it is under way."""
    process = start(command)
    process.wait_for(lambda: len(list(folder.glob("train/*.json"))) >= shards, 100)
    time.sleep(delay)
    process.kill()


def kill_and_go_on(videos: Path, folder: Path, seed: int) -> None:
    """Two processes are killed, then one, and then two finish."""
    rng = random.Random(seed)
    command = ["taehv.precompute", *arguments(videos, folder, **LONG)]
    kill_amid([*TORCHRUN, *command], folder, 1, rng.uniform(0, 0.4))
    between = len(list(folder.glob("train/*.json")))
    assert 1 <= between < 20
    kill_amid(command, folder, between + 1, rng.uniform(0, 0.4))
    assert between < len(list(folder.glob("train/*.json"))) < 20
    output = start([*TORCHRUN, *command]).end(seconds=100)
    assert output.count("complete: ") == 1, output


LONG = {"teacher__kind": "cache_teachers:Slow", "cache__windows": 120}


def test_a_killed_precompute_goes_on_to_the_same_bytes(
    videos: Path, tmp_path: Path
) -> None:
    whole = make_cache(videos, tmp_path / "whole", **LONG)
    command = ["taehv.precompute", *arguments(videos, tmp_path / "killed", **LONG)]
    kill_amid([*TORCHRUN, *command], tmp_path / "killed", 4, delay=0.2)
    written = list(tmp_path.glob("killed/train/*.json"))
    assert 4 <= len(written) < 20
    # Each of the two processes may have one that it has not yet noted.
    assert len(Notes(tmp_path / "killed").known) >= 2 * len(written) - 4
    make_cache(videos, tmp_path / "killed", **LONG)
    assert contents(tmp_path / "killed") == contents(whole)
    assert len(Cache.open(tmp_path / "killed", "taehv").train) == 120


@pytest.mark.soak
def test_kills_at_many_moments(videos: Path, tmp_path: Path) -> None:
    whole = contents(make_cache(videos, tmp_path / "whole", **LONG))
    for seed in range(1, 6):
        kill_and_go_on(videos, tmp_path / f"killed-{seed}", seed)
        assert contents(tmp_path / f"killed-{seed}") == whole
