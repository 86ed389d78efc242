"""Sharded DCP checkpoints: save, find, load."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

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

from taehv.config import Checkpoint
from taehv.errors import UserError
from taehv.optim import AdamW, Ema
from taehv.weights import check_tensors

State = dict[str, dict[str, Tensor]]

ABOUT = "about.json"
METADATA = ".metadata"
"""DCP renames this file into place last: a folder without it is incomplete."""


UNREADABLE = (
    OSError,
    EOFError,
    pickle.UnpicklingError,
    AttributeError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)
"""What pickle raises where bytes are damaged; it has no one class for that."""


class _MetadataUnpickler(pickle.Unpickler):
    """Reads DCP's pickled metadata, and refuses to make anything else."""

    # Exact names only: pickle resolves dots in a name, so that a whole module would
    # let in whatever that module imports.
    DCP = {
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size"},
        "pathlib": {"Path", "PosixPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if module == "pathlib._local":  # where Python 3.13 keeps them
            module = "pathlib"
        is_dtype = module == "torch" and isinstance(
            getattr(torch, name, None), torch.dtype
        )
        if not is_dtype and name not in self.DCP.get(module, ()):
            raise UserError(f"{f'{module}.{name}'!r} does not belong there")
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):
    """FileSystemReader that runs no code from the checkpoint's metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the list of tensors and shards.

        Raises:
            UserError: the file is damaged, or is not a checkpoint's metadata.
        """
        path = Path(self.path) / METADATA
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except UNREADABLE as error:
            raise UserError(
                f"{path} is not a checkpoint's metadata ({_reason(error)}): "
                "delete its folder to take the checkpoint before it"
            ) from None
        if not isinstance(metadata, Metadata):
            raise UserError(f"{path} is not a checkpoint's metadata")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a run's folder of checkpoints."""
    return checkpoints / f"step-{step}"


def complete_steps(checkpoints: Path) -> list[int]:
    """The steps that have a complete checkpoint, oldest first."""
    found = checkpoints.glob(f"step-*/{METADATA}")
    numbers = (path.parent.name.removeprefix("step-") for path in found)
    return sorted(int(number) for number in numbers if number.isdigit())


class Checkpointer:
    """The checkpoints of one run: FOLDER/step-N, each written by all processes."""

    def __init__(self, folder: Path, settings: Checkpoint) -> None:
        self.folder = folder
        self.keep = settings.keep

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return step_folder(self.folder, step)

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, oldest first."""
        return complete_steps(self.folder)

    def save(self, step: int, state: State, about: dict[str, str]) -> Path:
        """Write the state of a step (a collective), then drop the oldest ones.

        Args:
            step: names the folder.
            state: see training_state.
            about: what the weights are, kept beside them as about.json.
        """
        path = self.path(step)
        if dist.get_rank() == 0:
            # Shards that an interrupted save left behind would be taken along.
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
            write_about(path, about)
        dist.barrier()
        dcp.save(state, storage_writer=dcp.FileSystemWriter(path))
        if dist.get_rank() == 0 and self.keep:
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(old), ignore_errors=True)
        return path

    def load(self, step: int, state: State) -> None:
        """Fill the tensors of the state from the checkpoint of a step (a collective).

        Raises:
            UserError: the checkpoint is damaged, or belongs to another model.
        """
        reader = SafeReader(self.path(step))
        _check_fit(self.path(step), reader.read_metadata(), state)
        _read(state, reader, no_dist=False)


def write_about(folder: Path, about: dict[str, str]) -> None:
    """Note beside a checkpoint what its weights are."""
    (folder / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")


def load_weights(
    folder: Path, group: Literal["ema", "model"] | None = None
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
    folder = checkpoint_in(folder)
    reader = SafeReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    if group is None:
        group = "ema" if any(key.startswith("ema.") for key in stored) else "model"
    prefix = group + "."
    weights = {
        key.removeprefix(prefix): torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    if not weights:
        raise UserError(f"{folder} holds no {group} weights")
    _read({group: weights}, reader, no_dist=True)
    check_tensors(folder, weights)
    return weights, read_about(folder)


def checkpoint_in(folder: Path) -> Path:
    """The checkpoint that a folder is, or the newest one of the run that it is.

    Raises:
        UserError: there is none.
    """
    if (folder / METADATA).exists():
        return folder
    steps = complete_steps(folder / "checkpoints")
    if not steps:
        raise UserError(
            f"{folder} has no complete checkpoint: give a run's folder "
            "(outputs/NAME) or a checkpoint's (outputs/NAME/checkpoints/step-N)"
        )
    return step_folder(folder / "checkpoints", steps[-1])


def save_weights_only(
    folder: Path, weights: dict[str, Tensor], about: dict[str, str]
) -> None:
    """Write a checkpoint of weights alone, from which a training can start."""
    with _quiet():
        writer = dcp.FileSystemWriter(folder)
        dcp.save({"model": weights}, storage_writer=writer, no_dist=True)
    write_about(folder, about)


def read_about(folder: Path) -> dict[str, str]:
    """What the weights of a checkpoint are; empty where nothing says it."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{folder / ABOUT} is damaged ({error})") from None
    if not isinstance(about, dict):
        raise UserError(f"{folder / ABOUT} is damaged: it holds no table")
    return {str(key): str(value) for key, value in about.items()}


def _read(state: State, reader: SafeReader, no_dist: bool) -> None:
    try:
        with _quiet():
            dcp.load(state, storage_reader=reader, no_dist=no_dist)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise UserError(
            f"{reader.path} is damaged ({_reason(cause)}): delete that folder, and "
            "take the checkpoint before it"
        ) from None


def _reason(error: BaseException) -> str:
    """In one line; pickle's own words are many, and advise to run what is there."""
    tells = isinstance(error, OSError | UserError)
    return str(error) if tells else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _check_fit(path: Path, metadata: Metadata, state: State) -> None:
    for group, tensors in state.items():
        for name, tensor in tensors.items():
            stored = metadata.state_dict_metadata.get(f"{group}.{name}")
            # DCP would unpickle, and so run, anything that is stored as bytes.
            is_tensor = isinstance(stored, TensorStorageMetadata)
            size = stored.size if is_tensor else None
            if size != tensor.size():
                raise UserError(
                    f"{path} does not fit this run: it has {group}.{name} as "
                    f"{list(size) if size else 'nothing'} and not as "
                    f"{list(tensor.size())}; take the settings it was made with, or "
                    "another --job.name"
                )


def training_state(
    model: nn.Module, ema: Ema, optimizer: AdamW, counts: dict[str, int]
) -> State:
    """Everything a run goes on from, as tensors that a load fills in place.

    Tensors only: DCP would pickle anything else.
    """
    parameters = dict(model.named_parameters())
    return {
        "model": {name: value.detach() for name, value in parameters.items()},
        "ema": dict(ema.weights),
        "optimizer": {
            f"{name}.{key}": value
            for name, parameter in parameters.items()
            if parameter in optimizer.state
            for key, value in optimizer.state[parameter].items()
        },
        "counts": {key: torch.tensor(value) for key, value in counts.items()},
    }
