"""Mixed sources, buckets, still images, blur and noise, and what the log says."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from numbered_video import make_video
from PIL import Image

import taehv.bottleneck
from taehv.augment import to_frames
from taehv.bottleneck import Bottleneck
from taehv.clips import Batch, Clip, Degradation, Work, collate
from taehv.config import load_config
from taehv.data import ClipDataset
from taehv.errors import UserError
from taehv.files import (
    FileList,
    Mixture,
    Source,
    _check_overlap,
    sources_of,
    split_all,
)
from taehv.index import build_file_lists
from taehv.loader import ClipLoader
from taehv.sampler import BLOCK, Buckets, Shares, Steps
from taehv.sections import Data, Shape


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders, a.. with three files and b.. with two, one bad file in each."""
    root = tmp_path_factory.mktemp("mixed")
    for folder, count in (("a", 3), ("b", 2)):
        (root / folder).mkdir()
        for i in range(count):
            make_video(root / folder / f"{i}.mp4", options={"g": "10"})
        (root / folder / "bad.mp4").write_text("no video")
    return root


def settings(videos: Path, **changes: object) -> Data:
    mixed = {
        "sources": [str(videos / "a"), str(videos / "b")],
        "weights": [3.0, 1.0],
        "holdout": ["0.mp4"],
        **{"frames": 5, "height": 32, "width": 48, "workers": 0},
    }
    return Data(**(mixed | changes))


# --- lists ----------------------------------------------------------------------------


def listed(files: FileList) -> list[str]:
    return [files.relative(i) for i in range(len(files))]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "duration,path\n1,x.mp4\n2,y/z.mp4\n"),
        ("a.csv", 'full_path,path\n,x.mp4\n,"y/z.mp4"\n'),
        ("a.jsonl", '{"path": "x.mp4"}\n\n{"path": "y/z.mp4", "frames": 3}\n'),
    ],
)
def test_tables_of_paths(tmp_path: Path, name: str, content: str):
    (tmp_path / name).write_text(content)
    files = Source.of("", str(tmp_path / name)).files(images=False)
    assert listed(files) == ["x.mp4", "y/z.mp4"]
    assert files[1] == str(tmp_path / "y/z.mp4")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x.mp4\ny.mp4\n", "no column named path"),
        ("a.jsonl", '{"path": "x.mp4"}\n{"pat', "no valid JSON"),
        ("a.jsonl", '{"path": "x.mp4"}\n{"pat": 1}', "entry 1 .* no path"),
    ],
)
def test_bad_tables_name_the_cure(
    tmp_path: Path, name: str, content: str, message: str
):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        Source.of("", str(tmp_path / name)).files(images=False)


def test_globs_take_folders_and_files(videos: Path):
    files = Source.of(str(videos / "*" / "[01].mp4"), "").files(images=False)
    assert listed(files) == ["a/0.mp4", "a/1.mp4", "b/0.mp4", "b/1.mp4"]
    assert files.base == str(videos)
    folders = Source.of(str(videos / "?"), "").files(images=False)
    assert len(folders) == 7
    with pytest.raises(UserError, match="no videos"):
        Source.of(str(videos / "*" / "7.mp4"), "").files(images=False)


# --- sources --------------------------------------------------------------------------


def test_shares_are_exact_and_leave_no_turn_out():
    shares = Shares([2.0, 1.0, 0.5], seed=7)
    assert sum(shares.counts) == BLOCK and shares.counts[0] == 571
    turns = [shares.part(turn) for turn in range(3 * BLOCK)]
    for part, count in enumerate(shares.counts):
        own = [turn for p, turn in turns if p == part]
        assert sorted(own) == list(range(3 * count))
    first = [part for part, _ in turns[:40]]
    assert len(set(first)) == 3 and first != sorted(first)
    with pytest.raises(UserError, match="1000th"):
        Shares([1.0, 1e-4], seed=0)


def test_sources_come_by_their_weights(videos: Path):
    train, held = build_file_lists(settings(videos))
    assert [len(part) for part in train.parts] == [3, 2] and len(held) == 2
    assert [held[i] for i in range(2)] == [str(videos / s / "0.mp4") for s in "ab"]
    dataset = ClipDataset(settings(videos), train, seed=3)
    places = [dataset._place(*dataset._shares.part(w), w, 0)[0] for w in range(BLOCK)]
    counts = Counter(Path(path).parent.name for path in places)
    assert counts == {"a": 750, "b": 250}
    of_a = Counter(path for path in places if Path(path).parent.name == "a")
    assert set(of_a.values()) == {250}


def test_a_mixture_has_a_fingerprint_of_its_own(videos: Path):
    prints = {build_file_lists(settings(videos))[0].fingerprint}
    prints.add(build_file_lists(settings(videos, weights=[]))[0].fingerprint)
    swapped = [str(videos / "b"), str(videos / "a")]
    prints.add(build_file_lists(settings(videos, sources=swapped))[0].fingerprint)
    assert len(prints) == 3


def test_no_file_is_on_both_sides_of_sources_that_overlap(videos: Path):
    nested = [str(videos), str(videos / "a")]
    with pytest.raises(UserError, match="data.sources overlap: a file would be held"):
        build_file_lists(settings(videos, sources=nested, holdout=["0.mp4"]))
    both = settings(videos, sources=nested, holdout=["*0.mp4"])
    train, held = build_file_lists(both)
    assert not {*map(str, train)} & {*map(str, held)}


@pytest.mark.parametrize("base", ["/videos/a", "s3://bucket/a"])
def test_no_file_that_a_list_elsewhere_names_is_on_both_sides(base: str):
    folder = FileList.from_paths(base, ["0.mp4", "z.mp4"])
    named = FileList.from_paths("/lists", ["x.mp4", f"{base}/0.mp4"])
    again = FileList.from_paths("/more", [f"{base}/0.mp4", "z.mp4"])
    for lists in itertools.permutations([folder, named]):
        with pytest.raises(UserError, match="data.sources overlap"):
            split_all(lists, Data(holdout=["0.mp4"]))
        assert sum(map(len, split_all(lists, Data(holdout=["*0.mp4"])))) == 4
    first = np.array([True, False])
    with pytest.raises(UserError, match="data.sources overlap"):
        _check_overlap([(named.only(first), first[:1]), (again, ~first)])
    # The same path from another base is another file.
    _check_overlap([(folder, first), (again.only(~first), first[:1]), (named, first)])


def test_holdout_that_empties_a_source_is_refused(videos: Path):
    with pytest.raises(UserError, match="leaves no file"):
        data = settings(videos, sources=[str(videos / "b"), str(videos / "a" / "*")])
        build_file_lists(Data(**{**vars(data), "holdout": ["1*", "0*", "bad*"]}))
    assert [source.root for source in sources_of(settings(videos))] == [
        str(videos / "a"),
        str(videos / "b"),
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data.sources=a,b", "--data.weights=1"], "each of the 2"),
        (["--data.sources=a,b", "--data.weights=1,0"], "above 0"),
        (["--data.min_size=64"], "set data.index"),
        (["--data.index=i", "--data.aspect=2,1"], "data.aspect"),
        (["--data.buckets=[[5, 64, 1]]"], "frames, height and width"),
        (["--data.buckets=[[5, 64, 60, 1]]"], "data.width = 60 must be a multiple"),
        (
            ["--data.buckets=[[5, 64, 64, 1], [12, 64, 64, 1]]", "--teacher.kind=wan"]
            + ["--model.variant=taew2_1", "--teacher.path=x"],
            "12.*: data.frames = 12 must be",
        ),
        (
            ["--data.buckets=[[13, 192, 128, 1]]", "--data.crops_per_window=4"],
            "10 clips: that must be a multiple of 4",
        ),
    ],
)
def test_settings_that_do_not_go_together(argv: list[str], message: str):
    with pytest.raises(UserError, match=message):
        load_config(argv, 1)


# --- buckets --------------------------------------------------------------------------

BUCKETS = [[5, 32, 48, 2], [9, 16, 32, 1], [5, 64, 32, 1]]


def test_buckets_hold_the_pixels():
    data = Data(frames=5, height=32, width=48, buckets=BUCKETS, batch_multiple=4)
    clips = [data.clips_of(shape, 24) for shape in data.shapes]
    assert clips == [24, 40, 16]
    usual = 24 * 5 * 32 * 48
    for shape, count in zip(data.shapes, clips, strict=True):
        assert usual * 0.85 < shape.pixels * count <= usual
    assert data.shapes[1] == Shape(9, 16, 32, 1)
    assert Data().clips_of(Data().usual_shape, 7) == 7


def test_steps_of_any_world_have_the_same_samples_and_buckets():
    data = Data(frames=5, height=32, width=48, buckets=BUCKETS, batch_multiple=4)
    buckets = Buckets.of(data, 24, seed=11)

    def steps(world: int, local: int, skip: int = 0) -> list[list[int]]:
        parts = 24 // (world * local)
        plans = [Steps(0, 24, local, r, world, buckets=buckets) for r in range(world)]
        read = [itertools.islice(p.after(skip * parts), 60 * parts) for p in plans]
        read = [list(batches) for batches in read]
        return [
            [g for rank in read for b in rank[s * parts : (s + 1) * parts] for g in b]
            for s in range(60)
        ]

    alone = steps(1, 24)
    assert list(itertools.chain(*alone)) == list(range(sum(map(len, alone))))
    kinds = [{buckets.of_sample(g) for g in step} for step in alone]
    assert all(len(kind) == 1 for kind in kinds)
    assert {len(step) for step in alone} == {24, 40, 16}
    for step, (kind,) in zip(alone, kinds, strict=True):
        assert len(step) == buckets.clips[kind]
    starts = [step[0] for step in alone]
    assert [buckets.aligned(g) for g in (0, 1, starts[5], starts[5] - 1)] == [
        *(0, starts[1], starts[5], starts[5])
    ]
    assert steps(4, 6) == steps(2, 6) == alone
    assert steps(2, 12, skip=7)[:20] == alone[7:27]
    with pytest.raises(UserError, match="data.batch_multiple to a multiple of 3"):
        Steps(0, 24, 8, 0, 3, buckets=buckets)


def loader(data: Data, videos: Path, consumed: int, rank: int, world: int, local: int):
    train, _ = build_file_lists(data)
    buckets = Buckets.of(data, 8, seed=5)
    plan = Steps(consumed, 8, local, rank, world, buckets=buckets)
    return ClipLoader(ClipDataset(data, train, 5, buckets), plan)


def read(loader: ClipLoader, count: int) -> list[Batch]:
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def by_number(batches: list[Batch]) -> dict[int, tuple]:
    return {
        number: (b.frames_NTHWC[i].numpy().tobytes(), b.color_N34[i].tolist())
        + (b.sources[i], b.degradations[i])
        for b in batches
        for i, number in enumerate(b.numbers)
    }


@pytest.mark.parametrize(
    "with_workers", [{1}, pytest.param({0, 1, 2, 3}, marks=pytest.mark.soak)]
)
@pytest.mark.filterwarnings("ignore:This DataLoader")
def test_mixtures_buckets_and_retries_are_the_same_for_any_world(
    videos: Path, with_workers: set[int]
):
    """One process that decodes itself; four with three workers each, from mid-epoch."""
    changes = {"crops_per_window": 2, "color_jitter": 0.2, "noise": 0.1, "blur": 1.0}
    changes |= {
        "window_frames": 7,
        "buckets": BUCKETS,
        "batch_multiple": 8,
        "holdout_fraction": 0.01,
    }
    data = settings(videos, **changes)
    alone = read(loader(data, videos, 0, 0, 1, 8), 9)
    clips = by_number(alone)
    assert len({b.frames_NTHWC.shape[1:] for b in alone}) == 3
    assert any(batch.failures for batch in alone)
    assert len({Path(source).parent.name for _, _, source, _ in clips.values()}) == 2
    consumed = sum(len(b.numbers) for b in alone[:4])
    shared = []
    for rank in range(4):
        many = settings(videos, workers=3 if rank in with_workers else 0, **changes)
        shared += read(loader(many, videos, consumed, rank, 4, 2), 5)
    again = by_number(shared)
    assert again.keys() == {g for g in clips if g >= consumed}
    assert all(clips[g] == clip for g, clip in again.items())


# --- still images ---------------------------------------------------------------------


def test_still_images_stand_still(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    picture = Image.fromarray(pixels).resize((96, 64), Image.Resampling.NEAREST)
    picture.save(tmp_path / "a.png")
    make_video(tmp_path / "b.mp4")
    data = Data(root=str(tmp_path), holdout=["b*"], frames=5, height=64, width=96)
    with pytest.raises(UserError, match="matches 1 of 1"):
        build_file_lists(data)
    data.images, data.crop_scale, data.flip = True, [1.0, 1.0], 0.0
    train, _ = build_file_lists(data)
    clip = ClipDataset(data, train, 0)[3]
    assert clip.frames_THWC.shape == (5, 64, 96, 3)
    assert np.abs(clip.frames_THWC.astype(int) - np.asarray(picture)).mean() < 2
    assert (clip.frames_THWC == clip.frames_THWC[0]).all()
    data.window_frames = 9
    np.testing.assert_array_equal(
        ClipDataset(data, train, 0)[3].frames_THWC, clip.frames_THWC
    )


# --- blur and noise -------------------------------------------------------------------


def batch_of(*degradations: Degradation | None) -> Batch:
    rng = np.random.default_rng(1)
    frames = rng.integers(64, 192, (2, 16, 24, 3), np.uint8)
    color = np.eye(3, 4, dtype=np.float32)
    return collate([Clip(frames, color, 0, "a", degradation=d) for d in degradations])


def test_blur_and_noise_are_of_each_clip_alone():
    blur, noise = Degradation(1.2, 0, 1), Degradation(0, 0.1, 2)
    strong, both = Degradation(4.0, 0.2, 3), Degradation(1.2, 0.1, 4)
    together = to_frames(batch_of(None, blur, noise, strong, both), "cpu")
    for i, kind in enumerate((None, blur, noise, strong, both)):
        torch.testing.assert_close(
            to_frames(batch_of(kind), "cpu")[0], together[i], rtol=0, atol=0
        )
    plain, blurred, noisy = together[0], together[1], together[2]
    assert blurred.std() < 0.6 * plain.std()
    torch.testing.assert_close(blurred.mean(), plain.mean(), rtol=0, atol=5e-3)
    assert 0.09 < (noisy - plain).std() < 0.11
    assert together.min() >= 0 and together.max() <= 1


def test_blur_is_gaussian():
    frames = np.zeros((1, 21, 21, 3), np.uint8)
    frames[0, 10, 10] = 255
    clip = Clip(frames, np.eye(3, 4, dtype=np.float32), 0, "a")
    batch = collate([Clip(**{**vars(clip), "degradation": Degradation(2.0, 0, 0)})])
    row = to_frames(batch, "cpu")[0, 0, 0, 10]
    torch.testing.assert_close(row[12] / row[10], torch.tensor(np.exp(-0.5)).float())
    torch.testing.assert_close(to_frames(batch, "cpu").sum(), torch.tensor(3.0))


def test_degradations_are_drawn_within_their_bounds(videos: Path):
    train, _ = build_file_lists(settings(videos))
    dataset = ClipDataset(settings(videos, blur=2.0, noise=0.1), train, 0)
    drawn = [dataset._augmentation(g, dataset.shape(g))[2] for g in range(50)]
    assert all(0 <= d.blur <= 2 and 0 <= d.noise <= 0.1 for d in drawn)
    assert len({d.seed for d in drawn}) == 50
    plain = ClipDataset(settings(videos), train, 0)[0]
    assert plain.degradation is None


# --- the log --------------------------------------------------------------------------


def test_decoding_is_counted(videos: Path):
    data = settings(videos, crops_per_window=4, stride=[1, 1], weights=[])
    train, _ = build_file_lists(data)
    batch = collate(ClipDataset(data, train, 0).__getitems__(list(range(8))))
    assert len(batch.work) == 2
    for work in batch.work:
        assert work.clips == 4 and work.frames == 5 and work.seconds > 0
        assert work.packets >= 5 and Path(work.source).parent == videos


def step(seconds: float, packets: int) -> Batch:
    batch = batch_of(None)
    batch.work = (Work("/data/films", 1, seconds, packets, 13, 4),)
    return batch


def test_a_slow_loader_is_told_once(monkeypatch: pytest.MonkeyPatch):
    watch = Bottleneck(Data(crops_per_window=4), workers=2)
    for _ in range(50):
        watch.add([step(2.0, 130)], waited=1.0, seconds=1.0)
    assert watch.line() is None  # too short to say
    values = watch.values()
    assert values["data/clips_per_worker_second"] == 2
    assert values["data/packets_per_frame"] == 10
    for _ in range(50):
        watch.add([step(2.0, 130)], waited=0.5, seconds=1.0)
    line = watch.line()
    assert "75% of the last 100 s" in line and "2.0 clips a second" in line
    assert "/data/films" in line and "crops_per_window (4)" in line
    assert "close keyframes" in line and "\n" not in line
    watch.add([step(2.0, 130)], waited=90, seconds=100)
    assert watch.line() is None  # told already
    monkeypatch.setattr(taehv.bottleneck, "TOLD_AGAIN_AFTER_SECONDS", 0)
    watch.add([step(2.0, 14)], waited=90, seconds=100)
    assert "lower height" in watch.line()
    watch.add([step(2.0, 14)], waited=9, seconds=100)
    assert watch.line() is None  # fast enough


def test_a_file_list_is_a_mixture_of_itself():
    files = FileList.from_paths("/", ["a.mp4", "b.mp4"])
    mixed = Mixture([files, files], [1, 1])
    assert files.parts == (files,) and [mixed[i] for i in range(4)] == [
        *("/a.mp4", "/b.mp4", "/a.mp4", "/b.mp4")
    ]
