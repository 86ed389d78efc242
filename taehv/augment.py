"""Augmentation on the device, and the way of a batch to it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from taehv.clips import Batch, Degradation


def color_transform(strength: float, draws: list[float]) -> np.ndarray:
    """Brightness, contrast, saturation and hue as one 3x3 matrix and bias (3x4).

    `draws` are four uniform numbers in [0, 1]. The first three factors lie in
    1 - strength to 1 + strength; the hue turns by up to strength quarter turns about
    the grey axis. Strength 0 gives the exact identity.
    """
    if strength == 0:
        return np.eye(3, 4, dtype=np.float32)
    brightness, contrast, saturation, hue = (strength * (2 * u - 1) for u in draws)
    luma = np.array([0.2126, 0.7152, 0.0722])
    saturate = (1 + saturation) * np.eye(3) - saturation * np.outer(np.ones(3), luma)
    matrix = (1 + brightness) * (1 + contrast) * _grey_rotation(hue) @ saturate
    bias = np.full((3, 1), -contrast / 2)
    return np.hstack([matrix, bias]).astype(np.float32)


def _grey_rotation(quarter_turns: float) -> np.ndarray:
    """Rotation about (1, 1, 1), by Rodrigues' formula."""
    angle = quarter_turns * math.pi / 2
    axis = 1 / math.sqrt(3)
    cross = axis * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    along = np.full((3, 3), 1 / 3)
    return (
        math.cos(angle) * np.eye(3)
        + math.sin(angle) * cross
        + (1 - math.cos(angle)) * along
    )


def to_frames(
    batch: Batch, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Frames on `device`: `frames_NTCHW` in [0, 1], colour transform applied.

    Blur and noise follow where the batch asks for them. The memory stays in NTHWC
    order (channels last); without any of it the values are exactly uint8 / 255.
    """
    frames_NTHWC = batch.frames_NTHWC.to(device, non_blocking=True)
    has_color, has_more = not _is_identity(batch.color_N34), any(batch.degradations)
    if not has_color and not has_more:
        return (frames_NTHWC.to(dtype) / 255).permute(0, 1, 4, 2, 3)
    frames_NTHWC = frames_NTHWC.float() / 255
    if has_color:
        color_N34 = batch.color_N34.to(device, non_blocking=True)
        frames_NTHWC = _recolored(frames_NTHWC, color_N34)
    if has_more:
        frames_NTHWC = _degraded(frames_NTHWC, batch.degradations)
    return frames_NTHWC.to(dtype).permute(0, 1, 4, 2, 3)


def _recolored(frames_NTHWC: Tensor, color_N34: Tensor) -> Tensor:
    red, green, blue, bias = color_N34[:, None, None, None].unbind(-1)
    # Written out: a matrix product would run in TF32 or bf16 where those are on.
    mixed_NTHWC = (
        red * frames_NTHWC[..., 0:1]
        + green * frames_NTHWC[..., 1:2]
        + blue * frames_NTHWC[..., 2:3]
        + bias
    )
    return mixed_NTHWC.clamp(0, 1)


def _degraded(
    frames_NTHWC: Tensor, degradations: Sequence[Degradation | None]
) -> Tensor:
    """Blurred and noisy, each clip as it asks, whatever the others of the batch."""
    sigmas = [d.blur if d else 0.0 for d in degradations]
    if any(sigmas):
        taps = [_gaussian(sigma, math.ceil(3 * max(sigmas))) for sigma in sigmas]
        weights_NK = torch.tensor(taps, device=frames_NTHWC.device)
        for dimension in (2, 3):
            frames_NTHWC = _filtered(frames_NTHWC, weights_NK, dimension)
    noisy = [i for i, d in enumerate(degradations) if d and d.noise]
    if not noisy:
        return frames_NTHWC
    device = frames_NTHWC.device
    generator = torch.Generator(device)
    for i in noisy:  # in place: the frames are no longer those of the batch
        generator.manual_seed(degradations[i].seed)
        shape = frames_NTHWC.shape[1:]
        noise_THWC = torch.randn(shape, generator=generator, device=device)
        frames_NTHWC[i] += degradations[i].noise * noise_THWC
    return frames_NTHWC.clamp(0, 1)


def _gaussian(sigma: float, radius: int) -> list[float]:
    """Weights from -radius to radius; none beyond 3 sigma, so that a larger radius
    changes nothing."""
    reach = math.ceil(3 * sigma)
    offsets = range(-radius, radius + 1)
    weights = [
        math.exp(-0.5 * (i / sigma) ** 2) if abs(i) <= reach and sigma else float(not i)
        for i in offsets
    ]
    total = sum(w for i, w in zip(offsets, weights, strict=True) if abs(i) <= reach)
    return [weight / total for weight in weights]


def _filtered(frames_NTHWC: Tensor, weights_NK: Tensor, dimension: int) -> Tensor:
    """Weighted sum of shifted frames; the border repeats."""
    size, radius = frames_NTHWC.shape[dimension], weights_NK.shape[1] // 2
    places = torch.arange(size, device=frames_NTHWC.device)
    sum_NTHWC = torch.zeros_like(frames_NTHWC)
    for offset, weight_N in zip(
        range(-radius, radius + 1), weights_NK.unbind(1), strict=True
    ):
        shifted = (places + offset).clamp(0, size - 1)
        shifted_NTHWC = frames_NTHWC.index_select(dimension, shifted)
        sum_NTHWC += weight_N[:, None, None, None, None] * shifted_NTHWC
    return sum_NTHWC


class Upload:
    """Brings batches to a device while it works at what it was given before.

    Args:
        device: where to.
        dtype: of the frames there.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Tensor:
        """`to_frames`, copied and converted beside the work under way."""
        if self._stream is None:
            return to_frames(batch, self.device, self.dtype)
        with torch.cuda.stream(self._stream):
            frames_NTCHW = to_frames(batch, self.device, self.dtype)
        torch.cuda.current_stream().wait_stream(self._stream)
        frames_NTCHW.record_stream(torch.cuda.current_stream())
        return frames_NTCHW


def _is_identity(color_N34: Tensor) -> bool:
    return torch.equal(color_N34, torch.eye(3, 4).expand_as(color_N34))
