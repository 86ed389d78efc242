"""Small videos whose frames carry their number in big blocks."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 8


def numbered_frame(number: int, height: int, width: int) -> np.ndarray:
    """uint8 RGB HWC: two rows of four blocks are the bits of number, with texture."""
    bits = np.array([number >> bit & 1 for bit in range(BITS)]).reshape(2, 4)
    rows = np.arange(height) * 2 // height
    columns = np.arange(width) * 4 // width
    blocks = np.where(bits[rows][:, columns], 200, 40)[..., None]
    texture = np.random.default_rng(number).integers(-20, 20, (height, width, 3))
    return (blocks + texture).clip(0, 255).astype(np.uint8)


def number_of(frame_HWC: np.ndarray) -> int:
    """Read the number back from a whole frame of any size."""
    height, width = frame_HWC.shape[0] // 2, frame_HWC.shape[1] // 4
    bits = [
        frame_HWC[r * height : (r + 1) * height, c * width : (c + 1) * width].mean()
        for r in range(2)
        for c in range(4)
    ]
    return sum(int(mean > 120) << bit for bit, mean in enumerate(bits))


def numbers_of(frames_THWC: np.ndarray) -> list[int]:
    return [number_of(frame) for frame in frames_THWC]


def make_video(
    path: Path,
    frames: int = 40,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    size: tuple[int, int] = (48, 64),
    times: list[int] | None = None,
    times_are_dts: bool = False,
    rotation: int = 0,
    pixel_format: str = "yuv420p",
) -> Path:
    """Encode numbered frames at 25 per second, or at the given times in 1/1000 s.

    `times_are_dts` numbers packets in decoding order, as careless muxers do.
    """
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt = pixel_format
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        time_base = Fraction(1, 1000) if times else Fraction(1, 25)
        stream.codec_context.time_base = time_base
        images = [
            av.VideoFrame.from_ndarray(numbered_frame(i, *size)) for i in range(frames)
        ]
        for i, image in enumerate(images):
            image.pts = times[i] if times else i
            image.time_base = time_base
        packets = [p for image in (*images, None) for p in stream.encode(image)]
        for i, packet in enumerate(packets):
            if times_are_dts:
                packet.pts = packet.dts = i
            container.mux(packet)
    return path


def promise(path: Path, seconds: float, ticks: int = 1_000_000) -> None:
    """Have a Matroska file's header tell of another duration.

    `ticks` are the nanoseconds in a unit of the file's times.
    """
    content = bytearray(path.read_bytes())
    # The elements TimestampScale, an integer, and Duration, a float64.
    place = content.index(b"\x2a\xd7\xb1\x83") + 4
    content[place : place + 3] = ticks.to_bytes(3, "big")
    place = content.index(b"\x44\x89\x88") + 3
    content[place : place + 8] = np.array(1e9 * seconds / ticks, ">f8").tobytes()
    path.write_bytes(content)
