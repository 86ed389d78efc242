"""Where the time of a compiled training step goes, plain and fused, with and without
a CUDA graph: wall time, all kernels, those that only change the layout of memory, and
the longest kernels. On a machine without a GPU it is rehearsed, small.
"""

from __future__ import annotations

import argparse
import itertools
import re

import torch

from taehv import measure
from taehv.bench import Settings, Student, synthetic_batches
from taehv.benchmark import about
from taehv.config import load_config
from taehv.distributed import World, started
from taehv.measure import Limits
from taehv.sections import Parallelism

LAYOUT = re.compile(
    r"nchwToNhwc|nhwcToNchw|convertTensor|AddPadding|transpose|Memcpy|copy|clone", re.I
)
"""Kernels that copy without computing; inductor's name what they have fused."""
ON_CPU: Settings = {
    "training.global_batch_size": 2,
    "data.frames": 4,
    "data.height": 16,
    "data.width": 16,
    "compile.enable": False,
}


def settings_of(options: argparse.Namespace, fused: bool, graph: bool) -> Settings:
    """Those of one way to run the step."""
    frames, height, width = map(int, options.size.split("x"))
    settings = {
        "model.variant": options.variant,
        "training.global_batch_size": options.clips,
        "data.root": "unused",
        "data.frames": frames,
        "data.height": height,
        "data.width": width,
        "compile.fused": fused,
        "compile.mode": options.mode,
        "compile.cuda_graph": graph,
    }
    return settings if torch.cuda.is_available() else settings | ON_CPU


def profile(world: World, settings: Settings, kernels: int) -> None:
    """Measure one way to run the step, and print it."""
    measure.free()
    config = load_config([f"--{key}={value}" for key, value in settings.items()])
    config.training.local_batch_size = config.training.global_batch_size
    student = Student(config, world)
    batches = synthetic_batches(config, world.device, 2, 0)
    on_gpu = world.device.type == "cuda"
    limits = Limits(10, 30, 20) if on_gpu else Limits(1, 3, 5)
    cost = measure.measure(student, itertools.cycle(batches), world.device, limits)
    name = "fused" if config.compile.fused else "plain"
    name += ", CUDA graph" if student.step.graph else ""
    print(f"\n{name}: {cost.ms:.2f} ms (90 % below {cost.p90_ms:.2f}), ", end="")
    print(f"first step {cost.first_s:.1f} s", end="")
    if cost.kernels is None:
        print(flush=True)
        return
    copies = [kernel for kernel in cost.kernels if LAYOUT.search(kernel[0])]
    print(f", {cost.peak_gib:.2f} GiB, host {cost.host_ms:.2f} ms")
    print(f"kernels {cost.kernel_ms:.2f} ms in {sum(k[2] for k in cost.kernels)}, ")
    print(f"of them copies {sum(ms for _, ms, _ in copies):.2f} ms", flush=True)
    for title, found in (("longest", cost.kernels), ("copies", copies)):
        print(f"  {title}")
        for kernel, ms, launches in found[:kernels]:
            print(f"    {ms:8.3f} ms {launches:5} x {kernel[:110]}", flush=True)


def main() -> None:
    """Profile every way asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="12x128x128")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--variant", default="taehv")
    parser.add_argument("--mode", default="default", help="compile.mode")
    parser.add_argument("--kernels", type=int, default=15)
    parser.add_argument("--fused-only", action="store_true")
    options = parser.parse_args()
    with started(Parallelism(), "auto") as world:
        measure.prepare_tracing(world.device)
        print(", ".join(f"{k} {v}" for k, v in about(world.device, 1).items()))
        on_gpu = world.device.type == "cuda"
        for fused in (True,) if options.fused_only else (False, True):
            for graph in (False, True) if on_gpu else (False,):
                settings = settings_of(options, fused, graph)
                profile(world, settings, options.kernels)


if __name__ == "__main__":
    main()
