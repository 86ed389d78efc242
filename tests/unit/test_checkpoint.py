"""Checkpoints: whole or not there, and never run."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PosixPath
from typing import BinaryIO

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.serialization import _get_layout

from taehv.checkpoint import (
    CONFIG,
    METADATA,
    SafeReader,
    State,
    _read,
    checkpoint_in,
    complete_steps,
    load,
    load_weights,
    read_config,
    save_weights_only,
    training_state,
)
from taehv.checkpointer import Checkpointer, texts_beside
from taehv.distributed import started
from taehv.errors import UserError
from taehv.metadata import parse
from taehv.optim import Ema, Optimizer
from taehv.sections import Checkpoint, Optim, Parallelism
from taehv.storage import MANIFEST, Folder, write_manifest

ABOUT = {"variant": "taehv", "step": "3"}


@pytest.fixture(autouse=True, scope="module")
def _process_group() -> Iterator[None]:
    """Saving is a collective, here of one process."""
    with started(Parallelism(), "cpu"):
        yield


def state_of(seed: int, inputs: int = 3, **counts: int) -> State:
    """The state of a tiny model after one step; all tensors depend on the seed."""
    torch.manual_seed(seed)
    model = nn.Linear(inputs, 2)
    optimizer = Optimizer(model.parameters(), Optim())
    optimizer.lr.fill_(0.1)
    parameters = dict(model.named_parameters())
    ema = Ema(parameters, 0.5)
    loss = model(torch.randn(4, inputs)).square().sum()
    loss.backward()
    optimizer.step(loss.detach())
    ema.update(torch.tensor(0.5))
    return training_state(parameters, ema, optimizer, counts or {"step": seed})


def saved(folder: Path | str, *steps: int, **settings: int) -> Checkpointer:
    """Checkpoints of these steps, the state of each having the step as its seed."""
    checkpointer = Checkpointer(Folder(folder), Checkpoint(**{"keep": 0, **settings}))
    for step in steps:
        save(checkpointer, step, state_of(step))
    return checkpointer


def save(checkpointer: Checkpointer, step: int, state: State) -> None:
    """Save and wait."""
    checkpointer.save(step, state, texts_beside(ABOUT, "[job]"))
    checkpointer.wait()


def path_of(checkpointer: Checkpointer, step: int) -> Path:
    """Where a checkpoint lies, on this machine."""
    return Path(checkpointer.path(step).path)


def sign(path: Path) -> None:
    """Make the manifest say that the files are as they should be."""
    folder = Folder(path)
    names = set(folder.names()) - {MANIFEST}
    write_manifest(
        folder, {name: folder.write(name, folder.read(name)) for name in names}
    )


def assert_equal(given: State, expected: State) -> None:
    assert given.keys() == expected.keys()
    for group in expected:
        assert given[group].keys() == expected[group].keys()
        for name, value in expected[group].items():
            assert torch.equal(given[group][name], value), (group, name)


def refusals(checkpointer: Checkpointer, step: int) -> list[str]:
    """What both ways to read a checkpoint refuse it with, each in one line."""
    told = []
    for read in (
        lambda: load(checkpointer.path(step), state_of(0)),
        lambda: load_weights(path_of(checkpointer, step)),
    ):
        with pytest.raises(UserError) as raised:
            read()
        told.append(str(raised.value))
        assert len(told[-1].splitlines()) == 1
        assert str(checkpointer.path(step)) in told[-1]
    return told


# Saving and loading


def test_a_state_is_filled_in_place(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path, 7)
    state = state_of(1)
    before = {(g, n): t.data_ptr() for g in state for n, t in state[g].items()}
    load(checkpointer.path(7), state)
    assert_equal(state, state_of(7))
    after = {(g, n): t.data_ptr() for g in state for n, t in state[g].items()}
    assert after == before


def test_a_state_is_all_that_a_run_goes_on_from() -> None:
    state = state_of(3, step=5, samples=80)
    assert state["counts"] == {"step": 5, "samples": 80}
    names = {"weight", "bias"}
    assert set(state["model"]) == set(state["ema"]) == names
    keys = {"step", "exp_avg", "exp_avg_sq"}
    assert set(state["optimizer"]) == {f"{n}.{k}" for n in names for k in keys}
    assert state["optimizer"]["weight.exp_avg"].any()
    assert not torch.equal(state["model"]["weight"], state["ema"]["weight"])


def test_the_reader_reads_what_dcp_wrote(tmp_path: Path) -> None:
    numbers = {f"{dtype}": torch.arange(6).to(dtype) for dtype in DTYPES}
    dcp.save({"model": numbers}, storage_writer=dcp.FileSystemWriter(tmp_path))
    empty = {name: torch.zeros_like(value) for name, value in numbers.items()}
    dcp.load({"model": empty}, storage_reader=SafeReader(Folder(tmp_path)))
    assert_equal({"model": empty}, {"model": numbers})


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)


def test_weights_alone(tmp_path: Path) -> None:
    path = path_of(saved(tmp_path, 7), 7)
    for group, chosen in ((None, "ema"), ("ema", "ema"), ("model", "model")):
        weights, about = load_weights(path, group)
        assert_equal({"": weights}, {"": state_of(7)[chosen]})
        assert about == ABOUT


def test_weights_without_a_training(tmp_path: Path) -> None:
    weights = state_of(1)["model"]
    save_weights_only(tmp_path / "new", weights, {"variant": "taecvx"})
    again, about = load_weights(tmp_path / "new")
    assert_equal({"": again}, {"": weights})
    assert about == {"variant": "taecvx"}
    with pytest.raises(UserError, match="holds no ema weights"):
        load_weights(tmp_path / "new", "ema")
    with pytest.raises(UserError, match="weights alone: begin from them with --model"):
        load(Folder(tmp_path / "new"), state_of(2))


def test_about_may_be_missing_but_not_damaged(tmp_path: Path) -> None:
    path = path_of(saved(tmp_path, 7), 7)
    text = (path / "about.json").read_text()
    (path / "about.json").unlink()
    sign(path)
    assert load_weights(path)[1] == {}
    for damaged in (text[:-3], "[" * 100_000):
        (path / "about.json").write_text(damaged)
        sign(path)
        with pytest.raises(UserError, match=r"about\.json is damaged"):
            load_weights(path)


@pytest.mark.parametrize(
    "content", [b"\xff", b"[job", b"job = 1", b"a = " + b"[" * 100_000]
)
def test_damaged_settings(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(UserError, match=r"config\.toml is damaged"):
        read_config(Folder(tmp_path))


def test_weights_of_an_altered_checkpoint_are_refused(tmp_path: Path) -> None:
    """Although every number in it is one."""
    path = path_of(saved(tmp_path, 3), 3)
    shard = path / "__0_0.distcp"
    value = load_weights(path, "model")[0]["weight"].numpy().tobytes()
    shard.write_bytes(shard.read_bytes().replace(value, value[4:] + value[:4]))
    with pytest.raises(UserError, match="is altered"):
        load_weights(path, "model")


# Which checkpoints there are


@pytest.mark.parametrize(
    ("keep", "kept"), [(2, [10, 100]), (1, [100]), (0, [2, 9, 10, 100])]
)
def test_the_newest_are_kept(tmp_path: Path, keep: int, kept: list[int]) -> None:
    checkpointer = saved(tmp_path, 2, 9, 10, 100, keep=keep)
    assert checkpointer.steps() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"step-{step}" for step in kept
    )


def test_an_incomplete_checkpoint_is_none(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path, 1, 2, 3)
    (path_of(checkpointer, 3) / MANIFEST).unlink()
    for name in ("step-x", "step-", "other"):
        shutil.copytree(path_of(checkpointer, 1), tmp_path / name)
    assert complete_steps(Folder(tmp_path)) == checkpointer.steps() == [1, 2]
    assert complete_steps(Folder(tmp_path / "nowhere")) == []


def test_a_run_names_where_its_checkpoints_lie(tmp_path: Path) -> None:
    """In settings that may come from anywhere."""
    saved(tmp_path / "there", 1, 2)
    run = tmp_path / "run"
    saved(run / "checkpoints", 1)
    for text, found in (
        (f'folder = "{tmp_path}/there"', "there/step-2"),
        (f'folder = "file://{tmp_path}/there"', "there/step-2"),
        ('folder = ""', "run/checkpoints/step-1"),
        ("folder = 3", "run/checkpoints/step-1"),
        ('folder = "/nowhere"', "run/checkpoints/step-1"),
    ):
        (run / CONFIG).write_text(f"[checkpoint]\n{text}\n")
        assert checkpoint_in(Folder(run)).name.endswith(f"{tmp_path}/{found}")
    shutil.rmtree(run / "checkpoints")
    for place, told in (
        (r"a\nb", r"no complete checkpoint, nor has 'a\nb', which its config"),
        ("nothing://x", "cannot reach nothing://x"),
        ("reference://x", "cannot read 'reference://x', the run's checkpoint.folder"),
    ):
        (run / CONFIG).write_text(f'[checkpoint]\nfolder = "{place}"\n')
        with pytest.raises(UserError, match=re.escape(told)) as raised:
            checkpoint_in(Folder(run))
        assert "\n" not in str(raised.value)


def test_an_incomplete_checkpoint_counts_for_nothing_in_keep(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step-3").mkdir()
    (tmp_path / "step-5").mkdir()
    (tmp_path / "else").mkdir()
    assert saved(tmp_path, 4, keep=2).steps() == [2, 4]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step-2", "step-4", "step-5", "else"}


def test_stray_shards_do_not_enter_a_later_save(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path, 3)
    path = path_of(checkpointer, 3)
    (path / MANIFEST).unlink()
    (path / "__7_0.distcp").write_bytes(b"of an interrupted save of more processes")
    save(checkpointer, 3, state_of(4))
    texts = {MANIFEST, "about.json", "config.toml"}
    assert {p.name for p in path.iterdir()} == {METADATA, "__0_0.distcp", *texts}
    state = state_of(0)
    load(checkpointer.path(3), state)
    assert_equal(state, state_of(4))


# Damage


def test_cut_metadata(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path, 3)
    path = path_of(checkpointer, 3) / METADATA
    whole = path.read_bytes()
    for length in (0, 1, 2, 11, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        sign(path.parent)
        for told in refusals(checkpointer, 3):
            assert f"{path} is not a checkpoint's metadata" in told


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04 a zip file",
        b"I am a text\n",
        b"Pers\n.",
        b"\x80\x05\x8c\x02\xff\xfe.",
        b"\x80\x68.",
        b"\x80\x04)R.",
        b"\x80\x04\x8c\x01a)R.",
        b"\x80\x04C\x01aK\x01a.",
        b"h\x07.",
        pickle.dumps(torch.strided).replace(b"torch.strided", b"torch.striped"),
        b"\x80\x04\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
        pickle.dumps({"model": 1}),
        pickle.dumps(torch.Size([3])),
        pickle.dumps(Metadata({})),
        pickle.dumps(Metadata(None, storage_data={})),
        pickle.dumps(Metadata({"model.w": 1}, storage_data={})),
        pickle.dumps(Metadata({}, storage_data={"model.w": 1})),
    ],
)
def test_something_else_for_metadata(tmp_path: Path, content: bytes) -> None:
    checkpointer = saved(tmp_path, 3)
    (path_of(checkpointer, 3) / METADATA).write_bytes(content)
    sign(path_of(checkpointer, 3))
    for told in refusals(checkpointer, 3):
        assert "is not a checkpoint's metadata" in told


def test_missing_metadata(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path, 3)
    (path_of(checkpointer, 3) / METADATA).unlink()
    resumed, read = refusals(checkpointer, 3)
    assert "No such file" in resumed and "no complete checkpoint" in read


def test_a_cut_missing_or_overwritten_shard(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path, 3)
    shard = path_of(checkpointer, 3) / "__0_0.distcp"
    whole = shard.read_bytes()
    for content in (b"", whole[:100], b"x" * len(whole)):
        shard.write_bytes(content)
        sign(shard.parent)
        for told in refusals(checkpointer, 3):
            assert "delete that folder, and take the checkpoint before it" in told
    shard.write_bytes(whole[: len(whole) * 9 // 10])
    with pytest.raises(UserError, match="is damaged"):
        load(checkpointer.path(3), state_of(0))
    shard.unlink()
    sign(shard.parent)
    assert all("__0_0.distcp" in told for told in refusals(checkpointer, 3))


def test_another_models_checkpoint(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path, 3)
    with pytest.raises(UserError) as raised:
        load(checkpointer.path(3), state_of(0, inputs=4))
    told = str(raised.value)
    assert "it has model.weight as [2, 3] and not as [2, 4]" in told
    assert "another --job.name" in told and "\n" not in told
    with pytest.raises(UserError, match=r"counts\.files as nothing and not as \[\]"):
        load(checkpointer.path(3), state_of(0, step=1, files=2))


# Malice


def change_metadata(path: Path, change: Callable[[Metadata], None]) -> None:
    """Alter what the metadata says, and the manifest with it."""
    metadata: Metadata = pickle.loads((path / METADATA).read_bytes())
    change(metadata)
    (path / METADATA).write_bytes(pickle.dumps(metadata))
    sign(path)


def entry_as(**values: object) -> Callable[[Metadata], None]:
    """Sets what is said of a tensor."""

    def change(metadata: Metadata) -> None:
        vars(metadata.state_dict_metadata["model.weight"]).update(values)

    return change


def of_size(*size: int) -> Callable[[Metadata], None]:
    """Makes a tensor as large, with a part that fills it."""
    size = torch.Size(size)
    chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
    return entry_as(size=size, chunks=[chunk])


def shards_in(name: object) -> Callable[[Metadata], None]:
    """Lets all tensors lie in one file."""

    def change(metadata: Metadata) -> None:
        for stored in metadata.storage_data.values():
            stored.relative_path = name

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (entry_as(size="3"), "is no tensor"),
        (entry_as(size=torch.Size([4, 2])), "is no tensor"),
        (entry_as(chunks=[]), "is no tensor"),
        (entry_as(chunks=None), "TypeError"),
        (entry_as(properties="x"), "AttributeError"),
        (of_size(-1, -6), "is no tensor"),
        (shards_in("../step-2/__0_0.distcp"), "none of its files"),
        (shards_in("/etc/passwd"), "none of its files"),
        (shards_in(".."), "none of its files"),
        (shards_in(7), "none of its files"),
        (shards_in("another"), "none of its files"),
    ],
)
def test_metadata_that_lies(
    tmp_path: Path, change: Callable[[Metadata], None], told: str
) -> None:
    checkpointer = saved(tmp_path, 3)
    change_metadata(path_of(checkpointer, 3), change)
    assert all(told in line for line in refusals(checkpointer, 3))


@pytest.mark.parametrize("size", [10**12, 2**62, 2**63 - 1])
def test_tensors_larger_than_their_files_take_no_memory(
    tmp_path: Path, size: int
) -> None:
    path = path_of(saved(tmp_path, 3), 3)
    change_metadata(path, of_size(size))
    with pytest.raises(UserError, match="smaller than its tensors"):
        load_weights(path, "model")


@pytest.mark.parametrize("name", ["int8", "qint8", "float4_e2m1fn_x2"])
def test_formats_that_no_weights_have(tmp_path: Path, name: str) -> None:
    path = path_of(saved(tmp_path, 3), 3)
    properties = TensorProperties(dtype=getattr(torch, name))
    change_metadata(path, entry_as(properties=properties))
    with pytest.raises(UserError, match=f"weight is of torch.{name}"):
        load_weights(path, "model")


def test_without_a_manifest_shards_lie_in_the_folder(tmp_path: Path) -> None:
    path = path_of(saved(tmp_path, 2, 3), 3)
    change_metadata(path, shards_in("../step-2/__0_0.distcp"))
    (path / MANIFEST).unlink()
    with pytest.raises(UserError, match="none of its files"):
        load_weights(path)


def test_a_manifest_without_the_metadata(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path, 3)
    path = path_of(checkpointer, 3)
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["files"][METADATA]
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert all("does not have it" in told for told in refusals(checkpointer, 3))


class Command:
    """Runs a shell command where a careless reader unpickles it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def pushed(text: str) -> bytes:
    """The operation of a pickle that puts a text on its stack."""
    encoded = text.encode()
    return pickle.BINUNICODE + len(encoded).to_bytes(4, "little") + encoded


def named(module: str, name: str) -> bytes:
    """The beginning of a pickle of protocol 4 that looks up a name."""
    return b"\x80\x04" + pushed(module) + pushed(name) + pickle.STACK_GLOBAL


def by_dotted_name(command: str) -> bytes:
    """Calls an imported module's function through the name of a module that is let in.

    From protocol 4 on, pickle looks up "os.system" inside of the module.
    """
    system = named("torch.distributed.checkpoint.filesystem", "os.system")
    return system + pushed(command) + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP


def test_the_dotted_name_is_a_real_threat(tmp_path: Path) -> None:
    """Else the test below would prove nothing."""
    marker = tmp_path / "marker"
    pickle.loads(by_dotted_name(f"touch {marker}"))
    assert marker.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, "dotted name"])
def test_hostile_metadata_is_not_run(tmp_path: Path, protocol: int | str) -> None:
    checkpointer, marker = saved(tmp_path, 3), tmp_path / "marker"
    command = f"touch {marker}"
    hostile = (
        pickle.dumps(Command(command), protocol)
        if isinstance(protocol, int)
        else by_dotted_name(command)
    )
    (path_of(checkpointer, 3) / METADATA).write_bytes(hostile)
    sign(path_of(checkpointer, 3))
    for told in refusals(checkpointer, 3):
        assert "system' does not belong there" in told
    assert not marker.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch", "float32.__class__"),
        ("torch.serialization", "load"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("pathlib", "os.system"),
        ("a\nb", "c"),
    ],
)
def test_other_names_are_refused(tmp_path: Path, module: str, name: str) -> None:
    checkpointer = saved(tmp_path, 3)
    hostile = named(module, name) + pickle.STOP
    (path_of(checkpointer, 3) / METADATA).write_bytes(hostile)
    sign(path_of(checkpointer, 3))
    for told in refusals(checkpointer, 3):
        assert "does not belong there" in told


def states(*objects: object) -> list[bytes]:
    """Pickles that set the state of what they look up."""
    fields = pickle.EMPTY_DICT + pushed("cache") + pickle.NONE + pickle.SETITEM
    looked_up = [named(o.__module__, o.__qualname__) for o in objects]
    both = pickle.NONE + fields + pickle.TUPLE2  # as for a class with slots
    return [
        name + state + pickle.BUILD + pickle.STOP
        for name in looked_up
        for state in (fields, both)
    ]


@pytest.mark.parametrize(
    "content",
    [
        *states(_get_layout, Metadata, TensorProperties, _MEM_FORMAT_ENCODING),
        *states(PosixPath, torch.Size),
    ],
)
def test_nothing_that_lasts_is_changed(content: bytes) -> None:
    with pytest.raises(UserError, match="with a state does not belong there"):
        parse(content, None)


def disguise_as_bytes(path: Path, key: str, payload: bytes) -> None:
    """Store bytes in the place of a tensor, whose size their metadata claims.

    DCP unpickles what is stored as bytes.
    """
    metadata: Metadata = pickle.loads((path / METADATA).read_bytes())
    size = metadata.state_dict_metadata[key].size
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    metadata.state_dict_metadata[key].size = size
    (index,) = [i for i in metadata.storage_data if i.fqn == key]
    info = metadata.storage_data.pop(index)
    info.relative_path, info.offset, info.length = "payload", 0, len(payload)
    metadata.storage_data[MetadataIndex(key)] = info
    (path / "payload").write_bytes(payload)
    (path / METADATA).write_bytes(pickle.dumps(metadata))
    sign(path)


def test_bytes_in_the_place_of_a_tensor_are_not_run(tmp_path: Path) -> None:
    checkpointer, marker = saved(tmp_path, 3), tmp_path / "marker"
    payload = io.BytesIO()
    torch.save(Command(f"touch {marker}"), payload)
    path = path_of(checkpointer, 3)
    disguise_as_bytes(path, "model.weight", payload.getvalue())
    with pytest.raises(UserError, match=r"it has model\.weight as nothing"):
        load(checkpointer.path(3), state_of(0))
    assert set(load_weights(path, "model")[0]) == {"bias"}
    # What reads does not rely on what looks.
    reader = SafeReader(checkpointer.path(3))
    with pytest.raises(UserError, match=r"model\.weight is no tensor"):
        _read({"model": {"weight": torch.empty(2, 3)}}, reader, no_dist=True)
    assert not marker.exists()


class TwoFaced(pickle._Pickler):
    """Writes metadata that says tensor, and when it is read again in a process, bytes.

    It keeps a class in the state of a function, which the next reading finds there.
    """

    MEMO = pickle.LONG_BINPUT, pickle.LONG_BINGET, (900).to_bytes(4, "little")

    def __init__(self, file: BinaryIO, entry: object) -> None:
        super().__init__(file, 2)
        self.entry = entry

    def emit(self, *parts: object) -> None:
        for part in parts:
            self.write(part) if isinstance(part, bytes) else super().save(part)

    def set_cache(self, *table: object) -> None:
        cache = pickle.EMPTY_DICT, "cache", pickle.EMPTY_DICT, *table, pickle.SETITEM
        self.emit(_get_layout, *cache, pickle.BUILD, pickle.POP)

    def save(self, value: object, *arguments: object) -> None:
        if value is not self.entry:
            return super().save(value, *arguments)
        keep, take, place = self.MEMO
        made = pickle.TUPLE1, pickle.REDUCE
        self.emit(_get_layout, "torch.strided", *made, keep, place, pickle.POP)
        kind = take, place, type(value), pickle.SETITEM
        second = "second", BytesStorageMetadata, pickle.SETITEM
        self.set_cache(*kind, *second, "torch.strided", take, place, pickle.SETITEM)
        self.emit(_get_layout, take, place, *made, pickle.EMPTY_TUPLE, pickle.NEWOBJ)
        self.emit(vars(value), pickle.BUILD)
        self.set_cache("torch.strided", "second", pickle.SETITEM)


def test_metadata_with_two_faces_is_not_run(tmp_path: Path) -> None:
    path, marker, payload = tmp_path / "ck", tmp_path / "marker", io.BytesIO()
    save_weights_only(path, {"w": torch.randn(3, 2)}, ABOUT)
    torch.save(Command(f"touch {marker}"), payload)
    (path / "payload").write_bytes(payload.getvalue())
    metadata: Metadata = pickle.loads((path / METADATA).read_bytes())
    ((place, stored),) = metadata.storage_data.items()
    stored.relative_path, stored.offset = "payload", 0
    stored.length = len(payload.getvalue())
    metadata.storage_data = {place: stored, MetadataIndex("model.w"): stored}
    with (path / METADATA).open("wb") as file:
        TwoFaced(file, metadata.state_dict_metadata["model.w"]).dump(metadata)
    (path / MANIFEST).unlink()
    before = dict(_get_layout.cache)
    with pytest.raises(UserError, match="with a state does not belong there"):
        load_weights(path)
    assert not marker.exists() and _get_layout.cache == before


def test_what_is_checked_is_what_is_read(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path, 3)
    reader = SafeReader(checkpointer.path(3))
    metadata = reader.read_metadata()
    (path_of(checkpointer, 3) / METADATA).unlink()
    assert reader.read_metadata() is metadata
