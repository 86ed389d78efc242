"""Decoding of training clips, measured: clips a second of one core's time."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
from PIL import Image

from taehv.bench import Bench
from taehv.data import ClipDataset
from taehv.errors import UserError
from taehv.files import FileList, Source
from taehv.measure import Report
from taehv.sections import Data, Proxy
from taehv.video import VideoError, probe, read_frames, reencode

COLUMNS = {"video": 24, "way": 20, "clips/core-s": 12, "clips": 5}
FRAMES, SIDE, STRIDES, SCALES = 12, 128, (1, 3), (0.5, 1.0)
KINDS = ((900, 1600, 250), (900, 1600, 30), (720, 1280, 250))
"""Height, width and keyframe interval of the copies that are measured."""
COPIED_FRAMES = 750
CROPS = (1, 4, 8)


@dataclass(frozen=True)
class Draw:
    """A clip to decode: where, at which stride, and which box of the frame."""

    position: float
    stride: int
    scale: float
    y: float
    x: float

    @classmethod
    def next(cls, numbers: random.Random) -> Draw:
        """At random."""
        scale = numbers.uniform(*SCALES)
        stride = numbers.randint(*STRIDES)
        return cls(numbers.random(), stride, scale, numbers.random(), numbers.random())

    def frames(self, total: int) -> list[int]:
        """Numbers of its frames in a file of so many."""
        first = int(self.position * (total - (FRAMES - 1) * self.stride))
        return [first + i * self.stride for i in range(FRAMES)]

    def cut(self, frame_HWC: np.ndarray) -> np.ndarray:
        """Its box, a view of the frame."""
        height, width = frame_HWC.shape[:2]
        side = int(self.scale * min(height, width))
        top, left = int(self.y * (height - side)), int(self.x * (width - side))
        return frame_HWC[top : top + side, left : left + side]


def bench_data(bench: Bench) -> None:
    """Clips a second of core time, for several crops of a window and other decoders.

    Raises:
        UserError: no folder of videos is named.
    """
    if not bench.options.root:
        raise UserError("--data needs videos: name their folder by --root")
    files = Source.of(bench.options.root, "").files(images=False)
    others = _others(bench.report)
    bench.report.table(f"decoding clips of {FRAMES} x {SIDE} x {SIDE}", COLUMNS)
    with TemporaryDirectory(prefix="taehv-") as folder:
        for height, width, interval in KINDS:
            name = f"{width}x{height} g{interval}"
            copy = Path(folder) / f"{name}.mp4"
            write_copy(files, copy, height, width, interval, COPIED_FRAMES)
            _measure(bench, name, copy, others)
        small, proxy = Path(folder) / "proxy.mp4", Proxy()
        reencode(
            str(copy), str(small), proxy.height, proxy.keyframe_interval, proxy.crf
        )
        _measure(bench, f"its proxy, {proxy.height} lines", small, others)


def _measure(bench: Bench, name: str, video: Path, others: list[str]) -> None:
    for way, decode in _ways(str(video), others):
        rate, clips = clips_per_core_second(decode, bench.options.seconds)
        bench.report.row(video=name, way=way, **{"clips/core-s": rate, "clips": clips})


def clips_per_core_second(
    decode: Callable[[int], int], seconds: float
) -> tuple[float, int]:
    """How fast calls of `decode` are, and how many clips they gave.

    Args:
        decode: decodes the clips of a number and says how many there were.
        seconds: of the process's time, over all its threads, to spend at least.
    """
    decode(0)
    clips, start = 0, time.process_time()
    for number in itertools.count(1):
        clips += decode(number)
        if (spent := time.process_time() - start) >= seconds:
            return clips / spent, clips
    raise AssertionError


def write_copy(
    files: FileList,
    copy: Path,
    height: int,
    width: int,
    keyframe_interval: int,
    frames: int,
) -> None:
    """The start of the videos, one after the other, again if they are too short."""
    options = {"g": str(keyframe_interval), "sc_threshold": "0", "crf": "20"}
    options |= {"preset": "veryfast"}
    with av.open(str(copy), "w") as container:
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number, frame in enumerate(itertools.islice(_footage(files), frames)):
            scaled = frame.reformat(width, height, "yuv420p")
            scaled.pts, scaled.time_base = number, 1 / stream.average_rate
            scaled.pict_type = av.video.frame.PictureType.NONE
            container.mux(stream.encode(scaled))
        container.mux(stream.encode(None))


def _footage(files: FileList) -> Iterator[av.VideoFrame]:
    """Frames of the videos in turn, without end; of a bad one those before the damage.

    Raises UserError when none gives any.
    """
    while True:
        count = 0
        for i in range(len(files)):
            with suppress(VideoError):
                for frame_HWC in read_frames(files[i]):
                    count += 1
                    yield av.VideoFrame.from_ndarray(frame_HWC)
        if not count:
            raise UserError(
                f"--root {files.base} has no video that can be decoded: name another "
                "folder"
            )


def _others(report: Report) -> list[str]:
    """The packages beside PyAV that can decode here; says their versions."""
    told, found = [f"PyAV {av.__version__} with FFmpeg {av.ffmpeg_version_info}"], []
    for package, (module, _) in OTHERS.items():
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:  # or without its FFmpeg
            reason = str(error).strip().partition("\n")[0]
            told.append(f"no {package} ({reason})")
            continue
        name = importlib.metadata.packages_distributions()[module.partition(".")[0]][0]
        told.append(f"{package} {importlib.metadata.version(name)}")
        found.append(package)
    report.say(", ".join(told))
    return found


def _ways(path: str, others: list[str]) -> Iterator[tuple[str, Callable[[int], int]]]:
    total = probe(path).frames
    for crops in CROPS:
        yield f"taehv, K = {crops}", partial(_taehv, path, crops)
    yield "plain PyAV", partial(_pyav, path, total)
    for package in others:
        yield package, partial(OTHERS[package][1], path, total)


def _taehv(path: str, crops: int, number: int) -> int:
    sizes = {"frames": FRAMES, "height": SIDE, "width": SIDE}
    data = Data(
        **sizes, stride=[*STRIDES], crop_scale=[*SCALES], crops_per_window=crops
    )
    clips = ClipDataset(data, FileList.from_paths("/", [path]), seed=0)
    return len(clips.__getitems__(list(range(number * crops, (number + 1) * crops))))


def _resized(frames_HWC: list[np.ndarray]) -> int:
    """Scale the frames of one clip; the number of clips that gives."""
    for frame_HWC in frames_HWC:
        picture = Image.fromarray(np.ascontiguousarray(frame_HWC))
        np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return 1


def _pyav(path: str, total: int, number: int) -> int:
    draw = Draw.next(random.Random(number))
    wanted, found = draw.frames(total), []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        tick = 1 / stream.average_rate / stream.time_base
        container.seek(int(wanted[0] * tick), stream=stream)
        for frame in container.decode(stream):
            if round(frame.pts / tick) in wanted:
                found.append(draw.cut(frame.to_ndarray(format="rgb24")))
            if len(found) == FRAMES:
                break
    return _resized(found)


def _opencv(path: str, total: int, number: int) -> int:
    import cv2

    cv2.setNumThreads(1)
    draw = Draw.next(random.Random(number))
    wanted = draw.frames(total)
    video = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    video.set(cv2.CAP_PROP_POS_FRAMES, wanted[0])
    for place in range(wanted[0], wanted[-1] + 1):
        video.grab()
        if place in wanted:
            box = draw.cut(video.retrieve()[1])
            small = cv2.resize(box, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
            cv2.cvtColor(small, cv2.COLOR_BGR2RGB)
    video.release()
    return 1


def _torchcodec(path: str, total: int, number: int) -> int:
    from torchcodec.decoders import VideoDecoder

    draw = Draw.next(random.Random(number))
    video = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
    frames = video.get_frames_at(draw.frames(total)).data.numpy()
    return _resized([draw.cut(frame) for frame in frames])


OTHERS = {
    "OpenCV": ("cv2", _opencv),
    "torchcodec": ("torchcodec.decoders", _torchcodec),
}
"""The module of each package, and how it decodes."""
