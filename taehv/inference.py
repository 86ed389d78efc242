"""Videos, image folders and latents through a model, of any length and size.

python -m taehv.inference outputs/NAME video.mp4                # -> reconstructed/
python -m taehv.inference taew2_1.pth videos/ --output out --side-by-side
python -m taehv.inference taew2_1.pth video.mp4 --to latents --output video.safetensors
python -m taehv.inference taew2_1.pth video.safetensors --latents --output video.mp4

MP4 has even heights and widths alone: odd ones gain a row or a column. A search of a
folder leaves the output folder out, and takes folders of images where no video is.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from taehv.errors import Parser, UserError, run_command
from taehv.files import VIDEO_SUFFIXES
from taehv.logging import set_up_console
from taehv.media import (
    LATENT_SUFFIXES,
    ImageFrames,
    ImageWriter,
    LatentFile,
    LatentWriter,
    images_in,
)
from taehv.model import TAEHV
from taehv.pools import cores
from taehv.pretrained import (
    add_device_arguments,
    choose_device,
    choose_dtype,
    load_model,
    place,
)
from taehv.streaming import StreamingTAEHV
from taehv.urls import local_path
from taehv.variants import CHUNK_FRAMES
from taehv.video import TimedFrame, TimedFrames, VideoError, VideoWriter

log = logging.getLogger("taehv")

T = TypeVar("T")
Times = tuple[int, int]
"""When a frame is shown and how long, in units of its video's time base."""

SUFFIXES = {"video": ".mp4", "images": "", "latents": ".safetensors"}
AHEAD = 2
"""Chunks that wait between reading, the network and writing."""
MOST_FRAMES, MOST_PIXELS = 64, 16 * 1280 * 720
"""Of a call on a GPU, which more would keep no busier."""
LIVE_ACTIVATIONS = 8
"""About how many activations of full size and 64 channels a call keeps at a time."""
FILE_ERRORS = (UserError, VideoError, OSError, av.FFmpegError, torch.OutOfMemoryError)
"""What may be wrong with one file, and costs that file alone."""


# --- frames through the model ------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """Frames in a row, uint8 RGB, with their times."""

    frames_THWC: Tensor
    times: list[Times]


class Download:
    """Frames, uint8 RGB, on their way from the device."""

    def __init__(self, frames_THWC: Tensor, times: Sequence[Times]) -> None:
        self.times = times
        self._frames_THWC, self._copied = frames_THWC, None
        if frames_THWC.is_cuda:
            self._frames_THWC = torch.empty(
                frames_THWC.shape, dtype=frames_THWC.dtype, pin_memory=True
            )
            self._frames_THWC.copy_(frames_THWC, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def frames(self) -> np.ndarray:
        """Wait for them: frames_THWC."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._frames_THWC.numpy()


class Codec:
    """A model on its device that takes videos chunk by chunk.

    Every call of the network has the same number of frames, the end of a video being
    padded by repeating its last frame, so that kernels are chosen, and compiled, once.
    Heights and widths are padded by repeating the border, and cropped back.

    Args:
        model: placed.
        chunk: frames of a call, 0 for as many as fit; rounded up to whole latents.
        side_by_side: show the input on the left of its reconstruction.
        latent_scale: what a pipeline has multiplied its latents by.
    """

    def __init__(
        self,
        model: TAEHV,
        chunk: int = 0,
        side_by_side: bool = False,
        latent_scale: float = 1.0,
    ) -> None:
        self.model = model
        self.chunk = chunk
        self.side_by_side = side_by_side
        self.latent_scale = latent_scale
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def frames_of_a_call(self, height: int, width: int) -> int:
        """How many frames of this size the network takes at once."""
        variant = self.model.variant
        is_chunked = variant.trim == "chunks"
        unit = CHUNK_FRAMES if is_chunked else variant.time_factor
        frames = self.chunk
        if not frames and self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            bytes_a_frame = height * width * 64 * self.dtype.itemsize
            fitting = (free + unused) / 2 / LIVE_ACTIVATIONS / bytes_a_frame
            busy = min(MOST_FRAMES, MOST_PIXELS // (height * width))
            frames = min(int(fitting), busy) // unit * unit
        return max(unit, -(-frames // unit) * unit)

    def reconstruct(self, chunks: Iterable[Chunk], trim: bool) -> Iterator[Download]:
        """Encode and decode; every frame comes back with its times.

        `trim` is for CogVideoX: whether to decode as an odd count of latents.
        """
        stream = StreamingTAEHV(self.model, trim=trim)
        waiting: deque[tuple[Times, Tensor]] = deque()
        frames_1TCHW = torch.empty(0)
        for chunk in chunks:
            frames_THWC = chunk.frames_THWC.to(self.device, non_blocking=True)
            waiting.extend(zip(chunk.times, frames_THWC, strict=False))
            frames_1TCHW = self._input(frames_THWC)
            yield from self._step(stream, frames_1TCHW, waiting)
        last_1TCHW = frames_1TCHW[:, -1:].expand_as(frames_1TCHW).contiguous()
        while waiting:
            yield from self._step(stream, last_1TCHW, waiting)

    def _step(
        self,
        stream: StreamingTAEHV,
        frames_1TCHW: Tensor,
        waiting: deque[tuple[Times, Tensor]],
    ) -> Iterator[Download]:
        latents = stream.encode(frames_1TCHW)
        decoded = stream.decode(torch.cat(latents, 1)) if latents else []
        decoded = decoded[: len(waiting)]
        if not decoded:
            return
        times, inputs = zip(*(waiting.popleft() for _ in decoded), strict=True)
        pixels_THWC = _pixels(torch.cat(decoded, 1)[0], *inputs[0].shape[:2])
        if self.side_by_side:
            pixels_THWC = torch.cat([torch.stack(inputs), pixels_THWC], 2)
        yield Download(pixels_THWC, times)

    def encode(self, chunks: Iterable[Chunk]) -> Iterator[Tensor]:
        """Latents_1TCHW on the CPU, as many as decode to all the frames."""
        stream, variant = StreamingTAEHV(self.model), self.model.variant
        frames = given = wanted = 0
        frames_1TCHW = torch.empty(0)
        for chunk in chunks:
            frames += len(chunk.times)
            wanted = variant.latents_of(variant.padded_frames(frames))
            frames_1TCHW = self._input(chunk.frames_THWC.to(self.device))
            latents = stream.encode(frames_1TCHW)[: wanted - given]
            given += len(latents)
            yield from self._saved(latents)
        last_1TCHW = frames_1TCHW[:, -1:].expand_as(frames_1TCHW).contiguous()
        while given < wanted:
            latents = stream.encode(last_1TCHW)
            latents = latents[: wanted - given]
            given += len(latents)
            yield from self._saved(latents)

    def _saved(self, latents: list[Tensor]) -> Iterator[Tensor]:
        if latents:
            yield (torch.cat(latents, 1) * self.latent_scale).cpu()

    def decode(self, file: LatentFile) -> Iterator[Download]:
        """Decode latents; frames follow one another in time."""
        variant = self.model.variant
        stream = StreamingTAEHV(self.model, total_latents=file.latents)
        frames = rest = frames_in(file, self.model)
        first_1TCHW = next(file.pieces(1))
        sides = [side * variant.space_factor for side in first_1TCHW.shape[-2:]]
        height = min(file.count_of("height") or sides[0], sides[0])
        width = min(file.count_of("width") or sides[1], sides[1])
        count = max(1, self.frames_of_a_call(*sides) // variant.time_factor)
        for piece_1TCHW in file.pieces(count):
            latents_1TCHW = piece_1TCHW.to(self.device, torch.float32)
            latents_1TCHW = (latents_1TCHW / self.latent_scale).to(self.dtype)
            decoded = stream.decode(_padded(latents_1TCHW, count))[:rest]
            if decoded:
                times = [(frames - rest + i, 1) for i in range(len(decoded))]
                rest -= len(decoded)
                pixels_THWC = _pixels(torch.cat(decoded, 1)[0], height, width)
                yield Download(pixels_THWC, times)

    def _input(self, frames_THWC: Tensor) -> Tensor:
        """Pixels to what the model takes: frames_1TCHW."""
        frames_TCHW = frames_THWC.movedim(-1, 1).float() / 255
        factor = self.model.variant.space_factor
        bottom, right = (-side % factor for side in frames_TCHW.shape[-2:])
        if bottom or right:
            frames_TCHW = F.pad(frames_TCHW, (0, right, 0, bottom), mode="replicate")
        return frames_TCHW[None].to(self.dtype)


def frames_in(file: LatentFile, model: TAEHV) -> int:
    """Frames that a file of latents decodes to, less those that padded it."""
    frames = model.variant.frames_of(file.latents)
    return min(file.count_of("frames") or frames, frames)


def _pixels(frames_TCHW: Tensor, height: int, width: int) -> Tensor:
    """Frames, RGB in [0, 1], to uint8 frames_THWC, cropped."""
    frames_THWC = frames_TCHW[..., :height, :width].movedim(1, -1)
    return (frames_THWC.float() * 255).round().to(torch.uint8).contiguous()


def _padded(x_1TCHW: Tensor, count: int) -> Tensor:
    missing = count - x_1TCHW.shape[1]
    last_1TCHW = x_1TCHW[:, -1:].expand(-1, missing, -1, -1, -1)
    return torch.cat([x_1TCHW, last_1TCHW], 1) if missing else x_1TCHW


def read_chunks(frames: Iterable[TimedFrame], codec: Codec) -> Iterator[Chunk]:
    """Gather frames into chunks of one length; the last repeats its last frame."""
    length, waiting = 0, []
    for frame in frames:
        length = length or codec.frames_of_a_call(*frame.pixels_HWC.shape[:2])
        waiting.append(frame)
        if len(waiting) == length:
            yield _chunk(waiting, length, codec.device)
            waiting = []
    if waiting:
        yield _chunk(waiting, length, codec.device)


def _chunk(frames: list[TimedFrame], length: int, device: torch.device) -> Chunk:
    pixels = [frame.pixels_HWC for frame in frames]
    pixels += pixels[-1:] * (length - len(pixels))
    frames_THWC = torch.from_numpy(np.stack(pixels))
    if device.type == "cuda":
        frames_THWC = frames_THWC.pin_memory()
    return Chunk(frames_THWC, [(frame.pts, frame.duration) for frame in frames])


# --- threads -----------------------------------------------------------------------


def read_ahead(items: Iterator[T], ahead: int = AHEAD) -> Iterator[T]:
    """The same items, fetched by a thread while the caller works on those before."""
    end = object()
    waiting: deque[Future] = deque()
    pool = ThreadPoolExecutor(1, "read")
    try:
        waiting.extend(pool.submit(next, items, end) for _ in range(ahead))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
        items.close()


def write_behind(
    items: Iterator[T], write: Callable[[T], None], ahead: int = AHEAD
) -> None:
    """Call `write` with every item in turn, in a thread of its own."""
    waiting: deque[Future] = deque()
    pool = ThreadPoolExecutor(1, "write")
    try:
        for item in items:
            waiting.append(pool.submit(write, item))
            if len(waiting) > ahead:
                waiting.popleft().result()
        for future in waiting:
            future.result()
    finally:
        # What is left to write after an error would be thrown away.
        pool.shutdown(cancel_futures=True)
        items.close()


# --- files -------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One input and what becomes of it."""

    source: Path
    target: Path
    to: str
    """video, images or latents."""

    def check_target(self, overwrite: bool) -> bool:
        """Whether to write; raises UserError where that would destroy something."""
        if not self.target.exists():
            return True
        is_folder = self.to == "images"
        if self.target.is_dir() != is_folder:
            raise UserError(f"{self.target} is there already, as something else")
        if is_folder and any(p.suffix != ".png" for p in self.target.iterdir()):
            raise UserError(f"{self.target} holds other files: give another --output")
        return overwrite

    def make_folder(self) -> None:
        """Make the folder of the target; raises UserError where that cannot be."""
        folder = self.target.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.source}: the folder {folder} cannot be made "
                f"({error.strerror}): give another --output"
            ) from None


def plan(inputs: list[Path], output: Path, to: str | None, latents: bool) -> list[Job]:
    """What to do with which file.

    Args:
        inputs: files, and folders, which are searched.
        output: a folder, which is not searched, or for a single input the file.
        to: a key of SUFFIXES; None takes images for image folders, else video.
        latents: whether the inputs are latents.

    Raises:
        UserError: there is no such input, two outputs would have one name, or one would
            lie in a file.
    """
    jobs = _jobs(inputs, output, to, latents)
    for folder in {folder for job in jobs for folder in job.target.parents}:
        if os.path.isfile(folder):
            raise UserError(f"{folder} is a file, not a folder: give another --output")
    return jobs


def _jobs(inputs: list[Path], output: Path, to: str | None, latents: bool) -> list[Job]:
    found = [pair for path in inputs for pair in _sources(path, output, latents)]
    wanted = [to or ("images" if p.is_dir() else "video") for p, _ in found]
    suffix = output.suffix.lower()
    if len(found) == 1 and suffix and suffix == SUFFIXES[wanted[0]]:
        return _checked([Job(found[0][0], output, wanted[0])])
    # A new folder may be named run-1.5, but hardly frames.gif.
    is_file = re.fullmatch(r"\.[a-z]\w{1,10}", suffix) and not output.is_dir()
    if is_file or suffix in {*VIDEO_SUFFIXES, *LATENT_SUFFIXES}:
        raise UserError(
            f"--output {output}: name a folder, or for a single input a "
            f"{' or '.join({s for s in map(SUFFIXES.get, wanted) if s}) or 'folder'}"
        )
    stems = [name.with_suffix("") if not p.is_dir() else name for p, name in found]
    jobs = [
        Job(
            path,
            output / f"{stem if stems.count(stem) == 1 else name}{SUFFIXES[to]}",
            to,
        )
        for (path, name), stem, to in zip(found, stems, wanted, strict=True)
    ]
    return _checked(jobs)


def _checked(jobs: list[Job]) -> list[Job]:
    """Refuse outputs that would take the place of an input or of one another."""
    sources = {job.source.resolve() for job in jobs}
    targets = Counter(job.target for job in jobs)
    for target, count in targets.items():
        if target.resolve() in sources:
            raise UserError(f"{target} is the input: give another --output")
        if count > 1:
            raise UserError(f"two inputs would become {target}: convert them apart")
    return jobs


def _sources(path: Path, output: Path, latents: bool) -> list[tuple[Path, Path]]:
    """The inputs that a path stands for, each with its name below the output."""
    if path.is_file():
        if path.suffix.lower() in LATENT_SUFFIXES and not latents:
            raise UserError(f"{path} looks like latents: add --latents to decode it")
        return [(path, Path(path.name))]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    suffixes = LATENT_SUFFIXES if latents else VIDEO_SUFFIXES
    inside = _inside(path, output)
    found = [p for p in inside if p.suffix.lower() in suffixes and p.is_file()]
    if not latents:
        folders = [p for p in (path, *inside) if p.is_dir() and images_in(p)]
        if found:
            _tell_images(path, folders, found)
        found = found or folders
    if not found:
        raise UserError(
            f"{path} holds no {'latents' if latents else 'videos or images'}"
        )
    base = path.resolve().name
    return [(p, p.relative_to(path) if p != path else Path(base)) for p in found]


def _inside(folder: Path, output: Path) -> list[Path]:
    """What lies in a folder at any depth, apart from what lies in the output folder."""
    inside = sorted(folder.rglob("*"))
    root, target = folder.resolve(), output.resolve()
    if root not in target.parents:
        return inside
    own = folder / target.relative_to(root)
    return [p for p in inside if own not in p.parents]


def _tell_images(path: Path, folders: list[Path], videos: list[Path]) -> None:
    """Name folders of images that a search leaves out since it found videos."""
    searched = {parent for video in videos for parent in video.parents}
    left = [str(folder) for folder in folders if folder not in searched]
    if left:
        more = f" and {len(left) - 1} more" if left[1:] else ""
        log.info(
            f"{path} holds videos, so the images in {left[0]}{more} are not taken from "
            "it: give their folder as an input"
        )


@dataclass(frozen=True)
class Options:
    """What the command line says of inputs and outputs."""

    latents: bool
    layout: str
    rate: float
    crf: int
    sound: bool


class Runner:
    """Does jobs with one model."""

    def __init__(self, codec: Codec, options: Options) -> None:
        self.codec, self.options = codec, options
        self._threads = max(1, min(8, cores() // 2))

    def run(self, job: Job, progress: tqdm) -> None:
        """Do a job; its output is there when it is whole.

        Raises:
            One of FILE_ERRORS.
        """
        if self.options.latents:
            self._from_latents(job, progress)
        elif job.to == "latents":
            self._to_latents(job, progress)
        else:
            self._reconstruct(job, progress)

    def _source(self, path: Path) -> TimedFrames | ImageFrames:
        if path.is_dir():
            return ImageFrames(path, self._rate(0))
        return TimedFrames(str(path), self._threads)

    def _rate(self, stored: float) -> Fraction:
        return Fraction(self.options.rate or stored or 24).limit_denominator(1001)

    def _reconstruct(self, job: Job, progress: tqdm) -> None:
        source = self._source(job.source)
        progress.total = source.frames or None
        chunks = read_ahead(read_chunks(source, self.codec))
        # As the teacher codes it: 8k + 1 frames are an odd count of latents.
        frames = self.codec.reconstruct(chunks, trim=source.frames % 8 == 1)
        names = [p.stem for p in source.paths] if job.source.is_dir() else None
        sound = str(job.source) if self.options.sound and not names else None
        video = {"time_base": source.time_base, "pixel_aspect": source.pixel_aspect}
        self._write(job, frames, progress, source.rate, names, sound=sound, **video)

    def _from_latents(self, job: Job, progress: tqdm) -> None:
        channels = self.codec.model.variant.latent_channels
        file = LatentFile(job.source, channels, self.options.layout)
        variant = file.metadata.get("variant", self.codec.model.variant_name)
        if variant != self.codec.model.variant_name:
            log.warning(f"{job.source} is of {variant}, which may be another space")
        progress.total = frames_in(file, self.codec.model)
        rate = self._rate(_positive(file.metadata.get("rate", "")))
        self._write(job, self.codec.decode(file), progress, rate)

    def _to_latents(self, job: Job, progress: tqdm) -> None:
        source = self._source(job.source)
        progress.total = source.frames or None
        size = []

        def counted(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
            for chunk in chunks:
                progress.update(len(chunk.times))
                size[:] = chunk.frames_THWC.shape[1:3]
                yield chunk

        chunks = read_ahead(read_chunks(source, self.codec))
        job.make_folder()
        with LatentWriter(job.target) as writer:
            write_behind(self.codec.encode(counted(chunks)), writer.write)
            writer.metadata |= {
                "format": "taehv-latents",
                "layout": "NTCHW",
                "variant": self.codec.model.variant_name,
                "frames": str(progress.n),
                "height": str(size[0]),
                "width": str(size[1]),
                "rate": str(float(source.rate)),
            }

    def _write(
        self,
        job: Job,
        frames: Iterator[Download],
        progress: tqdm,
        rate: Fraction,
        names: list[str] | None = None,
        **video: object,
    ) -> None:
        job.make_folder()
        if job.to == "images":
            unique = names and len(set(names)) == len(names)
            writer = ImageWriter(job.target, names if unique else None)
        else:
            writer = VideoWriter(job.target, rate, crf=self.options.crf, **video)
        with writer:

            def write(download: Download) -> None:
                for frame, times in zip(download.frames(), download.times, strict=True):
                    writer.write(frame, *times)
                progress.update(len(download.times))

            write_behind(frames, write)
        if isinstance(writer, VideoWriter) and writer.is_padded:
            log.info(f"{job.target}: odd sizes gained a row or a column, as MP4 wants")


def _positive(text: str) -> float:
    """A number that a file claims; 0 where it is none."""
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if 0 < number < 1000 else 0.0


# --- command line ------------------------------------------------------------------


def run_jobs(runner: Runner, jobs: list[Job], overwrite: bool) -> int:
    """Do all jobs; returns how many failed, each told in one line."""
    failed = 0
    for number, job in enumerate(jobs, 1):
        start = time.monotonic()
        try:
            if not job.check_target(overwrite):
                log.info(f"{job.target} is there already; --overwrite writes it again")
                continue
            name = f"{job.source.name} ({number} of {len(jobs)})"
            with tqdm(desc=name, unit="frame", disable=None, leave=False) as progress:
                # A disabled bar does not count.
                counter = _Counter(progress)
                runner.run(job, counter)
        except FILE_ERRORS as error:
            failed += 1
            log.error(f"error: {_told(job, error)}")
            continue
        seconds = time.monotonic() - start
        speed = f"{counter.n} frames, {counter.n / seconds:.1f} frames/s"
        print(f"{job.source} -> {job.target}: {speed}", flush=True)
    return failed


class _Counter:
    """A progress bar that counts where it is not shown, too."""

    def __init__(self, progress: tqdm) -> None:
        self.n = 0
        self._progress = progress

    @property
    def total(self) -> int | None:
        return self._progress.total

    @total.setter
    def total(self, total: int | None) -> None:
        self._progress.total = total

    def update(self, count: int) -> None:
        self.n += count
        self._progress.update(count)


def _told(job: Job, error: BaseException) -> str:
    """What went wrong, in one line that names the file."""
    if isinstance(error, UserError | VideoError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"{job.source}: the GPU's memory is too small: lower --chunk"
    reason = error.strerror or type(error).__name__
    return f"{job.source} -> {job.target}: {reason}"


def main() -> None:
    """Read the command line and do what it says."""
    arguments = _parser().parse_args()
    _check(arguments)
    set_up_console(0)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    jobs = plan(arguments.inputs, arguments.output, arguments.to, arguments.latents)
    _check_rate(arguments, jobs)
    device = choose_device(arguments.device)
    model, _ = load_model(arguments.checkpoint, arguments.variant, arguments.weights)
    place(model, device, choose_dtype(arguments.precision, device))
    torch.backends.cudnn.benchmark = True
    if arguments.compile:
        model.encoder.compile(dynamic=False)
        model.decoder.compile(dynamic=False)
    codec = Codec(
        model, arguments.chunk, arguments.side_by_side, arguments.latent_scale
    )
    names = ("latents", "layout", "rate", "crf", "sound")
    runner = Runner(codec, Options(**{k: getattr(arguments, k) for k in names}))
    try:
        failed = run_jobs(runner, jobs, arguments.overwrite)
    except KeyboardInterrupt:
        log.error("stopped; what was whole is kept")
        sys.exit(130)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"peak GPU memory {peak:.2f} GiB")
    if failed:
        log.error(f"{failed} of {len(jobs)} failed")
        sys.exit(1)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what has no meaning."""
    if not 0 <= arguments.crf <= 51:
        raise UserError(f"--crf {arguments.crf} must be from 0 to 51")
    if not 0 <= arguments.rate <= 1000:
        raise UserError(f"--rate {arguments.rate} must be from 0 (as stored) to 1000")
    if arguments.chunk < 0:
        raise UserError(f"--chunk {arguments.chunk} must be at least 0 (automatic)")
    if not 0 < arguments.latent_scale < float("inf"):
        raise UserError(f"--latent-scale {arguments.latent_scale} must be above 0")
    if arguments.latents and arguments.to == "latents":
        raise UserError("--latents --to latents would change nothing: leave one out")
    if arguments.side_by_side and (arguments.latents or arguments.to == "latents"):
        raise UserError("--side-by-side needs the input's and the output's frames")


def _check_rate(arguments: argparse.Namespace, jobs: list[Job]) -> None:
    """Refuse a rate where everything has times of its own, or gets none."""
    timed = [job for job in jobs if job.to != "images"]
    is_used = any(arguments.latents or job.source.is_dir() for job in timed)
    if arguments.rate and not is_used:
        raise UserError(
            f"--rate {arguments.rate:g} is for images and latents that become videos "
            "or latents: leave it out"
        )


def _parser() -> Parser:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", help="run, checkpoint, URL of one, .pth or .safetensors")
    add(
        "inputs",
        type=local_path,
        nargs="+",
        help="videos, folders of videos or of images",
    )
    add(
        "--output",
        type=local_path,
        default=Path("reconstructed"),
        help="folder or file",
    )
    add("--to", choices=SUFFIXES, help="default: what the input is")
    add("--latents", action="store_true", help="inputs are latents, to be decoded")
    add(
        "--layout",
        choices=("auto", "NTCHW", "NCTHW"),
        default="auto",
        help="of latents, where their shape does not tell",
    )
    add(
        "--latent-scale",
        type=float,
        default=1.0,
        help="what latents in files are multiplied by (pipelines of CogVideoX: the "
        "VAE's scaling_factor)",
    )
    add("--side-by-side", action="store_true", help="with the input on the left")
    add("--rate", type=float, default=0, help="frames/s of images and latents alone")
    add("--crf", type=int, default=18, help="quality of H.264: 0 lossless, 51 worst")
    add("--no-sound", dest="sound", action="store_false", help="leave sound out")
    add("--overwrite", action="store_true", help="replace outputs that are there")
    add("--chunk", type=int, default=0, help="frames a call; default: as many as fit")
    add("--compile", action="store_true", help="faster after a minute, on GPUs")
    add_device_arguments(parser)
    return parser


if __name__ == "__main__":
    run_command(main)
