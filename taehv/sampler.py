"""What is sampled, as pure functions of seed and sample number.

Resuming, other world sizes and other worker counts therefore give the same samples. The
state of the sampler is the number of samples consumed and nothing else.
"""

from __future__ import annotations

import itertools
import operator
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from taehv.errors import UserError
from taehv.sections import Data

SAMPLER_VERSION = 1
"""Changes whenever the same (seed, sample number) would give another clip."""
UINT64 = (1 << 64) - 1
# Purposes of random numbers: what belongs to a window, what to a crop of it or of a
# cached window, which latents a clip's frames are decoded from, what is done to a
# clip's frames on the device, what adversarial guidance makes of them, and what belongs
# to a clip of a study's windows.
WINDOW, CROP, CACHED_CROP, DECODED, DEGRADED, GUIDED, POOLED = 0, 1, 2, 3, 4, 5, 6
# The orders of sources and of buckets are others than those of files.
SOURCES, BUCKETS = 0x736F7572636573, 0x6275636B657473


def _splitmix64(x: int) -> int:
    """Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014."""
    x = (x + 0x9E3779B97F4A7C15) & UINT64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & UINT64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & UINT64
    return x ^ (x >> 31)


def permute(i: int, n: int, seed: int, epoch: int) -> int:
    """Place of item i in the shuffled order of n items, without a table.

    An 8-round Feistel network over the next power of four, walked until it falls
    below n (Black and Rogaway: Ciphers with Arbitrary Finite Domains, 2002).
    """
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    key = _splitmix64(_splitmix64(seed & UINT64) ^ epoch)
    while True:
        left, right = i >> bits, i & mask
        for turn in range(8):
            mixed = _splitmix64(key ^ (right << 3 | turn))
            left, right = right, left ^ (mixed & mask)
        i = left << bits | right
        if i < n:
            return i


def draw(seed: int, number: int, attempt: int, purpose: int, count: int) -> list[float]:
    """`count` uniform numbers in [0, 1), a pure function of the other arguments.

    Raw Philox output is used because numpy promises that it never changes.
    """
    key = np.array([seed & UINT64, number], dtype=np.uint64)
    counter = np.array([0, 0, attempt, purpose], dtype=np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw(count)
    return [(int(x) >> 11) * 2.0**-53 for x in raw]


def toss(seed: int, numbers: list[int]) -> Tensor:
    """A fair coin for each sample: bool, N."""
    return torch.tensor([draw(seed, g, 0, DECODED, 1)[0] < 0.5 for g in numbers])


BLOCK = 1000
"""Turns after which every part has had its share exactly."""


class Shares:
    """Gives turns 0, 1, ... to parts by their weights, in a shuffled order.

    In every BLOCK of turns each part has the same number, so that which turn of a part
    it is follows from the turn alone.

    Args:
        weights: of the parts, above 0.
        seed: of the order.

    Raises:
        UserError: a weight is too small for a turn in a block.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.seed = seed
        total = sum(weights)
        ends = [round(BLOCK * w / total) for w in itertools.accumulate(weights)]
        self.starts = [0, *ends]
        self.counts = np.diff(self.starts).tolist()
        if 0 in self.counts:
            raise UserError(
                f"the weights {list(weights)} give one part less than a {BLOCK}th: "
                "raise it or leave it out"
            )

    def part(self, turn: int) -> tuple[int, int]:
        """Which part has a turn, and how many of its turns came before."""
        if len(self.counts) == 1:
            return 0, turn
        block, i = divmod(turn, BLOCK)
        slot = permute(i, BLOCK, self.seed, block)
        part = bisect_right(self.starts, slot) - 1
        return part, block * self.counts[part] + slot - self.starts[part]


class Buckets:
    """Which shape each step's clips have, and so each sample's: by their numbers alone.

    Args:
        usual_clips: of a step, over all processes, without buckets.
        clips: the same for each shape.
        weights: of the shapes.
        seed: of the order.
    """

    def __init__(
        self,
        usual_clips: int,
        clips: Sequence[int],
        weights: Sequence[float],
        seed: int,
    ) -> None:
        self.usual_clips = usual_clips
        self.clips = tuple(clips)
        self._shares = Shares(weights, seed ^ BUCKETS)
        self._block_samples = sum(map(operator.mul, self._shares.counts, clips))
        self._blocks: dict[int, tuple[list[int], list[int]]] = {}

    @classmethod
    def of(cls, data: Data, global_batch_size: int, seed: int) -> Buckets:
        """By the settings."""
        shapes = data.shapes
        clips = [data.clips_of(shape, global_batch_size) for shape in shapes]
        return cls(global_batch_size, clips, [shape.weight for shape in shapes], seed)

    def of_sample(self, g: int) -> int:
        """The shape of sample g, by its place in the list."""
        if len(self.clips) == 1:
            return 0
        block, place = divmod(g, self._block_samples)
        parts, starts = self._block(block)
        return parts[bisect_right(starts, place) - 1]

    def aligned(self, g: int) -> int:
        """The first sample of the first step that begins at sample g or later."""
        if len(self.clips) == 1:
            return g
        block, place = divmod(g, self._block_samples)
        starts = [*self._block(block)[1], self._block_samples]
        return block * self._block_samples + starts[bisect_left(starts, place)]

    def _block(self, block: int) -> tuple[list[int], list[int]]:
        """Of each step in a block its shape and the samples before it."""
        if block not in self._blocks:
            steps = range(block * BLOCK, (block + 1) * BLOCK)
            parts = [self._shares.part(step)[0] for step in steps]
            sizes = [self.clips[part] for part in parts]
            # The trainer is some steps behind the loader, perhaps in the block before.
            self._blocks = {k: v for k, v in self._blocks.items() if k == block - 1}
            self._blocks[block] = parts, [0, *itertools.accumulate(sizes)][:-1]
        return self._blocks[block]


class Plan(Protocol):
    """Which clips each batch has; a batch sampler without state."""

    local_batch_size: int
    """The most clips in a batch."""

    def __iter__(self) -> Iterator[list[int]]: ...

    def after(self, batches: int) -> Plan:
        """The same plan, that many batches later."""


@dataclass(frozen=True)
class Steps:
    """Sample numbers of one rank's batches, without end; a batch sampler.

    A step has `global_batch_size` clips, or as many as its bucket; each rank takes an
    unbroken share of them in equal batches, of `local_batch_size` where there are no
    buckets. Raises UserError where that does not come out even.
    """

    consumed: int
    global_batch_size: int
    local_batch_size: int
    rank: int = 0
    world_size: int = 1
    micro_step: int = 0
    buckets: Buckets | None = None

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.world_size * self.local_batch_size):
            raise UserError(
                f"a global batch of {self.global_batch_size} clips cannot be shared by "
                f"{self.world_size} processes in batches of {self.local_batch_size}: "
                "make it a multiple of their product"
            )
        parts = self.world_size * self.micro_steps
        for clips in self.buckets.clips if self.buckets else ():
            if clips % parts:
                raise UserError(
                    f"a bucket has {clips} clips a step, which {self.world_size} "
                    f"processes cannot share in {self.micro_steps} batches each: set "
                    f"data.batch_multiple to a multiple of {parts}"
                )

    @property
    def micro_steps(self) -> int:
        """Batches of a rank in one step."""
        return self.global_batch_size // (self.world_size * self.local_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        first, micro_step = self.consumed, self.micro_step
        while True:
            clips = self._clips_at(first)
            size = clips // (self.world_size * self.micro_steps)
            for part in range(micro_step, self.micro_steps):
                start = first + (self.rank * self.micro_steps + part) * size
                yield list(range(start, start + size))
            first, micro_step = first + clips, 0

    def after(self, batches: int) -> Steps:
        """The same plan, that many batches later."""
        steps, micro_step = divmod(self.micro_step + batches, self.micro_steps)
        consumed = self.consumed
        for _ in range(steps):
            consumed += self._clips_at(consumed)
        return replace(self, consumed=consumed, micro_step=micro_step)

    def _clips_at(self, first: int) -> int:
        """Clips of the step that begins with sample `first`."""
        if self.buckets is None:
            return self.global_batch_size
        return self.buckets.clips[self.buckets.of_sample(first)]
