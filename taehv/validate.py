"""Judging a model on fixed clips that training never sees."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from taehv.data import Batch, to_frames
from taehv.distributed import StopSignal, sum_over_ranks
from taehv.losses import aligned, psnr
from taehv.model import TAEHV

log = logging.getLogger("taehv")


@dataclass
class ValidationResult:
    """Means over the clips of all processes, and pictures of this process's first."""

    psnr: float
    """PSNR of the reconstruction in dB, clamped to [0, 1]."""
    mean_color_psnr: float
    """PSNR in dB of painting each clip in its mean colour: what any model must beat."""
    latent_rms: float
    """Root mean square of the latents; a diffusion model expects about 1."""
    clips: int
    seconds: float
    pictures: list[tuple[Tensor, Tensor]] = field(repr=False)
    """Pairs of input and reconstruction, frames_TCHW on the CPU, RGB in [0, 1]."""


@torch.no_grad()
def validate(
    model: TAEHV,
    batches: Iterable[Batch],
    device: torch.device,
    stop: StopSignal,
    pictures: int = 4,
) -> ValidationResult | None:
    """Reconstruct the batches and average over all processes (a collective).

    Args:
        model: an unsharded model, so that processes may have different numbers of
            clips.
        batches: this process's clips.
        device: where the model is.
        stop: ends the validation early; the result is then of no use.
        pictures: clips to keep for pictures.

    Returns:
        None where no process could decode a clip.
    """
    start = time.monotonic()
    dtype = next(model.parameters()).dtype
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    kept: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        if stop.received:
            break
        for failure in batch.failures:
            log.warning(f"left out a held-out clip, {failure}")
        if not len(batch.frames_NTHWC):
            continue
        frames_NTCHW = to_frames(batch, device)
        latents_NTCHW = model.encode_video(frames_NTCHW.to(dtype))
        decoded_NTCHW = model.decode_video(latents_NTCHW).float()
        target_NTCHW, decoded_NTCHW = aligned(frames_NTCHW, decoded_NTCHW)
        mean_N1C11 = target_NTCHW.mean((1, 3, 4), keepdim=True)
        sums += torch.stack(
            [
                _clip_psnr(decoded_NTCHW, target_NTCHW).sum(),
                _clip_psnr(mean_N1C11, target_NTCHW).sum(),
                latents_NTCHW.float().square().mean((1, 2, 3, 4)).sum(),
                torch.tensor(float(len(frames_NTCHW)), device=device),
            ]
        )
        for pair in zip(target_NTCHW, decoded_NTCHW, strict=True):
            if len(kept) < pictures:
                kept.append((pair[0].cpu(), pair[1].cpu()))
    ours, mean_color, mean_square, clips = sum_over_ranks(sums).tolist()
    if not clips:
        return None
    return ValidationResult(
        psnr=ours / clips,
        mean_color_psnr=mean_color / clips,
        latent_rms=(mean_square / clips) ** 0.5,
        clips=int(clips),
        seconds=time.monotonic() - start,
        pictures=kept,
    )


def _clip_psnr(decoded_NTCHW: Tensor, target_NTCHW: Tensor) -> Tensor:
    difference = decoded_NTCHW.double() - target_NTCHW.double()
    return psnr(difference.square().mean((1, 2, 3, 4)))
