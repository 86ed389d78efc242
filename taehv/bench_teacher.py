"""Training steps with a teacher: live, compiled, and from a latent cache."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from taehv import measure
from taehv.augment import to_frames
from taehv.bench import (
    DEFAULT,
    REFERENCE,
    Bench,
    PublishedStudent,
    Settings,
    Size,
    Student,
    clips_of,
    cost_cells,
    made_up_videos,
)
from taehv.cache import Cache, CacheDataset
from taehv.clips import Batch
from taehv.distributed import World
from taehv.errors import UserError
from taehv.loader import ClipLoader
from taehv.losses import Targets
from taehv.measure import Cost
from taehv.sampler import Steps
from taehv.sections import Config
from taehv.teacher import Teacher, load_teacher

VARIANT, KIND = "taecvx", "cogvideox"
SMALL = {
    "block_out_channels": (8, 8, 8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
ROWS = ("eager", "compiled", "cached")
WINDOW = 2
"""Windows of the cache are so many times longer, higher and wider than clips."""
COLUMNS = {
    "what": 34,
    "ms": 5,
    "p90": 5,
    "clips/s": 6,
    "frames/s": 6,
    "kernels": 6,
    "host": 5,
    "wait": 5,
    "GiB": 5,
    "first s": 5,
    "speed-up": 4,
}


class TaughtStudent(Student):
    """A student whose teacher codes each batch before its step."""

    def __init__(self, config: Config, world: World, teacher: Teacher) -> None:
        super().__init__(config, world)
        self.teacher = teacher

    def targets(self, batch: Batch) -> Targets:
        """A batch on the device, with its latents."""
        targets = super().targets(replace(batch, latents_NTCHW=None))
        latents_NTCHW = self.teacher.encode(targets.frames_NTCHW, batch.numbers)
        targets.latents_NTCHW = latents_NTCHW.to(self.exact)
        return targets


class PublishedTaughtStudent(PublishedStudent):
    """The same by the published recipe."""

    def __init__(self, config: Config, world: World, teacher: Teacher) -> None:
        super().__init__(config, world)
        self.teacher = teacher

    def latents(self, batch: Batch, frames_NTCHW: Tensor) -> Tensor:
        """Those of the teacher."""
        return self.teacher.encode(frames_NTCHW, batch.numbers)


def bench_teacher(bench: Bench) -> None:
    """Time of a step with a random CogVideoX VAE of full size, on a CPU a small one.

    It is saved, and loaded as a user's teacher is. The cache is written by
    taehv.precompute from the videos under --root, or from made-up ones.

    Raises:
        UserError: it is to be measured in a way that is none.
    """
    for chosen in bench.options.teacher_rows:
        if chosen not in ROWS:
            raise UserError(f"no --teacher-rows {chosen!r}: take {', '.join(ROWS)}")
    size: Size = bench.options.teacher_size
    title = f"with a CogVideoX teacher, {bench.options.clips} clips of {size}"
    bench.report.table(f"{title}, times in ms", COLUMNS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings: Settings = {
            "model.variant": VARIANT,
            "teacher.kind": KIND,
            "teacher.path": _save_vae(folder / "vae", bench.device.type == "cuda"),
            **size.settings,
        }
        rows = Rows(bench, bench.config(settings))
        for chosen in bench.options.teacher_rows:
            if chosen == "cached":
                _cached(rows, settings, folder)
            else:
                _live(rows, compiled=chosen == "compiled")


def _save_vae(path: Path, full: bool) -> Path:
    from diffusers import AutoencoderKLCogVideoX  # takes seconds

    AutoencoderKLCogVideoX(**({} if full else SMALL)).save_pretrained(path)
    return path


@dataclass
class Rows:
    """Prints rows; the published step is what the others are compared with."""

    bench: Bench
    config: Config
    reference_ms: float | None = None

    def step(
        self, what: str, student: Callable[[Batch], object], feed: Iterator[Batch]
    ) -> None:
        """Measure and print training steps."""
        cost = self.bench.measure(student, feed)
        if isinstance(student, PublishedTaughtStudent):
            self.reference_ms = cost.ms
        self._print(what, cost, self.config.training.global_batch_size)

    def encoding(self, what: str, teacher: Teacher, frames_NTCHW: Tensor) -> float:
        """Measure and print encoding; returns frames a second."""
        clips, frames = frames_NTCHW.shape[:2]

        def encode(seeds: list[int]) -> Tensor:
            return teacher.encode(frames_NTCHW, seeds)

        cost = self.bench.measure(encode, itertools.repeat(list(range(clips))))
        self._print(what, cost, clips, frames)
        return clips * frames / cost.ms * 1000

    def _print(
        self, what: str, cost: Cost, clips: int, frames: int | None = None
    ) -> None:
        is_step = frames is None
        rate = clips / cost.ms * 1000
        speed_up = (
            self.reference_ms / cost.ms if is_step and self.reference_ms else None
        )
        self.bench.report.row(
            what=what,
            **cost_cells(cost),
            **{
                "clips/s": rate,
                "frames/s": rate * (frames or self.config.data.frames),
                "speed-up": speed_up,
            },
        )


def _live(rows: Rows, compiled: bool) -> None:
    """The teacher alone, and steps in which it codes every batch."""
    bench, config = rows.bench, rows.config
    how = "compiled" if compiled else "eager"
    measure.free()
    teacher = _load(bench, config, compiled)
    with clips_of(bench, config) as feed:
        frames_NTCHW = to_frames(next(feed), bench.device)
        rows.encoding(f"{how} teacher alone", teacher, frames_NTCHW)
        if not compiled:
            published = PublishedTaughtStudent(config, bench.world, teacher)
            rows.step(f"{REFERENCE} step, {how} teacher", published, feed)
            del published
        student = TaughtStudent(config, bench.world, teacher)
        rows.step(f"{DEFAULT} step, {how} teacher", student, feed)


def _load(bench: Bench, config: Config, compiled: bool) -> Teacher:
    teacher = load_teacher(config.teacher, bench.device, compiled)
    assert teacher is not None  # its kind is set
    return teacher


def _cached(rows: Rows, settings: Settings, folder: Path) -> None:
    """Writing a cache and training from it, by the commands' own parts."""
    bench, size = rows.bench, rows.bench.options.teacher_size
    window = Size(*(WINDOW * n for n in astuple(size)))
    measure.free()
    teacher = _load(bench, rows.config, bench.device.type == "cuda")
    count = rows.config.cache.batch_size
    frames_NTCHW = torch.rand(count, window.frames, 3, window.height, window.width)
    alone = rows.encoding(
        f"teacher alone, {count} of {window}", teacher, frames_NTCHW.to(bench.device)
    )
    del teacher, frames_NTCHW
    measure.free()
    root = bench.options.root or made_up_videos(folder / "videos", window)
    cache = folder / "cache"
    settings = {**settings, "data.root": root, "data.cache": cache}
    encoded = _precompute(bench, settings, window)
    bench.report.row(
        **{"what": f"precompute: {encoded / alone:.0%} of that", "frames/s": encoded}
    )
    config = bench.config(settings)
    clips = CacheDataset(config.data, Cache.open(cache, VARIANT).train, 0)
    batch_size = config.training.global_batch_size
    loader = ClipLoader(
        clips, Steps(0, batch_size, batch_size), bench.device.type == "cuda"
    )
    try:
        rows.step(f"{DEFAULT} step, cached", Student(config, bench.world), loader)
    finally:
        loader.close()


def _precompute(bench: Bench, settings: Settings, window: Size) -> float:
    """Write the cache in a process of its own; returns frames a second."""
    size = {f"cache.{key}": value for key, value in asdict(window).items()}
    all_settings = {
        **settings,
        **size,
        "cache.windows": bench.options.cache_windows,
        "data.workers": bench.options.workers,
        "validation.clips": 0,
    }
    command = [sys.executable, "-m", "taehv.precompute"]
    command += [f"--{key}={value}" for key, value in all_settings.items()]
    done = subprocess.run(command, capture_output=True, text=True)
    told = re.search(r"encoded at ([\d.]+) frames/s", done.stderr)
    if done.returncode or not told:
        raise RuntimeError(f"taehv.precompute failed:\n{done.stdout}{done.stderr}")
    return float(told[1])
