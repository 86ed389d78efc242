"""Small real videos, and real training runs in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests may take their time."""
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.timeout(3600))


def make_video(path: Path, frames: int = 24, size: int = 32, seed: int = 0) -> Path:
    """A short video of blurred noise that drifts and changes colour."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size * 2 * np.pi
    phases, speeds = rng.uniform(0, 6, (2, 3, 2))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 1_000_000
        for t in range(frames):
            planes = [
                np.sin(x + phase[0] + t / 9 * speed[0])
                * np.cos(y + phase[1] + t / 9 * speed[1])
                for phase, speed in zip(phases, speeds, strict=True)
            ]
            pixels = (np.stack(planes, -1) * 100 + 128).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four small videos; one, held.mp4, is meant to be held out."""
    folder = tmp_path_factory.mktemp("videos")
    for seed, name in enumerate(("a.mp4", "b.mp4", "c.mp4", "held.mp4")):
        make_video(folder / name, seed=seed)
    return folder


class Run:
    """A training run in a folder of its own, started as a user starts it."""

    SMALL = {
        "job.name": "run",
        "data.frames": 5,
        "data.height": 16,
        "data.width": 16,
        "data.holdout": "held.mp4",
        "data.workers": 0,
        "training.device": "cpu",
        "training.precision": "fp32",
        "training.global_batch_size": 2,
        "optim.warmup_steps": 2,
        "validation.clips": 2,
    }

    def __init__(self, output: Path, videos: Path, **settings: object) -> None:
        """Settings are named section__key."""
        named = {key.replace("__", "."): value for key, value in settings.items()}
        paths = {"job.output_dir": output, "data.root": videos}
        self.settings = {**self.SMALL, **paths, **named}
        self.folder = output / "run"

    def command(self, processes: int = 1, **settings: object) -> list[str]:
        """The command line; several processes go through torchrun."""
        named = {key.replace("__", "."): value for key, value in settings.items()}
        arguments = [f"--{k}={v}" for k, v in {**self.settings, **named}.items()]
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += ["--nproc_per_node", str(processes)]
        return [*launcher, str(ROOT / "train.py"), *arguments]

    def start(self, processes: int = 1, **settings: object) -> subprocess.Popen[str]:
        """Start it in the background."""
        return subprocess.Popen(
            self.command(processes, **settings),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, processes: int = 1, code: int = 0, **settings: object) -> str:
        """Run it to its end, which must have this exit code; returns its output."""
        process = self.start(processes, **settings)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == code, output
        return output

    def metrics(self) -> list[dict[str, float]]:
        """The records of all steps so far."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def losses(self) -> list[float]:
        """The loss of every step so far."""
        return [record["loss"] for record in self.metrics()]
