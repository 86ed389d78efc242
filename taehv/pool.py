"""Training clips cut from windows that lie in the device's memory.

Training never waits for them, and the same seed gives the same clips in any number of
runs, so that these differ in nothing but their settings.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from taehv.augment import color_transform, to_frames
from taehv.cache import place_crop
from taehv.clips import Batch
from taehv.data import ClipDataset
from taehv.files import Files
from taehv.loader import ClipLoader
from taehv.sampler import POOLED, Steps, draw, permute
from taehv.sections import Data
from taehv.teacher import Teacher
from taehv.variants import Variant

log = logging.getLogger("taehv")

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
    """Windows as uint8 frames, and a teacher's latents of each.

    With a teacher they are augmented once, and clips are cut from them as from a latent
    cache. Without, clips lie anywhere in them, and each is flipped and recolored on its
    own, as in training from videos.

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
        if teacher is None:
            data = replace(data, flip=0.0, color_jitter=0.0)
        plan = Steps(0, AT_ONCE, AT_ONCE)
        loader = ClipLoader(ClipDataset(data, files, 0), plan, device.type == "cuda")
        frames_WTHWC = torch.empty(
            size.windows, *shape, 3, dtype=torch.uint8, device=device
        )
        latents, bad = [], set[str]()
        try:
            parts = frames_WTHWC.split(AT_ONCE)
            for part_WTHWC in tqdm(parts, "decoding", disable=None, leave=False):
                batch = next(loader)
                for failure in batch.failures:
                    if failure.path not in bad:
                        log.warning(f"replaced clips of a bad video: {failure.reason}")
                    bad.add(failure.path)
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
        """The clips of these sample numbers.

        Args:
            variant: says where clips of a teacher may begin.
            data: their shape, which must fit into the windows (cache.check_fit), and
                how they are flipped and recolored without a teacher.
            seed: of the order of windows, and of places in them.
            numbers: of samples, from 0.
        """
        windows, clips = len(self.frames_WTHWC), []
        for g in numbers:
            epoch, i = divmod(g, windows)
            window = permute(i, windows, seed, epoch)
            if self.latents_WTCHW is None:
                clips.append(self._free_clip(window, data, seed, g))
            else:
                clips.append(self._coded_clip(window, variant, data, seed, g))
        latents = [clip.latents_TCHW for clip in clips]
        return Batch(
            frames_NTHWC=torch.stack([clip.frames_THWC for clip in clips]),
            color_N34=torch.from_numpy(np.stack([clip.color_34 for clip in clips])),
            numbers=list(numbers),
            sources=[],
            failures=[],
            lead_N=torch.tensor([clip.lead for clip in clips]),
            latents_NTCHW=None if self.latents_WTCHW is None else torch.stack(latents),
        )

    def _free_clip(self, window: int, data: Data, seed: int, g: int) -> _Clip:
        flip, *color, first, y, x = draw(seed, g, 0, POOLED, 8)
        sizes = (data.frames, data.height, data.width)
        whole = self.frames_WTHWC.shape[1:4]
        places = [
            int(u * (n - size + 1))
            for u, n, size in zip((first, y, x), whole, sizes, strict=True)
        ]
        cut = tuple(slice(a, a + n) for a, n in zip(places, sizes, strict=True))
        frames_THWC = self.frames_WTHWC[window][cut]
        if flip < data.flip:
            frames_THWC = frames_THWC.flip(2)
        return _Clip(frames_THWC, color_transform(data.color_jitter, color))

    def _coded_clip(
        self, window: int, variant: Variant, data: Data, seed: int, g: int
    ) -> _Clip:
        shape = tuple(self.frames_WTHWC.shape[1:4])
        lead, of_frames, (run, *area) = place_crop(data, variant, shape, seed, g)
        return _Clip(
            self.frames_WTHWC[window][of_frames],
            color_transform(0, []),
            lead,
            self.latents_WTCHW[window][(run, slice(None), *area)],
        )


@dataclass(frozen=True)
class _Clip:
    """One sample; see clips.Batch."""

    frames_THWC: Tensor
    color_34: np.ndarray
    lead: int = 0
    latents_TCHW: Tensor | None = None
