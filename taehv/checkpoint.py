"""One sharded DCP checkpoint: what is in it, and how it is read.

A checkpoint is a folder: DCP's shards and `.metadata`; `about.json`, what its weights
are; `config.toml`, the settings they were made with; and the manifest.
"""

from __future__ import annotations

import io
import json
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import tomli
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from taehv.errors import UserError
from taehv.metadata import UNREADABLE, nbytes, parse
from taehv.optim import Ema, Optimizer
from taehv.storage import (
    MANIFEST,
    Folder,
    HashedFiles,
    read_manifest,
    verify,
    write_manifest,
)
from taehv.weights import check_tensors, is_float
from taehv.writing import whole

State = dict[str, dict[str, Tensor]]

ABOUT = "about.json"
CONFIG = "config.toml"
METADATA = ".metadata"


class SafeReader(dcp.FileSystemReader):
    """FileSystemReader that runs no code from the checkpoint's metadata."""

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder.path)
        self.folder = folder
        self.fs, self.path = HashedFiles(folder), folder.path
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the list of tensors and shards, once: DCP gets what was checked.

        Raises:
            UserError: the file is damaged, or is not a checkpoint's metadata.
        """
        if self._metadata is None:
            try:
                self._metadata = parse(self.folder.read(METADATA), self._files())
            except UNREADABLE as error:
                raise UserError(
                    f"{self.folder}/{METADATA} is not a checkpoint's metadata "
                    f"({reason(error)}): delete its folder to take the checkpoint "
                    "before it"
                ) from None
            self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata

    def _files(self) -> Collection[str] | None:
        """Those that are verified; a checkpoint of another program has no manifest."""
        if not self.folder.has(MANIFEST):
            return None
        files = read_manifest(self.folder)
        if METADATA not in files:
            raise UserError(f"{MANIFEST} does not have it")
        return files

    def stored(self) -> int:
        """Bytes of all shards."""
        places = self.read_metadata().storage_data.values()
        return sum(self.folder.size(name) for name in {p.relative_path for p in places})


class _TensorsOnly(dcp.DefaultLoadPlanner):
    """Loads no bytes, which DCP would unpickle, and so run."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise UserError(f"{read_item.dest_index.fqn} is no tensor")


def step_folder(checkpoints: Folder, step: int) -> Folder:
    """Where the checkpoint of a step lies in a run's folder of checkpoints."""
    return checkpoints / f"step-{step}"


def steps_in(checkpoints: Folder) -> list[int]:
    """The steps that have a folder there, complete or not, in order."""
    found = [re.fullmatch(r"step-(\d{1,18})", name) for name in checkpoints.names()]
    return sorted(int(match[1]) for match in found if match)


def complete_steps(checkpoints: Folder) -> list[int]:
    """The steps that have a complete checkpoint, oldest first."""
    return [
        s for s in steps_in(checkpoints) if step_folder(checkpoints, s).has(MANIFEST)
    ]


def load(folder: Folder, state: State, optional: Collection[str] = ()) -> set[str]:
    """Fill the tensors of a state from a checkpoint (a collective).

    Args:
        folder: a checkpoint whose bytes are verified.
        state: see training_state.
        optional: groups that are left as they are, whole, on all processes, where any
            of their tensors is missing or of another shape.

    Returns:
        The groups that are filled.

    Raises:
        UserError: the checkpoint is damaged, or belongs to another model.
    """
    reader = SafeReader(folder)
    metadata = reader.read_metadata()
    left = {group for group in optional if _misfits(metadata, {group: state[group]})}
    told: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(told, left)
    filled = {group: t for group, t in state.items() if group not in set().union(*told)}
    for name, size, stored in _misfits(metadata, filled):
        groups = {key.partition(".")[0] for key in metadata.state_dict_metadata}
        if groups == {"model"}:
            raise UserError(
                f"{folder} holds weights alone: begin from them with "
                f"--model.checkpoint {folder}, and without checkpoint.resume_from"
            )
        raise UserError(
            f"{folder} does not fit this run: it has {name} as "
            f"{list(stored) if stored is not None else 'nothing'} and not as "
            f"{list(size)}; take the settings it was made with, or another --job.name"
        )
    _read(filled, reader, no_dist=False)
    return set(filled)


def load_weights(
    folder: str | os.PathLike[str], group: Literal["ema", "model"] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read nothing but the weights out of a checkpoint; needs no process group.

    Args:
        folder: a run's folder, of which the newest checkpoint is taken, or that of a
            checkpoint, such as outputs/NAME/checkpoints/step-N.
        group: the averaged weights, or the raw ones; None takes the averaged ones
            if there are any.

    Returns:
        The state_dict on the CPU, and what about.json says of it.

    Raises:
        UserError: it is damaged, or holds no such weights.
    """
    source = checkpoint_in(Folder(folder))
    if source.has(MANIFEST):  # a checkpoint of another program has none
        verify(source)
    reader = SafeReader(source)
    stored = reader.read_metadata().state_dict_metadata
    if group is None:
        group = "ema" if any(key.startswith("ema.") for key in stored) else "model"
    prefix = group + "."
    entries = {
        key.removeprefix(prefix): entry
        for key, entry in stored.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    if not entries:
        raise UserError(f"{source} holds no {group} weights")
    _check_formats(reader, entries)
    weights = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
    }
    _read({group: weights}, reader, no_dist=True)
    check_tensors(str(source), weights)
    return weights, read_about(source)


def _check_formats(
    reader: SafeReader, entries: Mapping[str, TensorStorageMetadata]
) -> None:
    """Refuse what no weights are, and what is larger than the files: any memory."""
    try:
        is_whole = sum(map(nbytes, entries.values())) <= reader.stored()
        told = "its files are smaller than its tensors"
    except OSError as error:
        is_whole, told = False, str(error)
    for key, entry in entries.items():
        if not is_float(entry.properties.dtype):
            is_whole, told = False, f"{key} is of {entry.properties.dtype}"
    if not is_whole:
        raise _damaged(reader.folder, told)


def checkpoint_in(folder: Folder) -> Folder:
    """The checkpoint that a folder is, or the newest one of the run that it is.

    Raises:
        UserError: there is none.
    """
    if folder.has(METADATA):
        return folder
    settings = tomli.loads(read_config(folder)).get("checkpoint", {})
    named, told = settings.get("folder"), ""
    if isinstance(named, str) and named:
        if (found := _newest_at(named)) is not None:
            return found
        told = f", nor has {named!r}, which its {CONFIG} names"
    for checkpoints in (folder / "checkpoints", folder):
        if steps := complete_steps(checkpoints):
            return step_folder(checkpoints, steps[-1])
    raise UserError(
        f"{folder} has no complete checkpoint{told}: give a run's folder "
        "(outputs/NAME) or a checkpoint's (outputs/NAME/checkpoints/step-N)"
    )


def _newest_at(named: str) -> Folder | None:
    """The newest checkpoint where the settings of a run say that they lie."""
    try:
        checkpoints = Folder(named)
        steps = complete_steps(checkpoints)
    except UserError:
        raise
    except Exception as error:  # every package for a kind of place has its own
        told = f"cannot read {named!r}, the run's checkpoint.folder ({reason(error)})"
        raise UserError(f"{told}: give the folder of a checkpoint") from None
    return step_folder(checkpoints, steps[-1]) if steps else None


def save_weights_only(
    folder: Path, weights: dict[str, Tensor], about: dict[str, str]
) -> None:
    """Write a checkpoint of weights alone, from which a training can start.

    Raises:
        OSError, CheckpointException: it cannot be written, and nothing is left of it.
    """
    with whole(folder) as unfinished:
        target = Folder(unfinished)
        writer, disk = dcp_writer(target)
        with _quiet():
            dcp.save({"model": weights}, storage_writer=writer, no_dist=True)
        finish(target, disk.entries, {ABOUT: json.dumps(about, indent=1)})


def dcp_writer(folder: Folder) -> tuple[dcp.FileSystemWriter, HashedFiles]:
    """What DCP writes a checkpoint with, and what notes the files that it wrote."""
    # Copying ahead would use the GPU, from a thread that is not at home on it; and
    # what DCP does to sync differs from version to version.
    writer = dcp.FileSystemWriter(
        folder.path, sync_files=False, per_thread_copy_ahead=0
    )
    writer.fs, writer.path = HashedFiles(folder), folder.path
    return writer, writer.fs


def finish(
    folder: Folder, entries: dict[str, dict[str, Any]], texts: dict[str, str]
) -> None:
    """Add files of text to what DCP wrote, and declare the checkpoint complete."""
    for name, text in texts.items():
        entries[name] = folder.write(name, text.encode())
    write_manifest(folder, entries)


def read_about(folder: Folder) -> dict[str, str]:
    """What the weights of a checkpoint are; empty where nothing says it."""
    try:
        about = json.loads(folder.read(ABOUT))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder}/{ABOUT} is damaged ({error})") from None
    if not isinstance(about, dict):
        raise UserError(f"{folder}/{ABOUT} is damaged: it holds no table")
    return {str(key): str(value) for key, value in about.items()}


def read_config(folder: Folder) -> str:
    """The settings, in TOML, that a checkpoint was made with; empty if it has none."""
    try:
        text = folder.read(CONFIG).decode()
        sections = tomli.loads(text).values()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder}/{CONFIG} is damaged ({error})") from None
    if not all(isinstance(section, dict) for section in sections):
        raise UserError(f"{folder}/{CONFIG} is damaged: it has more than sections")
    return text


def _read(state: State, reader: SafeReader, no_dist: bool) -> None:
    try:
        with _quiet():
            dcp.load(
                state, storage_reader=reader, planner=_TensorsOnly(), no_dist=no_dist
            )
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise _damaged(reader.folder, reason(cause)) from None


def _damaged(folder: Folder, told: str) -> UserError:
    return UserError(
        f"{folder} is damaged ({told}): delete that folder, and take the checkpoint "
        "before it"
    )


def reason(error: BaseException) -> str:
    """An error in one line: pickle's own words are many, and advise to run the file."""
    tells = isinstance(error, OSError | UserError)
    return str(error) if tells else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _misfits(
    metadata: Metadata, state: State
) -> list[tuple[str, torch.Size, torch.Size | None]]:
    """Name, size and stored size of the tensors that a checkpoint cannot fill."""
    found = []
    for group, tensors in state.items():
        for name, tensor in tensors.items():
            stored = metadata.state_dict_metadata.get(f"{group}.{name}")
            # DCP would unpickle, and so run, anything that is stored as bytes.
            is_tensor = isinstance(stored, TensorStorageMetadata)
            size = stored.size if is_tensor else None
            if size != tensor.size():
                found.append((f"{group}.{name}", tensor.size(), size))
    return found


def training_state(
    parameters: Mapping[str, nn.Parameter],
    ema: Ema,
    optimizer: Optimizer,
    counts: dict[str, int | float],
    **groups: dict[str, Tensor],
) -> State:
    """Everything a run goes on from, as tensors that a load fills in place.

    Tensors only: DCP would pickle anything else. What the schedules and the data need
    are pure functions of the counts.

    Args:
        parameters: of the model, as they were when it was sharded: until FSDP2 has seen
            a backward pass of a part, the model's own may be gathered, rounded ones.
        ema: its averages are.
        optimizer: of the model.
        counts: numbers, kept exactly.
        groups: of further components, each the tensors that it goes on from, by names
            of its own (see optimizer_state); they have the same names and shapes at
            every save. A tensor that is not sharded is taken to be equal on all
            processes, of which one writes it: where it is not, put the rank into its
            name. `load` says which groups may be missing.
    """
    return {
        "model": {name: value.detach() for name, value in parameters.items()},
        "ema": dict(ema.weights),
        "optimizer": optimizer_state(parameters, optimizer),
        "counts": {
            name: torch.tensor(
                value, dtype=torch.int64 if isinstance(value, int) else torch.float64
            )
            for name, value in counts.items()
        },
        **groups,
    }


def optimizer_state(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> dict[str, Tensor]:
    """The group of an optimizer's state, by the names of its parameters."""
    return {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        if parameter in optimizer.state
        for key, value in optimizer.state[parameter].items()
    }
