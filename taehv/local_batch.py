"""How many clips a process takes at a time: as many as asked for, found or left."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from taehv.distributed import from_main
from taehv.errors import RestartError, UserError
from taehv.sections import Config, Data, Training

log = logging.getLogger("taehv")

SPARE = 0.1
"""Share of a GPU's memory that has to stay free beside a batch that fits."""
SMALLER_CLIPS = "take smaller or shorter clips"


def check_probe(config: Config) -> None:
    """Refuse to look for a batch size where what is tried is not what is trained."""
    if not config.training.find_batch_size:
        return
    if config.training.device == "cpu":
        unfit = "is for GPUs"
    elif config.data.buckets:
        unfit = "tries clips of one shape, not data.buckets"
    elif config.seraena.enable:
        unfit = "does not try adversarial guidance"
    else:
        return
    raise UserError(
        f"training.find_batch_size = true {unfit}: set training.local_batch_size"
    )


class LocalBatch:
    """The number of clips in one forward pass, limited by memory.

    What did not fit is kept in the run's folder, for the next start of the run; the
    global batch is always the same.

    Args:
        training: section [training].
        data: section [data].
        path: the file that keeps the limit.
        kind: what the memory that a clip takes depends on; a limit for another kind is
            as good as none.
    """

    def __init__(self, training: Training, data: Data, path: Path, kind: str) -> None:
        self.path, self.kind = path, kind
        self.is_sought = training.find_batch_size
        self.sizes = _sizes(training, data, dist.get_world_size())
        """That are possible, the largest first."""
        self.clips = self.sizes[0]

    def choose(self, attempt: Callable[[int], None]) -> None:
        """Take the most clips that are known to fit, or found to (a collective).

        Args:
            attempt: see largest_that_fits.

        Raises:
            UserError: not even the smallest batch fits.
        """
        limit = from_main(self._read())
        if limit:
            log.info(f"{limit} clips at a time, as more did not fit ({self.path})")
        elif self.is_sought:
            limit = largest_that_fits(self.sizes, attempt)
            if not limit:
                raise UserError(f"{self._too_large(self.sizes[-1])}: {SMALLER_CLIPS}")
            log.info(f"{limit} clips at a time fit into the memory")
            if dist.get_rank() == 0:
                self._write(limit)
        fitting = (n for n in self.sizes if n <= (limit or n))
        self.clips = next(fitting, self.sizes[-1])

    def ran_out(self, step: int) -> UserError | RestartError:
        """What to raise when a step does not fit.

        Args:
            step: steps that the run has done; after the first, the next start of the
                same command takes half as many clips.
        """
        told = self._too_large(self.clips)
        smaller = [n for n in self.sizes if n <= self.clips // 2]
        if not smaller:
            return UserError(f"{told}: {SMALLER_CLIPS}")
        if not step and not self.is_sought:
            return UserError(
                f"{told} in the first step: lower training.local_batch_size to "
                f"{smaller[0]} (the global batch stays), set training.find_batch_size "
                f"or training.activation_checkpointing, or {SMALLER_CLIPS}"
            )
        self._write(smaller[0])
        return RestartError(
            f"{told} after step {step}: the same command goes on from the newest "
            f"checkpoint with {smaller[0]} (under torchrun --max-restarts by itself)"
        )

    def _too_large(self, clips: int) -> str:
        return f"out of GPU memory with {clips} clips at a time ({self.kind})"

    def _read(self) -> int:
        if not self.path.exists():
            return 0
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            return int(kept["clips"]) if kept["kind"] == self.kind else 0
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{self.path} is damaged: delete it") from None

    def _write(self, clips: int) -> None:
        # Several processes may run out at once.
        partial = self.path.with_name(f"{self.path.name}.{dist.get_rank()}")
        try:
            partial.write_text(json.dumps({"clips": clips, "kind": self.kind}))
            partial.replace(self.path)
        except OSError as error:
            log.warning(
                f"{self.path} cannot be written ({error.strerror}): the next start "
                f"will not know that {clips} clips at a time fit: make room, or set "
                f"training.local_batch_size to {clips}"
            )


def _sizes(training: Training, data: Data, processes: int) -> list[int]:
    batch, crops = training.global_batch_size, data.crops_per_window
    share = batch // processes
    buckets = [data.clips_of(shape, batch) for shape in data.shapes if data.buckets]

    def divides(clips: int) -> bool:
        parts = processes * (share // clips) * crops
        whole = share % clips == 0 and clips % crops == 0
        return whole and all(bucket % parts == 0 for bucket in buckets)

    largest = training.local_batch_size or share
    return [clips for clips in range(largest, 0, -1) if divides(clips)]


def largest_that_fits(sizes: Sequence[int], attempt: Callable[[int], None]) -> int:
    """The first size that every process has the memory for (a collective).

    Args:
        sizes: to try, the largest first.
        attempt: takes as much memory as a size needs, and calls no collective: the
            other processes would wait in it for one that has run out.

    Returns:
        0 if none fits.
    """
    for size in sizes:
        fits = torch.tensor(int(_fits(size, attempt)))
        dist.all_reduce(fits, op=dist.ReduceOp.MIN)
        if fits:
            return size
    return 0


def _fits(size: int, attempt: Callable[[int], None]) -> bool:
    has_gpu = torch.cuda.is_available()
    spare = None
    try:
        if has_gpu:
            free = int(torch.cuda.mem_get_info()[1] * SPARE)
            spare = torch.empty(free, dtype=torch.uint8, device="cuda")
        attempt(size)
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        del spare
        gc.collect()
        if has_gpu:
            torch.cuda.empty_cache()
    return True
