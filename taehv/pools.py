"""Work shared among processes, any of which may die of what it is given."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import TypeVar

T = TypeVar("T")

CRASHES = "ends the process that reads it"
"""What is wrong with such a file."""
WAITING = 4
"""Calls a process that wait: a million of them would take a gigabyte."""


def cores() -> int:
    """How many this process may use, which a launcher may have bound to some."""
    affinity = getattr(os, "sched_getaffinity", None)  # only on Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def shared(
    call: Callable[[int], T], items: Iterable[int], processes: int, preload: str
) -> Iterator[tuple[int, T | None]]:
    """Items with what a call makes of them, in any order.

    Args:
        call: is sent to the processes.
        items: to call it with.
        processes: how many work at a time.
        preload: module that they begin with.

    Returns:
        None for an item at which a process ends, such as a file that crashes a decoder.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([preload])
    rest = iter(items)
    while True:
        waiting: dict[Future[T], int] = {}
        unsent: list[int] = []
        try:
            with ProcessPoolExecutor(processes, context, end_with_parent) as pool:
                while True:
                    room = WAITING * processes - len(waiting)
                    for item in itertools.islice(rest, room):
                        unsent.append(item)
                        waiting[pool.submit(call, item)] = unsent.pop()
                    if not waiting:
                        return
                    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        result = future.result()
                        yield waiting.pop(future), result
        except BrokenProcessPool:
            for item in (*waiting.values(), *unsent):
                yield item, alone(call, item)


def alone(call: Callable[[int], T], item: int) -> T | None:
    """What a call makes of an item in a process of its own; None if that ends."""
    with ProcessPoolExecutor(1, get_context("forkserver"), end_with_parent) as pool:
        try:
            return pool.submit(call, item).result()
        except BrokenProcessPool:
            return None


def end_with_parent() -> None:
    """Let this process, which another one has started, end with it however that ends.

    A fork server lives as long as its processes; neither would notice by itself.
    """
    parent = parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
