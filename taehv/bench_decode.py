"""Decoding, measured: whole videos, and latents that come one by one."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from taehv import measure
from taehv.bench import REFERENCE, Bench, Size, cost_cells, way_settings
from taehv.errors import UserError
from taehv.measure import Cost
from taehv.model import TAEHV
from taehv.pretrained import place
from taehv.reference import PublishedStream, published
from taehv.streaming import StreamingTAEHV

COLUMNS = {
    "size": 11,
    "what": 9,
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
Decoder = Callable[[Tensor], Tensor]
EXACT_LATENTS = 4
"""Leading latents whose frames are compared with those computed in fp32."""


class GraphedDecoder:
    """Replays the decoding of latents of one shape as a CUDA graph."""

    def __init__(self, decode: Decoder, example: Tensor) -> None:
        self._input = example.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                decode(self._input)
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.reset_peak_memory_stats()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = decode(self._input)
        self.peak_gib = measure.peak_gib(example.device)
        """Memory that the graph keeps, with everything else in use."""

    def __call__(self, latents_NTCHW: Tensor) -> Tensor:
        """Decode; the result is overwritten by the next call."""
        self._input.copy_(latents_NTCHW)
        self._graph.replay()
        return self._output


@torch.no_grad()
def bench_decode(bench: Bench) -> None:
    """Time and memory of decoding whole videos, and latent by latent."""
    options, device = bench.options, bench.device
    for way in options.decode_ways:
        if way != REFERENCE:
            way_settings(way)  # a mistake is told before anything is measured
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    torch.backends.cudnn.benchmark = True  # as taehv.inference does
    bench.report.table(f"decoding in {str(dtype)[6:]}, times in ms", COLUMNS)
    for size, variant in itertools.product(options.decode_sizes, options.variants):
        torch.manual_seed(0)
        model = TAEHV(variant).to(device).eval()
        latents_NTCHW = latents_of(model, size).to(device)
        few_NTCHW = latents_NTCHW[:, :EXACT_LATENTS]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            exact_NTCHW = published(model).decode_video(few_NTCHW)
        rows = Rows(bench, place(model, device, dtype), size, exact_NTCHW)
        for way in options.decode_ways:
            rows.whole(way, latents_NTCHW.to(dtype))
        graphed = ("fused+graph", "compiled+fused+graph")
        for way in (REFERENCE, "fused", *(graphed if device.type == "cuda" else ())):
            rows.by_latent(way, latents_NTCHW.to(dtype))


def latents_of(model: TAEHV, size: Size) -> Tensor:
    """Random latents of a video; a UserError where there are none of its size."""
    variant, space = model.variant, model.variant.space_factor
    if size.height % space or size.width % space:
        raise UserError(f"{size}: height and width must be multiples of {space}")
    shape = 1, variant.latents_of(size.frames), variant.latent_channels
    shape += size.height // space, size.width // space
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Rows:
    """Measures and prints the ways to decode one size."""

    def __init__(
        self, bench: Bench, model: TAEHV, size: Size, exact_NTCHW: Tensor
    ) -> None:
        self.bench, self.model, self.size = bench, model, size
        self.exact_NTCHW = exact_NTCHW
        self._references: dict[str, float] = {}

    def whole(self, way: str, latents_NTCHW: Tensor) -> None:
        """Decode a whole video at a time."""
        measure.free()
        begin = time.perf_counter()
        decode = self._decoder(way, latents_NTCHW)
        first_s = time.perf_counter() - begin
        cost = self.bench.measure(decode, itertools.repeat(latents_NTCHW))
        if isinstance(decode, GraphedDecoder):
            cost.peak_gib, cost.first_s = decode.peak_gib, first_s
        frames_NTCHW = decode(latents_NTCHW)[:, : self.exact_NTCHW.shape[1]]
        error = (frames_NTCHW.float() - self.exact_NTCHW).square().mean().sqrt()
        self._print("whole", str(self.size), way, cost, f"{error.item():.1e}")

    def _decoder(self, way: str, example: Tensor) -> Decoder:
        if way == REFERENCE:
            return published(self.model).decode_video
        model = self._model(way)
        if way_settings(way).get("compile.cuda_graph"):
            return GraphedDecoder(model.decode_video, example)
        return model.decode_video

    def _model(self, way: str) -> TAEHV:
        settings = way_settings(way)
        model = copy.deepcopy(self.model)
        model.fused = bool(settings.get("compile.fused", model.fused))
        if settings.get("compile.enable"):
            model.decoder.compile(fullgraph=True, dynamic=False)
        return model

    def by_latent(self, way: str, latents_NTCHW: Tensor) -> None:
        """Decode one latent after the other."""
        measure.free()
        count = latents_NTCHW.shape[1]
        latents = latents_NTCHW.split(1, 1)
        if way == REFERENCE:
            decode = PublishedStream(published(self.model).decoder).decode
            latents = latents_NTCHW.unbind(1)
        else:
            graph = bool(way_settings(way).get("compile.cuda_graph"))
            decode = StreamingTAEHV(self._model(way), count, graph=graph).decode
        cost = self.bench.measure(decode, itertools.cycle(latents))
        size = replace(self.size, frames=self.model.time_upscale)
        self._print("by latent", str(size), way, cost)

    def _print(
        self, what: str, size: str, way: str, cost: Cost, error: str | None = None
    ) -> None:
        if way == REFERENCE:
            self._references[what] = cost.ms
        reference = self._references.get(what)
        self.bench.report.row(
            size=size,
            what=what,
            way=way,
            variant=self.model.variant_name,
            **cost_cells(cost),
            **{"error": error, "speed-up": reference / cost.ms if reference else None},
        )
