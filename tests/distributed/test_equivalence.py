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
