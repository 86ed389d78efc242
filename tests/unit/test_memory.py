"""The host's memory, as Linux tells it, and a warning before it is full."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import taehv.memory
from taehv.memory import HostMemory, MemoryMonitor, host_memory, memory_peaks

GIB = 2**30


def machine(root: Path, available: int, **limits: tuple[int, int, int]) -> Path:
    """A machine of 64 GiB, with control groups inside one another."""
    (root / "proc/self").mkdir(parents=True)
    lines = f"MemTotal: {64 << 20} kB\nMemAvailable: {available << 20} kB\nX: 0\n"
    (root / "proc/meminfo").write_text(lines)
    (root / "proc/self/cgroup").write_text("0::/" + "/".join(limits) + "\n")
    group = root / "sys/fs/cgroup"
    for name, (limit, used, cached) in limits.items():
        group = group / name
        group.mkdir(parents=True)
        (group / "memory.max").write_text(f"{limit * GIB}\n" if limit else "max\n")
        (group / "memory.current").write_text(f"{used * GIB}\n")
        stat = f"anon 5\ninactive_file {cached * GIB}\nactive_file 7\n"
        (group / "memory.stat").write_text(stat)
    return root


def test_a_machine_without_limits(tmp_path: Path) -> None:
    root = machine(tmp_path, available=48)
    assert host_memory(root) == HostMemory(16 * GIB, 64 * GIB)


def test_the_nearest_limit_counts_without_what_is_cached(tmp_path: Path) -> None:
    limits = {"slice": (32, 20, 4), "job": (16, 15, 2), "step": (0, 15, 2)}
    root = machine(tmp_path, available=40, **limits)
    assert host_memory(root) == HostMemory(13 * GIB, 16 * GIB)


def test_other_systems_have_none(tmp_path: Path) -> None:
    assert host_memory(tmp_path) is None


def test_it_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("taehv"), "propagate", True)
    monitor = MemoryMonitor()
    for used in (90, 96, 97):
        memory = HostMemory(used * GIB, 100 * GIB)
        monkeypatch.setattr(taehv.memory, "host_memory", lambda memory=memory: memory)
        monitor.check()
    (record,) = caplog.records
    assert "nearly full, 96.0 of 100.0 GiB" in record.message
    assert "its 0 decoding processes', the rest others'; lower data.w" in record.message


def test_peaks_grow_with_what_is_used() -> None:
    before = memory_peaks(torch.device("cpu"))["host_memory_gib"]
    kept = torch.ones(2**28)  # 1 GiB
    after = memory_peaks(torch.device("cpu"))["host_memory_gib"]
    assert len(kept) and 0.1 < before < after < before + 1.5
