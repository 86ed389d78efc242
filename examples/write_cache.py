"""Write a latent cache of a teacher that this package does not know.

python -m examples.write_cache VIDEOS CACHE
python train.py --config train_configs/autoencoder.toml --data.cache CACHE

Put the teacher into `encode`: another framework, a service, a file of latents made
elsewhere. What stands there now, sums over patches, only shows the form.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from taehv import VARIANTS
from taehv.cache import ShardWriter, Window, describe, write_about
from taehv.errors import UserError, run_command
from taehv.video import Crop, VideoError, decode_window

VARIANT = VARIANTS["taehv"]
FRAMES, HEIGHT, WIDTH = 33, 128, 128
WINDOWS_A_VIDEO = 4
SHARD_WINDOWS = 64


def encode(frames_THWC: np.ndarray) -> np.ndarray:
    """Normalised latents_TCHW, as the student is to learn them, of uint8 RGB frames.

    Latent 0 stands for frame 0, latent i for frames 4 i - 3 to 4 i: see docs/cache.md.
    """
    rows, columns = HEIGHT // 8, WIDTH // 8
    patches = frames_THWC.reshape(FRAMES, rows, 8, columns, 8, 3) / 127.5 - 1
    signals = patches.mean((2, 4)) @ np.random.default_rng(0).normal(size=(3, 16))
    groups = [signals[:1], *np.split(signals[1:], (FRAMES - 1) // 4)]
    return np.stack([group.mean(0).transpose(2, 0, 1) for group in groups])


def windows(videos: list[Path]) -> Iterator[tuple[str, np.ndarray]]:
    """Windows spread over each video, with its name."""
    for video in videos:
        for place in range(WINDOWS_A_VIDEO):
            position = (place + 0.5) / WINDOWS_A_VIDEO
            crop = Crop(HEIGHT, WIDTH)
            try:
                (frames_THWC,) = decode_window(str(video), position, FRAMES, 1, [crop])
            except VideoError as error:
                print(f"left out: {error}")
                break
            yield video.name, frames_THWC


def main() -> None:
    """Read the command line and write the cache."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", type=Path, help="folder of .mp4 files")
    parser.add_argument("cache", type=Path, help="folder to write")
    arguments = parser.parse_args()
    videos = sorted(arguments.videos.glob("*.mp4"))
    if not videos:
        raise UserError(f"{arguments.videos} has no .mp4 file: name a folder of some")
    try:
        arguments.cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{arguments.cache}: {error.strerror}: name another") from None
    numbered = enumerate(windows(videos))
    shards = 0
    while some := list(itertools.islice(numbered, SHARD_WINDOWS)):
        with ShardWriter(arguments.cache, "train", shards) as shard:
            for number, (source, frames_THWC) in some:
                latents_TCHW = encode(frames_THWC)
                shard.add(Window(number, source, 0, frames_THWC, latents_TCHW))
        shards += 1
    teacher = {"kind": "sums over patches", "fingerprint": "1"}
    counts = {"train": shards, "validation": 0}
    write_about(arguments.cache, describe(VARIANT, teacher, counts, {}))
    print(f"{shards} shards in {arguments.cache}")


if __name__ == "__main__":
    run_command(main)
