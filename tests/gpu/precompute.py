"""Speed of `taehv.precompute` beside its bare teacher, a CogVideoX VAE of full size.

python tests/gpu/precompute.py CLIPS_FOLDER NEW_FOLDER [--windows 640] [--cpu]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from taehv.distributed import prepare_networks
from taehv.sections import Compile, Teacher
from taehv.teacher import load_teacher

ROOT = Path(__file__).parent.parent.parent
TIMED = 20


def bare_speed(folder: Path, shape: tuple[int, ...], device: torch.device) -> float:
    """Frames a second of the teacher alone, on frames that lie on the device."""
    settings = Teacher(kind="cogvideox", path=str(folder))
    compiled = prepare_networks(Compile(), device)
    teacher = load_teacher(settings, device, compiled)
    frames_NTCHW = torch.rand(shape, device=device)
    for timed in (3, TIMED):
        wait_for(device)
        start = time.monotonic()
        for _ in range(timed):
            teacher.encode(frames_NTCHW, range(len(frames_NTCHW)))
        wait_for(device)
    return timed * shape[0] * shape[1] / (time.monotonic() - start)


def wait_for(device: torch.device) -> None:
    """Until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Write a cache, time the teacher, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--cpu", action="store_true", help="rehearse, small")
    options = parser.parse_args()
    device = torch.device("cpu" if options.cpu else "cuda")
    frames, side, batch = (8, 32, 2) if options.cpu else (16, 128, 16)
    folder = options.output / "teacher"
    weights = [folder, options.output / "taecvx.pth"]
    script = [str(ROOT / "tests/gpu/random_weights.py"), *map(str, weights)]
    small = ["--small"] if options.cpu else []
    options.output.mkdir(parents=True)
    subprocess.run([sys.executable, *script, *small], check=True)
    settings = {
        "model.variant": "taecvx",
        "teacher.kind": "cogvideox",
        "teacher.path": folder,
        "training.device": device.type,
        "data.root": options.clips,
        "data.cache": options.output / "cache",
        "data.frames": frames,
        "data.height": side,
        "data.width": side,
        "cache.windows": options.windows or (16 if options.cpu else 1920),
        "cache.frames": frames,
        "cache.height": side,
        "cache.width": side,
        "cache.batch_size": batch,
        "validation.clips": 0,
    }
    command = [sys.executable, "-m", "taehv.precompute"]
    command += [f"--{key}={value}" for key, value in settings.items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    whole = float(re.findall(r"encoded at (\d+) frames/s", done.stderr)[-1])
    bare = bare_speed(folder, (batch, frames, 3, side, side), device)
    print(
        f"precompute {whole:.0f} frames/s, the bare teacher {bare:.0f}: "
        f"{whole / bare:.1%}"
    )


if __name__ == "__main__":
    main()
