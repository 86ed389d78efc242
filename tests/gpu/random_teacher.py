"""A teacher of random weights that takes no time, for latents of `taehv`'s shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class RandomTeacher:
    """Projects 8 x 8 patches of the mean of up to four frames."""

    latent_channels = 16
    fingerprint = "random"

    def __init__(self, path: str, device: torch.device) -> None:
        weight = torch.randn(192, 16, generator=torch.Generator().manual_seed(0))
        self.weight = torch.linalg.qr(weight)[0].to(device)

    def check(self, frames: int, height: int, width: int) -> None:
        if frames % 4 != 1:
            raise ValueError(f"{frames} frames are none of 4 k + 1")

    def encode(self, frames_NTCHW: Tensor, seeds: Sequence[int]) -> Tensor:
        led = torch.cat(
            [frames_NTCHW[:, :1].expand(-1, 3, -1, -1, -1), frames_NTCHW], 1
        )
        means = led.unflatten(1, (-1, 4)).mean(2) - 0.5
        patches = F.pixel_unshuffle(means, 8)
        return torch.einsum("ntchw,co->ntohw", patches, self.weight)

    def decode(self, latents_NTCHW: Tensor) -> Tensor:
        patches = torch.einsum("ntohw,co->ntchw", latents_NTCHW, self.weight)
        means = F.pixel_shuffle(patches, 8) + 0.5
        return means.repeat_interleave(4, 1)[:, 3:]
