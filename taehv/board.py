"""What a run shows in TensorBoard.

PyTorch's own SummaryWriter ends a run whose disk is full, or stands still for it.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from taehv.visualize import gif
from taehv.writing import GrowingFile

_numbers = itertools.count()


class Board:
    """A file of events, see GrowingFile.

    Args:
        folder: that TensorBoard is given.
        step: the first; what other files in the folder have of it and of later ones is
            not shown.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}"
        path = folder / f"{name}.{os.getpid()}.{next(_numbers)}"
        self._file = GrowingFile(path)
        self._records = RecordWriter(self._file)
        self._add(step, file_version="brain.Event:2")
        self._add(step, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Show a point of a curve."""
        self._add(step, summary=summary.scalar(tag, value))

    def text(self, tag: str, text: str) -> None:
        """Show a text in Markdown."""
        self._add(0, summary=summary.text(tag, text))

    def picture(self, tag: str, picture_HWC: np.ndarray, step: int) -> None:
        """Show a uint8 picture."""
        shown = summary.image(tag, picture_HWC, dataformats="HWC")
        self._add(step, summary=shown)

    def clip(self, tag: str, frames_THWC: np.ndarray, step: int, rate: float) -> None:
        """Show a uint8 clip; PyTorch's own function needs moviepy."""
        _, height, width, channels = frames_THWC.shape
        image = Summary.Image(
            height=height,
            width=width,
            colorspace=channels,
            encoded_image_string=gif(frames_THWC, rate),
        )
        self._add(step, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))

    def _add(self, step: int, **what: object) -> None:
        event = Event(step=step, wall_time=time.time(), **what)
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        """Write what could not be written so far, if that can be done now."""
        self._file.close()
