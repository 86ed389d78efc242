"""What the parts of the benchmark share: ways to compare, clips, models to train."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from taehv import measure
from taehv.augment import Upload
from taehv.clips import Batch
from taehv.config import load_config
from taehv.data import ClipDataset
from taehv.distributed import (
    World,
    compile_in_place,
    compute_dtype,
    from_main,
    make_mesh,
    shard,
    uses_cuda_graph,
)
from taehv.errors import UserError
from taehv.index import build_file_lists
from taehv.loader import ClipLoader
from taehv.losses import Targets, judged
from taehv.measure import Cost, Limits, Report
from taehv.model import TAEHV
from taehv.offload import Masters
from taehv.optim import Ema, Optimizer, learning_rate, new_optimizer
from taehv.pretrained import initial_model
from taehv.reference import LEARNING_RATE, PublishedStep, published
from taehv.reference_seraena import PublishedSeraena
from taehv.sampler import Steps, toss
from taehv.sections import Config
from taehv.seraena import Seraena, new_discriminator, new_view
from taehv.shards import local
from taehv.step import StepResult, TrainingStep
from taehv.variants import VARIANTS
from taehv.video import write_mp4

Settings = dict[str, object]

SWITCHES: dict[str, tuple[Settings, Settings]] = {
    "compiled": ({"compile.enable": False}, {"compile.enable": True}),
    "fused": ({"compile.fused": False}, {"compile.fused": True}),
    "graph": ({"compile.cuda_graph": False}, {"compile.cuda_graph": True}),
    "checkpointing": (
        {"training.activation_checkpointing": False},
        {"training.activation_checkpointing": True},
    ),
    "seraena": ({"seraena.enable": False}, {"seraena.enable": True}),
}
"""Settings of a way to run a step without and with each of these."""
PLAIN, DEFAULT = "plain", "default"
"""The ways with none of them, and as the settings are by default."""
REFERENCE = "published"
"""The way that is no setting: the published recipe."""
REFERENCES = (REFERENCE, f"{REFERENCE}+seraena")
"""The recipe without and with its adversarial guidance."""
FORMS: dict[str, Settings] = {
    "replicate": {},
    "fsdp": {"parallelism.mode": "fsdp"},
    "offload": {"parallelism.mode": "fsdp", "parallelism.cpu_offload": True},
}
"""Ways to share a step among processes; hsdp-N is the form of shards of N."""


@dataclass(frozen=True)
class Size:
    """Frames, height and width of a clip."""

    frames: int
    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read 12x128x128."""
        if not re.fullmatch(r"\d+x\d+x\d+", text):
            raise argparse.ArgumentTypeError(
                f"{text!r} is no size: give frames x height x width, as 12x128x128"
            )
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        """As it is parsed."""
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def settings(self) -> Settings:
        """Those of section [data]."""
        return {f"data.{key}": value for key, value in asdict(self).items()}


def form_settings(form: str) -> Settings:
    """Settings of a form: a key of FORMS or hsdp-N."""
    if form.startswith("hsdp-") and form[5:].isdigit():
        return {"parallelism.mode": "hsdp", "parallelism.shard_size": form[5:]}
    if form not in FORMS:
        raise UserError(f"no form {form!r}: take {', '.join(FORMS)} or hsdp-N")
    return FORMS[form]


def way_settings(way: str) -> Settings:
    """Settings of a way to run a step: PLAIN, DEFAULT, or switches joined by +."""
    if way == DEFAULT:
        return {}
    on = [] if way == PLAIN else way.split("+")
    unknown = [name for name in on if name not in SWITCHES]
    if unknown:
        raise UserError(
            f"no way {unknown[0]!r}: take {REFERENCE}, {PLAIN}, {DEFAULT}, or some of "
            f"{', '.join(SWITCHES)}, joined by +"
        )
    settings: Settings = {}
    for name, (without, with_it) in SWITCHES.items():
        settings |= with_it if name in on else without
    return settings


def cost_cells(cost: Cost) -> dict[str, Any]:
    """What the tables of all parts tell of a cost."""
    return {
        "ms": cost.ms,
        "p90": cost.p90_ms,
        "kernels": cost.kernel_ms,
        "comm": cost.comm_ms,
        "host": cost.host_ms,
        "wait": cost.wait_ms,
        "GiB": cost.peak_gib,
        "first s": cost.first_s,
        "by kernel": cost.kernels,
    }


@dataclass
class Bench:
    """What all parts share."""

    options: argparse.Namespace
    world: World
    report: Report

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        return self.world.device

    @property
    def limits(self) -> Limits:
        """How long each row is measured."""
        options = self.options
        return Limits(options.warmup, options.calls, options.seconds)

    def config(self, *settings: Settings) -> Config:
        """Settings of training, the later ones first; a UserError if they clash."""
        merged: Settings = {
            "training.global_batch_size": self.options.clips * self.world.size,
            "training.device": self.device.type,
            "data.root": self.options.root or "",
            "data.workers": self.options.workers,
            "optim.lr": LEARNING_RATE,
        }
        for some in settings:
            merged |= some
        argv = [f"--{key}={value}" for key, value in merged.items()]
        return load_config(argv, self.world.size)

    def measure(self, work: Callable[[Any], object], feed: Iterator[Any]) -> Cost:
        """The cost of a call of `work`."""
        return measure.measure(work, feed, self.device, self.limits, from_main)


# --- what is trained, and on what ----------------------------------------------------


class Student:
    """A model and its training step, as the trainer puts them together."""

    def __init__(self, config: Config, world: World) -> None:
        self.config = config
        mesh = make_mesh(world.device, config.parallelism, world.size)
        dtype = compute_dtype(config.training.precision, world.device)
        torch.backends.cudnn.allow_tf32 = dtype != torch.float32
        self.exact = torch.promote_types(dtype, torch.float32)
        self.upload = Upload(world.device, self.exact)
        torch.manual_seed(config.training.seed)
        self.model = initial_model(config.model).to(world.device, self.exact)
        self.model.fused = config.compile.fused
        self.model.checkpointing = config.training.activation_checkpointing
        roots = [self.model.encoder, self.model.decoder]
        for root, name in zip(roots, ("encoder", "decoder"), strict=True):
            root.requires_grad_(config.model.trained in ("both", name))
        compile_in_place(roots, config.compile, world.device)
        shard(roots, mesh, dtype)
        # Later the model's own may be gathered ones: see checkpoint.training_state.
        self.parameters = dict(self.model.named_parameters())
        is_sharded = mesh["shard"].size() > 1
        shard_group = mesh["shard"].get_group() if is_sharded else None
        optimizer, ema = self._optimizer(roots, shard_group)
        graph = uses_cuda_graph(config.compile, config.seraena, world.device)
        self.seraena = None
        if config.seraena.enable:
            self.seraena = self._seraena(world, mesh, dtype, shard_group)
        self.step = TrainingStep(
            self.model, roots, optimizer, ema, config.loss, graph, self.seraena
        )
        self.steps = 0

    @torch.no_grad()
    def restart(self, config: Config) -> None:
        """Begin anew with other settings, but for those that the model is built by.

        The weights are set in place, so that compiled code stays. For one process, and
        not for guided training.
        """
        self.config, self.steps = config, 0
        torch.manual_seed(config.training.seed)
        weights = initial_model(config.model).state_dict()
        for name, parameter in self.parameters.items():
            local(parameter).copy_(weights[name])
        self.step.renew(*self._optimizer(self.step.roots), config.loss)

    def _optimizer(
        self, roots: list[nn.Module], shard_group: dist.ProcessGroup | None = None
    ) -> tuple[Optimizer, Ema]:
        """Of the weights as they are now."""
        optim, masters = self.config.optim, None
        if self.config.parallelism.cpu_offload:
            masters = Masters(self.parameters.values())
        optimizer = new_optimizer(*roots, optim, shard_group, masters)
        return optimizer, Ema(self.parameters, optim.ema_decay, masters)

    def _seraena(
        self,
        world: World,
        mesh: DeviceMesh,
        dtype: torch.dtype,
        shard_group: dist.ProcessGroup | None,
    ) -> Seraena:
        config, variant = self.config, self.model.variant
        settings, data = config.seraena, config.data
        discriminator = new_discriminator(settings, variant, config.training.seed)
        discriminator.to(world.device, self.exact)
        compile_in_place([discriminator], config.compile, world.device)
        shard([discriminator], mesh, dtype)
        like = torch.empty(0, dtype=self.exact, device=world.device)
        shape = (data.frames, data.height, data.width)
        clips = config.training.global_batch_size // world.size
        view = new_view(settings, variant, shape, clips, 1.0, like)
        return Seraena(discriminator, settings, {shape: view}, like, shard_group)

    def __call__(self, batch: Batch) -> StepResult:
        """Train by a batch, by the learning rate of this step."""
        rate = learning_rate(self.steps, self.config.training.steps, self.config.optim)
        self.steps += 1
        return self.step([self.targets(batch)], self.steps - 1, rate)

    def targets(self, batch: Batch) -> Targets:
        """A batch on the device."""
        targets = Targets(self.upload(batch))
        device = targets.frames_NTCHW.device
        if self.seraena is not None:
            _, T, _, H, W = targets.frames_NTCHW.shape
            seed = self.config.training.seed
            draws_NG3 = self.seraena.draws(seed, batch.numbers, (T, H, W))
            targets.draws_NG3 = draws_NG3.to(device, non_blocking=True)
        if self.config.loss.decoder_latents == "mixture":
            own_N = toss(self.config.training.seed, batch.numbers)
            targets.own_N = own_N.to(device, non_blocking=True)
        if batch.latents_NTCHW is None:
            return targets
        targets.latents_NTCHW = batch.latents_NTCHW.to(
            device, self.exact, non_blocking=True
        )
        variant, frames = self.model.variant, targets.frames_NTCHW.shape[1]
        latents = batch.latents_NTCHW.shape[1]
        masks = judged(variant, batch.lead_N, latents, variant.target_frames(frames))
        targets.judged_latents_NT, targets.judged_frames_NT = (
            mask.to(device, non_blocking=True) for mask in masks
        )
        return targets


class PublishedStudent:
    """A model trained by the published recipe, on the same batches."""

    def __init__(self, config: Config, world: World, guided: bool = False) -> None:
        self.device = world.device
        torch.manual_seed(config.training.seed)
        model = published(TAEHV(config.model.variant)).to(world.device)
        seraena = None
        if guided:
            channels = model.variant.latent_channels
            seraena = PublishedSeraena(channels, world.device)
        self.step = PublishedStep(model, world.device, seraena)

    def __call__(self, batch: Batch) -> Tensor:
        """Train by a batch."""
        frames_NTHWC = batch.frames_NTHWC.to(self.device)
        frames_NTCHW = frames_NTHWC.permute(0, 1, 4, 2, 3).contiguous()
        frames_NTCHW = frames_NTCHW.float().div_(255)
        return self.step(frames_NTCHW, self.latents(batch, frames_NTCHW))

    def latents(self, batch: Batch, frames_NTCHW: Tensor) -> Tensor:
        """What the encoder is to make of the frames, and the decoder to decode."""
        return batch.latents_NTCHW.to(self.device).float()


def moving_picture(size: Size, seed: int, device: torch.device) -> Tensor:
    """A clip of drifting waves, uint8 NTHWC with N = 1, the same for the same seed."""
    random = torch.Generator().manual_seed(seed)
    t, y, x = torch.meshgrid(
        *(torch.arange(n, device=device) for n in asdict(size).values()), indexing="ij"
    )
    waves = 0.0
    for _ in range(3):
        speed, up, right = (torch.rand(3, generator=random) - 0.5).tolist()
        phases_C = torch.rand(3, generator=random).to(device) * 6
        angle = speed * t + (up * y + right * x) * 0.4
        waves = waves + torch.sin(angle[..., None] + phases_C) / 3
    return ((waves + 1) * 127.5).to(torch.uint8)[None]


def made_up_videos(folder: Path, size: Size) -> Path:
    """A new folder of four videos of moving pictures."""
    folder.mkdir()
    for number in range(4):
        picture_NTHWC = moving_picture(size, number, torch.device("cpu"))
        write_mp4(folder / f"{number}.mp4", picture_NTHWC[0].numpy(), 8)
    return folder


def synthetic_batches(
    config: Config, device: torch.device, count: int, first: int
) -> list[Batch]:
    """Batches of moving pictures and random latents, pinned where there is a GPU."""
    data, clips = config.data, config.training.local_batch_size
    size = Size(data.frames, data.height, data.width)
    variant = VARIANTS[config.model.variant]
    space = variant.space_factor
    shape = (clips, variant.latents_of(data.frames), variant.latent_channels)
    shape += (data.height // space, data.width // space)
    batches = []
    for number in range(first, first + count * clips, clips):
        numbers = list(range(number, number + clips))
        random = torch.Generator().manual_seed(number)
        batch = Batch(
            torch.cat([moving_picture(size, n, device) for n in numbers]).cpu(),
            torch.eye(3, 4).repeat(clips, 1, 1),  # memory that can be pinned
            numbers,
            [f"moving picture {n}" for n in numbers],
            [],
            torch.zeros(clips, dtype=torch.int64),
            torch.randn(shape, generator=random).half(),
        )
        batches.append(batch.pin_memory() if device.type == "cuda" else batch)
    return batches


@contextlib.contextmanager
def clips_of(
    bench: Bench, config: Config, latents: bool = True
) -> Iterator[Iterator[Batch]]:
    """Batches without end: of the videos under --root, else made up beforehand."""
    local = config.training.global_batch_size // bench.world.size
    config.training.local_batch_size = local
    first = 10_000 * bench.world.rank
    made_up = synthetic_batches(config, bench.device, 4, first)
    if not bench.options.root:
        if not latents:
            made_up = [replace(batch, latents_NTCHW=None) for batch in made_up]
        yield itertools.cycle(made_up)
        return
    files, _ = build_file_lists(config.data)
    clips = ClipDataset(config.data, files, config.training.seed)
    batch_size, world = config.training.global_batch_size, bench.world
    plan = Steps(0, batch_size, local, world.rank, world.size)
    loader = ClipLoader(clips, plan, bench.device.type == "cuda")
    latents_NTCHW = made_up[0].latents_NTCHW if latents else None
    try:
        yield (replace(batch, latents_NTCHW=latents_NTCHW) for batch in loader)
    finally:
        loader.close()
