"""A process that stands still ends, whatever its report comes to."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import ROOT, Running

from taehv.errors import RESTART_CODE

PROCESS = """
import sys, time
from pathlib import Path
import torch
from taehv.distributed import StopSignal, World
from taehv.watchdog import Watchdog

class Unlucky(Watchdog):
    def _dump(self):
        raise RuntimeError("no recorder")

kind = {"usual": Watchdog, "unlucky": Unlucky}[sys.argv[1]]
world = World(0, 1, torch.device("cpu"), None)
with StopSignal() as stop, kind(world, stop, Path(sys.argv[2]), 1.0):
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["usual", "unlucky"])
def test_a_stall_ends_the_process(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, "-c", PROCESS, kind, tmp_path]
    output = Running(command, PYTHONPATH=str(ROOT)).end(RESTART_CODE, 40)
    if kind == "usual":
        assert "error: no progress in 1 s: starting; stacks are in" in output
        assert "in <module>" in (tmp_path / "stacks_0.txt").read_text()
