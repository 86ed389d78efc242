"""Files elsewhere, named by URLs that fsspec knows: s3://bucket/clips, memory://a.mp4.

Reading needs the package of that kind of place, such as s3fs or gcsfs.
"""

from __future__ import annotations

import argparse
import errno
import glob
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from taehv.errors import UserError


def is_url(location: str | os.PathLike[str]) -> bool:
    """Whether it names a place for fsspec, not a path."""
    return "://" in os.fspath(location)


def local_path(text: str) -> Path:
    """A path on a command line that takes no URLs there, as `type` of an argument."""
    if is_url(text):
        raise argparse.ArgumentTypeError(f"{text} is a URL: give a local path")
    return Path(text)


def file_system(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path in it.

    Raises:
        UserError: no installed package reads such URLs.
    """
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot reach {url}: {error}") from None


class UrlError(OSError):
    """What lies elsewhere cannot be read."""


@contextmanager
def _as_url_error() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # every package for a kind of place has its own
        raise UrlError(errno.EIO, f"{type(error).__name__}: {error}") from error


class UrlReader:
    """A file for PyAV, which drops some errors of what it reads from.

    So a failure looks like the end of the file, until `check` is called.

    Raises:
        UrlError: it cannot be opened.
    """

    def __init__(self, url: str) -> None:
        self.name = url
        self._failure: UrlError | None = None
        files, path = file_system(url)
        with _as_url_error():
            self._file = files.open(path, "rb")

    def read(self, size: int) -> bytes:
        """The next bytes; none at the end, and from a failure on."""
        with suppress(UrlError), self._noting():
            return b"" if self._failure else self._file.read(size)
        return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place; where that is. Raises UrlError."""
        with self._noting():
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Where the next bytes are. Raises UrlError."""
        with self._noting():
            return self._file.tell()

    def check(self) -> None:
        """Raise the UrlError that there was, if any."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Read no more. Raises UrlError."""
        with _as_url_error():
            self._file.close()

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            with _as_url_error():
                yield
        except UrlError as error:
            self._failure = error
            raise


def read_bytes(url: str) -> bytes:
    """All of a file. Raises UrlError when it cannot be read."""
    files, path = file_system(url)
    with _as_url_error():
        return files.cat_file(path)


def stamp(url: str) -> tuple[int, int]:
    """Size in bytes of a file, and a number that changes with the file.

    Raises:
        UrlError: there is no such file, or it cannot be told.
    """
    files, path = file_system(url)
    with _as_url_error():
        info = files.info(path)
        if info["type"] != "file":
            raise IsADirectoryError("is no file")
        digest = hashlib.sha256(str(files.ukey(path)).encode()).digest()
    return int(info["size"] or 0), int.from_bytes(digest[:7], "little")


def search(url: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files with these suffixes in a folder, or in what matches a glob.

    Returns their paths relative to the `fixed_part`.

    Raises:
        UserError: there is no such folder, or it cannot be listed.
    """
    files, root = file_system(fixed_part(url))
    pattern = file_system(url)[1]
    try:
        with _as_url_error():
            if glob.has_magic(url):
                found = _matching(files, pattern)
            elif files.isdir(root):
                found = files.find(root)
            else:
                raise NotADirectoryError("no such folder")
    except UrlError as error:
        raise UserError(f"cannot list {url} ({error.strerror}): correct it") from error
    inside = (name.removeprefix(root).lstrip("/") for name in found)
    return [name for name in inside if name.lower().endswith(suffixes)]


def fixed_part(url: str) -> str:
    """The folder that a glob starts from: what is before its first wildcard."""
    parts = url.split("/")
    has_magic = [glob.has_magic(part) for part in parts]
    return "/".join(parts[: [*has_magic, True].index(True)])


def _matching(files: AbstractFileSystem, pattern: str) -> list[str]:
    found = files.glob(pattern, detail=True)
    in_folders = (
        files.find(name) if info["type"] == "directory" else [name]
        for name, info in found.items()
    )
    return [name for names in in_folders for name in names]
