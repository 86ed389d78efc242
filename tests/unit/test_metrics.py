"""Metrics against computations of their own."""

from __future__ import annotations

import logging
from statistics import correlation

import pytest
import torch

from taehv.metrics import LatentStatistics, warn_of_scale

CPU = torch.device("cpu")


def statistics(scale: float = 1.0, batches: int = 1) -> LatentStatistics:
    """Of latents whose first channel is noise and whose others follow the teacher."""
    generator = torch.Generator().manual_seed(0)
    theirs_NTCHW = scale * torch.randn(4, 2, 8, 3, 3, generator=generator)
    ours_NTCHW = 2 * theirs_NTCHW + 0.5
    ours_NTCHW[:, :, 0] = torch.randn(4, 2, 3, 3, generator=generator)
    ours_NTCHW[:, :, 7] = 1  # never changes
    sums = LatentStatistics(8, CPU)
    for ours, theirs in zip(
        ours_NTCHW.chunk(batches), theirs_NTCHW.chunk(batches), strict=True
    ):
        sums.add(ours, theirs)
    sums.ours_NTCHW, sums.theirs_NTCHW = ours_NTCHW, theirs_NTCHW
    return sums


@pytest.mark.parametrize("batches", [1, 2, 4])
def test_latent_report(batches: int) -> None:
    sums = statistics(batches=batches)
    report = sums.report()
    ours_NTCHW, theirs_NTCHW = sums.ours_NTCHW, sums.theirs_NTCHW
    assert report.teacher_mean == pytest.approx(theirs_NTCHW.mean().item(), rel=1e-5)
    assert report.student_mean == pytest.approx(ours_NTCHW.mean().item(), rel=1e-5)
    rms = theirs_NTCHW.square().mean().sqrt().item()
    assert report.teacher_rms == pytest.approx(rms, rel=1e-5)
    noise = correlation(
        ours_NTCHW[:, :, 0].flatten().tolist(), theirs_NTCHW[:, :, 0].flatten().tolist()
    )
    assert report.worst_channel in (0, 7)
    assert report.worst_correlation == pytest.approx(min(noise, 0), abs=1e-5)
    quarters = [(noise + 1) / 2, 1, 1, 0.5]
    assert report.group_correlations == pytest.approx(quarters, abs=1e-5)
    assert report.correlation == pytest.approx(sum(quarters) / 4, abs=1e-5)


@pytest.mark.parametrize(("scale", "warns"), [(1.0, False), (5.0, True), (0.1, True)])
def test_latents_of_no_unit_scale_are_told(
    scale: float, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "taehv"):
        warn_of_scale(statistics(scale).report())
    assert ("mean and deviation" in caplog.text) == warns
