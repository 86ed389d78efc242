"""Pictures and clips of what a model makes of its input."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

ERROR_GAIN = 5
LABEL_PIXELS = 7
"""Width of a letter, at the least."""


def to_uint8(frames_TCHW: Tensor) -> np.ndarray:
    """Frames, RGB in [0, 1], to uint8 frames_THWC."""
    frames_THWC = frames_TCHW.movedim(1, -1).float().clamp(0, 1)
    return (frames_THWC * 255).round().to(torch.uint8).cpu().numpy()


def error_map(frames_TCHW: Tensor, decoded_TCHW: Tensor) -> Tensor:
    """Absolute error, five times as bright: black where two clips of a shape agree."""
    return ((decoded_TCHW - frames_TCHW).abs() * ERROR_GAIN).clamp(0, 1)


def picture_strip(
    clips: list[tuple[Tensor, ...]],
    columns: int = 8,
    gap: int = 2,
    labels: Sequence[str] = (),
) -> np.ndarray:
    """Clips under one another, the input's frames above those of each reconstruction.

    Args:
        clips: of each the input and its reconstructions, frames_TCHW, RGB in [0, 1],
            all of one shape.
        columns: frames to show, spread over each clip.
        gap: white pixels between frames; twice as many between clips.
        labels: of the rows of each clip, written on their left.

    Returns:
        picture_HWC, uint8.
    """
    rows, margin = [], LABEL_PIXELS * max(map(len, labels), default=0)
    for pair in clips:
        shown = np.linspace(0, len(pair[0]) - 1, min(columns, len(pair[0]))).round()
        for frames_TCHW, label in itertools.zip_longest(pair, labels):
            frames = to_uint8(frames_TCHW[torch.from_numpy(shown).long()])
            row = np.pad(
                frames, ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255
            )
            row = np.concatenate(list(row), axis=1)
            if margin:
                row = np.concatenate([written(label, len(row), margin), row], axis=1)
            rows.append(row)
        rows.append(np.full((gap, *rows[-1].shape[1:]), 255, np.uint8))
    return np.concatenate(rows[:-1])


def written(text: str, height: int, width: int) -> np.ndarray:
    """A line of text, black on white: picture_HWC, uint8."""
    image = Image.new("RGB", (width, height), "white")
    place = (2, height // 2)
    ImageDraw.Draw(image).text(place, text, "black", anchor="lm")
    return np.asarray(image)


def side_by_side(clips: list[tuple[Tensor, ...]], repeat: int = 1) -> np.ndarray:
    """Clips after one another, input on the left and reconstructions on its right.

    Args:
        clips: as in picture_strip.
        repeat: how often each clip is shown, since training clips are short.

    Returns:
        frames_THWC, uint8.
    """
    pairs = [
        np.concatenate([to_uint8(frames_TCHW) for frames_TCHW in pair], axis=2)
        for pair in clips
    ]
    return np.concatenate([pair for pair in pairs for _ in range(repeat)])


def gif(frames_THWC: np.ndarray, rate: float) -> bytes:
    """An endless animated GIF, the one moving picture that TensorBoard shows."""
    images = [Image.fromarray(frame) for frame in frames_THWC]
    stream = io.BytesIO()
    images[0].save(
        stream,
        "GIF",
        save_all=True,
        append_images=images[1:],
        duration=round(1000 / rate),
        loop=0,
    )
    return stream.getvalue()
