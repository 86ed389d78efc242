"""The benchmark measures the real parts, and says what it measured."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from taehv.bench import Bench, Size, Student, clips_of
from taehv.bench_memory import Attempt, attempt, largest_batch
from taehv.benchmark import main
from taehv.config import load_config
from taehv.distributed import started
from taehv.errors import UserError
from taehv.measure import Report
from taehv.sections import Parallelism
from taehv.trainer import train


def benchmark(*arguments: object) -> str:
    """What the command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "taehv.benchmark", *map(str, arguments)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def printed_rows(output: str) -> list[dict[str, str]]:
    """The rows of all tables as printed, by their columns."""
    rows, columns = [], None
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if not line.startswith("|"):
            columns = None
        elif columns is None:
            columns = cells
        elif not set(cells[0]) <= {"-"}:
            rows.append(dict(zip(columns, cells, strict=True)))
    return rows


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a small measurement printed, and its file."""
    path = tmp_path_factory.mktemp("benchmark") / "results.json"
    parts = ["--train", "--decode", "--curves", "--teacher"]
    small = ["--sizes", "5x16x16,5x32x32", "--decode-sizes", "5x16x16"]
    small += ["--curve-steps", 10, "--teacher-rows", "eager", "--calls", 3]
    output = benchmark(*parts, *small, "--json", path)
    return output, json.loads(path.read_text())


def test_steps_are_measured(measured: tuple[str, dict[str, Any]]) -> None:
    output, content = measured
    steps = content["tables"]["training step, times in ms"]
    named = [(row["size"], row["way"]) for row in steps]
    ways = ("published", "plain")
    assert named == [(size, way) for size in ("5x16x16", "5x32x32") for way in ways]
    for row in steps:
        assert row["clips/s"] == pytest.approx(2 / row["ms"] * 1000)
        assert row["frames/s"] == pytest.approx(5 * row["clips/s"])
        share = row["TFLOP/s"] / content["peak TFLOP/s"]
        assert row["of peak"] == f"{share:.1%}"
        assert 0 < row["ms"] <= row["p90"]
        assert 0 <= row["wait"] < row["ms"]
    small, large = steps[0], steps[2]
    operations = [row["TFLOP/s"] * row["ms"] for row in (small, large)]
    assert operations[1] == pytest.approx(4 * operations[0], rel=0.01)


def test_decoding_is_measured(measured: tuple[str, dict[str, Any]]) -> None:
    rows = measured[1]["tables"]["decoding in float32, times in ms"]
    assert [(row["what"], row["way"]) for row in rows] == [
        ("whole", "published"),
        ("whole", "plain"),
        ("whole", "fused"),
        ("by latent", "published"),
        ("by latent", "fused"),
    ]
    for row in rows[:3]:
        assert float(row["error"]) < 1e-5
    for row in rows:
        assert row["ms"] > 0 and row["speed-up"] > 0


def test_curves_are_compared(measured: tuple[str, dict[str, Any]]) -> None:
    output, content = measured
    plain, seed, other = content["tables"]["losses of 10 steps of 5x16x16"]
    assert [row["seed"] for row in (plain, seed, other)] == [0, 1, 2]
    assert {len(row["losses"]) for row in (plain, seed, other)} == {10}
    assert plain["losses"][-1] < plain["losses"][0]
    apart = [
        abs(a / b - 1) for a, b in zip(seed["losses"], plain["losses"], strict=True)
    ]
    assert seed["largest"] == f"{max(apart):.3%}"
    assert "the ways differ by at most 0.0%, no more than three seeds" in output


def test_teachers_are_measured(measured: tuple[str, dict[str, Any]]) -> None:
    title = "with a CogVideoX teacher, 2 clips of 8x32x32, times in ms"
    alone, reference, own = measured[1]["tables"][title]
    assert alone["what"] == "eager teacher alone" and alone["speed-up"] is None
    assert reference["what"] == "published step, eager teacher"
    assert own["what"] == "default step, eager teacher"
    assert own["speed-up"] == pytest.approx(reference["ms"] / own["ms"])


def test_what_is_printed_is_what_is_written(
    measured: tuple[str, dict[str, Any]],
) -> None:
    output, content = measured
    written = [row for rows in content["tables"].values() for row in rows]
    printed = printed_rows(output)
    assert len(printed) == len(written) == 15
    for cells, row in zip(printed, written, strict=True):
        for column in cells.keys() & {"size", "way", "what"}:
            assert cells[column] == row[column]
        for column in cells.keys() & {"ms", "first loss"}:
            assert float(cells[column]) == pytest.approx(row[column], rel=0.01)
    assert output.startswith("device CPU")
    assert content["PyTorch"] in output


def test_the_student_learns_as_in_training(videos: Path, tmp_path: Path) -> None:
    """The same losses as those of a run: nothing of the trainer is left out."""
    settings = {"training__steps": 3, "optim__lr": 1e-3, "seraena__enable": "true"}
    run = Run(tmp_path, videos, **settings)
    argv = [f"--{key}={value}" for key, value in run.settings.items()]
    config = load_config(argv)
    train(config)
    with started(Parallelism(), "cpu") as world:
        options = argparse.Namespace(clips=2, root=str(videos), workers=0)
        bench = Bench(options, world, Report({}, None, speaks=False))
        student = Student(config, world)
        with clips_of(bench, config, latents=False) as feed:
            found = [student(next(feed)).values[0].item() for _ in range(3)]
    assert found == run.losses()


@pytest.mark.soak
def test_a_cache_and_the_start_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    benchmark("--teacher", "--start", "--calls", 2, "--json", path)
    tables = json.loads(path.read_text())["tables"]
    rows = tables["with a CogVideoX teacher, 2 clips of 8x32x32, times in ms"]
    window, precompute, cached = rows[-3:]
    assert window["what"] == "teacher alone, 4 of 16x64x64"
    share = precompute["frames/s"] / window["frames/s"]
    assert precompute["what"] == f"precompute: {share:.0%} of that"
    assert cached["what"] == "default step, cached" and cached["ms"] > 0
    for row in tables["seconds from launch"]:
        assert 0 < row["step 1, s"] <= row["step 10, s"] <= row["end, s"]


def attempts(limit: int) -> Callable[[int], Attempt | None]:
    """Training on a GPU of which a clip takes 2 GiB and everything else 1."""
    return lambda n: Attempt(n, 1 + 2.0 * n, 10) if n <= limit else None


@pytest.mark.parametrize("limit", [2, 3, 36, 39, 41])
def test_the_largest_batch_is_found(limit: int) -> None:
    best, per_clip = largest_batch(attempts(limit), 80)
    assert (best.clips, per_clip) == (limit, 2)


def test_too_little_memory_for_a_clip_or_for_two() -> None:
    assert largest_batch(attempts(0), 80) is None
    best, _ = largest_batch(attempts(1), 80)
    assert best.clips == 1


def test_a_batch_is_attempted() -> None:
    with started(Parallelism(), "cpu") as world:
        options = argparse.Namespace(clips=1, root=None, workers=0, variants=["taehv"])
        bench = Bench(options, world, Report({}, None, speaks=False))
        found = attempt(bench, Size(5, 16, 16), "plain", 3)
    assert found.clips == 3 and found.ms > 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--sizes", "12x128"], "'12x128' is no size"),
        (["--sizes", "5x30x32"], "data.height = 30"),
        (["--forms", "ddp"], "no form 'ddp'"),
        (["--ways", "fast"], "no way 'fast'"),
        (["--variants", "taehw"], "taehw"),
        (["--memory"], "--memory fills a GPU"),
        (["--teacher", "--teacher-rows", "live"], "no --teacher-rows 'live'"),
        (["--curves", "--ways", "published"], "--curves needs ways other than"),
        (["--curves", "--ways", "plain+seraena"], "--curves needs ways other than"),
        (["--json", "/nowhere/x.json"], "/nowhere is no folder that can be written"),
        (["--json", "/proc/self"], "/proc/self is not a file: name another"),
        (["--json", "s3://b/x.json"], "--json: s3://b/x.json is a URL"),
        (["--calls", "many"], "--calls: invalid int value: 'many'"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(UserError, match=re.escape(told)) as raised:
        main()
    assert "\n" not in str(raised.value)
