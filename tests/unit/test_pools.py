"""Processes that die of an item cost that item."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from taehv.pools import alone, shared


def squared(item: int) -> int:
    """Ends its process at some."""
    if item in (7, 8, 60):
        os._exit(1)
    return item * item


def test_what_ends_its_process_is_told_and_the_rest_is_done() -> None:
    found = dict(shared(squared, range(70), 2, "taehv.errors"))
    deadly = {7, 8, 60}
    assert found == {i: None if i in deadly else i * i for i in range(70)}
    assert alone(squared, 3) == 9


STARTS = """
import os, sys, time
from taehv.pools import shared
from tests.unit.test_pools import stay

if __name__ == "__main__":
    for _ in shared(stay, range(2), 2, "taehv.errors"):
        pass
"""


def stay(item: int) -> None:
    """Tell who works, and go on for long."""
    print(os.getpid(), flush=True)
    time.sleep(600)


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "starts.py"
    script.write_text(STARTS)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, env=environment
    )
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    process.stdout.close()
    from conftest import wait_until_ended  # which the workers need not import

    try:
        wait_until_ended(workers)
    finally:
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
