"""The latent cache: windows of frames on disk beside a teacher's latents of them.

Windows are larger and longer than clips, which CacheDataset cuts from them. The format
is described in docs/cache.md; python -m taehv.precompute writes it, and ShardWriter and
write_about do so for latents that come from elsewhere.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import operator
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from taehv.augment import color_transform
from taehv.clips import Batch, Clip, collate
from taehv.errors import UserError
from taehv.files import FileList
from taehv.loader import worker_count
from taehv.lock import hold
from taehv.sampler import CACHED_CROP, Buckets, draw, permute
from taehv.sections import Data, Shape
from taehv.variants import VARIANTS, Variant

log = logging.getLogger("taehv")

FORMAT_VERSION = 1
Part = Literal["train", "validation"]
PARTS: tuple[Part, ...] = ("train", "validation")
FIRST_SHARE = 0.25
"""Least share of the training clips that begin where their window does."""
JPEG_QUALITY = 95
# Enough for the frames of one window, which its crops share.
DECODED_FRAMES = 64

WINDOW = np.dtype(
    [
        ("shard", "i8"),
        ("number", "i8"),
        ("source", "i8"),
        ("frames", "i8"),
        ("height", "i8"),
        ("width", "i8"),
        ("frames_offset", "i8"),
        ("latents_offset", "i8"),
        ("jpegs", "i8"),
        ("teacher_psnr", "f8"),
    ]
)
"""A window in memory; `jpegs` is the place of its first frame's end, or -1 if raw."""


UNREADABLE = (OSError, ValueError, LookupError, TypeError, RecursionError)
"""What reading a JSON file raises that is damaged or says something else."""
NAMED = 5
"""So many bad shards are named."""


class ShardError(Exception):
    """Why a shard cannot be used."""


class UnreadError(ShardError):
    """The disk does not give a shard, which may be whole."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot be read: {error.strerror}")


# --- writing -----------------------------------------------------------------------


def describe(
    variant: Variant,
    teacher: dict[str, str],
    shards: dict[Part, int],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """What cache.json says of a cache.

    Args:
        variant: any of those that have this latent space.
        teacher: "kind" and "fingerprint" of what made the latents.
        shards: how many shards each part has.
        settings: whatever else decides what the windows hold.
    """
    return {
        "format": FORMAT_VERSION,
        "latents": _latent_rules(variant),
        "teacher": teacher,
        "shards": shards,
        "settings": settings,
    }


def _latent_rules(variant: Variant) -> dict[str, Any]:
    return {
        "latent_space": variant.latent_space,
        "latent_channels": variant.latent_channels,
        "time_factor": variant.time_factor,
        "space_factor": variant.space_factor,
        "trim": variant.trim,
    }


def write_about(folder: str | Path, about: dict[str, Any]) -> None:
    """Write a cache's cache.json, which `describe` makes."""
    _write_json(Path(folder) / "cache.json", about, indent=2)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other commands from writing to a cache meanwhile.

    The kernel gives the lock back however the process ends.

    Raises:
        UserError: another command is writing to it.
        OSError: the folder cannot be written to.
    """
    with (folder / "lock").open("ab") as file:
        try:
            is_mine = hold(file)
        except OSError as error:  # of a file system without locks
            is_mine = True
            log.info(
                f"{folder} cannot be locked ({error.strerror}): let no other command "
                "write to it meanwhile"
            )
        if not is_mine:
            raise UserError(
                f"data.cache = {folder} is in use by another command that writes to "
                "it: wait until that has ended, or name another folder"
            )
        yield


def shard_path(folder: str | Path, part: Part, number: int, suffix: str) -> Path:
    """A file of a shard; suffix is "frames", "latents" or "json"."""
    return Path(folder) / part / f"shard-{number:06}.{suffix}"


@dataclass(frozen=True)
class Window:
    """One window as it is to be stored.

    `frames_THWC` is uint8 RGB; `jpegs`, if any, has each frame as a JPEG file that
    decodes to it. `latents_TCHW` are the teacher's normalised latents of exactly these
    frames, drawn with `seed`; `teacher_psnr` is that of its own decoding, in dB.
    """

    number: int
    source: str
    seed: int
    frames_THWC: np.ndarray
    latents_TCHW: np.ndarray
    jpegs: Sequence[bytes] = ()
    teacher_psnr: float | None = None


class ShardWriter:
    """Writes a shard, which exists once `finish` or the `with` block has ended well."""

    def __init__(self, folder: str | Path, part: Part, number: int) -> None:
        self._paths = {
            suffix: shard_path(folder, part, number, suffix)
            for suffix in ("frames", "latents", "json")
        }
        self._paths["json"].parent.mkdir(parents=True, exist_ok=True)
        # A shard that is written again must not seem complete meanwhile.
        self._paths["json"].unlink(missing_ok=True)
        self._frames = _HashedFile(self._paths["frames"])
        self._latents = _HashedFile(self._paths["latents"])
        self._windows: list[dict[str, Any]] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()

    def add(self, window: Window) -> None:
        """Append a window.

        Raises:
            UserError: its latents are not finite in float16.
        """
        with np.errstate(over="ignore"):
            latents_TCHW = window.latents_TCHW.astype("<f2", copy=False)
        if not np.isfinite(latents_TCHW).all():
            raise UserError(
                f"window {window.number} of {window.source} has latents that are not "
                "finite in float16: see that the teacher normalises them, or leave "
                "that video out of data.annotations"
            )
        entry = {
            "number": window.number,
            "source": window.source,
            "seed": window.seed,
            "frames_THW": list(window.frames_THWC.shape[:3]),
            "latents_TCHW": list(latents_TCHW.shape),
            "frames_offset": self._frames.bytes,
            "latents_offset": self._latents.bytes,
        }
        if window.jpegs:
            entry["jpeg_bytes"] = [len(jpeg) for jpeg in window.jpegs]
        if window.teacher_psnr is not None:
            entry["teacher_psnr"] = window.teacher_psnr
        self._windows.append(entry)
        for content in window.jpegs or [window.frames_THWC]:
            self._frames.write(content)
        self._latents.write(latents_TCHW)

    def finish(self) -> dict[str, list[int]]:
        """Make the shard exist; returns its files' states, for Notes."""
        self.close()
        files = {
            "frames": self._frames.description(),
            "latents": self._latents.description(),
        }
        _write_json(self._paths["json"], {"files": files, "windows": self._windows})
        return {_key(self._paths[s]): _state(self._paths[s]) for s in files}

    def close(self) -> None:
        """Close the files without making the shard exist."""
        self._frames.close()
        self._latents.close()


class _HashedFile:
    """A file that knows its size and SHA-256 as it is written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self.bytes = 0

    def write(self, content: bytes | np.ndarray) -> None:
        view = memoryview(np.ascontiguousarray(content)).cast("B")
        self._file.write(view)
        self._hash.update(view)
        self.bytes += len(view)

    def description(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "sha256": self._hash.hexdigest()}

    def close(self) -> None:
        if not self._file.closed:
            # The name of the JSON file must not reach the disk before these bytes do.
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def to_jpeg(frame_HWC: np.ndarray) -> bytes:
    """A uint8 RGB frame as a JPEG file of quality 95, without chroma subsampling."""
    file = io.BytesIO()
    Image.fromarray(frame_HWC).save(
        file, format="JPEG", quality=JPEG_QUALITY, subsampling=0
    )
    return file.getvalue()


def from_jpeg(jpeg: bytes) -> np.ndarray:
    """The uint8 RGB frame HWC of a JPEG file; OSError if it is damaged."""
    return np.asarray(Image.open(io.BytesIO(jpeg), formats=["JPEG"]).convert("RGB"))


def _write_json(path: Path, content: dict[str, Any], indent: int | None = None) -> None:
    """Write a file so that a crash leaves the old one or the new one."""
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(json.dumps(content, indent=indent, sort_keys=True) + "\n")
    os.replace(unfinished, path)


# --- opening -----------------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """A cache opened for training: what cache.json says, and the sound windows."""

    about: dict[str, Any]
    train: Windows
    validation: Windows

    @classmethod
    def open(cls, folder: str | Path, variant: str) -> Cache:
        """Read the lists of all shards and verify the files that are new or changed.

        A shard that is missing or damaged is named in the log and left out. What was
        verified is noted in verified.jsonl where the folder can be written to, so that
        of several processes one should open the cache first.

        Args:
            folder: the cache; ~ is expanded.
            variant: the student, a key of VARIANTS.

        Raises:
            UserError: no cache, one of other latents, or without a sound window.
        """
        folder = Path(folder).expanduser()
        about = read_about(folder)
        if about is None:
            raise UserError(
                f"data.cache = {folder} holds no cache: write one with "
                "python -m taehv.precompute"
            )
        rules, made = VARIANTS[variant], about["latents"]
        for key, value in _latent_rules(rules).items():
            if made[key] != value:
                fit = [n for n, v in VARIANTS.items() if _latent_rules(v) == made]
                raise UserError(
                    f"data.cache = {folder} has {key} {made[key]}, and {variant} wants "
                    f"{value}: choose a model.variant made for it "
                    f"({', '.join(fit) or 'there is none here'})"
                )
        shards = _sound_shards(folder, about["shards"], rules)
        train, validation = (
            Windows.of_shards(folder, part, rules, shards[part]) for part in PARTS
        )
        if not len(train):
            raise UserError(
                f"data.cache = {folder} has no usable training window: write it anew "
                "with python -m taehv.precompute"
            )
        return cls(about, train, validation)


def read_about(folder: Path) -> dict[str, Any] | None:
    """What cache.json says, or None where there is none.

    Raises:
        UserError: it cannot be read, or is of another version.
    """
    path = folder / "cache.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        counts = [about["shards"][part] for part in PARTS]
        known = about["format"] == FORMAT_VERSION
        known &= isinstance(about["teacher"], dict)
        known &= about["latents"].keys() == _latent_rules(VARIANTS["taehv"]).keys()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): mend that"
        ) from None
    except (*UNREADABLE, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): write a cache anew, in another "
            "folder, with python -m taehv.precompute"
        ) from None
    if not known or not all(type(count) is int and count >= 0 for count in counts):
        raise UserError(
            f"{path} is not of format {FORMAT_VERSION}: write the cache anew"
        )
    return about


def read_shard(folder: str | Path, part: Part, number: int) -> dict[str, Any]:
    """What a shard's JSON file says: "files" and "windows".

    Raises:
        ShardError: it is not there, or its files are not of the sizes that it says.
    """
    path = shard_path(folder, part, number, "json")
    try:
        shard = json.loads(path.read_text(encoding="utf-8"))
        for suffix in ("frames", "latents"):
            said = shard["files"][suffix]
            found = shard_path(folder, part, number, suffix).stat().st_size
            if found != said["bytes"]:
                raise ShardError(f"{suffix} has {found} of {said['bytes']} bytes")
    except FileNotFoundError:
        raise ShardError("missing") from None
    except OSError as error:
        raise UnreadError(error) from None
    except UNREADABLE as error:
        raise ShardError(f"its list cannot be read: {error}") from None
    return shard


@dataclass(frozen=True)
class _Shard:
    """A shard in memory: its windows, its JPEG files' ends, a source a window."""

    table: np.ndarray
    jpeg_ends: np.ndarray
    sources: list[str]
    hashes: str
    states: dict[str, list[int]]


Place = tuple[Part, int]
"""Of a shard: its part and number."""


def _sound_shards(
    folder: Path, counts: dict[Part, int], rules: Variant
) -> dict[Part, list[_Shard]]:
    """Each part's shards, without those that are missing or damaged.

    Raises:
        UserError: the disk does not give one.
    """
    results = _verified_shards(folder, counts, rules)
    sound = [(place, r) for place, r in results.items() if isinstance(r, _Shard)]
    if left_out := sum(counts.values()) - len(sound):
        log.warning(
            f"left out {left_out} of {sum(counts.values())} shards of {folder}: "
            f"{_told_bad(counts, results, left_out)}; run python -m taehv.precompute "
            "again, which writes them anew"
        )
    return {
        part: [shard for place, shard in sound if place[0] == part] for part in PARTS
    }


def remove_damaged(folder: Path, counts: dict[Part, int], rules: Variant) -> set[Place]:
    """Verify what is new or changed, and name and remove the shards that are damaged.

    Returns:
        The sound ones.

    Raises:
        UserError: the disk does not give one, which is left as it is.
    """
    results = _verified_shards(folder, counts, rules)
    damaged = {p: r for p, r in results.items() if isinstance(r, ShardError)}
    for place in damaged:
        for suffix in ("json", "frames", "latents"):
            shard_path(folder, *place, suffix).unlink(missing_ok=True)
    if damaged:
        names = [f"{part}/shard-{n:06} ({r})" for (part, n), r in damaged.items()]
        more = f" and {len(names) - NAMED} more" * (len(names) > NAMED)
        log.warning(f"writing anew what is damaged: {', '.join(names[:NAMED])}{more}")
    return results.keys() - damaged.keys()


def _verified_shards(
    folder: Path, counts: dict[Part, int], rules: Variant
) -> dict[Place, _Shard | ShardError]:
    """The shards that are there, or what is wrong with them; notes what is verified.

    Raises:
        UserError: the disk does not give one, which may be whole.
    """
    notes = Notes(folder)
    # Not by counting up to what cache.json says, which may be any number.
    places = [
        (part, number)
        for part in PARTS
        for number in _numbers_there(folder, part)
        if number < counts[part]
    ]
    results: dict[Place, _Shard | ShardError] = {}
    opened = functools.partial(_opened_shard, folder, rules, notes.known)
    bar = tqdm(
        desc="verifying", total=len(places), unit=" shards", delay=5, disable=None
    )
    # Hashing leaves Python's lock to other threads.
    with bar, ThreadPoolExecutor(worker_count(-1)) as pool:
        for place, shard in zip(places, pool.map(opened, places), strict=True):
            results[place] = shard
            if isinstance(shard, _Shard):
                notes.add(shard.states)
            bar.update()
    for place, error in results.items():
        if isinstance(error, UnreadError):
            raise UserError(
                f"{shard_path(folder, *place, 'json')} or a file beside it {error}: "
                "mend that, or delete that shard and write it anew with "
                "python -m taehv.precompute"
            )
    return results


def _numbers_there(folder: Path, part: Part) -> list[int]:
    """Of the shards whose JSON file exists."""
    found = (folder / part).glob("shard-*.json")
    digits = (path.stem.removeprefix("shard-") for path in found)
    named = [text for text in digits if re.fullmatch(r"\d{6}|[1-9]\d{6,17}", text)]
    return sorted(map(int, named))


def _told_bad(
    counts: dict[Part, int],
    results: dict[Place, _Shard | ShardError],
    left_out: int,
) -> str:
    """The first shards that are missing or damaged, and how many more there are."""
    missing = ShardError("missing")
    bad = (
        f"{part}/shard-{number:06} ({result})"
        for part in PARTS
        for number in range(counts[part])
        if isinstance(result := results.get((part, number), missing), ShardError)
    )
    named = ", ".join(itertools.islice(bad, NAMED))
    return named + f" and {left_out - NAMED} more" * (left_out > NAMED)


def _opened_shard(
    folder: Path, rules: Variant, verified: dict[str, Any], place: Place
) -> _Shard | ShardError:
    """A verified shard, or what is wrong with it."""
    states = {}
    try:
        shard = read_shard(folder, *place)
        for suffix in ("frames", "latents"):
            path = shard_path(folder, *place, suffix)
            key, states[key] = _key(path), _state(path)
            if verified.get(key) == states[key]:
                continue
            if sha256_of(path) != shard["files"][suffix]["sha256"]:
                raise ShardError(f"{suffix} are damaged")
        return _parsed(place[1], shard, rules, states)
    except ShardError as error:
        return error
    except OSError as error:
        return UnreadError(error)
    except (*UNREADABLE, AttributeError, OverflowError) as error:
        return ShardError(f"its list makes no sense: {error!r}")


def _parsed(
    number: int, shard: dict[str, Any], rules: Variant, states: dict[str, list[int]]
) -> _Shard:
    files, windows = shard["files"], shard["windows"]
    ends = [
        window["frames_offset"]
        + np.cumsum(window.get("jpeg_bytes", []), dtype=np.int64)
        for window in windows
    ]
    return _Shard(
        table=np.array(
            [_row(number, window, files, rules) for window in windows], WINDOW
        ),
        jpeg_ends=np.concatenate([np.empty(0, np.int64), *ends]),
        sources=[window["source"] for window in windows],
        hashes=json.dumps([number, files]),
        states=states,
    )


def _row(
    shard: int, window: dict[str, Any], files: dict[str, Any], rules: Variant
) -> tuple[Any, ...]:
    """One window as WINDOW has it, its source and JPEG files still to be looked up."""
    shape, latents = window["frames_THW"], window["latents_TCHW"]
    jpegs, space = window.get("jpeg_bytes", []), rules.space_factor
    offsets = window["frames_offset"], window["latents_offset"]
    sizes, places = [*shape, *latents, *jpegs], [window["number"], *offsets]
    if not all(type(n) is int and n >= 0 for n in (*sizes, *places)) or 0 in sizes:
        raise ShardError("its list has numbers that make no sense")
    frames, height, width = shape
    window["source"].encode()  # which half a surrogate pair has no bytes for
    if len(jpegs) not in (0, frames):
        raise ShardError(f"its list has {len(jpegs)} JPEG files for {frames} frames")
    frames_end = offsets[0] + (sum(jpegs) or math.prod(shape) * 3)
    latents_end = offsets[1] + math.prod(latents) * 2
    if frames_end > files["frames"]["bytes"] or latents_end > files["latents"]["bytes"]:
        raise ShardError("its list reaches past the end of its files")
    expected = [rules.latent_channels, height // space, width // space]
    whole = height % space == width % space == 0
    if not whole or latents != [_exact_latents(rules, frames), *expected]:
        raise ShardError(f"{latents} latents are none of {shape} frames")
    psnr = float(window.get("teacher_psnr", math.nan))
    return (shard, window["number"], 0, *shape, *offsets, len(jpegs), psnr)


@functools.lru_cache
def _exact_latents(rules: Variant, frames: int) -> int:
    """Latents of a window of so many frames; 0 if they do not decode to as many."""
    return rules.latents_of(frames) if rules.is_exact(frames) else 0


def _key(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _state(path: Path) -> list[int]:
    """Size and time: a file whose state has not changed is not read again."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def sha256_of(path: Path) -> str:
    """Of a file's content; raises OSError."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            content.update(block)
    return content.hexdigest()


class Notes:
    """The files whose checksums were right, by their sizes and times then.

    A line for each shard, written when it is known, by any number of processes: what is
    killed need not be verified again. Lines that are torn are left out, and what they
    told is verified anew, as is everything in a folder that cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "verified.jsonl"
        self._keeps = True
        self.known: dict[str, Any] = {}
        try:
            lines = self._path.read_bytes().splitlines()
        except OSError:
            return
        for line in lines:
            with suppress(*UNREADABLE):
                self.known.update(json.loads(line))

    def add(self, states: dict[str, list[int]]) -> None:
        """Note a shard's files, unless they are noted already."""
        new = {k: state for k, state in states.items() if self.known.get(k) != state}
        if not new or not self._keeps:
            return
        line = f"\n{json.dumps(new)}\n"  # apart from one that was torn
        try:
            with self._path.open("ab", buffering=0) as file:
                file.write(line.encode())
        except OSError as error:
            self._keeps = False
            log.info(
                f"{self._path} cannot be kept ({error.strerror}): what it would "
                "tell is verified anew each time"
            )


# --- reading -----------------------------------------------------------------------


class Windows:
    """The windows of one part of a cache, in arrays that processes can share.

    `fingerprint` changes with any window's content, to compare on resume and between
    processes.
    """

    def __init__(
        self,
        folder: Path,
        part: Part,
        variant: Variant,
        fingerprint: str,
        sources: FileList,
        table: np.ndarray,
        jpeg_ends: np.ndarray,
    ) -> None:
        self.folder, self.part, self.variant = folder, part, variant
        self.fingerprint = fingerprint
        self.sources = sources
        self.table = table
        self._jpeg_ends = jpeg_ends
        self._place: str | None = None

    @property
    def largest(self) -> Shape:
        """The frames, height and width of the window with most pixels; there is one."""
        sizes = self.table[["frames", "height", "width"]]
        shapes = [Shape(*map(int, shape)) for shape in np.unique(sizes)]
        return max(shapes, key=lambda shape: shape.pixels)

    @classmethod
    def of_shards(
        cls, folder: Path, part: Part, rules: Variant, shards: list[_Shard]
    ) -> Windows:
        """The windows of all shards, in order."""
        table = np.concatenate([np.empty(0, WINDOW), *(s.table for s in shards)])
        jpegs = table["jpegs"]
        table["jpegs"] = np.where(jpegs, np.cumsum(jpegs) - jpegs, -1)
        ends = np.concatenate([np.empty(0, np.int64), *(s.jpeg_ends for s in shards)])
        sources: dict[str, int] = {}
        named = itertools.chain.from_iterable(shard.sources for shard in shards)
        table["source"] = [sources.setdefault(name, len(sources)) for name in named]
        content = "".join(shard.hashes for shard in shards).encode()
        fingerprint = hashlib.sha256(content).hexdigest()
        files = FileList.in_order("", sources)
        return cls(folder, part, rules, fingerprint, files, table, ends)

    def __len__(self) -> int:
        return len(self.table)

    def mapped(self, place: str) -> Windows:
        """The same with its arrays memory mapped from files written to `place`."""
        np.save(os.path.join(place, "table.npy"), self.table)
        np.save(os.path.join(place, "jpeg_ends.npy"), self._jpeg_ends)
        return _load_windows(place, *self._description(self.sources.save(place)))

    def only(self, chosen: np.ndarray) -> Windows:
        """Those that a boolean array chooses."""
        description = self._description(self.sources)
        return Windows(*description, self.table[chosen], self._jpeg_ends)

    def _description(self, sources: FileList) -> tuple[Any, ...]:
        return self.folder, self.part, self.variant, self.fingerprint, sources

    def __reduce__(self) -> tuple[Callable[..., Windows], tuple[Any, ...]]:
        description = self._description(self.sources)
        if self._place is not None:
            return _load_windows, (self._place, *description)
        return Windows, (*description, self.table, self._jpeg_ends)

    def shape(self, i: int) -> tuple[int, int, int]:
        """Frames, height and width in pixels of window i."""
        row = self.table[i]
        return int(row["frames"]), int(row["height"]), int(row["width"])

    def frames_THWC(
        self, i: int, frames: slice, rows: slice, columns: slice
    ) -> np.ndarray:
        """A part of window i: uint8 RGB; of raw windows no more is read from disk."""
        row, shape = self.table[i], (*self.shape(i), 3)
        path = self._path(row, "frames")
        if row["jpegs"] < 0:
            mapped = np.memmap(path, np.uint8, "r", int(row["frames_offset"]), shape)
            return np.array(mapped[frames, rows, columns])
        ends = self._jpeg_ends[row["jpegs"] : row["jpegs"] + row["frames"]]
        edges = [int(row["frames_offset"]), *map(int, ends)]
        chosen = range(shape[0])[frames]
        pictures = [_picture(path, *edges[t : t + 2], *shape[1:3]) for t in chosen]
        return np.stack([picture[rows, columns] for picture in pictures])

    def latents_TCHW(
        self, i: int, latents: slice, rows: slice, columns: slice
    ) -> np.ndarray:
        """A part of window i's latents, float16; rows and columns count latents."""
        row, (frames, height, width) = self.table[i], self.shape(i)
        space, channels = self.variant.space_factor, self.variant.latent_channels
        shape = (self.variant.latents_of(frames), channels)
        shape += (height // space, width // space)
        path, offset = self._path(row, "latents"), int(row["latents_offset"])
        mapped = np.memmap(path, "<f2", "r", offset, shape)
        return np.array(mapped[latents, :, rows, columns], np.float16)

    def _path(self, row: np.void, suffix: str) -> Path:
        return shard_path(self.folder, self.part, int(row["shard"]), suffix)

    def whole(self, i: int) -> Clip:
        """Window i as a clip, under the number that it was written with."""
        whole = (slice(None), slice(None), slice(None))
        return self.clip(i, int(self.table[i]["number"]), 0, whole, whole)

    def clip(
        self,
        i: int,
        number: int,
        lead: int,
        frames: tuple[slice, slice, slice],
        latents: tuple[slice, slice, slice],
    ) -> Clip:
        """A clip of window i: slices of time, rows and columns of both.

        Raises:
            UserError: the files have changed since the cache was opened, or hold
                pictures of another size than the list says.
        """
        damage = OSError, ValueError, IndexError, Image.DecompressionBombError
        try:
            frames_THWC = self.frames_THWC(i, *frames)
            latents_TCHW = self.latents_TCHW(i, *latents)
        except damage as error:
            shard = shard_path(self.folder, self.part, self.table[i]["shard"], "json")
            raise UserError(
                f"{shard} has changed since the run began, or was written wrong "
                f"({error}): start it again, which leaves out what is damaged, or "
                "write that shard anew"
            ) from None
        source = self.sources.relative(int(self.table[i]["source"]))
        color_34 = color_transform(0, [])
        return Clip(
            frames_THWC,
            color_34,
            number,
            source,
            (),
            latents_TCHW=latents_TCHW,
            lead=lead,
        )


def _load_windows(place: str, *description: Any) -> Windows:
    names = ("table.npy", "jpeg_ends.npy")
    arrays = [np.load(os.path.join(place, name), mmap_mode="r") for name in names]
    windows = Windows(*description, *arrays)
    windows._place = place
    return windows


@functools.lru_cache(DECODED_FRAMES)
def _picture(path: Path, start: int, end: int, height: int, width: int) -> np.ndarray:
    with path.open("rb") as file:
        file.seek(start)
        opened = Image.open(io.BytesIO(file.read(end - start)), formats=["JPEG"])
    if opened.size != (width, height):
        raise ValueError(
            f"a JPEG file of {opened.height} x {opened.width} in a window of "
            f"{height} x {width}"
        )
    return np.asarray(opened.convert("RGB"))


def cached_batches(
    windows: Windows, clips: Sequence[int], batch_size: int
) -> Iterator[Batch]:
    """Whole windows as validation batches, in order; one batch has one size of window.

    Args:
        windows: `Cache.validation`.
        clips: which of them, from 0 to len(windows) - 1.
        batch_size: the most windows in a batch.
    """
    for _, alike in itertools.groupby(clips, windows.shape):
        while chosen := list(itertools.islice(alike, batch_size)):
            psnr_N = torch.from_numpy(windows.table["teacher_psnr"][chosen])
            batch = collate([windows.whole(i) for i in chosen])
            yield replace(batch, teacher_psnr_N=psnr_N)


# --- training ----------------------------------------------------------------------


def check_fit(variant: Variant, data: Data, window: tuple[int, int, int]) -> None:
    """Raise a UserError unless clips of `data` can be cut from such a window.

    Args:
        window: its frames, height and width in pixels.
    """
    frames, height, width = window
    latents = variant.latents_of(frames)
    if not variant.crop_starts(latents, data.frames):
        lengths = range(1, frames + 1)
        legal = [length for length in lengths if variant.crop_starts(latents, length)]
        nearest = min(legal, key=lambda length: abs(length - data.frames))
        raise UserError(
            f"data.frames = {data.frames} cannot be cut from cached windows of "
            f"{frames} frames: take {nearest}, or windows of another cache.frames"
        )
    for key, clip, size in (
        ("height", data.height, height),
        ("width", data.width, width),
    ):
        if clip > size:
            raise UserError(
                f"data.{key} = {clip} cannot be cut from cached windows of {size}: "
                f"take {size} or less"
            )


class CacheDataset(Dataset):
    """Training clips from a cache by global sample number, the same on every machine.

    With K crops a window, sample g is crop g % K of window g // K of a shuffled order.
    A crop is uniform over the places in height and width that latents allow, and over
    those in time, but that at least FIRST_SHARE of the clips begin where their window
    does; in the others the first `data.lead_in` latents are not judged. Windows from
    which some clip cannot be cut are left out. Raises UserError if all are.

    Args:
        data: section [data].
        windows: to cut clips from.
        seed: of every draw.
        buckets: of `data.shapes`; None for clips of the one usual shape.
    """

    def __init__(
        self, data: Data, windows: Windows, seed: int, buckets: Buckets | None = None
    ) -> None:
        self.data = data
        self.buckets = buckets
        shapes = data.shapes if buckets else [data.usual_shape]
        self._shaped = [data.shaped(shape) for shape in shapes]
        self.windows = windows
        for shaped in self._shaped:
            self.windows = _fitting(shaped, self.windows)
        self.seed = seed

    @property
    def clip_bytes(self) -> int:
        """Size of a clip's frames and latents; of buckets, their share of a batch."""
        sizes = [self._clip_bytes(shaped) for shaped in self._shaped]
        if self.buckets is None:
            return sizes[0]
        batches = map(operator.mul, sizes, self.buckets.clips)
        return max(batches) // self.buckets.usual_clips

    def _clip_bytes(self, data: Data) -> int:
        variant = self.windows.variant
        area, space = data.height * data.width, variant.space_factor
        latents = variant.latents_of(data.frames) * variant.latent_channels
        return data.frames * area * 3 + latents * area // space**2 * 2

    def mapped(self, folder: str) -> CacheDataset:
        """The same with a memory-mapped table; see taehv.clips.ClipSource."""
        shared = copy.copy(self)
        shared.windows = self.windows.mapped(folder)
        return shared

    def __getitem__(self, g: int) -> Clip:
        window, n = g // self.data.crops_per_window, len(self.windows)
        epoch, i = divmod(window, n)
        item = permute(i, n, self.seed, epoch)
        data = self._shaped[self.buckets.of_sample(g) if self.buckets else 0]
        shape = self.windows.shape(item)
        crop = place_crop(data, self.windows.variant, shape, self.seed, g)
        return self.windows.clip(item, g, *crop)

    def __getitems__(self, numbers: list[int]) -> list[Clip]:
        """Clips in the order asked for."""
        return [self[g] for g in numbers]


def place_crop(
    data: Data, variant: Variant, window: tuple[int, int, int], seed: int, g: int
) -> tuple[int, tuple[slice, slice, slice], tuple[slice, slice, slice]]:
    """Where sample g lies in a window of frames, height and width; see CacheDataset.

    Returns:
        How many latents are not judged, and slices of the frames and of the latents, in
        time, height and width.
    """
    space = variant.space_factor
    first, later, y, x = draw(seed, g, 0, CACHED_CROP, 4)
    starts = variant.crop_starts(variant.latents_of(window[0]), data.frames)
    start = starts[_start(first, later, len(starts))]
    top = int(y * ((window[1] - data.height) // space + 1))
    left = int(x * ((window[2] - data.width) // space + 1))
    latents = (
        _run(start, variant.latents_of(data.frames)),
        _run(top, data.height // space),
        _run(left, data.width // space),
    )
    frames = (
        _run(variant.first_frame(start), data.frames),
        _run(top * space, data.height),
        _run(left * space, data.width),
    )
    return data.lead_in if start else 0, frames, latents


def _fitting(data: Data, windows: Windows) -> Windows:
    """Those from which clips of `data` can be cut."""
    table, misfit = windows.table, None
    chosen = np.ones(len(table), bool)
    for shape in np.unique(table[["frames", "height", "width"]]):
        try:
            check_fit(windows.variant, data, tuple(map(int, shape)))
        except UserError as error:
            chosen &= table[["frames", "height", "width"]] != shape
            misfit = error
    if misfit is not None:
        if not chosen.any():
            raise misfit
        left_out = len(table) - chosen.sum()
        log.warning(f"{left_out} of {len(table)} cached windows are left out: {misfit}")
    return windows.only(chosen)


def _start(first: float, later: float, starts: int) -> int:
    """Which start: the first with its share, the others alike, from uniform numbers."""
    if first < max(FIRST_SHARE, 1 / starts):
        return 0
    return 1 + int(later * (starts - 1))


def _run(start: int, length: int) -> slice:
    return slice(start, start + length)
