"""Memory of the host and of the GPU: what is used, and what is left."""

from __future__ import annotations

import logging
import math
import multiprocessing
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

log = logging.getLogger("taehv")

NEARLY_FULL = 0.95
"""Share of the host's memory from which on a run is warned."""


@dataclass(frozen=True)
class HostMemory:
    """In bytes; what is used cannot be had without ending a program."""

    used: int
    limit: int


def host_memory(root: Path = Path("/")) -> HostMemory | None:
    """Of the machine, or of this process's control group that is nearest to its limit.

    Args:
        root: where proc and sys are.

    Returns:
        None where the system is not Linux.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except FileNotFoundError:
        return None
    kib = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
    total = kib["MemTotal"] << 10
    found = [HostMemory(total - (kib["MemAvailable"] << 10), total)]
    _, _, own = (root / "proc/self/cgroup").read_text().partition("0::/")
    groups = root / "sys/fs/cgroup"
    group = groups / own.splitlines()[0] if own.strip() else groups
    while group.is_relative_to(groups):
        limit = group / "memory.max"
        if limit.exists() and (text := limit.read_text().strip()) != "max":
            used = int((group / "memory.current").read_text())
            # Of cached files the kernel frees what has not been used lately.
            stat = dict(
                map(str.split, (group / "memory.stat").read_text().splitlines())
            )
            found.append(HostMemory(used - int(stat["inactive_file"]), int(text)))
        group = group.parent
    return max(found, key=lambda memory: memory.used / memory.limit)


def free_bytes(device: torch.device) -> float:
    """What is left of a device's memory; without an end where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    memory = host_memory()
    return math.inf if memory is None else memory.limit - memory.used


class MemoryMonitor:
    """Warns once, and says of what, when the host's memory is nearly full."""

    def __init__(self) -> None:
        self._has_warned = False

    def check(self) -> None:
        """Look, which takes well under a millisecond."""
        memory = None if self._has_warned else host_memory()
        if memory is None or memory.used < NEARLY_FULL * memory.limit:
            return
        self._has_warned = True
        workers = [_own_bytes(child.pid) for child in multiprocessing.active_children()]
        log.warning(
            f"the host's memory is nearly full, {_gib(memory.used)} of "
            f"{_gib(memory.limit)} GiB: {_gib(_own_bytes('self'))} are this process's, "
            f"{_gib(sum(workers))} its {len(workers)} decoding processes', the rest "
            "others'; lower data.workers or data.prefetch before one is killed"
        )


def _own_bytes(pid: int | str | None) -> int:
    """What would be free without a process."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    except FileNotFoundError:  # it has just ended
        return 0
    return (int(resident) - int(shared)) * resource.getpagesize()


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def memory_peaks(device: torch.device) -> dict[str, float]:
    """The most memory in GiB that this process has had so far, by name."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peaks = {"host_memory_gib": peak / (2**30 if sys.platform == "darwin" else 2**20)}
    if device.type == "cuda":
        peaks["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        peaks["memory_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return peaks
