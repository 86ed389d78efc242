"""Whether training waits for its clips: from long-GOP videos, a proxy and a cache.

Encodes the start of each video anew at 1600x900 with a keyframe every 250 frames, makes
the proxy and the latent cache of that by their commands, and trains from each: the
trainer's own runs, one after the other in this process, so that one start is paid for.

python tests/gpu/data_wait.py FOLDER_OF_VIDEOS NEW_FOLDER [--limit 240] [--cpu]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# As train.py does, before PyTorch starts its threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# PyTorch and the trainer are imported where they are used: every decoding process
# imports this file anew.
ROOT = Path(__file__).parent.parent.parent
K = 8
COLUMNS = {
    "job": 22,
    "clips from": 18,
    "ms a step": 9,
    "data wait": 9,
    "clips/s": 7,
    "loader alone, clips/s": 21,
    "one worker": 10,
    "run s": 5,
}
LOADER_SECONDS = 3


class TooLong(Exception):
    """A part that has not come to its end."""


@dataclass(frozen=True)
class Job:
    """A training: its name, clips a step and their size, steps."""

    name: str
    clips: int
    frames: int
    side: int
    steps: int


JOBS = (Job("debug", 8, 9, 64, 400), Job("16 x 13 x 128 x 128", 16, 13, 128, 200))
"""The first has about the size of train_configs/debug.toml, with K clips."""
SMALL_JOBS = (Job("debug", 8, 5, 16, 6), Job("8 x 5 x 32 x 32", 8, 5, 32, 6))


@dataclass(frozen=True)
class Sizes:
    """Of what is made: on a GPU, or small enough to rehearse on a CPU."""

    jobs: tuple[Job, ...] = JOBS
    files: int = 4
    frames: int = 300
    height: int = 900
    width: int = 1600
    windows: int = 128
    window_frames: int = 33
    window_side: int = 256
    proxy_height: int = 360
    batch: int = 16


SMALL = Sizes(SMALL_JOBS, 2, 60, 90, 160, 4, 9, 32, 36, 2)


@contextlib.contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """End what takes longer by TooLong."""

    def end(number: int, frame: object) -> None:
        raise TooLong(f"{what}: not done within {seconds:.0f} s")

    if seconds < 1:
        raise TooLong(f"{what}: no time is left")
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class DataWait:
    """The material and the runs, in a folder of their own."""

    def __init__(self, clips: Path, output: Path, sizes: Sizes, is_cpu: bool) -> None:
        self.clips, self.output, self.sizes = clips, output, sizes
        self.videos, self.proxy, self.cache = (
            output / name for name in ("videos", "proxy", "cache")
        )
        self.settings: dict[str, object] = {
            "training.device": "cpu" if is_cpu else "cuda",
            "data.holdout_fraction": 0,
            "data.workers": 1 if is_cpu else -1,
            "job.output_dir": output,
            "validation.clips": 0,
            "checkpoint.interval": 10**6,
            "logging.interval": 1,
        }

    def encode(self) -> None:
        """Write the videos that training reads, several at a time."""
        from taehv.bench_data import write_copy
        from taehv.files import FileList, Source

        self.videos.mkdir(parents=True)
        sizes = self.sizes
        found = Source.of(str(self.clips), "").files(images=False)
        chosen = [found[i % len(found)] for i in range(sizes.files)]

        def write(i: int) -> None:
            one = FileList.from_paths("/", [chosen[i]])
            path = self.videos / f"{i}.mp4"
            write_copy(one, path, sizes.height, sizes.width, 250, sizes.frames)

        with ThreadPoolExecutor() as pool:
            list(pool.map(write, range(sizes.files)))

    def derive(self, seconds: float) -> None:
        """Make the proxy and the cache, at the same time, by their commands."""
        sizes = self.sizes
        proxy = {"proxy.folder": self.proxy, "proxy.height": sizes.proxy_height}
        proxy |= {"data.root": self.videos, "data.workers": sizes.files}
        cache = {
            "data.cache": self.cache,
            "data.frames": sizes.jobs[0].frames,
            "data.height": sizes.jobs[0].side,
            "data.width": sizes.jobs[0].side,
            "teacher.kind": "frequency_teacher:FrequencyTeacher",
            "cache.windows": sizes.windows,
            "cache.frames": sizes.window_frames,
            "cache.height": sizes.window_side,
            "cache.width": sizes.window_side,
            "cache.batch_size": sizes.batch,
        }
        commands = [
            (["taehv.data", "proxy"], proxy),
            (
                ["taehv.precompute"],
                {**self.settings, "data.root": self.videos, **cache},
            ),
        ]
        own = [str(ROOT), str(Path(__file__).parent)]
        path = os.pathsep.join([*own, os.environ.get("PYTHONPATH", "")])
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", *module, *arguments(settings)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )
            for module, settings in commands
        ]
        deadline = time.monotonic() + seconds
        import taehv.trainer  # noqa: F401, meanwhile

        try:
            for process, (module, _) in zip(processes, commands, strict=True):
                printed, _ = process.communicate(timeout=deadline - time.monotonic())
                if process.returncode:
                    sys.exit(f"{' '.join(module)} failed:\n{printed[-3000:]}")
        except subprocess.TimeoutExpired as late:
            raise TooLong(f"proxy and cache: not within {seconds:.0f} s") from late
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)

    def sources(self) -> dict[str, dict[str, object]]:
        """Where clips come from, and the settings that say so."""
        crops = {"data.crops_per_window": K}
        return {
            "latent cache": {"data.cache": self.cache},
            f"proxy, K = {K}": {"data.root": self.proxy, **crops},
            f"1600x900, K = {K}": {"data.root": self.videos, **crops},
        }

    def row(self, job: Job, source: str, more: dict[str, object]) -> dict[str, object]:
        """Train, and read the clips of the last job once more without training."""
        from taehv import measure
        from taehv.config import load_config
        from taehv.trainer import train

        settings = {
            **self.settings,
            **more,
            "job.name": f"{job.name}, {source}",
            "data.frames": job.frames,
            "data.height": job.side,
            "data.width": job.side,
            "training.global_batch_size": job.clips,
            "training.steps": job.steps,
        }
        config = load_config(arguments(settings), 1)
        begin = time.monotonic()
        measure.free()
        with (
            (self.output / "log.txt").open("a") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            train(config)
        folder = self.output / settings["job.name"]
        cells = waits(folder, job.clips)
        shutil.rmtree(folder)
        cells["run s"] = time.monotonic() - begin
        if job == self.sizes.jobs[-1]:
            cells["loader alone, clips/s"] = loader_speed(config)
            config.data.workers = 1
            cells["one worker"] = loader_speed(config)
        return {"job": job.name, "clips from": source, **cells}


def arguments(settings: dict[str, object]) -> list[str]:
    """As on a command line."""
    return [f"--{key}={value}" for key, value in settings.items()]


def waits(folder: Path, clips: int) -> dict[str, object]:
    """What the second half of a run took: by then nothing read ahead is left."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    speeds, shares = (
        [event.value for event in events.Scalars(f"train/{tag}")]
        for tag in ("clips_per_second", "data_wait")
    )
    half = len(speeds) // 2
    seconds = [clips / speed for speed in speeds[half:]]
    waited = sum(map(float.__mul__, seconds, shares[half:]))
    total = sum(seconds)
    return {
        "ms a step": 1000 * total / len(seconds),
        "data wait": f"{waited / total:.1%}",
        "clips/s": clips * len(seconds) / total,
    }


def loader_speed(config: object) -> float:
    """Clips a second that the decoding processes give when nothing else is done."""
    import torch

    from taehv.cache import Cache, CacheDataset
    from taehv.data import ClipDataset
    from taehv.index import build_file_lists
    from taehv.loader import ClipLoader
    from taehv.sampler import Steps

    data, size = config.data, config.training.global_batch_size
    if data.cache:
        clips = CacheDataset(
            data, Cache.open(data.cache, config.model.variant).train, 0
        )
    else:
        clips = ClipDataset(data, build_file_lists(data)[0], 0)
    loader = ClipLoader(clips, Steps(0, size, size), torch.cuda.is_available())
    try:
        # What is read while the processes start would count as fast.
        ahead = max(1, loader.workers) * (data.prefetch + 1)
        for _ in itertools.islice(loader, ahead):
            pass
        begin, count = time.monotonic(), 0
        while time.monotonic() < begin + LOADER_SECONDS:
            count += len(next(loader).numbers)
        return count / (time.monotonic() - begin)
    finally:
        loader.close()


def main() -> None:
    """Make the material, run every job from every source, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", type=Path, help="folder of videos")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--limit", type=float, default=240, help="seconds for it all")
    parser.add_argument("--json", type=Path, help="file that takes the table")
    parser.add_argument("--cpu", action="store_true", help="rehearse, small")
    options = parser.parse_args()
    deadline = time.monotonic() + options.limit
    sizes = SMALL if options.cpu else Sizes()
    options.output.mkdir(parents=True)
    wait = DataWait(options.clips, options.output, sizes, options.cpu)

    def left() -> float:
        return deadline - time.monotonic()

    try:
        with within(left(), "encoding"):
            wait.encode()
        told = f"{sizes.files} videos encoded after {options.limit - left():.0f} s"
        wait.derive(left())
        print(
            f"{told}, proxy and cache after {options.limit - left():.0f} s", flush=True
        )
        measured(wait, options, left)
    except TooLong as late:
        sys.exit(f"{late}; the log is {options.output / 'log.txt'}")


def measured(wait: DataWait, options: argparse.Namespace, left: object) -> None:
    """Print a row for every job and source."""
    import torch

    from taehv.benchmark import about
    from taehv.measure import Report

    device = torch.device("cpu" if options.cpu else "cuda")
    report = Report({**about(device, 1), "cores": os.cpu_count()}, options.json)
    report.table("data wait, second half of each run", COLUMNS)
    # The slowest source last, for which there may be no time.
    for (source, more), job in itertools.product(
        wait.sources().items(), wait.sizes.jobs
    ):
        with within(left(), f"{job.name}, {source}"):
            report.row(**wait.row(job, source, more))


if __name__ == "__main__":
    main()
