"""Files that are whole whatever becomes of the disk, or that only grow."""

from __future__ import annotations

import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

W = TypeVar("W", bound="WholeWriter")

log = logging.getLogger("taehv")

MOST_WAITING = 2**26
"""Bytes that a growing file keeps in memory while they cannot be written."""


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Another name for a file or folder, which gets its own when the block ends well.

    It takes the place of what had the name; otherwise nothing is left behind.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield unfinished
        if unfinished.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(unfinished, path)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        with suppress(OSError):
            unfinished.unlink()


class WholeWriter(ABC):
    """Writes a file or folder piece by piece within a `with` block, see `whole`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @abstractmethod
    def _open(self, unfinished: Path) -> None:
        """Begin to write there."""

    @abstractmethod
    def _close(self, is_good: bool) -> None:
        """End, and if all went well so far, write what is still to be written."""

    def __enter__(self: W) -> W:
        with ExitStack() as stack:
            self._open(stack.enter_context(whole(self.path)))
            stack.push(lambda kind, error, trace: self._close(kind is None))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write files, all of them or on an error none, into folders made as needed."""
    with ExitStack() as stack:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with stack.enter_context(whole(path)).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one."""
    write_files({path: text.encode()})


class GrowingFile:
    """A file that whole blocks are appended to, there at once for all readers.

    What the disk refuses waits in memory and is written before the next block, so that
    a full disk makes a file late and never tears it. Told are the first failure, the
    recovery, and what is lost.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = bytearray()
        self._lost = 0
        self._is_failing = False

    def write(self, block: bytes) -> None:
        """Append a block, or keep it until it can be."""
        if self._is_failing and len(self._waiting) + len(block) > MOST_WAITING:
            self._lost += len(block)
            block = b""
        self._waiting += block
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            if not self._is_failing:
                log.warning(
                    f"{self.path} cannot be written ({error.strerror}): what is new "
                    "waits in memory"
                )
            self._is_failing = True
            return
        if self._is_failing:
            self._is_failing = False
            log.warning(f"{self.path} can be written again")

    def close(self) -> None:
        """Write what still waits, if that can be done now."""
        if self._waiting:
            self.write(b"")
        self._lost += len(self._waiting)
        if self._lost:
            log.warning(f"{self.path}: {self._lost} bytes could not be written")
        with suppress(OSError):
            self._file.close()
