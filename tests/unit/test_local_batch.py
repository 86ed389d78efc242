"""How many clips are taken at a time: found, kept, halved, agreed upon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from taehv import trainer
from taehv.config import read_config
from taehv.distributed import started
from taehv.errors import RestartError, UserError
from taehv.local_batch import LocalBatch, check_probe
from taehv.sections import Config, Data, Parallelism, Shape, Training


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with started(Parallelism(), "cpu"):
        yield


def local_batch(
    folder: Path, kind: str = "", crops: int = 1, **training: int
) -> LocalBatch:
    """Of twelve clips."""
    settings = Training(global_batch_size=12, **training)
    return LocalBatch(settings, Data(crops_per_window=crops), folder / "b.json", kind)


class Memory:
    """Has room for some clips, and notes what was tried."""

    def __init__(self, room: int) -> None:
        self.room, self.tried = room, []

    def __call__(self, clips: int) -> None:
        self.tried.append(clips)
        if clips > self.room:
            raise torch.cuda.OutOfMemoryError("no room")


def test_the_largest_that_divides_is_found_once(tmp_path: Path) -> None:
    memory = Memory(room=5)
    batch = local_batch(tmp_path, find_batch_size=True)
    batch.choose(memory)
    assert batch.clips == 4 and memory.tried == [12, 6, 4]
    again = local_batch(tmp_path, find_batch_size=True)
    again.choose(memory)
    assert again.clips == 4 and memory.tried == [12, 6, 4]
    other = local_batch(tmp_path, "larger clips", find_batch_size=True)
    other.choose(Memory(room=2))
    assert other.clips == 2


def test_what_is_asked_for_and_crops_bound_it(tmp_path: Path) -> None:
    memory = Memory(room=5)
    settings = {"crops": 2, "local_batch_size": 6, "find_batch_size": True}
    batch = local_batch(tmp_path, **settings)
    batch.choose(memory)
    assert batch.clips == 4 and memory.tried == [6, 4]


def test_nothing_is_tried_unasked(tmp_path: Path) -> None:
    memory = Memory(room=0)
    batch = local_batch(tmp_path, local_batch_size=6)
    batch.choose(memory)
    assert batch.clips == 6 and not memory.tried


def test_nothing_fits(tmp_path: Path) -> None:
    batch = local_batch(tmp_path, "3 x 8 x 8", find_batch_size=True)
    told = r"with 1 clips at a time \(3 x 8 x 8\): take smaller"
    with pytest.raises(UserError, match=told):
        batch.choose(Memory(room=0))


def test_the_first_step_gives_advice_and_a_later_one_halves(tmp_path: Path) -> None:
    batch = local_batch(tmp_path, "3 x 8 x 8")
    batch.choose(Memory(0))
    first = batch.ran_out(step=0)
    assert isinstance(first, UserError) and "\n" not in str(first)
    assert "in the first step: lower training.local_batch_size to 6 (" in str(first)
    assert not batch.path.exists()
    for step, clips in ((7, 6), (9, 3), (11, 1)):
        later = batch.ran_out(step)
        assert isinstance(later, RestartError)
        assert f"after step {step}" in str(later) and f"with {clips} (" in str(later)
        batch = local_batch(tmp_path, "3 x 8 x 8")
        batch.choose(Memory(0))
        assert batch.clips == clips
    assert isinstance(batch.ran_out(12), UserError)


def test_a_full_disk_does_not_hide_what_ran_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "b.json.0").mkdir()
    batch = local_batch(tmp_path)
    assert isinstance(batch.ran_out(step=7), RestartError)
    assert "b.json cannot be written (Is a directory)" in caplog.text
    assert "set training.local_batch_size to 6" in caplog.text


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("training.device=cpu", "is for GPUs"),
        ("data.buckets=[[5, 16, 16, 1], [9, 16, 16, 1]]", "not data.buckets"),
        ("seraena.enable", "does not try adversarial guidance"),
    ],
)
def test_what_cannot_be_tried_is_refused(setting: str, told: str) -> None:
    config = read_config(["--training.find_batch_size", f"--{setting}"])
    with pytest.raises(UserError, match=f"{told}: set training.local_batch_size"):
        check_probe(config)
    check_probe(read_config([f"--{setting}"]))


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text('{"clips": ')
    with pytest.raises(UserError, match="is damaged: delete it"):
        local_batch(tmp_path).choose(Memory(0))


@pytest.mark.parametrize(("height", "clips"), [(16, 8), (32, 8), (64, 4), (640, 1)])
def test_larger_clips_are_judged_in_smaller_batches(
    height: int, clips: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(
        trainer, "validation_batches", lambda *given: told.append(given)
    )
    run = object.__new__(trainer.Trainer)
    run.config = Config(data=Data(frames=5, height=32, width=32))
    run.judged_shape = Shape(5, height, 32)
    run.cache, run.held_out = None, []
    run.local_batch = SimpleNamespace(clips=8)
    run.world = SimpleNamespace(rank=0, size=1)
    run._validation_batches()
    assert told[0][-1] == clips
