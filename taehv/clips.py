"""Clips, batches of them, and what gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from taehv.sections import Data


@dataclass(frozen=True)
class Failure:
    """A file that gave no clip for sample `number`, and why."""

    path: str
    reason: str
    number: int

    def __str__(self) -> str:
        return f"sample {self.number}: {self.reason}"


@dataclass(frozen=True)
class Work:
    """What the decoding of a window took, with all that failed before it."""

    source: str
    """The set of videos that it is of."""
    worker: int
    seconds: float
    packets: int
    """Given to the decoder."""
    frames: int
    """That were asked for."""
    clips: int


@dataclass(frozen=True)
class Degradation:
    """What is done to a clip's frames after the colour, on the device.

    Gaussian blur of a standard deviation in pixels, then Gaussian noise of one in
    units of the range of values.
    """

    blur: float
    noise: float
    seed: int
    """Of the noise."""


@dataclass(frozen=True)
class Clip:
    """One sample: uint8 RGB frames, and the colour transform still to be applied.

    `color_34` is a 3x3 matrix and a bias for RGB in [0, 1]. `failures` are the files
    that were tried before `source`. The first clip of a window tells the `work` of all
    of them. A clip from a cache has the teacher's float16
    latents, of which the first `lead` are not judged.
    """

    frames_THWC: np.ndarray
    color_34: np.ndarray
    number: int
    source: str
    failures: tuple[Failure, ...] = ()
    latents_TCHW: np.ndarray | None = None
    lead: int = 0
    degradation: Degradation | None = None
    work: Work | None = None


@dataclass
class Batch:
    """Clips of one micro-batch, still uint8, with what is needed to trace them.

    From a cache there are the teacher's latents too (float16), and for validation
    clips the teacher's own PSNR in dB. `lead_N` (int64) counts the leading latents of
    each clip that are not judged: 0 unless the clip begins inside a cached window.
    """

    frames_NTHWC: Tensor
    color_N34: Tensor
    numbers: list[int]
    sources: list[str]
    failures: list[Failure]
    lead_N: Tensor
    latents_NTCHW: Tensor | None = None
    teacher_psnr_N: Tensor | None = None
    degradations: tuple[Degradation | None, ...] = ()
    work: tuple[Work, ...] = ()

    def pin_memory(self) -> Batch:
        """Called by the DataLoader when it pins."""
        return replace(self, **{k: v.pin_memory() for k, v in self._tensors().items()})

    def share_memory(self) -> None:
        """Move to memory that processes share; RuntimeError where that has no room."""
        for tensor in self._tensors().values():
            tensor.share_memory_()

    def _tensors(self) -> dict[str, Tensor]:
        return {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}


class ClipSource(Protocol):
    """What a ClipLoader reads: clips by number, and what it must know of them."""

    data: Data
    clip_bytes: int
    """Size of one clip in the memory that processes share."""

    def __getitems__(self, numbers: list[int]) -> Sequence[Clip | Failure]:
        """Clips in the order asked for; may raise a UserError."""

    def mapped(self, folder: str) -> ClipSource:
        """The same, its lists memory mapped from files that it writes to `folder`."""


def collate(samples: list[Clip | Failure]) -> Batch:
    """Stack clips of one size, either all or none of which have latents.

    Failures are listed and may leave an empty batch.
    """
    clips = [sample for sample in samples if isinstance(sample, Clip)]
    failures = [sample for sample in samples if isinstance(sample, Failure)]
    failures += [failure for clip in clips for failure in clip.failures]
    frames, colors = (
        np.empty((0, 0, 0, 0, 3), np.uint8),
        np.empty((0, 3, 4), np.float32),
    )
    if clips:
        frames = np.stack([clip.frames_THWC for clip in clips])
        colors = np.stack([clip.color_34 for clip in clips])
    return Batch(
        frames_NTHWC=torch.from_numpy(frames),
        color_N34=torch.from_numpy(colors),
        numbers=[clip.number for clip in clips],
        sources=[clip.source for clip in clips],
        failures=failures,
        lead_N=torch.tensor([clip.lead for clip in clips], dtype=torch.int64),
        latents_NTCHW=_stacked_latents(clips),
        degradations=tuple(clip.degradation for clip in clips),
        work=tuple(clip.work for clip in clips if clip.work is not None),
    )


def _stacked_latents(clips: list[Clip]) -> Tensor | None:
    latents = [clip.latents_TCHW for clip in clips if clip.latents_TCHW is not None]
    return torch.from_numpy(np.stack(latents)) if latents else None
