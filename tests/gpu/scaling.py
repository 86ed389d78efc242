"""The flagship's settings on all GPUs of this machine: speed, scaling, faults.

Runs train_configs/taehv.toml, with random weights in place of what it downloads, live
and from a latent cache, in every form; training steps on 1, 2, 4, ... GPUs; what a save
costs; a rank that is killed and started again by torchrun; a run that goes on with half
of the processes and then with all. Prints the tables for docs/benchmarks.md; exits with
1 where a run loses more than the steps since its last save.

python tests/gpu/scaling.py FOLDER_OF_VIDEOS [--steps 200] [--json FILE] [--cpu]
"""

from __future__ import annotations

import argparse
import json
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
from runs import FLAGSHIP, FSDP, OFFLOAD, ROOT, Failed, Form, Runs, wait_for

from taehv.benchmark import about
from taehv.measure import Report
from taehv.storage import MANIFEST

PARTS = ("forms", "weak", "faults")
SAVES_A_RUN = 5
TOLERANCE = 0.03
"""How far losses may be off after a restart, by bf16 and the order of sums."""
DEADLINE_SECONDS = 300
FORM_COLUMNS = {
    "processes": 5,
    "latents": 6,
    "form": 22,
    "ms": 5,
    "clips/s": 6,
    "wait": 6,
    "GPU GiB": 6,
    "host GiB": 6,
    "run s": 5,
}
WEAK_COLUMNS = {
    "processes": 5,
    "form": 9,
    "ms": 5,
    "p90": 5,
    "kernels": 6,
    "comm": 6,
    "host": 6,
    "wait": 6,
    "GiB": 6,
    "clips/s": 6,
    "of N times one": 8,
}


class Scaling(Runs):
    """The runs and their tables.

    Args:
        clips: folder of videos.
        output: folder of the runs.
        steps: of a run.
        report: takes the tables.
        most: processes.
        cpu: small, over gloo.
    """

    def __init__(
        self,
        clips: Path,
        output: Path,
        steps: int,
        report: Report,
        most: int,
        cpu: bool,
    ) -> None:
        super().__init__(clips, output, steps, cpu, {})
        self.steps, self.report, self.most = steps, report, most
        self.flagship = self.flagship_settings(most, steps)
        self.failures: list[str] = []

    # --- forms -----------------------------------------------------------------------

    def forms(self) -> None:
        """The flagship live and from the cache, and other forms from the cache."""
        title = (
            f"train_configs/taehv.toml, {self.flagship['training.global_batch_size']}"
        )
        self.report.table(f"{title} clips a step, {self.steps} steps", FORM_COLUMNS)
        self._form(Form("live, fsdp, offload", self.most, self.flagship))
        self.write_cache()
        hsdp = [n for n in (2, self.most // 2) if 1 < n < self.most]
        forms = {
            "fsdp, offload": OFFLOAD,
            "fsdp": {**FSDP, "parallelism.cpu_offload": "false"},
            **{f"hsdp, shards of {n}": hsdp_settings(n) for n in dict.fromkeys(hsdp)},
            "replicate": {
                "parallelism.mode": "replicate",
                "parallelism.cpu_offload": "false",
            },
        }
        for name, settings in forms.items():
            self._form(self.cached(f"cached, {name}", settings))

    def write_cache(self) -> None:
        """Encode windows once, on all GPUs, if that is not done."""
        if self.cache.exists():
            return
        windows = {"cache.frames": 32, "cache.windows": 64 * self.most}
        if self.cpu:
            windows |= {"cache.frames": 16, "cache.windows": 16}
            windows |= {"cache.height": 32, "cache.width": 32}
        settings = {**self.base, **self.flagship, **windows, "data.cache": self.cache}
        command = [*torchrun(self.most), "-m", "taehv.precompute", *FLAGSHIP]
        command += [f"--{key}={value}" for key, value in settings.items()]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            sys.exit(f"precompute failed:\n{done.stdout}{done.stderr}")
        told = re.search(r"encoded at .*", done.stderr)
        self.report.say(f"precompute on {self.most}: {told[0] if told else 'done'}")

    @property
    def cache(self) -> Path:
        """Where the latents are."""
        return self.output / "cache"

    def cached(self, name: str, settings: dict[str, object]) -> Form:
        """The flagship from the cache."""
        more = {**self.flagship, "data.cache": self.cache, "teacher.kind": ""}
        return Form(name, self.most, {**more, "teacher.path": "", **settings})

    def _form(self, form: Form) -> None:
        begin = time.monotonic()
        self.finish(form, self.start(form, *FLAGSHIP))
        speed = self.speed(form.name)
        batch = int(str(self.flagship["training.global_batch_size"]))
        latents, _, name = form.name.partition(", ")
        self.report.row(
            **{"processes": form.processes, "latents": latents, "form": name},
            **{"ms": 1000 * batch / speed.clips_per_second},
            **{"clips/s": speed.clips_per_second, "wait": f"{speed.data_wait:.1%}"},
            **{"GPU GiB": speed.gpu_gib, "host GiB": speed.host_gib},
            **{"run s": time.monotonic() - begin},
        )

    # --- weak scaling ----------------------------------------------------------------

    def weak(self) -> None:
        """Training steps of the same size on each of 1, 2, 4, ... processes."""
        self.report.table("weak scaling of training steps, times in ms", WEAK_COLUMNS)
        counts = [n for n in (1, 2, 4, 8) if n <= self.most]
        alone: dict[str, float] = {}
        for count in counts:
            forms = ["replicate", "fsdp"]
            if count == self.most:
                forms += ["offload"]
                forms += [
                    f"hsdp-{n}" for n in dict.fromkeys((2, count // 2)) if 1 < n < count
                ]
            for row in self._steps(count, forms):
                one = alone.setdefault("replicate", row["clips/s"])
                share = row["clips/s"] / (count * one)
                self.report.row(
                    **row, **{"processes": count, "of N times one": f"{share:.1%}"}
                )

    def _steps(self, processes: int, forms: list[str]) -> list[dict]:
        path = self.output / f"steps-{processes}.json"
        command = [*torchrun(processes), "-m", "taehv.benchmark", "--json", str(path)]
        command += ["--forms", ",".join(forms), "--ways", "default"]
        if not self.cpu:
            command += ["--sizes", "12x128x128"]
        environment = {**os.environ}
        if self.cpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environment
        )
        if done.returncode:
            sys.exit(f"the benchmark failed:\n{done.stdout}{done.stderr}")
        return json.loads(path.read_text())["tables"]["training step, times in ms"]

    # --- faults ----------------------------------------------------------------------

    def faults(self) -> None:
        """Saves, a killed rank, fewer processes; the losses stay the same."""
        self.write_cache()
        interval = max(1, self.steps // SAVES_A_RUN)
        saves = {"checkpoint.interval": interval, "checkpoint.keep": 0, **OFFLOAD}
        whole = self.cached("saves", saves)
        self.finish(whole, self.start(whole, *FLAGSHIP))
        expected = self.losses(whole.name)
        blocked = self.scalars(whole.name, "save_blocked_ms")
        self.report.say(
            f"\nsaves: {len(blocked)} held the loop up for a median of "
            f"{statistics.median(blocked):.1f} ms, at most {max(blocked):.1f} ms"
        )
        self._killed(self.cached("killed", saves), interval, expected)
        self._resized(self.cached("resized", saves), interval, expected)

    def _killed(self, form: Form, interval: int, expected: list[float]) -> None:
        """Kill the last rank, which torchrun is to start again with all others."""
        process = self.start(form, *FLAGSHIP, launch=("--max-restarts", "1"))
        folder = self.output / form.name
        wait_for(folder / f"checkpoints/step-{interval}" / MANIFEST, process)
        os.kill(ranks_of(process)[-1], signal.SIGKILL)
        begin, before = time.monotonic(), len(self.losses(form.name))
        metrics = folder / "metrics.jsonl"
        number = metrics.stat().st_ino
        while process.poll() is None and time.monotonic() < begin + DEADLINE_SECONDS:
            # A run that resumes writes its records anew.
            is_anew = metrics.stat().st_ino != number
            if is_anew and len(self.losses(form.name)) > interval:
                break
            time.sleep(0.02)
        seconds = time.monotonic() - begin
        output = self.finish(form, process)
        found = re.search(r"resuming from \S*step-(\d+)", output)
        if found is None:
            sys.exit(f"killed: torchrun did not start it again:\n{output}")
        lost = before - int(found[1])
        self.report.say(
            f"a rank killed at step {before} of {self.steps}: all went on from step "
            f"{found[1]} after {seconds:.1f} s, {lost} steps done twice"
        )
        if lost > interval:
            self.failures.append(f"{lost} steps lost, saves being {interval} apart")
        self._compare(form.name, expected)

    def _resized(self, form: Form, interval: int, expected: list[float]) -> None:
        """Stop, go on with half of the processes, stop, go on with all."""
        half = max(1, self.most // 2)
        for count, stop_after in ((self.most, interval), (half, 2 * interval)):
            process = self.start(Form(form.name, count, form.settings), *FLAGSHIP)
            path = self.output / form.name / "metrics.jsonl"
            wait_for(path, process)
            while len(self.losses(form.name)) < stop_after and process.poll() is None:
                time.sleep(0.02)
            process.terminate()  # torchrun passes it on; all save and end
            process.communicate(timeout=DEADLINE_SECONDS)
        self.finish(form, self.start(form, *FLAGSHIP))
        self.report.say(f"stopped and gone on: {self.most} -> {half} -> {self.most}")
        self._compare(form.name, expected)

    def _compare(self, name: str, expected: list[float]) -> None:
        found = self.losses(name)
        if len(found) != len(expected):
            self.failures.append(f"{name}: {len(found)} steps, not {len(expected)}")
            return
        pairs = zip(found, expected, strict=True)
        apart = max(abs(a / b - 1) for a, b in pairs)
        self.report.say(f"    its losses are within {apart:.2%} of an unbroken run's")
        if apart > TOLERANCE:
            self.failures.append(f"{name}: losses differ by {apart:.1%}")


def hsdp_settings(shard_size: int) -> dict[str, object]:
    """Shards of so many processes."""
    return {
        "parallelism.mode": "hsdp",
        "parallelism.shard_size": shard_size,
        "parallelism.cpu_offload": "false",
    }


def torchrun(processes: int) -> list[str]:
    """The beginning of a command line."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc_per_node", str(processes)]


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process numbers of the ranks that a torchrun has started, in their order."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = [int(number) for number in path.read_text().split()]
    commands = {n: Path(f"/proc/{n}/cmdline").read_text() for n in children}
    return sorted(n for n, command in commands.items() if "train.py" in command)


def main() -> None:
    """Run all parts and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", type=Path, help="folder of videos")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path, help="file that takes the tables")
    parser.add_argument("--cpu", action="store_true", help="rehearse over gloo")
    parser.add_argument("--only", choices=PARTS, help="one part alone")
    options = parser.parse_args()
    most = 2 if options.cpu else torch.cuda.device_count()
    device = torch.device("cpu" if options.cpu else "cuda")
    report = Report(about(device, most), options.json)
    with tempfile.TemporaryDirectory() as output:
        scaling = Scaling(
            options.clips, Path(output), options.steps, report, most, options.cpu
        )
        with scaling.ended():
            for part in PARTS:
                if options.only in (None, part):
                    try:
                        getattr(scaling, part)()
                    except Failed as failure:
                        scaling.failures.append(f"{part}: {failure}")
    if scaling.failures:
        sys.exit("\n".join(scaling.failures))


if __name__ == "__main__":
    main()
