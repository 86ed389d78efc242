"""What becomes of a training however it ends."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli

from taehv.config import read_config
from taehv.trainer import Counts, Trainer, settings_for_readers, train


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


def summary(folder: Path, root: str, *steps: int) -> str:
    """Of a run that validated at these steps."""
    config = read_config([f"--job.output_dir={folder}", f"--data.root={root}"])
    records = [{"step": s, "psnr": 10.0 + s, "mean_color_psnr": 9.0} for s in steps]
    trainer = SimpleNamespace(
        config=config,
        folder=folder,
        counts=Counts(steps[-1]),
        log=SimpleNamespace(validations=records),
        is_stale=False,
        checkpointer=SimpleNamespace(path=lambda step: f"step-{step}"),
        _told_best=list,
    )
    return Trainer._summary(trainer)


def test_the_summary_says_what_is_known(tmp_path: Path) -> None:
    told = summary(tmp_path, "~/.cache/taehv/samples", 0, 4, 8)
    assert "validation PSNR  10.00 dB at step 0, 18.00 dB at step 8 (paint" in told
    assert "on your own videos: " in told
    told = summary(tmp_path, "/my/videos", 8)
    assert "validation PSNR  18.00 dB at step 8 (painting" in told
    assert "raise --training.steps" in told and "own videos" not in told


@pytest.mark.parametrize(
    ("folder", "told"),
    [("kept/a", "/there/kept/a"), ("s3://b/c", "s3://b/c"), ("", "")],
)
def test_readers_in_another_folder_find_the_checkpoints(
    folder: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    text = settings_for_readers(read_config([f"--checkpoint.folder={folder}"]))
    expected = f"{tmp_path}{told}" if told.startswith("/") else told
    assert tomli.loads(text)["checkpoint"]["folder"] == expected
