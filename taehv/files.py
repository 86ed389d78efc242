"""Lists of many video files: where they come from, and which are held out."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from taehv.config import Data
from taehv.errors import UserError

log = logging.getLogger("taehv")

VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"),
)


class FileList:
    """Paths of many videos as one block of bytes, cheap to share between processes.

    `base` is joined in front of relative paths. After `save` the block is memory
    mapped, and a pickled copy carries the folder's name instead of the paths.
    """

    def __init__(self, base: str, blob: np.ndarray, ends: np.ndarray) -> None:
        self.base = base
        self._blob = blob
        self._ends = ends
        self._folder: str | None = None

    @classmethod
    def from_paths(cls, base: str, paths: Iterable[str]) -> FileList:
        """Sorted and without repetition: the order of a list plays no part."""
        return cls.in_order(base, sorted(set(paths), key=os.fsencode))

    @classmethod
    def in_order(cls, base: str, paths: Iterable[str]) -> FileList:
        """As they are given."""
        names = [os.fsencode(path) for path in paths]
        blob = np.frombuffer(b"".join(names), dtype=np.uint8)
        ends = np.cumsum([0, *map(len, names)], dtype=np.int64)
        return cls(base, blob, ends)

    @classmethod
    def from_config(cls, data: Data) -> FileList:
        """Files that `data.root` and `data.annotations` name.

        Links to folders are not followed. Listed files are not looked for here: a
        missing one is found when it is decoded. Raises UserError for a missing or
        empty folder and for a list or annotation that cannot be read.
        """
        root, annotations = _absolute(data.root), _absolute(data.annotations)
        if not root and not annotations:
            raise UserError("data.root is empty: set it to the folder of the videos")
        if root and not os.path.isdir(root):
            raise UserError(f"data.root = {root} is no folder: correct the path")
        base = root or os.path.dirname(annotations)
        paths = _listed(annotations) if annotations else _walk(root)
        files = cls.from_paths(base, (relative_path(path, base) for path in paths))
        if not len(files):
            place = annotations or f"data.root = {root}"
            raise UserError(f"{place} holds no videos: add some or correct the path")
        return files

    @classmethod
    def load(cls, folder: str, base: str) -> FileList:
        """Memory map what `save` wrote."""
        names = ("paths.npy", "ends.npy")
        arrays = [np.load(os.path.join(folder, n), mmap_mode="r") for n in names]
        files = cls(base, *arrays)
        files._folder = folder
        return files

    def save(self, folder: str | Path) -> FileList:
        """Write the paths below `folder`, named by content, and memory map them.

        Several processes may save the same list at the same time.
        """
        if not len(self):
            return self
        place = os.path.join(folder, f"files-{self.fingerprint[:16]}")
        os.makedirs(place, exist_ok=True)
        for name, array in (("paths.npy", self._blob), ("ends.npy", self._ends)):
            unfinished = os.path.join(place, f"{name}.{os.getpid()}.part")
            with open(unfinished, "wb") as file:
                np.save(file, array)
            os.replace(unfinished, os.path.join(place, name))
        return FileList.load(place, self.base)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        """Full path of file i."""
        return os.path.join(self.base, self.relative(i))

    def relative(self, i: int) -> str:
        """Path of file i relative to the base; absolute if it lies elsewhere."""
        return os.fsdecode(self._blob[self._ends[i] : self._ends[i + 1]].tobytes())

    @property
    def fingerprint(self) -> str:
        """Hash of the relative paths, to compare on resume and between ranks."""
        content = hashlib.sha256(self._ends.tobytes())
        content.update(self._blob.tobytes())
        return content.hexdigest()

    def __reduce__(self) -> tuple[Callable[..., FileList], tuple[Any, ...]]:
        if self._folder is not None:
            return FileList.load, (self._folder, self.base)
        return FileList, (self.base, self._blob, self._ends)


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path)) if path else ""


def relative_path(path: str, base: str) -> str:
    """Relative to base where it lies below it, so that machines agree."""
    full = os.path.normpath(os.path.join(base, os.path.expanduser(path)))
    inside = full.startswith(os.path.join(base, ""))
    return os.path.relpath(full, base) if inside else full


def _unreadable(error: OSError) -> None:
    log.warning(f"left out a folder that cannot be read: {error}")


def _walk(root: str) -> Iterator[str]:
    for folder, _, names in os.walk(root, onerror=_unreadable):
        for name in names:
            if os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES:
                yield os.path.join(folder, name)


def _listed(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.annotations = {path} cannot be read ({error}): name a .json "
            "annotation or a .txt list of paths"
        ) from error
    if path.lower().endswith(".json"):
        return _annotated(path, text)
    return [line.strip() for line in text.splitlines() if line.strip()]


def _annotated(path: str, text: str) -> list[str]:
    try:
        annotation = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no valid JSON ({error}): write it again") from error
    entries = annotation.get("list") if isinstance(annotation, dict) else None
    if not isinstance(entries, list):
        raise UserError(f'{path} must be {{"list": [{{"path": ...}}, ...]}}')
    return [_path_of(entry, i, path) for i, entry in enumerate(entries)]


def _path_of(entry: Any, i: int, annotation: str) -> str:
    fields = entry if isinstance(entry, dict) else {}
    path = fields.get("full_path") or fields.get("path")
    if not isinstance(path, str):
        raise UserError(
            f'entry {i} of the list in {annotation} has no path: give it a "path" '
            'relative to data.root or a "full_path"'
        )
    return path


def build_file_lists(data: Data) -> tuple[FileList, FileList]:
    """Training and held-out files by the settings; see FileList and split."""
    return split(FileList.from_config(data), data.holdout, data.holdout_fraction)


def split(
    files: FileList, holdout: list[str], holdout_fraction: float
) -> tuple[FileList, FileList]:
    """Training and validation files, decided for each path on its own.

    `holdout` are fnmatch patterns on the relative path; without any,
    `holdout_fraction` of the files, by a hash of the relative path. Of two or more
    files each side gets at least one; a single file is for training. Raises UserError
    when the patterns match no file or every file.
    """
    paths = [files.relative(i) for i in range(len(files))]
    if holdout:
        held = {path for path in paths if any(fnmatchcase(path, p) for p in holdout)}
        if len(held) in (0, len(paths)):
            raise UserError(
                f"data.holdout = {holdout} matches {len(held)} of {len(paths)} files: "
                "write patterns that match some, relative to data.root, or "
                "--data.holdout= to hold out a share"
            )
    else:
        held = _hashed_share(paths, holdout_fraction)
    train = FileList.from_paths(files.base, (p for p in paths if p not in held))
    return train, FileList.from_paths(files.base, held)


def _hashed_share(paths: list[str], share: float) -> set[str]:
    if len(paths) < 2:
        return set()
    shares = {path: _hash_unit(path) for path in paths}
    held = {path for path in paths if shares[path] < share}
    held.add(min(paths, key=shares.__getitem__))
    held.discard(max(paths, key=shares.__getitem__))
    return held


def _hash_unit(path: str) -> float:
    digest = hashlib.blake2b(os.fsencode(path), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
