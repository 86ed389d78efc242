"""What becomes of a training however it ends."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from taehv.config import read_config
from taehv.trainer import train


class Fails:
    """A trainer whose run does."""

    checkpointer = nullcontext()
    closed = 0

    def __init__(self, *arguments: object) -> None:
        pass

    def run(self) -> None:
        raise ZeroDivisionError

    def close(self) -> None:
        Fails.closed += 1


def test_records_are_written_out_when_a_run_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taehv.trainer.Trainer", Fails)
    settings = ["--training.device=cpu", f"--job.output_dir={tmp_path}"]
    with pytest.raises(ZeroDivisionError):
        train(read_config(settings))
    assert Fails.closed == 1
