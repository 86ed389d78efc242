"""Adversarial guidance in whole runs: any number of processes, and after a resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import Run

GUIDED = {
    "training__precision": "fp64",
    "training__global_batch_size": 4,
    "optim__lr": 1e-3,
    "validation__clips": 0,
    "seraena__enable": "true",
    "seraena__ramp_steps": 2,
    "seraena__replay_size": 16,
    "seraena__replay_dtype": "fp32",
    "seraena__replay_in_checkpoint": "true",
}
SHORT = {**GUIDED, "training__steps": 4, "checkpoint__interval": 2}
SAME = (
    *("loss", "reconstruction", "adversarial", "grad_norm", "psnr"),
    *("seraena/loss", "seraena/grad_norm", "seraena/weight"),
    *("seraena/correction_norm", "seraena/gradient_ratio"),
)


@pytest.fixture(scope="module")
def reference(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four steps in one process."""
    run = Run(tmp_path_factory.mktemp("guided"), videos, **SHORT)
    output = run.train()
    told = "Seraena: 7.5 M parameters on 2 groups of 3 of 5 frames (the last shares 1"
    assert told in output and "never begins" not in output
    return run


def assert_same(found: Run, expected: Run) -> None:
    records = expected.metrics()
    assert [r["step"] for r in found.metrics()] == [r["step"] for r in records]
    for name in SAME:
        values = [record[name] for record in records]
        assert all(values), name
        again = [record[name] for record in found.metrics()]
        assert again == pytest.approx(values, rel=1e-5), name


def test_two_processes_with_micro_batches_are_one(
    reference: Run, videos: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path, videos, **SHORT)
    run.finish(2, parallelism__mode="fsdp", training__local_batch_size=1)
    assert_same(run, reference)


def test_a_resumed_run_goes_on_exactly(
    reference: Run, videos: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path, videos, **SHORT)
    shutil.copytree(reference.folder, run.folder)
    shutil.rmtree(run.folder / "checkpoints/step-4")
    output = run.train()
    assert "resuming from" in output and "anew" not in output
    assert run.metrics() == reference.metrics()
    output = run.train(seraena__start_step=4)
    assert "guidance never begins: seraena.start_step = 4, and there are 4" in output


def test_guidance_can_be_added_to_a_run(
    reference: Run, videos: Path, tmp_path: Path
) -> None:
    """Another discriminator than the checkpoint's begins, and begins gently."""
    run = Run(tmp_path, videos, **SHORT)
    shutil.copytree(reference.folder, run.folder)
    output = run.train(seraena__frames=2, training__steps=6)
    assert "the checkpoint has no discriminator like this: it begins anew" in output
    assert "the checkpoint has no earlier decoded frames: they gather anew" in output
    weights = [record["seraena/weight"] for record in run.metrics()[4:]]
    assert weights == pytest.approx([0.05 / 3, 0.1 / 3])


@pytest.mark.soak
def test_twenty_steps_and_a_kill(videos: Path, tmp_path: Path) -> None:
    long = {**GUIDED, "training__steps": 20, "checkpoint__interval": 5}
    one = Run(tmp_path / "one", videos, **long)
    one.finish()
    two = Run(tmp_path / "two", videos, **long)
    two.finish(2, parallelism__mode="fsdp", training__local_batch_size=1)
    assert_same(two, one)
    killed = Run(tmp_path / "killed", videos, **long)
    running = killed.start()
    running.wait_for(lambda: len(killed.metrics()) >= 12)
    running.kill()
    assert "resuming from" in killed.finish()
    assert killed.metrics() == one.metrics()
