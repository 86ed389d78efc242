"""Small real videos, and real training runs in processes of their own."""

from __future__ import annotations

import io
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import av
import numpy as np
import pytest

from taehv.config import load_config
from taehv.trainer import train

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


def wait_until_ended(pids: list[int]) -> None:
    """Wait for processes of any parent."""
    deadline = time.monotonic() + 120
    while alive := [pid for pid in pids if _is_alive(pid)]:
        assert time.monotonic() < deadline, f"{alive} of {pids} have not ended"
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    """Whether a process has yet to give back its files and locks; a zombie has."""
    for task in _entries(Path(f"/proc/{pid}/task")):
        with suppress(OSError):  # it ended just now
            if (task / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                return True
    return False


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder of /proc; nothing of a process that has ended."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


class Running:
    """A program in the background, which ends with all below it by its deadline.

    What it prints goes to a file, so that it never waits for a reader.
    """

    _all: list[Running] = []

    def __init__(self, command: Sequence[object], **environment: str) -> None:
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [*map(str, command)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=self._printed,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._all.append(self)

    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def output(self) -> str:
        """What it has printed so far."""
        return os.pread(self._printed.fileno(), 2**24, 0).decode(errors="replace")

    def tree(self) -> list[int]:
        """The process ids of it and of all below it, parents first."""
        found = [self.pid]
        for pid in found:
            for task in _entries(Path(f"/proc/{pid}/task")):
                with suppress(OSError):  # it ended just now
                    found += map(int, (task / "children").read_text().split())
        return found

    def rank(self, rank: int) -> int:
        """The process id of a rank that torchrun started."""
        for pid in self.tree()[1:]:
            with suppress(OSError):  # it ended just now
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if b"RANK=%d" % rank in environment:
                    return pid
        raise AssertionError(f"no rank {rank}: {self.output()}")

    def workers(self) -> list[int]:
        """The process ids of all decoding processes, which fork servers started."""
        parents = {}
        for pid in self.tree():
            with suppress(OSError):  # it ended just now
                if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
                    parents[pid] = int(status.split()[1])
        return [pid for pid, parent in parents.items() if parent in parents]

    def send(self, number: signal.Signals) -> None:
        """Send a signal to its process group, as a terminal does.

        torchrun's workers are in groups of their own.
        """
        os.killpg(self.pid, number)

    def kill(self) -> None:
        """Kill it and all below it, and wait until nothing of them is left."""
        for pid in (tree := self.tree()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        wait_until_ended(tree)

    def wait_for(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Wait until the condition holds, which must be while the program runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = self._process.poll() is not None
            if (ended and not condition()) or time.monotonic() > deadline:
                told = "it ended" if ended else f"not within {seconds} s"
                self.kill()
                pytest.fail(f"{told}; its output:\n{self.output()}")
            time.sleep(0.02)

    def prints(self, text: str, seconds: float = 120) -> None:
        """Wait until it has printed a text."""
        self.wait_for(lambda: text in self.output(), seconds)

    def end(self, code: int | None = 0, seconds: float = 120) -> str:
        """Wait for its end; the exit code must be this one. Returns its output."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"no end within {seconds} s; its output:\n{self.output()}")
        assert code in (None, self._process.returncode), self.output()
        return self.output()

    @classmethod
    def kill_all(cls) -> None:
        """Kill what is still running."""
        while cls._all:
            running = cls._all.pop()
            if running._process.poll() is None:
                running.kill()


@pytest.fixture(autouse=True)
def _messages() -> Iterator[None]:
    """Messages reach pytest whatever a command has set up in this process before."""
    log = logging.getLogger("taehv")
    log.handlers, log.propagate, log.level = [], True, logging.NOTSET
    yield
    log.handlers, log.propagate, log.level = [], True, logging.NOTSET


@pytest.fixture(autouse=True)
def _no_strays() -> Iterator[None]:
    """A test that fails leaves no processes behind."""
    yield
    Running.kill_all()


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

    def command(
        self, processes: int = 1, restarts: int = 0, **settings: object
    ) -> list[str]:
        """The command line; several processes go through torchrun."""
        named = {key.replace("__", "."): value for key, value in settings.items()}
        arguments = [f"--{k}={v}" for k, v in {**self.settings, **named}.items()]
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += ["--nproc_per_node", str(processes)]
            launcher += ["--max-restarts", str(restarts)]
        return [*launcher, str(ROOT / "train.py"), *arguments]

    def start(
        self,
        processes: int = 1,
        restarts: int = 0,
        **settings: object,
    ) -> Running:
        """Start it in the background."""
        return Running(self.command(processes, restarts, **settings))

    def finish(self, processes: int = 1, code: int = 0, **settings: object) -> str:
        """Run it to its end, which must have this exit code; returns its output."""
        return self.start(processes, **settings).end(code, 240)

    def train(self, **settings: object) -> str:
        """Run it to its end in this process, which is sooner started; its output."""
        output = io.StringIO()
        with redirect_stdout(output), redirect_stderr(output):
            train(load_config(self.command(**settings)[2:]))
        return output.getvalue()

    def metrics(self) -> list[dict[str, float]]:
        """The records of all steps so far."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def losses(self) -> list[float]:
        """The loss of every step so far."""
        return [record["loss"] for record in self.metrics()]


@contextmanager
def file_size_limit(size: int, process: int = 0) -> Iterator[None]:
    """Let a process, by default this one, write no file beyond a size.

    To a program that is what a full disk is: writes of which a part succeeds, then
    OSErrors.
    """
    before = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(process, resource.RLIMIT_FSIZE, before)
