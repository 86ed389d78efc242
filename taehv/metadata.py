"""DCP's pickled list of what lies where in a checkpoint, read without trust."""

from __future__ import annotations

import io
import math
import pickle
import struct
from collections.abc import Collection
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from taehv.errors import UserError
from taehv.storage import is_bare

UNREADABLE = (
    OSError,
    EOFError,
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
"""What pickle raises where bytes are damaged; it has no one class for that."""

LAYOUTS = {str(v): v for v in vars(torch).values() if isinstance(v, torch.layout)}


class _Unpickler(pickle._Unpickler):
    """Makes DCP's metadata, and refuses to make anything else or to change anything.

    It is pickle's form in Python, the only one whose operations can be refused.
    """

    MADE = (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
        _StorageInfo,
    )
    # Exact names only: pickle resolves dots in a name, so that a whole module would
    # let in whatever that module imports.
    NAMES = frozenset(
        [
            *((kind.__module__, kind.__name__) for kind in MADE),
            (Metadata.__module__, "_MEM_FORMAT_ENCODING"),
            ("torch", "Size"),
            ("pathlib", "Path"),
            ("pathlib", "PosixPath"),
        ]
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.serialization", "_get_layout"):
            return LAYOUTS.__getitem__  # the function itself has a state
        if module == "pathlib._local":  # where Python 3.13 keeps them
            module = "pathlib"
        is_dtype = module == "torch" and isinstance(
            getattr(torch, name, None), torch.dtype
        )
        if not is_dtype and (module, name) not in self.NAMES:
            raise UserError(f"{f'{module}.{name}'!r} does not belong there")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Set the state of an object: of a class or a function it would stay set."""
        kind = type(self.stack[-2])
        if kind not in self.MADE:
            raise UserError(f"a {kind.__name__} with a state does not belong there")
        super().load_build()

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}
    del dispatch[pickle.BYTEARRAY8[0]]  # takes the memory before it has the bytes


def parse(content: bytes, files: Collection[str] | None) -> Metadata:
    """Read the metadata of a checkpoint, and see that DCP can work with it.

    Args:
        content: of the file.
        files: what the shards may be; None is anything in the checkpoint's folder.

    Raises:
        UserError, or one of UNREADABLE: it is damaged, or something else.
    """
    metadata = _Unpickler(io.BytesIO(content)).load()
    if type(metadata) is not Metadata:
        raise UserError("it is something else")
    for key, entry in metadata.state_dict_metadata.items():
        is_bytes = type(entry) is BytesStorageMetadata
        if type(key) is not str or not (is_bytes or _is_whole(entry)):
            raise UserError(f"{key!r} is no tensor of which all parts are there")
    for place, stored in metadata.storage_data.items():
        if type(place) is not MetadataIndex or type(stored) is not _StorageInfo:
            raise UserError("it does not say where the tensors are")
        name = stored.relative_path
        if not is_bare(name) or (files is not None and name not in files):
            raise UserError(f"{name!r} is none of its files")
    return metadata


def nbytes(entry: TensorStorageMetadata) -> int:
    """Bytes of a whole tensor."""
    return math.prod(entry.size) * entry.properties.dtype.itemsize


def _is_whole(entry: Any) -> bool:
    """Whether it describes a tensor and parts that fill it."""
    sizes = [entry.size, *(chunk.sizes for chunk in entry.chunks)]
    starts = [chunk.offsets for chunk in entry.chunks]
    return (
        type(entry) is TensorStorageMetadata
        and isinstance(entry.properties.dtype, torch.dtype)
        and all(type(size) is torch.Size for size in sizes + starts)
        and all(min(size, default=0) >= 0 for size in sizes + starts)
        and math.prod(sizes[0]) == sum(map(math.prod, sizes[1:]))
    )
