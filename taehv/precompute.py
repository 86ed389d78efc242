"""Encode videos once with the teacher, for trainings that then read a latent cache.

torchrun --nproc_per_node 8 -m taehv.precompute --config FILE --data.cache FOLDER
python -m taehv.precompute --config FILE --data.cache FOLDER
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from taehv.augment import color_transform, to_frames
from taehv.cache import (
    Notes,
    Part,
    ShardError,
    ShardWriter,
    Window,
    check_fit,
    describe,
    from_jpeg,
    locked,
    read_about,
    read_shard,
    remove_damaged,
    to_jpeg,
    write_about,
)
from taehv.clips import Batch, Clip, collate
from taehv.config import read_config
from taehv.data import ClipDataset, validation_batches
from taehv.distributed import (
    StopSignal,
    World,
    check_agreement,
    prepare_networks,
    started,
)
from taehv.errors import UserError, run_command
from taehv.files import relative_path, sources_of
from taehv.index import build_file_lists
from taehv.loader import ClipLoader
from taehv.logging import clock, log, set_up_console
from taehv.losses import aligned, psnr
from taehv.rules import check_frames, check_size
from taehv.sampler import SAMPLER_VERSION
from taehv.sections import Config, Data, Parallelism
from taehv.teacher import Teacher, check_teacher, load_teacher
from taehv.urls import is_url
from taehv.variants import VARIANTS
from taehv.video import DISK_ERRORS
from taehv.watchdog import Watchdog

# A process that has finished waits for the others, which may have hours to go;
# torchrun ends it should one of them fail.
PATIENCE = timedelta(days=30)
# Enough to encode on while a shard of many megabytes is flushed to the disk.
WAITING_BATCHES = 8
PROGRESS_SECONDS = 10
JPEG_BYTES_A_PIXEL = 0.4
"""To estimate the size of a cache; six videos took 0.2 to 0.6, at 42 to 50 dB."""
FORMER = {
    "data.frames": "validation.frames",
    "data.height": "validation.height",
    "data.width": "validation.width",
    "data.crop_scale": "cache.crop_scale",
}
"""What was one setting once, in caches of that time."""


def precompute(config: Config) -> None:
    """Write the cache that the settings describe, or what is missing of it.

    Raises:
        UserError: anything a user got wrong, in one line that names the cure.
    """
    check_precompute(config)
    with started(Parallelism(), config.training.device, PATIENCE) as world:
        set_up_console(world.rank)
        folder = Path(config.data.cache).expanduser()
        # A process that has finished may wait for hours: nothing ends it.
        with StopSignal() as stop, Watchdog(world, stop, folder):
            Precompute(config, world, stop).run()


def check_precompute(config: Config) -> None:
    """Reject settings from which no cache can be made, before anything starts."""
    if not config.data.cache:
        raise UserError("data.cache is empty: name the folder to write")
    if not config.teacher.kind:
        raise UserError("teacher.kind is empty: name the teacher whose latents to keep")
    _check_apart(config.data)
    check_size(config, "cache")
    check_frames(config, "cache")
    cache = config.cache
    window = cache.frames, cache.height, cache.width
    for shape in config.data.shapes:
        check_fit(VARIANTS[config.model.variant], config.data.shaped(shape), window)


def _check_apart(data: Data) -> None:
    """Refuse to mix a new cache with the videos."""
    folder = os.path.realpath(os.path.expanduser(data.cache))
    if os.path.exists(os.path.join(folder, "cache.json")):
        return
    for source in sources_of(data):
        place = source.root or source.base
        if is_url(place):
            continue
        videos = os.path.realpath(place)
        shared = os.path.commonpath([folder, videos])
        if shared == folder or (source.root and shared == videos):
            raise UserError(
                f"data.cache = {data.cache} holds the videos of {place} or lies among "
                "them: name another folder"
            )


@dataclass(frozen=True)
class Shard:
    """The windows or validation clips of one shard, by their numbers."""

    part: Part
    number: int
    windows: range


def plan_shards(part: Part, windows: int, shard_windows: int) -> list[Shard]:
    """Cut windows 0 to `windows` - 1 into shards."""
    starts = range(0, windows, shard_windows)
    return [
        Shard(part, number, range(start, min(start + shard_windows, windows)))
        for number, start in enumerate(starts)
    ]


@dataclass(frozen=True)
class Batches:
    """The batches of some shards, in order; none has windows of two shards."""

    shards: list[Shard]
    local_batch_size: int
    first: int = 0

    def __iter__(self) -> Iterator[list[int]]:
        every = itertools.chain.from_iterable(map(self.of_shard, self.shards))
        return itertools.islice(every, self.first, None)

    def of_shard(self, shard: Shard) -> list[list[int]]:
        """The window numbers of each batch of a shard."""
        size = self.local_batch_size
        starts = range(0, len(shard.windows), size)
        return [list(shard.windows[start : start + size]) for start in starts]

    def after(self, batches: int) -> Batches:
        """The same plan, that many batches later."""
        return replace(self, first=self.first + batches)


@dataclass(frozen=True)
class StoredClip(Clip):
    """A clip whose frames are as they will be read; `jpegs` has them as JPEG files."""

    jpegs: tuple[bytes, ...] = ()


@dataclass
class StoredBatch(Batch):
    """Clips to store; `jpegs` has a tuple of JPEG files a clip, empty if raw."""

    jpegs: list[tuple[bytes, ...]] | None = None


class StoredClips:
    """Windows as they will be read from the cache: a source for ClipLoader.

    Colour is applied and rounded, and compression done and undone, before the teacher
    sees the frames, so that its latents are those of the stored frames exactly.
    """

    def __init__(self, clips: ClipDataset, jpeg: bool) -> None:
        self.clips = clips
        self.jpeg = jpeg
        self.data = clips.data
        self.clip_bytes = clips.clip_bytes

    def mapped(self, folder: str) -> StoredClips:
        """The same with a memory-mapped file list."""
        return StoredClips(self.clips.mapped(folder), self.jpeg)

    def __getitems__(self, numbers: list[int]) -> list[StoredClip]:
        """Windows in the order asked for."""
        return [self._stored(clip) for clip in self.clips.__getitems__(numbers)]

    def _stored(self, clip: Clip) -> StoredClip:
        (frames_TCHW,) = to_frames(collate([clip]), "cpu")
        frames_TCHW = (frames_TCHW * 255).round().to(torch.uint8)
        frames_THWC = frames_TCHW.permute(0, 2, 3, 1).numpy()
        jpegs: tuple[bytes, ...] = ()
        if self.jpeg:
            jpegs = tuple(map(to_jpeg, frames_THWC))
            frames_THWC = np.stack([*map(from_jpeg, jpegs)])
        settled = {
            "frames_THWC": frames_THWC,
            "color_34": color_transform(0, []),
            "degradation": None,  # it is in the frames now
        }
        return StoredClip(**vars(clip) | settled, jpegs=jpegs)


def collate_stored(clips: list[StoredClip]) -> StoredBatch:
    """As collate, with the JPEG files."""
    return StoredBatch(**vars(collate(clips)), jpegs=[clip.jpegs for clip in clips])


class Background:
    """Calls in a thread of their own, one after the other; few may wait.

    What a call raises is raised by a later `run` or by `finish`, and no call is made
    after it: a shard that lacks a window must not be finished.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._calls: deque[Future[None]] = deque()
        self._failed = False

    def run(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Queue a call, and wait while too many are queued."""
        self._calls.append(self._pool.submit(self._call, call, *arguments))
        while len(self._calls) > WAITING_BATCHES:
            self._calls.popleft().result()

    def _call(self, call: Callable[..., Any], *arguments: Any) -> None:
        if self._failed:
            return
        self._failed = True  # stays so if the call raises
        call(*arguments)
        self._failed = False

    def finish(self) -> None:
        """Wait for all calls."""
        while self._calls:
            self._calls.popleft().result()

    def close(self) -> None:
        """End the thread after the call that it is in."""
        self._pool.shutdown(cancel_futures=True)


class Precompute:
    """The share of one process in writing a cache.

    Args:
        config: settings that check_precompute has passed.
        world: this process's place.
        stop: tells when to leave the current shard and end.
    """

    def __init__(self, config: Config, world: World, stop: StopSignal) -> None:
        self.config, self.world, self.stop = config, world, stop
        self.folder = Path(config.data.cache).expanduser()
        self.variant = VARIANTS[config.model.variant]
        self.files, self.held_out = build_file_lists(config.data)
        self.window_data = config.window_data
        check_agreement({"list of videos": self._files_hash()})
        self.teacher = self._load_teacher()
        clips = config.validation.clips if len(self.held_out) else 0
        self.counts: dict[Part, int] = {
            "train": config.cache.windows,
            "validation": clips,
        }
        self.writing = Background()
        self.notes = Notes(self.folder)
        self.bad_files: set[str] = set()

    def _files_hash(self) -> int:
        return int(self.files.fingerprint[:15], 16)

    def _load_teacher(self) -> Teacher:
        device = self.world.device
        compiled = prepare_networks(self.config.compile, device)
        teacher = load_teacher(self.config.teacher, device, compiled)
        assert teacher is not None  # check_precompute wants its kind
        for data in (self.window_data, self.config.validation_data):
            sizes = data.frames, data.height, data.width
            check_teacher(teacher, self.variant.latent_channels, *sizes)
        return teacher

    def run(self) -> None:
        """Write this process's share of the shards that are missing or damaged.

        Raises:
            UserError: the disk is full, or the like.
        """
        try:
            with self._claimed_folder():
                self._write_missing()
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            raise UserError(
                f"cannot write to data.cache = {self.folder} ({error.strerror}): mend "
                "that, and the same command goes on"
            ) from error

    def _write_missing(self) -> None:
        # Before so many shards are listed as no disk could hold.
        self._check_room(self.counts, shutil.disk_usage(self.folder).total)
        missing = self._missing()
        self._announce(missing)
        own = missing[self.world.rank :: self.world.size]
        try:
            self._write(own)
            self.writing.finish()
        finally:
            self.writing.close()
        self._hand_over()

    def _missing(self) -> list[Shard]:
        """The shards to write, the damaged ones among them; the first process looks."""
        found: list[Any] = [None]
        if self.world.is_main:
            counts = self._about()["shards"]
            found = [remove_damaged(self.folder, counts, self.variant)]
        dist.broadcast_object_list(found, src=0)
        return [s for s in self._shards() if (s.part, s.number) not in found[0]]

    def _shards(self) -> list[Shard]:
        size = self.config.cache.shard_windows
        lists = [plan_shards(part, n, size) for part, n in self.counts.items()]
        return list(itertools.chain.from_iterable(lists))

    # --- the folder ----------------------------------------------------------------

    @contextmanager
    def _claimed_folder(self) -> Iterator[None]:
        """Write what the cache is, or see that what is there is the same cache.

        For the time of the context no other command writes to it.
        """
        about = self._about()
        with ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                if self.world.is_main:
                    stack.enter_context(locked(self.folder))
                    if read_about(self.folder) is None:
                        write_about(self.folder, about)
            except OSError as error:
                raise UserError(
                    f"cannot write to data.cache = {self.folder} ({error.strerror}): "
                    "name a folder that you may write to"
                ) from None
            dist.barrier()
            self._check_same(about)
            yield

    def _check_same(self, about: dict[str, Any]) -> None:
        found = _flat(read_about(self.folder))
        there = {FORMER.get(key, key): value for key, value in found.items()}
        wanted = _flat(about)
        for key in there | wanted:
            if there.get(key) != wanted.get(key):
                raise UserError(
                    f"data.cache = {self.folder} was made with {key} = "
                    f"{there.get(key)}, not {wanted.get(key)}: take that back, or name "
                    "another folder"
                )

    def _about(self) -> dict[str, Any]:
        config, judged = self.config, self.config.validation_data
        size = config.cache.shard_windows
        return describe(
            self.variant,
            {"kind": config.teacher.kind, "fingerprint": self.teacher.fingerprint},
            {part: -(-count // size) for part, count in self.counts.items()},
            {
                "training videos": self.files.fingerprint[:16],
                "held-out videos": self.held_out.fingerprint[:16],
                "sampler version": SAMPLER_VERSION,
                "training.seed": config.training.seed,
                "data.stride": config.data.stride,
                "data.flip": config.data.flip,
                "data.color_jitter": config.data.color_jitter,
                "data.blur": config.data.blur,
                "data.noise": config.data.noise,
                "cache.windows": config.cache.windows,
                "cache.frames": config.cache.frames,
                "cache.height": config.cache.height,
                "cache.width": config.cache.width,
                "cache.crop_scale": self.window_data.crop_scale,
                "cache.images": config.cache.images,
                "cache.shard_windows": config.cache.shard_windows,
                "validation.clips": config.validation.clips,
                "validation.frames": judged.frames,
                "validation.height": judged.height,
                "validation.width": judged.width,
            },
        )

    def _is_complete(self, shard: Shard) -> bool:
        try:
            read_shard(self.folder, shard.part, shard.number)
        except ShardError:
            return False
        return True

    def _announce(self, missing: list[Shard]) -> None:
        """Tell what is to be done.

        Raises:
            UserError: the disk has no room for it.
        """
        cache = self.config.cache
        windows: dict[Part, int] = {"train": 0, "validation": 0}
        for shard in missing:
            windows[shard.part] += len(shard.windows)
        log.info(
            f"{self.counts['train']} windows of {cache.frames} x {cache.height} x "
            f"{cache.width} and {self.counts['validation']} validation clips; to "
            f"encode: {windows['train']} and {windows['validation']}, about "
            f"{self._bytes(windows) / 2**30:.2f} GiB in {self.folder}"
        )
        self._check_room(windows, shutil.disk_usage(self.folder).free)

    def _check_room(self, windows: dict[Part, int], room: int) -> None:
        needed = self._bytes(windows)
        if needed > room:
            raise UserError(
                f"the cache needs about {needed / 2**30:.1f} GiB more and the disk of "
                f"{self.folder} has {room / 2**30:.1f}: lower cache.windows, set "
                "cache.images to jpeg, or name a folder on a larger disk"
            )

    def _bytes(self, windows: dict[Part, int]) -> int:
        return sum(count * self._window_bytes(part) for part, count in windows.items())

    def _window_bytes(self, part: Part) -> int:
        data = self._data(part)
        jpeg = part == "train" and self.config.cache.images == "jpeg"
        area, space = data.height * data.width, self.variant.space_factor
        latents = self.variant.latents_of(data.frames) * self.variant.latent_channels
        pixel = JPEG_BYTES_A_PIXEL if jpeg else 3
        return int(data.frames * area * pixel) + latents * area // space**2 * 2

    def _data(self, part: Part) -> Data:
        return self.window_data if part == "train" else self.config.validation_data

    # --- the loop ------------------------------------------------------------------

    def _write(self, shards: list[Shard]) -> None:
        progress = _Progress(shards, self.world.size)
        training = [shard for shard in shards if shard.part == "train"]
        plan = Batches(training, self.config.cache.batch_size)
        clips = ClipDataset(self.window_data, self.files, self.config.training.seed)
        stored = StoredClips(clips, self.config.cache.images == "jpeg")
        pinned = self.world.device.type == "cuda"
        loader = ClipLoader(stored, plan, pinned, collate_stored)
        try:
            for shard in shards:
                batches = (
                    itertools.islice(loader, len(plan.of_shard(shard)))
                    if shard.part == "train"
                    else self._validation_batches(shard)
                )
                if not self._write_shard(shard, batches, progress):
                    return
            self.writing.finish()
            progress.end()
        finally:
            loader.close()

    def _validation_batches(self, shard: Shard) -> Iterator[Batch]:
        config = self.config
        total, size = config.validation.clips, config.cache.batch_size
        return validation_batches(
            config.validation_data, self.held_out, shard.windows, total, size
        )

    def _write_shard(
        self, shard: Shard, batches: Iterator[Batch], progress: _Progress
    ) -> bool:
        """Write a shard; False if told to stop, in which case there will be none."""
        writer = ShardWriter(self.folder, shard.part, shard.number)
        for batch in batches:
            if self.stop.received:
                self.writing.run(writer.close)
                return False
            self._note_failures(batch)
            if len(batch.numbers):
                encoded = self._encode(batch, shard.part == "validation")
                self.writing.run(self._add, writer, batch, *encoded)
            progress.add(batch)
        self.writing.run(self._finish, writer)
        return True

    @torch.no_grad()
    def _encode(
        self, batch: Batch, judged: bool
    ) -> tuple[Tensor, Tensor | None, torch.cuda.Event | None]:
        """float16 latents, the teacher's PSNR, and the time when the latents are there.

        Nothing waits here, so that the GPU has the next batch when this one is done.
        """
        device = self.world.device
        frames_NTCHW = to_frames(batch, device)
        latents_NTCHW = self.teacher.encode(frames_NTCHW, batch.numbers)
        self._check_shape(frames_NTCHW, latents_NTCHW)
        latents_NTCHW = latents_NTCHW.to(torch.float16)
        psnr_N = None
        if judged:
            psnr_N = _decoded_psnr(self.teacher, latents_NTCHW, frames_NTCHW).cpu()
        latents_NTCHW = latents_NTCHW.to("cpu", non_blocking=True)
        copied = None
        if device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        return latents_NTCHW, psnr_N, copied

    def _check_shape(self, frames_NTCHW: Tensor, latents_NTCHW: Tensor) -> None:
        clips, frames, _, height, width = frames_NTCHW.shape
        space = self.variant.space_factor
        wanted = (clips, self.variant.latents_of(frames), self.variant.latent_channels)
        wanted += (height // space, width // space)
        if latents_NTCHW.shape != wanted:
            raise UserError(
                f"the teacher makes latents of N T C H W {tuple(latents_NTCHW.shape)} "
                f"of {frames} x {height} x {width}, and {self.config.model.variant} "
                f"has {wanted}: choose the model.variant made for this teacher"
            )

    def _add(
        self,
        writer: ShardWriter,
        batch: Batch,
        latents_NTCHW: Tensor,
        psnr_N: Tensor | None,
        copied: torch.cuda.Event | None,
    ) -> None:
        if copied is not None:
            copied.synchronize()
        jpegs = getattr(batch, "jpegs", None) or [()] * len(batch.numbers)
        for n, number in enumerate(batch.numbers):
            writer.add(
                Window(
                    number=number,
                    source=relative_path(batch.sources[n], self.files.base),
                    seed=number,
                    frames_THWC=batch.frames_NTHWC[n].numpy(),
                    latents_TCHW=latents_NTCHW[n].numpy(),
                    jpegs=jpegs[n],
                    teacher_psnr=None if psnr_N is None else psnr_N[n].item(),
                )
            )

    def _finish(self, writer: ShardWriter) -> None:
        self.notes.add(writer.finish())

    def _note_failures(self, batch: Batch) -> None:
        for failure in batch.failures:
            if failure.path not in self.bad_files:
                self.bad_files.add(failure.path)
                log.warning(f"left out a bad video: {failure}")

    # --- the end -------------------------------------------------------------------

    def _hand_over(self) -> None:
        """Wait for the others, and tell how far the cache is."""
        stopped = self.stop.agreed()
        if not self.world.is_main:
            return
        if stopped:
            shards = self._shards()
            done = sum(map(self._is_complete, shards))
            log.info(
                f"stopped with {done} of {len(shards)} shards written; the same "
                "command goes on"
            )
        else:
            log.info(f"complete: train with --data.cache {self.folder}")


def _decoded_psnr(
    teacher: Teacher, latents_NTCHW: Tensor, frames_NTCHW: Tensor
) -> Tensor:
    """PSNR in dB of each clip's decoding by the teacher, from latents as stored."""
    decoded_NTCHW = teacher.decode(latents_NTCHW.float()).to(frames_NTCHW.dtype)
    target_NTCHW, decoded_NTCHW = aligned(frames_NTCHW, decoded_NTCHW.clamp(0, 1))
    return psnr((decoded_NTCHW - target_NTCHW).square().mean((1, 2, 3, 4)))


class _Progress:
    """Tells from time to time how far this process is, and about when all will end.

    The speed is counted from the first batch on: before it, processes start and the
    teacher is compiled.
    """

    def __init__(self, shards: list[Shard], processes: int) -> None:
        self.total = sum(len(shard.windows) for shard in shards)
        self.processes = processes
        self.done = self._frames = self._first = 0
        self._start = self._told = time.monotonic()

    def add(self, batch: Batch) -> None:
        """Note a batch whose encoding is under way."""
        windows, frames = batch.frames_NTHWC.shape[:2]
        now = time.monotonic()
        if not self.done:
            self._start, self._first = now, windows
        else:
            self._frames += windows * frames
        self.done += windows
        if now - self._told < PROGRESS_SECONDS or self.done == self._first:
            return
        self._told = now
        left = (self.total - self.done) * (now - self._start)
        log.info(
            f"{self.done * self.processes} of {self.total * self.processes} windows | "
            f"{self._speed(now)} | {clock(left / (self.done - self._first))} left"
        )

    def end(self) -> None:
        """Tell the speed, once all that was encoded is written."""
        if self._frames:
            log.info(f"encoded at {self._speed(time.monotonic())}")

    def _speed(self, now: float) -> str:
        rate = self._frames * self.processes / (now - self._start)
        return f"{rate:.0f} frames/s"


def _flat(tree: dict[str, Any] | None, prefix: str = "") -> dict[str, Any]:
    """Nested sections as one, by names that say where they stand."""
    flat: dict[str, Any] = {}
    for key, value in (tree or {}).items():
        if isinstance(value, dict):
            flat |= _flat(value, "" if key in ("settings", "latents") else f"{key}.")
        else:
            flat[prefix + key] = value
    return flat


def main() -> None:
    """Read the settings and write the cache."""
    precompute(read_config(sys.argv[1:]))


if __name__ == "__main__":
    run_command(main)
