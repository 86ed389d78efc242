"""Threads of this process that share work on the CPU, each taking some of the tensors.

PyTorch's own threads share every single operation, and are woken and waited for at
each of hundreds of tensors: 16 of them took 2.6 ms for AdamW of a model's 128 tensors,
and 1.0 ms of one as large as all.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from taehv.pools import cores

T = TypeVar("T")
MOST_THREADS = 8
"""They wait for memory, which a few keep busy."""


def take_cores() -> None:
    """Give this process its share of the machine's cores where torchrun gave it one.

    It does so for want of OMP_NUM_THREADS, and cannot be told from a user's own 1; the
    optimizer on the CPU would be slow.
    """
    if os.environ.get("TORCHELASTIC_RUN_ID") and torch.get_num_threads() == 1:
        processes = int(os.environ["LOCAL_WORLD_SIZE"])
        torch.set_num_threads(max(1, cores() // processes))


class Team:
    """Threads that take parts of a list of tensors, always the same ones.

    Args:
        tensors: what is worked on; anywhere but on the CPU in one part, by the caller.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        on_cpu = tensors[0].device.type == "cpu"
        count = min(MOST_THREADS, torch.get_num_threads()) if on_cpu else 1
        self.parts = parts([tensor.numel() for tensor in tensors], count)
        """Places of tensors, for each thread."""
        self._threads = _new_threads(len(self.parts)) if len(self.parts) > 1 else None

    def map(self, work: Callable[[int], T]) -> list[T]:
        """Call `work` with the number of each part, all at once."""
        numbers = range(len(self.parts))
        if self._threads is None:
            return [work(number) for number in numbers]
        return list(self._threads.map(work, numbers))


def parts(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Places of items in up to `count` parts of about the same size, none empty."""
    found: list[list[int]] = [[] for _ in range(min(count, len(sizes)))]
    totals = [0] * len(found)
    for place in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = totals.index(min(totals))
        found[least].append(place)
        totals[least] += sizes[place]
    return [sorted(part) for part in found]


def _new_threads(count: int) -> ThreadPoolExecutor:
    """Threads that compute alone, each without PyTorch's help."""
    threads, all_there = ThreadPoolExecutor(count), threading.Barrier(count)
    before = torch.get_num_threads()

    def begin(_: int) -> None:
        torch.get_num_threads()  # or the first operation would set them anew
        torch.set_num_threads(1)
        all_there.wait()

    try:
        list(threads.map(begin, range(count)))
    except RuntimeError:  # there are no more threads to be had
        all_there.abort()
        raise
    torch.set_num_threads(before)  # for all other threads that are to come
    return threads
