"""Small teachers for caches: what their latents must be is plain to see."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from numbered_video import numbers_of
from torch import Tensor
from torch.nn import functional as F

from taehv import VARIANTS


class Projection:
    """A fixed random projection of 8 x 8 patches, averaged over groups of frames."""

    latent_channels = 16
    fingerprint = "projection"

    def __init__(self, path: str, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(16, 3 * 64, generator=generator)
        self.weight = torch.linalg.qr(weight.T)[0].T.to(device)

    def check(self, frames: int, height: int, width: int) -> None:
        if frames % 4 != 1:
            raise ValueError(f"{frames} frames are none of 4 k + 1")

    def encode(self, frames_NTCHW: Tensor, seeds: Sequence[int]) -> Tensor:
        """Latent 0 is frame 0, latent i the mean of frames 4 i - 3 to 4 i.

        Channel 15 is the seed.
        """
        patches = F.pixel_unshuffle(frames_NTCHW - 0.5, 8)
        groups = [patches[:, :1], *patches[:, 1:].split(4, 1)]
        means = torch.stack([group.mean(1) for group in groups], 1)
        latents_NTCHW = torch.einsum("oc,ntchw->ntohw", self.weight, means)
        seeds_N111 = torch.tensor(seeds).view(-1, 1, 1, 1)
        latents_NTCHW[:, :, 15] = seeds_N111.to(latents_NTCHW)
        return latents_NTCHW

    def decode(self, latents_NTCHW: Tensor) -> Tensor:
        patches = torch.einsum("oc,ntohw->ntchw", self.weight, latents_NTCHW)
        frames = F.pixel_shuffle(patches, 8) + 0.5
        first, later = frames[:, :1], frames[:, 1:]
        return torch.cat([first, later.repeat_interleave(4, 1)], 1)


class Slow(Projection):
    """Leaves time to be killed."""

    def encode(self, frames_NTCHW: Tensor, seeds: Sequence[int]) -> Tensor:
        time.sleep(0.05)
        return super().encode(frames_NTCHW, seeds)


class Interrupted(Projection):
    """Meets Ctrl-C in its third batch while there is a file at `path`."""

    def __init__(self, path: str, device: torch.device) -> None:
        super().__init__(path, device)
        self.flag = Path(path)

    def encode(self, frames_NTCHW: Tensor, seeds: Sequence[int]) -> Tensor:
        if seeds[0] == 6 and self.flag.exists():
            self.flag.unlink()
            os.kill(os.getpid(), signal.SIGINT)
        return super().encode(frames_NTCHW, seeds)


class Other(Projection):
    """Says that it is another teacher."""

    fingerprint = "other"


class Huge(Projection):
    """Makes a latent of window 5 that float16 cannot hold."""

    def encode(self, frames_NTCHW: Tensor, seeds: Sequence[int]) -> Tensor:
        latents_NTCHW = super().encode(frames_NTCHW, seeds)
        if 5 in seeds:
            latents_NTCHW[list(seeds).index(5), 1, 2, 0, 0] = 65520.0
        return latents_NTCHW


class Wide(Projection):
    """Makes latents of another size than its channels promise."""

    def encode(self, frames_NTCHW: Tensor, seeds: Sequence[int]) -> Tensor:
        return super().encode(frames_NTCHW, seeds)[..., :-1]


class Numbered:
    """Reads the frames' numbers and says of each latent which frames it stands for.

    `path` is the variant. Channels 0 and 1 have the numbers of the first and the last
    frame that a latent stands for.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        self.variant = VARIANTS[path]
        self.latent_channels = self.variant.latent_channels
        self.fingerprint = path

    def check(self, frames: int, height: int, width: int) -> None:
        pass

    def encode(self, frames_NTCHW: Tensor, seeds: Sequence[int]) -> Tensor:
        space = self.variant.space_factor
        count, frames, _, height, width = frames_NTCHW.shape
        spans = self._spans(frames)
        latents = torch.zeros(
            (count, len(spans), self.latent_channels, height // space, width // space)
        )
        for clip, frames_TCHW in zip(latents, frames_NTCHW, strict=True):
            pictures = (frames_TCHW * 255).round().permute(0, 2, 3, 1).numpy()
            numbers = numbers_of(pictures)
            for latent, (first, last) in zip(clip, spans, strict=True):
                latent[0], latent[1] = numbers[first], numbers[last]
        return latents

    def decode(self, latents_NTCHW: Tensor) -> Tensor:
        raise AssertionError("these videos have no validation clips")

    def _spans(self, frames: int) -> list[tuple[int, int]]:
        """First and last frame of each latent, written out for each family."""
        step = self.variant.time_factor
        if self.variant.trim == "chunks":
            return [
                (max(end - 3, chunk), end)
                for chunk in range(0, frames, 17)
                for end in range(chunk, min(chunk + 17, frames), 4)
            ]
        if self.variant.trim == "parity" and frames % 8 == 0:
            return [(first, first + 3) for first in range(0, frames, 4)]
        later = [(last - step + 1, last) for last in range(step, frames, step)]
        return [(0, 0), *later]
