"""Several models judged on the same clips: means, differences, tables, JSON and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from taehv.metrics import Clips, Estimate, differences, estimates, measure_of

NOT_MEASURED = "-"


@dataclass(frozen=True)
class JudgedClip:
    """A window of a file that every model was given."""

    file: str
    position: float
    """Where it lies among the windows of the file, from 0 to 1."""
    frames: int
    height: int
    width: int


@dataclass
class Speed:
    """How long a model takes for a clip, and what it needs for that."""

    encode_ms: float
    """Of a frame."""
    decode_ms: float
    """Of a frame of the input's, also where a preview has fewer."""
    peak_gib: float | None
    """Memory of the GPU, or else of the process; None where it cannot be told."""
    height: int
    width: int


@dataclass
class Judged:
    """A model and what it measures on the clips."""

    name: str
    about: dict[str, str]
    """What is known of it: source, variant, parameters, ..."""
    values: dict[int, dict[str, float]] = field(default_factory=dict)
    """Of each clip, by the names of metrics.MEASURES."""
    frame_psnr: dict[int, list[float]] = field(default_factory=dict)
    """Of each clip by frame, in dB."""
    speed: Speed | None = None

    @property
    def clips(self) -> Clips:
        """As the functions of metrics take it."""
        return self.values

    def means(self) -> dict[str, Estimate]:
        """With their intervals."""
        return estimates(self.values)


@dataclass
class Comparison:
    """Models in the order in which they were named, and the clips."""

    about: dict[str, Any]
    clips: list[JudgedClip]
    models: list[Judged]

    def names(self) -> list[str]:
        """The measures that any model has, those of all pixels first."""
        found = [name for model in self.models for name in model.means()]
        return sorted(dict.fromkeys(found), key=lambda n: "position" in n)

    def main_names(self) -> list[str]:
        """Those of the tables: without the parts that charts show."""
        return [name for name in self.names() if "psnr_position" not in name]

    def pairs(self) -> list[tuple[Judged, Judged, dict[str, Estimate]]]:
        """Each two models, and by how much the second differs from the first."""
        return [
            (one, other, differences(other.values, one.values))
            for i, one in enumerate(self.models)
            for other in self.models[i + 1 :]
        ]

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file; numbers that are not finite become null."""
        return _finite(
            {
                "about": self.about,
                "clips": [vars(clip) for clip in self.clips],
                "models": [
                    {
                        "name": model.name,
                        "about": model.about,
                        "speed": vars(model.speed) if model.speed else None,
                        "means": {k: vars(v) for k, v in model.means().items()},
                        "values": {str(k): v for k, v in model.values.items()},
                        "frame_psnr": {str(k): v for k, v in model.frame_psnr.items()},
                    }
                    for model in self.models
                ],
                "differences": [
                    {
                        "model": other.name,
                        "less": one.name,
                        "means": {k: vars(v) for k, v in found.items()},
                    }
                    for one, other, found in self.pairs()
                ],
            }
        )

    def as_csv(self) -> str:
        """A line for each model and clip."""
        stream = io.StringIO()
        places = ["file", "position", "frames", "height", "width"]
        names = self.names()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["model", "clip", *places, *names])
        for model in self.models:
            for number, values in sorted(model.values.items()):
                clip = vars(self.clips[number])
                row = [model.name, number, *(clip[place] for place in places)]
                writer.writerow(row + [values.get(name, "") for name in names])
        return stream.getvalue()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- text --------------------------------------------------------------------------


def column_of(name: str) -> str:
    """The head of a measure's column."""
    meaning = measure_of(name)
    if meaning is None:
        return name
    return f"{meaning.title} {meaning.unit}".strip()


def written(name: str, found: Estimate | None, sign: str = "") -> str:
    """A mean and half of its interval: "31.24 ± 0.52"."""
    if found is None:
        return NOT_MEASURED
    meaning = measure_of(name)
    digits = 2 if meaning is not None and meaning.unit else 4
    mean = f"{found.mean:{sign}.{digits}f}"
    reach = (found.high - found.low) / 2
    return f"{mean} ± {reach:.{digits}f}" if math.isfinite(reach) else mean


def summary_rows(comparison: Comparison) -> list[list[str]]:
    """A row for each measure, a column for each model, names first."""
    means = [model.means() for model in comparison.models]
    rows = [["", *(model.name for model in comparison.models)]]
    for name in comparison.main_names():
        found = [of_model.get(name) for of_model in means]
        head = _counted(name, found, len(comparison.clips))
        rows.append([head, *(written(name, one) for one in found)])
    return rows


def _counted(name: str, found: Sequence[Estimate | None], clips: int) -> str:
    """A measure's name, and of how many clips its means are if not of all."""
    counts = {one.clips for one in found if one is not None} or {clips}
    if counts == {clips}:
        return column_of(name)
    told = " to ".join(map(str, sorted({min(counts), max(counts)})))
    return f"{column_of(name)} ({told} of {clips} clips)"


def speed_rows(comparison: Comparison) -> list[list[str]]:
    """A row for each model, the first being the head."""
    rows = [
        [
            "model",
            "parameters",
            "encode ms/frame",
            "decode ms/frame",
            "at",
            "peak GiB, all loaded",
        ]
    ]
    for model in comparison.models:
        speed, size = model.speed, model.about.get("parameters", NOT_MEASURED)
        if speed is None:
            continue
        peak = NOT_MEASURED if speed.peak_gib is None else f"{speed.peak_gib:.2f}"
        times = [f"{speed.encode_ms:.2f}", f"{speed.decode_ms:.2f}"]
        rows.append([model.name, size, *times, f"{speed.width} x {speed.height}", peak])
    return rows


def difference_rows(comparison: Comparison, of_first: bool = False) -> list[list[str]]:
    """A row for each measure, a column for each two models, or each with the first.

    A star marks an interval that leaves out zero: only there is one surely better.
    """
    pairs = comparison.pairs()
    if of_first:
        pairs = [pair for pair in pairs if pair[0] is comparison.models[0]]
    rows = [["", *(f"{other.name} less {one.name}" for one, other, _ in pairs)]]
    for name in comparison.main_names():
        found = [differing.get(name) for _, _, differing in pairs]
        head = _counted(name, found, len(comparison.clips))
        rows.append([head, *(_difference(name, one) for one in found)])
    return rows


def _difference(name: str, found: Estimate | None) -> str:
    is_sure = found is not None and (found.low > 0 or found.high < 0)
    return written(name, found, sign="+") + (" *" if is_sure else "")


def aligned_text(rows: Sequence[Sequence[str]], bold_head: bool = False) -> str:
    """A table for a terminal: names on the left, the rest on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if bold_head:
        lines[0] = f"\x1b[1m{lines[0]}\x1b[0m"
    return "\n".join(lines)
