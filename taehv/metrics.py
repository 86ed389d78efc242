"""What a model is judged by.

A clip and its reconstruction are measured alone, so that no split into batches or
processes changes a value: `measure` gives the values of one clip by name,
`estimates` the means over many clips and how far they can be trusted.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from taehv.losses import aligned, psnr
from taehv.variants import Variant

log = logging.getLogger("taehv")

CHANNEL_GROUPS = 4
USUAL_RMS = (0.5, 2.0)
"""What the latents of a diffusion model have, all of them about 1 by design."""
FRAMES_AT_ONCE = 16
"""Bounds the memory that a long clip takes."""
SSIM_SIDE = 6
"""The least side in pixels: the 11-pixel window is mirrored at the border."""
MS_SSIM_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of the scales, finest first (Wang et al. 2003)."""
MS_SSIM_SIDES = {5: 176, 4: 99}
"""The least side in pixels for as many scales, as torchmetrics has it."""
STATIC = 2.5 / 255
"""A channel of a pixel at rest changes by less: by two steps of eight bits at most."""
FINE = 0.25
"""In cycles a pixel, half of what pixels can show: what is finer is fine detail."""


@dataclass(frozen=True)
class Measure:
    """What the values of one name mean."""

    title: str
    unit: str
    best: float
    """The value of a perfect reconstruction: the nearer, the better."""
    text: str

    def gap(self, value: float) -> float:
        """How far a value is from the best, to be compared with other gaps."""
        return -value if self.best == math.inf else abs(value - self.best)


MEASURES = {
    "psnr": Measure("PSNR", "dB", math.inf, "of all pixels of a clip"),
    "ssim": Measure("SSIM", "", 1, "likeness of structure, mean over frames"),
    "ms_ssim": Measure("MS-SSIM", "", 1, "SSIM on five scales"),
    "ms_ssim_4": Measure(
        "MS-SSIM of 4 scales", "", 1, "without the coarsest, for which frames are small"
    ),
    "difference_psnr": Measure(
        "PSNR of changes", "dB", math.inf, "of the differences of successive frames"
    ),
    "flicker": Measure(
        "flicker", "/255", 0, "mean change of pixels that hardly change in the input"
    ),
    "fine_detail": Measure(
        "fine detail",
        "",
        1,
        "energy above half of what pixels can show, over the "
        "input's: less is blur, more is noise",
    ),
    "lpips": Measure("LPIPS", "", 0, "distance to the eye, as a network learned it"),
    "st_lpips": Measure("ST-LPIPS", "", 0, "the same, hardly moved by small shifts"),
    "vmaf": Measure("VMAF", "", 100, "quality to the eye, from 0 to 100"),
    "mean_color_psnr": Measure(
        "PSNR of mean color", "dB", math.inf, "painting each clip in one colour"
    ),
    "teacher_psnr": Measure(
        "PSNR of the teacher", "dB", math.inf, "the teacher decodes its own latents"
    ),
    "latent_correlation": Measure(
        "latent correlation", "", 1, "with the teacher's, mean over channels"
    ),
}
"""By the names that records, curves and reports have."""
DECODER = "decoder_"
"""Stands before the names of what is measured of the teacher's latents, decoded by
the student."""


def measure_of(name: str) -> Measure | None:
    """What a name means; None where it is no measure."""
    plain = name.removeprefix(DECODER)
    known = MEASURES.get(plain)
    if plain.startswith("psnr_position_"):
        place = plain.removeprefix("psnr_position_")
        text = f"of the frames at place {place} of those that a latent stands for"
        known = Measure(f"PSNR at place {place}", "dB", math.inf, text)
    if known is not None and plain != name:
        return replace(known, title=f"{known.title}, teacher's latents")
    return known


# --- one clip ----------------------------------------------------------------------


def group_positions(variant: Variant, frames: int) -> list[int]:
    """The place of each decoded frame among the frames that its latent stands for.

    Args:
        variant: aligns frames with latents.
        frames: of the clip that was encoded.

    Returns:
        Numbers from 0 to time_factor - 1; a causal variant begins with the last.
    """
    runs = variant.kept_frames(variant.latents_of(frames))
    raw = [frame for run in runs for frame in range(run.start, run.stop)]
    return [frame % variant.time_factor for frame in raw]


@torch.no_grad()
def measure(
    frames_TCHW: Tensor,
    decoded_TCHW: Tensor,
    positions: Sequence[int] | None = None,
) -> dict[str, float]:
    """Compare a clip with its reconstruction, over the frames that both have.

    Args:
        frames_TCHW: RGB in [0, 1].
        decoded_TCHW: as the decoder gives it, clamped to [0, 1].
        positions: of the decoded frames, see group_positions.

    Returns:
        Values by the names of MEASURES. What a clip is too small or too short for is
        left out, as is flicker where nothing is at rest, and fine detail where the
        input has none.
    """
    frames_1TCHW, decoded_1TCHW = aligned(frames_TCHW[None], decoded_TCHW[None])
    frames_TCHW, decoded_TCHW = frames_1TCHW[0].float(), decoded_1TCHW[0].float()
    errors_T = frame_errors(frames_TCHW, decoded_TCHW)
    values = {"psnr": float(psnr(errors_T.mean()))}
    values |= _similarities(frames_TCHW, decoded_TCHW)
    if len(frames_TCHW) > 1:
        values |= _temporal(frames_TCHW, decoded_TCHW)
    values |= _fine_detail(frames_TCHW, decoded_TCHW)
    if positions is not None:
        shown = torch.tensor(positions[: len(errors_T)], device=errors_T.device)
        for position in sorted(set(shown.tolist())):
            error = errors_T[shown == position].mean()
            values[f"psnr_position_{position + 1}"] = float(psnr(error))
    return values


def clip_psnr(frames_TCHW: Tensor, decoded_TCHW: Tensor) -> float:
    """PSNR in dB of all pixels of the frames that both have, RGB in [0, 1]."""
    frames_1TCHW, decoded_1TCHW = aligned(frames_TCHW[None], decoded_TCHW[None])
    return float(psnr(frame_errors(frames_1TCHW[0], decoded_1TCHW[0]).mean()))


def frame_errors(frames_TCHW: Tensor, decoded_TCHW: Tensor) -> Tensor:
    """Mean squared error of each frame, float64; `psnr` makes dB of it."""
    return _by_frames(
        lambda ours, theirs: (ours.double() - theirs.double()).square().mean((1, 2, 3)),
        decoded_TCHW,
        frames_TCHW,
    )


def _by_frames(
    function: Callable[[Tensor, Tensor], Tensor], a_TCHW: Tensor, b_TCHW: Tensor
) -> Tensor:
    """A function's values of frames, a few frames at a time."""
    parts = zip(a_TCHW.split(FRAMES_AT_ONCE), b_TCHW.split(FRAMES_AT_ONCE), strict=True)
    return torch.cat([function(ours, theirs).double() for ours, theirs in parts])


def _similarities(frames_TCHW: Tensor, decoded_TCHW: Tensor) -> dict[str, float]:
    side, values = min(frames_TCHW.shape[-2:]), {}
    if side >= SSIM_SIDE:
        values["ssim"] = float(_by_frames(_ssim, decoded_TCHW, frames_TCHW).mean())
    scales = next((n for n, least in MS_SSIM_SIDES.items() if side >= least), 0)
    if scales:
        name = "ms_ssim" if scales == 5 else f"ms_ssim_{scales}"
        values[name] = float(
            _by_frames(
                lambda ours, theirs: _ms_ssim(ours, theirs, scales),
                decoded_TCHW,
                frames_TCHW,
            ).mean()
        )
    return values


def _ssim(decoded_TCHW: Tensor, frames_TCHW: Tensor) -> Tensor:
    # It takes a second, which processes that judge nothing need not wait.
    from torchmetrics.functional.image import structural_similarity_index_measure

    similarity_T = structural_similarity_index_measure(
        decoded_TCHW, frames_TCHW, data_range=1.0, reduction="none"
    )
    return similarity_T.reshape(-1)


def _ms_ssim(decoded_TCHW: Tensor, frames_TCHW: Tensor, scales: int) -> Tensor:
    from torchmetrics.functional.image import (
        multiscale_structural_similarity_index_measure,
    )

    betas = MS_SSIM_BETAS[:scales]
    similarity_T = multiscale_structural_similarity_index_measure(
        decoded_TCHW,
        frames_TCHW,
        data_range=1.0,
        betas=tuple(beta / sum(betas) for beta in betas),
        normalize="relu",
        reduction="none",
    )
    return similarity_T.reshape(-1)


def _temporal(frames_TCHW: Tensor, decoded_TCHW: Tensor) -> dict[str, float]:
    """Of the changes from frame to frame, each clip's pixels at rest among them."""
    error = torch.zeros((), dtype=torch.float64, device=frames_TCHW.device)
    flicker, at_rest = error.clone(), error.clone()
    for start in range(0, len(frames_TCHW) - 1, FRAMES_AT_ONCE):
        part = slice(start, start + FRAMES_AT_ONCE + 1)
        change_TCHW = frames_TCHW[part].diff(dim=0).double()
        difference_TCHW = decoded_TCHW[part].diff(dim=0).double() - change_TCHW
        error += difference_TCHW.square().sum()
        static_T1HW = (change_TCHW.abs() < STATIC).all(1, keepdim=True)
        flicker += (difference_TCHW.abs() * static_T1HW).mean(1).sum()
        at_rest += static_T1HW.sum()
    changes = (len(frames_TCHW) - 1) * frames_TCHW[0].numel()
    values = {"difference_psnr": float(psnr(error / changes))}
    if at_rest:
        values["flicker"] = float(255 * flicker / at_rest)
    return values


def _fine_detail(frames_TCHW: Tensor, decoded_TCHW: Tensor) -> dict[str, float]:
    pairs = _by_frames(
        lambda ours, theirs: torch.stack([_fine_energy(ours), _fine_energy(theirs)], 1),
        decoded_TCHW,
        frames_TCHW,
    )
    ours, theirs = pairs.sum(0).tolist()
    # Below this there is nothing but the rounding of eight bits.
    noise = frames_TCHW.numel() / 255**2 / 12
    return {"fine_detail": ours / theirs} if theirs > noise else {}


def _fine_energy(frames_TCHW: Tensor) -> Tensor:
    """Energy of each frame's frequencies above FINE, away from the border."""
    height, width = frames_TCHW.shape[-2:]
    window_HW = torch.outer(
        *(
            torch.hann_window(side, periodic=False, device=frames_TCHW.device)
            for side in (height, width)
        )
    )
    frequencies = torch.fft.rfft2(frames_TCHW * window_HW, norm="ortho")
    across = torch.fft.rfftfreq(width, device=frames_TCHW.device)
    down = torch.fft.fftfreq(height, device=frames_TCHW.device)
    is_fine = torch.hypot(down[:, None], across[None]) > FINE
    # Of a real picture only half of the frequencies are kept; the others mirror them.
    mirrored = (across > 0) & (across < 0.5)
    energy = frequencies.abs().square() * is_fine * (1 + mirrored.float())
    return energy.sum((1, 2, 3))


# --- many clips --------------------------------------------------------------------

Clips = Mapping[int, Mapping[str, float]]
"""By the number of a clip what it measured; those of processes are merged."""


@dataclass(frozen=True)
class Estimate:
    """A mean over clips, with the bounds that hold the true mean in 95 of 100 cases.

    The bounds are Student's: they take clips for independent draws. A single clip has
    none (infinite).
    """

    mean: float
    low: float
    high: float
    clips: int


def estimates(clips: Clips) -> dict[str, Estimate]:
    """The mean of each name over the clips that have it; the order plays no part."""
    names = dict.fromkeys(name for values in clips.values() for name in values)
    return {
        name: estimate([v[name] for v in clips.values() if name in v]) for name in names
    }


def differences(clips: Clips, others: Clips) -> dict[str, Estimate]:
    """Of two models the mean difference, clips less others, of clips that both have."""
    return estimates(
        {
            number: {
                name: values[name] - others[number][name]
                for name in values
                if name in others[number]
            }
            for number, values in clips.items()
            if number in others
        }
    )


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval of independent values."""
    mean, count = math.fsum(values) / len(values), len(values)
    reach = math.inf
    if count > 1:
        squares = math.fsum((value - mean) ** 2 for value in values)
        deviation = math.sqrt(squares / (count - 1))
        reach = student_quantile(count - 1) * deviation / math.sqrt(count)
    return Estimate(mean, mean - reach, mean + reach, count)


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's distribution, to 0.2 %.

    Exact for one and two degrees of freedom, else by the expansion around the normal
    quantile (Abramowitz and Stegun, 26.7.5).
    """
    if freedom == 1:
        return math.tan(0.475 * math.pi)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


# --- latents -----------------------------------------------------------------------


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
