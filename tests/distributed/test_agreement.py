"""What processes find out together."""

from __future__ import annotations

import sys
from pathlib import Path

from conftest import ROOT, Running

PROCESS = """
import sys
import torch
from taehv.sections import Parallelism
from taehv.distributed import check_agreement, started
from taehv.errors import UserError, run_command
from taehv.local_batch import largest_that_fits

def main():
    with started(Parallelism(), "cpu") as world:
        room = (5, 3)[world.rank]

        def attempt(clips):
            if clips > room:
                raise torch.cuda.OutOfMemoryError("no room")

        sys.stdout.write(f"found {largest_that_fits([8, 4, 2, 1], attempt)}\\n")
        check_agreement({"the same": 1})
        try:
            check_agreement({"same": 1, "other": world.rank})
        except UserError as error:
            sys.stdout.write(f"{error}\\n")
        if world.rank:
            raise ValueError("of one alone")
        torch.distributed.barrier()

run_command(main)
"""


def test_processes_agree_or_say_so(tmp_path: Path) -> None:
    """The least memory of all, and a value that is not the same; then one fails."""
    (tmp_path / "agree.py").write_text(PROCESS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", tmp_path / "agree.py"]
    output = Running(command, PYTHONPATH=str(ROOT)).end(code=1)
    assert output.count("found 2") == 2
    assert output.count("the processes do not see the same other: give all") == 2
    assert "ValueError: of one alone" in output and "exitcode  : 1" in output
