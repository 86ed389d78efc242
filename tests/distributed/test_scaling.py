"""The measurements of many GPUs, rehearsed small, so that they go on working."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.soak
def test_scaling_is_measured_on_the_cpu(videos: Path, tmp_path: Path) -> None:
    path = tmp_path / "scaling.json"
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "tests/gpu/scaling.py", videos),
            *("--cpu", "--steps", "8", "--json", path),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    forms, weak = json.loads(path.read_text())["tables"].values()
    assert [(row["latents"], row["form"]) for row in forms] == [
        ("live", "fsdp, offload"),
        ("cached", "fsdp, offload"),
        ("cached", "fsdp"),
        ("cached", "replicate"),
    ]
    assert [(row["processes"], row["form"]) for row in weak] == [
        (1, "replicate"),
        (1, "fsdp"),
        (2, "replicate"),
        (2, "fsdp"),
        (2, "offload"),
    ]
    assert all(row["clips/s"] > 0 for row in [*forms, *weak])
    assert "all went on from step" in done.stdout
    assert "2 -> 1 -> 2" in done.stdout
