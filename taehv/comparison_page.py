"""The page that shows a comparison: tables, charts, pictures and videos of clips."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from taehv import page
from taehv.comparison import (
    Comparison,
    Judged,
    column_of,
    difference_rows,
    speed_rows,
    summary_rows,
)
from taehv.metrics import estimate, measure_of
from taehv.video import write_mp4
from taehv.visualize import (
    ERROR_GAIN,
    error_map,
    picture_strip,
    side_by_side,
)

CHARTED = ("psnr", "ssim", "flicker", "fine_detail", "latent_correlation")
VIDEO_RATE = 8
"""Frames a second, slow enough to see what differs."""
COLUMNS = 4
Shown = Callable[[int], tuple[Tensor, ...]]
"""Gives the input of a clip and every model's frames_TCHW, all of one shape."""


def write_comparison(
    path: Path, comparison: Comparison, shown: Shown, examples: int
) -> None:
    """Write the page.

    Args:
        path: where to.
        comparison: what was measured.
        shown: computes the frames of a clip.
        examples: how many of the worst and of the best clips to show.
    """
    body = [
        page.paragraph(_introduction(comparison)),
        *_tables(comparison),
        page.heading("By clip and by frame"),
        page.grid(_charts(comparison)),
        *_examples(comparison, shown, examples),
        page.heading("Every clip"),
        _clip_table(comparison),
        page.heading("What the measures mean"),
        page.table(["measure", "best", "meaning"], _meanings(comparison), is_text=True),
    ]
    page.write_page(path, "Evaluation", body)


def _introduction(comparison: Comparison) -> str:
    about = ", ".join(f"{name}: {value}" for name, value in comparison.about.items())
    return (
        f"Models: {len(comparison.models)}, on the same {len(comparison.clips)} clips "
        f"({about}). Means are over clips; behind ± stands half of the interval that "
        "holds the true mean in 95 of 100 cases."
    )


def _tables(comparison: Comparison) -> list[str]:
    head, *rows = summary_rows(comparison)
    parts = [page.heading("Summary"), page.table(head, rows)]
    head, *rows = speed_rows(comparison)
    parts += [page.heading("Speed and memory"), page.table(head, rows)]
    sources = [[model.name, *_sources(model)] for model in comparison.models]
    heads = ["model", "variant", "source"]
    parts.append(page.table(heads, sources, is_text=True))
    if len(comparison.models) > 1:
        head, *rows = difference_rows(comparison)
        note = "Paired, clip by clip; * where the interval leaves out zero."
        parts += [page.heading("Differences"), page.table(head, rows, note)]
    return parts


def _sources(model: Judged) -> list[str]:
    return [model.about.get(key, "") for key in ("variant", "source")]


def _charts(comparison: Comparison) -> list[str]:
    names = [name for name in CHARTED if name in comparison.names()]
    charts = [
        page.chart(
            [
                page.Series(
                    model.name,
                    sorted(model.values),
                    [
                        model.values[clip].get(name, float("nan"))
                        for clip in sorted(model.values)
                    ],
                )
                for model in comparison.models
            ],
            f"{column_of(name)} by clip",
            "clip",
            column_of(name),
            lines=False,
        )
        for name in names
    ]
    by_frame = [_by_frame(model) for model in comparison.models]
    charts.append(
        page.chart(by_frame, "PSNR by frame, mean over clips", "frame", "PSNR dB")
    )
    by_place = [_by_place(model) for model in comparison.models]
    if any(series.xs for series in by_place):
        caption = "PSNR by place among the frames that a latent stands for"
        charts.append(page.chart(by_place, caption, "place", "PSNR dB"))
    return charts


def _by_frame(model: Judged) -> page.Series:
    longest = max(map(len, model.frame_psnr.values()), default=0)
    means = [
        estimate([v[i] for v in model.frame_psnr.values() if i < len(v)]).mean
        for i in range(longest)
    ]
    return page.Series(model.name, range(1, longest + 1), means)


def _by_place(model: Judged) -> page.Series:
    means, prefix = model.means(), "psnr_position_"
    places = sorted(
        int(name.removeprefix(prefix)) for name in means if name.startswith(prefix)
    )
    values = [means[f"{prefix}{place}"].mean for place in places]
    return page.Series(model.name, places, values)


def _examples(comparison: Comparison, shown: Shown, count: int) -> list[str]:
    """The worst and the best clips of the first model."""
    first = comparison.models[0]
    ranked = sorted(first.values, key=lambda clip: first.values[clip]["psnr"])
    worst, rest = ranked[:count], ranked[count:]
    best = rest[max(0, len(rest) - count) :][::-1]
    parts = []
    for title, clips in (("Worst clips", worst), ("Best clips", best)):
        if clips:
            parts.append(page.heading(f"{title} of {first.name}"))
        for clip in clips:
            parts += _example(comparison, clip, shown(clip))
    return parts


def _example(comparison: Comparison, clip: int, frames: Sequence[Tensor]) -> list[str]:
    names = [model.name for model in comparison.models]
    psnr = ", ".join(
        f"{model.name} {model.values[clip]['psnr']:.2f} dB"
        for model in comparison.models
        if clip in model.values
    )
    errors = [error_map(frames[0], decoded) for decoded in frames[1:]]
    rows = (*frames, *errors)
    labels = ["input", *names, *(f"error {name}" for name in names)]
    labels = [label if len(label) < 25 else label[:24] + "…" for label in labels]
    strip = picture_strip([rows], columns=COLUMNS, labels=labels)
    beside = side_by_side([tuple(frames)])
    order = ", ".join(["input", *names])
    return [
        page.heading(f"Clip {clip}: {comparison.clips[clip].file}", level=3),
        page.paragraph(psnr),
        page.video(_mp4(beside), f"From the left: {order}. {VIDEO_RATE} frames/s."),
        page.picture(strip, f"Errors are shown {ERROR_GAIN} times as bright."),
    ]


def _mp4(frames_THWC: np.ndarray) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, frames_THWC, VIDEO_RATE)
        return path.read_bytes()


def _clip_table(comparison: Comparison) -> str:
    head = ["clip", "file", "size", *(f"{m.name} PSNR dB" for m in comparison.models)]
    rows = []
    for number, clip in enumerate(comparison.clips):
        values = [
            model.values.get(number, {}).get("psnr") for model in comparison.models
        ]
        written = ["-" if value is None else f"{value:.2f}" for value in values]
        size = f"{clip.frames} x {clip.width} x {clip.height}"
        rows.append([str(number), clip.file, size, *written])
    return page.table(head, rows)


def _meanings(comparison: Comparison) -> list[list[str]]:
    rows = []
    for name in comparison.names():
        meaning = measure_of(name)
        if meaning is not None:
            best = "high" if meaning.best == float("inf") else f"{meaning.best:g}"
            rows.append([column_of(name), best, meaning.text])
    return rows
