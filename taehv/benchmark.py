"""Measure training and decoding on this machine, beside the published way of both.

python -m taehv.benchmark                                       # training steps
torchrun --nproc_per_node 8 -m taehv.benchmark --forms replicate,fsdp,offload
python -m taehv.benchmark --decode --json results.json
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from taehv import measure
from taehv.bench import DEFAULT, FORMS, PLAIN, REFERENCE, SWITCHES, Bench, Size
from taehv.bench_curves import bench_curves
from taehv.bench_data import bench_data
from taehv.bench_decode import bench_decode
from taehv.bench_memory import bench_memory
from taehv.bench_recipe import bench_recipe
from taehv.bench_start import bench_start
from taehv.bench_teacher import bench_teacher
from taehv.bench_train import bench_train
from taehv.distributed import started
from taehv.errors import Parser, UserError, run_command
from taehv.logging import set_up_console
from taehv.measure import Report
from taehv.sections import Parallelism
from taehv.urls import local_path

PARTS: dict[str, tuple[Callable[[Bench], None], str]] = {
    "train": (bench_train, "training steps; the default"),
    "decode": (bench_decode, "decoding of whole videos, and latent by latent"),
    "data": (bench_data, "decoding of training clips from the videos under --root"),
    "teacher": (bench_teacher, "steps with a teacher, live and cached"),
    "curves": (bench_curves, "loss curves of all ways, beside three seeds"),
    "memory": (bench_memory, "the largest batch that fits"),
    "recipe": (bench_recipe, "recipes of a --study; see docs/recipe.md"),
    "start": (bench_start, "the time from launch to the first step"),
}


def _listed(kind: Callable[[str], Any] = str) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


OPTIONS: dict[str, tuple[Callable[[str], Any], str, str, str]] = {
    "sizes": (_listed(Size.parse), "12x128x128,12x64x64", "5x32x32", "clips' sizes"),
    "clips": (int, "16", "2", "clips of a step on each process"),
    "variants": (_listed(), "taehv", "taehv", "which models"),
    "ways": (
        _listed(),
        f"{REFERENCE},{PLAIN},compiled,compiled+fused,compiled+fused+graph,"
        f"{REFERENCE}+seraena,compiled+fused+graph+seraena",
        f"{REFERENCE},{PLAIN}",
        f"ways to run a step: {REFERENCE} (the recipe), {PLAIN}, {DEFAULT} (of the "
        f"settings), or switches joined by +: {', '.join(SWITCHES)}",
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
    "decode-ways": (
        _listed(),
        f"{REFERENCE},fused,compiled,compiled+fused,compiled+fused+graph",
        f"{REFERENCE},{PLAIN},fused",
        "ways to decode, as ways to run a step",
    ),
    "teacher-size": (Size.parse, "16x128x128", "8x32x32", "clips' size"),
    "teacher-rows": (
        _listed(),
        "eager,compiled,cached",
        "eager,cached",
        "the teacher live, as it is and compiled, and from a cache",
    ),
    "cache-windows": (int, "256", "8", "windows that precompute encodes"),
    "curve-steps": (int, "500", "20", "steps of a curve"),
    "curve-batches": (int, "32", "4", "different batches of a curve"),
    "memory-sizes": (_listed(Size.parse), "17x480x720", "17x480x720", "clips' sizes"),
    "memory-ways": (
        _listed(),
        "compiled+fused,compiled+fused+checkpointing",
        "fused",
        "ways to run a step",
    ),
    "memory-gib": (float, "0", "0", "how much of it may be used; 0: all there is"),
    "warmup": (int, "10", "1", "calls that do not count"),
    "calls": (int, "30", "3", "calls that count"),
    "seconds": (float, "10", "2", "about the most for those that count"),
    "workers": (int, "-1", "0", "decoding processes, for --root"),
    "kernels": (int, "0", "0", "how many of the longest kernels to list"),
}
"""What each option is read by, its default on a GPU and on a CPU, and its help."""


RECIPE_OPTIONS: dict[str, tuple[Callable[[str], Any], Any, str]] = {
    "study": (Path, Path("tests/gpu/recipe.toml"), "file of what is compared"),
    "stages": (_listed(), None, "which of its stages; by default all"),
    "output": (
        local_path,
        Path("outputs/recipe"),
        "folder that keeps results and tables",
    ),
    "also": (str, None, "folder of other videos, to be judged before and after"),
    "seconds-limit": (float, None, "no training begins that would not end by then"),
}
"""What each option is read by, its default, and its help."""


def _parser() -> Parser:
    parser = Parser(
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
    for name, (kind, default, text) in RECIPE_OPTIONS.items():
        told = f"with --recipe: {text}" + (f" (default: {default})" if default else "")
        parser.add_argument(f"--{name}", type=kind, default=default, help=told)
    parser.add_argument(
        "--set",
        action="append",
        metavar="SECTION.SETTING=VALUE",
        help="with --recipe: a setting of all arms; may come several times",
    )
    parser.add_argument("--json", type=local_path, help="file that takes all results")
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
