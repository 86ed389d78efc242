"""A run with buckets, a mixture and an index, stopped and taken up again."""

from __future__ import annotations

from pathlib import Path

from conftest import Run

SETTINGS = {
    "data__buckets": "[[5, 16, 16, 1], [9, 16, 24, 1]]",
    "data__batch_multiple": 2,
    "data__weights": "1,2",
    "training__global_batch_size": 4,
    "training__steps": 6,
    "optim__schedule": "constant",
    "validation__clips": 0,
    "checkpoint__interval": 3,
}


def test_a_resumed_run_with_buckets_is_the_same(tmp_path: Path, videos: Path) -> None:
    sources = f"{videos}/[ab].mp4,{videos}/*d.mp4"
    more = {"data__sources": sources, "data__holdout": "b.mp4", **SETTINGS}
    more |= {"data__index": tmp_path / "index"}
    whole, parted = (Run(tmp_path / n, videos, **more) for n in ("whole", "parted"))
    output = whole.finish()
    assert "4 clips a step of 5 x 16 x 16 or 2 clips a step of 9 x 16 x 24" in output
    parted.finish(training__steps=3)
    steps = [record["samples"] for record in whole.metrics()]
    sizes = {b - a for a, b in zip([0, *steps], steps, strict=False)}
    assert sizes == {2, 4}
    parted.finish()
    assert [r["samples"] for r in parted.metrics()] == steps
    assert parted.losses() == whole.losses()
