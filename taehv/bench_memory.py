"""The largest batch of large crops that fits into the memory of a GPU."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from taehv import measure
from taehv.bench import Bench, Size, Student, clips_of, way_settings
from taehv.errors import UserError

COLUMNS = {
    "size": 11,
    "way": 22,
    "clips": 5,
    "GiB": 5,
    "GiB a clip": 5,
    "ms": 5,
    "clips/s": 5,
}
STEPS = 3


@dataclass(frozen=True)
class Attempt:
    """A batch that could be trained."""

    clips: int
    gib: float
    """Most memory in use."""
    ms: float
    """Time of the last step."""


def bench_memory(bench: Bench) -> None:
    """Find the largest batch that trains, for every large size and way.

    Raises:
        UserError: there is no GPU.
    """
    if bench.device.type != "cuda":
        raise UserError("--memory fills a GPU, and PyTorch sees none here")
    options = bench.options
    whole = torch.cuda.mem_get_info()[1] / 2**30
    total = min(options.memory_gib or math.inf, whole)
    torch.cuda.set_per_process_memory_fraction(total / whole)
    bench.report.table(f"largest batch in {total:.1f} GiB", COLUMNS)
    for size, way in itertools.product(options.memory_sizes, options.memory_ways):
        found = largest_batch(lambda n: attempt(bench, size, way, n), total)  # noqa: B023
        best, per_clip = found or (None, None)
        bench.report.row(
            **{"size": str(size), "way": way, "clips": best.clips if best else 0},
            **(
                {"GiB": best.gib, "GiB a clip": per_clip, "ms": best.ms} if best else {}
            ),
            **({"clips/s": best.clips / best.ms * 1000} if best else {}),
        )


def largest_batch(
    attempted: Callable[[int], Attempt | None], total_gib: float
) -> tuple[Attempt, float] | None:
    """The largest batch that can be trained, and the memory of one of its clips.

    Args:
        attempted: trains that many clips; None where memory does not suffice.
        total_gib: of memory, to guess from two small batches how many fit.

    Returns:
        None where not even one clip can be trained.
    """
    best, second = attempted(1), attempted(2)
    if best is None or second is None:
        return best and (best, best.gib)
    per_clip = second.gib - best.gib
    best, too_many = second, None
    clips = max(3, 1 + int((total_gib - best.gib) / per_clip) + 1)
    while too_many is None or too_many > best.clips + 1:
        found = attempted(clips)
        if found is None:
            too_many = clips
        else:
            best = found
        clips = best.clips + 1 if found else clips - 1
    return best, per_clip


def attempt(bench: Bench, size: Size, way: str, clips: int) -> Attempt | None:
    """Train some steps of a batch; None where memory does not suffice."""
    measure.free()
    config = bench.config(
        {"model.variant": bench.options.variants[0]},
        size.settings,
        way_settings(way),
        {"training.global_batch_size": clips},
    )
    try:
        with clips_of(bench, config) as feed:
            student = Student(config, bench.world)
            for _ in range(STEPS):
                measure.synchronize(bench.device)
                begin = time.perf_counter()
                student(next(feed))
                measure.synchronize(bench.device)
    except torch.OutOfMemoryError:
        return None
    seconds = time.perf_counter() - begin
    return Attempt(clips, measure.peak_gib(bench.device), 1000 * seconds)
