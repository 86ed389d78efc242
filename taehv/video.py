"""One video file through PyAV: exact random access, crops, reading and writing."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from heapq import heappop, heappush
from math import inf
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from taehv.errors import UserError
from taehv.urls import UrlError, UrlReader, is_url
from taehv.writing import WholeWriter, whole

log = logging.getLogger("taehv")

DEFAULT_RATE = 25
"""Frames per second where a file does not tell."""
# Seconds before the window at which decoding is tried in turn; the last one is the
# start of the file.
REWINDS = (0.0, 0.5, 2.0, 8.0, float("inf"))
MOST_PACKETS = 2**30
"""Bytes of packets that are read to find a window."""
MOST_TICKS = 2**62
"""The longest duration, in units of the time base: FFmpeg's times have 64 bits."""
# The deepest reordering that H.264 and HEVC allow, in frames.
REORDER = 16
# Decoders that honour skip_frame packet by packet; others (dav1d) lose frames by it.
SKIPPING_DECODERS = ("h264", "hevc")
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# How many packets are looked at for keyframes.
KEYFRAMES_WITHIN = 600
SEEN_KEYFRAMES = 2
SCALE_FLAGS = "bicubic+accurate_rnd+full_chroma_int"
BT709 = 1
UNSPECIFIED_COLORSPACE = 2
LIMITED_RANGE = 1
FULL_RANGE = 2
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
COPY_TIME_BASE = Fraction(1, 90_000)
CONVERTERS = 4
"""Threads of a writer that convert frames: together faster than x264 takes them."""


class VideoError(Exception):
    """A file or a clip of it that cannot be decoded as asked; it costs a sample."""


class _Gap(VideoError):
    """Wanted frames did not come out; decoding from an earlier point may help."""


class _Disorder(VideoError):
    """Frames come out of the decoder in another order than their times say."""


@dataclass(frozen=True)
class VideoInfo:
    """What the header says; `duration` and `frames` are hints that may be wrong.

    Sizes are in pixels as displayed (after rotation), times in seconds, `rotation`
    in degrees counterclockwise; an unknown duration is None, unknown frames are 0.
    """

    width: int
    height: int
    start: float
    duration: float | None
    time_base: Fraction
    rate: Fraction | None
    rotation: int
    codec: str
    frames: int
    keyframe_interval: float
    """Frames from one keyframe to the next, on average over the start of the file."""


@dataclass(frozen=True)
class Crop:
    """A box of the displayed picture and what becomes of it, in all or some frames.

    The box has the aspect of `height` x `width` (the output, in pixels) and `scale`
    times the side of the largest such box that fits; `y` and `x` in [0, 1] place it
    in the room that is left (0.5: centred). It needs no knowledge of the file, so
    that it can be drawn before the file is opened.
    """

    height: int
    width: int
    scale: float = 1.0
    y: float = 0.5
    x: float = 0.5
    flip: bool = False
    first: int = 0
    """Of the window's frames, from 0."""
    frames: int | None = None
    """How many; None: all from the first on."""

    def takes(self, number: int) -> bool:
        """Whether frame `number` of the window is in it."""
        last = inf if self.frames is None else self.first + self.frames
        return self.first <= number < last


def probe(path: str) -> VideoInfo:
    """Describe the video stream of `path`; decodes one frame for the rotation.

    Raises VideoError when the file cannot be opened or has no decodable video.
    """
    with _opened(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise VideoError(f"{path} has no frames")
        height, width = _displayed_size(frame)
        interval = _keyframe_interval(container, stream)
        start, duration = _extent(container, stream)
        return VideoInfo(
            width=width,
            height=height,
            start=float(start * stream.time_base),
            duration=None if duration is None else float(duration * stream.time_base),
            time_base=stream.time_base,
            rate=stream.average_rate,
            rotation=_quarter_turns(frame) * 90,
            codec=stream.codec_context.name,
            frames=stream.frames,
            keyframe_interval=interval,
        )


def is_image(path: str) -> bool:
    """Whether a file is a still image, by its name."""
    return path.lower().endswith(IMAGE_SUFFIXES)


def _keyframe_interval(container: InputContainer, stream: VideoStream) -> float:
    """From the table of a whole MP4, else from the packets after the first."""
    if "mp4" in container.format.name and len(stream.index_entries) > 1:
        entries = itertools.islice(stream.index_entries, KEYFRAMES_WITHIN)
        are_keys = [entry.is_keyframe for entry in entries]
    else:
        are_keys = [True]
        for packet in itertools.islice(container.demux(stream), KEYFRAMES_WITHIN):
            are_keys += [packet.is_keyframe] if packet.size else []
            if sum(are_keys) > SEEN_KEYFRAMES:
                return (len(are_keys) - 1) / SEEN_KEYFRAMES
    return len(are_keys) / max(1, sum(are_keys))


def read_frames(path: str) -> Iterator[np.ndarray]:
    """Decode `path` from start to end: uint8 RGB frames HWC, as displayed.

    Raises VideoError when the file cannot be opened or a frame is damaged.
    """
    cropper = _Cropper(None)
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            yield cropper(frame)


@dataclass(frozen=True)
class TimedFrame:
    """A frame, uint8 RGB, and when it is shown: in units of its video's time base."""

    pixels_HWC: np.ndarray
    pts: int
    duration: int


class TimedFrames:
    """All frames of a file in their order, as displayed, with times that increase.

    Times count from the start of the file, sound included. Frames that carry none get
    them from the rate. Damaged frames before the first whole one are left out, as of a
    recording that begins between keyframes.

    Args:
        path: of the file.
        threads: that convert frames to RGB; the decoder has its own.

    Raises:
        VideoError: the file cannot be opened, or, while it is read, a frame is damaged
            or of another size than the first.
    """

    def __init__(self, path: str, threads: int = 1) -> None:
        self.path = path
        self._threads = threads
        with _opened(path) as (container, stream):
            self.rate = _rate(stream)
            self.frames = stream.frames
            """By the header: a hint; 0 where it does not tell."""
            self._counts = _untimed(container, stream)
            self.time_base = 1 / self.rate if self._counts else stream.time_base
            start = Fraction(container.start_time or 0, av.time_base)
            self._start = round(start / self.time_base)
            self.pixel_aspect = Fraction(stream.sample_aspect_ratio or 1)

    def __iter__(self) -> Iterator[TimedFrame]:
        local = threading.local()

        def convert(frame: VideoFrame) -> np.ndarray:
            if not hasattr(local, "cropper"):
                local.cropper = _Cropper(None)
            return local.cropper(frame)

        waiting: deque[tuple[Future[np.ndarray], int, int]] = deque()
        with (
            ThreadPoolExecutor(self._threads) as pool,
            _opened(self.path) as (container, stream),
        ):
            stream.thread_type = "AUTO"
            for frame, pts, duration in self._timed(container.decode(stream)):
                waiting.append((pool.submit(convert, frame), pts, duration))
                if len(waiting) > self._threads:
                    future, *times = waiting.popleft()
                    yield TimedFrame(future.result(), *times)
            for future, *times in waiting:
                yield TimedFrame(future.result(), *times)

    def _timed(
        self, frames: Iterator[VideoFrame]
    ) -> Iterator[tuple[VideoFrame, int, int]]:
        nominal = max(1, round(1 / self.rate / self.time_base))
        following = 0
        for frame, time in _in_time(self._whole(frames)):
            timed = not self._counts and time is not None
            pts = max(following, time - self._start) if timed else following
            duration = (timed and frame.duration) or nominal
            following = pts + (1 if timed else duration)
            yield frame, pts, duration

    def _whole(self, frames: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
        size = None
        for frame in frames:
            if frame.is_corrupt and size is None:
                continue
            size = size or (frame.width, frame.height)
            if frame.is_corrupt or size != (frame.width, frame.height):
                what = "is damaged" if frame.is_corrupt else "has another size"
                raise VideoError(f"{self.path}: the frame at {frame.time} s {what}")
            yield frame
        if size is None:
            raise VideoError(f"{self.path} has no frames")


def _in_time(frames: Iterator[VideoFrame]) -> Iterator[tuple[VideoFrame, int | None]]:
    """Frames with their times, which careless muxers give to the wrong ones."""
    waiting: deque[VideoFrame] = deque()
    times: list[int] = []
    for frame in itertools.chain(frames, itertools.repeat(None)):
        if frame is not None:
            waiting.append(frame)
            if frame.pts is not None:
                heappush(times, frame.pts)
        elif not waiting:
            return
        if frame is None or len(waiting) > REORDER:
            yield waiting.popleft(), heappop(times) if times else None


@dataclass
class Tally:
    """What decoding takes."""

    packets: int = 0
    """Given to the decoder."""


def decode_window(
    path: str,
    position: float,
    frames: int,
    stride: int,
    crops: list[Crop],
    tally: Tally | None = None,
) -> list[np.ndarray]:
    """Decode one window of a file and cut every crop from it.

    The window is `frames` frames, `stride` apart, at `position` in [0, 1] of the
    possible starts. Returns one uint8 RGB array THWC for each crop, equal to what
    sequential decoding gives. A file too short for the stride is read with the
    largest stride that fits. A still image stands still. Pixels are taken as square.
    What it takes is added to `tally`. Raises VideoError when the file is shorter than
    `frames` or a frame of the window is missing or flagged as damaged by the decoder:
    damage that the decoder conceals without a flag goes unseen.
    """
    if is_image(path):
        return _still(path, frames, crops)
    window = _Window(path, position, frames, stride, crops, tally or Tally())
    reason = _Gap(f"{path}: no attempt was made")
    for rewind in REWINDS:
        try:
            return window.decode(rewind)
        except _Gap as gap:
            reason = gap
    raise VideoError(str(reason)) from reason


def _still(path: str, frames: int, crops: list[Crop]) -> list[np.ndarray]:
    with _opened(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None or frame.is_corrupt:
            raise VideoError(f"{path} is no whole picture")
        pictures = [_Cropper(crop)(frame) for crop in crops]
    lengths = [sum(map(crop.takes, range(frames))) for crop in crops]
    pairs = zip(pictures, lengths, strict=True)
    return [np.repeat(picture[None], length, 0) for picture, length in pairs]


class VideoWriter(WholeWriter):
    """Writes uint8 RGB frames HWC as H.264 in MP4, BT.709 limited range, yuv420p.

    Odd sizes are padded to even ones by repeating the last row or column. Threads
    convert the frames that come next while one is encoded. See WholeWriter.

    Args:
        path: where to.
        rate: frames per second.
        time_base: seconds in a unit of the times that `write` is given, if it is.
        crf: constant rate factor of x264: 0 is lossless, 18 hard to tell from it.
        pixel_aspect: width over height of a pixel.
        sound: a file whose audio tracks are copied as they are, as far as MP4 has
            their formats.
    """

    def __init__(
        self,
        path: str | Path,
        rate: float | Fraction,
        *,
        time_base: Fraction | None = None,
        crf: int = 18,
        pixel_aspect: Fraction = Fraction(1),
        sound: str | None = None,
    ) -> None:
        super().__init__(path)
        self.rate = Fraction(rate).limit_denominator(1001)
        self.time_base = time_base or 1 / self.rate
        self.crf = crf
        self.pixel_aspect = pixel_aspect
        self._stream: VideoStream | None = None
        self._shape: tuple[int, ...] = ()
        self._written = 0
        self._waiting: deque[tuple[Future[VideoFrame], int, int]] = deque()
        self._source = sound
        self._sound: _Sound | None = None

    @property
    def is_padded(self) -> bool:
        """Whether the frames written were of an odd size."""
        return any(side % 2 for side in self._shape[:2])

    def _open(self, unfinished: Path) -> None:
        self._container = _new_mp4(unfinished)
        self._pool = ThreadPoolExecutor(CONVERTERS, "convert")

    def write(
        self, frame_HWC: np.ndarray, pts: int | None = None, duration: int | None = None
    ) -> None:
        """Append a frame; all frames have the size of the first.

        `pts` and `duration`, in units of the time base, say when and how long it is
        shown; by default it follows the one before. The frame is read later: leave it
        as it is.

        Raises:
            ValueError: it is of another size or type.
        """
        if self._stream is None:
            self._shape = height, width, _ = frame_HWC.shape
            self._stream = self._new_stream(height + height % 2, width + width % 2)
            self._converter = _Converter(self._stream.height, self._stream.width)
            if self._source is not None:
                self._sound = _Sound(self._source, self._container)
        if frame_HWC.shape != self._shape or frame_HWC.dtype != np.uint8:
            raise ValueError(f"{frame_HWC.dtype} {frame_HWC.shape}: not as the first")
        times = self._written if pts is None else pts, duration or 1
        self._written += 1
        self._waiting.append((self._pool.submit(self._converter, frame_HWC), *times))
        if len(self._waiting) > CONVERTERS:
            self._encode(*self._waiting.popleft())

    def _encode(self, converted: Future[VideoFrame], pts: int, duration: int) -> None:
        frame = converted.result()
        frame.pts, frame.duration, frame.time_base = pts, duration, self.time_base
        self._container.mux(self._stream.encode(frame))
        if self._sound is not None:
            self._sound.copy(until=pts * self.time_base)

    def _close(self, is_good: bool) -> None:
        try:
            if is_good and self._stream is not None:
                while self._waiting:
                    self._encode(*self._waiting.popleft())
                self._container.mux(self._stream.encode(None))
                if self._sound is not None:
                    self._sound.copy()
            self._container.close()
        finally:
            self._pool.shutdown(cancel_futures=True)
            if self._sound is not None:
                self._sound.close()

    def _new_stream(self, height: int, width: int) -> VideoStream:
        stream = self._container.add_stream("libx264", rate=self.rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": str(self.crf)}
        context = stream.codec_context
        # PyAV's default is slices of one frame after the other: slower, and larger.
        context.thread_type = "FRAME"
        context.time_base = self.time_base
        context.sample_aspect_ratio = self.pixel_aspect
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        return stream


class _Converter:
    """Turns uint8 RGB frames HWC into yuv420p of an even size, in any thread.

    A thread keeps what swscale sets up, which for each frame anew, with as many threads
    as there are cores, takes longer than the frame.
    """

    def __init__(self, height: int, width: int) -> None:
        self._size = height, width
        self._local = threading.local()

    def __call__(self, frame_HWC: np.ndarray) -> VideoFrame:
        height, width = self._size
        if not hasattr(self._local, "reformatter"):
            self._local.reformatter = VideoReformatter()
            self._local.picture = VideoFrame(width, height, "rgb24")
        # swscale reads past the end of rows, for which PyAV's frames have room.
        picture = self._local.picture
        (plane,) = picture.planes
        strides = plane.line_size, 3, 1
        pixels_HWC = np.ndarray((height, width, 3), np.uint8, plane, 0, strides)
        rows, columns = frame_HWC.shape[:2]
        pixels_HWC[:rows, :columns] = frame_HWC
        pixels_HWC[rows:] = pixels_HWC[rows - 1 : rows]
        pixels_HWC[:, columns:] = pixels_HWC[:, columns - 1 : columns]
        return self._local.reformatter.reformat(
            picture,
            format="yuv420p",
            dst_colorspace=BT709,
            dst_color_range=LIMITED_RANGE,
            interpolation="BICUBIC",
            threads=1,
        )


class _Sound:
    """The audio packets of a file, copied as far as the video has come."""

    def __init__(self, path: str, output: OutputContainer) -> None:
        self._output = output
        self._open = ExitStack()
        self._input = self._open.enter_context(_container(path))
        self._start = Fraction(self._input.start_time or 0, av.time_base)
        self._tracks = {}
        for track in self._input.streams.audio:
            codec = track.codec_context and track.codec_context.codec.canonical_name
            if codec in output.supported_codecs:
                copy = output.add_stream_from_template(track)
                self._tracks[track.index] = copy
            else:
                log.warning(f"{path}: MP4 has no {codec or 'such'} audio; left out")
        used = [self._input.streams[index] for index in self._tracks]
        self._packets = self._input.demux(used) if used else iter(())
        self._next: Packet | None = None

    def copy(self, until: Fraction | float = inf) -> None:
        """Write what belongs before a time in seconds."""
        while True:
            packet = self._next or next(self._packets, None)
            if packet is None:
                return
            if packet.dts is None or packet.size == 0:
                self._next = None
                continue
            if self._next is None:
                shift = round(self._start / packet.time_base)
                packet.dts -= shift
                packet.pts -= shift
            if packet.dts * packet.time_base > until:
                self._next = packet
                return
            packet.stream, self._next = self._tracks[packet.stream.index], None
            self._output.mux(packet)

    def close(self) -> None:
        """Close the file that is read."""
        self._open.close()


def reencode(
    path: str, target: str, height: int, keyframe_interval: int, crf: int
) -> None:
    """Write a copy that decodes faster: H.264 in MP4, upright, with the same times.

    Its shorter side has `height` pixels, or fewer where the original has; there are
    no B-frames and no sound. The file appears when it is whole. Raises VideoError
    when a part of the original cannot be decoded, UserError when the disk is full.
    """
    with (
        whole(target) as unfinished,
        _opened(path) as (source, stream),
        _blaming_the_disk(target),
        _new_mp4(unfinished) as container,
    ):
        copier = _Copier(container, height, keyframe_interval, crf, _rate(stream))
        for time, frame in _timed_frames(path, source, stream):
            copier.write(time, frame)
        copier.finish(path)


def _new_mp4(path: Path) -> OutputContainer:
    options = {"movflags": "+faststart"}
    return av.open(str(path), "w", format="mp4", options=options)


@contextmanager
def _blaming_the_disk(target: str) -> Iterator[None]:
    """Tell a disk that takes no more from a video that cannot be read."""
    try:
        yield
    except av.FFmpegError as error:
        if error.errno in DISK_ERRORS:
            raise UserError(f"cannot write {target}: {error.strerror}") from error
        raise


def _rate(stream: VideoStream) -> Fraction:
    """Frames per second, by the header if it tells."""
    return Fraction(stream.average_rate or stream.guessed_rate or DEFAULT_RATE)


def _timed_frames(
    path: str, container: InputContainer, stream: VideoStream
) -> Iterator[tuple[Fraction, VideoFrame]]:
    """Whole frames and their times in seconds, from 0."""
    counted = _untimed(container, stream)
    rate = _rate(stream)
    first, last = None, -1
    whole = _whole_frames(path, container.decode(stream))
    for number, (frame, pts) in enumerate(_in_time(whole)):
        is_timed = not counted and pts is not None
        time = pts * stream.time_base if is_timed else number / rate
        first = time if first is None else first
        if time - first <= last:
            raise VideoError(f"{path}: the times of its frames are out of order")
        last = time - first
        yield last, frame


def _whole_frames(path: str, frames: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    """Those from the first keyframe on, none of which may be damaged."""
    started = False
    for frame in frames:
        if frame.is_corrupt and started:
            raise VideoError(f"{path}: a frame is damaged")
        if not frame.is_corrupt:
            started = True
            yield frame


class _Copier:
    """Scales, turns and encodes the frames of one video."""

    def __init__(
        self,
        container: OutputContainer,
        height: int,
        keyframe_interval: int,
        crf: int,
        rate: Fraction,
    ) -> None:
        self.container = container
        self.height = height
        self.rate = rate
        self.options = {"g": str(keyframe_interval), "bf": "0", "crf": str(crf)}
        # Without CABAC and deblocking, decoding takes half the time: 0.55 ms a frame of
        # 640x360 for 1.18. Files are 9 to 17 % larger, and 0.1 to 0.5 dB of 47 worse.
        lean = "cabac=0:no-deblock=1"
        self.options |= {"preset": "fast", "threads": "1", "x264-params": lean}
        self._stream: VideoStream | None = None
        self._graphs: dict[tuple, av.filter.Graph] = {}

    def write(self, time: Fraction, frame: VideoFrame) -> None:
        """Append a frame."""
        if self._stream is None:
            self._stream = self._new_stream(frame)
        key = _graph_key(frame)
        if key not in self._graphs:
            size = self._stream.height, self._stream.width
            self._graphs[key] = _build_copy_graph(frame, *size)
        self._graphs[key].vpush(frame)
        copy = self._graphs[key].vpull()
        copy.pts, copy.time_base = round(time / COPY_TIME_BASE), COPY_TIME_BASE
        copy.pict_type = PictureType.NONE
        self.container.mux(self._stream.encode(copy))

    def finish(self, path: str) -> None:
        """Write what is still held back."""
        if self._stream is None:
            raise VideoError(f"{path} has no frames")
        self.container.mux(self._stream.encode(None))

    def _new_stream(self, frame: VideoFrame) -> VideoStream:
        height, width = _displayed_size(frame)
        scale = min(1, Fraction(self.height, min(height, width)))
        stream = self.container.add_stream("libx264", self.rate, self.options)
        stream.height, stream.width = (
            max(2, round(side * scale / 2) * 2) for side in (height, width)
        )
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.time_base = COPY_TIME_BASE
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        return stream


def _build_copy_graph(frame: VideoFrame, height: int, width: int) -> av.filter.Graph:
    """Scale to the displayed size height x width and turn upright."""
    turns = _quarter_turns(frame)
    size = f"{height}:{width}" if turns % 2 else f"{width}:{height}"
    scale = f"{size}:flags={SCALE_FLAGS}:out_color_matrix=bt709:out_range=tv"
    upright = {0: [], 1: [("transpose", "cclock")], 3: [("transpose", "clock")]}
    upright[2] = [("hflip", None), ("vflip", None)]
    return _linked(
        frame,
        ("scale", scale + _assumed_matrix(frame)),
        ("format", "yuv420p"),
        *upright[turns],
    )


def write_mp4(
    path: str | Path, frames_THWC: np.ndarray, rate: float | Fraction
) -> None:
    """Write uint8 RGB frames THWC at `rate` frames per second; see VideoWriter."""
    with VideoWriter(path, rate) as writer:
        for frame_HWC in frames_THWC:
            writer.write(frame_HWC)


@contextmanager
def _container(path: str) -> Iterator[InputContainer]:
    """A file, or what lies under a URL."""
    if not is_url(path):
        # What waits for a writer, such as a pipe, would never end.
        if not os.path.isfile(path) and os.path.exists(path):
            raise VideoError(f"{path} is no file")
        with av.open(path, metadata_errors="ignore") as container:
            yield container
        return
    with closing(UrlReader(path)) as reader:
        try:
            with av.open(reader, metadata_errors="ignore") as container:
                yield container
        finally:
            reader.check()


@contextmanager
def _opened(path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    kind = VideoError
    try:
        with _container(path) as container:
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise VideoError(f"{path} has no video stream that can be decoded")
            stream.thread_type = "NONE"
            kind = _Gap
            yield container, stream
    except (av.FFmpegError, UrlError) as error:
        raise kind(f"{path}: {error.strerror}") from error
    except OverflowError as error:  # its times and FFmpeg's numbers
        raise VideoError(f"{path}: a time is out of range ({error})") from error


def _extent(container: InputContainer, stream: VideoStream) -> tuple[int, int | None]:
    """Start and duration in the stream's time base, by the header.

    A duration that no file can have is taken as unknown.
    """
    start, duration = stream.start_time or 0, stream.duration
    if duration is None and container.duration is not None:
        duration = int(Fraction(container.duration, av.time_base) / stream.time_base)
    is_possible = duration is not None and 0 <= duration <= MOST_TICKS
    return start, duration if is_possible else None


@dataclass(frozen=True)
class _Window:
    path: str
    position: float
    frames: int
    stride: int
    crops: list[Crop]
    tally: Tally

    @property
    def span(self) -> int:
        """Source frames from the first to the last of the window."""
        return (self.frames - 1) * self.stride + 1

    def decode(self, rewind: float) -> list[np.ndarray]:
        """One attempt that starts to decode `rewind` seconds before the window."""
        with _opened(self.path) as (container, stream):
            if _untimed(container, stream):
                return self._decode_by_count()
            target = self._target(container, stream)
            from_start = _seek(container, stream, target, rewind)
            packets = _collect(container, stream, target, self.span)
            times = sorted(packet.pts for packet in packets if _is_shown(packet))
            wanted = self._choose(times, target, from_start)
            try:
                return self._cut(_decode(stream, packets, wanted, self.tally))
            except _Disorder:
                return self._decode_by_count()

    def _target(self, container: InputContainer, stream: VideoStream) -> int:
        start, duration = _extent(container, stream)
        if duration is None:
            duration = _end_time(self.path) - start
        rate = stream.average_rate or stream.guessed_rate
        span = self.span / rate / stream.time_base if rate else 0
        return start + int(Fraction(self.position) * max(0, duration - span))

    def _choose(self, times: list[int], target: int, from_start: bool) -> list[int]:
        """Times of the window's frames, from the sorted times of all packets seen."""
        if not from_start and (len(times) < self.span or times[0] > target):
            raise _Gap(f"{self.path}: frames before {target} are out of reach")
        first = bisect_left(times, target)
        if len(times) < self.span:
            first, stride = self._fit(len(times))
        else:
            # Too near the end: the header promised more than there is.
            first, stride = min(first, len(times) - self.span), self.stride
        return times[first : first + (self.frames - 1) * stride + 1 : stride]

    def _fit(self, total: int) -> tuple[int, int]:
        """First frame and stride within a file of `total` frames."""
        if total < self.frames:
            raise VideoError(
                f"{self.path} has {total} frames and {self.frames} are needed"
            )
        stride = min(self.stride, (total - 1) // max(1, self.frames - 1))
        starts = total - (self.frames - 1) * stride
        return min(int(self.position * starts), starts - 1), stride

    def _cut(self, frames: Iterator[VideoFrame]) -> list[np.ndarray]:
        croppers = [_Cropper(crop) for crop in self.crops]
        clips: list[list[np.ndarray]] = [[] for _ in self.crops]
        count = 0
        for count, frame in enumerate(frames, 1):
            for crop, cropper, clip in zip(self.crops, croppers, clips, strict=True):
                if crop.takes(count - 1):
                    clip.append(cropper(frame))
        if count < self.frames:
            raise _Gap(f"{self.path}: {count} of {self.frames} frames came out")
        return [np.stack(clip) for clip in clips]

    def _decode_by_count(self) -> list[np.ndarray]:
        """Without usable times: from the start of the file, by counting frames."""
        with _opened(self.path) as (container, stream):
            total = sum(packet.size > 0 for packet in container.demux(stream))
        first, stride = self._fit(total)
        wanted = range(first, first + (self.frames - 1) * stride + 1, stride)
        with _opened(self.path) as (container, stream):
            numbered = enumerate(container.decode(stream))
            self.tally.packets += wanted[-1] + 1
            upto_last = zip(range(wanted[-1] + 1), numbered, strict=False)
            chosen = (frame for _, (number, frame) in upto_last if number in wanted)
            return self._cut(map(self._whole, chosen))

    def _whole(self, frame: VideoFrame) -> VideoFrame:
        """A frame that decoding from the start gave; there is no better way to it."""
        if frame.is_corrupt:
            raise VideoError(f"{self.path}: a frame of the window is damaged")
        return frame


def _untimed(container: InputContainer, stream: VideoStream) -> bool:
    """Whether frames carry no times (raw streams) or wrong ones (AVI with B-frames)."""
    wrong = container.format.name == "avi" and stream.codec_context.has_b_frames
    return stream.start_time is None or bool(wrong)


def _end_time(path: str) -> int:
    """Where the last frame ends, for files whose header has no duration."""
    with _opened(path) as (container, stream):
        timed = (p for p in container.demux(stream) if p.pts is not None)
        return max((packet.pts + packet.duration for packet in timed), default=0)


def _seek(
    container: InputContainer, stream: VideoStream, target: int, rewind: float
) -> bool:
    """Go to a keyframe `rewind` seconds before target; True at the file's start."""
    start = stream.start_time or 0
    if target - rewind / stream.time_base <= start:
        return True
    container.seek(int(target - rewind / stream.time_base), stream=stream)
    return False


def _is_shown(packet: Packet) -> bool:
    """False for a packet that an edit list cuts away or that carries no time."""
    return packet.pts is not None and not packet.is_discard


def _collect(
    container: InputContainer, stream: VideoStream, target: int, span: int
) -> list[Packet]:
    """Packets until the `span` frames from target on are surely among them."""
    packets: list[Packet] = []
    missing, size = span + REORDER, 0
    for packet in container.demux(stream):
        if packet.size == 0:
            continue
        packets.append(packet)
        size += packet.size
        if size > MOST_PACKETS:  # a damaged file, of which nothing can be sought
            raise VideoError(
                f"{container.name}: {size >> 20} MiB before the window that is sought"
            )
        missing -= _is_shown(packet) and packet.pts >= target
        if missing == 0:
            break
    return packets


def _decode(
    stream: VideoStream, packets: list[Packet], wanted: list[int], tally: Tally
) -> Iterator[VideoFrame]:
    """The frames at the wanted times, in order, as far as the first gap."""
    context = stream.codec_context
    skipping = context.codec.name in SKIPPING_DECODERS and not _suspicious(
        context, packets
    )
    last, rest = None, wanted[::-1]
    for packet in (*packets, None):
        if skipping and packet is not None:
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        tally.packets += 1
        for frame in context.decode(packet):
            if last is not None and frame.pts is not None and frame.pts < last:
                raise _Disorder(f"frame {frame.pts} after {last}")
            last = frame.pts
            if rest and frame.pts == rest[-1] and not frame.is_corrupt:
                rest.pop()
                yield frame
        if not rest:
            return


def _suspicious(context: VideoCodecContext, packets: list[Packet]) -> bool:
    """Whether frames are reordered but their times are not, by a careless muxer.

    Then every frame is decoded, so that the disorder shows.
    """
    reordered = any(packet.pts != packet.dts for packet in packets)
    return bool(context.has_b_frames) and not reordered


def _quarter_turns(frame: VideoFrame) -> int:
    """Counterclockwise quarter turns, 0 to 3, that the display asks for."""
    return round(frame.rotation / 90) % 4


def _displayed_size(frame: VideoFrame) -> tuple[int, int]:
    size = (frame.height, frame.width)
    return size if _quarter_turns(frame) % 2 == 0 else size[::-1]


class _Cropper:
    """Turns decoded frames into uint8 RGB arrays HWC; None takes the whole frame."""

    def __init__(self, crop: Crop | None) -> None:
        self.crop = crop
        self._graphs: dict[tuple, av.filter.Graph] = {}

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        crop = self.crop or Crop(*_displayed_size(frame))
        key = _graph_key(frame)
        if key not in self._graphs:
            self._graphs[key] = _build_graph(frame, crop)
        graph = self._graphs[key]
        graph.vpush(frame)
        # The decoder leaves rotation alone: turn the small crop, not the frame.
        picture = np.rot90(graph.vpull().to_ndarray(), _quarter_turns(frame))
        return np.ascontiguousarray(picture[:, ::-1] if crop.flip else picture)


def _build_graph(frame: VideoFrame, crop: Crop) -> av.filter.Graph:
    """Crop, scale and conversion to RGB, in the frame's own orientation.

    In planes, which swscale writes two to four times as fast as packed pixels, and the
    same values.
    """
    height, width, top, left = _box(frame, crop)
    turned = _quarter_turns(frame) % 2
    out_height, out_width = (
        (crop.width, crop.height) if turned else (crop.height, crop.width)
    )
    scale = f"{out_width}:{out_height}:flags={SCALE_FLAGS}"
    return _linked(
        frame,
        ("crop", f"{width}:{height}:{left}:{top}:exact=1"),
        ("scale", scale + _assumed_matrix(frame)),
        ("format", "gbrp"),
    )


def _assumed_matrix(frame: VideoFrame) -> str:
    """BT.709 for large frames that do not say; the default is BT.601."""
    untagged = frame.colorspace == UNSPECIFIED_COLORSPACE
    return ":in_color_matrix=bt709" if untagged and frame.height >= 720 else ""


def _linked(frame: VideoFrame, *filters: tuple[str, str | None]) -> av.filter.Graph:
    """A chain of filters that takes frames like this one."""
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width,
        height=frame.height,
        format=frame.format,
        time_base=Fraction(1),
    )
    nodes = [graph.add(name, settings) for name, settings in filters]
    graph.link_nodes(source, *nodes, graph.add("buffersink")).configure()
    return graph


def _graph_key(frame: VideoFrame) -> tuple:
    """What a graph depends on."""
    key = (frame.width, frame.height, frame.format.name, frame.colorspace)
    return (*key, frame.color_range, frame.rotation)


def _box(frame: VideoFrame, crop: Crop) -> tuple[int, int, int, int]:
    """Height, width, top and left of the crop in the frame before rotation."""
    shown_height, shown_width = _displayed_size(frame)
    largest = min(shown_height / crop.height, shown_width / crop.width)
    height = max(1, round(crop.scale * largest * crop.height))
    width = max(1, round(crop.scale * largest * crop.width))
    top = int(crop.y * (shown_height - height))
    left = int(crop.x * (shown_width - width))
    bottom, right = shown_height - top - height, shown_width - left - width
    height, width, top, left = (
        (height, width, top, left),
        (width, height, left, bottom),
        (height, width, bottom, right),
        (width, height, right, top),
    )[_quarter_turns(frame)]
    # Chroma is stored for pairs of pixels: an odd corner would shift the colours.
    return height, width, top & ~1, left & ~1
