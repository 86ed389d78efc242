"""Training from a cache: the same steps as with the teacher itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import ROOT, Run

from taehv.config import read_config
from taehv.errors import UserError
from taehv.precompute import precompute

TEACHER = {
    "teacher__kind": "cache_teachers:Projection",
    "data__crop_scale": "1,1",
    "data__stride": "1,1",
    "data__flip": 0,
}
WINDOWS = {"cache.shard_windows": 4, "cache.batch_size": 2}


def write_cache(run: Run, cache: Path, **sizes: int) -> None:
    """Write a cache with the settings of a run."""
    settings = {
        **run.settings,
        **WINDOWS,
        **{f"cache.{name}": size for name, size in sizes.items()},
        "data.cache": cache,
    }
    precompute(read_config([f"--{key}={value}" for key, value in settings.items()]))


@pytest.fixture(autouse=True)
def _teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests/unit")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests/unit'}")


def test_a_cache_trains_as_its_teacher_does(videos: Path, tmp_path: Path) -> None:
    """One window, as large as the clips, leaves one crop: the first that is live."""
    settings = {"training__steps": 3, "training__global_batch_size": 1}
    live = Run(tmp_path / "live", videos, **TEACHER, **settings)
    live.train()
    write_cache(live, tmp_path / "cache", windows=1, frames=5, height=16, width=16)
    cached = Run(tmp_path / "cached", videos, **settings, data__root="")
    output = cached.train(data__cache=tmp_path / "cache", validation__height=32)
    assert "1 windows to train on, 2 held out" in output
    assert "validation clips are those of the cache, 5 x 16 x 16: the sizes" in output
    # The latents are kept in 16 bits.
    for name in ("loss", "latent", "reconstruction", "grad_norm", "psnr"):
        theirs, ours = (run.metrics()[0][name] for run in (live, cached))
        assert ours == pytest.approx(theirs, rel=2e-3), name
    # The later steps train on other clips.
    assert cached.losses()[1] != pytest.approx(live.losses()[1], rel=2e-3)
    first, theirs = (
        json.loads((run.folder / "validation.jsonl").read_text().splitlines()[0])
        for run in (cached, live)
    )
    for name in ("psnr", "decoder_psnr", "teacher_psnr", "latent_correlation"):
        assert first[name] == pytest.approx(theirs[name], abs=2e-3), name
    about = json.loads((tmp_path / "cache/cache.json").read_text())
    del about["teacher"]["fingerprint"]
    (tmp_path / "cache/cache.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="was written with another teacher"):
        live.train(
            data__cache=tmp_path / "cache",
            job__name="other",
            teacher__kind="cache_teachers:Other",
        )


def test_crops_inside_a_window_are_judged_after_their_lead_in(
    videos: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path, videos, **TEACHER, training__steps=4, validation__interval=100)
    write_cache(run, tmp_path / "cache", windows=6, frames=13, height=32, width=32)
    settings = {"data__cache": tmp_path / "cache", "training__global_batch_size": 4}
    run.finish(2, **settings, parallelism__mode="fsdp")
    records = run.metrics()
    assert len(records) == 4 and all(record["loss"] > 0 for record in records)
    about = json.loads((run.folder / "checkpoints/step-4/about.json").read_text())
    assert about["latent_space"] == "HunyuanVideo"
