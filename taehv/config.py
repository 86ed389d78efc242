"""Settings: one dataclass a section, from TOML and dotted command-line overrides.

Precedence is command line over TOML over default. The text under a field is its help.
Every mistake is a UserError of one line, raised before any process group starts.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import glob
import inspect
import itertools
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Union

import tomli

from taehv.errors import UserError, run_command
from taehv.variants import FRAME_RULES, VARIANTS, CountRule


@dataclass
class Job:
    name: str = "taehv"
    """Name of the run; everything it writes lies in OUTPUT_DIR/NAME."""
    output_dir: str = "outputs"
    """Folder that holds the runs."""

    @property
    def folder(self) -> Path:
        """Where this run lives."""
        return Path(self.output_dir).expanduser() / self.name


@dataclass
class Model:
    variant: str = "taehv"
    """Which TAEHV: its architecture and latent space (see README for the list)."""
    checkpoint: str = ""
    """Weights to start from: .pth, .safetensors, or the folder of a checkpoint; empty
    starts from new weights."""
    initialization: Literal["he", "pytorch"] = "he"
    """How new weights start. he: activations keep their scale, residual blocks add
    nothing, and colors pass through; pytorch: its defaults, and grey frames, as in the
    published recipe, which learns more slowly."""
    trained: Literal["both", "encoder", "decoder"] = "both"
    """Which parts are trained; the other keeps its weights."""


@dataclass
class Teacher:
    kind: str = ""
    """Reference VAE that defines the latent space: cogvideox, hunyuanvideo,
    hunyuanvideo1_5, wan, ltx2, minimax_h3, or "package.module:Class", whose code is
    run; empty trains a plain autoencoder with a latent space of its own."""
    path: str = ""
    """What the teacher is loaded from: the folder of a VAE or of a pipeline, or a hub
    id; handed as it is to a class of your own."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of a built-in teacher. auto: bf16 on GPUs, else fp32; minimax_h3
    is always fp32, as its encoder has to be."""
    latents: Literal["sample", "mode"] = "sample"
    """What a built-in teacher gives of the distribution that it codes a clip into: a
    random draw, which published weights learned from, or the mean."""
    tiling: bool | Literal["auto"] = "auto"
    """Whether a built-in teacher codes large frames in tiles and clips one by one,
    which saves memory and changes the latents slightly; auto: as its class does, which
    is for minimax_h3 (tiles of 256 pixels) and in time for hunyuanvideo (more than 16
    frames)."""


class Shape(NamedTuple):
    """Of a training clip, and how often it comes relative to others."""

    frames: int
    height: int
    width: int
    weight: float = 1.0

    @property
    def pixels(self) -> int:
        """Of a whole clip."""
        return self.frames * self.height * self.width


@dataclass
class Data:
    root: str = ""
    """Folder of videos, searched recursively, or a glob of such ("/data/*/good"), or
    either as a URL for fsspec ("s3://bucket/videos"); relative paths start here."""
    annotations: str = ""
    """Optional list of the videos to use: annotation .json, .jsonl or .csv, or .txt
    with a path a line; empty takes every video under root."""
    sources: list[str] = field(default_factory=list)
    """Several sets of videos to mix, in place of root and annotations: folders, globs
    and lists."""
    weights: list[float] = field(default_factory=list)
    """Share of each of the sources in the samples; empty: equal ones."""
    images: bool = False
    """Take still images under root and sources too, as clips that stand still."""
    index: str = ""
    """Folder for what is known of every file, written by python -m taehv.data index or
    at the start of the first run; bad files are then left out from the start, and
    nothing is searched again. Empty keeps no index."""
    min_size: int = 0
    """Shortest side in pixels that a file must have; this filter and the next three
    need the index."""
    min_frames: int = 0
    """Frames that a file must have."""
    min_rate: float = 0.0
    """Frames a second that a file must have."""
    aspect: list[float] = field(default_factory=list)
    """Smallest and largest width / height that a file may have; empty: any."""
    holdout: list[str] = field(default_factory=list)
    """Files kept for validation, as patterns on the path relative to root
    (["test/*", "a.mp4"]); empty keeps holdout_fraction."""
    holdout_fraction: float = 0.05
    """Share of the files kept for validation, chosen by a hash of the path."""
    cache: str = ""
    """Folder of frames and teacher latents, written by python -m taehv.precompute, to
    train from in place of the videos; empty decodes videos and runs the teacher."""
    lead_in: int = 1
    """Leading latents of a clip from a cache that are not judged, unless the clip
    begins where its window does: the student lacks the memory of what came before."""
    frames: int = 13
    """Length of a training clip, in frames."""
    height: int = 128
    """Height of a training clip, in pixels."""
    width: int = 128
    """Width of a training clip, in pixels."""
    stride: list[int] = field(default_factory=lambda: [1, 3])
    """Smallest and largest step between two frames of a clip, in source frames; in a
    cache it is applied once, by precompute."""
    crop_scale: list[float] = field(default_factory=lambda: [0.5, 1.0])
    """Smallest and largest side of a random crop, as a share of the largest crop
    that fits into the frame; it is resized to height x width. In a cache it is
    applied once, by precompute."""
    flip: float = 0.5
    """Probability of a horizontal flip; in a cache applied once, by precompute."""
    color_jitter: float = 0.0
    """Strength of the random brightness, contrast, saturation and hue of a clip;
    0 is off, 0.2 is mild. In a cache it is applied once, by precompute."""
    blur: float = 0.0
    """Largest standard deviation in pixels of a Gaussian blur, drawn for each clip; the
    student learns to reproduce the blurred frames, which the teacher sees too. In a
    cache it is applied once, by precompute."""
    noise: float = 0.0
    """Largest standard deviation of Gaussian noise in frames of 0 to 1, drawn for each
    clip, and to be reproduced too. In a cache it is applied once, by precompute."""
    crops_per_window: int = 1
    """Random crops taken from one decoded window, or from one of the cache; more are
    cheaper but less diverse.
    Must divide the batch of one process."""
    window_frames: int = 0
    """Length of a decoded window, in frames, where longer than a clip: each of its
    crops is then cut in time too, at a place of its own. Shorter videos are bad files.
    """
    buckets: list[list[float]] = field(default_factory=list)
    """Several shapes of clips, [frames, height, width, weight] each; a step has one of
    them, by the weights, and as many clips as hold its pixels at those of a batch of
    frames x height x width. Empty: that shape alone."""
    batch_multiple: int = 1
    """What the clips of a step in a bucket are a multiple of; the processes times the
    forward passes in a step, times crops_per_window, must divide it."""
    workers: int = -1
    """Decoding processes of each rank; -1 chooses from the CPU cores, 0 decodes in
    the training process."""
    prefetch: int = 2
    """Batches that each worker prepares ahead."""

    @property
    def shapes(self) -> list[Shape]:
        """The shapes of training clips: the buckets, or the only one."""
        if not self.buckets:
            return [self.usual_shape]
        return [Shape(*map(int, sizes), weight) for *sizes, weight in self.buckets]

    @property
    def usual_shape(self) -> Shape:
        """Of clips where there are no buckets, and of those to validate on."""
        return Shape(self.frames, self.height, self.width)

    def shaped(self, shape: Shape) -> Data:
        """The same settings, for clips of one shape alone."""
        sizes = {"frames": shape.frames, "height": shape.height, "width": shape.width}
        return replace(self, **sizes, buckets=[])

    def clips_of(self, shape: Shape, clips: int) -> int:
        """Clips of a shape that hold about the pixels of `clips` of the usual one."""
        if not self.buckets:
            return clips
        pixels = clips * self.usual_shape.pixels
        times = pixels // shape.pixels // self.batch_multiple
        return max(1, times) * self.batch_multiple


@dataclass
class Cache:
    windows: int = 1000
    """Windows of the training videos that precompute encodes."""
    frames: int = 33
    """Length of a window, in frames; clips of data.frames are cut from it."""
    height: int = 256
    """Height of a window, in pixels; clips of data.height are cut from it."""
    width: int = 256
    """Width of a window, in pixels; clips of data.width are cut from it."""
    images: Literal["raw", "jpeg"] = "raw"
    """raw: frames as they are; jpeg: quality 95, 5 to 14 times smaller and slower to
    read, applied before the teacher sees the frames."""
    shard_windows: int = 64
    """Windows in one file of the cache, the unit that an interrupted run redoes."""
    batch_size: int = 4
    """Windows that the teacher encodes at a time."""


@dataclass
class Proxy:
    folder: str = ""
    """Folder for the smaller copies, under the paths that the videos have under
    data.root, which is then set to it."""
    height: int = 360
    """Shorter side of a copy, in pixels; smaller videos keep their size."""
    keyframe_interval: int = 12
    """Frames from one keyframe to the next."""
    crf: int = 18
    """Quality of H.264: 18 looks like the original, 23 is half the size."""


@dataclass
class Training:
    steps: int = 10_000
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Seed of the new weights and of every random draw of the data."""
    global_batch_size: int = 16
    """Clips in one optimizer step, over all processes."""
    local_batch_size: int = 0
    """Clips that one process takes at a time; gradients are accumulated up to the
    global batch. 0 takes global_batch_size / processes at once."""
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """Number format of the network's arithmetic (weights stay fp32, or fp64). auto:
    bf16 on GPUs and CPUs that have it, else fp32."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to train; auto takes the GPUs when there are any."""
    activation_checkpointing: bool = False
    """Keep few activations for the backward pass and compute the others anew: larger
    clips or batches fit into memory, and a step takes about a quarter longer."""
    find_batch_size: bool = False
    """Find at the first start how many clips fit into the GPU's memory at a time: the
    most that divide what local_batch_size says. The global batch stays as it is."""
    max_bad_steps: int = 20
    """Bad steps in a row after which the run stops. A step is bad, and skipped, if its
    loss or gradient is not finite, or a spike (optim.spike_factor)."""
    start_timeout: float = 1800
    """Seconds without progress after which a process ends the run, until its first step
    is done, while it saves and while it validates a batch."""
    step_timeout: float = 600
    """Seconds without progress after which a process ends the run, from its second
    step on: it writes what it and its collectives are at into the run's folder."""
    gc_interval: int = 100
    """Steps between two collections of Python's garbage, which would otherwise come at
    a moment of its own on each process and hold up all."""


@dataclass
class Optim:
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the steps of convolutions, and leaves biases and the first
    and last layers of encoder and decoder to adamw; both take the same lr."""
    lr: float = 1e-3
    """Learning rate at its peak, of either optimizer."""
    encoder_lr_scale: float = 1.0
    """The encoder's learning rate as a share of lr."""
    decoder_lr_scale: float = 1.0
    """The decoder's learning rate as a share of lr."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of AdamW's averages of the gradient and of its square."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises linearly from zero."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Course of the learning rate from the end of the warm-up to the end; wsd (warm-up,
    stable, decay): constant up to its last part, decay_share."""
    decay_share: float = 0.2
    """Share of all steps over which wsd brings the learning rate down."""
    final_lr_scale: float = 0.0
    """Where all schedules but constant end, after the last step, as a share of lr."""
    max_grad_norm: float = 1.0
    """Gradients of a larger norm are scaled down to it; 0 is off."""
    spike_factor: float = 0.0
    """Skip a step whose gradient's norm is larger than so many times the median of the
    last 64 (from the 33rd on); 0 is off, 10 is usual."""
    ema_decay: float = 0.999
    """Decay a step of the averaged weights, which are validated and exported; it
    is lower in the first steps: (1 + step) / (10 + step)."""


@dataclass
class Loss:
    reconstruction: Literal["mse", "l1", "charbonnier"] = "mse"
    """Distance between decoded frames, not clamped, and the true ones."""
    reconstruction_weight: float = 1.0
    """Weight of the reconstruction loss."""
    latent_weight: float = 1.0
    """Weight of the mean squared error to the teacher's latents; unused without a
    teacher."""
    decoder_latents: Literal["teacher", "own", "mixture"] = "teacher"
    """What the decoder learns to decode: the teacher's latents, the student's own, or
    for every clip the one or the other by chance; own without a teacher."""
    temporal_weight: float = 0.0
    """Weight of the distance between the changes from frame to frame, against
    flicker."""
    frequency_weight: float = 0.0
    """Weight of the mean absolute distance between the fine details of decoded and true
    frames: the high bands of two levels of a Haar wavelet."""
    consistency_weight: float = 0.0
    """Weight of the squared distance between decoded latents and what the student
    encodes their frames to, for videos that are decoded and encoded in turn."""
    latent_scale_weight: float = 0.001
    """Weight of the pull of each clip's latents towards unit mean square; used only
    without a teacher."""


@dataclass
class Seraena:
    enable: bool = False
    """Let a discriminator, trained along, correct the decoded frames: sharper, with a
    lower PSNR."""
    start_step: int = 0
    """Steps without it at the start."""
    ramp_steps: int = 100
    """Steps from start_step on over which its weight rises to the full one."""
    weight: float = 0.05
    """Weight of the mean squared error to the corrected frames, which are about 1 off;
    in the published recipe 1, and 1 for the reconstruction by its mean square."""
    adaptive: bool = False
    """Make weight the ratio of its gradient, where it reaches the decoded frames, to
    that of the other losses of the frames."""
    discriminator_lr: float = 3e-4
    """Learning rate of the discriminator, the same in all steps."""
    interval: int = 1
    """Steps between two of the discriminator; decoded frames are corrected in all."""
    frames: int = 3
    """Frames that the discriminator sees at a time."""
    replay_size: int = 4096
    """Earlier reconstructions that the discriminator goes on learning from, over all
    processes; 0 keeps none."""
    replay_dtype: Literal["bf16", "uint8", "fp32"] = "bf16"
    """Number format of what is kept; uint8 takes half of bf16, and clamps."""
    replay_device: Literal["auto", "cpu"] = "auto"
    """Where it is kept; auto: where the training is; cpu saves the GPU's memory, but
    makes it wait, and cannot be part of a CUDA graph."""
    replay_in_checkpoint: bool = False
    """Save it in checkpoints, for an exact resume; else a resumed run fills it anew."""


@dataclass
class Parallelism:
    mode: Literal["replicate", "fsdp", "hsdp"] = "replicate"
    """replicate: every process holds the model (fastest for one this small); fsdp:
    weights, gradients and optimizer are sharded over all processes; hsdp: sharded
    over shard_size processes, replicated over the rest."""
    shard_size: int = 0
    """Processes that share one copy of the model; only for hsdp."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer in the CPU's memory."""


@dataclass
class Compile:
    enable: bool | Literal["auto"] = "auto"
    """Compile encoder and decoder with torch.compile; auto: on GPUs only."""
    mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """How hard torch.compile tries; the other mode measures more kernels, for minutes.
    What it makes is kept in ~/.cache/taehv/inductor, or TORCHINDUCTOR_CACHE_DIR."""
    fused: bool = True
    """Compute linear layers in a row as one convolution of the same parameters, which
    is faster and the same to rounding; also where nothing is compiled."""
    cuda_graph: bool | Literal["auto"] = "auto"
    """Replay the whole training step as one CUDA graph, so that the GPU never waits for
    Python; auto: with one GPU and without CPU offload. With several GPUs, true puts
    what they send one another into the graph too."""


@dataclass
class Checkpoint:
    interval: int = 500
    """Steps between two checkpoints; the last step always has one."""
    folder: str = ""
    """Where the checkpoints lie, a folder or a URL that fsspec knows (s3://bucket/run,
    with s3fs installed), of this run alone; empty: checkpoints in the run's folder."""
    asynchronous: bool = True
    """Write checkpoints in the background while training goes on; false waits."""
    keep: int = 3
    """How many of the newest checkpoints to keep; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints of steps that this number divides are kept for good; 0 is off."""
    max_failures: int = 3
    """Saves in a row that fail after which the run stops; each is told, and tried again
    at the next interval."""
    time_limit: int = 600
    """Seconds after which a save that is not done counts as failed."""
    resume: bool = True
    """Go on from the newest good checkpoint of the run, if any."""
    resume_from: int | str = ""
    """What to go on from in place of the newest: a step of this run, whose later
    checkpoints are then set aside; or the folder of a checkpoint or run, where this run
    has none of its own yet. The same command goes on from what it has saved since."""
    allow_changed_data: bool = False
    """Go on although the training files are not those that the run began with."""
    export_interval: int = 0
    """Steps between two exports of the averaged weights to export/step-N of the run's
    folder; the last step always has one, in export. 0 is off."""


@dataclass
class Validation:
    interval: int = 500
    """Steps between two validations; the first and last step always have one."""
    clips: int = 16
    """Fixed clips from the held-out files; 0 is off (the files stay held out)."""
    best: str = "psnr"
    """Measure by which the weights of the best validation are kept, as export/best.pth
    and .safetensors: psnr, ssim, difference_psnr, decoder_psnr or another of
    validation.jsonl; empty keeps none."""
    patience: int = 0
    """Validations in a row that are no better than the best one, after which the run
    ends; 0 is off."""
    lpips: str = ""
    """Weights of torchvision's AlexNet or VGG16 (.pth), with which LPIPS is measured;
    empty leaves it out."""
    st_lpips: bool = False
    """Measure ST-LPIPS, by the package stlpips-pytorch, which brings its weights."""
    vmaf: str = ""
    """An ffmpeg that has libvmaf, by which VMAF is measured; empty leaves it out."""


@dataclass
class Logging:
    interval: int = 10
    """Steps between two points in TensorBoard, and between two lines of progress
    where the output is no terminal."""


@dataclass
class Config:
    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    teacher: Teacher = field(default_factory=Teacher)
    data: Data = field(default_factory=Data)
    cache: Cache = field(default_factory=Cache)
    proxy: Proxy = field(default_factory=Proxy)
    training: Training = field(default_factory=Training)
    optim: Optim = field(default_factory=Optim)
    loss: Loss = field(default_factory=Loss)
    seraena: Seraena = field(default_factory=Seraena)
    parallelism: Parallelism = field(default_factory=Parallelism)
    compile: Compile = field(default_factory=Compile)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    validation: Validation = field(default_factory=Validation)
    logging: Logging = field(default_factory=Logging)


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
    "validation.patience": (0, math.inf),
    "logging.interval": (1, math.inf),
}
"""Smallest and largest value of the settings that are single numbers."""


INDIFFERENT = {
    *("job", "cache", "parallelism", "compile", "checkpoint", "validation", "logging"),
    *("data.root", "data.annotations", "data.cache", "data.workers", "data.prefetch"),
    *("data.sources", "data.index", "proxy"),
    *("model.checkpoint", "model.initialization", "training.local_batch_size"),
    *("training.device", "training.max_bad_steps", "training.find_batch_size"),
    *("training.gc_interval", "training.start_timeout", "training.step_timeout"),
}
"""Sections and settings that do not change what a run computes, but for rounding, from
the files that it is given."""


def load_config(argv: Sequence[str], world_size: int | None = None) -> Config:
    """Merge defaults, the TOML file after --config and the overrides, and check them.

    Args:
        argv: command line without the program's name.
        world_size: processes of the run; by default torchrun's WORLD_SIZE, else 1.

    Raises:
        UserError: anything a user got wrong, in one line that names the cure.
    """
    config = read_config(argv)
    world_size = world_size or int(os.environ.get("WORLD_SIZE", "1"))
    _check_batch(config, world_size)
    _check_mesh(config.parallelism, world_size)
    return config


def read_config(argv: Sequence[str]) -> Config:
    """As load_config, without the checks of how processes share a training step."""
    arguments = _parser().parse_args(_expanded(argv))
    config = Config()
    if arguments.config:
        _merge(config, _read_toml(Path(arguments.config)), arguments.config)
    overrides = {k: v for k, v in vars(arguments).items() if "." in k and v is not None}
    for key, text in overrides.items():
        _set(config, key, _value_of(text, _types(config)[key]), "the command line")
    check_config(config)
    return config


def dumps(config: Config) -> str:
    """The merged settings as TOML, which --config takes back."""
    lines = []
    for name, section in asdict(config).items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {_toml(value)}" for key, value in section.items()]
        lines.append("")
    return "\n".join(lines)


def changes(before: str, now: Config) -> dict[str, tuple[Any, Any]]:
    """The settings by which a run would go on otherwise than it began.

    Args:
        before: settings as `dumps` has them, of an older version perhaps: what it does
            not name has its default.
        now: the settings of the same run today.

    Returns:
        Both values, by the name of the setting.
    """
    old = tomli.loads(before)
    found = {}
    for key in _types(now):
        section, name = key.split(".")
        if not {section, key} & INDIFFERENT:
            value = old.get(section, {}).get(name, _get(Config(), key))
            if value != _get(now, key):
                found[key] = (value, _get(now, key))
    return found


def _toml(value: Any) -> str:
    # JSON's texts, numbers, booleans and lists are TOML's, but for one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def check_config(config: Config) -> None:
    """Reject settings that cannot work together, before anything starts."""
    for key, (low, high) in LIMITS.items():
        value = _get(config, key)
        if not low <= value <= high:
            bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise UserError(f"{key} = {value} must be {bounds}")
    name = Path(config.job.name)
    if not name.parts or name.is_absolute() or ".." in name.parts:
        raise UserError(f"job.name = {config.job.name!r} must be a folder's name")
    name = config.model.variant
    if name not in VARIANTS:
        raise UserError(
            f"model.variant = {name!r} is unknown{_nearest(name, VARIANTS)}"
        )
    _check_clips(config)
    _check_sources(config.data)
    _check_buckets(config)
    _check_graph(config)
    _check_patience(config.validation)
    _check_time_limits(config)
    if config.seraena.enable:
        _check_seraena(config)


def _check_clips(config: Config) -> None:
    """Reject clips of a shape or with settings that do not go together."""
    check_size(config, "data")
    _check_teacher(config)
    _check_ranges(config)
    if config.data.cache:
        check_frames(config, "data")
        _check_lead_in(config)


def check_size(config: Config, section: str) -> None:
    """Reject a height or width of section [data] or [cache] that makes no latents."""
    name = config.model.variant
    space = VARIANTS[name].space_factor
    for key in (f"{section}.height", f"{section}.width"):
        size = _get(config, key)
        if size % space:
            raise UserError(
                f"{key} = {size} must be a multiple of {space}, the space factor "
                f"of {name}: take {CountRule(space).nearest(size)}"
            )


def check_frames(config: Config, section: str) -> None:
    """Reject a length in [data] or [cache] that latents cannot stand for exactly."""
    name, frames = config.model.variant, _get(config, f"{section}.frames")
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


def _check_graph(config: Config) -> None:
    if config.compile.cuda_graph is True and config.parallelism.cpu_offload:
        raise UserError(
            "compile.cuda_graph = true cannot hold the optimizer that "
            "parallelism.cpu_offload keeps on the CPU: take one of them"
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
        near = _nearest(kind, FRAME_RULES)
        raise UserError(f'teacher.kind = "{kind}" is no "package.module:Class"{near}')


def _check_built_in_teacher(config: Config) -> None:
    kind, name, frames = config.teacher.kind, config.model.variant, config.data.frames
    if VARIANTS[name].teacher != kind:
        pupils = [pupil for pupil, v in VARIANTS.items() if v.teacher == kind]
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
    if not rule.allows(frames):
        raise UserError(
            f"data.frames = {frames} must be {rule} for teacher.kind = {kind}: take "
            f"{rule.nearest(frames)}"
        )


def _check_ranges(config: Config) -> None:
    frames = VARIANTS[config.model.variant].target_frames(config.data.frames)
    if config.loss.temporal_weight and frames < 2:
        raise UserError(
            f"loss.temporal_weight needs two decoded frames, data.frames = "
            f"{config.data.frames} give {frames}: take more"
        )
    for key, low in (("data.stride", 1), ("data.crop_scale", 0.01)):
        value = _get(config, key)
        top = 1 if key == "data.crop_scale" else math.inf
        if len(value) != 2 or not low <= value[0] <= value[1] <= top:
            raise UserError(
                f"{key} = {value} must be two numbers, smallest and largest, "
                f"from {low}" + (" to 1" if top == 1 else "")
            )
    betas = config.optim.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"optim.betas = {betas} must be two numbers from 0 to below 1")


def _check_batch(config: Config, world_size: int) -> None:
    batch, local = config.training.global_batch_size, config.training.local_batch_size
    if batch % world_size:
        raise UserError(
            f"training.global_batch_size = {batch} must be a multiple of the "
            f"{world_size} processes: take {-(-batch // world_size) * world_size}"
        )
    share = batch // world_size
    if local and share % local:
        raise UserError(
            f"training.local_batch_size = {local} must divide the {share} clips that "
            f"each of {world_size} processes has of global_batch_size = {batch}"
        )
    crops = config.data.crops_per_window
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
        raise UserError(
            f"data.crops_per_window = {crops} must divide the {local or share} clips "
            "that a process takes at a time"
        )


def _check_mesh(parallelism: Parallelism, world_size: int) -> None:
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


# --- reading -----------------------------------------------------------------------


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {path} is not a text file in UTF-8") from None
    except tomli.TOMLDecodeError as error:
        raise UserError(f"--config {path} is not valid TOML: {error}") from None


def _merge(config: Config, tree: dict[str, Any], source: str) -> None:
    known = _types(config)
    sections = {key.split(".")[0] for key in known}
    for section, values in tree.items():
        if section not in sections:
            near = _nearest(section, sections)
            raise UserError(f"{source}: unknown section [{section}]{near}")
        if not isinstance(values, dict):
            raise UserError(f"{source}: {section} is a section: write [{section}]")
        for name, value in values.items():
            _set(config, f"{section}.{name}", value, source)


def _set(config: Config, key: str, value: Any, source: str) -> None:
    known = _types(config)
    if key not in known:
        raise UserError(f"{source}: unknown setting {key}{_nearest(key, known)}")
    section, name = key.split(".")
    fitted = _fitted(value, known[key])
    if fitted is None:
        default = json.dumps(_get(Config(), key))
        raise UserError(
            f"{source}: {key} = {json.dumps(value, default=str)} must be "
            f"{_type_name(known[key])} (the default is {default})"
        )
    setattr(getattr(config, section), name, fitted)


def _get(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    known = sorted(known)
    # A section's name is so long a part of a key that the right key in the wrong
    # section would look less like it than a wrong key in that section.
    last = name.lstrip("-").split(".")[-1]
    elsewhere = [key for key in known if key.split(".")[-1] == last]
    match = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0)
    match = match or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {match[0]}?" if match else f"; known: {', '.join(known)}"


# --- types -------------------------------------------------------------------------


def _types(config: Config) -> dict[str, Any]:
    return {
        f"{section.name}.{name}": annotation
        for section in fields(config)
        for name, annotation in typing.get_type_hints(
            type(getattr(config, section.name))
        ).items()
    }


def _fitted(value: Any, annotation: Any) -> Any:
    """The value as the annotation wants it, or None where it does not fit."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        found = (_fitted(value, argument) for argument in arguments)
        return next((fitted for fitted in found if fitted is not None), None)
    if origin is Literal:
        return value if value in arguments and isinstance(value, str) else None
    if origin is list:
        if not isinstance(value, list):
            return None
        items = [_fitted(item, arguments[0]) for item in value]
        return None if None in items else items
    if annotation is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if number and math.isfinite(value) else None
    return value if type(value) is annotation else None


def _value_of(text: str, annotation: Any) -> Any:
    """A command-line text as the TOML value it stands for."""
    if annotation is str:
        return text
    if typing.get_origin(annotation) is list and not text.lstrip().startswith("["):
        element = typing.get_args(annotation)[0]
        parts = text.split(",") if text else []
        return [_value_of(part.strip(), element) for part in parts]
    if annotation is float and text.startswith("."):  # TOML wants the zero
        text = f"0{text}"
    text_in_toml = text.lower() if text.lower() in ("true", "false") else text
    try:
        return tomli.loads(f"v = {text_in_toml}")["v"]
    except tomli.TOMLDecodeError:
        return text


def _metavar(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return "|".join(_metavar(argument) for argument in arguments)
    if origin is Literal:
        return "|".join(arguments)
    if origin is list:
        return f"{_metavar(arguments[0])},..."
    return {bool: "true|false", int: "INT", float: "NUMBER", str: "TEXT"}[annotation]


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(json.dumps(argument) for argument in arguments)
    if origin is list:
        return f"a list, each {_type_name(arguments[0])}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}
    return names[annotation]


# --- command line ------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors that suggest the nearest setting."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        unknown = unknown.partition("=")[0]
        if message.startswith("unrecognized") and unknown.startswith("--"):
            known = [f"--{key}" for key in _types(Config())]
            raise UserError(f"unknown setting {unknown}{_nearest(unknown, known)}")
        raise UserError(f"command line: {message} (--help lists the settings)")


def _parser() -> _Parser:
    parser = _Parser(
        usage="%(prog)s --config FILE [--section.setting VALUE ...]",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="settings in TOML")
    known = _types(Config())
    for section in fields(Config):
        group = parser.add_argument_group(section.name)
        for name, text in _docs(type(getattr(Config(), section.name))).items():
            key = f"{section.name}.{name}"
            is_switch = bool in (known[key], *typing.get_args(known[key]))
            switch = {"nargs": "?", "const": "true"} if is_switch else {}
            default = json.dumps(_get(Config(), key))
            group.add_argument(
                f"--{key}",
                metavar=_metavar(known[key]),
                help=f"{text} (default: {default})".replace("%", "%%"),
                **switch,
            )
    return parser


def _expanded(argv: Sequence[str]) -> list[str]:
    """Join values that begin with a dash to their option, which argparse requires."""
    joined: list[str] = []
    for word in argv:
        negative = len(word) > 1 and word[0] == "-" and (word[1].isdigit())
        if (
            negative
            and joined
            and joined[-1].startswith("--")
            and "=" not in joined[-1]
        ):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


@functools.cache
def _docs(section: type) -> dict[str, str]:
    """Each field's name with the text that stands under it in the source."""
    body = ast.parse(inspect.getsource(section)).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for statement, below in zip(body, body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
            docs[statement.target.id] = " ".join(below.value.value.split())  # type: ignore
    return docs


def main() -> None:
    """Say what is wrong with a command line, before torchrun starts any process.

    Else each process would say it, and torchrun add a page of its own.
    """
    check_paths(load_config(sys.argv[1:]))


if __name__ == "__main__":
    run_command(main)
