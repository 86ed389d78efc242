"""A run with buckets, a mixture and an index, stopped and taken up again."""

from __future__ import annotations

from pathlib import Path

from conftest import Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SETTINGS = {
    "data__buckets": "[[5, 16, 16, 1], [9, 16, 24, 1]]",
    "data__batch_multiple": 2,
    "data__crops_per_window": 2,
    "data__window_frames": 7,
    "data__weights": "1,2",
    "logging__interval": 1,
    "training__global_batch_size": 4,
    "training__steps": 6,
    "optim__schedule": "constant",
    "validation__clips": 0,
    "checkpoint__interval": 3,
}


def diversity(run: Run, kind: str) -> list[float]:
    """How many different ones each step had, as TensorBoard shows it."""
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    return [event.value for event in events.Scalars(f"data/distinct_{kind}")]


def test_a_resumed_run_with_buckets_is_the_same(tmp_path: Path, videos: Path) -> None:
    sources = f"{videos}/[ab].mp4,{videos}/*d.mp4"
    more = {"data__sources": sources, "data__holdout": "b.mp4", **SETTINGS}
    more |= {"data__index": tmp_path / "index"}
    whole, parted = (Run(tmp_path / n, videos, **more) for n in ("whole", "parted"))
    output = whole.train()
    assert "4 clips a step of 5 x 16 x 16 or 2 clips a step of 9 x 16 x 24" in output
    parted.train(training__steps=3)
    steps = [record["samples"] for record in whole.metrics()]
    sizes = [b - a for a, b in zip([0, *steps], steps, strict=False)]
    assert {*sizes} == {2, 4}
    windows, files = (diversity(whole, kind) for kind in ("windows", "files"))
    assert windows == [size / 2 for size in sizes]
    assert all(1 <= count <= 2 for count in files)
    parted.train()
    assert [r["samples"] for r in parted.metrics()] == steps
    assert parted.losses() == whole.losses()
