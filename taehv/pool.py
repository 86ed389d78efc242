"""Training clips cut from windows that lie in the device's memory.

Training never waits for them, and the same seed gives the same clips in any number of
runs, so that these differ in nothing but their settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from taehv.augment import to_frames
from taehv.cache import place_crop
from taehv.clips import Batch
from taehv.data import ClipDataset
from taehv.files import Files
from taehv.loader import ClipLoader
from taehv.sampler import Steps, permute
from taehv.sections import Data
from taehv.teacher import Teacher
from taehv.variants import Variant

AT_ONCE = 8
"""Windows that are decoded, and encoded by a teacher, at a time."""


@dataclass(frozen=True)
class PoolSize:
    """Of the windows, which are as those of a latent cache; see config.Cache."""

    windows: int
    frames: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a window."""
        return self.frames, self.height, self.width


class Pool:
    """Windows as uint8 frames, augmented once, and a teacher's latents of each.

    Args:
        frames_WTHWC: the windows.
        latents_WTCHW: the teacher's of each window, float16; None without a teacher.
    """

    def __init__(self, frames_WTHWC: Tensor, latents_WTCHW: Tensor | None) -> None:
        self.frames_WTHWC, self.latents_WTCHW = frames_WTHWC, latents_WTCHW

    @classmethod
    def decoded(
        cls,
        data: Data,
        files: Files,
        size: PoolSize,
        device: torch.device,
        teacher: Teacher | None,
    ) -> Pool:
        """Decode the first windows that a training of seed 0 would have.

        Raises:
            UserError: no usable file is found.
        """
        shape = size.shape
        crops = data.crops_per_window if AT_ONCE % data.crops_per_window == 0 else 1
        sizes = dict(zip(("frames", "height", "width"), shape, strict=True))
        data = replace(data, **sizes, buckets=[], crops_per_window=crops)
        plan = Steps(0, AT_ONCE, AT_ONCE)
        loader = ClipLoader(ClipDataset(data, files, 0), plan, device.type == "cuda")
        frames_WTHWC = torch.empty(
            size.windows, *shape, 3, dtype=torch.uint8, device=device
        )
        latents = []
        try:
            for part_WTHWC in frames_WTHWC.split(AT_ONCE):
                batch = next(loader)
                frames_NTCHW = to_frames(batch, device)[: len(part_WTHWC)]
                part_WTHWC.copy_((frames_NTCHW * 255).round_().movedim(2, -1))
                if teacher is not None:
                    seen_NTCHW = (part_WTHWC.float() / 255).movedim(-1, 2)
                    numbers = batch.numbers[: len(part_WTHWC)]
                    latents.append(teacher.encode(seen_NTCHW, numbers).half())
        finally:
            loader.close()
        return cls(frames_WTHWC, torch.cat(latents) if latents else None)

    def batch(
        self, variant: Variant, data: Data, seed: int, numbers: Sequence[int]
    ) -> Batch:
        """The clips of these sample numbers, as a latent cache would give them.

        Args:
            variant: says where clips may begin.
            data: their shape, which must fit into the windows (cache.check_fit).
            seed: of the order of windows, and of places in them.
            numbers: of samples, from 0.
        """
        windows, *shape = self.frames_WTHWC.shape[:4]
        frames, latents, leads = [], [], []
        for g in numbers:
            epoch, i = divmod(g, windows)
            window = permute(i, windows, seed, epoch)
            lead, of_frames, of_latents = place_crop(
                data, variant, tuple(shape), seed, g
            )
            frames.append(self.frames_WTHWC[window][of_frames])
            leads.append(lead)
            if self.latents_WTCHW is not None:
                run, *area = of_latents
                latents.append(self.latents_WTCHW[window][(run, slice(None), *area)])
        return Batch(
            frames_NTHWC=torch.stack(frames),
            color_N34=torch.eye(3, 4).repeat(len(frames), 1, 1),
            numbers=list(numbers),
            sources=[],
            failures=[],
            lead_N=torch.tensor(leads),
            latents_NTCHW=torch.stack(latents) if latents else None,
        )
