"""Decoding, measured: whole videos, and latents that come one by one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from taehv import measure
from taehv.bench import REFERENCE, Bench, Size, cost_cells
from taehv.errors import UserError
from taehv.model import TAEHV
from taehv.reference import PublishedStream, published
from taehv.streaming import StreamingTAEHV

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
