"""Whether training waits for its clips, why, and what would help."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from taehv.clips import Batch, Work
from taehv.sections import Data

TOLD_AFTER_SECONDS = 60
"""A start is slow for other reasons, and short stretches say little."""
TOLD_AGAIN_AFTER_SECONDS = 900
WAITING_TOO_LONG = 0.2
FAR_APART = 4
"""Packets decoded for a frame that is used, from which keyframes are to blame."""


@dataclass
class Sums:
    """What the decoding of some windows took."""

    seconds: float = 0.0
    packets: int = 0
    frames: int = 0
    clips: int = 0

    def add(self, work: Work) -> None:
        """Take in a window."""
        self.seconds += work.seconds
        self.packets += work.packets
        self.frames += work.frames
        self.clips += work.clips

    @property
    def rate(self) -> float:
        """Clips a second and worker."""
        return self.clips / max(self.seconds, 1e-9)

    @property
    def packets_per_frame(self) -> float:
        """How much is decoded for what is used."""
        return self.packets / max(self.frames, 1)


@dataclass
class Stretch:
    """Steps that are looked at together."""

    waited: float = 0.0
    seconds: float = 0.0
    sources: dict[str, Sums] = field(default_factory=dict)
    workers: dict[int, Sums] = field(default_factory=dict)


class Bottleneck:
    """Watches the loader of one process.

    Args:
        data: section [data].
        workers: decoding processes.
    """

    def __init__(self, data: Data, workers: int) -> None:
        self.data, self.workers = data, workers
        self._stretch = Stretch()
        self._told = -float("inf")

    def add(self, batches: Iterable[Batch], waited: float, seconds: float) -> None:
        """Note a step: what it trained on, how long it waited, how long it took."""
        stretch = self._stretch
        stretch.waited += waited
        stretch.seconds += seconds
        for work in (work for batch in batches for work in batch.work):
            stretch.sources.setdefault(work.source, Sums()).add(work)
            stretch.workers.setdefault(work.worker, Sums()).add(work)

    def values(self) -> dict[str, float]:
        """Curves of the stretch so far: decoding by source and the slowest worker."""
        rates = [sums.rate for sums in self._stretch.workers.values()]
        values = {"data/slowest_worker_clips_per_second": min(rates)} if rates else {}
        for source, sums in self._stretch.sources.items():
            many = len(self._stretch.sources) > 1
            name = f"data/{source.strip('/')}/" if many else "data/"
            values[name + "clips_per_worker_second"] = sums.rate
            values[name + "packets_per_frame"] = sums.packets_per_frame
        return values

    def line(self) -> str | None:
        """One line when training has waited long since the last look, else None."""
        stretch = self._stretch
        if stretch.seconds < TOLD_AFTER_SECONDS:
            return None
        self._stretch = Stretch()
        share, now = stretch.waited / stretch.seconds, time.monotonic()
        if share < WAITING_TOO_LONG or now - self._told < TOLD_AGAIN_AFTER_SECONDS:
            return None
        self._told = now
        return (
            f"waiting for clips took {share:.0%} of the last {stretch.seconds:.0f} s: "
            + self._advice(stretch)
        )

    def _advice(self, stretch: Stretch) -> str:
        if not stretch.sources:
            return "put data.cache on a faster disk, or raise data.workers"
        name, slowest = max(stretch.sources.items(), key=lambda item: item[1].seconds)
        cures = [f"raise data.crops_per_window ({self.data.crops_per_window})"]
        if self.workers == 0:
            cures.insert(0, "set data.workers to -1")
        if slowest.packets_per_frame >= FAR_APART:
            cures.append(
                "make a proxy with close keyframes (python -m taehv.data proxy)"
            )
        else:
            cures.append("make a proxy of lower height (python -m taehv.data proxy)")
        cures.append("or train from a latent cache (python -m taehv.precompute)")
        return (
            f"a worker decodes {slowest.rate:.1f} clips a second of {name}, "
            f"{slowest.packets_per_frame:.1f} frames for each one used; "
            + ", ".join(cures)
        )
