"""A thread beside the work: shares a stop between processes, and ends what stalls."""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from taehv.distributed import StopSignal, World, attempt, from_main, meeting_store
from taehv.errors import RESTART_CODE

TICK = 1.0
"""Seconds between two looks."""
REPORT_SECONDS = 30.0
"""After which a process that stands still ends without its report."""
LOOKS = 3
"""Looks without a sign of life after which a process counts as dead."""

ENDED = "ended"


class Watchdog:
    """Watches over this process, and over its place among the others.

    Collectives cannot tell that a process stands still: the others wait in them. So a
    thread tells once a second, in the store by which the processes met, where this one
    is. It takes over a stop that any of them was asked for, which so reaches all within
    seconds, wherever they are. And where this process has made no progress within its
    limit, it writes all stacks and the flight recorders, says which processes stand
    still, and ends this one. Time for which this process was suspended itself (Ctrl-Z,
    a laptop's lid) does not count.

    Args:
        world: this process's place.
        stop: what to share.
        folder: where to write the stacks.
        limit: seconds without progress after which to end; infinite is never.
    """

    def __init__(
        self,
        world: World,
        stop: StopSignal,
        folder: Path,
        limit: float = math.inf,
    ) -> None:
        self.world, self.stop, self.folder = world, stop, folder
        # Machines do not count their attempts alike.
        self._store = meeting_store(from_main(attempt())) if world.size > 1 else None
        self._ticks = 0
        self._is_asking = False
        self._heard: list[dict[int, str]] = []
        self._ended = threading.Event()
        # Apart, as a store whose host stands still does not answer either.
        targets = [self._watch, self._talk] if self._store else [self._watch]
        self._threads = [threading.Thread(target=t, daemon=True) for t in targets]
        self.progress("starting", limit)

    def __enter__(self) -> Watchdog:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(LOOKS * TICK)

    def progress(self, place: str, limit: float) -> None:
        """Note that this process has come to a place.

        Args:
            place: what it does now, for the report.
            limit: seconds that it may take.
        """
        self._place, self._limit, self._since = place, limit, self._ticks

    def _watch(self) -> None:
        while not self._ended.wait(TICK):
            self._ticks += 1
            if (self._ticks - self._since) * TICK > self._limit:
                self._end_stalled()

    def _talk(self) -> None:
        """Tell of this process, and hear of a stop and, when it matters, of the others.

        Returns when the store has ended, as this process will.
        """
        while not self._ended.wait(TICK):
            try:
                self._tell(str(self._ticks))
                if self.stop.received:
                    self._store.set("stop", str(self.stop.received))
                elif self._store.check(["stop"]):
                    self.stop.received = int(self._store.get("stop"))
                if self._is_asking:
                    self._heard.append(self._reports())
            except dist.DistError:
                return

    def _tell(self, sign_of_life: str) -> None:
        self._store.set(str(self.world.rank), f"{sign_of_life} {self._place}")

    def _reports(self) -> dict[int, str]:
        """What each process told last: a sign of life and its place."""
        keys = [str(rank) for rank in range(self.world.size)]
        known = {key: self._store.check([key]) for key in keys}
        return {
            int(key): self._store.get(key).decode() if is_known else "0 starting"
            for key, is_known in known.items()
        }

    def _end_stalled(self) -> None:
        """Report and leave: nothing else ends a thread that waits in a collective."""
        # Whatever the report may wait for, such as a disk or a dead machine.
        last_resort = threading.Timer(REPORT_SECONDS, os._exit, [RESTART_CODE])
        last_resort.daemon = True
        last_resort.start()
        try:
            self._report()
        finally:
            os._exit(RESTART_CODE)

    def _report(self) -> None:
        limit, standing = self._limit, self._standing()
        self._ended.set()
        if self._heard:
            with suppress(dist.DistError):
                self._tell(ENDED)  # and not silent, for those that still look
        try:
            self._dump()
            stacks = f"stacks are in {self.folder}"
        except OSError as error:
            stacks = f"no stacks could be written ({error})"
        if standing:
            line = f"error: no progress in {limit:.0f} s: {standing}; {stacks}"
            print(line, file=sys.stderr, flush=True)

    def _standing(self) -> str:
        """Where all processes are; empty on all but the first of those that answer."""
        if self._store is None:
            return self._place
        self._is_asking = True
        for _ in range(LOOKS + 1):
            self._ended.wait(TICK)
            self._ticks += 1
        if len(self._heard) < LOOKS:
            return (
                f"rank {self.world.rank}: {self._place}; no answer from "
                f"{os.environ['MASTER_ADDR']}, where the processes met"
            )
        before, now = self._heard[0], self._heard[-1]
        answering = [rank for rank, report in now.items() if report != before[rank]]
        if [self.world.rank] != answering[:1]:
            return ""
        places = defaultdict(list)
        for rank, report in now.items():
            place = report.partition(" ")[2]
            silent = rank not in answering and not report.startswith(ENDED)
            places["no answer since " * silent + place].append(str(rank))
        told = (f"rank {', '.join(ranks)}: {place}" for place, ranks in places.items())
        return "; ".join(told)

    def _dump(self) -> None:
        """Write what torchfrtrace reads, and the stacks of all threads."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rank, recorders = self.world.rank, torch._C._distributed_c10d
        with (self.folder / f"stacks_{rank}.txt").open("w", encoding="utf-8") as file:
            print(f"rank {rank}, {self._place}", file=file, flush=True)
            faulthandler.dump_traceback(file)
        (self.folder / f"gloo_{rank}").write_bytes(recorders._dump_fr_trace())
        if self.world.device.type == "cuda":
            (self.folder / f"nccl_{rank}").write_bytes(recorders._dump_nccl_trace())
