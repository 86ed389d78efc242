"""A teacher that needs no weights and takes no time: the low frequencies of a video.

Its latents have `taehv`'s shape: of every 8 x 8 patch of the mean of four frames the
ten lowest frequencies of brightness, and three of each of two colors. Of films of 128
lines they give back 27.5 dB; a decoder has to find out what they leave out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

PATCH = 8
COLORS = ((1, 1, 1), (1, 0, -1), (1, -2, 1))
"""Brightness and two opponent colors, of red, green, blue."""
FREQUENCIES = (3, 1, 1)
"""The highest sum of a frequency's two numbers, of each color."""
RMS = ((3.5, 0.54, 0.26, 0.16), (1.2, 0.18), (0.55, 0.1))
"""By color and that sum, over frames of films; latents are divided by it."""


def _basis() -> tuple[Tensor, Tensor]:
    """Orthonormal columns over the values of a patch, and the size of each latent."""
    place = torch.arange(PATCH) + 0.5
    waves = torch.cos(math.pi / PATCH * torch.arange(PATCH)[:, None] * place)
    waves = F.normalize(waves, dim=1)
    columns, sizes = [], []
    for color, highest, rms in zip(COLORS, FREQUENCIES, RMS, strict=True):
        color_C = F.normalize(torch.tensor(color).float(), dim=0)
        for u in range(highest + 1):
            for v in range(highest + 1 - u):
                wave = torch.einsum("c,i,j->cij", color_C, waves[u], waves[v])
                columns.append(wave.flatten())
                sizes.append(rms[u + v])
    return torch.stack(columns, 1), torch.tensor(sizes)


class FrequencyTeacher:
    """See taehv.teacher.Teacher, whose protocol this is; its path is not read."""

    latent_channels = 16
    fingerprint = "frequencies"

    def __init__(self, path: str, device: torch.device) -> None:
        self.basis, self.rms = (x.to(device) for x in _basis())

    def check(self, frames: int, height: int, width: int) -> None:
        if frames % 4 != 1:
            raise ValueError(f"{frames} frames are none of 4 k + 1")

    def encode(self, frames_NTCHW: Tensor, seeds: Sequence[int]) -> Tensor:
        led = torch.cat(
            [frames_NTCHW[:, :1].expand(-1, 3, -1, -1, -1), frames_NTCHW], 1
        )
        means = led.unflatten(1, (-1, 4)).mean(2) - 0.5
        patches = F.pixel_unshuffle(means, PATCH)
        return torch.einsum("ntchw,co->ntohw", patches, self.basis / self.rms)

    def decode(self, latents_NTCHW: Tensor) -> Tensor:
        patches = torch.einsum("ntohw,co->ntchw", latents_NTCHW, self.basis * self.rms)
        means = F.pixel_shuffle(patches, PATCH) + 0.5
        return means.repeat_interleave(4, 1)[:, 3:]
