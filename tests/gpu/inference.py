"""How fast a long video goes through the model on this machine, in one table.

export PYTHONPATH=.
python tests/gpu/inference.py FOLDER                       # 3,000 frames of 1280 x 720
python tests/gpu/inference.py FOLDER --device cpu --frames 60 --height 96 --width 160

New weights, and blocks of colour that move. The first row is what a user sees of the
whole video, read and written; those of the network alone keep frames on the device, and
are timed once it has warmed up and is compiled. They and the other rows take a third of
the frames, the most telling first, and none begins after `--seconds`.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch

from taehv import TAEHV
from taehv.inference import FILE_ERRORS, Chunk, Codec, Job, Options, Runner
from taehv.media import LatentFile
from taehv.pretrained import place

RATE = 25
ROW = "{:<34}{:>8}{:>10}{:>12}{:>12}{:>11}"


@dataclass(frozen=True)
class Way:
    """One way through the model."""

    name: str
    dtype: torch.dtype
    chunk: int = 0
    to: str = "video"
    compile: bool = False


USER = Way("bf16, as a user sees it", torch.bfloat16)
ALONE = (
    Way("bf16, network alone", torch.bfloat16),
    Way("bf16, compiled, network alone", torch.bfloat16, compile=True),
)
OTHERS = (
    Way("bf16, to latents", torch.bfloat16, to="latents"),
    Way("fp16", torch.float16),
    Way("bf16, 4 frames a call", torch.bfloat16, chunk=4),
)


class Counter:
    """In place of a progress bar."""

    total: int | None = None
    n = 0

    def update(self, count: int) -> None:
        """Count frames."""
        self.n += count


def pictures(height: int, width: int) -> list[np.ndarray]:
    """A second of coloured blocks that move."""
    blocks = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3))
    picture = np.kron(blocks.astype(np.uint8), np.ones((8, 8, 1), np.uint8))
    return [np.roll(picture, 8 * shift, 1) for shift in range(RATE)]


def make_input(path: Path, shown: list[np.ndarray], frames: int) -> None:
    """Repeat pictures, encoded as fast as can be."""
    converted = [
        av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
        for picture in shown
    ]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", RATE, {"preset": "ultrafast"})
        stream.height, stream.width = shown[0].shape[:2]
        stream.codec_context.thread_type = "FRAME"
        for number in range(frames):
            frame = converted[number % len(converted)]
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def new_model(way: Way, device: torch.device) -> TAEHV:
    """New weights, placed."""
    torch.manual_seed(0)
    model = TAEHV("taehv").eval().requires_grad_(False)
    place(model, device, way.dtype)
    if way.compile:
        model.encoder.compile(dynamic=False)
        model.decoder.compile(dynamic=False)
    return model


def begin(device: torch.device) -> float:
    """Watch memory and time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return time.monotonic()


def tell(name: str, frames: int, start: float, device: torch.device) -> None:
    """Print a row."""
    gpu = "-"
    if device.type == "cuda":
        torch.cuda.synchronize()
        gpu = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}"
    seconds = time.monotonic() - start
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    values = f"{seconds:.1f}", f"{frames / seconds:.1f}", gpu, f"{host:.2f}"
    print(ROW.format(name, frames, *values), flush=True)


def through_files(way: Way, source: Path, frames: int, device: torch.device) -> None:
    """Take a video through the model as the command does, and check what comes out."""
    codec = Codec(new_model(way, device), way.chunk)
    options = Options(latents=False, layout="auto", rate=0, crf=18, sound=True)
    suffix = {"video": ".mp4", "latents": ".safetensors"}[way.to]
    job = Job(source, source.with_name("output" + suffix), way.to)
    start = begin(device)
    Runner(codec, options).run(job, Counter())
    tell(way.name, frames, start, device)
    if way.to == "latents":
        file = LatentFile(job.target, codec.model.variant.latent_channels)
        assert file.count_of("frames") == frames
        return
    with av.open(str(source)) as ours, av.open(str(job.target)) as theirs:
        told = [
            (stream.frames, stream.height, stream.width, stream.average_rate)
            for stream in (ours.streams.video[0], theirs.streams.video[0])
        ]
    assert told[0] == told[1] and told[1][0] == frames, told


def network_alone(
    way: Way, shown: list[np.ndarray], frames: int, device: torch.device
) -> None:
    """Frames that are on the device already, as they are used again and again."""
    codec = Codec(new_model(way, device), way.chunk)
    count = codec.frames_of_a_call(*shown[0].shape[:2])
    places = [i % len(shown) for i in range(count)]
    frames_THWC = torch.from_numpy(np.stack(shown)[places]).to(device)

    def shown_again(frames: int) -> int:
        chunks = (
            Chunk(frames_THWC, [(number, 1)] * min(count, frames - number))
            for number in range(0, frames, count)
        )
        return sum(len(down.times) for down in codec.reconstruct(chunks, trim=False))

    # Later calls go on from the frames before, so the first is compiled by itself.
    shown_again(3 * count)
    start = begin(device)
    found = shown_again(frames)
    tell(way.name, frames, start, device)
    assert found == frames


def main() -> None:
    """Make the videos, and go every way for which there is time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path)
    add("--device", default="cuda")
    add("--frames", type=int, default=3000)
    add("--height", type=int, default=720)
    add("--width", type=int, default=1280)
    add("--seconds", type=float, default=90)
    asked = parser.parse_args()
    begun, device = time.monotonic(), torch.device(asked.device)
    torch.backends.cudnn.benchmark = True
    asked.folder.mkdir(parents=True, exist_ok=True)
    shown = pictures(asked.height, asked.width)
    long, short = asked.folder / "long.mp4", asked.folder / "short.mp4"
    for path, frames in ((long, asked.frames), (short, asked.frames // 3)):
        make_input(path, shown, frames)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"
    print(f"{name}, PyTorch {torch.__version__}, {asked.width} x {asked.height}")
    print(ROW.format("", "frames", "seconds", "frames/s", "GPU GiB", "host GiB"))
    third = asked.frames // 3
    works = [
        partial(through_files, USER, long, asked.frames, device),
        *(partial(network_alone, way, shown, third, device) for way in ALONE),
        *(partial(through_files, way, short, third, device) for way in OTHERS),
    ]
    failed = 0
    for work in works:
        if time.monotonic() - begun > asked.seconds:
            print("no time left for the rest")
            break
        try:
            work()
        except FILE_ERRORS as error:
            failed += 1
            print(f"failed: {error}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
