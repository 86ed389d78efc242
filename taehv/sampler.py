"""What is sampled, as pure functions of seed and sample number.

Resuming, other world sizes and other worker counts therefore give the same samples. The
state of the sampler is the number of samples consumed and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from taehv.errors import UserError

SAMPLER_VERSION = 1
"""Changes whenever the same (seed, sample number) would give another clip."""
UINT64 = (1 << 64) - 1
# Purposes of random numbers: what belongs to a window, what to a crop of it or of a
# cached window, and which latents a clip's frames are decoded from.
WINDOW, CROP, CACHED_CROP, DECODED = 0, 1, 2, 3


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

    A step has `global_batch_size` clips; each rank takes an unbroken share of them in
    `micro_steps` batches of `local_batch_size`. Raises UserError where that does not
    come out even.
    """

    consumed: int
    global_batch_size: int
    local_batch_size: int
    rank: int = 0
    world_size: int = 1
    micro_step: int = 0

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.world_size * self.local_batch_size):
            raise UserError(
                f"a global batch of {self.global_batch_size} clips cannot be shared by "
                f"{self.world_size} processes in batches of {self.local_batch_size}: "
                "make it a multiple of their product"
            )

    @property
    def micro_steps(self) -> int:
        """Batches of a rank in one step."""
        return self.global_batch_size // (self.world_size * self.local_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        share = self.micro_steps * self.local_batch_size
        for turn in itertools.count(self.micro_step):
            step, micro_step = divmod(turn, self.micro_steps)
            first = self.consumed + step * self.global_batch_size
            first += self.rank * share + micro_step * self.local_batch_size
            yield list(range(first, first + self.local_batch_size))

    def after(self, batches: int) -> Steps:
        """The same plan, that many batches later."""
        return replace(self, micro_step=self.micro_step + batches)
