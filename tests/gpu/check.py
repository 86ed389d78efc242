"""Every form of training on this machine's GPUs, compared: losses, time, memory.

Then the flagship's settings once, with a full-size CogVideoX VAE and a student of new,
random weights: train, kill, resume on one process, convert, load, encode and decode.
Exits with 1 if anything differs that must agree.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent.parent
FSDP = {"parallelism.mode": "fsdp"}
OFFLOAD = {**FSDP, "parallelism.cpu_offload": "true"}
EAGER = {"compile.enable": "false"}
SAVES = {"checkpoint.interval": 10, "checkpoint.keep": 2}
EARLY = 10
TOLERANCE = 0.03
"""How far a loss may be off in the first EARLY steps, by bf16 and the order of sums.

Later the smallest difference grows; compare the last half with that of another seed.
"""
FLAGSHIP_STEPS = 60
KILL_AFTER = 20


@dataclass
class Form:
    """One way to train: its name, processes and settings."""

    name: str
    processes: int
    settings: dict[str, object]


def forms(most: int) -> list[Form]:
    """What to compare on a machine that has so many GPUs."""
    one = [
        Form("1, compiled", 1, {}),
        Form("1, eager", 1, EAGER),
        Form("1, other seed", 1, {"training.seed": 1}),
        Form("1, fsdp", 1, FSDP),
        Form("1, fsdp, offload", 1, OFFLOAD),
        Form("1, two micro-batches", 1, {"training.local_batch_size": 8}),
    ]
    many = [
        Form(f"{most}, replicate", most, {}),
        Form(f"{most}, fsdp", most, FSDP),
        Form(f"{most}, fsdp, offload", most, OFFLOAD),
        Form(f"{most}, fsdp, 20 saves", most, {**FSDP, **SAVES}),
        Form(
            f"{most}, fsdp, 20 saves awaited",
            most,
            {**FSDP, **SAVES, "checkpoint.asynchronous": "false"},
        ),
        Form(f"{most}, replicate, eager", most, EAGER),
    ]
    if most >= 4:
        hsdp = {"parallelism.mode": "hsdp", "parallelism.shard_size": most // 2}
        many.insert(2, Form(f"{most}, hsdp", most, hsdp))
    return one + (many if most > 1 else [])


class Check:
    """The runs of one check, in a folder of their own."""

    def __init__(self, clips: Path, output: Path, steps: int, cpu: bool) -> None:
        self.output, self.cpu = output, cpu
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
            # Low, since a high rate makes a chaos of the smallest difference.
            "optim.lr": 1e-4,
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

    def command(self, form: Form, *config: str, **more: object) -> list[str]:
        """The command line of a form."""
        settings = {**self.base, "job.name": form.name, **form.settings, **more}
        if self.cpu and "training.local_batch_size" in settings:
            settings["training.local_batch_size"] = 2
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(form.processes), str(ROOT / "train.py"), *config),
            *(f"--{key}={value}" for key, value in settings.items()),
        ]

    def start(
        self, form: Form, *config: str, gpu: int | None = None, **more: object
    ) -> subprocess.Popen[str]:
        """Train in this form, on one GPU or on all."""
        environment = dict(os.environ)
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        return subprocess.Popen(
            self.command(form, *config, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def finish(self, form: Form, process: subprocess.Popen[str]) -> str:
        """Wait for a run; a failure ends the check."""
        output, _ = process.communicate()
        if process.returncode:
            sys.exit(f"{form.name} failed:\n{output}")
        return output

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

    def row(self, form: Form, reference: list[float]) -> tuple[str, float]:
        """A line of the table, and how far the first losses are from the reference."""
        losses = self.losses(form.name)
        half = len(losses) // 2
        early = max(
            abs(a / b - 1) for a, b in zip(losses[:EARLY], reference, strict=False)
        )
        difference = abs(
            statistics.mean(losses[half:]) / statistics.mean(reference[half:]) - 1
        )
        clips = statistics.median(self.scalars(form.name, "clips_per_second")[half:])
        wait = statistics.median(self.scalars(form.name, "data_wait")[half:])
        step = int(self.base["training.global_batch_size"]) / clips * 1000
        memory = 0.0 if self.cpu else self.scalars(form.name, "memory_gib")[-1]
        host = self.scalars(form.name, "host_memory_gib")[-1]
        cells = f"{form.name:26} {losses[0]:.5f} {losses[-1]:.5f} {early:8.2%}"
        cells += f" {difference:8.2%}"
        return (
            f"{cells} {step:8.1f} {clips:8.1f} {wait:6.1%} {memory:8.2f} {host:6.2f}",
            early,
        )

    def tell_saves(self, name: str) -> None:
        """How long the loop was held up by each save."""
        blocked = self.scalars(name, "save_blocked_ms")
        if blocked:
            print(
                f"    {len(blocked)} saves held the loop up for a median of "
                f"{statistics.median(blocked):.1f} ms, at most {max(blocked):.1f} ms"
            )

    def flagship(self, most: int) -> None:
        """Train, kill, resume on one process, convert, load, encode and decode."""
        form = Form("flagship", most, self.flagship_settings(most))
        config = ("--config", str(ROOT / "train_configs/taehv.toml"))
        folder = self.output / form.name
        process = self.start(form, *config)
        wait_for(folder / f"checkpoints/step-{KILL_AFTER}/manifest.json", process)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        before = self.losses(form.name)
        one = Form(form.name, 1, form.settings)
        output = self.finish(one, self.start(one, *config))
        assert "resuming from" in output, output
        after = self.losses(form.name)
        assert len(after) == FLAGSHIP_STEPS, len(after)
        both = list(zip(before, after, strict=False))[KILL_AFTER:]
        apart = max((abs(a / b - 1) for a, b in both), default=0.0)
        weights = self.output / "flagship.pth"
        convert = ["-m", "taehv.convert", str(folder), str(weights)]
        subprocess.run([sys.executable, *convert], check=True, cwd=ROOT)
        shape = self.encode_and_decode(weights)
        clips = statistics.median(self.scalars(form.name, "clips_per_second")[-20:])
        print(
            f"flagship: killed at step {len(before)} on {most}, resumed on 1, the "
            f"{len(both)} losses of both at most {apart:.2%} apart, {clips:.1f} "
            f"clips/s on 1, {shape}"
        )
        print(*[line for line in output.splitlines() if "latents:" in line], sep="\n")

    def flagship_settings(self, most: int) -> dict[str, object]:
        """What differs from train_configs/taehv.toml: smaller, and nothing fetched."""
        teacher, weights = self.output / "cogvideox", self.output / "taecvx.pth"
        settings: dict[str, object] = {"model.checkpoint": weights}
        settings |= {"teacher.path": teacher, "training.steps": FLAGSHIP_STEPS}
        # 2 clips at a time, 2 times, as on 8 GPUs.
        settings |= {"training.global_batch_size": 4 * most}
        settings |= {"checkpoint.interval": KILL_AFTER, "validation.clips": 4}
        settings |= {"data.frames": 16, "data.crops_per_window": 2}
        if self.cpu:
            settings |= {"data.frames": 8, "training.precision": "fp32", **EAGER}
            settings |= {"training.global_batch_size": 4, "data.crops_per_window": 1}
        script = (ROOT / "tests/gpu/random_weights.py", teacher, weights)
        small = ["--small"] if self.cpu else []
        subprocess.run([sys.executable, *map(str, script), *small], check=True)
        return settings

    def encode_and_decode(self, weights: Path) -> str:
        """Use converted weights as their users do."""
        from taehv import TAEHV

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = TAEHV.from_pretrained(weights).to(device)
        frames_NTCHW = torch.rand(1, 16, 3, 128, 128, device=device)
        with torch.no_grad():
            latents_NTCHW = model.encode_video(frames_NTCHW)
            decoded_NTCHW = model.decode_video(latents_NTCHW)
        assert decoded_NTCHW.isfinite().all()
        return f"{tuple(latents_NTCHW.shape)} -> {tuple(decoded_NTCHW.shape)}"


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Until a file is there; a process that ends before ends the check."""
    while not path.exists():
        if process.poll() is not None:
            sys.exit(f"ended before {path.parent.name}:\n{process.communicate()[0]}")
        time.sleep(0.05)


def compare(check: Check, most: int) -> float:
    """Run every form and print a line of each; returns the worst early difference.

    Forms of one process run side by side, each on a GPU of its own.
    """
    print(
        f"{'processes, form':26} {'first':7} {'last':7} {'early':>8} {'late':>8} "
        f"{'ms/step':>8} {'clips/s':>8} {'wait':>6} {'GPU GiB':>8} {'host':>6}"
    )
    worst, reference = 0.0, None
    for processes, same in itertools.groupby(forms(most), lambda form: form.processes):
        width = most // processes
        group = list(same)
        for first in range(0, len(group), width):
            start = time.monotonic()
            beside = group[first : first + width]
            gpus = range(width) if width > 1 else [None]
            runs = [
                check.start(form, gpu=gpu)
                for form, gpu in zip(beside, gpus, strict=False)
            ]
            for form, run in zip(beside, runs, strict=True):
                check.finish(form, run)
                reference = reference or check.losses(form.name)
                line, early = check.row(form, reference)
                print(f"{line}  ({time.monotonic() - start:.0f} s in all)", flush=True)
                check.tell_saves(form.name)
                worst = max(worst, 0 if "seed" in form.name else early)
    return worst


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", type=Path, help="folder of videos")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cpu", action="store_true", help="rehearse over gloo")
    parser.add_argument("--only", choices=("forms", "flagship"))
    settings = parser.parse_args()
    most = 2 if settings.cpu else torch.cuda.device_count()
    device = "CPU" if settings.cpu else torch.cuda.get_device_name()
    worst = 0.0
    with tempfile.TemporaryDirectory() as output:
        check = Check(settings.clips, Path(output), settings.steps, settings.cpu)
        print(f"{most} x {device}, PyTorch {torch.__version__}", flush=True)
        if settings.only != "flagship":
            worst = compare(check, most)
        if settings.only != "forms":
            check.flagship(most)
    if worst > TOLERANCE:
        sys.exit(f"losses differ by {worst:.1%}")


if __name__ == "__main__":
    main()
