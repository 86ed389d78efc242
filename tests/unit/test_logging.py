"""Records of a run: exact, resumable, and shown in TensorBoard and on the console."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from taehv.logging import (
    RunLog,
    clock,
    log,
    set_up_console,
    truncate_records,
)
from taehv.sections import Logging

SPEED = {"clips_per_second": 4.0}


def record(step: int, loss: float = 0.5) -> dict[str, float]:
    """What a step has to tell at the least."""
    return {"step": step, "loss": loss, "psnr": 20.0}


@pytest.fixture(autouse=True)
def _console(_messages: None) -> None:
    """Messages as in a training."""
    set_up_console(0)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0:00"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (3599.6, "1:00:00"),
        (3661, "1:01:01"),
        (360_000, "100:00:00"),
    ],
)
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_records_of_later_steps_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    exact = [record(step, 1 / 3 + step) for step in range(1, 6)]
    path.write_text("".join(json.dumps(r) + "\n" for r in exact))
    assert truncate_records(path, 3) == exact[:3]
    assert [*map(json.loads, path.open())] == exact[:3]


def test_a_cut_line_and_what_follows_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps(record(1)) + "\n"
    for length in range(1, len(whole) - 1):
        path.write_text(whole + whole.replace("1", "2", 1)[:length])
        assert truncate_records(path, 9) == [record(1)]
        assert path.read_text() == whole


def test_a_run_without_records_begins_with_none(tmp_path: Path) -> None:
    assert truncate_records(tmp_path / "metrics.jsonl", 0) == []
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_metrics_are_exact(tmp_path: Path) -> None:
    losses = [1 / 3, 0.1 + 0.2, 1e-300, 5e-324, 123456789.123456789]
    run_log = RunLog(tmp_path, Logging(interval=100), step=0, steps=100)
    for step, loss in enumerate(losses, start=1):
        run_log.step(record(step, loss), SPEED)
        # Each line is there at once: a killed run keeps it.
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1]) == record(step, loss)
    run_log.step(record(6, math.nan), SPEED)
    run_log.close()
    kept = truncate_records(tmp_path / "metrics.jsonl", 99)
    # JSON has no NaN: readers in other languages would refuse the file.
    assert [r["loss"] for r in kept] == [*losses, None]


def test_a_resumed_log_goes_on_after_its_step(tmp_path: Path) -> None:
    first = RunLog(tmp_path, Logging(interval=1), step=0, steps=4)
    for step in (1, 2, 3):
        first.step(record(step, step), SPEED)
        first.validation(step, {"psnr": step})
    first.close()
    second = RunLog(tmp_path, Logging(interval=1), step=2, steps=4)
    assert [v["step"] for v in second.validations] == [1, 2]
    for step in (3, 4):
        second.step(record(step, step * 10), SPEED)
    second.validation(4, {"psnr": 40.0})
    second.close()
    assert [v["step"] for v in second.validations] == [1, 2, 4]
    lines = [*map(json.loads, (tmp_path / "metrics.jsonl").open())]
    assert lines == [
        record(step, loss) for step, loss in ((1, 1), (2, 2), (3, 30), (4, 40))
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(1, 1), (2, 2), (3, 30), (4, 40)]


def test_progress_lines_come_at_the_interval_and_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_console(0)  # after pytest has put its own stderr in place
    run_log = RunLog(tmp_path, Logging(interval=3), step=0, steps=7)
    for step in range(1, 8):
        run_log.step(record(step), SPEED)
    run_log.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "step 3/7",
        "step 6/7",
        "step 7/7",
    ]
    assert lines[-1].endswith("| loss 0.5000 | PSNR 20.00 dB | 4.0 clips/s | 0:00 left")


def test_other_ranks_tell_warnings_alone(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_console(3)
    log.info("not told")
    log.warning("a clip is bad")
    assert capsys.readouterr().err == "[rank 3] a clip is bad\n"


def test_pictures_and_clips_reach_tensorboard(tmp_path: Path) -> None:
    run_log = RunLog(tmp_path, Logging(), step=0, steps=1)
    run_log.board.picture("strip", np.zeros((6, 8, 3), np.uint8), 1)
    run_log.board.clip("clip", np.zeros((2, 4, 5, 3), np.uint8), 1, rate=8)
    run_log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (strip,), (clip,) = events.Images("strip"), events.Images("clip")
    assert (strip.height, strip.width) == (6, 8)
    assert (clip.height, clip.width) == (4, 5)
    assert clip.encoded_image_string.startswith(b"GIF89a")
