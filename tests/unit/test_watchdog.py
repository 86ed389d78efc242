"""A process that stands still ends, whatever its report comes to."""

from __future__ import annotations

import sys
from pathlib import Path

from conftest import ROOT, Running

from taehv.errors import RESTART_CODE

PROCESS = """
import sys, time
from pathlib import Path
import torch
from taehv import watchdog
from taehv.distributed import StopSignal, World
from taehv.watchdog import Watchdog

class Unlucky(Watchdog):
    def _dump(self):
        raise RuntimeError("no recorder")

class Stuck(Watchdog):
    def _dump(self):
        watchdog.threading.Event().wait()

if sys.argv[1] == "stuck":
    watchdog.REPORT_SECONDS = 1.0
kind = {"usual": Watchdog, "unlucky": Unlucky, "stuck": Stuck}[sys.argv[1]]
world = World(0, 1, torch.device("cpu"), None)
with StopSignal() as stop, kind(world, stop, Path(sys.argv[2]), 1.0):
    time.sleep(60)
"""


def test_a_stall_ends_the_process(tmp_path: Path) -> None:
    running = {
        kind: Running(
            [sys.executable, "-c", PROCESS, kind, tmp_path / kind], PYTHONPATH=str(ROOT)
        )
        for kind in ("usual", "unlucky", "stuck")
    }
    output = {kind: process.end(RESTART_CODE, 120) for kind, process in running.items()}
    assert "error: no progress in 1 s: starting; stacks are in" in output["usual"]
    assert "in <module>" in (tmp_path / "usual/stacks_0.txt").read_text()
