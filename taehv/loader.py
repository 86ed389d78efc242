"""Batches prepared by worker processes that may die without a trace in the result."""

from __future__ import annotations

import functools
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from taehv.clips import Batch, Clip, ClipSource, Failure, collate
from taehv.errors import UserError
from taehv.pools import cores, end_with_parent
from taehv.sampler import Plan

log = logging.getLogger("taehv")

REBUILDS = 8
TIMEOUT_SECONDS = 300
# A DataLoader looks for dead workers only when its own timeout has passed.
POLL_SECONDS = 5
MAX_WORKERS = 16
SHARED_MEMORY = "/dev/shm"


class ClipLoader:
    """The batches of a plan, prepared by worker processes; `Steps` never end.

    Workers are started by a fork server (forking a process that uses CUDA or threads
    is unsafe) and map the source's lists into memory. When one dies or hangs, all are
    started anew where the reader stands, up to REBUILDS times in a run; that is exact
    because sampling has no state. `collate` makes a batch of what the source gives.
    Raises UserError when sizes do not divide, when shared memory is too small, and in
    reading when no usable file is found.
    """

    def __init__(
        self,
        source: ClipSource,
        plan: Plan,
        pin_memory: bool = False,
        collate: Callable[[list[Any]], Batch] = collate,
    ) -> None:
        data = source.data
        self.workers = worker_count(data.workers)
        if plan.local_batch_size % data.crops_per_window:
            raise UserError(
                f"data.crops_per_window = {data.crops_per_window} must divide the "
                f"local batch of {plan.local_batch_size} clips"
            )
        batch_bytes = plan.local_batch_size * source.clip_bytes
        check_shared_memory(batch_bytes, data.prefetch, self.workers)
        self.plan = plan
        self.pin_memory = pin_memory
        self._collate = functools.partial(_collate_or_error, collate)
        self._folder = tempfile.TemporaryDirectory(prefix="taehv-")
        self._source = source.mapped(self._folder.name)
        self._rebuilds = 0
        self._batches: Iterator[Batch | UserError] | None = None

    def __iter__(self) -> ClipLoader:
        return self

    def __next__(self) -> Batch:
        batch = self._next_or_rebuild()
        if isinstance(batch, UserError):
            raise batch
        self.plan = self.plan.after(1)
        return batch

    def close(self) -> None:
        """End the workers and remove the mapped lists."""
        self._batches = None
        self._folder.cleanup()

    def _next_or_rebuild(self) -> Batch | UserError:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while True:
            try:
                if self._batches is None:
                    self._batches = iter(self._build())
                return next(self._batches)
            except (RuntimeError, EOFError, ConnectionError) as error:
                if "timed out" in str(error) and time.monotonic() < deadline:
                    continue
                self._rebuilds += 1
                if self.workers == 0 or self._rebuilds > REBUILDS:
                    raise
                log.warning(f"the workers of the data loader start anew: {error}")
            self._batches = None
            deadline = time.monotonic() + TIMEOUT_SECONDS

    def _build(self) -> DataLoader:
        return DataLoader(
            _Fetched(self._source),
            batch_sampler=self.plan,
            collate_fn=self._collate,
            pin_memory=self.pin_memory,
            **worker_options(self.workers, self._source.data.prefetch, POLL_SECONDS),
        )


class _Fetched(Dataset):
    """Hands a UserError on as a value: raised in a worker it would lose its line."""

    def __init__(self, source: ClipSource) -> None:
        self.source = source

    def __getitems__(self, numbers: list[int]) -> Sequence[Clip | Failure] | UserError:
        try:
            return self.source.__getitems__(numbers)
        except UserError as error:
            return error


def _collate_or_error(
    collate: Callable[[list[Any]], Batch], samples: list[Any] | UserError
) -> Batch | UserError | _Sent:
    if isinstance(samples, UserError):
        return samples
    is_worker = torch.utils.data.get_worker_info() is not None
    return _Sent(collate(samples)) if is_worker else collate(samples)


class _Sent:
    """A batch of a worker, which is received as itself, or as the UserError of why not.

    The queue between them pickles in a thread. What it has no memory for it drops, and
    the reader would wait for it.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        try:
            self.batch.share_memory()
        except RuntimeError as error:
            told = (
                f"no shared memory for a batch ({error}): lower data.workers or "
                "data.prefetch, or raise its limits (docker run --shm-size, ulimit -f "
                "and -n)"
            )
            return UserError, (told,)
        return _received, (self.batch,)


def _received(batch: Batch) -> Batch:
    return batch


def worker_count(workers: int) -> int:
    """Worker processes of this rank; -1 shares the cores among the local ranks."""
    if workers >= 0:
        return workers
    return max(1, min(MAX_WORKERS, cores() // _local_world()))


def worker_options(workers: int, prefetch: int, timeout: float) -> dict[str, Any]:
    """DataLoader arguments for decoding in `workers` processes, or in this one."""
    # Else each start of the workers would draw from the random numbers of training.
    own_random_numbers = {"generator": torch.Generator()}
    if workers == 0:
        return own_random_numbers
    context = get_context("forkserver")
    context.set_forkserver_preload(["taehv.data"])
    return own_random_numbers | {
        "num_workers": workers,
        "prefetch_factor": prefetch,
        "multiprocessing_context": context,
        "worker_init_fn": _start_worker,
        "timeout": timeout,
    }


def _start_worker(worker: int) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    # Ctrl-C reaches every process; the training process finishes its step first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def worker_number() -> int:
    """Of this process among the loader's workers; 0 in the training process too."""
    worker = torch.utils.data.get_worker_info()
    return worker.id if worker else 0


def _local_world() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_shared_memory(batch_bytes: int, prefetch: int, workers: int) -> None:
    """Raise UserError if the batches in flight on this host would not fit."""
    if workers == 0 or not os.path.isdir(SHARED_MEMORY):
        return
    needed = _local_world() * workers * (prefetch + 1) * batch_bytes
    status = os.statvfs(SHARED_MEMORY)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise UserError(
            f"{SHARED_MEMORY} has {free >> 20} MiB free and the workers need "
            f"{(needed >> 20) + 1}: lower data.workers or data.prefetch, or give the "
            "container more (docker run --shm-size)"
        )
