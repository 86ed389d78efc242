"""What is known of every file: each is probed once, and the answers stay on disk.

An index is a folder of memory-mapped arrays, so that millions of files open at once and
cost the processes that share them next to nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from taehv.errors import UserError
from taehv.files import (
    FileList,
    Files,
    Source,
    sources_of,
    split_all,
    unreadable_list,
)
from taehv.pools import CRASHES, alone, cores, shared
from taehv.sections import Config, Data
from taehv.urls import is_url, stamp
from taehv.video import DISK_ERRORS, VideoError, is_image, probe
from taehv.writing import write_text

log = logging.getLogger("taehv")

FORMAT = 1
ROW = np.dtype(
    [
        ("hash", "<u8"),
        ("size", "<i8"),
        ("modified", "<i8"),
        ("duration", "<f4"),
        ("rate", "<f4"),
        ("keyframe_interval", "<f4"),
        ("frames", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("rotation", "<u2"),
        ("reason", "<u2"),
        ("codec", "S12"),
        ("status", "u1"),
    ]
)
"""Of one file: hash of its relative path, size in bytes, time of modification in
nanoseconds, seconds, frames a second, frames from one keyframe to the next, frames (0:
unknown, as with the three before it), size as displayed, rotation in degrees, number of
the reason why it is bad, codec, status."""
MOST_FRAMES = 2**32 - 1
UNKNOWN, GOOD, BAD = 0, 1, 2
ARRAYS = ("paths.npy", "ends.npy", "table.npy")
CHUNK = 64
SERIAL = 128
"""Up to so many files are probed in this process: a pool would start too slowly."""
REASONS = 1000
"""So many are told apart, the last of which stands for all others."""
OTHER = "another reason"
KEPT = 4
"""Generations of arrays that stay: runs open those that they began with by name, each
time that they start workers anew."""
NAMED = 20


@dataclass(frozen=True)
class Index:
    """The files of one source and what is known of them."""

    files: FileList
    table: np.ndarray
    reasons: list[str]

    @property
    def bad(self) -> np.ndarray:
        """Numbers of the files from which no clip can come."""
        return np.flatnonzero(self.table["status"] == BAD)

    def reason(self, i: int) -> str:
        """Why file i is bad."""
        return self.reasons[self.table["reason"][i]]

    def select(self, data: Data) -> FileList:
        """The good files that the filters of the settings let through.

        What is unknown of a file lets it through. Raises UserError if none is left.
        """
        table = self.table
        is_good = table["status"] == GOOD
        passes = is_good & passing(table, data)
        self._tell(is_good, passes)
        if not passes.any():
            raise UserError(
                f"{self.files.base} has no usable video: {len(table) - is_good.sum()} "
                f"are bad{self._causes()}, {is_good.sum() - passes.sum()} do not "
                "pass data.min_size, min_frames, min_rate or aspect: lower these, or "
                "give other videos"
            )
        return self.files if passes.all() else self.files.only(passes)

    def _tell(self, is_good: np.ndarray, passes: np.ndarray) -> None:
        bad, filtered = int((~is_good).sum()), int((is_good & ~passes).sum())
        if bad:
            log.warning(f"left out {bad} bad files of {len(passes)}{self._causes()}")
        if filtered:
            log.info(f"left out {filtered} of {len(passes)} files by the filters")

    def _causes(self) -> str:
        counts = Counter(self.table["reason"][self.bad].tolist()).most_common(3)
        told = "; ".join(f"{n} x {self.reasons[reason]}" for reason, n in counts)
        return f" ({told})" if told else ""


def passing(table: np.ndarray, data: Data) -> np.ndarray:
    """A mask of bool: the rows that the filters of the settings let through."""
    width, height = table["width"], table["height"]
    is_video = table["duration"] >= 0
    passes = np.minimum(width, height) >= data.min_size
    for key, low in (("frames", data.min_frames), ("rate", data.min_rate)):
        passes &= (table[key] >= low) | (table[key] == 0) | ~is_video
    if data.aspect:
        low, high = data.aspect
        # Written as products: a height of 0 never passes.
        passes &= (low * height <= width) & (width <= high * height)
    return passes


def build_file_lists(data: Data) -> tuple[Files, Files]:
    """Training and held-out files by the settings.

    With `data.index` they are those of the index, which is made if it is not there.
    Raises UserError where there are none.
    """
    return split_all([list_files(data, source) for source in sources_of(data)], data)


def list_files(data: Data, source: Source) -> FileList:
    """Files of a source, or the selected ones of its index; see build_file_lists."""
    if not data.index:
        return source.files(data.images)
    return open_index(data, source).select(data)


def open_index(data: Data, source: Source) -> Index:
    """The index of a source, made first if it is not there or its list has changed.

    Of several processes that come together one makes it, and the others wait.
    """
    folder = _folder(data, source)
    found = _load(folder, _identity(source, data.images))
    if found is None:
        with _locked(folder):
            found = _load(folder, _identity(source, data.images))
            if found is None:
                log.info(f"probing the videos of {source.base} for {folder}")
                found = _make(folder, source, data)
    return found


def update_index(data: Data, source: Source) -> Index:
    """Look for new, changed and vanished files, and probe those that need it."""
    folder = _folder(data, source)
    with _locked(folder):
        return _make(folder, source, data)


def _folder(data: Data, source: Source) -> Path:
    place = hashlib.sha256(f"{source.root}\0{source.annotations}".encode())
    return Path(data.index).expanduser() / place.hexdigest()[:16]


def _identity(source: Source, images: bool) -> dict[str, Any]:
    """What an index was made of; a list that was written since makes it another."""
    try:
        listed = _stamp(source.annotations) if source.annotations else None
    except OSError as error:
        raise unreadable_list(source.annotations, error) from error
    return {
        "format": FORMAT,
        **asdict(source),
        "images": images,
        "listed": list(listed) if listed else None,
    }


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise _unwritable(folder, error) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # else processes would write over one another
            raise UserError(
                f"data.index: {folder} cannot be locked ({error.strerror}): name a "
                "folder of another file system"
            ) from None
        try:
            yield
        except OSError as error:
            if error.errno not in (*DISK_ERRORS, errno.EPERM):
                raise
            raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"data.index: cannot write to {error.filename or folder} ({error.strerror}): "
        "mend that, or name another folder"
    )


def _load(folder: Path, identity: dict[str, Any]) -> Index | None:
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    if {key: about[key] for key in identity if key in about} != identity:
        return None
    return _mapped(folder / about["arrays"], about["base"], about["reasons"])


def _mapped(place: Path, base: str, reasons: list[str], mode: str = "r") -> Index:
    paths, ends, table = (
        np.load(place / name, mmap_mode=mode if name == "table.npy" else "r")
        for name in ARRAYS
    )
    files = FileList(base, paths, ends, hashes=table["hash"])
    return Index(files, table, reasons)


# --- making ------------------------------------------------------------------------


def _make(folder: Path, source: Source, data: Data) -> Index:
    """List, take over what is known, probe the rest, and put it in place.

    What is killed half-way leaves `unfinished`, from which the next one goes on.
    """
    identity = _identity(source, data.images)
    files = source.files(data.images)
    known = _known(folder, source.base)
    unfinished = folder / "unfinished"
    reasons = _start(unfinished, files, known)
    index = _mapped(unfinished, source.base, reasons, "r+")
    _probe_all(index, unfinished, data.workers)
    index.table.flush()
    return _finish(folder, index, identity)


def _known(folder: Path, base: str) -> list[Index]:
    """Earlier answers, the more recent ones last."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        if about["format"] == FORMAT:
            found.append(_mapped(folder / about["arrays"], base, about["reasons"]))
    with contextlib.suppress(FileNotFoundError):
        reasons = json.loads((folder / "unfinished" / "reasons.json").read_text())
        found.append(_mapped(folder / "unfinished", base, reasons))
    return found


def _start(unfinished: Path, files: FileList, known: list[Index]) -> list[str]:
    """Write the arrays of an index whose rows are what earlier ones knew."""
    table = np.zeros(len(files), ROW)
    table["hash"] = files.hashes
    reasons: list[str] = []
    for index in known:
        old = np.array(index.table)
        order = old["hash"].argsort()
        place = np.searchsorted(old["hash"], table["hash"], sorter=order)
        place = order[place.clip(max=len(old) - 1)]
        is_known = old["hash"][place] == table["hash"]
        is_known &= old["status"][place] != UNKNOWN
        rows = old[place[is_known]]
        rows["reason"] += len(reasons)
        table[is_known] = rows
        reasons += index.reasons
    reasons = _only_used(table, reasons)
    fresh = unfinished.with_name(f"unfinished-{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    for name, array in zip(ARRAYS, (*files.arrays, table), strict=True):
        np.save(fresh / name, array)
    (fresh / "reasons.json").write_text(json.dumps(reasons))
    shutil.rmtree(unfinished, ignore_errors=True)
    fresh.rename(unfinished)
    return reasons


def _only_used(table: np.ndarray, reasons: list[str]) -> list[str]:
    """The reasons of rows, which get their new numbers."""
    is_bad = table["status"] == BAD
    used, places = np.unique(table["reason"][is_bad], return_inverse=True)
    kept: list[str] = []
    numbers = [_number_of(reasons[old], kept) for old in used]
    table["reason"] = 0
    table["reason"][is_bad] = np.array(numbers, "<u2")[places]
    return kept


def _probe_all(index: Index, place: Path, workers: int) -> None:
    count = len(index.files)
    starts = range(0, count, CHUNK)
    probe_chunk = functools.partial(_probe_chunk, str(place), index.files.base)
    processes = min(cores() if workers < 0 else workers, count // SERIAL)
    answers: Iterable[tuple[int, list[tuple[np.void, str]] | None]]
    answers = ((start, probe_chunk(start)) for start in starts)
    if processes:
        answers = shared(probe_chunk, starts, processes, "taehv.index")
    with tqdm(total=count, unit="file", disable=None) as bar:
        for start, chunk in answers:
            if chunk is None:
                chunk = _probe_alone(index, place, start)
            for i, (row, reason) in enumerate(chunk, start):
                _note(index, place, i, row, reason)
            bar.update(len(chunk))


def _probe_alone(index: Index, place: Path, start: int) -> list[tuple[np.void, str]]:
    """A chunk, of which a file ends the process that reads it."""
    probe_chunk = functools.partial(_probe_chunk, str(place), index.files.base, files=1)
    found = []
    for i in range(start, min(start + CHUNK, len(index.files))):
        rows = alone(probe_chunk, i)
        if rows is None:
            row = index.table[i].copy()
            row["status"] = BAD
            row["size"], row["modified"] = _stamp(index.files[i])
            rows = [(row, CRASHES)]
        found += rows
    return found


def _note(index: Index, place: Path, i: int, row: np.void, reason: str) -> None:
    known, number = len(index.reasons), 0
    if row["status"] == BAD:
        number = _number_of(reason, index.reasons)
        if len(index.reasons) > known:  # written down before a row refers to it
            write_text(place / "reasons.json", json.dumps(index.reasons))
    index.table[i] = row
    index.table["reason"][i] = number


def _number_of(reason: str, reasons: list[str]) -> int:
    """Which reason it is; a new one is appended, or OTHER in the last place."""
    if reason not in reasons and len(reasons) < REASONS:
        reasons.append(reason if len(reasons) < REASONS - 1 else OTHER)
    return reasons.index(reason) if reason in reasons else REASONS - 1


def _probe_chunk(
    place: str, base: str, start: int, files: int | None = None
) -> list[tuple[np.void, str]]:
    """Rows and reasons of the files from `start` on."""
    folder = Path(place)
    reasons = json.loads((folder / "reasons.json").read_text())
    index = _mapped(folder, base, reasons)
    stop = min(start + (files or CHUNK), len(index.files))
    return [_probe_file(index, i) for i in range(start, stop)]


def _probe_file(index: Index, i: int) -> tuple[np.void, str]:
    path, row = index.files[i], index.table[i].copy()
    try:
        size, modified = _stamp(path)
    except OSError as error:
        row["status"], row["size"] = BAD, 0
        return row, _without_name(error.strerror or "cannot be read", path)
    same = row["size"] == size and row["modified"] == modified
    if row["status"] != UNKNOWN and same:
        return row, index.reason(i) if row["status"] == BAD else ""
    row["size"], row["modified"] = size, modified
    reason = _describe(path, row)
    row["status"] = BAD if reason else GOOD
    return row, reason


def _stamp(path: str) -> tuple[int, int]:
    """Size in bytes of a file or URL, and a number that changes when it is written."""
    if is_url(path):
        return stamp(path)
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _describe(path: str, row: np.void) -> str:
    """Fill a row from the file; what is wrong with the file, or nothing."""
    try:
        info = probe(path)
    except VideoError as error:
        return _without_name(str(error).removeprefix(path).lstrip(": "), path)
    rate = float(info.rate or 0)
    duration = info.duration or 0
    row["duration"] = -1 if is_image(path) else duration
    frames = info.frames or round(duration * rate)
    row["rate"], row["frames"] = rate, min(max(frames, 0), MOST_FRAMES)
    row["width"], row["height"] = min(info.width, 65535), min(info.height, 65535)
    row["rotation"], row["codec"] = info.rotation, info.codec.encode()
    row["keyframe_interval"] = info.keyframe_interval
    return ""


def _without_name(reason: str, path: str) -> str:
    """A reason that is the same for other files, by URL or by path."""
    for name in (path, path.partition("://")[2]) if is_url(path) else ():
        reason = reason.replace(name, "...")
    return reason


def _finish(folder: Path, index: Index, identity: dict[str, Any]) -> Index:
    """Put the new arrays in place; runs that have the last ones open go on."""
    numbers = [int(path.name.split("-")[1]) for path in folder.glob("arrays-*")]
    name = f"arrays-{max(numbers, default=0) + 1}"
    (folder / "unfinished").rename(folder / name)
    about = identity | {"base": index.files.base, "reasons": index.reasons}
    (folder / "about.part").write_text(json.dumps(about | {"arrays": name}, indent=1))
    os.replace(folder / "about.part", folder / "about.json")
    for number in sorted(numbers)[: 1 - KEPT]:
        shutil.rmtree(folder / f"arrays-{number}", ignore_errors=True)
    made = _mapped(folder / name, index.files.base, index.reasons)
    lines = [f"{made.files[i]}: {made.reason(i)}\n" for i in made.bad]
    (folder / "bad_files.txt").write_text("".join(lines), errors="surrogateescape")
    return made


# --- command line ------------------------------------------------------------------


def index_command(config: Config) -> None:
    """Make or renew the index of every source, and tell what is in it."""
    data = config.data
    if not data.index:
        raise UserError("data.index is empty: name the folder to keep the index in")
    for source in sources_of(data):
        _report(_folder(data, source), source, update_index(data, source), data)


def _report(folder: Path, source: Source, index: Index, data: Data) -> None:
    good = index.table["status"] == GOOD
    print(f"{source.annotations or source.root}: {good.sum()} good files")
    for key, unit in (("duration", "s"), ("keyframe_interval", "frames")):
        values = index.table[key][good & (index.table[key] > 0)]
        if len(values):
            print(f"  median {key.replace('_', ' ')}: {np.median(values):.4g} {unit}")
    codecs = Counter(index.table["codec"][good].tolist()).most_common()
    print("  codecs: " + ", ".join(f"{codec.decode()} {n}" for codec, n in codecs))
    passed = good & passing(index.table, data)
    if passed.sum() < good.sum():
        print(f"  {passed.sum()} pass the filters")
    if len(index.bad):
        print(f"  {len(index.bad)} bad files, listed in {folder / 'bad_files.txt'}:")
        for i in index.bad[:NAMED]:
            print(f"    {index.files[i]}: {index.reason(i)}")
