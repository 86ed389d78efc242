"""Clips for training and validation: file list, split, sampler, loader, augmentation.

A sample is a pure function of (seed, global sample number), so that resuming, other
world sizes and other worker counts give byte-identical batches. The state of the
sampler is the number of samples consumed and nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from taehv.config import Data
from taehv.errors import UserError
from taehv.video import Crop, VideoError, decode_window

log = logging.getLogger("taehv")

SAMPLER_VERSION = 1
"""Changes whenever the same (seed, sample number) would give another clip."""
VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"),
)
ATTEMPTS = 16
REBUILDS = 8
TIMEOUT_SECONDS = 300
# A DataLoader looks for dead workers only when its own timeout has passed.
POLL_SECONDS = 5
MAX_WORKERS = 16
SHARED_MEMORY = "/dev/shm"
UINT64 = (1 << 64) - 1
# Purposes of random numbers: what belongs to a window, what to a crop of it or of a
# cached window, and which latents a clip's frames are decoded from.
WINDOW, CROP, CACHED_CROP, DECODED = 0, 1, 2, 3


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


def _splitmix64(x: int) -> int:
    """Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014."""
    x = (x + 0x9E3779B97F4A7C15) & UINT64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & UINT64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & UINT64
    return x ^ (x >> 31)


def permute(i: int, n: int, seed: int, epoch: int) -> int:
    """Place of item i in the shuffled order of n items, without a table.

    An 8-round Feistel network over the next power of four, walked until it falls
    below n (Black and Rogaway: Ciphers with Arbitrary Finite Domains, 2002).
    """
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    key = _splitmix64(_splitmix64(seed & UINT64) ^ epoch)
    while True:
        left, right = i >> bits, i & mask
        for turn in range(8):
            mixed = _splitmix64(key ^ (right << 3 | turn))
            left, right = right, left ^ (mixed & mask)
        i = left << bits | right
        if i < n:
            return i


def draw(seed: int, number: int, attempt: int, purpose: int, count: int) -> list[float]:
    """`count` uniform numbers in [0, 1), a pure function of the other arguments.

    Raw Philox output is used because numpy promises that it never changes.
    """
    key = np.array([seed & UINT64, number], dtype=np.uint64)
    counter = np.array([0, 0, attempt, purpose], dtype=np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw(count)
    return [(int(x) >> 11) * 2.0**-53 for x in raw]


def toss(seed: int, numbers: list[int]) -> Tensor:
    """A fair coin for each sample: bool, N."""
    return torch.tensor([draw(seed, g, 0, DECODED, 1)[0] < 0.5 for g in numbers])


@dataclass(frozen=True)
class Failure:
    """A file that gave no clip for sample `number`, and why."""

    path: str
    reason: str
    number: int

    def __str__(self) -> str:
        return f"sample {self.number}: {self.reason}"


@dataclass(frozen=True)
class Clip:
    """One sample: uint8 RGB frames, and the colour transform still to be applied.

    `color_34` is a 3x3 matrix and a bias for RGB in [0, 1]. `failures` are the files
    that were tried before `source`. A clip from a cache has the teacher's float16
    latents, of which the first `lead` are not judged.
    """

    frames_THWC: np.ndarray
    color_34: np.ndarray
    number: int
    source: str
    failures: tuple[Failure, ...] = ()
    latents_TCHW: np.ndarray | None = None
    lead: int = 0


@dataclass
class Batch:
    """Clips of one micro-batch, still uint8, with what is needed to trace them.

    From a cache there are the teacher's latents too (float16), and for validation
    clips the teacher's own PSNR in dB. `lead_N` (int64) counts the leading latents of
    each clip that are not judged: 0 unless the clip begins inside a cached window.
    """

    frames_NTHWC: Tensor
    color_N34: Tensor
    numbers: list[int]
    sources: list[str]
    failures: list[Failure]
    lead_N: Tensor
    latents_NTCHW: Tensor | None = None
    teacher_psnr_N: Tensor | None = None

    def pin_memory(self) -> Batch:
        """Called by the DataLoader when it pins."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **{k: v.pin_memory() for k, v in tensors.items()})


class ClipSource(Protocol):
    """What a ClipLoader reads: clips by number, and what it must know of them."""

    data: Data
    clip_bytes: int
    """Size of one clip in the memory that processes share."""

    def __getitems__(self, numbers: list[int]) -> Sequence[Clip | Failure]:
        """Clips in the order asked for; may raise a UserError."""

    def mapped(self, folder: str) -> ClipSource:
        """The same, its lists memory mapped from files that it writes to `folder`."""


class ClipDataset(Dataset):
    """Training clips by global sample number, the same on every machine.

    With K crops a window, sample g is crop g % K of window g // K. A window's file,
    start and stride come from the window's random numbers; box, flip and colour from
    the sample's.
    """

    def __init__(self, data: Data, files: FileList, seed: int) -> None:
        self.files = files
        self.data = data
        self.seed = seed

    @property
    def clip_bytes(self) -> int:
        """Size of a clip's frames."""
        return self.data.frames * self.data.height * self.data.width * 3

    def mapped(self, folder: str) -> ClipDataset:
        """The same with a memory-mapped file list; see ClipSource."""
        return ClipDataset(self.data, self.files.save(folder), self.seed)

    def __getitem__(self, g: int) -> Clip:
        return self.__getitems__([g])[0]

    def __getitems__(self, numbers: list[int]) -> list[Clip]:
        """Clips in the order asked for; neighbours of one window share a decode.

        Raises UserError when a window's file and all its replacements fail.
        """
        crops_per_window = self.data.crops_per_window
        windows = itertools.groupby(numbers, key=lambda g: g // crops_per_window)
        return [clip for window, gs in windows for clip in self._window(window, [*gs])]

    def _window(self, window: int, numbers: list[int]) -> list[Clip]:
        crops, colors = zip(*map(self._augmentation, numbers), strict=True)
        failures: list[Failure] = []
        for attempt in range(ATTEMPTS):
            path, position, stride = self._place(window, attempt)
            try:
                clips = decode_window(
                    path, position, self.data.frames, stride, list(crops)
                )
            except VideoError as error:
                failures.append(Failure(path, str(error), numbers[0]))
                continue
            told = [tuple(failures)] + [()] * (len(clips) - 1)
            sources = [path] * len(clips)
            return list(map(Clip, clips, colors, numbers, sources, told))
        raise UserError(
            f"no usable file in {ATTEMPTS} attempts, check the videos under "
            f"{self.files.base}: {failures[-1].reason}"
        )

    def _place(self, window: int, attempt: int) -> tuple[str, float, int]:
        """File, position and stride; a replacement's file is drawn freely."""
        other, position, step = draw(self.seed, window, attempt, WINDOW, 3)
        n = len(self.files)
        epoch, i = divmod(window, n)
        item = int(other * n) if attempt else permute(i, n, self.seed, epoch)
        low, high = self.data.stride
        return self.files[item], position, low + int(step * (high - low + 1))

    def _augmentation(self, g: int) -> tuple[Crop, np.ndarray]:
        size, y, x, flip, *color = draw(self.seed, g, 0, CROP, 8)
        low, high = self.data.crop_scale
        crop = Crop(
            height=self.data.height,
            width=self.data.width,
            scale=low + size * (high - low),
            y=y,
            x=x,
            flip=flip < self.data.flip,
        )
        return crop, color_transform(self.data.color_jitter, color)


def color_transform(strength: float, draws: list[float]) -> np.ndarray:
    """Brightness, contrast, saturation and hue as one 3x3 matrix and bias (3x4).

    `draws` are four uniform numbers in [0, 1]. The first three factors lie in
    1 - strength to 1 + strength; the hue turns by up to strength quarter turns about
    the grey axis. Strength 0 gives the exact identity.
    """
    if strength == 0:
        return np.eye(3, 4, dtype=np.float32)
    brightness, contrast, saturation, hue = (strength * (2 * u - 1) for u in draws)
    luma = np.array([0.2126, 0.7152, 0.0722])
    saturate = (1 + saturation) * np.eye(3) - saturation * np.outer(np.ones(3), luma)
    matrix = (1 + brightness) * (1 + contrast) * _grey_rotation(hue) @ saturate
    bias = np.full((3, 1), -contrast / 2)
    return np.hstack([matrix, bias]).astype(np.float32)


def _grey_rotation(quarter_turns: float) -> np.ndarray:
    """Rotation about (1, 1, 1), by Rodrigues' formula."""
    angle = quarter_turns * math.pi / 2
    axis = 1 / math.sqrt(3)
    cross = axis * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    along = np.full((3, 3), 1 / 3)
    return (
        math.cos(angle) * np.eye(3)
        + math.sin(angle) * cross
        + (1 - math.cos(angle)) * along
    )


class ValidationDataset(Dataset):
    """`clips` fixed clips: clip v is of file v % n, starts spread over each file.

    The largest centred crop, stride 1, no augmentation. A file that fails gives a
    Failure in place of its clip; nothing replaces it.
    """

    def __init__(self, data: Data, files: FileList, clips: int) -> None:
        self.files = files
        self.data = data
        self.clips = clips

    def __len__(self) -> int:
        return self.clips

    def __getitem__(self, v: int) -> Clip | Failure:
        turn, item = divmod(v, len(self.files))
        of_this_file = -(-(self.clips - item) // len(self.files))
        position = (turn + 0.5) / of_this_file
        path, crop = self.files[item], Crop(self.data.height, self.data.width)
        try:
            (clip,) = decode_window(path, position, self.data.frames, 1, [crop])
        except VideoError as error:
            return Failure(path, str(error), v)
        return Clip(clip, color_transform(0, []), v, path)


def collate(samples: list[Clip | Failure]) -> Batch:
    """Stack clips of one size, either all or none of which have latents.

    Failures are listed and may leave an empty batch.
    """
    clips = [sample for sample in samples if isinstance(sample, Clip)]
    failures = [sample for sample in samples if isinstance(sample, Failure)]
    failures += [failure for clip in clips for failure in clip.failures]
    frames, colors = (
        np.empty((0, 0, 0, 0, 3), np.uint8),
        np.empty((0, 3, 4), np.float32),
    )
    if clips:
        frames = np.stack([clip.frames_THWC for clip in clips])
        colors = np.stack([clip.color_34 for clip in clips])
    return Batch(
        frames_NTHWC=torch.from_numpy(frames),
        color_N34=torch.from_numpy(colors),
        numbers=[clip.number for clip in clips],
        sources=[clip.source for clip in clips],
        failures=failures,
        lead_N=torch.tensor([clip.lead for clip in clips], dtype=torch.int64),
        latents_NTCHW=_stacked_latents(clips),
    )


def _stacked_latents(clips: list[Clip]) -> Tensor | None:
    latents = [clip.latents_TCHW for clip in clips if clip.latents_TCHW is not None]
    return torch.from_numpy(np.stack(latents)) if latents else None


class Plan(Protocol):
    """Which clips each batch has; a batch sampler without state."""

    local_batch_size: int
    """The most clips in a batch."""

    def __iter__(self) -> Iterator[list[int]]: ...

    def after(self, batches: int) -> Plan:
        """The same plan, that many batches later."""


@dataclass(frozen=True)
class Steps:
    """Sample numbers of one rank's batches, without end; a batch sampler.

    A step has `global_batch_size` clips; each rank takes an unbroken share of them in
    `micro_steps` batches of `local_batch_size`. Raises UserError where that does not
    come out even.
    """

    consumed: int
    global_batch_size: int
    local_batch_size: int
    rank: int = 0
    world_size: int = 1
    micro_step: int = 0

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.world_size * self.local_batch_size):
            raise UserError(
                f"a global batch of {self.global_batch_size} clips cannot be shared by "
                f"{self.world_size} processes in batches of {self.local_batch_size}: "
                "make it a multiple of their product"
            )

    @property
    def micro_steps(self) -> int:
        """Batches of a rank in one step."""
        return self.global_batch_size // (self.world_size * self.local_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        share = self.micro_steps * self.local_batch_size
        for turn in itertools.count(self.micro_step):
            step, micro_step = divmod(turn, self.micro_steps)
            first = self.consumed + step * self.global_batch_size
            first += self.rank * share + micro_step * self.local_batch_size
            yield list(range(first, first + self.local_batch_size))

    def after(self, batches: int) -> Steps:
        """The same plan, that many batches later."""
        return replace(self, micro_step=self.micro_step + batches)


class ClipLoader:
    """The batches of a plan, prepared by worker processes; `Steps` never end.

    Workers are started by a fork server (forking a process that uses CUDA or threads
    is unsafe) and map the source's lists into memory. When one dies or hangs, all are
    started anew where the reader stands, up to REBUILDS times in a run; that is exact
    because sampling has no state. `collate` makes a batch of what the source gives.
    Raises UserError when sizes do not divide, when shared memory is too small, and in
    reading when no usable file is found.
    """

    def __init__(
        self,
        source: ClipSource,
        plan: Plan,
        pin_memory: bool = False,
        collate: Callable[[list[Any]], Batch] = collate,
    ) -> None:
        data = source.data
        self.workers = worker_count(data.workers)
        if plan.local_batch_size % data.crops_per_window:
            raise UserError(
                f"data.crops_per_window = {data.crops_per_window} must divide the "
                f"local batch of {plan.local_batch_size} clips"
            )
        batch_bytes = plan.local_batch_size * source.clip_bytes
        check_shared_memory(batch_bytes, data.prefetch, self.workers)
        self.plan = plan
        self.pin_memory = pin_memory
        self._collate = functools.partial(_collate_or_error, collate)
        self._folder = tempfile.TemporaryDirectory(prefix="taehv-")
        self._source = source.mapped(self._folder.name)
        self._rebuilds = 0
        self._batches: Iterator[Batch | UserError] | None = None

    def __iter__(self) -> ClipLoader:
        return self

    def __next__(self) -> Batch:
        batch = self._next_or_rebuild()
        if isinstance(batch, UserError):
            raise batch
        self.plan = self.plan.after(1)
        return batch

    def close(self) -> None:
        """End the workers and remove the mapped lists."""
        self._batches = None
        self._folder.cleanup()

    def _next_or_rebuild(self) -> Batch | UserError:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while True:
            try:
                if self._batches is None:
                    self._batches = iter(self._build())
                return next(self._batches)
            except (RuntimeError, EOFError, ConnectionError) as error:
                if "timed out" in str(error) and time.monotonic() < deadline:
                    continue
                self._rebuilds += 1
                if self.workers == 0 or self._rebuilds > REBUILDS:
                    raise
                log.warning(f"the workers of the data loader start anew: {error}")
            self._batches = None
            deadline = time.monotonic() + TIMEOUT_SECONDS

    def _build(self) -> DataLoader:
        return DataLoader(
            _Fetched(self._source),
            batch_sampler=self.plan,
            collate_fn=self._collate,
            pin_memory=self.pin_memory,
            **worker_options(self.workers, self._source.data.prefetch, POLL_SECONDS),
        )


class _Fetched(Dataset):
    """Hands a UserError on as a value: raised in a worker it would lose its line."""

    def __init__(self, source: ClipSource) -> None:
        self.source = source

    def __getitems__(self, numbers: list[int]) -> Sequence[Clip | Failure] | UserError:
        try:
            return self.source.__getitems__(numbers)
        except UserError as error:
            return error


def _collate_or_error(
    collate: Callable[[list[Any]], Batch], samples: list[Any] | UserError
) -> Batch | UserError:
    return samples if isinstance(samples, UserError) else collate(samples)


def validation_batches(
    data: Data, files: FileList, clips: Sequence[int], total: int, batch_size: int
) -> Iterator[Batch]:
    """The validation clips numbered `clips` out of `total`, in batches, in order.

    Decoded in threads: processes would cost a start at each validation, and the
    signals that end a run would end them first.
    """
    dataset = ValidationDataset(data, files, total)
    threads = max(1, min(worker_count(data.workers), len(clips)))
    with ThreadPoolExecutor(threads) as pool:
        decoded = pool.map(dataset.__getitem__, clips)
        while samples := list(itertools.islice(decoded, batch_size)):
            yield collate(samples)


def worker_count(workers: int) -> int:
    """Worker processes of this rank; -1 shares the cores among the local ranks."""
    if workers >= 0:
        return workers
    affinity = getattr(os, "sched_getaffinity", None)  # only on Linux
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, cores // _local_world()))


def worker_options(workers: int, prefetch: int, timeout: float) -> dict[str, Any]:
    """DataLoader arguments for decoding in `workers` processes, or in this one."""
    # Else each start of the workers would draw from the random numbers of training.
    own_random_numbers = {"generator": torch.Generator()}
    if workers == 0:
        return own_random_numbers
    context = get_context("forkserver")
    context.set_forkserver_preload(["taehv.data"])
    return own_random_numbers | {
        "num_workers": workers,
        "prefetch_factor": prefetch,
        "multiprocessing_context": context,
        "worker_init_fn": _start_worker,
        "timeout": timeout,
    }


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches every process; the training process finishes its step first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _local_world() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_shared_memory(batch_bytes: int, prefetch: int, workers: int) -> None:
    """Raise UserError if the batches in flight on this host would not fit."""
    if workers == 0 or not os.path.isdir(SHARED_MEMORY):
        return
    needed = _local_world() * workers * (prefetch + 1) * batch_bytes
    status = os.statvfs(SHARED_MEMORY)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise UserError(
            f"{SHARED_MEMORY} has {free >> 20} MiB free and the workers need "
            f"{(needed >> 20) + 1}: lower data.workers or data.prefetch, or give the "
            "container more (docker run --shm-size)"
        )


def to_frames(
    batch: Batch, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Frames on `device`: `frames_NTCHW` in [0, 1], colour transform applied.

    The memory stays in NTHWC order (channels last); without colour the values are
    exactly uint8 / 255.
    """
    frames_NTHWC = batch.frames_NTHWC.to(device, non_blocking=True)
    if _is_identity(batch.color_N34):
        return (frames_NTHWC.to(dtype) / 255).permute(0, 1, 4, 2, 3)
    color_N34 = batch.color_N34.to(device, non_blocking=True)
    red, green, blue, bias = color_N34[:, None, None, None].unbind(-1)
    frames_NTHWC = frames_NTHWC.float() / 255
    # Written out: a matrix product would run in TF32 or bf16 where those are on.
    mixed_NTHWC = (
        red * frames_NTHWC[..., 0:1]
        + green * frames_NTHWC[..., 1:2]
        + blue * frames_NTHWC[..., 2:3]
        + bias
    )
    return mixed_NTHWC.clamp(0, 1).to(dtype).permute(0, 1, 4, 2, 3)


class Upload:
    """Brings batches to a device while it works at what it was given before.

    Args:
        device: where to.
        dtype: of the frames there.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Tensor:
        """`to_frames`, copied and converted beside the work under way."""
        if self._stream is None:
            return to_frames(batch, self.device, self.dtype)
        with torch.cuda.stream(self._stream):
            frames_NTCHW = to_frames(batch, self.device, self.dtype)
        torch.cuda.current_stream().wait_stream(self._stream)
        frames_NTCHW.record_stream(torch.cuda.current_stream())
        return frames_NTCHW


def _is_identity(color_N34: Tensor) -> bool:
    return torch.equal(color_N34, torch.eye(3, 4).expand_as(color_N34))
