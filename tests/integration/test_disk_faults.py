"""A disk that fails costs a save, and a damaged checkpoint the steps since another."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT, Run, Running

FAULTY = '''
"""Trains on a disk on which some writes of some ranks fail."""
import contextlib, errno, os, re, resource, runpy, sys, time
from taehv.storage import HashedFiles

FAULTS = eval(os.environ["FAULTS"])
whole = HashedFiles.create_stream


def full(data):
    raise OSError(errno.ENOSPC, "No space left on device")


@contextlib.contextmanager
def create_stream(files, path, mode):
    step = int(re.search(r"step-(\\d+)", path)[1])
    fault = FAULTS.pop((step, int(os.environ["RANK"])), None) if "w" in mode else None
    if fault == "permission":
        raise PermissionError(errno.EACCES, "Permission denied", path)
    if fault in ("slow", "stuck"):
        time.sleep({"slow": 1, "stuck": 20}[fault])
    if fault == "limit":  # the operating system refuses
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with whole(files, path, mode) as stream:
            if fault == "space":
                stream.stream.write = full
            yield stream
    finally:
        if fault == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


HashedFiles.create_stream = create_stream
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
'''


def start(run: Run, faults: dict[tuple[int, int], str], **settings: object) -> Running:
    """Start a run of two processes with faults, by step and rank."""
    script = run.folder.parent / "faulty.py"
    script.write_text(FAULTY)
    command = run.command(2, **settings)
    command[command.index(str(ROOT / "train.py"))] = str(script)
    return Running(command, PYTHONPATH=str(ROOT), FAULTS=repr(faults))


@pytest.fixture(scope="module")
def settings() -> dict[str, object]:
    return {
        "training__steps": 9,
        "model__trained": "encoder",  # fewer bytes to save
        "optim__schedule": "constant",
        "checkpoint__interval": 1,
        "checkpoint__keep": 4,
        "validation__clips": 0,
    }


def test_faults_and_damage(videos: Path, tmp_path: Path, settings: dict) -> None:
    """Every save of a run has another fault; then its checkpoints are damaged."""
    run = Run(tmp_path, videos, **settings, checkpoint__export_interval=4)
    faults = {(2, 1): "space", (3, 0): "permission", (5, 1): "limit"}
    faults |= {(7, 1): "slow", (9, 0): "space"}
    run.folder.mkdir()
    (run.folder / "export").touch()  # where a folder should be
    output = start(run, faults).end(1, seconds=240)
    assert output.count("error: cannot export step-8/taehv and taehv to ") == 1
    assert "export step-4/taehv is not written ([Errno " in output
    assert "export step-8/taehv is not written ([Errno " in output
    told = [line for line in output.splitlines() if "is not saved" in line]
    for line, words in zip(
        told,
        (
            "step 2 is not saved (rank 1: OSError: [Errno 28] No space left on device)",
            "step 3 is not saved (rank 0: PermissionError: [Errno 13] Permission",
            "step 5 is not saved (rank 1: OSError: [Errno 27] File too large",
            "step 9 is not saved (rank 0: OSError: [Errno 28] No space",
        ),
        strict=True,
    ):
        assert words in line, output
    assert ["1 of at most 3" in line for line in told] == [True, False, True, True]
    checkpoints = run.folder / "checkpoints"
    there = sorted(path.name for path in checkpoints.iterdir())
    assert there == [f"step-{step}" for step in (6, 7, 8, 9)]
    before = run.metrics()
    assert [record["step"] for record in before] == list(range(1, 10))

    flip(checkpoints / "step-9/__1_0.distcp")
    with (checkpoints / "step-8/__0_0.distcp").open("r+b") as shard:
        shard.truncate(1000)
    (checkpoints / "step-7/.metadata").unlink()
    (run.folder / "export").unlink()
    output = run.finish(2, training__steps=10)
    for words in (
        "step-9/__1_0.distcp is altered",
        "step-8/__0_0.distcp has 1000 bytes in place of",
        "step-7/.metadata is missing",
    ):
        assert output.count(f"{checkpoints}/{words}") == 1, output
    assert f"resuming from {checkpoints}/step-6" in output
    assert "step-6: training.steps: 9 -> 10" in output
    assert run.metrics()[:9] == before and len(run.metrics()) == 10
    exported = sorted(path.name for path in (run.folder / "export").iterdir())
    assert exported == ["step-8", "taehv.pth", "taehv.safetensors"]


def flip(path: Path) -> None:
    """Alter one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.soak
def test_saves_that_never_succeed_end_the_run(
    videos: Path, tmp_path: Path, settings: dict
) -> None:
    run = Run(tmp_path, videos, **settings)
    faults = {(step, 1): "space" for step in range(3, 10)}
    output = start(run, faults).end(None, 240)
    assert "error: 3 checkpoints in a row could not be written" in output
    assert f"the last is {run.folder}/checkpoints/step-2" in output
    assert "Traceback" not in output.split("error: 3 checkpoints")[0]
    assert len(run.metrics()) in (5, 6)
    output = run.finish(2)
    assert f"resuming from {run.folder}/checkpoints/step-2" in output


@pytest.mark.soak
def test_a_disk_that_is_stuck_for_a_while(
    videos: Path, tmp_path: Path, settings: dict
) -> None:
    """The other process gives up on the save, and the next one has a group anew."""
    run = Run(tmp_path, videos, **settings)
    stuck = start(run, {(3, 1): "stuck"}, checkpoint__time_limit=8)
    output = stuck.end(seconds=240)
    told = [line for line in output.splitlines() if "is not saved" in line]
    assert told and all("step 3 is not saved" in line for line in told), output
    assert "not done in 8 s" in told[0]
    assert len(run.metrics()) == 9
    checkpoints = run.folder / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir())[-1] == "step-9"
    assert not (checkpoints / "step-3").exists()
