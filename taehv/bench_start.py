"""Time from launch to the first training step, without and with compiled code kept."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from taehv.bench import Bench, made_up_videos
from taehv.errors import UserError

TRAIN = Path(__file__).parent.parent / "train.py"
STEPS = 10
COLUMNS = {"compile cache": 5, "step 1, s": 6, f"step {STEPS}, s": 6, "end, s": 6}
DEADLINE_SECONDS = 600


def bench_start(bench: Bench) -> None:
    """Launch a training as a user does, twice, with a compile cache of its own.

    Raises:
        UserError: train.py is not beside the package.
    """
    if not TRAIN.exists():
        raise UserError(f"{TRAIN} is not there: start from a copy of the repository")
    bench.report.table("seconds from launch", COLUMNS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = bench.options.sizes[0]
        root = bench.options.root or made_up_videos(folder / "videos", size)
        for cache in ("empty", "full"):
            seconds = _launch(bench, str(root), folder, cache)
            cells = zip(list(COLUMNS)[1:], seconds, strict=True)
            bench.report.row(**{"compile cache": cache}, **dict(cells))


def _launch(bench: Bench, root: str, folder: Path, name: str) -> list[float]:
    """Seconds until the first step, step STEPS and the end."""
    settings = {
        "data.root": root,
        "data.stride": "1,1",
        "data.workers": bench.options.workers,
        **bench.options.sizes[0].settings,
        "job.output_dir": folder / "outputs",
        "job.name": name,
        "model.variant": bench.options.variants[0],
        "training.steps": STEPS,
        "training.global_batch_size": bench.options.clips,
        "validation.clips": 0,
    }
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", str(TRAIN)),
        *(f"--{key}={value}" for key, value in settings.items()),
    ]
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    metrics = folder / "outputs" / name / "metrics.jsonl"
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **caches},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            marks = list(_marks(process, metrics, begin))
        finally:
            process.terminate()
            code = process.wait()
        if code:
            output.seek(0)
            raise RuntimeError(f"the training that was timed failed:\n{output.read()}")
    return [marks[0], marks[STEPS - 1], marks[-1]]


def _marks(
    process: subprocess.Popen[bytes], metrics: Path, begin: float
) -> Iterator[float]:
    """Seconds until each step, and until the end."""
    noted, has_ended = 0, False
    while not has_ended and time.monotonic() < begin + DEADLINE_SECONDS:
        has_ended = process.poll() is not None
        done = metrics.read_text().count("\n") if metrics.exists() else 0
        yield from [time.monotonic() - begin] * (done - noted)
        noted = done
        time.sleep(0.01)
    yield time.monotonic() - begin
