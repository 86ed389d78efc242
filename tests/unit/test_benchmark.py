"""The benchmark measures the real parts, and says what it measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from taehv.benchmark import main
from taehv.errors import UserError


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
    small = ["--sizes", "5x16x16,5x32x32", "--decode-sizes", "5x16x16"]
    output = benchmark("--train", "--decode", *small, "--json", path)
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
    assert [row["way"] for row in rows] == [
        "published",
        "eager",
        "published, by latent",
        "eager, by latent",
    ]
    for row in rows[:2]:
        assert float(row["error"]) < 1e-5
    for row in rows:
        assert row["ms"] > 0 and row["speed-up"] > 0


def test_what_is_printed_is_what_is_written(
    measured: tuple[str, dict[str, Any]],
) -> None:
    output, content = measured
    written = [row for rows in content["tables"].values() for row in rows]
    printed = printed_rows(output)
    assert len(printed) == len(written) == 8
    for cells, row in zip(printed, written, strict=True):
        assert cells["size"] == row["size"] and cells["way"] == row["way"]
        assert float(cells["ms"]) == pytest.approx(row["ms"], rel=0.01)
    assert output.startswith("device CPU")
    assert content["PyTorch"] in output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--sizes", "12x128"], "'12x128' is no size"),
        (["--sizes", "5x30x32"], "data.height = 30"),
        (["--forms", "ddp"], "no form 'ddp'"),
        (["--ways", "fast"], "no way 'fast'"),
        (["--variants", "taehw"], "taehw"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(UserError, match=re.escape(told)) as raised:
        main()
    assert "\n" not in str(raised.value)
