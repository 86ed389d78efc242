"""Streaming takes no more memory for a long video than for a short one."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from taehv import TAEHV, StreamingTAEHV

torch.manual_seed(0)
stream = StreamingTAEHV(TAEHV(sys.argv[1]), trim=True)
count = 0
for _ in range(int(sys.argv[2])):
    for latent_N1CHW in stream.encode(torch.rand(1, 1, 3, 64, 96)):
        count += len(stream.decode(latent_N1CHW))
count += len(stream.flush())
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_mib(variant: str, frames: int) -> float:
    """Peak memory of a process that streams so many frames."""
    command = [sys.executable, "-c", SCRIPT, variant, str(frames)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=900
    )
    count, peak = done.stdout.split()
    assert int(count) >= frames - 16
    return int(peak) / 1024


@pytest.mark.soak
@pytest.mark.parametrize("variant", ["taehv", "taecvx", "taeltx_2", "taeh3"])
def test_memory_does_not_grow(variant: str) -> None:
    short, long = peak_mib(variant, 50), peak_mib(variant, 500)
    print(f"{variant}: {short:.0f} MiB at 50 frames, {long:.0f} MiB at 500")
    # Keeping the frames alone, 0.07 MiB each, would be seen.
    assert long < short + 15
