"""A step whose loss or gradient is not finite costs that step and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Run

from taehv.errors import UserError

TEACHER = """
import torch

class Faulty:
    latent_channels = 16
    fingerprint = "faulty"
    calls = 0

    def __init__(self, path, device):
        self.bad = [int(call) for call in path.split(",")]

    def check(self, frames, height, width):
        pass

    def encode(self, frames_NTCHW, seeds):
        self.calls += 1
        N, T, _, H, W = frames_NTCHW.shape
        latents_NTCHW = torch.zeros(N, -(-T // 4), 16, H // 8, W // 8)
        return latents_NTCHW / 0 if self.calls in self.bad else latents_NTCHW
"""


@pytest.fixture
def run(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose teacher gives NaN at the calls that its path lists."""
    (tmp_path / "at_calls.py").write_text(TEACHER)
    monkeypatch.syspath_prepend(tmp_path)
    return Run(
        tmp_path,
        videos,
        teacher__kind="at_calls:Faulty",
        training__steps=6,
        validation__clips=0,  # else its teacher's calls count, too
    )


def test_a_bad_step_is_skipped_and_named(run: Run) -> None:
    output = run.train(teacher__path="3,4")
    records = run.metrics()
    assert [record["skipped"] for record in records] == [0, 0, 1, 2, 2, 2]
    assert [record["loss"] is None for record in records] == [
        *(False, False, True, True, False, False)
    ]
    assert "step 3 is skipped" in output and "step 4 is skipped" in output
    (line,) = [line for line in output.splitlines() if "step 3 is skipped" in line]
    assert line.count(".mp4") == 2  # the clips of the batch
    assert "skipped          2 steps" in output
    weights = torch.load(run.folder / "export/taehv.pth", weights_only=True)
    assert all(weight.isfinite().all() for weight in weights.values())


def test_bad_steps_without_end_stop_the_run(run: Run) -> None:
    calls = ",".join(map(str, range(1, 9)))
    told = "^3 steps in a row had no finite gradient: lower optim.lr.*$"
    with pytest.raises(UserError, match=told):
        run.train(teacher__path=calls, training__max_bad_steps=3)
    assert len(run.metrics()) <= 3
