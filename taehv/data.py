"""Training and validation clips from video files.

A sample is a pure function of (seed, global sample number); see taehv/sampler.py.

    python -m taehv.data index --data.root FOLDER --data.index FOLDER
    python -m taehv.data proxy --data.root FOLDER --proxy.folder FOLDER

find out what is known of every file, and write smaller copies that decode faster.
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from torch.utils.data import Dataset

from taehv.augment import color_transform
from taehv.clips import Batch, Clip, Degradation, Failure, Work, collate
from taehv.config import read_config
from taehv.errors import UserError, run_command
from taehv.files import Files
from taehv.index import index_command
from taehv.loader import worker_count, worker_number
from taehv.proxy import proxy_command
from taehv.sampler import (
    CROP,
    DEGRADED,
    SOURCES,
    WINDOW,
    Buckets,
    Shares,
    draw,
    permute,
)
from taehv.sections import Data, Shape
from taehv.video import Crop, Tally, VideoError, decode_window

ATTEMPTS = 100
"""So many that a data set of which most files are bad can be trained on."""


class ClipDataset(Dataset):
    """Training clips by global sample number, the same on every machine.

    With K crops a window, sample g is crop g % K of window g // K. A window's source
    follows from its number and the sources' shares; its file, start and stride from
    its random numbers; box, place in the window, flip, colour, blur and noise from the
    sample's; its shape from the bucket that the sample is in.

    Args:
        data: section [data].
        files: to take clips from.
        seed: of every draw.
        buckets: of `data.shapes`; None for clips of the one usual shape.
    """

    def __init__(
        self, data: Data, files: Files, seed: int, buckets: Buckets | None = None
    ) -> None:
        self.files = files
        self.data = data
        self.seed = seed
        self.buckets = buckets
        self._shares = Shares(files.weights, seed ^ SOURCES)

    @property
    def clip_bytes(self) -> int:
        """Size of a clip's frames; of buckets, their share of the largest batch."""
        usual = self.data.frames * self.data.height * self.data.width * 3
        if self.buckets is None:
            return usual
        pairs = zip(self.data.shapes, self.buckets.clips, strict=True)
        largest = max(shape.pixels * clips for shape, clips in pairs)
        return largest * 3 // self.buckets.usual_clips

    def mapped(self, folder: str) -> ClipDataset:
        """The same with a memory-mapped file list; see ClipSource."""
        files = self.files.save(folder)
        return ClipDataset(self.data, files, self.seed, self.buckets)

    def __getitem__(self, g: int) -> Clip:
        return self.__getitems__([g])[0]

    def __getitems__(self, numbers: list[int]) -> list[Clip]:
        """Clips in the order asked for; neighbours of one window share a decode.

        Raises UserError when a window's file and all its replacements fail.
        """
        crops_per_window = self.data.crops_per_window
        windows = itertools.groupby(numbers, key=lambda g: g // crops_per_window)
        return [clip for window, gs in windows for clip in self._window(window, [*gs])]

    def shape(self, g: int) -> Shape:
        """Of sample g."""
        data = self.data
        if self.buckets is None:
            return Shape(data.frames, data.height, data.width)
        return data.shapes[self.buckets.of_sample(g)]

    def _window_frames(self, shape: Shape) -> int:
        return max(shape.frames, self.data.window_frames)

    def _window(self, window: int, numbers: list[int]) -> list[Clip]:
        begin, tally = time.perf_counter(), Tally()
        shape = self.shape(numbers[0])
        changes = [self._augmentation(g, shape) for g in numbers]
        crops = [crop for crop, _, _ in changes]
        length = self._window_frames(shape)
        part, turn = self._shares.part(window)
        failures: list[Failure] = []
        for attempt in range(ATTEMPTS):
            path, position, stride = self._place(part, turn, window, attempt)
            try:
                clips = decode_window(path, position, length, stride, crops, tally)
            except VideoError as error:
                failures.append(Failure(path, str(error), numbers[0]))
                continue
            seconds = time.perf_counter() - begin
            work = Work(
                self.files.parts[part].base,
                worker_number(),
                seconds,
                tally.packets,
                length,
                len(clips),
            )
            made = [
                Clip(clip, color, g, path, degradation=degradation)
                for clip, (_, color, degradation), g in zip(
                    clips, changes, numbers, strict=True
                )
            ]
            made[0] = replace(made[0], failures=tuple(failures), work=work)
            return made
        raise UserError(
            f"no usable file in {ATTEMPTS} attempts, check the videos under "
            f"{self.files.parts[part].base}: {failures[-1].reason}"
        )

    def _place(
        self, part: int, turn: int, window: int, attempt: int
    ) -> tuple[str, float, int]:
        """File, position and stride; a replacement's file is drawn freely."""
        other, position, step = draw(self.seed, window, attempt, WINDOW, 3)
        files = self.files.parts[part]
        n = len(files)
        epoch, i = divmod(turn, n)
        item = int(other * n) if attempt else permute(i, n, self.seed, epoch)
        low, high = self.data.stride
        return files[item], position, low + int(step * (high - low + 1))

    def _augmentation(
        self, g: int, shape: Shape
    ) -> tuple[Crop, np.ndarray, Degradation | None]:
        size, y, x, flip, *color, place = draw(self.seed, g, 0, CROP, 9)
        data = self.data
        low, high = data.crop_scale
        crop = Crop(
            height=shape.height,
            width=shape.width,
            scale=low + size * (high - low),
            y=y,
            x=x,
            flip=flip < data.flip,
            first=int(place * (self._window_frames(shape) - shape.frames + 1)),
            frames=shape.frames,
        )
        degradation = None
        if data.blur or data.noise:
            blur, noise, seed = draw(self.seed, g, 0, DEGRADED, 3)
            seed = int(seed * 2**53)
            degradation = Degradation(blur * data.blur, noise * data.noise, seed)
        return crop, color_transform(data.color_jitter, color), degradation


class ValidationDataset(Dataset):
    """`clips` fixed clips: clip v is of file v % n, starts spread over each file.

    The largest centred crop, stride 1, no augmentation. A file that fails gives a
    Failure in place of its clip; nothing replaces it.
    """

    def __init__(self, data: Data, files: Files, clips: int) -> None:
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
    data: Data, files: Files, clips: Sequence[int], total: int, batch_size: int
) -> Iterator[Batch]:
    """The validation clips numbered `clips` out of `total`, in batches, in order.

    Decoded in threads: processes would cost a start at each validation, and the
    signals that end a run would end them first.
    """
    dataset = ValidationDataset(data, files, total)
    threads = max(1, min(worker_count(data.workers), len(clips)))
    with ThreadPoolExecutor(threads) as pool:
        decoded = pool.map(dataset.__getitem__, clips)
        try:
            while samples := list(itertools.islice(decoded, batch_size)):
                yield collate(samples)
        finally:  # of a reader that stops early, too
            pool.shutdown(wait=False, cancel_futures=True)


def main() -> None:
    """Run `python -m taehv.data index|proxy`; settings are as for training."""
    commands = {"index": index_command, "proxy": proxy_command}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(
            f"{__doc__}\nEach explains its settings: python -m taehv.data index --help"
        )
        return
    if name not in commands:
        raise UserError(f"say which: python -m taehv.data {'|'.join(commands)}")
    config = read_config(sys.argv[2:], f"python -m taehv.data {name}")
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    commands[name](config)


if __name__ == "__main__":
    run_command(main)
