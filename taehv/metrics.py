"""What a model is judged by."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger("taehv")

CHANNEL_GROUPS = 4
USUAL_RMS = (0.5, 2.0)
"""What the latents of a diffusion model have, all of them about 1 by design."""


@dataclass
class LatentReport:
    """How the student's latents compare with the teacher's, over a set of clips."""

    teacher_mean: float
    teacher_rms: float
    """Root mean square; about 1 in a normalised latent space."""
    student_mean: float
    student_rms: float
    correlation: float
    """Mean over channels of Pearson's correlation; 1 is perfect."""
    group_correlations: list[float]
    """The same for each quarter of the channels, in their order."""
    worst_channel: int
    worst_correlation: float

    def __str__(self) -> str:
        return (
            f"latents: teacher mean {self.teacher_mean:.3f} RMS {self.teacher_rms:.3f},"
            f" student mean {self.student_mean:.3f} RMS {self.student_rms:.3f}, "
            f"correlation {self.correlation:.4f} (channel {self.worst_channel}: "
            f"{self.worst_correlation:.4f})"
        )

    def scalars(self) -> dict[str, float]:
        """By the names that curves and records have."""
        groups = enumerate(self.group_correlations)
        return {
            "teacher_latent_mean": self.teacher_mean,
            "teacher_latent_rms": self.teacher_rms,
            "latent_mean": self.student_mean,
            "latent_correlation": self.correlation,
            **{f"latent_correlation_quarter_{i + 1}": value for i, value in groups},
            "latent_correlation_worst": self.worst_correlation,
        }


class LatentStatistics:
    """Sums over latents, of student and teacher, that a LatentReport is made of.

    Those of several processes add up: reduce `sums_6C` before the report.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.sums_6C = torch.zeros(6, channels, dtype=torch.float64, device=device)

    def add(self, student_NTCHW: Tensor, teacher_NTCHW: Tensor) -> None:
        """Take in a batch."""
        ours = student_NTCHW.double().movedim(2, 0).flatten(1)
        theirs = teacher_NTCHW.double().movedim(2, 0).flatten(1)
        products = [torch.ones_like(ours), ours, theirs, ours * ours, theirs * theirs]
        self.sums_6C += torch.stack(
            [product.sum(1) for product in [*products, ours * theirs]]
        )

    def report(self) -> LatentReport:
        """Compare what was taken in."""
        count, ours, theirs, ours2, theirs2, both = self.sums_6C.cpu()
        variances = (ours2 - ours**2 / count) * (theirs2 - theirs**2 / count)
        covariance = both - ours * theirs / count
        # A channel that never changes correlates with nothing.
        correlation_C = covariance / variances.clamp_min(1e-12 * count**2).sqrt()
        groups = correlation_C.tensor_split(CHANNEL_GROUPS)
        worst = int(correlation_C.argmin())
        return LatentReport(
            teacher_mean=float(theirs.sum() / count.sum()),
            teacher_rms=float(theirs2.sum() / count.sum()) ** 0.5,
            student_mean=float(ours.sum() / count.sum()),
            student_rms=float(ours2.sum() / count.sum()) ** 0.5,
            correlation=float(correlation_C.mean()),
            group_correlations=[float(group.mean()) for group in groups],
            worst_channel=worst,
            worst_correlation=float(correlation_C[worst]),
        )


def warn_of_scale(report: LatentReport) -> None:
    """Warn of a teacher whose latents are far from unit scale.

    Latents without their mean and deviation are the most reported mistake in this
    field (madebyollin/taehv, issue 22).
    """
    low, high = USUAL_RMS
    if not low <= report.teacher_rms <= high:
        log.warning(
            f"the teacher's latents have an RMS of {report.teacher_rms:.3g}, not about "
            "1 as a normalised latent space has: its mean and deviation are probably "
            "left out or applied twice, its frames are not in the range it wants, or "
            "its weights are not trained"
        )
