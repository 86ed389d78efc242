"""Training and validation clips from video files.

A sample is a pure function of (seed, global sample number); see taehv/sampler.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from torch.utils.data import Dataset

from taehv.augment import color_transform
from taehv.clips import Batch, Clip, Failure, collate
from taehv.config import Data
from taehv.errors import UserError
from taehv.files import FileList
from taehv.loader import worker_count
from taehv.sampler import CROP, WINDOW, draw, permute
from taehv.video import Crop, VideoError, decode_window

ATTEMPTS = 16


class ClipDataset(Dataset):
    """Training clips by global sample number, the same on every machine.

    With K crops a window, sample g is crop g % K of window g // K. A window's file,
    start and stride come from the window's random numbers; box, flip and colour from
    the sample's.
    """

    def __init__(self, data: Data, files: FileList, seed: int) -> None:
        self.files = files
        self.data = data
        self.seed = seed

    @property
    def clip_bytes(self) -> int:
        """Size of a clip's frames."""
        return self.data.frames * self.data.height * self.data.width * 3

    def mapped(self, folder: str) -> ClipDataset:
        """The same with a memory-mapped file list; see ClipSource."""
        return ClipDataset(self.data, self.files.save(folder), self.seed)

    def __getitem__(self, g: int) -> Clip:
        return self.__getitems__([g])[0]

    def __getitems__(self, numbers: list[int]) -> list[Clip]:
        """Clips in the order asked for; neighbours of one window share a decode.

        Raises UserError when a window's file and all its replacements fail.
        """
        crops_per_window = self.data.crops_per_window
        windows = itertools.groupby(numbers, key=lambda g: g // crops_per_window)
        return [clip for window, gs in windows for clip in self._window(window, [*gs])]

    def _window(self, window: int, numbers: list[int]) -> list[Clip]:
        crops, colors = zip(*map(self._augmentation, numbers), strict=True)
        failures: list[Failure] = []
        for attempt in range(ATTEMPTS):
            path, position, stride = self._place(window, attempt)
            try:
                clips = decode_window(
                    path, position, self.data.frames, stride, list(crops)
                )
            except VideoError as error:
                failures.append(Failure(path, str(error), numbers[0]))
                continue
            told = [tuple(failures)] + [()] * (len(clips) - 1)
            sources = [path] * len(clips)
            return list(map(Clip, clips, colors, numbers, sources, told))
        raise UserError(
            f"no usable file in {ATTEMPTS} attempts, check the videos under "
            f"{self.files.base}: {failures[-1].reason}"
        )

    def _place(self, window: int, attempt: int) -> tuple[str, float, int]:
        """File, position and stride; a replacement's file is drawn freely."""
        other, position, step = draw(self.seed, window, attempt, WINDOW, 3)
        n = len(self.files)
        epoch, i = divmod(window, n)
        item = int(other * n) if attempt else permute(i, n, self.seed, epoch)
        low, high = self.data.stride
        return self.files[item], position, low + int(step * (high - low + 1))

    def _augmentation(self, g: int) -> tuple[Crop, np.ndarray]:
        size, y, x, flip, *color = draw(self.seed, g, 0, CROP, 8)
        low, high = self.data.crop_scale
        crop = Crop(
            height=self.data.height,
            width=self.data.width,
            scale=low + size * (high - low),
            y=y,
            x=x,
            flip=flip < self.data.flip,
        )
        return crop, color_transform(self.data.color_jitter, color)


class ValidationDataset(Dataset):
    """`clips` fixed clips: clip v is of file v % n, starts spread over each file.

    The largest centred crop, stride 1, no augmentation. A file that fails gives a
    Failure in place of its clip; nothing replaces it.
    """

    def __init__(self, data: Data, files: FileList, clips: int) -> None:
        self.files = files
        self.data = data
        self.clips = clips

    def __len__(self) -> int:
        return self.clips

    def __getitem__(self, v: int) -> Clip | Failure:
        turn, item = divmod(v, len(self.files))
        of_this_file = -(-(self.clips - item) // len(self.files))
        position = (turn + 0.5) / of_this_file
        path, crop = self.files[item], Crop(self.data.height, self.data.width)
        try:
            (clip,) = decode_window(path, position, self.data.frames, 1, [crop])
        except VideoError as error:
            return Failure(path, str(error), v)
        return Clip(clip, color_transform(0, []), v, path)


def validation_batches(
    data: Data, files: FileList, clips: Sequence[int], total: int, batch_size: int
) -> Iterator[Batch]:
    """The validation clips numbered `clips` out of `total`, in batches, in order.

    Decoded in threads: processes would cost a start at each validation, and the
    signals that end a run would end them first.
    """
    dataset = ValidationDataset(data, files, total)
    threads = max(1, min(worker_count(data.workers), len(clips)))
    with ThreadPoolExecutor(threads) as pool:
        decoded = pool.map(dataset.__getitem__, clips)
        while samples := list(itertools.islice(decoded, batch_size)):
            yield collate(samples)
