"""Any number of processes in any form computes what one process computes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from conftest import Run
from torch import nn

from taehv.checkpoint import load_weights
from taehv.errors import UserError
from taehv.offload import Masters

STEPS = {
    "training__steps": 6,
    "training__precision": "fp64",
    "training__global_batch_size": 4,
    "data__color_jitter": 0.2,
    "validation__clips": 0,
    "optim__schedule": "constant",  # so that fewer steps are the same ones
    "optim__lr": 1e-3,
}
LONG = {**STEPS, "training__steps": 20}
FSDP = {"parallelism__mode": "fsdp"}
HSDP = {"parallelism__mode": "hsdp", "parallelism__shard_size": 2}
OFFLOAD = {**FSDP, "parallelism__cpu_offload": "true"}
ACCUMULATE = {"training__local_batch_size": 1}
CHECKPOINTING = {"training__activation_checkpointing": "true"}
FORMS = {
    "accumulate": (1, ACCUMULATE),
    "hsdp": (4, HSDP),
}
MORE_FORMS = {
    "replicate-accumulate": (2, ACCUMULATE),
    "fsdp": (2, FSDP),
    "offload": (2, OFFLOAD),
    "fsdp-accumulate-checkpointing": (2, {**FSDP, **ACCUMULATE, **CHECKPOINTING}),
}


@pytest.fixture(scope="module")
def reference(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Six steps in one process, with a checkpoint of step 2."""
    run = Run(tmp_path_factory.mktemp("reference"), videos, **STEPS)
    run.train(checkpoint__interval=2)
    return run


@pytest.fixture(scope="module")
def long_reference(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twenty steps in one process, with a checkpoint of step 10."""
    run = Run(tmp_path_factory.mktemp("long"), videos, **LONG)
    run.finish(checkpoint__interval=10)
    return run


@pytest.mark.parametrize(("processes", "form"), FORMS.values(), ids=FORMS)
def test_same_losses(
    reference: Run, videos: Path, tmp_path: Path, processes: int, form: dict
) -> None:
    run = Run(tmp_path, videos, **STEPS, **form)
    if processes == 1:
        run.train(training__steps=4)
    else:
        run.finish(processes, training__steps=4)
    assert_same_losses(run, reference, 4)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("processes", "form"),
    [*FORMS.values(), *MORE_FORMS.values()],
    ids=[*FORMS, *MORE_FORMS],
)
def test_same_losses_of_twenty_steps(
    long_reference: Run, videos: Path, tmp_path: Path, processes: int, form: dict
) -> None:
    run = Run(tmp_path, videos, **LONG, **form)
    run.finish(processes)
    assert_same_losses(run, long_reference, 20)


def assert_same_losses(run: Run, reference: Run, steps: int) -> None:
    expected, found = reference.metrics()[:steps], run.metrics()
    assert [record["step"] for record in found] == list(range(1, steps + 1))
    for key in ("loss", "reconstruction", "latent_scale", "grad_norm", "psnr"):
        assert [record[key] for record in found] == pytest.approx(
            [record[key] for record in expected], rel=1e-5
        )
    assert all(record["grad_norm"] > 0 for record in expected)


def test_offloading_has_the_optimizer_work_on_masters(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def masters(parameters: Iterable[nn.Parameter]) -> Masters:
        made.append(Masters(parameters))
        return made[-1]

    monkeypatch.setattr("taehv.trainer.Masters", masters)
    short = {"training__steps": 1, "validation__clips": 0}
    for number, form in enumerate((FSDP, OFFLOAD)):
        Run(tmp_path / str(number), videos, **short, **form).train()
        assert len(made) == number


def test_frozen_weights_stay_exact(videos: Path, tmp_path: Path) -> None:
    """FSDP2 leaves a part that never sees a backward pass gathered, and rounded."""
    run = Run(tmp_path, videos, **STEPS, model__trained="decoder")
    run.train(training__precision="bf16", training__steps=2)
    folder = run.folder / "checkpoints/step-2"
    raw, averaged = (load_weights(folder, of)[0] for of in ("model", "ema"))
    for name in raw:
        is_frozen = name.startswith("encoder.")
        assert torch.equal(raw[name], averaged[name]) == is_frozen, name


def gone_on(
    origin: Run, step: int, output: Path, processes: int, form: dict, last: int = 20
) -> Run:
    """A run of its own that begins at a step of another, and saves 4 steps later."""
    run = Run(output, output, **STEPS, **form)
    run.settings["data.root"] = origin.settings["data.root"]
    folder = origin.folder / f"checkpoints/step-{step}"
    settings = {"checkpoint__resume_from": folder, "checkpoint__interval": step + 4}
    settings["training__steps"] = last
    told = (
        run.train(**settings) if processes == 1 else run.finish(processes, **settings)
    )
    assert f"resuming from {folder}" in told
    assert ("not the settings of" in told) == (
        f"\nsteps = {last}\n" not in (folder / "config.toml").read_text()
    )
    return run


def assert_same_course(run: Run, reference: Run, first: int, last: int = 20) -> None:
    found, expected = run.metrics(), reference.metrics()[first:last]
    assert [record["step"] for record in found] == list(range(first + 1, last + 1))
    for key in ("loss", "grad_norm", "psnr"):
        assert [record[key] for record in found] == pytest.approx(
            [record[key] for record in expected], rel=1e-5
        )
    assert [r["samples"] for r in found] == [r["samples"] for r in expected]


def test_one_to_two_to_one(reference: Run, tmp_path: Path) -> None:
    two = gone_on(reference, 2, tmp_path / "two", 2, OFFLOAD, last=4)
    assert_same_course(two, reference, 2, last=4)
    one = gone_on(two, 4, tmp_path / "one", 1, {}, last=6)
    assert_same_course(one, reference, 4, last=6)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("two", "four"),
    [(FSDP, HSDP), (HSDP, FSDP), ({}, HSDP), (OFFLOAD, {})],
    ids=["fsdp-hsdp", "hsdp-fsdp", "replicate-hsdp", "offload-replicate"],
)
def test_one_to_two_to_four_to_one(
    long_reference: Run, tmp_path: Path, two: dict, four: dict
) -> None:
    run = gone_on(long_reference, 10, tmp_path / "two", 2, two)
    assert_same_course(run, long_reference, 10)
    run = gone_on(run, 14, tmp_path / "four", 4, four)
    assert_same_course(run, long_reference, 14)
    run = gone_on(run, 18, tmp_path / "one", 1, {})
    assert_same_course(run, long_reference, 18)


TEACHER = '''
import torch
import torch.nn.functional as F


class Blur:
    """Sixteen channels of grey: frames 4 i - 3 to 4 i, and their pixels, averaged."""

    latent_channels = 16
    fingerprint = "blur"

    def __init__(self, path, device):
        pass

    def check(self, frames, height, width):
        pass

    def encode(self, frames_NTCHW, seeds):
        grey = F.avg_pool2d(frames_NTCHW.mean(2), 8)
        groups = [grey[:, :1], *grey[:, 1:].split(4, 1)]
        latents_NTHW = torch.stack([group.mean(1) for group in groups], 1)
        return 4 * latents_NTHW[:, :, None].expand(-1, -1, 16, -1, -1) - 2

    def decode(self, latents_NTCHW):
        return latents_NTCHW.new_zeros(len(latents_NTCHW), 1, 3, 16, 16)
'''
EVERYTHING = {
    "teacher__kind": "blur:Blur",
    "loss__decoder_latents": "mixture",
    "loss__temporal_weight": 0.5,
    "loss__frequency_weight": 0.5,
    "loss__consistency_weight": 0.5,
    "training__steps": 3,
}


def test_same_losses_with_every_loss(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder runs twice in a step, and clips differ in what is decoded."""
    (tmp_path / "blur.py").write_text(TEACHER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    one = Run(tmp_path / "one", videos, **{**STEPS, **EVERYTHING})
    one.train()
    two = Run(tmp_path / "two", videos, **{**STEPS, **EVERYTHING})
    two.finish(2, **FSDP, **ACCUMULATE, **CHECKPOINTING)
    names = ("loss", "latent", "reconstruction", "temporal", "frequency")
    names += ("consistency", "grad_norm")
    for name in names:
        expected = [record[name] for record in one.metrics()]
        assert len(expected) == 3 and all(expected)
        found = [record[name] for record in two.metrics()]
        assert found == pytest.approx(expected, rel=1e-5), name


MUON = {
    "model__trained": "encoder",  # whose matrices are small
    "optim__optimizer": "muon",
    "optim__encoder_lr_scale": 0.5,
    "optim__weight_decay": 0.1,
    "training__steps": 3,
    "training__global_batch_size": 3,
}


def test_same_losses_with_muon(videos: Path, tmp_path: Path) -> None:
    """Three processes share rows unevenly; what they save, one goes on from exactly."""
    one = Run(tmp_path / "one", videos, **{**STEPS, **MUON})
    one.train()
    three = Run(tmp_path / "three", videos, **{**STEPS, **MUON, **FSDP})
    three.finish(3, checkpoint__interval=2)
    origin = {"checkpoint__resume_from": three.folder / "checkpoints/step-2"}
    again = Run(tmp_path / "again", videos, **{**STEPS, **MUON})
    with pytest.raises(UserError, match="state of optim.optimizer muon, not adamw"):
        again.train(optim__optimizer="adamw", **origin)
    again.train(**origin)
    for run, first in ((three, 0), (again, 2)):
        for key in ("loss", "grad_norm"):
            expected = [record[key] for record in one.metrics()[first:]]
            assert [r[key] for r in run.metrics()] == pytest.approx(expected, rel=1e-5)
