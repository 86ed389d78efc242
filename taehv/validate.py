"""Judging a model on fixed clips that training never sees."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from taehv.augment import to_frames
from taehv.clips import Batch
from taehv.distributed import StopSignal, merged_over_ranks, sum_over_ranks
from taehv.logging import RunLog, clock
from taehv.losses import aligned
from taehv.metrics import (
    DECODER,
    Clips,
    Estimate,
    LatentReport,
    LatentStatistics,
    clip_psnr,
    estimates,
    group_positions,
    measure,
    warn_of_scale,
)
from taehv.model import TAEHV
from taehv.perceptual import ClipMeasure, extra_values
from taehv.teacher import Teacher
from taehv.video import write_mp4
from taehv.visualize import ERROR_GAIN, error_map, picture_strip, side_by_side
from taehv.writing import whole

log = logging.getLogger("taehv")

SAMPLE_RATE = 8
"""Frames a second of the sample clips, slow enough to see what differs."""


@dataclass
class ValidationResult:
    """Means over the clips of all processes, and pictures of this process's first."""

    means: dict[str, Estimate]
    """Of frames clamped to [0, 1], by the names of metrics.MEASURES: of the input and
    its own reconstruction, with a teacher also "decoder_..." of the input and the
    teacher's latents decoded by the student."""
    latent_rms: float
    """Root mean square of the student's latents; a diffusion model expects about 1."""
    latents: LatentReport | None
    """Against the teacher's, where there is one."""
    clips: int
    seconds: float
    pictures: list[tuple[Tensor, ...]] = field(repr=False)
    """Input, reconstruction and, with a teacher, the teacher's latents decoded by the
    student and, unless they are from a cache, by the teacher; frames_TCHW on the CPU,
    RGB in [0, 1]."""

    def scalars(self) -> dict[str, float]:
        """By the names that curves and records have."""
        latents = self.latents.scalars() if self.latents else {}
        return {
            **{name: estimate.mean for name, estimate in self.means.items()},
            "latent_rms": self.latent_rms,
            **latents,
            "clips": self.clips,
            "seconds": self.seconds,
        }

    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % intervals of the means that have one."""
        return {
            name: (estimate.low, estimate.high)
            for name, estimate in self.means.items()
            if math.isfinite(estimate.high - estimate.low)
        }


@torch.no_grad()
def validate(
    model: TAEHV,
    teacher: Teacher | None,
    batches: Iterable[Batch],
    device: torch.device,
    stop: StopSignal,
    is_taught: bool,
    pictures: int = 4,
    extra: Mapping[str, ClipMeasure] | None = None,
) -> ValidationResult | None:
    """Reconstruct the batches and average over all processes (a collective).

    Args:
        model: an unsharded model, so that processes may have different numbers of
            clips.
        teacher: to be compared with.
        batches: this process's clips.
        device: where the model is.
        stop: ends the validation early; the result is then of no use.
        is_taught: whether the teacher, or the batches, have latents to compare with.
        pictures: clips to keep for pictures.
        extra: further measures, see perceptual.load_measures.

    Returns:
        None where no process could decode a clip.
    """
    start = time.monotonic()
    judge = _Judge(model, teacher, device, is_taught, extra or {})
    kept: list[tuple[Tensor, ...]] = []
    for batch in batches:
        if stop.received:
            break
        for failure in batch.failures:
            log.warning(f"left out a held-out clip, {failure}")
        if len(batch.frames_NTHWC):
            shown = judge.add(batch)
            kept += list(zip(*(x.cpu() for x in shown), strict=True))[
                : pictures - len(kept)
            ]
    return judge.result(start, kept)


class _Judge:
    """What this process's clips measure."""

    def __init__(
        self,
        model: TAEHV,
        teacher: Teacher | None,
        device: torch.device,
        is_taught: bool,
        extra: Mapping[str, ClipMeasure],
    ) -> None:
        self.extra = extra
        self.model, self.teacher, self.device = model, teacher, device
        self.dtype = next(model.parameters()).dtype
        self.clips: dict[int, dict[str, float]] = {}
        channels = model.variant.latent_channels
        self.latents = LatentStatistics(channels, device) if is_taught else None

    def add(self, batch: Batch) -> list[Tensor]:
        """Take in a batch; returns the frames to be seen beside one another."""
        frames_NTCHW = to_frames(batch, self.device)
        latents_NTCHW = self.model.encode_video(frames_NTCHW.to(self.dtype))
        decoded = {"": self._decoded(latents_NTCHW)}
        teacher_NTCHW = self._teacher_latents(batch, frames_NTCHW)
        if teacher_NTCHW is not None:
            self.latents.add(latents_NTCHW, teacher_NTCHW)
            decoded[DECODER] = self._decoded(teacher_NTCHW)
        teacher_psnr_N = batch.teacher_psnr_N
        shown = [*aligned(frames_NTCHW, decoded[""])]
        if self.teacher is not None:
            taught_NTCHW = self.teacher.decode(teacher_NTCHW)
            pairs = zip(frames_NTCHW, taught_NTCHW, strict=True)
            teacher_psnr_N = torch.tensor([clip_psnr(*pair) for pair in pairs])
        for i, number in enumerate(batch.numbers):
            values = self._measured(frames_NTCHW[i], decoded, i)
            values["mean_square"] = float(latents_NTCHW[i].double().square().mean())
            # NaN from a cache that does not tell.
            if teacher_psnr_N is not None and not teacher_psnr_N[i].isnan():
                values["teacher_psnr"] = float(teacher_psnr_N[i])
            self.clips[number] = values
        others = [decoded[DECODER]] if DECODER in decoded else []
        others += [taught_NTCHW] if self.teacher is not None else []
        shown += others
        # A teacher of the user's own may decode fewer frames than the student.
        length = min(x_NTCHW.shape[1] for x_NTCHW in shown)
        return [x_NTCHW[:, :length] for x_NTCHW in shown]

    def _teacher_latents(self, batch: Batch, frames_NTCHW: Tensor) -> Tensor | None:
        if self.teacher is not None:
            return self.teacher.encode(frames_NTCHW, batch.numbers)
        cached_NTCHW = batch.latents_NTCHW
        return None if cached_NTCHW is None else cached_NTCHW.to(self.device)

    def _decoded(self, latents_NTCHW: Tensor) -> Tensor:
        return self.model.decode_video(latents_NTCHW.to(self.dtype)).float()

    def _measured(
        self, frames_TCHW: Tensor, decoded: dict[str, Tensor], i: int
    ) -> dict[str, float]:
        """What clip i of decoded frames measures, under the names' beginnings."""
        positions = group_positions(self.model.variant, len(frames_TCHW))
        values = {}
        for prefix, decoded_NTCHW in decoded.items():
            measured = {
                **measure(frames_TCHW, decoded_NTCHW[i], positions),
                **extra_values(self.extra, frames_TCHW, decoded_NTCHW[i]),
            }
            values |= {prefix + name: value for name, value in measured.items()}
        judged_TCHW = frames_TCHW[: decoded[""].shape[1]]
        mean_color_TCHW = judged_TCHW.mean((0, 2, 3), keepdim=True)
        painted_TCHW = mean_color_TCHW.expand_as(judged_TCHW)
        return {**values, "mean_color_psnr": clip_psnr(judged_TCHW, painted_TCHW)}

    def result(
        self, start: float, pictures: list[tuple[Tensor, ...]]
    ) -> ValidationResult | None:
        clips: Clips = merged_over_ranks(self.clips)
        if self.latents is not None:
            sum_over_ranks(self.latents.sums_6C)
        if not clips:
            return None
        means = estimates(clips)
        return ValidationResult(
            latent_rms=means.pop("mean_square").mean ** 0.5,
            means=means,
            latents=self.latents and self.latents.report(),
            clips=len(clips),
            seconds=time.monotonic() - start,
            pictures=pictures,
        )


# --- telling -----------------------------------------------------------------------


def tell(result: ValidationResult, run_log: RunLog, step: int, folder: Path) -> None:
    """Note a validation on the console, in the records, in TensorBoard, as files.

    Args:
        result: of the validation.
        run_log: the run's records.
        step: at which the model was judged.
        folder: of the run, in which samples/ gets the pictures.
    """
    values = result.scalars()
    log.info(
        f"validation at step {step}: PSNR {values['psnr']:.2f} dB on "
        f"{result.clips} held-out clips ({clock(result.seconds)})"
    )
    if result.latents is not None:
        own = values.get("teacher_psnr")
        log.info(
            f"its PSNR from the teacher's latents {values['decoder_psnr']:.2f} dB"
            + ("" if own is None else f", the teacher's own {own:.2f} dB")
            + f"; {result.latents}"
        )
        warn_of_scale(result.latents)
    run_log.validation(step, values, result.intervals())
    if result.pictures:
        _show(result.pictures, run_log, step, folder / "samples")


def _show(
    pictures: list[tuple[Tensor, ...]], run_log: RunLog, step: int, samples: Path
) -> None:
    labels = ["input", "reconstruction", "teacher's latents", "teacher"]
    strips = [(*clip, error_map(clip[0], clip[1])) for clip in pictures]
    labels = [*labels[: len(pictures[0])], f"error x {ERROR_GAIN}"]
    picture = picture_strip(strips, labels=labels)
    name = "validation/input_above_reconstruction"
    run_log.board.picture(name, picture, step)
    name = "validation/input_left_of_reconstruction"
    run_log.board.clip(name, side_by_side(pictures), step, SAMPLE_RATE)
    try:
        with whole(samples / f"step-{step}.png") as unfinished:
            samples.mkdir(exist_ok=True)
            Image.fromarray(picture).save(unfinished, "PNG")
        looped = side_by_side(pictures, repeat=3)
        write_mp4(samples / f"step-{step}.mp4", looped, SAMPLE_RATE)
    except OSError as error:
        log.warning(f"the pictures of step {step} are not in {samples}: {error}")
