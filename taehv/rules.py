"""What settings must be, and must be together, checked before anything starts."""

from __future__ import annotations

import glob
import itertools
import math
import re
from dataclasses import replace
from pathlib import Path

from taehv.errors import UserError, nearest
from taehv.sections import Config, Data, Parallelism, Validation, get
from taehv.variants import FRAME_RULES, VARIANTS, CountRule

MAX_BUCKETS = 8
LIMITS: dict[str, tuple[float, float]] = {
    "data.holdout_fraction": (0, 1),
    "data.lead_in": (0, math.inf),
    "data.frames": (1, math.inf),
    "data.height": (1, math.inf),
    "data.width": (1, math.inf),
    "data.flip": (0, 1),
    "data.color_jitter": (0, 1),
    "data.crops_per_window": (1, math.inf),
    "data.window_frames": (0, math.inf),
    "data.workers": (-1, math.inf),
    "data.blur": (0, 16),
    "data.noise": (0, 1),
    "data.prefetch": (1, math.inf),
    "data.min_size": (0, math.inf),
    "data.min_frames": (0, math.inf),
    "data.min_rate": (0, math.inf),
    "data.batch_multiple": (1, math.inf),
    "cache.windows": (1, math.inf),
    "cache.frames": (1, math.inf),
    "cache.height": (1, math.inf),
    "cache.width": (1, math.inf),
    "cache.shard_windows": (1, math.inf),
    "cache.batch_size": (1, math.inf),
    "proxy.height": (16, math.inf),
    "proxy.keyframe_interval": (1, math.inf),
    "proxy.crf": (0, 51),
    "training.steps": (1, math.inf),
    "training.seed": (0, 2**63 - 1),
    "training.global_batch_size": (1, math.inf),
    "training.local_batch_size": (0, math.inf),
    "training.max_bad_steps": (1, math.inf),
    "training.start_timeout": (1, math.inf),
    "training.step_timeout": (1, math.inf),
    "training.gc_interval": (1, math.inf),
    "optim.lr": (0, math.inf),
    "optim.encoder_lr_scale": (0, math.inf),
    "optim.decoder_lr_scale": (0, math.inf),
    "optim.eps": (1e-20, math.inf),
    "optim.weight_decay": (0, math.inf),
    "optim.warmup_steps": (0, math.inf),
    "optim.decay_share": (0, 1),
    "optim.final_lr_scale": (0, 1),
    "optim.max_grad_norm": (0, math.inf),
    "optim.spike_factor": (0, math.inf),
    "optim.ema_decay": (0, 1),
    "loss.reconstruction_weight": (0, math.inf),
    "loss.latent_weight": (0, math.inf),
    "loss.latent_scale_weight": (0, math.inf),
    "loss.temporal_weight": (0, math.inf),
    "loss.frequency_weight": (0, math.inf),
    "loss.consistency_weight": (0, math.inf),
    "seraena.start_step": (0, math.inf),
    "seraena.ramp_steps": (0, math.inf),
    "seraena.weight": (0, math.inf),
    "seraena.discriminator_lr": (0, math.inf),
    "seraena.interval": (1, math.inf),
    "seraena.frames": (1, math.inf),
    "seraena.replay_size": (0, math.inf),
    "parallelism.shard_size": (0, math.inf),
    "checkpoint.interval": (1, math.inf),
    "checkpoint.keep": (0, math.inf),
    "checkpoint.keep_every": (0, math.inf),
    "checkpoint.max_failures": (1, math.inf),
    "checkpoint.export_interval": (0, math.inf),
    "checkpoint.time_limit": (1, 10**6),
    "validation.interval": (1, math.inf),
    "validation.clips": (0, math.inf),
    "validation.frames": (0, math.inf),
    "validation.height": (0, math.inf),
    "validation.width": (0, math.inf),
    "validation.patience": (0, math.inf),
    "logging.interval": (1, math.inf),
}
"""Smallest and largest value of the settings that are single numbers."""

LOCAL = ("job.output_dir", "data.cache", "data.index")
"""Settings that no URL can stand for."""


def check_config(config: Config) -> None:
    """Reject settings that cannot work together, before anything starts."""
    for key, (low, high) in LIMITS.items():
        value = get(config, key)
        if not low <= value <= high:
            bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise UserError(f"{key} = {value} must be {bounds}")
    for key in LOCAL:
        if "://" in get(config, key):
            raise UserError(f"{key} = {get(config, key)} is a URL: give a local path")
    resumed = config.checkpoint.resume_from
    if isinstance(resumed, int) and resumed < 0:
        raise UserError(f"checkpoint.resume_from = {resumed} must be at least 0")
    name = Path(config.job.name)
    if not name.parts or name.is_absolute() or ".." in name.parts:
        raise UserError(f"job.name = {config.job.name!r} must be a folder's name")
    name = config.model.variant
    if name not in VARIANTS:
        raise UserError(f"model.variant = {name!r} is unknown{nearest(name, VARIANTS)}")
    _check_clips(config)
    _check_sources(config.data)
    _check_buckets(config)
    _check_patience(config.validation)
    _check_time_limits(config)
    if config.seraena.enable:
        _check_seraena(config)


def _check_clips(config: Config) -> None:
    """Reject clips of a shape or with settings that do not go together."""
    for section in ("data", "validation"):
        check_size(config, section)
    _check_teacher(config)
    _check_ranges(config)
    if config.data.cache:
        check_frames(config, "data")
        if config.validation.frames:
            check_frames(config, "validation")
        _check_lead_in(config)


def check_size(config: Config, section: str) -> None:
    """Reject a height or width of a section that makes no latents."""
    name = config.model.variant
    space = VARIANTS[name].space_factor
    for key in (f"{section}.height", f"{section}.width"):
        size = get(config, key)
        if size % space:
            raise UserError(
                f"{key} = {size} must be a multiple of {space}, the space factor "
                f"of {name}: take {CountRule(space).nearest(size)}"
            )


def check_frames(config: Config, section: str) -> None:
    """Reject a length of a section that latents cannot stand for exactly."""
    name, frames = config.model.variant, get(config, f"{section}.frames")
    variant = VARIANTS[name]
    if not variant.is_exact(frames):
        below = filter(variant.is_exact, range(frames, 0, -1))
        above = filter(variant.is_exact, itertools.count(frames))
        legal = " or ".join(str(n) for n in (next(below, None), next(above)) if n)
        raise UserError(
            f"{section}.frames = {frames} is no length that latents of {name} decode "
            f"to, which a cache needs: take {legal}"
        )


def _check_buckets(config: Config) -> None:
    data = config.data
    for bucket in data.buckets:
        sizes, weight = bucket[:-1], bucket[-1:]
        whole = all(size >= 1 and size == int(size) for size in sizes)
        if len(bucket) != 4 or not whole or weight[0] <= 0:
            raise UserError(
                f"data.buckets has {bucket}, which must be frames, height and width as "
                "whole numbers and a weight above 0"
            )
    if len(data.buckets) > MAX_BUCKETS:
        raise UserError(
            f"data.buckets has {len(data.buckets)} shapes, each of which is compiled "
            f"on its own: take {MAX_BUCKETS} or fewer"
        )
    for shape in data.shapes if data.buckets else []:
        try:
            _check_clips(replace(config, data=data.shaped(shape)))
        except UserError as error:
            raise UserError(f"data.buckets has {list(shape)}: {error}") from None


def _check_sources(data: Data) -> None:
    if data.weights and (
        len(data.weights) != len(data.sources) or min(data.weights) <= 0
    ):
        raise UserError(
            f"data.weights = {data.weights} must be a number above 0 for each of the "
            f"{len(data.sources)} data.sources"
        )
    filters = ("min_size", "min_frames", "min_rate", "aspect")
    for name in filters:
        if getattr(data, name) and not data.index:
            raise UserError(
                f"data.{name} needs to know every file: set data.index to a folder to "
                "keep that in"
            )
    aspect = data.aspect
    if aspect and (len(aspect) != 2 or not 0 < aspect[0] <= aspect[1]):
        raise UserError(
            f"data.aspect = {aspect} must be two numbers, smallest and largest width / "
            "height"
        )


def _check_time_limits(config: Config) -> None:
    limit, longest = config.checkpoint.time_limit, config.training.start_timeout
    if limit >= longest:
        raise UserError(
            f"checkpoint.time_limit = {limit} must be less than training.start_timeout "
            f"= {longest:g}, which ends a run that only saves: raise that"
        )


def _check_patience(validation: Validation) -> None:
    if validation.patience and not (validation.best and validation.clips):
        raise UserError(
            f"validation.patience = {validation.patience} needs validation.best and "
            "validation.clips: set both, or patience to 0"
        )


def _check_seraena(config: Config) -> None:
    settings, loss, data = config.seraena, config.loss, config.data
    samples = 0
    for shape in data.shapes:
        frames = VARIANTS[config.model.variant].target_frames(shape.frames)
        clips = data.clips_of(shape, config.training.global_batch_size)
        samples = max(samples, -(-frames // settings.frames) * clips)
        if settings.frames > frames:
            raise UserError(
                f"seraena.frames = {settings.frames} is more than the {frames} frames "
                f"that clips of {shape.frames} decode to: lower it or take more"
            )
    samples *= len(data.shapes)
    is_taught = config.teacher.kind or config.data.cache
    if (
        config.model.trained == "encoder"
        and is_taught
        and loss.decoder_latents == "teacher"
    ):
        raise UserError(
            "seraena.enable = true corrects decoded frames, model.trained = encoder "
            "decodes none: set loss.decoder_latents to own or mixture"
        )
    weights = (loss.reconstruction_weight, loss.temporal_weight, loss.frequency_weight)
    if settings.adaptive and not any(weights):
        raise UserError(
            "seraena.adaptive = true needs another loss of the frames to compare with: "
            "raise loss.reconstruction_weight"
        )
    if 0 < settings.replay_size < samples:
        raise UserError(
            f"seraena.replay_size = {settings.replay_size} must be 0 or at least "
            f"{samples}, the groups of frames in a step, for each shape of clips"
        )
    if config.compile.cuda_graph is True and settings.replay_device == "cpu":
        raise UserError(
            "compile.cuda_graph = true cannot hold seraena.replay_device = cpu: take "
            "one of them"
        )


def _check_lead_in(config: Config) -> None:
    data = config.data
    latents = VARIANTS[config.model.variant].latents_of(data.frames)
    if data.lead_in >= latents:
        raise UserError(
            f"data.lead_in = {data.lead_in} leaves none of the {latents} latents of "
            f"data.frames = {data.frames} to judge: lower it or take more frames"
        )


def _check_teacher(config: Config) -> None:
    kind, path = config.teacher.kind, config.teacher.path
    if kind in FRAME_RULES:
        _check_built_in_teacher(config)
    elif not kind and path:
        raise UserError(f"teacher.path = {path} without teacher.kind: name the kind")
    elif kind and not all(kind.partition(":")):
        near = nearest(kind, FRAME_RULES)
        raise UserError(f'teacher.kind = "{kind}" is no "package.module:Class"{near}')


def _check_built_in_teacher(config: Config) -> None:
    kind, name = config.teacher.kind, config.model.variant
    if not is_pupil(name, kind):
        pupils = [pupil for pupil in VARIANTS if is_pupil(pupil, kind)]
        own = VARIANTS[name].teacher or "a class of your own, since none is built in"
        raise UserError(
            f"model.variant = {name} cannot learn from teacher.kind = {kind}: take "
            f"{' or '.join(pupils)}, or as teacher.kind {own}"
        )
    if not config.teacher.path:
        raise UserError(f"teacher.kind = {kind} needs teacher.path: a folder or hub id")
    if kind == "minimax_h3" and config.teacher.dtype == "bf16":
        raise UserError("teacher.dtype = bf16 is not for minimax_h3: take fp32")
    rule = FRAME_RULES[kind]
    for key in ("data.frames", "validation.frames"):
        frames = get(config, key)
        if frames and not rule.allows(frames):
            raise UserError(
                f"{key} = {frames} must be {rule} for teacher.kind = {kind}: take "
                f"{rule.nearest(frames)}"
            )


def is_pupil(name: str, kind: str) -> bool:
    """Whether a variant has a teacher's latents, as far as teachers are known here."""
    return kind not in FRAME_RULES or VARIANTS[name].teacher == kind


def _check_ranges(config: Config) -> None:
    frames = VARIANTS[config.model.variant].target_frames(config.data.frames)
    if config.loss.temporal_weight and frames < 2:
        raise UserError(
            f"loss.temporal_weight needs two decoded frames, data.frames = "
            f"{config.data.frames} give {frames}: take more"
        )
    tops = {"data.stride": math.inf, "data.crop_scale": 1, "cache.crop_scale": 1}
    for key, top in tops.items():
        value, low = get(config, key), 0.01 if top == 1 else 1
        if key.startswith("cache") and not value:
            continue
        if len(value) != 2 or not low <= value[0] <= value[1] <= top:
            raise UserError(
                f"{key} = {value} must be two numbers, smallest and largest, "
                f"from {low}" + (" to 1" if top == 1 else "")
            )
    betas = config.optim.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"optim.betas = {betas} must be two numbers from 0 to below 1")


def check_batch(config: Config, world_size: int) -> None:
    batch, local = config.training.global_batch_size, config.training.local_batch_size
    crops = config.data.crops_per_window
    if batch % world_size:
        several = world_size * crops
        raise UserError(
            f"training.global_batch_size = {batch} must be a multiple of the "
            f"{world_size} processes"
            + f" times {crops} data.crops_per_window" * (crops > 1)
            + f": take {-(-batch // several) * several}"
        )
    share = batch // world_size
    if local and share % local:
        raise UserError(
            f"training.local_batch_size = {local} must divide the {share} clips that "
            f"each of {world_size} processes has of global_batch_size = {batch}"
        )
    parts = world_size * (share // (local or share))
    for shape in config.data.shapes if config.data.buckets else []:
        clips = config.data.clips_of(shape, batch)
        if clips % (parts * crops):
            raise UserError(
                f"data.buckets has {list(shape)}, of which a step takes {clips} clips: "
                f"that must be a multiple of {parts * crops} (processes, times forward "
                "passes in a step, times data.crops_per_window): set "
                f"data.batch_multiple to {parts * crops}"
            )
    if (local or share) % crops:
        several = world_size * crops
        cure = "lower it"
        if not local:
            cure += ", or take training.global_batch_size = "
            cure += f"{-(-batch // several) * several}"
        raise UserError(
            f"data.crops_per_window = {crops} must divide the {local or share} clips "
            f"that a process takes at a time: {cure}"
        )


def check_mesh(parallelism: Parallelism, world_size: int) -> None:
    size = parallelism.shard_size
    if parallelism.mode != "hsdp":
        if size:
            raise UserError(
                f"parallelism.shard_size = {size} is for mode hsdp; leave it at 0 for "
                f"{parallelism.mode}"
            )
    elif size < 1 or world_size % size:
        divisors = [str(n) for n in range(1, world_size + 1) if world_size % n == 0]
        raise UserError(
            f"parallelism.shard_size = {size} must divide the {world_size} processes "
            f"in mode hsdp: take one of {', '.join(divisors)}"
        )


def check_paths(config: Config) -> None:
    """Reject settings that name what is not on this machine, where it should be."""
    if config.data.cache:
        _check_folder("data.cache", config.data.cache)
    else:
        _check_videos(config.data)
    resumed = config.checkpoint.resume_from
    if isinstance(resumed, str):
        _check_folder("checkpoint.resume_from", resumed)
    # A run that goes on needs no others, and where its own lie may be elsewhere.
    if not (config.checkpoint.folder or (config.job.folder / "checkpoints").exists()):
        _check_there("model.checkpoint", config.model.checkpoint)
    _check_there("validation.lpips", config.validation.lpips)
    path = config.teacher.path
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path)
    if config.teacher.kind in FRAME_RULES and not is_hub_id:
        _check_folder("teacher.path", path)


def _check_videos(data: Data) -> None:
    if not (data.root or data.annotations or data.sources):
        raise UserError("data.root is empty: set it to the folder of the videos")
    _check_there("data.annotations", data.annotations)
    for key, places in {"root": [data.root], "sources": data.sources}.items():
        for place in places:
            pattern = str(Path(place).expanduser())
            if _is_elsewhere(place) or not glob.has_magic(place):
                _check_there(f"data.{key}", place)
            elif next(glob.iglob(pattern, recursive=True), None) is None:
                raise UserError(f"data.{key}: nothing is like {place}: correct it")


def _is_elsewhere(path: str) -> bool:
    """Whether it is a URL, or nothing."""
    return not path or "://" in path


def _check_folder(key: str, path: str) -> None:
    if not _is_elsewhere(path) and not Path(path).expanduser().is_dir():
        raise UserError(f"{key} = {path} is no folder: correct the path")


def _check_there(key: str, path: str) -> None:
    if not _is_elsewhere(path) and not Path(path).expanduser().exists():
        raise UserError(f"{key} = {path} is not there: correct the path")
