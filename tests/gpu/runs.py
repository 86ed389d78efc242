"""Training runs in processes of their own, and what they noted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent.parent
FLAGSHIP = ("--config", str(ROOT / "train_configs/taehv.toml"))
FSDP = {"parallelism.mode": "fsdp"}
OFFLOAD = {**FSDP, "parallelism.cpu_offload": "true"}
EAGER = {"compile.enable": "false", "compile.cuda_graph": "false"}


class Failed(Exception):
    """A run that did not come to its end."""


@dataclass
class Form:
    """One way to train: its name, processes and settings."""

    name: str
    processes: int
    settings: dict[str, object]


@dataclass
class Speed:
    """Medians over the second half of a run, and peaks."""

    clips_per_second: float
    data_wait: float
    """Share of the time."""
    gpu_gib: float
    host_gib: float


class Runs:
    """The runs of one check, in a folder of their own.

    Args:
        clips: folder of videos.
        output: folder of the runs.
        steps: of a run.
        cpu: small, over gloo.
        more: settings of all runs.
    """

    def __init__(
        self,
        clips: Path,
        output: Path,
        steps: int,
        cpu: bool,
        more: dict[str, object],
    ) -> None:
        self.output, self.cpu = output, cpu
        self.begun: list[subprocess.Popen[str]] = []
        self.base = {
            "data.root": clips,
            "data.holdout": "bikes*,carphone*",
            "job.output_dir": output,
            "training.steps": steps,
            "training.global_batch_size": 16,
            "data.frames": 13,
            "data.height": 128,
            "data.width": 128,
            "data.crops_per_window": 8,
            "validation.clips": 0,
            "checkpoint.interval": 10**6,
            "logging.interval": 1,
            **more,
        }
        if cpu:
            self.base |= {
                "training.device": "cpu",
                "training.global_batch_size": 4,
                "data.crops_per_window": 1,
                "data.frames": 5,
                "data.height": 16,
                "data.width": 16,
                "data.workers": 0,
            }

    def command(
        self,
        form: Form,
        *config: str,
        launch: Sequence[str] = (),
        **more: object,
    ) -> list[str]:
        """The command line of a form; `launch` goes to torchrun."""
        settings = {**self.base, "job.name": form.name, **form.settings, **more}
        if self.cpu and "training.local_batch_size" in settings:
            settings["training.local_batch_size"] = 2
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(form.processes), *launch),
            *(str(ROOT / "train.py"), *config),
            *(f"--{key}={value}" for key, value in settings.items()),
        ]

    def start(
        self,
        form: Form,
        *config: str,
        gpu: int | None = None,
        launch: Sequence[str] = (),
        **more: object,
    ) -> subprocess.Popen[str]:
        """Train in this form, on one GPU or on all."""
        # Else what is started again meets the addresses of what was killed
        # (pytorch/pytorch issue 135712).
        environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        process = subprocess.Popen(
            self.command(form, *config, launch=launch, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.begun.append(process)
        return process

    def finish(self, form: Form, process: subprocess.Popen[str]) -> str:
        """Wait for a run.

        Raises:
            Failed: with what it printed last.
        """
        output, _ = process.communicate()
        if process.returncode:
            raise Failed(f"{form.name} failed:\n{output[-3000:]}")
        return output

    @contextlib.contextmanager
    def ended(self) -> Iterator[None]:
        """Kill what still runs at the end, also on SIGTERM, and show its last words."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))
        try:
            yield
        finally:
            for process in self.begun:
                if process.poll() is not None:
                    continue
                os.killpg(process.pid, signal.SIGKILL)
                print(f"killed:\n{process.communicate()[0][-3000:]}", flush=True)

    def losses(self, name: str) -> list[float]:
        """The loss of every step of a run."""
        lines = (self.output / name / "metrics.jsonl").open()
        return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]

    def scalars(self, name: str, tag: str) -> list[float]:
        """The values of one curve in TensorBoard, none if there is no such curve."""
        events = EventAccumulator(str(self.output / name / "tensorboard")).Reload()
        if f"train/{tag}" not in events.Tags()["scalars"]:
            return []
        return [event.value for event in events.Scalars(f"train/{tag}")]

    def speed(self, name: str) -> Speed:
        """How fast a run was and what it took."""
        clips = self.scalars(name, "clips_per_second")
        half = len(clips) // 2
        return Speed(
            statistics.median(clips[half:]),
            statistics.median(self.scalars(name, "data_wait")[half:]),
            0.0 if self.cpu else self.scalars(name, "memory_gib")[-1],
            self.scalars(name, "host_memory_gib")[-1],
        )

    def flagship_settings(self, processes: int, steps: int) -> dict[str, object]:
        """What differs from train_configs/taehv.toml: smaller, and nothing fetched."""
        teacher, weights = self.output / "cogvideox", self.output / "taecvx.pth"
        settings: dict[str, object] = {"model.checkpoint": weights}
        settings |= {"teacher.path": teacher, "training.steps": steps}
        # 2 clips at a time, 2 times, as on 8 GPUs.
        settings |= {"training.global_batch_size": 4 * processes}
        settings |= {"data.frames": 16, "data.crops_per_window": 2}
        if self.cpu:
            settings |= {"data.frames": 8, "training.precision": "fp32", **EAGER}
            settings |= {"training.global_batch_size": 4, "data.crops_per_window": 1}
        script = (ROOT / "tests/gpu/random_weights.py", teacher, weights)
        small = ["--small"] if self.cpu else []
        subprocess.run([sys.executable, *map(str, script), *small], check=True)
        return settings


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Until a file is there; a process that ends before ends the check."""
    while not path.exists():
        if process.poll() is not None:
            sys.exit(f"ended before {path.parent.name}:\n{process.communicate()[0]}")
        time.sleep(0.05)
