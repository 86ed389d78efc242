"""Composition and loop: everything else is a component that knows only its part."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from shlex import quote

import torch
import torch.distributed as dist
from torch import Tensor

from taehv.augment import Upload
from taehv.best import BEST_GROUP, BestSoFar, check_best
from taehv.bottleneck import Bottleneck
from taehv.cache import Cache, CacheDataset, cached_batches
from taehv.checkpoint import load, read_about, read_config, training_state
from taehv.checkpointer import Checkpointer, Saved, texts_beside
from taehv.claim import alone
from taehv.clips import Batch, collate
from taehv.config import changes, dumps
from taehv.data import ClipDataset, validation_batches
from taehv.distributed import (
    StopSignal,
    World,
    cast_at_borders,
    check_agreement,
    compile_in_place,
    compute_dtype,
    from_main,
    shard,
    started,
    sum_over_ranks,
    uses_cuda_graph,
)
from taehv.errors import UserError
from taehv.exports import Exports
from taehv.index import build_file_lists
from taehv.loader import ClipLoader
from taehv.local_batch import LocalBatch, check_probe
from taehv.logging import RunLog, log, set_up_console
from taehv.losses import Targets, judged, psnr, training_losses
from taehv.memory import MemoryMonitor, memory_peaks
from taehv.model import TAEHV
from taehv.offload import Masters
from taehv.optim import Ema, learning_rate, new_optimizer
from taehv.perceptual import load_measures
from taehv.pretrained import initial_model
from taehv.sampler import SAMPLER_VERSION, Buckets, Steps, toss
from taehv.samples import FOLDER as SAMPLES
from taehv.sections import Config
from taehv.seraena import (
    SERAENA_GROUPS,
    CollapseWatch,
    Seraena,
    new_discriminator,
    new_view,
    warn_if_idle,
)
from taehv.shards import full
from taehv.step import StepResult, TrainingStep
from taehv.storage import Folder
from taehv.teacher import check_teacher, load_teacher
from taehv.urls import is_url
from taehv.validate import tell, validate
from taehv.watchdog import Watchdog
from taehv.writing import write_text

STEPS_AHEAD = 2
"""How far the host runs ahead of a GPU, which then never waits for it."""


def train(config: Config) -> None:
    """Run a training from its settings to its exported weights.

    Raises:
        UserError: anything a user got wrong, in one line that names the cure.
    """
    training = config.training
    folder, patience = config.job.folder, training.start_timeout
    # The watchdog is the first to end a wait, and says whom it waited for.
    longest = timedelta(seconds=60 + max(patience, training.step_timeout))
    with started(config.parallelism, training.device, longest) as world:
        set_up_console(world.rank)
        with (
            StopSignal() as stop,
            Watchdog(world, stop, folder / "stalled", patience) as watchdog,
            alone(folder, world, checkpoints_of(config)),
        ):
            trainer = Trainer(config, world, stop, watchdog)
            with trainer.checkpointer, closing(trainer):
                trainer.run()


def checkpoints_of(config: Config) -> Folder:
    """Where the checkpoints of a run lie."""
    return Folder(config.checkpoint.folder or config.job.folder / "checkpoints")


@dataclass
class Counts:
    """What a run has done so far; with the seed, all that its future depends on."""

    step: int = 0
    samples: int = 0
    skipped: int = 0
    bad_clips: int = 0
    """Replaced, on all processes; known at each save."""


@dataclass
class Pending:
    """A step that the device may still be at."""

    step: int
    samples: int
    clips: int
    rate: float
    batches: list[Batch]
    """This process's, on the host."""
    waited: float
    """Seconds for data."""
    result: StepResult

    def __post_init__(self) -> None:
        self._values = self.result.values
        if self._values.is_cuda:
            self._values = self._values.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def values(self) -> list[float]:
        """What the step found out, waiting for it if need be."""
        if self.result.values.is_cuda:
            self._arrived.synchronize()
        return self._values.tolist()


def settings_for_readers(config: Config) -> str:
    """As dumps, with a place of checkpoints that is the same from any folder."""
    settings = config.checkpoint
    if settings.folder and not is_url(settings.folder):
        folder = str(Path(settings.folder).expanduser().absolute())
        settings = replace(settings, folder=folder)
    return dumps(replace(config, checkpoint=settings))


class Trainer:
    """One run on one process.

    Args:
        config: checked settings.
        world: this process's place.
        stop: tells when to save and leave early.
        watchdog: is told of progress.
    """

    def __init__(
        self, config: Config, world: World, stop: StopSignal, watchdog: Watchdog
    ) -> None:
        self.config, self.world, self.stop = config, world, stop
        self.watchdog = watchdog
        self.is_under_way = False
        self.folder = config.job.folder
        self.counts = Counts()
        self.is_stale = False
        self.bad_in_row = 0
        self.pending: deque[Pending] = deque()
        self.bad_clips = 0
        self.bad_files: set[str] = set()
        self.collapse = CollapseWatch()
        settings = config.validation
        check_best(settings.best)
        self.extra = load_measures(
            settings.lpips, settings.st_lpips, settings.vmaf, world.device
        )
        check_probe(config)
        self._find_clips()
        clips = f"{settings.clips} {self.judged_shape} {self.held_out.fingerprint}"
        self.best = BestSoFar(settings.best, clips)
        check_agreement({"list of training files": self._clips_hash()})
        self.checkpointer = Checkpointer(
            checkpoints_of(config),
            config.checkpoint,
            self._tell_saved,
            config.job.name if config.checkpoint.folder else "",
        )
        self.exports = Exports(self.folder / "export")
        origin = self.checkpointer.find()
        self._build_model(resumes=origin is not None)
        self._build_teacher()
        if origin is not None:
            self._resume(origin)
        self.checkpointer.prepare(self._state())
        self.log = self._open_log() if world.is_main else None
        self._catch_up()
        self.memory = MemoryMonitor()
        self.local_batch = self._local_batch()

    # --- composition ---------------------------------------------------------------

    def _find_clips(self) -> None:
        """What to train on and what to validate on: videos, or windows of a cache."""
        config, seed = self.config, self.config.training.seed
        self.cache = None
        batch_size = config.training.global_batch_size
        self.buckets = Buckets.of(config.data, batch_size, seed)
        if config.data.cache:
            # The main process verifies what is new, and notes it for the others.
            if not self.world.is_main:
                dist.barrier()
            self.cache = Cache.open(config.data.cache, config.model.variant)
            if self.world.is_main:
                dist.barrier()
            self.clips = CacheDataset(config.data, self.cache.train, seed, self.buckets)
            self.sources, self.held_out = self.clips.windows, self.cache.validation
            content = [self.cache.about, self.cache.train.fingerprint]
            told = json.dumps(content, sort_keys=True).encode()
            self.fingerprint = hashlib.sha256(told).hexdigest()
        else:
            self.sources, self.held_out = build_file_lists(config.data)
            self.clips = ClipDataset(config.data, self.sources, seed, self.buckets)
            self.fingerprint = self.sources.fingerprint
        self.judged_shape = config.validation_data.usual_shape
        if self.cache is not None and len(self.cache.validation):
            self.judged_shape = self.cache.validation.largest
        if config.data.buckets:
            told = f"{self.fingerprint} {config.data.shapes} {self.buckets.clips}"
            self.fingerprint = hashlib.sha256(told.encode()).hexdigest()

    def _build_model(self, resumes: bool) -> None:
        config, world = self.config, self.world
        self.dtype = compute_dtype(config.training.precision, world.device)
        # Where fp32 is asked for, fp32 is meant.
        torch.backends.cudnn.allow_tf32 = self.dtype != torch.float32
        # Weights, targets and losses keep full precision.
        self.exact = torch.promote_types(self.dtype, torch.float32)
        self.upload = Upload(world.device, self.exact)
        torch.manual_seed(config.training.seed)
        self.model = initial_model(config.model, resumes)
        self.model.to(world.device, self.exact)
        # Validation runs on whole weights and so without collectives: processes may
        # have different numbers of clips.
        self.judge = TAEHV(config.model.variant).to(world.device, self.dtype).eval()
        self.model.fused = self.judge.fused = config.compile.fused
        self.model.checkpointing = config.training.activation_checkpointing
        self.roots = [self.model.encoder, self.model.decoder]
        for root, name in zip(self.roots, ("encoder", "decoder"), strict=True):
            root.requires_grad_(config.model.trained in ("both", name))
        self.compiled = compile_in_place(self.roots, config.compile, world.device)
        shard(self.roots, world.mesh, self.dtype)
        self.parameters = dict(self.model.named_parameters())
        is_sharded = world.mesh["shard"].size() > 1
        shard_group = world.mesh["shard"].get_group() if is_sharded else None
        self.masters = None
        if config.parallelism.cpu_offload:
            self.masters = Masters(self.parameters.values())
        self.optimizer = new_optimizer(
            *self.roots, config.optim, shard_group, self.masters
        )
        self.ema = Ema(self.parameters, config.optim.ema_decay, self.masters)
        self.seraena = None
        if config.seraena.enable:
            self.seraena = self._build_seraena(shard_group)
        self.training_step = TrainingStep(
            self.model,
            self.roots,
            self.optimizer,
            self.ema,
            config.loss,
            uses_cuda_graph(config.compile, config.seraena, self.world.device),
            self.seraena,
        )

    def _build_seraena(self, shard_group: dist.ProcessGroup | None) -> Seraena:
        config, world, settings = self.config, self.world, self.config.seraena
        discriminator = new_discriminator(
            settings, self.model.variant, config.training.seed
        ).to(world.device, self.exact)
        compile_in_place([discriminator], config.compile, world.device)
        shard([discriminator], world.mesh, self.dtype)
        like = torch.empty(0, dtype=self.exact, device=world.device)
        shapes, variant = config.data.shapes, self.model.variant
        views = {
            shape[:3]: new_view(
                settings, variant, shape[:3], clips // world.size, 1 / len(shapes), like
            )
            for shape, clips in zip(shapes, self.buckets.clips, strict=True)
        }
        return Seraena(discriminator, settings, views, like, shard_group)

    def _local_batch(self) -> LocalBatch:
        model, data, device = self.config.model, self.config.data, self.world.device
        gpu = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"
        sizes = (" x ".join(map(str, shape[:3])) for shape in data.shapes)
        kind = f"{' or '.join(sizes)}, {model.variant}, {self.dtype} on {gpu}"
        kind += self._memory_told()
        path = self.folder / "local_batch.json"
        local_batch = LocalBatch(self.config.training, data, path, kind)
        local_batch.choose(self._attempt)
        return local_batch

    def _memory_told(self) -> str:
        """What else decides how much memory a clip takes, where it is not as usual."""
        config = self.config
        told = {
            config.model.trained + " alone": config.model.trained != "both",
            "activation checkpointing": config.training.activation_checkpointing,
            "CPU offload": config.parallelism.cpu_offload,
            "guidance": config.seraena.enable,
            "consistency": bool(config.loss.consistency_weight),
            f"teacher {config.teacher.kind}": self.teacher is not None,
        }
        return "".join(f", {name}" for name, is_so in told.items() if is_so)

    def _attempt(self, clips: int) -> None:
        """A forward and backward pass on a copy of the model, not compiled."""
        student = TAEHV(self.config.model.variant).to(self.world.device, self.dtype)
        student.fused = self.config.compile.fused
        student.checkpointing = self.config.training.activation_checkpointing
        roots = student.encoder, student.decoder
        for root, own in zip(roots, self.roots, strict=True):
            root.requires_grad_(next(own.parameters()).requires_grad)
            if self.dtype == torch.bfloat16:
                cast_at_borders(root, self.dtype)
        batch = collate(self.clips.__getitems__(list(range(clips))))
        losses = training_losses(student, self._targets(batch), self.config.loss)
        losses["loss"].backward()

    def _build_teacher(self) -> None:
        self.teacher = load_teacher(
            self.config.teacher, self.world.device, self.compiled
        )
        if self.teacher is not None and self.cache is not None:
            written_with = self.cache.about["teacher"].get("fingerprint")
            if self.teacher.fingerprint != written_with:
                raise UserError(
                    f"data.cache = {self.config.data.cache} was written with another "
                    "teacher, or other settings of it: take those, leave teacher.kind "
                    "empty, or write the cache anew"
                )
            self.teacher = None  # its latents are there
        if self.teacher is not None:
            channels = self.model.variant.latent_channels
            judged = self.config.validation_data.usual_shape
            for shape in {*self.config.data.shapes, judged}:
                check_teacher(self.teacher, channels, *shape[:3])

    def _open_log(self) -> RunLog:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            config = self.folder / "config.toml"
            is_told = self._is_done() and config.exists()  # what it was trained with
            if not is_told:
                write_text(config, settings_for_readers(self.config))
            run_log = RunLog(
                self.folder,
                self.config.logging,
                self.counts.step,
                self.config.training.steps,
            )
        except OSError as error:
            raise UserError(
                f"cannot write to {self.folder} ({error.strerror}): make room, or set "
                "job.output_dir to a folder that you may write to"
            ) from None
        if not is_told:
            run_log.board.text("config", f"```\n{dumps(self.config)}\n```")
        self._announce()
        return run_log

    def _announce(self) -> None:
        config, world = self.config, self.world
        size = sum(parameter.numel() for parameter in self.parameters.values()) / 1e6
        device = (
            torch.cuda.get_device_name() if world.device.type == "cuda" else "the CPU"
        )
        data = config.data
        log.info(
            f"{config.model.variant}, {size:.1f} M parameters, {self.dtype} on "
            f"{device} x {world.size}, {config.parallelism.mode}"
            + (", compiled" if self.compiled else "")
            + (", as a CUDA graph" if self.training_step.graph else "")
        )
        log.info(
            f"{len(self.sources)} {'windows' if self.cache else 'files'} to train on, "
            f"{len(self.held_out)} held out; "
            + " or ".join(
                f"{clips} clips a step of {' x '.join(map(str, shape[:3]))}"
                for shape, clips in zip(data.shapes, self.buckets.clips, strict=True)
            )
            + (f", {crops} of a window" if (crops := data.crops_per_window) > 1 else "")
        )
        if self.seraena is not None:
            log.info(str(self.seraena))
        self._warn()

    def _warn(self) -> None:
        """Of what will not be done, whatever the settings say."""
        config = self.config
        warn_if_idle(config.seraena, config.training.steps)
        wanted, own = config.validation_data.usual_shape, config.data.usual_shape
        if wanted not in (own, self.judged_shape):
            sizes = " x ".join(map(str, self.judged_shape[:3]))
            log.warning(
                f"validation clips are those of the cache, {sizes}: the sizes in "
                "[validation] count when it is written"
            )
        if not len(self.held_out) and config.validation.clips:
            log.warning(
                "validation is off: "
                + (
                    "the cache has no validation windows"
                    if self.cache
                    else "there is one video file only, and a file is trained on or "
                    "held out, never both"
                )
            )

    # --- resuming ------------------------------------------------------------------

    def _state(self) -> dict[str, dict[str, Tensor]]:
        counts = {
            **asdict(self.counts),
            "seed": self.config.training.seed,
            "files": len(self.sources),
            "files_hash": self._clips_hash(),
            "sampler_version": SAMPLER_VERSION,
        }
        groups = self.seraena.state(self.world.rank) if self.seraena else {}
        groups["gradients"] = {"norms": self.optimizer.norms}
        groups[BEST_GROUP] = self.best.state()
        return training_state(
            self.parameters, self.ema, self.optimizer, counts, **groups
        )

    def _clips_hash(self) -> int:
        return int(self.fingerprint[:15], 16)

    def _resume(self, origin: Folder) -> None:
        state = self._state()
        expected = {key: value.item() for key, value in state["counts"].items()}
        variant = self.config.model.variant
        made_as = read_about(origin).get("variant", variant)
        if made_as != variant:
            raise UserError(
                f"{origin} is of model.variant {made_as}, not "
                f"{variant}: take that, or choose another --job.name"
            )
        self._check_optimizer(origin)
        optional = (SERAENA_GROUPS | {"gradients", BEST_GROUP}) & state.keys()
        filled = load(origin, state, optional)
        if self.masters is not None:
            self.masters.refresh()
        loaded = {key: value.item() for key, value in state["counts"].items()}
        self._check_unchanged(origin, loaded, expected)
        self.counts = Counts(**{key: loaded[key] for key in asdict(self.counts)})
        # Other buckets than before, if allowed, have their steps elsewhere.
        self.counts.samples = self.buckets.aligned(self.counts.samples)
        log.info(f"resuming from {origin}")
        if self._is_done():
            log.info(
                f"training.steps = {self.config.training.steps}, and "
                f"{self.counts.step} are done: nothing is left to train; raise it, or "
                "choose another job.name"
            )
        if BEST_GROUP in filled:
            self.best.load(state[BEST_GROUP])
        if self.seraena is not None:
            self.seraena.go_on(self.counts.step, filled)

    def _is_done(self) -> bool:
        return self.counts.step >= self.config.training.steps

    def _check_optimizer(self, origin: Folder) -> None:
        """Refuse the state of another one, which has nothing that this one needs."""
        changed = changes(read_config(origin), self.config)
        if "optim.optimizer" in changed:
            old, new = changed["optim.optimizer"]
            raise UserError(
                f"{origin} has the state of optim.optimizer {old}, not {new}: take "
                "that, or start from its weights by --model.checkpoint in another "
                "--job.name"
            )

    def _catch_up(self) -> None:
        """See the validations that the checkpoint does not know of (a collective)."""
        told = [self.log.validations if self.log else []]
        dist.broadcast_object_list(told, src=0)
        for record in told[0]:
            self.best.see(record)

    def _check_unchanged(
        self, origin: Folder, before: dict[str, int], now: dict[str, int]
    ) -> None:
        """Refuse what makes resuming wrong, and name what changes the run's course."""
        names = {
            "seed": "training.seed",
            "sampler_version": "this program's sampler",
            "files": "the number of training files",
            "files_hash": "the training files, their shares or the buckets",
        }
        for key, name in names.items():
            is_data = key.startswith("files")
            if before[key] == now[key]:
                continue
            if not (is_data and self.config.checkpoint.allow_changed_data):
                allow = ", set checkpoint.allow_changed_data" if is_data else ""
                raise UserError(
                    f"cannot go on from {origin}: {name} has changed since; take it "
                    f"back{allow}, or choose another --job.name"
                )
            if self.world.is_main:
                log.warning(f"{name} has changed since {origin}, as allowed")
        changed = changes(read_config(origin), self.config)
        for key, (old, new) in changed.items() if self.world.is_main else ():
            log.warning(f"not the settings of {origin}: {key}: {old} -> {new}")

    def _count_bad_clips(self) -> None:
        """Those since the last save on all processes (a collective)."""
        self.counts.bad_clips += int(sum_over_ranks(torch.tensor(self.bad_clips)))
        self.bad_clips = 0

    def _save(self) -> None:
        self._count_bad_clips()
        self.exports.retry()
        texts = texts_beside(self._about(), dumps(self.config))
        self.checkpointer.save(self.counts.step, self._state(), texts)

    def _tell_saved(self, saved: Saved) -> None:
        if self.log is not None:
            speed = {"save_blocked_ms": saved.blocked_ms, "save_seconds": saved.seconds}
            self.log.scalars(saved.step, speed)

    # --- the loop ------------------------------------------------------------------

    def run(self) -> None:
        """Train to the last step, or until told to stop; then export."""
        config, steps = self.config, self.config.training.steps
        if not self._is_validated():
            self._validate()
        self.is_stale = self._has_no_patience()
        loader = self._loader()
        self.bottleneck = Bottleneck(config.data, loader.workers)
        self.noted = time.monotonic()
        gc.collect()
        gc.freeze()  # what is there stays, and need not be looked at again
        gc.disable()
        try:
            while (
                self.counts.step < steps
                and not self.is_stale
                and not self.stop.agreed()
            ):
                self._step(loader)
                self.checkpointer.poll()
                if self.counts.step % config.training.gc_interval == 0:
                    gc.collect()
                    self.memory.check()
                last = self.counts.step == steps
                # Saved first: a validation that fails or is killed costs itself.
                if last or self.counts.step % config.checkpoint.interval == 0:
                    self._between_steps(self._save)
                if self._is_exported():
                    self._between_steps(self._export_step)
                if last or self.counts.step % config.validation.interval == 0:
                    self._between_steps(self._validate)
            self._settle()
        except torch.cuda.OutOfMemoryError:
            raise self.local_batch.ran_out(self.counts.step) from None
        finally:
            gc.enable()
            gc.unfreeze()
            loader.close()
            self.training_step.release()
        self._finish()

    def _between_steps(self, action: Callable[[], None]) -> None:
        """Do what needs all steps to be done, and count its time to none of them."""
        self._settle()
        self._progress("saving or validating", is_long=True)
        action()
        self.noted = time.monotonic()

    def _progress(self, doing: str, is_long: bool = False) -> None:
        """Tell the watchdog what is done now, which may last as the settings say."""
        training = self.config.training
        is_long = is_long or not self.is_under_way
        limit = training.start_timeout if is_long else training.step_timeout
        self.watchdog.progress(f"step {self.counts.step + 1}, {doing}", limit)

    def _is_validated(self) -> bool:
        """Whether the step that the run begins at has had the validation it is due."""
        step, settings = self.counts.step, self.config.validation
        due = step in (0, self.config.training.steps) or step % settings.interval == 0
        done = self.log is not None and step in [
            v["step"] for v in self.log.validations
        ]
        return bool(from_main(done or not due))

    def _batch_parts(self) -> int:
        """Forward passes on this process in one step."""
        share = self.config.training.global_batch_size // self.world.size
        return share // self.local_batch.clips

    def _loader(self) -> ClipLoader:
        training = self.config.training
        steps = Steps(
            self.counts.samples,
            training.global_batch_size,
            self.local_batch.clips,
            self.world.rank,
            self.world.size,
            buckets=self.buckets,
        )
        return ClipLoader(self.clips, steps, self.world.device.type == "cuda")

    def _step(self, loader: Iterator[Batch]) -> None:
        begin = time.monotonic()
        self._progress("waiting for data")
        batches = [next(loader) for _ in range(self._batch_parts())]
        waited = time.monotonic() - begin
        self._progress("training")
        for batch in batches:
            self._note_failures(batch)
        rate = learning_rate(
            self.counts.step, self.config.training.steps, self.config.optim
        )
        targets = [self._targets(batch) for batch in batches]
        result = self.training_step(targets, self.counts.step, rate)
        self.counts.step += 1
        clips = self.buckets.clips[self.buckets.of_sample(self.counts.samples)]
        self.counts.samples += clips
        counts = self.counts
        self.pending.append(
            Pending(counts.step, counts.samples, clips, rate, batches, waited, result)
        )
        self._settle(STEPS_AHEAD if self.world.device.type == "cuda" else 0)

    def _settle(self, steps_ahead: int = 0) -> None:
        """Note the steps that are done, letting the device be some steps behind."""
        while len(self.pending) > steps_ahead:
            self._note(self.pending.popleft())
            self.is_under_way = True

    def _note(self, done: Pending) -> None:
        names, values = done.result.names, done.values()
        record = dict(zip(names, values, strict=False))
        norm, is_applied, *losses = values[len(names) :]
        if "mse" in record:
            record["psnr"] = psnr(torch.tensor(record.pop("mse"))).item()
        self.bad_in_row = 0 if is_applied else self.bad_in_row + 1
        self.counts.skipped += not is_applied
        if not is_applied:
            self._tell_skipped(done, values[0], norm, losses)
        elif self.collapse.see(record):
            log.warning(f"step {done.step}: {self.collapse}")
        record |= {
            "grad_norm": norm,
            "learning_rate": done.rate,
            "samples": done.samples,
            "skipped": self.counts.skipped,
        }
        seconds = time.monotonic() - self.noted
        self.noted += seconds
        self.bottleneck.add(done.batches, done.waited, seconds)
        if self.log is not None:
            if line := self.bottleneck.line():
                log.warning(line)
            speed = {
                "clips_per_second": done.clips / seconds,
                "data_wait": done.waited / seconds,
                **memory_peaks(self.world.device),
                **self._diversity(done.batches),
                **self.bottleneck.values(),
            }
            self.log.step({"step": done.step, **record}, speed)

    def _diversity(self, batches: list[Batch]) -> dict[str, int]:
        """How many different windows and files this process's part of a step is of."""
        numbers = itertools.chain(*(batch.numbers for batch in batches))
        crops = self.config.data.crops_per_window
        files = set().union(*(batch.sources for batch in batches))
        return {
            "data/distinct_windows": len({number // crops for number in numbers}),
            "data/distinct_files": len(files),
        }

    def _targets(self, batch: Batch) -> Targets:
        frames_NTCHW = self.upload(batch)
        targets = Targets(frames_NTCHW)
        device = self.world.device
        if batch.latents_NTCHW is not None:
            targets.latents_NTCHW = batch.latents_NTCHW.to(
                device, self.exact, non_blocking=True
            )
            frames = self.model.variant.target_frames(frames_NTCHW.shape[1])
            masks = judged(
                self.model.variant,
                batch.lead_N,
                batch.latents_NTCHW.shape[1],
                frames,
            )
            targets.judged_latents_NT, targets.judged_frames_NT = (
                mask.to(device, non_blocking=True) for mask in masks
            )
        if self.teacher is not None:
            with torch.no_grad():
                latents_NTCHW = self.teacher.encode(frames_NTCHW, batch.numbers)
            targets.latents_NTCHW = latents_NTCHW.to(self.exact)
        if self.config.loss.decoder_latents == "mixture":
            own_N = toss(self.config.training.seed, batch.numbers)
            targets.own_N = own_N.to(self.world.device, non_blocking=True)
        if self.seraena is not None:
            _, T, _, H, W = frames_NTCHW.shape
            seed = self.config.training.seed
            draws_NG3 = self.seraena.draws(seed, batch.numbers, (T, H, W))
            targets.draws_NG3 = draws_NG3.to(self.world.device, non_blocking=True)
        return targets

    def _tell_skipped(
        self, done: Pending, mean: float, norm: float, losses: list[float]
    ) -> None:
        """Name a skipped step's clips, the bad ones alone if they can be told."""
        is_spike = math.isfinite(mean) and math.isfinite(norm)
        cause = "its loss or gradient is not finite"
        if is_spike:
            cause = f"its gradient's norm of {norm:.3g} is a spike"
        sources = [batch.sources for batch in done.batches]
        bad = [
            named
            for named, loss in zip(sources, losses, strict=True)
            if not math.isfinite(loss) or (is_spike and loss > 1.5 * mean)
        ]
        if self.log is not None or bad:
            named = itertools.chain(*(bad or sources))
            log.warning(
                f"step {done.step} is skipped, {cause}; its clips are of "
                f"{', '.join(named)}"
            )
        if self.bad_in_row >= self.config.training.max_bad_steps:
            cure = "lower optim.lr"
            if is_spike:
                cure += " or raise optim.spike_factor"
            raise UserError(
                f"{self.bad_in_row} steps in a row had no "
                f"{'usual' if is_spike else 'finite'} gradient: {cure}, or look at the "
                "clips named above; the last good checkpoint is in "
                f"{self.checkpointer.folder}"
            )

    def _note_failures(self, batch: Batch) -> None:
        self.bad_clips += len(batch.failures)
        for failure in batch.failures:
            if failure.path not in self.bad_files:
                self.bad_files.add(failure.path)
                log.warning(f"replaced a clip of a bad video: {failure}")

    # --- judging and handing over --------------------------------------------------

    def _whole_ema(self) -> dict[str, Tensor]:
        return {name: full(weight) for name, weight in self.ema.weights.items()}

    def _own_part(self, total: int) -> range:
        rank, size = self.world.rank, self.world.size
        return range(total * rank // size, total * (rank + 1) // size)

    def _is_taught(self) -> bool:
        return self.cache is not None or self.teacher is not None

    def _validation_batches(self) -> Iterator[Batch]:
        """This process's part; a cache has a number of clips of its own."""
        # As many pixels at a time as in training, or less.
        times = self.judged_shape.pixels / self.config.data.usual_shape.pixels
        size = max(1, int(self.local_batch.clips / max(1.0, times)))
        if self.cache is not None:
            windows = self.cache.validation
            return cached_batches(windows, self._own_part(len(windows)), size)
        data, total = self.config.validation_data, self.config.validation.clips
        return validation_batches(
            data, self.held_out, self._own_part(total), total, size
        )

    def _watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self._progress("validating", is_long=True)
            yield batch

    def _validate(self) -> None:
        settings = self.config.validation
        if self.seraena is not None and self.log is not None:
            self._show_seraena()
        if not settings.clips or not len(self.held_out):
            return
        weights = self._whole_ema()
        for name, weight in weights.items():
            self.judge.get_parameter(name).data.copy_(weight)
        result = validate(
            self.judge,
            self.teacher,
            self._watched(self._validation_batches()),
            self.world.device,
            self.stop,
            is_taught=self._is_taught(),
            extra=self.extra,
        )
        if self.stop.agreed():
            return
        if result is None:
            raise UserError(
                "none of the held-out clips can be decoded: see the reasons above, "
                "name other files in data.holdout, or lower validation.frames"
            )
        is_missing = settings.best and settings.best not in result.means
        if is_missing and not self.counts.step:
            raise UserError(
                f"validation.best = {settings.best} is not measured here: take one of "
                f"{', '.join(result.means)}"
            )
        self.best.see({"step": self.counts.step, **result.scalars()})
        best = self.best.best
        # The weights that a run begins with are there. Told last: a validation that is
        # told is not repeated.
        if best is not None and best.step == self.counts.step > 0:
            self.exports.write("best", "best", weights, self._about())
        if self.log is not None:
            tell(result, self.log, self.counts.step, self.folder)
        self.is_stale = self._has_no_patience()

    def _has_no_patience(self) -> bool:
        """Whether too many validations in a row were no better."""
        best, patience = self.best.best, self.config.validation.patience
        return best is not None and 0 < patience <= best.since

    def _show_seraena(self) -> None:
        picture = self.seraena.picture()
        if picture is not None:
            name = "seraena/true_decoded_corrected_and_score_maps"
            self.log.board.picture(name, picture, self.counts.step)

    def close(self) -> None:
        """Write those records that still wait for the disk, or tell what is lost."""
        if self.log is not None:
            self.log.close()

    def _finish(self) -> None:
        """See that the last step is saved, export the weights, sum up."""
        self._progress("finishing", is_long=True)
        self.checkpointer.wait()
        while self.checkpointer.saved_step != self.counts.step:
            self._progress("saving", is_long=True)
            self._save()
            self.checkpointer.wait()
        self._progress("finishing", is_long=True)
        self._count_bad_clips()
        self.close()
        if self.counts.step < self.config.training.steps and not self.is_stale:
            log.info(
                f"stopped at step {self.counts.step}: saved to "
                f"{self.checkpointer.path(self.counts.step)}; the same command goes on"
            )
            return
        name = self.config.model.variant
        self.exports.write("last", name, self._whole_ema(), self._about())
        if self.exports.missing:
            raise UserError(
                f"cannot export {' and '.join(self.exports.missing)} to "
                f"{self.exports.folder} ({self.exports.reason}): make room, and the "
                "same command exports the last weights"
            )
        if self.log is not None:
            print(self._summary(), flush=True)

    def _about(self) -> dict[str, str]:
        """What the weights are, for whoever loads them."""
        settings = dumps(self.config).encode()
        latent_space = self.model.variant.latent_space if self._is_taught() else "own"
        return {
            "variant": self.config.model.variant,
            "latent_space": latent_space,
            "step": str(self.counts.step),
            "config_sha256": hashlib.sha256(settings).hexdigest(),
        }

    def _export_step(self) -> None:
        name = f"step-{self.counts.step}/{self.config.model.variant}"
        self.exports.write("step", name, self._whole_ema(), self._about())

    def _is_exported(self) -> bool:
        step, interval = self.counts.step, self.config.checkpoint.export_interval
        return bool(interval) and step % interval == 0

    def _summary(self) -> str:
        folder, step, run = self.folder, self.counts.step, self.log
        lines = ["", f"{self.config.job.name}: {step} steps done"]
        if self.is_stale:
            lines[-1] += ", ended early by validation.patience"
        if run.validations:
            first, last = run.validations[0], run.validations[-1]
            before = f"{_db(first['psnr'])} at step {first['step']}, "
            lines += [
                f"  validation PSNR  {before if first is not last else ''}"
                f"{_db(last['psnr'])} at step {last['step']} (painting each clip in "
                f"its mean colour: {_db(last['mean_color_psnr'])})",
                f"  pictures         {folder}/samples/step-{step}.png",
                f"  video            {folder}/samples/step-{step}.mp4",
            ]
        lines += [
            f"  weights          {folder}/export/{self.config.model.variant}.pth "
            "and .safetensors",
            *self._told_best(),
            f"  checkpoint       {self.checkpointer.path(step)}",
            f"  skipped          {self.counts.skipped} steps, {self.counts.bad_clips} "
            "clips of bad videos replaced",
            f"  curves           tensorboard --logdir {quote(f'{folder}/tensorboard')}",
            f"  report           python -m taehv.report {quote(str(folder))}",
            "  next             train longer: raise --training.steps",
        ]
        if Path(self.config.data.root) == SAMPLES:
            lines[-1] += (
                "; on your own videos: CONFIG_FILE=train_configs/autoencoder.toml "
                "./run_train.sh --data.root FOLDER --job.name NAME"
            )
        return "\n".join(lines)

    def _told_best(self) -> list[str]:
        best, name = self.best.best, self.best.name
        if best is None or best.step in (0, self.counts.step):
            return []
        if self.exports.about("best").get("step") != str(best.step):
            return [f"  best so far      {name} {best.value:.4g} at step {best.step}"]
        return [
            f"  best weights     {self.folder}/export/best.pth and .safetensors: "
            f"{name} {best.value:.4g} at step {best.step}"
        ]


def _db(psnr: float | None) -> str:
    return "not finite" if psnr is None else f"{psnr:.2f} dB"
