"""Every form of training on this machine's GPUs, compared: losses, time, memory.

Then the flagship's settings once, with a full-size CogVideoX VAE and a student of new,
random weights: train, kill, resume on one process, convert, load, encode and decode.
Exits with 1 if anything differs that must agree.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from runs import EAGER, FLAGSHIP, FSDP, OFFLOAD, ROOT, Failed, Form, Runs, wait_for

NO_GRAPH = {"compile.cuda_graph": "false"}
SAVES = 20
SAVE_INTERVAL = 100
"""Steps, in which a save is done and the next need not wait for it."""
EARLY = 10
TOLERANCE = 0.03
"""How far a loss may be off in the first EARLY steps, by bf16 and the order of sums.

Later the smallest difference grows; compare the last half with that of another seed.
"""
FLAGSHIP_STEPS = 100
KILL_AFTER = 40


def forms(most: int, cpu: bool) -> list[Form]:
    """What to compare on a machine that has so many GPUs."""
    one = [
        Form("1, compiled", 1, {}),
        Form("1, eager", 1, EAGER),
        Form("1, other seed", 1, {"training.seed": 1}),
        Form("1, fsdp", 1, FSDP),
        Form("1, fsdp, offload", 1, OFFLOAD),
        Form("1, two micro-batches", 1, {"training.local_batch_size": 8}),
    ]
    saves = {**FSDP, "training.steps": SAVES * SAVE_INTERVAL, "checkpoint.keep": 2}
    saves |= {"checkpoint.interval": SAVE_INTERVAL}
    if cpu:
        saves |= {"training.steps": 20, "checkpoint.interval": 5}
    awaited = {**saves, "checkpoint.asynchronous": "false"}
    many = [
        Form(f"{most}, replicate", most, {}),
        Form(f"{most}, fsdp", most, FSDP),
        Form(f"{most}, fsdp, offload", most, OFFLOAD),
        Form(f"{most}, replicate, eager", most, EAGER),
    ]
    if not cpu:
        many.insert(2, Form(f"{most}, fsdp, no graph", most, {**FSDP, **NO_GRAPH}))
    if most >= 4:
        hsdp = {"parallelism.mode": "hsdp", "parallelism.shard_size": most // 2}
        many.insert(2, Form(f"{most}, hsdp", most, hsdp))
    saving = [
        Form(f"{most}, fsdp, saves", most, saves),
        Form(f"{most}, fsdp, saves awaited", most, awaited),
    ]
    return one + (many if most > 1 else []) + saving


class Check(Runs):
    """The runs of one check, in a folder of their own."""

    def __init__(self, clips: Path, output: Path, steps: int, cpu: bool) -> None:
        # Low, since a high rate makes a chaos of the smallest difference.
        super().__init__(clips, output, steps, cpu, {"optim.lr": 1e-4})

    def row(self, form: Form, reference: list[float]) -> tuple[str, float]:
        """A line of the table, and how far the first losses are from the reference."""
        losses = self.losses(form.name)
        early = max(
            abs(a / b - 1) for a, b in zip(losses[:EARLY], reference, strict=False)
        )
        late = "-"
        if len(losses) == len(reference):  # else other steps have the same rate
            half = len(losses) // 2
            means = statistics.mean(losses[half:]), statistics.mean(reference[half:])
            late = f"{abs(means[0] / means[1] - 1):.2%}"
        speed = self.speed(form.name)
        clips = speed.clips_per_second
        step = int(self.base["training.global_batch_size"]) / clips * 1000
        cells = f"{form.name:26} {losses[0]:.5f} {losses[-1]:.5f} {early:8.2%}"
        cells += f" {late:>8}"
        return (
            f"{cells} {step:8.1f} {clips:8.1f} {speed.data_wait:6.1%} "
            f"{speed.gpu_gib:8.2f} {speed.host_gib:6.2f}",
            early,
        )

    def tell_saves(self, name: str) -> None:
        """How long the loop was held up by each save, and what it cost in all."""
        blocked = self.scalars(name, "save_blocked_ms")[:-1]  # the last is waited for
        if not blocked:
            return
        clips = self.scalars(name, "clips_per_second")
        size = int(self.base["training.global_batch_size"])
        steps = [size / speed * 1000 for speed in clips[len(clips) // 10 :]]
        slower = sum(steps) - len(steps) * statistics.median(steps)
        print(
            f"    {len(blocked)} saves held the loop up for a median of "
            f"{statistics.median(blocked):.1f} ms, at most {max(blocked):.1f} ms, and "
            f"steps beside each took {slower / len(blocked):.1f} ms more than usual; "
            "a save was done in "
            f"{statistics.median(self.scalars(name, 'save_seconds')):.2f} s"
        )

    def flagship(self, most: int) -> None:
        """Train, kill, resume on one process, convert, load, encode and decode."""
        settings = self.flagship_settings(most, FLAGSHIP_STEPS)
        settings |= {"checkpoint.interval": KILL_AFTER, "validation.clips": 4}
        form, config = Form("flagship", most, settings), FLAGSHIP
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


def compare(check: Check, chosen: list[Form], most: int) -> float:
    """Run every form and print a line of each; returns the worst early difference.

    Forms of one process run side by side, each on a GPU of its own.
    """
    print(
        f"{'processes, form':26} {'first':7} {'last':7} {'early':>8} {'late':>8} "
        f"{'ms/step':>8} {'clips/s':>8} {'wait':>6} {'GPU GiB':>8} {'host':>6}"
    )
    worst, reference = 0.0, None
    for processes, same in itertools.groupby(chosen, lambda form: form.processes):
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
                try:
                    check.finish(form, run)
                except Failed as failure:
                    print(failure, flush=True)
                    worst = float("inf")
                    continue
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
    parser.add_argument("--match", default="", help="forms whose names it is found in")
    settings = parser.parse_args()
    most = 2 if settings.cpu else torch.cuda.device_count()
    device = "CPU" if settings.cpu else torch.cuda.get_device_name()
    worst = 0.0
    with tempfile.TemporaryDirectory() as output:
        check = Check(settings.clips, Path(output), settings.steps, settings.cpu)
        print(f"{most} x {device}, PyTorch {torch.__version__}", flush=True)
        with check.ended():
            if settings.only != "flagship":
                found = forms(most, settings.cpu)
                chosen = [f for f in found if re.search(settings.match, f.name)]
                worst = compare(check, chosen, most)
            if settings.only != "forms":
                try:
                    check.flagship(most)
                except Failed as failure:
                    sys.exit(str(failure))
    if worst > TOLERANCE:
        sys.exit(f"losses differ by {worst:.1%}")


if __name__ == "__main__":
    main()
