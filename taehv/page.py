"""HTML pages of one file each: text, tables, charts, pictures and videos in it.

Nothing is loaded from elsewhere, so that a page can be sent as it is and opens from
the disk. Every function returns HTML; texts given to them are escaped.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from taehv.writing import write_text

COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"),
    *("#882255", "#999933", "#332288", "#888888", "#661100", "#44aa99", "#aa4499"),
    *("#b8860b", "#117733"),
)
"""The first seven are told apart by the colour-blind, too (Okabe and Ito,
jfly.uni-koeln.de/color)."""
WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 40
MOST_DOTS = 150
STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: #1c1e21;
  background: #fff; font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.25rem; margin: 2rem 0 0.5rem; border-bottom: 1px solid #d8dce1; }
h3 { font-size: 1rem; margin: 1.25rem 0 0.25rem; }
p { margin: 0.5rem 0; max-width: 46rem; }
.scroll { overflow-x: auto; margin: 0.75rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.note { color: #5a626b; font-size: 0.875rem; }
th, td { padding: 0.3rem 0.6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #e6e9ed; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.text th, .text td { text-align: left; white-space: normal; vertical-align: top; }
.text td:first-child { white-space: nowrap; }
th { background: #fff; border-bottom-color: #9aa3ad; }
tbody tr:hover { background: #f3f6f9; }
.grid { display: grid; gap: 1rem 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0.75rem 0; min-width: 0; }
figure img, figure video { display: block; max-width: 100%; height: auto;
  background: #e6e9ed; }
figcaption { color: #3d444c; font-size: 0.875rem; }
figcaption:first-child { color: inherit; font-size: inherit; font-weight: 600; }
figure video { width: 100%; max-width: none; min-width: 36rem; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: 0.875rem; }
.legend i { display: inline-block; width: 0.75rem; height: 0.75rem;
  margin-right: 0.35rem; }
"""


def write_page(path: str | os.PathLike[str], title: str, body: Iterable[str]) -> None:
    """Write a page, whole or not at all.

    Args:
        path: where to.
        title: its name and first heading.
        body: what the other functions returned, in order.
    """
    path = Path(path)
    named = html.escape(title)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,"><title>{named}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{named}</h1>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    write_text(path, page)


def heading(text: str, level: int = 2) -> str:
    """A heading of a section, or at level 3 of a part of one."""
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    """Running text."""
    return f"<p>{html.escape(text)}</p>"


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    caption: str = "",
    is_text: bool = False,
) -> str:
    """A table, the first column names and the rest numbers, or texts; wide ones scroll.

    Args:
        columns: their heads.
        rows: a cell for each column.
        caption: stands below.
        is_text: whether the cells are texts, which begin on the left and are broken.
    """

    def row(cells: Iterable[object], tag: str) -> str:
        inner = "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
        return f"<tr>{inner}</tr>"

    # Outside of what scrolls, so that it is broken where the window ends.
    named = f'<p class="note">{html.escape(caption)}</p>' if caption else ""
    lines = "\n".join(row(cells, "td") for cells in rows)
    kind = "text" if is_text else "numbers"
    return (
        f'<div class="scroll"><table class="{kind}">\n'
        f"<thead>{row(columns, 'th')}</thead>\n"
        f"<tbody>{lines}</tbody></table></div>{named}"
    )


def grid(items: Iterable[str]) -> str:
    """Figures beside one another where the window has room for it."""
    return f'<div class="grid">{"".join(items)}</div>'


def picture(pixels_HWC: np.ndarray, caption: str, is_photo: bool = True) -> str:
    """A picture, uint8 RGB: as JPEG of high quality, or losslessly as PNG."""
    stream = io.BytesIO()
    kind, options = ("JPEG", {"quality": 92}) if is_photo else ("PNG", {})
    Image.fromarray(pixels_HWC).save(stream, kind, **options)
    height, width = pixels_HWC.shape[:2]
    source = _data(f"image/{kind.lower()}", stream.getvalue())
    return _figure(
        f'<img src="{source}" width="{width}" height="{height}" '
        f'alt="{html.escape(caption)}">',
        caption,
    )


def video(mp4: bytes, caption: str) -> str:
    """A video that plays without sound and without end; H.264 in MP4."""
    return _figure(
        f'<div class="scroll"><video src="{_data("video/mp4", mp4)}" controls autoplay '
        "loop muted playsinline></video></div>",
        caption,
    )


def _figure(media: str, caption: str) -> str:
    return f"<figure>{media}{_caption(caption)}</figure>"


def _caption(text: str) -> str:
    return f"<figcaption>{html.escape(text)}</figcaption>"


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# --- charts ------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One line of a chart; points with a y that is not finite are left out."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    band: Sequence[tuple[float, float]] = ()
    """Of each point the lowest and highest likely y, shaded; empty shades none."""


def chart(
    series: Sequence[Series],
    caption: str,
    x_label: str,
    y_label: str,
    lines: bool = True,
    log_y: bool = False,
) -> str:
    """A chart as inline SVG, its values shown where the mouse rests.

    Args:
        series: lines, told apart by colour; where there are several, with a legend.
        caption: what is shown, above.
        x_label: under the horizontal axis.
        y_label: above the vertical axis.
        lines: connect each one's points in turn; else dots alone.
        log_y: logarithmic; values of zero and less are left out.
    """
    shown = [_finite(one, log_y) for one in series]
    axes = _Axes(shown, log_y)
    marks = [
        _marks(one, axes, COLORS[i % len(COLORS)], lines) for i, one in enumerate(shown)
    ]
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(caption)}">{axes.svg(x_label, y_label)}'
        f"{''.join(marks)}</svg>"
    )
    legend = _legend(series) if len(series) > 1 else ""
    return f"<figure>{_caption(caption)}{svg}{legend}</figure>"


def _finite(one: Series, log_y: bool) -> Series:
    least = 0 if log_y else -math.inf
    kept = [i for i, y in enumerate(one.ys) if math.isfinite(y) and y > least]
    band = [one.band[i] for i in kept] if one.band else []
    # Where one bound is not finite, the point alone is sure.
    sure = [
        bounds
        if least < bounds[0] and math.isfinite(bounds[1] - bounds[0])
        else (one.ys[i], one.ys[i])
        for i, bounds in zip(kept, band, strict=False)
    ]
    return Series(one.name, [one.xs[i] for i in kept], [one.ys[i] for i in kept], sure)


class _Axes:
    """Where values lie in the picture, and the lines and numbers that tell it."""

    def __init__(self, series: Sequence[Series], log_y: bool) -> None:
        self.log_y = log_y
        xs = [x for one in series for x in one.xs] or [0.0]
        values = [y for one in series for y in (*one.ys, *itertools.chain(*one.band))]
        ys = [self._scaled(y) for y in values] or [0.0]
        y_ticks = _log_ticks if log_y else _ticks
        self.x_ticks, self.y_ticks = _ticks(min(xs), max(xs)), y_ticks(min(ys), max(ys))
        self.x_span = min(xs), max(xs)
        if self.x_span[0] == self.x_span[1]:
            self.x_span = self.x_ticks[0], self.x_ticks[-1]
        if all(float(x).is_integer() for x in xs):  # clips, frames, steps
            self.x_ticks = [x for x in self.x_ticks if float(x).is_integer()]
        self.y_span = self.y_ticks[0], self.y_ticks[-1]

    def _scaled(self, y: float) -> float:
        return math.log10(y) if self.log_y else y

    def x(self, value: float) -> float:
        low, high = self.x_span
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        return self._y(self._scaled(value))

    def _y(self, scaled: float) -> float:
        low, high = self.y_span
        share = (scaled - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP - 16) * share

    def svg(self, x_label: str, y_label: str) -> str:
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = [
            f'<text x="4" y="{TOP + 4}" fill="#3d444c">{html.escape(y_label)}</text>',
            f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle" '
            f'fill="#3d444c">{html.escape(x_label)}</text>',
        ]
        for tick in self.y_ticks:
            y = self._y(tick)
            label = _number(10**tick if self.log_y else tick)
            parts.append(
                f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#e1e5ea"/><text '
                f'x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
            )
        for tick in self.x_ticks:
            if self.x_span[0] <= tick <= self.x_span[1]:
                parts.append(
                    f'<path d="M{self.x(tick):.1f} {bottom}v4" stroke="#5a626b"/><text '
                    f'x="{self.x(tick):.1f}" y="{bottom + 17}" text-anchor="middle">'
                    f"{_number(tick)}</text>"
                )
        return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers that enclose both."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-12):
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """The same for logarithms: those of 1, 2 and 5, or of powers of ten alone."""
    first, last = math.floor(low), math.ceil(high)
    last += first == last
    if last - first > 3:
        step = math.ceil((last - first) / 8)
        return [float(i) for i in range(first, last + step, step)]
    fine = [i + math.log10(m) for i in range(first, last + 1) for m in (1, 2, 5)]
    inside = [tick for tick in fine if low < tick < high]
    below = max((tick for tick in fine if tick <= low), default=fine[0])
    above = min((tick for tick in fine if tick >= high), default=fine[-1])
    return [below, *inside, above + (above == below)]


def _number(value: float) -> str:
    return f"{value:.4g}"


def _marks(one: Series, axes: _Axes, color: str, lines: bool) -> str:
    places = [
        (f"{axes.x(x):.1f}", f"{axes.y(y):.1f}", x, y)
        for x, y in zip(one.xs, one.ys, strict=True)
    ]
    parts = []
    if one.band:
        lows, highs = (
            [
                f"{axes.x(x):.1f} {axes.y(y):.1f}"
                for x, y in zip(one.xs, bound, strict=True)
            ]
            for bound in zip(*one.band, strict=True)
        )
        path = "L".join([*lows, *reversed(highs)])
        parts.append(f'<path d="M{path}Z" fill="{color}" fill-opacity="0.15"/>')
    if lines and places:
        path = "L".join(f"{x} {y}" for x, y, _, _ in places)
        parts.append(
            f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="1.5"/>'
        )
    if not lines or len(places) <= MOST_DOTS:
        parts += [
            f'<circle cx="{cx}" cy="{cy}" r="3" fill="{color}"><title>'
            f"{html.escape(one.name)}: {_number(x)}, {_number(y)}</title></circle>"
            for cx, cy, x, y in places
        ]
    return "".join(parts)


def _legend(series: Sequence[Series]) -> str:
    items = (
        f'<span><i style="background:{COLORS[i % len(COLORS)]}"></i>'
        f"{html.escape(one.name)}</span>"
        for i, one in enumerate(series)
    )
    return f'<div class="legend">{"".join(items)}</div>'
