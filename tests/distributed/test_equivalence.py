"""Any number of processes in any form computes what one process computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Run

STEPS = {
    "training__steps": 20,
    "training__precision": "fp64",
    "training__global_batch_size": 4,
    "data__color_jitter": 0.2,
    "validation__interval": 100,
    "optim__lr": 1e-3,
}


@pytest.fixture(scope="module")
def reference(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twenty steps in one process."""
    run = Run(tmp_path_factory.mktemp("reference"), videos, **STEPS)
    run.finish()
    return run


@pytest.mark.parametrize(
    ("processes", "form"),
    [
        (1, {"training__local_batch_size": 1}),
        (2, {"training__local_batch_size": 1}),
        (2, {"parallelism__mode": "fsdp"}),
        (2, {"parallelism__mode": "fsdp", "parallelism__cpu_offload": "true"}),
        (2, {"parallelism__mode": "hsdp", "parallelism__shard_size": 1}),
        (2, {"parallelism__mode": "fsdp", "training__local_batch_size": 1}),
    ],
    ids=[
        "accumulate",
        "replicate-accumulate",
        "fsdp",
        "offload",
        "hsdp",
        "fsdp-accumulate",
    ],
)
def test_same_losses(
    reference: Run, videos: Path, tmp_path: Path, processes: int, form: dict
) -> None:
    run = Run(tmp_path, videos, **STEPS, **form)
    run.finish(processes)
    expected, found = reference.metrics(), run.metrics()
    assert [record["step"] for record in found] == list(range(1, 21))
    for key in ("loss", "reconstruction", "latent_scale", "grad_norm", "psnr"):
        assert [record[key] for record in found] == pytest.approx(
            [record[key] for record in expected], rel=1e-5
        )
    assert expected[-1]["loss"] < expected[0]["loss"]


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
    "loss__consistency_weight": 0.5,
    "training__steps": 6,
}


def test_same_losses_with_every_loss(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder runs twice in a step, and clips differ in what is decoded."""
    (tmp_path / "blur.py").write_text(TEACHER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    one = Run(tmp_path / "one", videos, **{**STEPS, **EVERYTHING})
    one.finish()
    two = Run(tmp_path / "two", videos, **{**STEPS, **EVERYTHING})
    two.finish(2, parallelism__mode="fsdp", training__local_batch_size=1)
    names = ("loss", "latent", "reconstruction", "temporal", "consistency", "grad_norm")
    for name in names:
        expected = [record[name] for record in one.metrics()]
        assert len(expected) == 6 and all(expected)
        found = [record[name] for record in two.metrics()]
        assert found == pytest.approx(expected, rel=1e-5), name
