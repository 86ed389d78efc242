"""Lists of many video files: where they come from, and which are held out."""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import itertools
import json
import logging
import os
import re
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from taehv.errors import UserError
from taehv.sections import Data
from taehv.urls import fixed_part, is_url, read_bytes, search
from taehv.video import IMAGE_SUFFIXES

log = logging.getLogger("taehv")

VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"),
)
HASHED_AT_A_TIME = 200_000


class FileList:
    """Paths of many videos as one block of bytes, cheap to share between processes.

    `base` is joined in front of relative paths. After `save` the block is memory
    mapped, and a pickled copy carries the names of the files instead of the paths.
    A part of a list shares its block. A list is also the `Mixture` of itself alone.
    """

    weights = (1.0,)

    def __init__(
        self,
        base: str,
        blob: np.ndarray,
        ends: np.ndarray,
        chosen: np.ndarray | None = None,
        hashes: np.ndarray | None = None,
    ) -> None:
        self.base = base
        self._blob = blob
        self._ends = ends
        self._chosen = chosen
        self._hashes = hashes

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
        """Files that `data.root` and `data.annotations` name; see Source.files."""
        return Source.of(data.root, data.annotations).files(data.images)

    @classmethod
    def load(cls, base: str, *arrays: str) -> FileList:
        """Memory map what `save` wrote."""
        return cls(base, *(np.load(name, mmap_mode="r") for name in arrays))

    def save(self, folder: str | Path) -> FileList:
        """Write below `folder` what is not yet in files, and memory map it.

        Files are named by content. Several processes may save the same list at the
        same time.
        """
        if not len(self):
            return self
        arrays = [self._blob, self._ends]
        arrays += [] if self._chosen is None else [self._chosen]
        saved = [_mapped(array, str(folder)) for array in arrays]
        return FileList(self.base, *saved)

    def only(self, mask: np.ndarray) -> FileList:
        """Those files for which a mask of bool is set, in the same order."""
        chosen = np.flatnonzero(mask) if self._chosen is None else self._chosen[mask]
        chosen = chosen.astype(np.uint32)
        return FileList(self.base, self._blob, self._ends, chosen, self._hashes)

    def __len__(self) -> int:
        return len(self._ends) - 1 if self._chosen is None else len(self._chosen)

    def __getitem__(self, i: int) -> str:
        """Full path of file i, or its URL."""
        path = self.relative(i)
        return path if is_url(path) else os.path.join(self.base, path)

    def relative(self, i: int) -> str:
        """Path of file i relative to the base; absolute if it lies elsewhere."""
        i = i if self._chosen is None else int(self._chosen[i])
        return os.fsdecode(self._blob[self._ends[i] : self._ends[i + 1]].tobytes())

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All paths end to end, and where each ends after the one before it."""
        return self._blob, self._ends

    @property
    def parts(self) -> tuple[FileList, ...]:
        """The sources, as of a Mixture."""
        return (self,)

    @property
    def hashes(self) -> np.ndarray:
        """A hash of each relative path, uint64."""
        if self._hashes is None:
            count = len(self._ends) - 1
            whole = FileList(self.base, self._blob, self._ends)
            hashes = (path_hash(whole.relative(i)) for i in range(count))
            self._hashes = np.fromiter(hashes, np.uint64, count)
        return self._hashes if self._chosen is None else self._hashes[self._chosen]

    def full_hashes(self, mask: np.ndarray) -> np.ndarray:
        """A hash of the full path or URL of those for which a mask is set, uint64."""
        hashes = np.array(self.hashes)
        for i in np.flatnonzero(mask & ~self.lies_elsewhere):
            hashes[i] = path_hash(self[i])
        return hashes[mask]

    @property
    def lies_elsewhere(self) -> np.ndarray:
        """A mask of bool: files outside the base, named by full paths or URLs."""
        is_full = self._blob[self._ends[:-1]] == ord("/")
        marks = (match.start() for match in re.finditer(b"://", self._blob))
        places = np.fromiter(marks, np.int64)
        is_full[np.searchsorted(self._ends, places, "right") - 1] = True
        return is_full if self._chosen is None else is_full[self._chosen]

    @property
    def fingerprint(self) -> str:
        """Hash of the relative paths, to compare on resume and between ranks."""
        lengths = np.diff(self._ends)
        kept = np.ones(len(lengths), bool)
        if self._chosen is not None:
            kept[:] = False
            kept[self._chosen] = True
        ends = np.concatenate([[0], np.cumsum(lengths[kept], dtype=np.int64)])
        content = hashlib.sha256(ends.astype(np.int64).tobytes())
        for i in range(0, len(lengths), HASHED_AT_A_TIME):
            part = slice(i, i + HASHED_AT_A_TIME)
            j = min(i + HASHED_AT_A_TIME, len(lengths))
            is_kept = np.repeat(kept[part], lengths[part])
            content.update(self._blob[self._ends[i] : self._ends[j]][is_kept].tobytes())
        return content.hexdigest()

    def __reduce__(self) -> tuple[Callable[..., FileList], tuple[Any, ...]]:
        arrays = [self._blob, self._ends]
        arrays += [] if self._chosen is None else [self._chosen]
        if all(isinstance(array, np.memmap) for array in arrays):
            return FileList.load, (self.base, *(str(a.filename) for a in arrays))
        return FileList, (self.base, *arrays)


class Mixture:
    """Lists of several sources, each with its share of the samples.

    File i of the whole counts through the sources in turn.
    """

    def __init__(self, parts: Sequence[FileList], weights: Sequence[float]) -> None:
        self.parts = tuple(parts)
        self.weights = tuple(weights)
        self._starts = [0, *itertools.accumulate(map(len, parts))]

    def save(self, folder: str | Path) -> Mixture:
        """The same, memory mapped; see FileList."""
        return Mixture([part.save(folder) for part in self.parts], self.weights)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: int) -> str:
        """Full path of file i."""
        part = bisect_right(self._starts, i) - 1
        return self.parts[part][i - self._starts[part]]

    @property
    def base(self) -> str:
        """Where the sources are, to be read by people."""
        return ", ".join(part.base for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """Hash of the sources and their shares."""
        told = [[part.fingerprint for part in self.parts], list(self.weights)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _mapped(array: np.ndarray, folder: str) -> np.ndarray:
    if isinstance(array, np.memmap):
        return array
    name = hashlib.sha256(array.tobytes()).hexdigest()[:16]
    path = os.path.join(folder, f"{name}-{array.dtype.name}.npy")
    unfinished = f"{path}.{os.getpid()}.part"
    os.makedirs(folder, exist_ok=True)
    with open(unfinished, "wb") as file:
        np.save(file, array)
    os.replace(unfinished, path)
    return np.load(path, mmap_mode="r")


@dataclass(frozen=True)
class Source:
    """Where videos are listed: a folder or glob, or a list and what it is relative to.

    Paths are absolute, or URLs that fsspec knows; either may be empty, but not both.
    """

    root: str
    annotations: str

    @classmethod
    def of(cls, root: str, annotations: str) -> Source:
        """From settings. Raises UserError where both are empty."""
        if not root and not annotations:
            raise UserError("data.root is empty: set it to the folder of the videos")
        return cls(_absolute(root), _absolute(annotations))

    @property
    def base(self) -> str:
        """What the paths of its files are relative to."""
        if not self.root:
            return os.path.dirname(self.annotations)
        if is_url(self.root):
            return fixed_part(self.root)
        parts = Path(self.root).parts
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), parts)
        return self.root if os.path.isdir(self.root) else os.path.join(*fixed)

    def files(self, images: bool) -> FileList:
        """The files, and still images too if asked for.

        Links to folders are not followed. Listed files are not looked for here: a
        missing one is found when it is decoded. Raises UserError for a missing or
        empty folder and for a list or annotation that cannot be read.
        """
        base = self.base
        found = self._found(VIDEO_SUFFIXES + (IMAGE_SUFFIXES if images else ()))
        files = FileList.from_paths(base, (relative_path(path, base) for path in found))
        if not len(files):
            place = self.annotations or f"data.root = {self.root}"
            raise UserError(f"{place} holds no videos: add some or correct the path")
        return files

    def _found(self, suffixes: tuple[str, ...]) -> Iterable[str]:
        is_folder = os.path.isdir(self.root)
        is_pattern = glob.has_magic(self.root)
        if self.root and not (is_folder or is_pattern or is_url(self.root)):
            raise UserError(f"data.root = {self.root} is no folder: correct the path")
        if self.annotations:
            return _listed(self.annotations)
        if is_url(self.root):
            return search(self.root, suffixes)
        roots = [self.root] if is_folder else glob.iglob(self.root, recursive=True)
        return (path for root in roots for path in _walk(root, suffixes))


def sources_of(data: Data) -> list[Source]:
    """The sources that the settings name: `data.sources`, or the one of `data.root`."""
    if not data.sources:
        return [Source.of(data.root, data.annotations)]
    return [
        Source.of("", place) if _is_list(place) else Source.of(place, "")
        for place in data.sources
    ]


def _is_list(place: str) -> bool:
    return os.path.splitext(place)[1].lower() in READERS


def _absolute(path: str) -> str:
    if is_url(path):
        return path.rstrip("/")
    return os.path.abspath(os.path.expanduser(path)) if path else ""


def relative_path(path: str, base: str) -> str:
    """Relative to base where it lies below it, so that machines agree."""
    if is_url(path):
        return path.removeprefix(os.path.join(base, ""))
    if is_url(base):
        return os.path.normpath(os.path.expanduser(path))
    full = os.path.normpath(os.path.join(base, os.path.expanduser(path)))
    inside = full.startswith(os.path.join(base, ""))
    return os.path.relpath(full, base) if inside else full


def _unreadable(error: OSError) -> None:
    log.warning(f"left out a folder that cannot be read: {error}")


def _walk(root: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    if not os.path.isdir(root) and root.lower().endswith(suffixes):
        yield root
    for folder, _, names in os.walk(root, onerror=_unreadable):
        for name in names:
            if os.path.splitext(name)[1].lower() in suffixes:
                yield os.path.join(folder, name)


def _listed(path: str) -> list[str]:
    try:
        if not is_url(path) and stat.S_ISFIFO(os.stat(path).st_mode):
            raise OSError("a pipe is read only once")
        content = read_bytes(path) if is_url(path) else Path(path).read_bytes()
        text = content.decode("utf-8-sig")  # Windows marks the order of bytes
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable_list(path, error) from error
    suffix = os.path.splitext(path)[1].lower()
    return READERS.get(suffix, _from_text)(path, text)


def unreadable_list(path: str, error: Exception) -> UserError:
    """What is told of a list that cannot be read."""
    return UserError(
        f"data.annotations = {path} cannot be read ({error}): name a .json, .jsonl "
        "or .csv annotation or a .txt list of paths"
    )


def _from_text(path: str, text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _from_json(path: str, text: str) -> list[str]:
    annotation = _parsed(path, text)
    entries = annotation.get("list") if isinstance(annotation, dict) else None
    if not isinstance(entries, list):
        raise UserError(f'{path} must be {{"list": [{{"path": ...}}, ...]}}')
    return [_path_of(entry, i, path) for i, entry in enumerate(entries)]


def _from_jsonl(path: str, text: str) -> list[str]:
    lines = enumerate(text.splitlines(), 1)
    entries = (_parsed(path, line, n) for n, line in lines if line.strip())
    return [_path_of(entry, i, path) for i, entry in enumerate(entries)]


def _from_csv(path: str, text: str) -> list[str]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    if not {"path", "full_path"} & set(rows.fieldnames or ()):
        raise UserError(
            f"{path} has no column named path or full_path: name the columns in its "
            "first line"
        )
    return [_path_of(row, i, path) for i, row in enumerate(rows)]


READERS = {
    ".txt": _from_text,
    ".json": _from_json,
    ".jsonl": _from_jsonl,
    ".csv": _from_csv,
}
"""How lists are read, by their suffix."""


def _parsed(path: str, text: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(
            f"{path} is no valid JSON ({error.msg} in line {line}, column "
            f"{error.colno}): write it again"
        ) from error


def _path_of(entry: Any, i: int, annotation: str) -> str:
    fields = entry if isinstance(entry, dict) else {}
    path = fields.get("full_path") or fields.get("path")
    if not isinstance(path, str):
        raise UserError(
            f'entry {i} of the list in {annotation} has no path: give it a "path" '
            'relative to data.root or a "full_path"'
        )
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:  # JSON can spell half of a character
        raise UserError(
            f"entry {i} of the list in {annotation} is no name of a file ({error}): "
            "write its path in UTF-8"
        ) from None
    return path


Files = FileList | Mixture


def split_all(lists: Sequence[FileList], data: Data) -> tuple[Files, Files]:
    """Training and validation files of several sources by the settings; see split."""
    if len(lists) == 1:
        return split(lists[0], data.holdout, data.holdout_fraction)
    masks = [_held(files, data.holdout, data.holdout_fraction) for files in lists]
    _check_holdout(np.concatenate(masks), data.holdout)
    for files, mask in zip(lists, masks, strict=True):
        if mask.all():
            raise UserError(
                f"data.holdout = {data.holdout} leaves no file of {files.base} to "
                "train on: take the source out of data.sources or hold out less"
            )
    pairs = list(zip(lists, masks, strict=True))
    _check_overlap(pairs)
    weights = data.weights or [1.0] * len(lists)
    train = Mixture([files.only(~mask) for files, mask in pairs], weights)
    return train, Mixture([files.only(mask) for files, mask in pairs], weights)


def _check_overlap(pairs: Sequence[tuple[FileList, np.ndarray]]) -> None:
    """Refuse a file that one source holds out and another trains on.

    A path is hashed relative to its source, and so differently in a folder within and
    in a list that names it in full.
    """
    held, kept = [], []
    for files, mask in pairs:
        which = files.lies_elsewhere
        others = (other for other, _ in pairs if other is not files)
        if not which.all() and any(_may_share(files, other) for other in others):
            which = np.ones(len(files), bool)
        held.append(files.full_hashes(which & mask))
        kept.append(files.full_hashes(which & ~mask))
    if np.isin(np.concatenate(kept), np.concatenate(held)).any():
        raise UserError(
            "data.sources overlap: a file would be held out of one and trained on from "
            "another; name each file in one source"
        )


def _may_share(files: FileList, other: FileList) -> bool:
    """Whether a file below the base of one may be in the other too."""
    base, place = (os.path.join(f.base, "") for f in (files, other))
    if base.startswith(place) or place.startswith(base):
        return True
    paths, _ = other.arrays
    return re.search(re.escape(os.fsencode(base)), paths) is not None


def split(
    files: FileList, holdout: list[str], holdout_fraction: float
) -> tuple[FileList, FileList]:
    """Training and validation files, decided for each path on its own.

    `holdout` are fnmatch patterns on the relative path; without any,
    `holdout_fraction` of the files, by a hash of the relative path. Of two or more
    files each side gets at least one; a single file is for training. Raises UserError
    when the patterns match no file or every file.
    """
    held = _held(files, holdout, holdout_fraction)
    _check_holdout(held, holdout)
    return files.only(~held), files.only(held)


def _check_holdout(held: np.ndarray, holdout: list[str]) -> None:
    if holdout and (held.all() or not held.any()):
        raise UserError(
            f"data.holdout = {holdout} matches {held.sum()} of {len(held)} files: "
            "write patterns that match some, relative to data.root, or "
            "--data.holdout= to hold out a share"
        )


def _held(files: FileList, holdout: list[str], share: float) -> np.ndarray:
    """A mask of bool: the files that are held out."""
    if holdout:
        paths = map(files.relative, range(len(files)))
        matches = (any(fnmatchcase(path, p) for p in holdout) for path in paths)
        return np.fromiter(matches, bool, len(files))
    if len(files) < 2:
        return np.zeros(len(files), bool)
    units = files.hashes / 2.0**64
    held = units < share
    held[units.argmin()], held[units.argmax()] = True, False
    return held


def path_hash(path: str) -> int:
    """64 bits that stand for a relative path."""
    digest = hashlib.blake2b(os.fsencode(path), digest_size=8).digest()
    return int.from_bytes(digest, "little")
