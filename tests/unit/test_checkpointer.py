"""A run's checkpoints: written in the background, counted, kept, and found again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from taehv.checkpoint import METADATA, State, load
from taehv.checkpointer import POLL_STEPS, Checkpointer, Saved, texts_beside
from taehv.config import dumps
from taehv.distributed import started
from taehv.errors import UserError
from taehv.sections import Checkpoint, Config, Job, Parallelism
from taehv.storage import MANIFEST, Folder, HashedFiles


@pytest.fixture(autouse=True, scope="module")
def _process_group() -> Iterator[None]:
    """Saving is a collective, here of one process."""
    with started(Parallelism(), "cpu"):
        yield


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """The warnings so far."""
    monkeypatch.setattr(logging.getLogger("taehv"), "propagate", True)
    return lambda: [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def tensors(value: float) -> State:
    return {"model": {"weight": torch.full((1000,), float(value))}}


def value_in(folder: Folder) -> float:
    state = tensors(-1)
    load(folder, state)
    return state["model"]["weight"].unique().item()


def checkpoints(folder: Path | str, *steps: int, **settings: object) -> Checkpointer:
    """Checkpoints of these steps, whose weights are their step."""
    checkpointer = Checkpointer(Folder(folder), Checkpoint(**settings))
    for step in steps:
        checkpointer.save(step, tensors(step), {"about.json": "{}"})
    checkpointer.wait()
    return checkpointer


class Gate:
    """Holds up every write until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, create = threading.Event(), HashedFiles.create_stream

        def held_up(files: HashedFiles, path: str, mode: str) -> object:
            assert self.opened.wait(30)
            return create(files, path, mode)

        monkeypatch.setattr(HashedFiles, "create_stream", held_up)


# In the background


def test_training_goes_on_while_a_save_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Saved] = []
    checkpointer = Checkpointer(Folder(tmp_path), Checkpoint(), saved.append)
    gate, state = Gate(monkeypatch), tensors(1)
    checkpointer.save(1, state, {})
    state["model"]["weight"].fill_(2)  # the next steps
    for _ in range(POLL_STEPS):
        checkpointer.poll()
    assert not saved and checkpointer.saved_step is None and not checkpointer.steps()
    gate.opened.set()
    deadline = time.monotonic() + 30
    while not saved and time.monotonic() < deadline:
        checkpointer.poll()
        time.sleep(0.001)  # a step, which is not the save's
    assert [s.step for s in saved] == [1] == checkpointer.steps()
    assert 0 < saved[0].blocked_ms < 1000 * saved[0].seconds
    assert value_in(checkpointer.path(1)) == 1
    checkpointer.save(2, state, {})  # through the same memory
    checkpointer.wait()
    assert value_in(checkpointer.path(2)) == 2 and value_in(checkpointer.path(1)) == 1


def test_synchronous_saves_are_done_when_they_return(tmp_path: Path) -> None:
    checkpointer = Checkpointer(Folder(tmp_path), Checkpoint(asynchronous=False))
    checkpointer.save(1, tensors(1), {})
    assert checkpointer.steps() == [1] and checkpointer.saved_step == 1


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_a_save_holds_up_is_counted_as_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """The wait for a save that is not done when the next is due, or for every one."""
    saved: list[Saved] = []
    settings = Checkpoint(asynchronous=asynchronous)
    checkpointer = Checkpointer(Folder(tmp_path), settings, saved.append)
    gate = Gate(monkeypatch)
    threading.Timer(2, gate.opened.set).start()
    for step in (1, 2):
        checkpointer.save(step, tensors(step), {})
    checkpointer.poll()
    checkpointer.wait()
    first, second = (s.blocked_ms for s in saved)
    assert first > 1000 and first > 2 * second


def test_leaving_waits_for_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with Checkpointer(Folder(tmp_path), Checkpoint()) as checkpointer:
        checkpointer.save(1, tensors(1), {})
        threading.Timer(0.2, gate.opened.set).start()
    assert checkpointer.steps() == [1]


# Failures


def test_failed_saves_are_told_counted_and_tried_again(
    tmp_path: Path, told: Callable
) -> None:
    checkpointer = checkpoints(tmp_path, 1, max_failures=3)
    for step in (2, 3):  # files in the place of folders
        (tmp_path / f"step-{step}").write_text("")
    bad = tensors(float("nan"))
    checkpointer.save(4, bad, {})
    checkpointer.wait()
    checkpointer.save(5, tensors(5), {"no/such/folder": ""})
    checkpointer.wait()
    assert checkpointer.failures == 2 and checkpointer.steps() == [1]
    assert checkpointer.folder.names() == ["step-1", "step-2", "step-3"]
    assert "model.weight is not finite" in told()[0] and "step 4" in told()[0]
    assert "2 of at most 3" in told()[1] and "step 5" in told()[1]
    checkpointer.save(6, tensors(6), {})
    checkpointer.wait()
    assert checkpointer.failures == 0 and checkpointer.steps() == [1, 6]
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == [
        "step-1",
        "step-6",
    ]


def test_a_group_that_failed_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = checkpoints(tmp_path, 1)

    def fails(*arguments: object, **named: object) -> None:
        raise RuntimeError("a process is gone")

    groups, before = dist.distributed_c10d._world.pg_map, checkpointer._group
    count = len(groups)
    with monkeypatch.context() as patched:
        patched.setattr("taehv.checkpointer.dcp.save", fails)
        checkpointer.save(2, tensors(2), {})
        checkpointer.wait()
    assert checkpointer.failures == 1 and checkpointer._group is not before
    assert len(groups) == count and before not in groups
    checkpointer.save(3, tensors(3), {})
    checkpointer.wait()
    assert checkpointer.steps() == [1, 3]


def test_what_is_half_removed_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = checkpoints(tmp_path, 1)
    remove = LocalFileSystem.rm

    def fails_later(files: LocalFileSystem, path: str, recursive: bool = False) -> None:
        if recursive:
            raise OSError("killed here")
        remove(files, path)

    monkeypatch.setattr(LocalFileSystem, "rm", fails_later)
    with pytest.raises(OSError, match="killed here"):
        checkpointer.path(1).remove()
    assert checkpointer.steps() == [] and checkpointer.path(1).has(METADATA)


def test_too_many_failures_end_the_run(tmp_path: Path) -> None:
    checkpointer = checkpoints(tmp_path, 1, max_failures=2)
    checkpointer.save(2, tensors(float("inf")), {})
    checkpointer.wait()
    checkpointer.save(3, tensors(float("inf")), {})
    with pytest.raises(UserError, match="2 checkpoints in a row") as raised:
        checkpointer.wait()
    assert f"the last is {tmp_path}/step-1" in str(raised.value)
    assert checkpointer.steps() == [1] and value_in(checkpointer.path(1)) == 1


def test_a_save_that_takes_too_long_is_a_failed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable
) -> None:
    checkpointer = checkpoints(tmp_path, 1, max_failures=3, time_limit=1)
    gate = Gate(monkeypatch)
    checkpointer.save(2, tensors(2), {})
    checkpointer.save(3, tensors(3), {})  # waits for the time limit, then goes on
    assert checkpointer.failures == 1 and "not done in 1 s" in told()[-1]
    gate.opened.set()
    deadline = time.monotonic() + 30
    while checkpointer.failures and time.monotonic() < deadline:
        checkpointer.poll()
    assert checkpointer.saved_step == 2 and checkpointer.steps() == [1, 2]


def test_old_checkpoints_stay_where_a_save_fails(tmp_path: Path) -> None:
    checkpointer = checkpoints(tmp_path, 1, 2, keep=1)
    assert checkpointer.steps() == [2]
    checkpointer.save(3, tensors(float("nan")), {})
    checkpointer.wait()
    assert checkpointer.steps() == [2]


def test_keep_every(tmp_path: Path) -> None:
    checkpointer = checkpoints(tmp_path, *range(1, 12), keep=2, keep_every=4)
    assert checkpointer.steps() == [4, 8, 10, 11]


def test_a_folder_that_cannot_be_cleared_costs_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable
) -> None:
    """By whatever error its file system has."""
    checkpointer = checkpoints(tmp_path, 1)

    def fails() -> list[int]:
        raise EOFError("mount is gone")

    monkeypatch.setattr(checkpointer, "steps", fails)
    checkpointer.save(2, tensors(2), {})
    checkpointer.wait()
    assert checkpointer.saved_step == 2
    assert [line for line in told() if "cannot remove old checkpoints" in line]


# Finding


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_text('{"files": {}}')


def nest(path: Path) -> None:
    path.write_text("[" * 100_000)


DAMAGES = {
    "flipped bit": (flip, "__0_0.distcp", "is altered: its SHA-256 differs"),
    "cut shard": (cut, "__0_0.distcp", "bytes in place of"),
    "missing shard": (Path.unlink, "__0_0.distcp", "is missing"),
    "missing metadata": (Path.unlink, METADATA, "is missing"),
    "altered metadata": (flip, METADATA, "is altered"),
    "altered settings": (flip, "about.json", "is altered"),
    "cut manifest": (cut, MANIFEST, "manifest.json is damaged"),
    "empty manifest": (empty, MANIFEST, "manifest.json is damaged"),
    "nested manifest": (nest, MANIFEST, "manifest.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_good_one_is_found(
    tmp_path: Path, told: Callable, damage: str
) -> None:
    checkpointer = checkpoints(tmp_path, 1, 2, 3)
    spoil, name, words = DAMAGES[damage]
    spoil(tmp_path / "step-3" / name)
    found = checkpointer.find()
    assert str(found) == f"{tmp_path}/step-2" and value_in(found) == 2
    (warning,) = told()
    assert f"{tmp_path}/step-3/{name}" in warning and words in warning
    # It counts no more, and is there for whoever wants to look at it.
    assert checkpointer.steps() == [1, 2]
    assert (tmp_path / "step-3.damaged" / MANIFEST).exists()
    assert str(checkpointer.find()) == f"{tmp_path}/step-2" and len(told()) == 1


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "new").find() is None


def test_a_run_does_not_begin_anew_where_all_are_damaged(tmp_path: Path) -> None:
    checkpointer = checkpoints(tmp_path, 1, 2)
    for step in (1, 2):
        flip(tmp_path / f"step-{step}" / "__0_0.distcp")
    with pytest.raises(UserError, match="all checkpoints in .* are damaged"):
        checkpointer.find()


def resuming(folder: Path, origin: int | str, *steps: int) -> Checkpointer:
    """Checkpoints of these steps, of a run that was told what to resume from."""
    settings = Config(checkpoint=Checkpoint(keep=0, resume_from=origin))
    checkpointer = Checkpointer(Folder(folder), settings.checkpoint)
    for step in steps:
        checkpointer.save(step, tensors(step + 0.5), texts_beside({}, dumps(settings)))
    checkpointer.wait()
    return checkpointer


def test_resuming_from_a_step_sets_later_ones_aside(tmp_path: Path) -> None:
    resuming(tmp_path, "", 1, 2, 3, 4)
    checkpointer = resuming(tmp_path, 2)
    assert value_in(checkpointer.find()) == 2.5
    assert checkpointer.steps() == [1, 2]
    assert {"step-3.aside", "step-4.aside"} <= {p.name for p in tmp_path.iterdir()}


def test_the_same_command_goes_on_from_what_it_saved_since(tmp_path: Path) -> None:
    resuming(tmp_path, "", 1, 2, 9)
    checkpointer = resuming(tmp_path, 2)
    checkpointer.find()
    resuming(tmp_path, 2, 3, 4)
    assert str(checkpointer.find()) == f"{tmp_path}/step-4"
    flip(tmp_path / "step-4/__0_0.distcp")
    assert str(checkpointer.find()) == f"{tmp_path}/step-3"


def test_resuming_from_a_step_that_is_not_there(tmp_path: Path) -> None:
    """Hides no other, or whoever corrects the number would find none."""
    resuming(tmp_path, "", 2, 3)
    for step in (1, 7):
        told = rf"resume_from = {step} is no .*that is there \(2, 3\)"
        with pytest.raises(UserError, match=told):
            resuming(tmp_path, step).find()
    flip(tmp_path / "step-2/__0_0.distcp")
    with pytest.raises(UserError, match=r"= 2 is damaged: .*that is there \(3\)"):
        resuming(tmp_path, 2).find()
    assert Folder(tmp_path).names() == ["step-2.damaged", "step-3"]


def test_what_is_set_aside_stays(tmp_path: Path) -> None:
    for step in (3, 4, 5):
        checkpointer = resuming(tmp_path, "", 2, step)
        flip(tmp_path / f"step-{step}/__0_0.distcp")
        (tmp_path / f"step-{step}").rename(tmp_path / "step-3")
        checkpointer.find()
        resuming(tmp_path, "", 4)
        assert str(resuming(tmp_path, 2).find()) == f"{tmp_path}/step-2"
    asides = [f"step-{n}" for n in ("3.damaged", "4.aside")]
    kept = [name + suffix for name in asides for suffix in ("", "-2", "-3")]
    assert Folder(tmp_path).names() == ["step-2", *kept]
    assert value_in(Folder(tmp_path / "step-4.aside")) == 4.5


def test_resuming_from_another_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    resuming(tmp_path / "old/checkpoints", "", 1, 2)
    for origin in (tmp_path / "old", tmp_path / "old/checkpoints/step-2"):
        checkpointer = resuming(tmp_path / "new", str(origin))
        assert str(checkpointer.find()) == f"{tmp_path}/old/checkpoints/step-2"
        assert checkpointer.saved_step is None  # none of its own
    assert "and not with" not in caplog.text
    checkpointer = resuming(tmp_path / "new", str(tmp_path / "old"), 3)
    assert str(checkpointer.find()) == f"{tmp_path}/new/step-3"
    told = f"and not with checkpoint.resume_from = {tmp_path}/old: for that"
    assert told in caplog.text
    flip(tmp_path / "old/checkpoints/step-2/__0_0.distcp")
    with pytest.raises(UserError, match="checkpoint.resume_from: .* is altered"):
        resuming(tmp_path / "newer", str(tmp_path / "old")).find()
    (tmp_path / "a.pth").touch()
    for name in ("nowhere", "a.pth"):
        with pytest.raises(UserError, match="has no complete checkpoint"):
            resuming(tmp_path / "newer", str(tmp_path / name)).find()


def test_the_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    """But not as what a run of another folder starts from."""
    folder, config = Folder(tmp_path / "first"), dumps(Config(job=Job("first")))
    first = Checkpointer(folder, Checkpoint(keep=0), run="first")
    for step in (1, 2):
        first.save(step, tensors(step), texts_beside({}, config if step == 1 else "?"))
    first.wait()
    told = rf"checkpoint.folder = {folder} has the checkpoints of job.name 'first'"
    with pytest.raises(UserError, match=told):
        Checkpointer(folder, Checkpoint(), run="second").find()
    assert Checkpointer(folder, Checkpoint(), run="first").find().name[-6:] == "step-2"
    settings = Checkpoint(resume_from=str(folder))
    second = Checkpointer(Folder(tmp_path / "second"), settings, run="second")
    assert value_in(second.find()) == 2


def test_not_resuming(tmp_path: Path) -> None:
    assert checkpoints(tmp_path, resume=False).find() is None
    with pytest.raises(UserError, match="checkpoint.resume is false"):
        checkpoints(tmp_path, 1, resume=False).find()


# Elsewhere


@pytest.mark.parametrize("protocol", ["memory://", "file://"])
def test_checkpoints_elsewhere(tmp_path: Path, protocol: str) -> None:
    place = f"{protocol}{tmp_path}/run"
    checkpointer = checkpoints(place, 1, 2, 3, 4, keep=3)
    assert checkpointer.steps() == [2, 3, 4]
    files = checkpointer.folder.files
    shard = f"{checkpointer.path(4).path}/__0_0.distcp"
    files.pipe_file(shard, files.cat_file(shard)[:-1])
    found = checkpointer.find()
    assert str(found) == f"{place}/step-3" and value_in(found) == 3
    assert checkpointer.folder.names() == ["step-2", "step-3", "step-4.damaged"]


def test_a_url_that_nothing_reads() -> None:
    with pytest.raises(UserError, match="cannot reach nothing://x"):
        Folder("nothing://x")


# Further components


def test_groups_of_further_components(tmp_path: Path) -> None:
    def state(value: float, size: int) -> dict[str, dict[str, Tensor]]:
        replay = {"rank_0.clips": torch.full((size,), value)}
        return {**tensors(value), "replay": replay}

    checkpointer = Checkpointer(Folder(tmp_path), Checkpoint())
    checkpointer.save(1, state(1, 4), {})
    checkpointer.wait()
    again = state(0, 4)
    assert load(checkpointer.path(1), again) == {"model", "replay"}
    assert again["replay"]["rank_0.clips"].tolist() == [1] * 4
    other = state(0, 5)
    assert load(checkpointer.path(1), other, optional={"replay"}) == {"model"}
    assert other["replay"]["rank_0.clips"].tolist() == [0] * 5
    assert other["model"]["weight"].unique() == 1
    with pytest.raises(UserError, match=r"replay\.rank_0\.clips as \[4\] and not"):
        load(checkpointer.path(1), other)
