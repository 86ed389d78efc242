"""Nothing that happens to a run costs more than it must."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Run, Running, wait_until_ended

from taehv.config import read_config
from taehv.data import ClipDataset
from taehv.index import build_file_lists

TEACHER = '''
import gc

import torch
import torch.nn.functional as F


def tell(phase, info):
    if phase == "start" and not gc.isenabled():
        print("collected", flush=True)


gc.callbacks.append(tell)


class Faulty:
    """Grey, averaged; its path lists sample numbers and what they bring about."""

    latent_channels = 16
    fingerprint = "faulty"

    def __init__(self, path, device):
        self.faults = dict(fault.split("=") for fault in path.split(",") if fault)

    def check(self, frames, height, width):
        pass

    def encode(self, frames_NTCHW, seeds):
        grey = F.avg_pool2d(frames_NTCHW.mean(2), 8)
        groups = [grey[:, :1], *grey[:, 1:].split(4, 1)]
        latents_NTHW = torch.stack([group.mean(1) for group in groups], 1)
        latents_NTCHW = 4 * latents_NTHW[:, :, None].repeat(1, 1, 16, 1, 1) - 2
        for latents_TCHW, seed in zip(latents_NTCHW, seeds):
            fault = self.faults.get(str(seed))
            if fault in ("nan", "1e6"):
                latents_TCHW *= float(fault)
            elif fault and len(seeds) > int(fault):
                raise torch.cuda.OutOfMemoryError("injected")
        return latents_NTCHW
'''
SETTINGS = {
    "teacher__kind": "faulty:Faulty",
    "training__steps": 12,
    "training__global_batch_size": 4,
    "training__precision": "fp64",
    "optim__schedule": "constant",  # so that fewer steps are the same ones
    "checkpoint__interval": 4,
    "validation__clips": 0,
}


@pytest.fixture(scope="module", autouse=True)
def _teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "faulty.py").write_text(TEACHER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(scope="module")
def reference(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two processes that nothing happens to."""
    run = Run(tmp_path_factory.mktemp("reference"), videos, **SETTINGS)
    run.finish(2, checkpoint__interval=100)
    return run


def test_whatever_happens_the_losses_are_the_same(
    reference: Run, videos: Path, tmp_path: Path
) -> None:
    """A process stands still, a worker and a process are killed, no memory."""
    run = Run(tmp_path, videos, **SETTINGS)

    process = run.start(2, training__step_timeout=10, checkpoint__interval=100)
    process.wait_for(lambda: len(run.metrics()) >= 3)
    frozen = process.rank(1)
    os.kill(frozen, signal.SIGSTOP)
    process.prints("rank 1: no answer since step ")
    process.prints(f"stacks are in {run.folder}/stalled")
    os.kill(frozen, signal.SIGKILL)  # as torchrun does after 30 seconds
    process.end(code=1)
    stacks = (run.folder / "stalled/stacks_0.txt").read_text()
    assert "all_reduce" in stacks and (run.folder / "stalled/gloo_0").stat().st_size

    # Of sample 40, in step 11, no more than one clip fits.
    process = run.start(2, restarts=2, data__workers=1, teacher__path="40=1")
    process.wait_for(lambda: len(run.metrics()) >= 6)
    os.kill(process.workers()[-1], signal.SIGKILL)
    process.prints("the workers of the data loader start anew")
    process.wait_for(lambda: len(run.metrics()) >= 7)
    os.kill(process.rank(1), signal.SIGKILL)
    output = process.end(seconds=300)  # it starts twice more
    assert output.count("resuming from") == 2
    (told,) = [line for line in output.splitlines() if "out of GPU memory" in line]
    assert told.startswith("error: ") and "with 2 clips at a time" in told
    assert "1 clips at a time, as more did not fit" in output
    expected, found = reference.metrics(), run.metrics()
    assert found[:8] == expected[:8] and len(found) == 12
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9)


def test_bad_data_is_counted(videos: Path, tmp_path: Path) -> None:
    """NaN on one rank, an exploding gradient, corrupt videos in most steps."""
    folder = tmp_path / "videos"
    shutil.copytree(videos, folder)
    for number in range(5):
        (folder / f"corrupt{number}.mp4").write_text("not a video")
    run = Run(tmp_path, folder, **SETTINGS)
    run.settings |= {
        # An eighth of the weights, so that so many steps take less time.
        "model.trained": "encoder",
        "training.precision": "fp32",
        "training.global_batch_size": 2,
        "training.gc_interval": 10,
        "checkpoint.interval": 100,
        "optim.spike_factor": 10,
        "teacher.path": "11=nan,71=1e6",
    }
    output = run.finish(2, training__steps=35)
    output += run.finish(2, training__steps=37)  # what is usual goes on, and the counts
    records = run.metrics()
    assert [record["step"] for record in records] == list(range(1, 38))
    assert [r["step"] for r in records if r["loss"] is None] == [6]
    skipped = [record["skipped"] for record in records]
    assert skipped == [0] * 5 + [1] * 30 + [2] * 2
    assert "[rank 1] step 6 is skipped, its loss or gradient is not finite" in output
    assert "step 36 is skipped, its gradient's norm of " in output
    replaced = _replaced(run)
    assert sum(map(bool, replaced)) > 20
    assert f"2 steps, {sum(replaced)} clips of bad videos replaced" in output
    assert output.count("collected") == 2 * 3


def _replaced(run: Run) -> list[int]:
    """Clips of corrupt videos that each step has to replace."""
    settings = {k: v for k, v in run.settings.items() if k != "teacher.path"}
    config = read_config([f"--{key}={value}" for key, value in settings.items()])
    files, _ = build_file_lists(config.data)
    clips = ClipDataset(config.data, files, config.training.seed)
    steps = (clips.__getitems__([n, n + 1]) for n in range(0, 74, 2))
    return [sum(len(clip.failures) for clip in step) for step in steps]


def test_the_largest_batch_that_fits_is_found(
    reference: Run, videos: Path, tmp_path: Path
) -> None:
    """One process then takes as many at a time as each of two has."""
    run = Run(tmp_path, videos, **SETTINGS)
    output = run.train(
        training__steps=4,
        training__device="auto",
        training__find_batch_size="true",
        # Both for what it tries and for what it trains on.
        teacher__path=",".join(f"{sample}=2" for sample in range(16)),
    )
    assert "2 clips at a time fit into the memory" in output
    for mine, theirs in zip(run.metrics(), reference.metrics()[:4], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9)


@pytest.mark.soak
def test_terminated_at_many_moments(
    reference: Run, videos: Path, tmp_path: Path
) -> None:
    rng = random.Random(0)
    for turn in range(20):
        run = Run(tmp_path / str(turn), videos, **SETTINGS)
        process = run.start(2)
        process.wait_for(lambda run=run: run.folder.exists())
        time.sleep(rng.uniform(0, 4))
        asked = time.monotonic()
        if process.is_running():
            os.kill(process.pid, signal.SIGTERM)
        output = process.end(code=None)
        step = len(run.metrics())
        print(f"after step {step}: {time.monotonic() - asked:.1f} s to the end")
        assert (
            step == SETTINGS["training__steps"]
            or f"stopped at step {step}: saved" in output
        ), output
        assert (run.folder / f"checkpoints/step-{step}/.metadata").exists()
        run.finish(2)
        assert run.metrics() == reference.metrics()


def test_a_second_interrupt_ends_at_once(videos: Path, tmp_path: Path) -> None:
    """Amid a step that takes long; with a line, and no traceback."""
    run = Run(tmp_path, videos, **SETTINGS, data__height=64, data__width=64)
    process = run.start(training__global_batch_size=32, data__workers=1)
    process.wait_for(process.workers)
    time.sleep(1)
    process.send(signal.SIGINT)
    time.sleep(0.2)
    started = process.tree()
    process.send(signal.SIGINT)
    output = process.end(code=130)
    assert "stopped at once\n" in output and "Traceback" not in output
    assert len(started) > 2
    wait_until_ended(started)


def test_a_killed_torchrun_does_not_leave_its_processes_training(
    videos: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path, videos, training__steps=10**6)
    process = run.start(2)
    process.wait_for(lambda: len(run.metrics()) > 2)
    ranks = [process.rank(rank) for rank in range(2)]
    os.kill(process.pid, signal.SIGKILL)
    process.end(code=-signal.SIGKILL)
    wait_until_ended(ranks)
    assert (run.folder / f"checkpoints/step-{len(run.metrics())}/.metadata").exists()


def test_a_stop_of_one_reaches_all_in_precompute(videos: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, videos)
    settings = {
        **run.settings,
        "teacher.kind": "cache_teachers:Slow",
        "data.cache": tmp_path / "cache",
        "cache.windows": 4000,
        "cache.frames": 5,
        "cache.height": 16,
        "cache.width": 16,
        "cache.shard_windows": 4,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", "-m", "taehv.precompute"]
    command += [f"--{key}={value}" for key, value in settings.items()]
    process = Running(command, PYTHONPATH=str(ROOT / "tests/unit"))
    process.wait_for(lambda: len([*tmp_path.glob("cache/train/*.json")]) > 2)
    os.kill(process.rank(1), signal.SIGUSR1)
    output = process.end()
    assert "of 1001 shards written; the same command goes on" in output
