"""Pictures and clips, pixel by pixel."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from taehv.visualize import error_map, gif, picture_strip, side_by_side, to_uint8


def clip(first: int, frames: int = 3) -> Tensor:
    """Frames of 4 x 5 pixels; frame t has the grey value `first` + t."""
    values = torch.arange(first, first + frames) / 255
    return values.view(-1, 1, 1, 1).expand(-1, 3, 4, 5)


def test_uint8_rounds_and_clamps() -> None:
    colours = torch.tensor([[-1.0, 0.0, 0.4 / 255], [0.6 / 255, 1.0, 2.0]])
    frames_THWC = to_uint8(colours.view(2, 3, 1, 1))
    assert frames_THWC.dtype == np.uint8
    assert frames_THWC.reshape(2, 3).tolist() == [[0, 0, 0], [1, 255, 255]]


def test_strip_has_the_input_above_the_reconstruction() -> None:
    picture_HWC = picture_strip([(clip(10), clip(20)), (clip(30), clip(40))], gap=2)
    # Four rows of 4 + 2 pixels, and 2 more between the clips; three frames of 5 + 2.
    assert picture_HWC.shape == (4 * 6 + 2, 3 * 7, 3) and picture_HWC.dtype == np.uint8
    expected = np.full_like(picture_HWC, 255)
    for top, first in ((0, 10), (6, 20), (14, 30), (20, 40)):
        for t in range(3):
            expected[top : top + 4, 7 * t : 7 * t + 5] = first + t
    assert np.array_equal(picture_HWC, expected)


@pytest.mark.parametrize(
    ("columns", "shown"), [(8, [0, 1, 2, 3, 4]), (3, [0, 2, 4]), (2, [0, 4])]
)
def test_strip_spreads_its_columns_over_the_clip(
    columns: int, shown: list[int]
) -> None:
    pair = (clip(0, 5), clip(100, 5))
    picture_HWC = picture_strip([pair], columns=columns, gap=0)
    assert picture_HWC[0, ::5, 0].tolist() == shown
    assert picture_HWC[4, ::5, 0].tolist() == [100 + t for t in shown]


def test_labels_stand_on_the_left_of_their_rows() -> None:
    clips = [(clip(10, 1), clip(20, 1))] * 2
    tall = [tuple(x.repeat(1, 1, 5, 1) for x in pair) for pair in clips]
    plain = picture_strip(tall, gap=0)
    labelled = picture_strip(tall, gap=0, labels=["input", ""])
    margin = labelled.shape[1] - plain.shape[1]
    assert margin > 0 and np.array_equal(labelled[:, margin:], plain)
    rows = labelled[:, :margin].reshape(4, 20, -1).min((1, 2))
    assert rows[0] < 100 and rows[2] < 100  # written on
    assert rows[1] == rows[3] == 255


def test_errors_are_five_times_as_bright() -> None:
    frames_TCHW = torch.full((1, 3, 2, 2), 0.5)
    decoded_TCHW = frames_TCHW.clone()
    decoded_TCHW[:, 0, 0, 0] += 0.1
    decoded_TCHW[:, 1, 0, 0] -= 0.02
    decoded_TCHW[:, 2, 1, 1] += 0.4
    error_TCHW = error_map(frames_TCHW, decoded_TCHW)
    assert error_TCHW[0, :, 0, 0].tolist() == pytest.approx([0.5, 0.1, 0], abs=1e-6)
    assert error_TCHW[0, :, 1, 1].tolist() == [0, 0, 1]
    assert error_TCHW.sum() == pytest.approx(1.6, abs=1e-6)


def test_side_by_side_shows_each_clip_in_turn() -> None:
    frames_THWC = side_by_side([(clip(10), clip(20)), (clip(30), clip(40))], repeat=2)
    assert frames_THWC.shape == (2 * 2 * 3, 4, 10, 3)
    assert (frames_THWC[:, :, :5] == frames_THWC[:, :1, :1]).all()
    assert (frames_THWC[:, :, 5:] == frames_THWC[:, :1, 5:6]).all()
    assert frames_THWC[:, 0, 0, 0].tolist() == [10, 11, 12] * 2 + [30, 31, 32] * 2
    assert frames_THWC[:, 0, 9, 0].tolist() == [20, 21, 22] * 2 + [40, 41, 42] * 2


@pytest.mark.parametrize(("rate", "milliseconds"), [(10, 100), (25, 40)])
def test_gif_keeps_count_rate_and_pixels(rate: float, milliseconds: int) -> None:
    frames_THWC = to_uint8(clip(50, 7))
    image = Image.open(io.BytesIO(gif(frames_THWC, rate)))
    assert image.format == "GIF" and image.n_frames == 7
    assert image.info["loop"] == 0
    for frame, expected in zip(ImageSequence.Iterator(image), frames_THWC, strict=True):
        assert frame.info["duration"] == milliseconds
        assert np.array_equal(np.asarray(frame.convert("RGB")), expected)
