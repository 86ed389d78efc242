"""Measure training and decoding on this machine, beside the published way of both.

python -m taehv.benchmark                                       # training steps
torchrun --nproc_per_node 8 -m taehv.benchmark --forms replicate,fsdp,offload
python -m taehv.benchmark --decode --start --json results.json
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from taehv import measure
from taehv.augment import Upload
from taehv.clips import Batch
from taehv.config import Config, Parallelism, load_config
from taehv.data import ClipDataset
from taehv.distributed import (
    World,
    compile_in_place,
    compute_dtype,
    from_main,
    make_mesh,
    shard,
    started,
    uses_cuda_graph,
)
from taehv.errors import UserError, run_command
from taehv.files import build_file_lists
from taehv.loader import ClipLoader
from taehv.logging import set_up_console
from taehv.losses import Targets
from taehv.measure import Cost, Limits, Report
from taehv.model import TAEHV
from taehv.optim import AdamW, Ema
from taehv.reference import LEARNING_RATE, PublishedStep, PublishedStream, published
from taehv.sampler import Steps
from taehv.step import StepResult, TrainingStep
from taehv.streaming import StreamingTAEHV
from taehv.variants import VARIANTS

Settings = dict[str, object]

EAGER: Settings = {"compile.enable": False, "compile.cuda_graph": False}
COMPILED: Settings = {"compile.enable": True, "compile.cuda_graph": False}
WAYS: dict[str, Settings] = {
    "plain": EAGER,
    "compiled": COMPILED,
    "graph": {**COMPILED, "compile.cuda_graph": True},
    "default": {},
}
"""Ways to run the same step, and the settings that choose them."""
REFERENCE = "published"
"""The way that is no setting: the published recipe."""
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
        mesh = make_mesh(world.device, config.parallelism, world.size)
        dtype = compute_dtype(config.training.precision, world.device)
        self.exact = torch.promote_types(dtype, torch.float32)
        self.upload = Upload(world.device, self.exact)
        torch.manual_seed(config.training.seed)
        self.model = TAEHV(config.model.variant).to(world.device, self.exact)
        roots = [self.model.encoder, self.model.decoder]
        compile_in_place(roots, config.compile, world.device)
        shard(roots, mesh, dtype, config.parallelism.cpu_offload)
        parameters = dict(self.model.named_parameters())
        is_sharded = mesh["shard"].size() > 1
        shard_group = mesh["shard"].get_group() if is_sharded else None
        optimizer = AdamW(parameters.values(), config.optim, shard_group)
        ema = Ema(parameters, config.optim.ema_decay)
        graph = uses_cuda_graph(config.compile, config.parallelism, world.device)
        self.step = TrainingStep(self.model, roots, optimizer, ema, config.loss, graph)
        self.steps = 0

    def __call__(self, batch: Batch) -> StepResult:
        """Train by a batch."""
        self.steps += 1
        return self.step([self.targets(batch)], self.steps - 1, LEARNING_RATE)

    def targets(self, batch: Batch) -> Targets:
        """A batch on the device."""
        frames_NTCHW = self.upload(batch)
        latents_NTCHW = batch.latents_NTCHW
        if latents_NTCHW is not None:
            latents_NTCHW = latents_NTCHW.to(
                frames_NTCHW.device, self.exact, non_blocking=True
            )
        return Targets(frames_NTCHW, latents_NTCHW)


class PublishedStudent:
    """A model trained by the published recipe, on the same batches."""

    def __init__(self, config: Config, world: World) -> None:
        self.device = world.device
        torch.manual_seed(config.training.seed)
        model = published(TAEHV(config.model.variant)).to(world.device)
        self.step = PublishedStep(model, world.device)

    def __call__(self, batch: Batch) -> Tensor:
        """Train by a batch."""
        frames_NTHWC = batch.frames_NTHWC.to(self.device)
        frames_NTCHW = frames_NTHWC.permute(0, 1, 4, 2, 3).contiguous()
        latents_NTCHW = batch.latents_NTCHW.to(self.device).float()
        return self.step(frames_NTCHW.float().div_(255), latents_NTCHW)


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
            torch.eye(3, 4).expand(clips, 3, 4),
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


# --- training steps ------------------------------------------------------------------

STEP_COLUMNS = {
    "size": 11,
    "variant": 7,
    "form": 9,
    "way": 9,
    "ms": 5,
    "p90": 5,
    "clips/s": 6,
    "frames/s": 6,
    "TFLOP/s": 6,
    "of peak": 6,
    "kernels": 6,
    "comm": 5,
    "host": 5,
    "wait": 5,
    "GiB": 5,
    "first s": 5,
    "speed-up": 4,
}


@dataclass(frozen=True)
class Case:
    """One row of the table of training steps."""

    size: Size
    variant: str
    form: str
    way: str
    config: Config


def bench_train(bench: Bench) -> None:
    """Time of a training step, for every size, variant, form and way asked for."""
    cases = list(_cases(bench))  # mistakes are told before anything is measured
    peak = measure.peak_tflops(bench.device)
    bench.report.content["peak TFLOP/s"] = peak
    bench.report.say(f"a large product: {peak:.3g} TFLOP/s")
    bench.report.table("training step, times in ms", STEP_COLUMNS)
    references: dict[tuple[Size, str], float] = {}
    for case in cases:
        kind = case.size, case.variant
        ms = _step_row(bench, case, peak, references.get(kind))
        if case.way == REFERENCE:
            references[kind] = ms


def _cases(bench: Bench) -> Iterator[Case]:
    options = bench.options
    for size, variant in itertools.product(options.sizes, options.variants):
        settings = {"model.variant": variant, **size.settings}
        if REFERENCE in options.ways and bench.world.size == 1:
            yield Case(size, variant, "-", REFERENCE, bench.config(settings))
        for form, way in itertools.product(options.forms, options.ways):
            if way != REFERENCE:
                config = bench.config(settings, form_settings(form), way_settings(way))
                yield Case(size, variant, form, way, config)


def form_settings(form: str) -> Settings:
    """Settings of a form: a key of FORMS or hsdp-N."""
    if form.startswith("hsdp-") and form[5:].isdigit():
        return {"parallelism.mode": "hsdp", "parallelism.shard_size": form[5:]}
    if form not in FORMS:
        raise UserError(f"no form {form!r}: take {', '.join(FORMS)} or hsdp-N")
    return FORMS[form]


def way_settings(way: str) -> Settings:
    """Settings of a way to run a step: a key of WAYS."""
    if way not in WAYS:
        raise UserError(f"no way {way!r}: take {REFERENCE}, {', '.join(WAYS)}")
    return WAYS[way]


def _step_row(bench: Bench, case: Case, peak: float, reference: float | None) -> float:
    """Measure and print a row, and return its milliseconds."""
    measure.free()
    make = PublishedStudent if case.way == REFERENCE else Student
    with clips_of(bench, case.config) as feed:
        cost = bench.measure(make(case.config, bench.world), feed)
    clips = case.config.training.global_batch_size / cost.ms * 1000
    flop = step_flop(case.variant, case.size) * bench.options.clips
    tflops = flop / cost.ms / 1e9
    bench.report.row(
        size=str(case.size),
        variant=case.variant,
        form=case.form,
        way=case.way,
        **cost_cells(cost),
        **{
            "clips/s": clips,
            "frames/s": clips * case.size.frames,
            "TFLOP/s": tflops,
            "of peak": f"{tflops / peak:.1%}",
            "speed-up": reference / cost.ms if reference else None,
        },
    )
    for name, ms, launches in (cost.kernels or [])[: bench.options.kernels]:
        bench.report.say(f"    {ms:8.3f} ms {launches:5} x {name[:100]}")
    return cost.ms


def cost_cells(cost: Cost) -> dict[str, Any]:
    """Cells of a table."""
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


def step_flop(variant: str, size: Size) -> int:
    """Operations of a step for one clip, of the network as it is published.

    A way that gets the same result by fewer has no fewer in this count.
    """
    with torch.device("meta"):
        model = published(TAEHV(variant))
        frames_NTCHW = torch.empty(1, size.frames, 3, size.height, size.width)
        shape = model.encode_video(frames_NTCHW).shape
        latents_NTCHW = torch.empty(shape)

    def work() -> None:
        model.encode_video(frames_NTCHW).sum().backward()
        model.decode_video(latents_NTCHW, clamp=False).sum().backward()

    return measure.count_flop(work)


# --- decoding ------------------------------------------------------------------------

DECODE_COLUMNS = {
    "size": 11,
    "way": 20,
    "ms": 5,
    "p90": 5,
    "kernels": 6,
    "host": 5,
    "GiB": 5,
    "first s": 5,
    "error": 8,
    "speed-up": 4,
}
EXACT_LATENTS = 4
"""Leading latents whose frames are compared with those computed in fp32."""


class GraphedDecoder:
    """Replays the decoding of latents of one shape as a CUDA graph."""

    def __init__(self, decode: Callable[[Tensor], Tensor], example: Tensor) -> None:
        self._input = example.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                decode(self._input)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = decode(self._input)

    def __call__(self, latents_NTCHW: Tensor) -> Tensor:
        """Decode; the result is overwritten by the next call."""
        self._input.copy_(latents_NTCHW)
        self._graph.replay()
        return self._output


@torch.no_grad()
def bench_decode(bench: Bench) -> None:
    """Time and memory of decoding whole videos, and latent by latent."""
    options, device = bench.options, bench.device
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    bench.report.table(f"decoding in {str(dtype)[6:]}, times in ms", DECODE_COLUMNS)
    for size, variant in itertools.product(options.decode_sizes, options.variants):
        torch.manual_seed(0)
        model = TAEHV(variant).to(device).eval()
        latents_NTCHW = _latents(model, size, device)
        few_NTCHW = latents_NTCHW[:, :EXACT_LATENTS]
        exact_NTCHW = published(model).decode_video(few_NTCHW)
        model, latents_NTCHW = model.to(dtype), latents_NTCHW.to(dtype)
        reference = None
        for way, make in _decoders(model, device).items():
            measure.free()
            decode = make(latents_NTCHW)
            cost = bench.measure(decode, itertools.repeat(latents_NTCHW))
            frames_NTCHW = decode(latents_NTCHW)
            error = _rms(frames_NTCHW[:, : exact_NTCHW.shape[1]] - exact_NTCHW)
            reference = reference or cost.ms
            bench.report.row(
                size=str(size),
                variant=variant,
                way=way,
                **cost_cells(cost),
                **{"error": f"{error:.1e}", "speed-up": reference / cost.ms},
            )
            del decode, frames_NTCHW
        _bench_stream(bench, model, size, latents_NTCHW)


def _latents(model: TAEHV, size: Size, device: torch.device) -> Tensor:
    variant = model.variant
    space = variant.space_factor
    shape = 1, variant.latents_of(size.frames), variant.latent_channels
    shape += size.height // space, size.width // space
    if size.height % space or size.width % space:
        raise UserError(f"{size}: height and width must be multiples of {space}")
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def _rms(difference: Tensor) -> float:
    return difference.float().square().mean().sqrt().item()


def _decoders(
    model: TAEHV, device: torch.device
) -> dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]]:
    """By name, what makes a decoder for latents like an example."""

    def compiled(_: Tensor) -> Callable[[Tensor], Tensor]:
        own = copy.deepcopy(model)
        own.decoder.compile(fullgraph=True)
        return own.decode_video

    def graphed(example: Tensor) -> Callable[[Tensor], Tensor]:
        return GraphedDecoder(compiled(example), example)

    ways = {
        REFERENCE: lambda _: published(model).decode_video,
        "eager": lambda _: model.decode_video,
    }
    if device.type == "cuda":
        ways |= {"compiled": compiled, "compiled, graph": graphed}
    return ways


def _bench_stream(
    bench: Bench, model: TAEHV, size: Size, latents_NTCHW: Tensor
) -> None:
    """Latency of a latent that is decoded as it comes."""
    count = latents_NTCHW.shape[1]
    latents = latents_NTCHW.split(1, 1)
    feeds = [[x_N1CHW[:, 0] for x_N1CHW in latents], latents]
    decoders = [
        PublishedStream(published(model).decoder).decode,
        StreamingTAEHV(model, count).decode,
    ]
    reference = None
    for name, decode, feed in zip((REFERENCE, "eager"), decoders, feeds, strict=True):
        measure.free()
        cost = bench.measure(decode, itertools.cycle(feed))
        reference = reference or cost.ms
        bench.report.row(
            size=str(replace(size, frames=model.time_upscale)),
            variant=model.variant_name,
            way=f"{name}, by latent",
            **cost_cells(cost),
            **{"speed-up": reference / cost.ms},
        )


# --- command line --------------------------------------------------------------------

PARTS: dict[str, tuple[Callable[[Bench], None], str]] = {
    "train": (bench_train, "training steps; the default"),
    "decode": (bench_decode, "decoding of whole videos, and latent by latent"),
}


def _listed(kind: Callable[[str], Any] = str) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message} (--help lists the options)")


OPTIONS: dict[str, tuple[Callable[[str], Any], str, str, str]] = {
    "sizes": (_listed(Size.parse), "12x128x128,12x64x64", "5x32x32", "clips' sizes"),
    "clips": (int, "16", "2", "clips of a step on each process"),
    "variants": (_listed(), "taehv", "taehv", "which models"),
    "ways": (
        _listed(),
        f"{REFERENCE},plain,compiled,graph",
        f"{REFERENCE},plain",
        f"ways to run a step: {REFERENCE} (the recipe), {', '.join(WAYS)}",
    ),
    "forms": (
        _listed(),
        "replicate",
        "replicate",
        f"ways to share it: {', '.join(FORMS)}, hsdp-N",
    ),
    "decode-sizes": (
        _listed(Size.parse),
        "61x320x512,61x720x1280",
        "5x32x32",
        "videos' sizes",
    ),
    "warmup": (int, "10", "1", "calls that do not count"),
    "calls": (int, "30", "3", "calls that count"),
    "seconds": (float, "10", "2", "about the most for those that count"),
    "workers": (int, "-1", "0", "decoding processes, for --root"),
    "kernels": (int, "0", "0", "how many of the longest kernels to list"),
}
"""What each option is read by, its default on a GPU and on a CPU, and its help."""


def _parser() -> _Parser:
    parser = _Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, (_, text) in PARTS.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"measure {text}")
    for name, (kind, gpu, cpu, text) in OPTIONS.items():
        default = gpu if torch.cuda.is_available() else cpu
        parser.add_argument(
            f"--{name}",
            type=kind,
            default=default,
            help=f"{text} (default: {gpu} on a GPU, {cpu} on a CPU)",
        )
    parser.add_argument("--root", help="folder of videos, in place of made-up clips")
    parser.add_argument("--json", type=Path, help="file that takes all results")
    return parser


def about(device: torch.device, processes: int) -> dict[str, str]:
    """The machine and the versions that figures belong to."""
    is_gpu = device.type == "cuda"
    found = {
        "device": torch.cuda.get_device_name() if is_gpu else _processor(),
        "processes": str(processes),
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
    }
    if is_gpu:
        found["CUDA"] = str(torch.version.cuda)
        found["cuDNN"] = str(torch.backends.cudnn.version())
    return found


def _processor() -> str:
    name = platform.processor() or platform.machine()
    return f"CPU {name}, {torch.get_num_threads()} threads"


def main() -> None:
    """Read the command line and measure."""
    options = _parser().parse_args()
    parts = [name for name in PARTS if getattr(options, name)] or ["train"]
    with started(Parallelism(), "auto") as world:
        set_up_console(world.rank)
        measure.prepare_tracing(world.device)
        told = about(world.device, world.size)
        bench = Bench(options, world, Report(told, options.json, world.is_main))
        for name in parts:
            if name != "train" and world.size > 1:
                raise UserError(
                    f"--{name} measures one process: start it without torchrun"
                )
            PARTS[name][0](bench)


if __name__ == "__main__":
    run_command(main)
