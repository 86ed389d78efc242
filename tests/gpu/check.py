"""Every form of training on this machine's GPUs, compared: losses, time, memory.

Then the whole path once: train sharded with CPU offload, kill, resume on one process,
convert, load, encode and decode. Exits with 1 if anything differs that must agree.
"""

from __future__ import annotations

import argparse
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
EARLY = 10
TOLERANCE = 0.03
"""How far a loss may be off in the first EARLY steps, by bf16 and the order of sums.

Later the smallest difference grows; compare the last half with that of another seed.
"""


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
        Form("1, other seed", 1, {"training.seed": 1}),
        Form("1, eager", 1, {"compile.enable": "false"}),
        Form("1, fsdp", 1, FSDP),
        Form("1, fsdp, offload", 1, OFFLOAD),
        Form("1, two micro-batches", 1, {"training.local_batch_size": 2}),
    ]
    many = [
        Form(f"{most}, replicate", most, {}),
        Form(f"{most}, fsdp", most, FSDP),
        Form(f"{most}, fsdp, eager", most, {**FSDP, "compile.enable": "false"}),
        Form(f"{most}, fsdp, offload", most, OFFLOAD),
    ]
    if most >= 4:
        hsdp = {"parallelism.mode": "hsdp", "parallelism.shard_size": most // 2}
        many.append(Form(f"{most}, hsdp", most, hsdp))
    return one + (many if most > 1 else [])


class Check:
    """The runs of one check, in a folder of their own."""

    def __init__(self, clips: Path, output: Path, steps: int, cpu: bool) -> None:
        self.output = output
        self.base = {
            "data.root": clips,
            "job.output_dir": output,
            "training.steps": steps,
            "training.global_batch_size": 16,
            "data.frames": 13,
            "data.height": 128,
            "data.width": 128,
            "data.crops_per_window": 2,
            "validation.interval": 10**6,
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
                "validation.clips": 2,
            }

    def command(self, form: Form, **more: object) -> list[str]:
        """The command line of a form."""
        settings = {**self.base, "job.name": form.name, **form.settings, **more}
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(form.processes), str(ROOT / "train.py")),
            *(f"--{key}={value}" for key, value in settings.items()),
        ]

    def run(self, form: Form, **more: object) -> str:
        """Train in this form; a failure ends the check."""
        done = subprocess.run(
            self.command(form, **more), capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{form.name} failed:\n{done.stdout}\n{done.stderr}")
        return done.stdout + done.stderr

    def losses(self, name: str) -> list[float]:
        """The loss of every step of a run."""
        lines = (self.output / name / "metrics.jsonl").open()
        return [json.loads(line)["loss"] for line in lines]

    def scalars(self, name: str, tag: str) -> list[float]:
        """The values of one curve in TensorBoard."""
        events = EventAccumulator(str(self.output / name / "tensorboard"))
        return [event.value for event in events.Reload().Scalars(f"train/{tag}")]

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
        on_cpu = self.base.get("training.device") == "cpu"
        memory = 0.0 if on_cpu else self.scalars(form.name, "memory_gib")[-1]
        host = self.scalars(form.name, "host_memory_gib")[-1]
        cells = f"{form.name:24} {losses[0]:.5f} {losses[-1]:.5f} {early:8.2%}"
        cells += f" {difference:8.2%}"
        return (
            f"{cells} {step:8.1f} {clips:8.1f} {wait:6.1%} {memory:8.2f} {host:6.2f}",
            early,
        )

    def whole_path(self, most: int) -> None:
        """Train, kill, resume on one process, convert, load, encode and decode."""
        form = Form("whole path", most, {**OFFLOAD, "model.variant": "taecvx"})
        frames = 9 if self.base.get("training.device") == "cpu" else 16
        more = {"checkpoint.interval": 10, "data.frames": frames}
        folder = self.output / form.name
        process = subprocess.Popen(
            self.command(form, **more),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while not (folder / "checkpoints/step-20/.metadata").exists():
            if process.poll() is not None:
                sys.exit("whole path: the run ended before step 20")
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        steps = len(self.losses(form.name))
        output = self.run(Form(form.name, 1, form.settings), **more)
        assert "resuming from" in output, output
        weights = self.output / "whole.pth"
        convert = ["-m", "taehv.convert", str(folder), str(weights)]
        subprocess.run([sys.executable, *convert], check=True, cwd=ROOT)
        shape = self.encode_and_decode(weights, frames)
        print(f"whole path: killed at step {steps} on {most}, resumed on 1, {shape}")

    def encode_and_decode(self, weights: Path, frames: int) -> str:
        """Use converted weights as their users do."""
        from taehv import TAEHV

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = TAEHV.from_pretrained(weights).to(device)
        frames_NTCHW = torch.rand(1, frames, 3, 128, 128, device=device)
        with torch.no_grad():
            latents_NTCHW = model.encode_video(frames_NTCHW)
            decoded_NTCHW = model.decode_video(latents_NTCHW)
        assert decoded_NTCHW.isfinite().all()
        return f"{tuple(latents_NTCHW.shape)} -> {tuple(decoded_NTCHW.shape)}"


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clips", type=Path, help="folder of videos")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cpu", action="store_true", help="rehearse over gloo")
    settings = parser.parse_args()
    most = 2 if settings.cpu else torch.cuda.device_count()
    device = "CPU" if settings.cpu else torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as output:
        check = Check(settings.clips, Path(output), settings.steps, settings.cpu)
        print(f"{most} x {device}, PyTorch {torch.__version__}", flush=True)
        print(
            f"{'processes, form':24} {'first':7} {'last':7} {'early':>8} {'late':>8} "
            f"{'ms/step':>8} {'clips/s':>8} {'wait':>6} {'GPU GiB':>8} {'host':>6}"
        )
        worst, reference = 0.0, None
        for form in forms(most):
            start = time.monotonic()
            check.run(form)
            reference = reference or check.losses(form.name)
            line, early = check.row(form, reference)
            print(f"{line}  ({time.monotonic() - start:.0f} s in all)", flush=True)
            if "seed" not in form.name:
                worst = max(worst, early)
        check.whole_path(most)
    if worst > TOLERANCE:
        sys.exit(f"losses differ by {worst:.1%}")


if __name__ == "__main__":
    main()
