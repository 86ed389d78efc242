"""Folders on this machine or elsewhere, and a manifest that finds altered bytes."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem

from taehv.errors import UserError
from taehv.urls import file_system, is_url

MANIFEST = "manifest.json"
"""Size and SHA-256 of every other file of a folder; written last, so that a folder
without it is incomplete."""
CHUNK = 2**22
"""Bytes read or written at a time."""


class Damaged(UserError):
    """What is stored is not what was written."""


class Folder:
    """A folder on this machine, or elsewhere if its name is a URL.

    Args:
        location: a path, or a URL that fsspec knows: s3://bucket/runs, memory://runs.

    Raises:
        UserError: no installed package reads such URLs.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self.name = os.fspath(location)
        if is_url(self.name):
            self.files, self.path = file_system(self.name)
        else:
            self.files, self.path = LocalFileSystem(), os.path.expanduser(self.name)
        self.is_local = isinstance(self.files, LocalFileSystem)

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.name.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.name

    def names(self) -> list[str]:
        """What lies in it; nothing if it is not there."""
        self.files.invalidate_cache()
        if not self.files.isdir(self.path):
            return []
        found = self.files.ls(self.path, detail=False)
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found)

    def has(self, name: str) -> bool:
        """Whether a file lies in it."""
        self.files.invalidate_cache()
        return self.files.isfile(f"{self.path}/{name}")

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self.files.size(f"{self.path}/{name}")

    def make(self) -> None:
        """Make it, and what it lies in."""
        self.files.makedirs(self.path, exist_ok=True)

    def remove(self) -> None:
        """Remove it with all that is in it, if it is there.

        Its manifest goes first: interrupted, what is left is no checkpoint.
        """
        if self.has(MANIFEST):
            self.files.rm(f"{self.path}/{MANIFEST}")
        if self.files.exists(self.path):
            self.files.rm(self.path, recursive=True)

    def rename(self, name: str) -> None:
        """Give it another last name, which nothing has."""
        target = Folder(f"{self.name.rpartition('/')[0]}/{name}")
        self.files.mv(self.path, target.path, recursive=True)

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        return self.files.cat_file(f"{self.path}/{name}")

    def write(self, name: str, content: bytes) -> dict[str, Any]:
        """Write a file so that a crash leaves none of it or all; its manifest entry."""
        path = f"{self.path}/{name}"
        # Elsewhere, a file appears when it is whole.
        partial = path + ".partial" if self.is_local else path
        disk = HashedFiles(self)
        with disk.create_stream(partial, "wb") as stream:
            stream.write(content)
        if self.is_local:
            os.replace(partial, path)
            _sync_folder(self.path)
        (entry,) = disk.entries.values()
        return entry


class HashedFiles(FileSystem):
    """What DCP reads and writes through; it hashes what is written, and syncs it."""

    def __init__(self, folder: Folder) -> None:
        super().__init__()
        self.fs = folder.files
        self.is_local = folder.is_local
        self.entries: dict[str, dict[str, Any]] = {}
        """Of the manifest, by the name of the file."""

    @contextmanager
    def create_stream(
        self, path: str | os.PathLike[str], mode: str
    ) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream:
            if "r" in mode:
                yield stream
                return
            hashed = _HashedStream(stream, self.is_local)
            try:
                yield hashed  # type: ignore[misc]
            except RuntimeError as error:  # torch.save's, which hides the cause
                raise hashed.error or error from None
            hashed.close()
            name = os.path.basename(path).removesuffix(".tmp")
            self.entries[name] = {
                "bytes": hashed.bytes,
                "sha256": hashed.digest.hexdigest(),
            }


class _HashedStream:
    """A file that is written from its beginning to its end, in large pieces.

    Hashing and writing leave Python to the training, and have to win it back after
    every piece: of the thousands that a checkpoint has, most are a few bytes.
    """

    def __init__(self, stream: IO[bytes], sync: bool) -> None:
        self.stream, self.sync = stream, sync
        self.digest, self.bytes, self.is_open = hashlib.sha256(), 0, True
        self.error: OSError | None = None
        self._gathered = bytearray()

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.bytes += size
        self._gathered += data
        if len(self._gathered) >= CHUNK:
            self._put()
        return size

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        """Nothing: DCP asks for it after every tensor."""

    def _put(self) -> None:
        self.digest.update(self._gathered)
        try:
            self.stream.write(self._gathered)
            self.stream.flush()
        except OSError as error:
            self.error = error
            raise
        self._gathered.clear()

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self._put()
            if self.sync:
                os.fsync(self.stream.fileno())
            self.stream.close()


def _sync_folder(path: str) -> None:
    """Have the names of its files survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Folder, entries: dict[str, dict[str, Any]]) -> None:
    """Declare a folder complete.

    Args:
        folder: it holds all the files.
        entries: {"bytes": size, "sha256": digest} of every file, by its name.
    """
    text = json.dumps({"files": dict(sorted(entries.items()))}, indent=1)
    folder.write(MANIFEST, text.encode())


def verify(folder: Folder, part: int = 0, parts: int = 1) -> None:
    """Compare the files of a folder with its manifest.

    Args:
        folder: a complete one.
        part: which of several processes this is; each takes its share of the files.
        parts: how many processes there are.

    Raises:
        Damaged: a file is missing, cut short or altered, or the manifest is.
    """
    entries = read_manifest(folder)
    for name in sorted(entries)[part::parts]:
        try:
            size, digest = _digest(folder, name)
        except FileNotFoundError:
            raise Damaged(f"{folder}/{name} is missing") from None
        except OSError as error:
            raise Damaged(f"{folder}/{name} cannot be read ({error})") from None
        if size != entries[name]["bytes"]:
            told = f"has {size} bytes in place of {entries[name]['bytes']}"
            raise Damaged(f"{folder}/{name} {told}")
        if digest != entries[name]["sha256"]:
            raise Damaged(f"{folder}/{name} is altered: its SHA-256 differs")


def read_manifest(folder: Folder) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of the files of a complete folder, by their names.

    Raises:
        Damaged: it is none.
    """
    try:
        entries = json.loads(folder.read(MANIFEST))["files"]
        plain = bool(entries) and all(
            is_bare(name) and entry.keys() == {"bytes", "sha256"}
            for name, entry in entries.items()
        )
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ):
        plain = False
    if not plain:
        raise Damaged(f"{folder}/{MANIFEST} is damaged")
    return entries


def is_bare(name: object) -> bool:
    """Whether it is the name of a file, and leads nowhere else."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not {"/", "\\", "\0"} & set(name)
    )


def _digest(folder: Folder, name: str) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with folder.files.open(f"{folder.path}/{name}", "rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()
