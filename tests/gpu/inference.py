"""How fast a long video goes through the model on this machine's GPU.

python tests/gpu/inference.py FOLDER [CLIP [FRAMES]]

A clip (by default noise that moves, of 1280 x 720) is repeated until it has so many
frames (3000), and taken through new weights in several ways. Each prints frames a
second, reading and writing included, and the peak of the GPU's memory.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import torch

from taehv import TAEHV
from taehv.video import VideoWriter, read_frames
from taehv.weights import save_weights

WAYS = (
    [],
    ["--precision", "fp16"],
    ["--compile"],
    ["--chunk", "4"],
    ["--to", "latents"],
)


def noise() -> Iterator[np.ndarray]:
    """A second of coloured noise of 1280 x 720 that moves."""
    blocks = np.random.default_rng(0).integers(0, 256, (90, 160, 3), np.uint8)
    picture = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
    return (np.roll(picture, 8 * shift, 1) for shift in range(25))


def make_input(path: Path, clip: str | None, frames: int) -> None:
    """Repeat a clip."""
    shown = list(read_frames(clip) if clip else noise())
    with VideoWriter(path, 25) as writer:
        for frame in itertools.islice(itertools.cycle(shown), frames):
            writer.write(frame)


def main() -> None:
    """Make what is missing, and run every way."""
    folder = Path(sys.argv[1])
    clip = sys.argv[2] if len(sys.argv) > 2 else None
    frames = int(sys.argv[3]) if len(sys.argv) > 3 else 3000
    folder.mkdir(parents=True, exist_ok=True)
    weights, source = folder / "new.safetensors", folder / "input.mp4"
    save_weights(weights, TAEHV("taehv").state_dict(), {"variant": "taehv"})
    make_input(source, clip, frames)
    print(torch.cuda.get_device_name(), flush=True)
    for way in WAYS:
        suffix = "safetensors" if "latents" in way else "mp4"
        output = folder / f"output.{suffix}"
        command = [sys.executable, "-m", "taehv.inference", weights, source]
        command += ["--output", output, "--overwrite", "--device", "cuda", *way]
        print("\n", *way or ["default"], flush=True)
        subprocess.run(list(map(str, command)), check=True, timeout=500)
        if suffix == "mp4":
            with av.open(str(output)) as container:
                stream = container.streams.video[0]
                assert stream.frames == frames


if __name__ == "__main__":
    main()
