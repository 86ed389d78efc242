"""Recipes compared: the trainer's own step, on clips that wait in the device's memory.

The arms of a study are trained one after the other, on each GPU of the machine. Their
results are kept, so that another call goes on where one has ended.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taehv.augment import to_frames
from taehv.bench import Bench, Student
from taehv.clips import Batch
from taehv.config import dumps
from taehv.data import validation_batches
from taehv.distributed import (
    StopSignal,
    World,
    compute_dtype,
    started,
    uses_compile,
)
from taehv.errors import UserError, run_command
from taehv.files import Files, Source
from taehv.index import build_file_lists
from taehv.logging import log, set_up_console
from taehv.measure import synchronize
from taehv.metrics import clip_psnr
from taehv.model import TAEHV
from taehv.perceptual import load_measures
from taehv.pool import Pool
from taehv.pretrained import initial_model
from taehv.sections import Config, Data, Parallelism
from taehv.seraena import CollapseWatch, warn_if_idle
from taehv.shards import full
from taehv.step import StepResult
from taehv.study import (
    GUIDANCE,
    Record,
    Results,
    Study,
    Task,
    file_name,
    settings_told,
    write_report,
)
from taehv.teacher import check_teacher, load_teacher
from taehv.validate import ValidationResult, validate
from taehv.variants import VARIANTS
from taehv.visualize import to_uint8
from taehv.weights import save_weights

WARMUP_STEPS, TIMED_STEPS, TIMED_SECONDS = 8, 60, 2.0
"""Steps before and while the time of a step is measured, the latter at most so long;
the first ones are those of each kind where the discriminator does not learn in all."""
BESIDE_SECONDS = 120.0
"""What is allowed for beside the first training: decoding, compiling, judging."""
LEAST_BESIDE_SECONDS = 15.0
"""And beside any other, of which some are of clips of a new shape."""
BATCH = 16
"""Held-out clips that are coded at a time."""
SHOWN_FRAMES = 3
MISTAKE = 2
"""Exit code of a mistake in the study, which another process would meet too."""


@dataclass(frozen=True)
class Pace:
    """How long steps take: the first ones and others, of guidance or larger clips."""

    first_steps: int
    first: float
    later: float

    def seconds(self, steps: int) -> float:
        """Of so many steps from the start."""
        first = min(steps, self.first_steps)
        return first * self.first + (steps - first) * self.later

    def steps(self, seconds: float) -> int:
        """As many as fit into a time."""
        first = min(seconds, self.first_steps * self.first)
        return round(first / self.first + (seconds - first) / self.later)


@dataclass(frozen=True)
class Job:
    """What all processes know."""

    study: Path
    stages: list[str] | None
    given: dict[str, Any]
    output: Path
    also: str
    end: float
    """By time.time(): no training begins that would not be done by then."""

    def read(self) -> tuple[Study, Results]:
        """The study and what is known of it."""
        study = Study.read(self.study, self.given)
        return study.of_stages(self.stages), Results(self.output)


def bench_recipe(bench: Bench) -> None:
    """Train what is not yet done of a study, and write its tables and pictures."""
    options = bench.options
    if not options.root:
        raise UserError("--recipe needs --root: a folder of videos")
    limit = math.inf if options.seconds_limit is None else options.seconds_limit
    if not limit > 0:
        raise UserError(f"--seconds-limit {limit:g} must be above 0")
    own = {"data.root": options.root, "training.device": bench.device.type}
    given = own | dict(_given(text, own) for text in options.set or [])
    also, end = options.also or "", time.time() + limit
    job = Job(options.study, options.stages, given, options.output, also, end)
    study, results = job.read()
    left = before = _left(job, study, results)
    processes = min(torch.cuda.device_count(), len(left))
    if processes:
        _train_in_processes(job, left, processes)
    else:
        train_tasks(job, bench.world, iter(left))
    whole = Study.read(job.study, job.given)
    told = [f"{options.study}, {options.root}", *(options.set or [])]
    told += [f"--also {also}"] if also else []
    bench.report.say(write_report(whole, results, ", ".join(told)))
    left = _left(job, study, results)
    if left:
        bench.report.say(f"{len(left)} trainings are left: the same command goes on")
    if left and len(left) == len(before) and limit < math.inf:
        bench.report.say(
            f"none began: the first takes {BESIDE_SECONDS:.0f} s beside its own time, "
            "give a longer --seconds-limit"
        )


def _left(job: Job, study: Study, results: Results) -> list[Task]:
    """What is not done yet, or was done with other videos of --also, or none."""
    done = results.read()
    return [
        task
        for task in study.tasks
        if task.key not in done
        or (job.also and done[task.key]["also"].get("of") != job.also)
    ]


def _given(text: str, own: Mapping[str, str]) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or "." not in key:
        raise UserError(f"--set {text}: give section.setting=value")
    if key in (*own, "data.cache"):
        raise UserError(
            f"--set {key}: videos come from --root, and the device from --device"
        )
    return key, value


def _train_in_processes(job: Job, left: list[Task], processes: int) -> None:
    """On all GPUs at once; each takes the next task that no other has taken.

    A training that ends its process costs itself: another process takes the next one.
    """
    context = torch.multiprocessing.get_context("spawn")
    taken = context.Value("i", 0)

    def begin(rank: int) -> SpawnProcess:
        # The child has these from its first import.
        os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
        keys = [task.key for task in left]
        process = context.Process(target=_train_aside, args=(job, keys, taken))
        process.start()
        del os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]
        return process

    running = {rank: begin(rank) for rank in range(processes)}
    while running:
        wait([process.sentinel for process in running.values()])
        for rank, process in list(running.items()):
            if process.exitcode is None:
                continue
            del running[rank]
            if process.exitcode:
                log.warning(f"a training failed, exit code {process.exitcode}")
                if process.exitcode != MISTAKE and taken.value < len(left):
                    running[rank] = begin(rank)


def _train_aside(job: Job, keys: list[str], taken: Any) -> None:
    run_command(functools.partial(_train_taken, job, keys, taken))


def _train_taken(job: Job, keys: list[str], taken: Any) -> None:
    study, _ = job.read()
    by_key = {task.key: task for task in study.tasks}

    def tasks() -> Iterator[Task]:
        while True:
            with taken.get_lock():
                number, taken.value = taken.value, taken.value + 1
            if number >= len(keys):
                return
            yield by_key[keys[number]]

    with started(Parallelism(), "auto") as world:
        set_up_console(world.rank)
        train_tasks(job, world, tasks())


def train_tasks(job: Job, world: World, tasks: Iterator[Task]) -> None:
    """Train each in turn and note what it found, as long as there is time."""
    study, results = job.read()
    lab, beside = None, BESIDE_SECONDS
    for task in tasks:
        begin = time.time()
        if begin + task.seconds + beside > job.end:
            log.info(f"no time is left for {task.arm} of {task.stage}")
            return
        lab = lab or Lab(study, results, job.also, world)
        results.add(lab.train(task))
        beside = max(LEAST_BESIDE_SECONDS, time.time() - begin - task.seconds)


@dataclass
class Held:
    """Held-out clips on the device, with a teacher's latents if there is one."""

    batches: list[Batch]
    frames: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.frames = [to_frames(b, b.frames_NTHWC.device) for b in self.batches]


class Lab:
    """One process's clips and models, which serve one arm after the other."""

    def __init__(self, study: Study, results: Results, also: str, world: World) -> None:
        self.study, self.results, self.world = study, results, world
        self.device = world.device
        is_gpu = self.device.type == "cuda"
        self.device_name = torch.cuda.get_device_name() if is_gpu else "the CPU"
        config = study.config()
        _check_weights(study)
        # The teacher is compiled where the models are.
        compiled = uses_compile(config.compile, self.device)
        self.teacher = load_teacher(config.teacher, self.device, compiled)
        self._check_teacher()
        train, held_out = build_file_lists(config.data)
        self.held = self._held(config, held_out)
        self.also, self.also_of = None, also
        if also:
            self.also = self._held(config, _files_of(also, config.data.images))
        log.info(f"decoding {study.pool.windows} windows of {len(train)} files")
        self.pool = Pool.decoded(
            config.data, train, study.pool, self.device, self.teacher
        )
        measures = config.validation
        self.extra = load_measures(
            measures.lpips, measures.st_lpips, measures.vmaf, self.device
        )
        self.student: Student | None = None
        self.built_by = ""
        self.judge: TAEHV | None = None
        self.paces: dict[str, Pace] = {}

    def _check_teacher(self) -> None:
        """Whether it takes the windows, and has latents that all arms learn."""
        if self.teacher is None:
            return
        variants = {task.config.model.variant for task in self.study.tasks}
        for variant in variants:
            channels = VARIANTS[variant].latent_channels
            try:
                check_teacher(self.teacher, channels, *self.study.pool.shape)
            except UserError as error:
                raise UserError(f"windows of [pool], {variant}: {error}") from None

    def _held(self, config: Config, files: Files) -> Held:
        clips, data = self.study.scale.clips, config.validation_data
        if not len(files):
            raise UserError("no video is held out: name some in data.holdout")
        whole = []
        for batch in validation_batches(data, files, range(clips), clips, BATCH):
            for failure in batch.failures:
                log.warning(f"left out a held-out clip, {failure}")
            if len(batch.frames_NTHWC):
                # Told once, and not again in each judging.
                whole.append(self._on_device(replace(batch, failures=[])))
        if not whole:
            raise UserError("none of the videos to judge by can be decoded: see above")
        return Held(whole)

    def _on_device(self, batch: Batch) -> Batch:
        frames_NTHWC = batch.frames_NTHWC.to(self.device)
        batch = replace(batch, frames_NTHWC=frames_NTHWC)
        if self.teacher is None:
            return batch
        latents_NTCHW = self.teacher.encode(
            to_frames(batch, self.device), batch.numbers
        )
        return replace(batch, latents_NTCHW=latents_NTCHW)

    def train(self, task: Task) -> Record:
        """Train an arm for its time; returns what it found."""
        training, pace = task.config.training, self._pace(task)
        if task.seconds:
            training = replace(training, steps=max(2, pace.steps(task.seconds)))
        student = self._begun(replace(task.config, training=training))
        before = self._also(student)
        warn_if_idle(task.config.seraena, training.steps, f"{task.stage}, {task.arm}: ")
        told = settings_told(task) | {
            "device": self.device_name,
            "steps": training.steps,
            "step_ms": 1000 * pace.seconds(training.steps) / training.steps,
            **self._curve(student, pace, task),
        }
        for weights in ("raw", "ema"):
            result = self._judged(self._judge(student, weights))
            told[weights] = {k: e.mean for k, e in result.means.items()}
            if result.latents is not None:
                told[weights] |= result.latents.scalars()
        after = self._also(student)
        told["also"] = {"of": self.also_of, "before": before, "after": after}
        self._save_frames(task, result)
        if task.keep:
            self._save_weights(task, student)
        log.info(
            f"{task.stage}, {task.arm}, seed {task.seed}: {training.steps} steps of "
            f"{told['step_ms']:.2f} ms, PSNR {told['raw']['psnr']:.2f} dB, averaged "
            f"{told['ema']['psnr']:.2f}"
        )
        return told

    def _curve(self, student: Student, pace: Pace, task: Task) -> Record:
        """Train to the last step; returns the PSNR on the way there, and the losses."""
        curve, found, spent = [], [], 0.0
        for point in points(student.config.training.steps, self.study.scale.points):
            begin = time.perf_counter()
            while student.steps < point:
                is_later = task.later and student.steps >= pace.first_steps
                data = task.later if is_later else task.config.data
                found.append(self._step(student, data))
            synchronize(self.device)
            spent += time.perf_counter() - begin
            values = {
                weights: self._psnr(self._judge(student, weights), self.held)
                for weights in ("raw", "ema")
            }
            curve.append({"seconds": pace.seconds(point), **values})
        told = told_losses(told_steps(found))
        return {"curve": curve, "spent": spent, **told}

    def _begun(self, config: Config) -> Student:
        """A student at the beginning of a training, compiled once for many."""
        told = _built_by(config)
        if self.student is not None and told and told == self.built_by:
            self.student.restart(config)
            self._free()
            return self.student
        self.student = None
        self._free()
        self.student, self.built_by = Student(config, self.world), told
        # There is nothing to upload.
        self.student.upload = functools.partial(
            to_frames, device=self.device, dtype=self.student.exact
        )
        return self.student

    def _free(self) -> None:
        """Let go of the graphs of the training before, but not of compiled code."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _step(self, student: Student, data: Data) -> StepResult:
        """Train by a batch of such clips."""
        config = student.config
        size = config.training.global_batch_size
        numbers = range(student.steps * size, (student.steps + 1) * size)
        variant, seed = student.model.variant, config.training.seed
        return student(self.pool.batch(variant, data, seed, numbers))

    def _pace(self, task: Task) -> Pace:
        """The times of steps of a task's settings."""
        config = task.config
        kind = dumps(replace(config, training=replace(config.training, seed=0)))
        kind += str(task.later or "")
        if kind not in self.paces:
            student = self._begun(config)
            first = config.seraena.start_step if config.seraena.enable else 0
            starts = sorted({0, first})
            times = [self._timed(student, config.data, step) for step in starts]
            if task.later:
                times.append(self._timed(student, task.later, first))
            self.paces[kind] = Pace(first, times[0], times[-1])
        pace = self.paces[kind]
        if task.later:
            steps = task.config.training.steps
            if task.seconds:
                steps = round(2 * task.seconds / (pace.first + pace.later))
            pace = replace(pace, first_steps=steps // 2)
        return pace

    def _timed(self, student: Student, data: Data, begin: int) -> float:
        """The mean time of steps from one on, of such clips."""
        student.steps = begin
        for _ in range(WARMUP_STEPS * student.config.seraena.interval):
            self._step(student, data)
        synchronize(self.device)
        start, count = time.perf_counter(), 0
        while count < TIMED_STEPS and time.perf_counter() - start < TIMED_SECONDS:
            self._step(student, data)
            count += 1
        synchronize(self.device)
        return (time.perf_counter() - start) / count

    # --- judging -------------------------------------------------------------------

    def _judge(self, student: Student, weights: str) -> TAEHV:
        """The student's averaged or raw weights in a model of its own."""
        config, sources = student.config, student.step.ema.weights
        if weights == "raw":
            sources = student.parameters
        if self.judge is None or self.judge.variant_name != config.model.variant:
            dtype = compute_dtype(config.training.precision, self.device)
            self.judge = TAEHV(config.model.variant).to(self.device, dtype).eval()
        for name, weight in sources.items():
            self.judge.get_parameter(name).data.copy_(full(weight.detach()))
        return self.judge

    @torch.no_grad()
    def _psnr(self, judge: TAEHV, held: Held) -> float:
        """Mean over clips, of the judge's own latents."""
        found = []
        dtype = next(judge.parameters()).dtype
        for frames_NTCHW in held.frames:
            latents_NTCHW = judge.encode_video(frames_NTCHW.to(dtype))
            decoded_NTCHW = judge.decode_video(latents_NTCHW).float()
            found += map(clip_psnr, frames_NTCHW, decoded_NTCHW)
        return statistics.mean(found)

    def _also(self, student: Student) -> float | None:
        """What the averaged weights make of the other videos, if there are any."""
        if self.also is None:
            return None
        return self._psnr(self._judge(student, "ema"), self.also)

    def _judged(self, judge: TAEHV) -> ValidationResult:
        result = validate(
            judge,
            None,
            self.held.batches,
            self.device,
            StopSignal(),
            is_taught=self.teacher is not None,
            extra=self.extra,
        )
        assert result is not None  # there are clips
        return result

    def _save_frames(self, task: Task, result: ValidationResult) -> None:
        pairs = [clip[:2] for clip in result.pictures]
        shown = np.linspace(0, len(pairs[0][0]) - 1, SHOWN_FRAMES).round().astype(int)
        frames, decoded = (
            np.stack([to_uint8(clip[shown]) for clip in clips])
            for clips in zip(*pairs, strict=True)
        )
        path = self.results.frames(task.key)
        path.parent.mkdir(exist_ok=True)
        np.savez_compressed(path, input=frames, decoded=decoded)

    def _save_weights(self, task: Task, student: Student) -> None:
        weights = {k: full(v).cpu() for k, v in student.step.ema.weights.items()}
        about = {"variant": task.config.model.variant, "recipe": task.arm}
        name = file_name(f"{task.stage} {task.arm} {task.seed}")
        save_weights(
            self.results.folder / "weights" / f"{name}.safetensors", weights, about
        )


def _check_weights(study: Study) -> None:
    """Whether weights to begin with can be read, before all is decoded."""
    models = [task.config.model for task in study.tasks if task.config.model.checkpoint]
    for model in {(m.checkpoint, m.variant): m for m in models}.values():
        initial_model(model)


def _files_of(also: str, images: bool) -> Files:
    try:
        return Source.of(also, "").files(images)
    except UserError as error:
        raise UserError(f"--also {also}: {error}") from None


def _built_by(config: Config) -> str:
    """The settings that a student's model is built by; empty if it serves once."""
    if config.seraena.enable:
        return ""
    training = replace(
        Config().training,
        precision=config.training.precision,
        activation_checkpointing=config.training.activation_checkpointing,
    )
    model = replace(config.model, checkpoint="", initialization="he")
    built = Config(
        model=model,
        compile=config.compile,
        training=training,
        parallelism=config.parallelism,
    )
    return dumps(built)


def points(steps: int, count: int) -> list[int]:
    """Steps at which a curve has its points: the first 0, and close at the start."""
    return [round(steps * (i / count) ** 2) for i in range(count + 1)]


def told_steps(found: Sequence[StepResult]) -> list[Record]:
    """What each step found out, by name; "is_good" is whether it was applied."""
    flat = iter(torch.cat([result.values for result in found]).tolist())
    return [
        dict(
            zip(
                [*result.names, "norm", "is_good"],
                # All of them: further ones are the losses of micro-batches.
                list(itertools.islice(flat, len(result.values))),
                strict=False,
            )
        )
        for result in found
    ]


def told_losses(steps: Sequence[Record]) -> Record:
    """The loss at both ends, steps that were skipped, and how guidance went.

    The loss is that without guidance, which has no aim that is approached.
    """
    losses = [
        step["loss"] - step.get("seraena/weight", 0) * step.get("adversarial", 0)
        for step in steps
        if step["is_good"]
    ]
    part = max(1, len(losses) // 20)
    told: Record = {
        "first_loss": statistics.mean(losses[:part] or [math.nan]),
        "last_loss": statistics.mean(losses[-part:] or [math.nan]),
        "skipped": len(steps) - len(losses),
    }
    if any("adversarial" in step for step in steps):
        watch = CollapseWatch()
        told["collapsed"] = any(watch.see(step) for step in steps)
        told["guidance"] = {
            name: _mean(
                [step.get(f"seraena/{name}", math.nan) for step in steps[-part:]]
            )
            for name in GUIDANCE
        }
    return told


def _mean(values: Sequence[float]) -> float:
    """Of those that are known."""
    return statistics.mean([x for x in values if not math.isnan(x)] or [math.nan])
