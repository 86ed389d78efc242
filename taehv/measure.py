"""How long work takes on a device, what it computes there, and how much memory."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from taehv.errors import UserError

T = TypeVar("T")

STEPS_AHEAD = 2
"""How far the host may run ahead of the device, as in training."""
LEAST_CALLS = 3
HOST_CALLS = 5
TRACED_CALLS = 3


@dataclass(frozen=True)
class Limits:
    """How long to measure."""

    warmup: int
    """Calls before any that counts."""
    calls: int
    seconds: float
    """About how long the calls that count may take."""


@dataclass
class Cost:
    """What one call of some work costs, in milliseconds where nothing else is said."""

    ms: float
    """Median wall time."""
    p90_ms: float
    wait_ms: float
    """Mean time for the next input."""
    first_s: float
    """Seconds of the first call, compilation included."""
    host_ms: float | None = None
    """Until the host is free, where the device is a GPU that has nothing else to do."""
    kernel_ms: float | None = None
    """Sum of the times of all kernels and copies but those between GPUs."""
    comm_ms: float | None = None
    """Sum of the times of what GPUs send one another, waiting included."""
    peak_gib: float | None = None
    """Most GPU memory in use, from the second call on."""
    kernels: list[tuple[str, float, int]] | None = None
    """Name, milliseconds and launches of each kernel, the longest first."""


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free() -> None:
    """Let go of what earlier work left: memory, and compiled graphs of other shapes."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: torch.device) -> float:
    """Most GPU memory in use since the last reset."""
    if device.type != "cuda":
        return 0.0
    return torch.cuda.max_memory_allocated(device) / 2**30


def prepare_tracing(device: torch.device) -> None:
    """Call before any CUDA graph is captured whose kernels are to be traced."""
    if device.type == "cuda":
        # What torch.profiler itself sets where it knows of CUDA graphs.
        os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
        os.environ.setdefault("TEARDOWN_CUPTI", "0")
        with profile(activities=[ProfilerActivity.CUDA]):
            pass


def measure(
    work: Callable[[T], object],
    feed: Iterator[T],
    device: torch.device,
    limits: Limits,
    agree: Callable[[int], int] = int,
) -> Cost:
    """Time calls of `work`, each on the next of `feed`.

    On a GPU the times are those between the ends of two calls there, the host running
    ahead as in training.

    Args:
        work: what is timed.
        feed: waiting for it is part of the time.
        device: where the work is done.
        limits: how often and how long.
        agree: makes of each process's count of calls one that all of them do.
    """
    begin = time.perf_counter()
    work(next(feed))
    synchronize(device)
    first = time.perf_counter() - begin
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(limits.warmup - 1):
        begin = time.perf_counter()
        work(next(feed))
        synchronize(device)
    room = limits.seconds / (time.perf_counter() - begin)
    calls = agree(min(limits.calls, max(LEAST_CALLS, int(room))))
    timed = _timed_on_gpu if device.type == "cuda" else _timed_on_cpu
    times, waited = timed(work, feed, calls)
    cost = Cost(
        ms=statistics.median(times),
        p90_ms=sorted(times)[math.ceil(0.9 * len(times)) - 1],
        wait_ms=1000 * waited / calls,
        first_s=first,
    )
    if device.type == "cuda":
        cost.peak_gib = peak_gib(device)
        cost.host_ms = _host_ms(work, feed)
        cost.kernels = _kernels(work, feed)
        sent = sum(ms for name, ms, _ in cost.kernels if "nccl" in name.lower())
        cost.comm_ms = sent
        cost.kernel_ms = sum(ms for _, ms, _ in cost.kernels) - sent
    return cost


def _timed_on_cpu(
    work: Callable[[T], object], feed: Iterator[T], calls: int
) -> tuple[list[float], float]:
    times, waited = [], 0.0
    for _ in range(calls):
        begin = time.perf_counter()
        item = next(feed)
        waited += time.perf_counter() - begin
        work(item)
        times.append(1000 * (time.perf_counter() - begin))
    return times, waited


def _timed_on_gpu(
    work: Callable[[T], object], feed: Iterator[T], calls: int
) -> tuple[list[float], float]:
    waited = 0.0
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    ends[0].record()
    for call in range(1, calls + 1):
        begin = time.perf_counter()
        item = next(feed)
        waited += time.perf_counter() - begin
        work(item)
        ends[call].record()
        ends[max(0, call - STEPS_AHEAD)].synchronize()
    torch.cuda.synchronize()
    pairs = itertools.pairwise(ends)
    return [before.elapsed_time(after) for before, after in pairs], waited


def _host_ms(work: Callable[[T], object], feed: Iterator[T]) -> float:
    times = []
    for _ in range(HOST_CALLS):
        item = next(feed)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work(item)
        times.append(1000 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    return statistics.median(times)


def _kernels(
    work: Callable[[T], object], feed: Iterator[T]
) -> list[tuple[str, float, int]]:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(TRACED_CALLS):
            work(next(feed))
        torch.cuda.synchronize()
    # The trace tells kernels from the ranges that span them; the tables do not.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    sums: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            sums.setdefault(event["name"], []).append(event["dur"])
    found = [
        (name, sum(times) / 1000 / TRACED_CALLS, round(len(times) / TRACED_CALLS))
        for name, times in sums.items()
    ]
    return sorted(found, key=lambda kernel: -kernel[1])


def peak_tflops(device: torch.device) -> float:
    """10^12 operations a second of a large product: bf16 on a GPU, else fp32."""
    is_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if is_gpu else (512, torch.float32)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    timed = _timed_on_gpu if is_gpu else _timed_on_cpu
    times, _ = timed(lambda _: torch.mm(a, b, out=out), itertools.repeat(None), 30)
    return 2 * size**3 / statistics.median(times) / 1e9


def count_flop(work: Callable[[], Tensor | object]) -> int:
    """Operations of convolutions and products in some work, which is run."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


class Report:
    """Tables that are printed row by row, and kept for a JSON file.

    Args:
        about: what was measured with: device, versions.
        path: of the JSON file, or None.
        speaks: whether this process prints and writes.

    Raises:
        UserError: the file's folder cannot be written to.
    """

    def __init__(
        self, about: dict[str, Any], path: Path | None, speaks: bool = True
    ) -> None:
        if path is not None and speaks:
            if not os.access(path.parent, os.W_OK):
                raise UserError(
                    f"{path.parent} is no folder that can be written to: name another "
                    f"for {path.name}"
                )
            if path.exists() and not path.is_file():
                raise UserError(f"{path} is not a file: name another")
        self.content: dict[str, Any] = {**about, "tables": {}}
        self.path, self.speaks = path, speaks
        self.say(", ".join(f"{key} {value}" for key, value in about.items()))

    def table(self, title: str, columns: dict[str, int]) -> None:
        """Begin a table: its columns and how many characters each has."""
        self._rows: list[dict[str, Any]] = []
        self.content["tables"][title] = self._rows
        self._columns = {name: max(len(name), n) for name, n in columns.items()}
        self.say(f"\n{title}\n")
        self._line({name: name for name in columns})
        self._line({name: "-" * n for name, n in self._columns.items()})

    def row(self, **values: Any) -> None:
        """Add a row; what belongs to no column goes into the file alone."""
        self._rows.append(values)
        self._line(values)
        if self.path is not None and self.speaks:
            # After every row, so that an interruption costs none.
            self.path.write_text(json.dumps(self.content, indent=1), encoding="utf-8")

    def say(self, text: str) -> None:
        """Print a line, if this process prints."""
        if self.speaks:
            print(text, flush=True)

    def _line(self, values: dict[str, Any]) -> None:
        cells = [_cell(values.get(c)).ljust(n) for c, n in self._columns.items()]
        self.say(f"| {' | '.join(cells)} |")


def _cell(value: Any) -> str:
    """Text as it is; numbers with three digits that count."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if abs(value) < 0.001:
        return f"{value:.1e}" if value else "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, digits)}f}"
