"""Settings: one dataclass a section; the text under a field is its help."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple


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
    """Weights to start from: .pth, .safetensors, or the folder of a checkpoint, which
    may be a URL; empty starts from new weights."""
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
    is always fp32, as its encoder has to be. fp32 is computed without TF32."""
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
    crop_scale: list[float] = field(default_factory=list)
    """data.crop_scale of windows, of which clips show a part; empty: the same."""
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
    """Keep in the CPU's memory, and compute there, the optimizer with its moments, the
    weights that it updates and the averaged ones. The GPU keeps the weights that it
    computes with, and all that seraena's discriminator has."""


@dataclass
class Compile:
    enable: bool | Literal["auto"] = "auto"
    """Compile encoder and decoder with torch.compile; auto: on GPUs only."""
    mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """How hard torch.compile tries; the other mode measures more kernels, for minutes.
    What it makes is kept in ~/.cache/taehv/inductor, or TORCHINDUCTOR_CACHE_DIR."""
    fused: bool = True
    """Compute layers in a row as one of the same parameters, which is faster and the
    same to rounding; also where nothing is compiled."""
    cuda_graph: bool | Literal["auto"] = "auto"
    """Replay all that a GPU does in a training step as one CUDA graph, so that it never
    waits for Python, with what GPUs send one another; auto: on GPUs, unless
    seraena.replay_device is cpu."""


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
    frames: int = 0
    """Length of such a clip, in frames, of which those are judged that latents stand
    for; 0: as those to train on, data.frames. In a cache this and the next two are
    applied once, by precompute."""
    height: int = 0
    """Height of the largest centred crop after scaling, in pixels; 0: data.height."""
    width: int = 0
    """Its width; 0: data.width."""
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

    @property
    def window_data(self) -> Data:
        """Section [data] for the windows of a cache."""
        sizes = {k: getattr(self.cache, k) for k in ("frames", "height", "width")}
        scale = self.cache.crop_scale or self.data.crop_scale
        one = {"crops_per_window": 1, "window_frames": 0}
        return replace(self.data, **sizes, **one, crop_scale=scale)

    @property
    def validation_data(self) -> Data:
        """Section [data] for the clips to validate on."""
        names = ("frames", "height", "width")
        sizes = {k: getattr(self.validation, k) or getattr(self.data, k) for k in names}
        return replace(self.data, **sizes)


def get(config: Config, key: str) -> Any:
    """The value of a setting, named section.name."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)
