"""One run at a time writes to a folder."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from taehv.claim import alone, lock_of
from taehv.config import read_config
from taehv.distributed import World, started
from taehv.errors import UserError
from taehv.sections import Parallelism
from taehv.storage import Folder
from taehv.trainer import train

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "ab")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def world() -> Iterator[World]:
    """Of one process."""
    with started(Parallelism(), "cpu") as world:
        yield world


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has the lock of a run."""
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", HOLD, lock_of(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused(
    tmp_path: Path,
    holder: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("taehv.lock.PATIENCE", 0.3)
    settings = ["--job.name=run", f"--job.output_dir={tmp_path}"]
    with pytest.raises(UserError, match=f"another run writes to {tmp_path}/run: wait"):
        train(read_config([*settings, "--training.device=cpu"]))


def test_a_run_waits_for_one_that_dies(
    tmp_path: Path, holder: subprocess.Popen[bytes], world: World
) -> None:
    """And nothing of it keeps the next one out."""
    threading.Timer(0.3, holder.kill).start()
    with alone(tmp_path / "run", world):
        assert holder.wait(10) == -9
    with alone(tmp_path / "run", world):
        pass


def test_checkpoints_elsewhere_are_locked_too(
    tmp_path: Path,
    holder: subprocess.Popen[bytes],
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("taehv.lock.PATIENCE", 0.1)
    monkeypatch.chdir(tmp_path / "run")
    for place in (f"file://{tmp_path}/run/", "."):
        told = f"another run writes to {place.removeprefix('file://').rstrip('/')}: "
        with (
            pytest.raises(UserError, match=f"{told}.* another --checkpoint.folder"),
            alone(tmp_path / "other", world, Folder(place)),
        ):
            pass
    for own in (tmp_path / "mine", tmp_path / "mine/checkpoints", "memory://run"):
        with alone(tmp_path / "mine", world, Folder(own)):
            pass


def test_without_locks_a_run_goes_on(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with alone(Path("/proc/none"), world):  # where no folder can be made
        pass

    def fails(*arguments: object) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(fcntl, "flock", fails)
    with alone(tmp_path, world), alone(tmp_path, world):
        pass


def test_what_killed_runs_left_is_cleared(tmp_path: Path, world: World) -> None:
    left = [
        ".config.toml.7.part",
        "samples/.a.mp4.7.part",
        "export/step-2/.a.pth.7.part",
    ]
    kept = ["config.toml", "report/.index.html.7.part", "export/step-2/a.pth"]
    for name in left + kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with alone(tmp_path, world):
        there = {
            str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()
        }
    assert there == set(kept)
