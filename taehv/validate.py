"""Judging a model on fixed clips that training never sees."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from taehv.augment import to_frames
from taehv.clips import Batch
from taehv.distributed import StopSignal, sum_over_ranks
from taehv.losses import aligned, psnr
from taehv.metrics import LatentReport, LatentStatistics
from taehv.model import TAEHV
from taehv.teacher import Teacher

log = logging.getLogger("taehv")


@dataclass
class ValidationResult:
    """Means over the clips of all processes, and pictures of this process's first."""

    means: dict[str, float]
    """In dB, of frames clamped to [0, 1]: "psnr", input against own reconstruction;
    "mean_color_psnr", painting each clip in its mean colour, which any model must beat;
    with a teacher "decoder_psnr", the teacher's latents decoded by the student, and
    "teacher_psnr", decoded by the teacher."""
    latent_rms: float
    """Root mean square of the student's latents; a diffusion model expects about 1."""
    latents: LatentReport | None
    """Against the teacher's, where there is one."""
    clips: int
    seconds: float
    pictures: list[tuple[Tensor, ...]] = field(repr=False)
    """Input, reconstruction and, with a teacher, the teacher's latents decoded by the
    student; frames_TCHW on the CPU, RGB in [0, 1]."""

    def scalars(self) -> dict[str, float]:
        """By the names that curves and records have."""
        latents = self.latents.scalars() if self.latents else {}
        return {
            **self.means,
            "latent_rms": self.latent_rms,
            **latents,
            "clips": self.clips,
            "seconds": self.seconds,
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

    Returns:
        None where no process could decode a clip.
    """
    start = time.monotonic()
    judge = _Judge(model, teacher, device, is_taught)
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
    """Sums over clips, and what they are made of."""

    def __init__(
        self,
        model: TAEHV,
        teacher: Teacher | None,
        device: torch.device,
        is_taught: bool,
    ) -> None:
        self.model, self.teacher, self.device = model, teacher, device
        self.dtype = next(model.parameters()).dtype
        self.names = ["psnr", "mean_color_psnr"]
        self.names += ["decoder_psnr", "teacher_psnr"] if is_taught else []
        # The means, then the latents' mean square and the number of clips.
        self.sums = torch.zeros(len(self.names) + 2, dtype=torch.float64, device=device)
        channels = model.variant.latent_channels
        self.latents = LatentStatistics(channels, device) if is_taught else None

    def add(self, batch: Batch) -> list[Tensor]:
        """Take in a batch; returns the frames to be seen beside one another."""
        frames_NTCHW = to_frames(batch, self.device)
        latents_NTCHW = self.model.encode_video(frames_NTCHW.to(self.dtype))
        shown = list(aligned(frames_NTCHW, self._decoded(latents_NTCHW)))
        mean_color_NTCHW = shown[0].mean((1, 3, 4), keepdim=True).expand_as(shown[0])
        judged = [shown[1], mean_color_NTCHW]
        if self.teacher is not None:
            teacher_NTCHW = self.teacher.encode(frames_NTCHW, batch.numbers)
            self.latents.add(latents_NTCHW, teacher_NTCHW)
            decoded = [self._decoded(teacher_NTCHW), self.teacher.decode(teacher_NTCHW)]
            judged += decoded
            shown.append(decoded[0][:, : shown[0].shape[1]])
        if batch.latents_NTCHW is not None:
            teacher_NTCHW = batch.latents_NTCHW.to(self.device)
            self.latents.add(latents_NTCHW, teacher_NTCHW)
            judged.append(self._decoded(teacher_NTCHW))
            shown.append(judged[-1][:, : shown[0].shape[1]])
        values = [_clip_psnr(frames_NTCHW, x_NTCHW) for x_NTCHW in judged]
        if batch.teacher_psnr_N is not None:
            values.append(batch.teacher_psnr_N.to(self.device, torch.float64))
        values.append(latents_NTCHW.double().square().mean((1, 2, 3, 4)))
        values.append(torch.ones_like(values[0]))
        self.sums += torch.stack(values).sum(1)
        return shown

    def _decoded(self, latents_NTCHW: Tensor) -> Tensor:
        return self.model.decode_video(latents_NTCHW.to(self.dtype)).float()

    def result(
        self, start: float, pictures: list[tuple[Tensor, ...]]
    ) -> ValidationResult | None:
        *sums, mean_square, clips = sum_over_ranks(self.sums).tolist()
        if self.latents is not None:
            sum_over_ranks(self.latents.sums_6C)
        if not clips:
            return None
        means = [value / clips for value in sums]
        return ValidationResult(
            means=dict(zip(self.names, means, strict=True)),
            latent_rms=(mean_square / clips) ** 0.5,
            latents=self.latents and self.latents.report(),
            clips=int(clips),
            seconds=time.monotonic() - start,
            pictures=pictures,
        )


def _clip_psnr(frames_NTCHW: Tensor, decoded_NTCHW: Tensor) -> Tensor:
    """PSNR in dB of each clip, over the frames that both have."""
    frames_NTCHW, decoded_NTCHW = aligned(frames_NTCHW, decoded_NTCHW)
    difference = decoded_NTCHW.double() - frames_NTCHW.double()
    return psnr(difference.square().mean((1, 2, 3, 4)))
