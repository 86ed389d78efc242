"""Training steps, measured: what they cost in every size, form and way."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from taehv import measure
from taehv.bench import (
    REFERENCE,
    REFERENCES,
    Bench,
    PublishedStudent,
    Size,
    Student,
    clips_of,
    cost_cells,
    form_settings,
    way_settings,
)
from taehv.model import TAEHV
from taehv.reference import published
from taehv.sections import Config

STEP_COLUMNS = {
    "size": 11,
    "variant": 7,
    "form": 9,
    "way": 22,
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
    references: dict[tuple[object, ...], float] = {}
    for case in cases:
        kind = case.size, case.variant, "seraena" in case.way
        ms = _step_row(bench, case, peak, references.get(kind))
        if case.way in REFERENCES:
            references[kind] = ms


def _cases(bench: Bench) -> Iterator[Case]:
    options = bench.options
    for size, variant in itertools.product(options.sizes, options.variants):
        settings = {"model.variant": variant, **size.settings}
        for way in REFERENCES:
            if way in options.ways and bench.world.size == 1:
                yield Case(size, variant, "-", way, bench.config(settings))
        for form, way in itertools.product(options.forms, options.ways):
            if way not in REFERENCES:
                config = bench.config(settings, form_settings(form), way_settings(way))
                yield Case(size, variant, form, way, config)


def _step_row(bench: Bench, case: Case, peak: float, reference: float | None) -> float:
    """Measure and print a row, and return its milliseconds."""
    measure.free()
    if case.way in REFERENCES:
        guided = case.way != REFERENCE
        student = PublishedStudent(case.config, bench.world, guided)
    else:
        student = Student(case.config, bench.world)
    with clips_of(bench, case.config) as feed:
        cost = bench.measure(student, feed)
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
