"""Curves and pictures of training runs, as PNG and as one HTML page.

python -m taehv.report outputs/NAME
python -m taehv.report outputs/NAME outputs/OTHER --output comparison

For runs that are done, under way, or were killed. Several runs share each chart.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tomli
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from taehv import page
from taehv.best import best_validation
from taehv.errors import Parser, UserError, run_command
from taehv.metrics import DECODER, MEASURES, measure_of
from taehv.page import COLORS, Series
from taehv.sections import Config
from taehv.urls import local_path
from taehv.visualize import LABEL_PIXELS, written

POINTS = 300
"""The most of one line: a longer one shows means of as many steps as it takes."""
PLACES = "psnr_position_"
CONSTANT = ("mean_color_psnr", "teacher_psnr")
"""Measures of the clips alone, which training does not change: no curve."""
HELD_OUT = (
    *("data.root", "data.sources", "data.annotations"),
    *("data.holdout", "data.holdout_fraction", "validation.clips"),
)
"""What held-out clips of videos depend on, beside their size."""
SPEEDS = {
    "clips_per_second": "clips a second",
    "data_wait": "share of the time that waits for data",
    "memory_gib": "GPU memory, GiB",
    "host_memory_gib": "host memory, GiB",
}
CHART_INCHES = 4.5, 3.0
COLUMNS = 3
CAPTION_PIXELS = 20
"""Height of a line."""
NARROW = 560
"""Pixels of a strip that has room for another beside it."""


@dataclass
class Run:
    """What a run's folder holds so far; anything may be missing."""

    name: str
    folder: Path
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    settings: dict[str, dict[str, Any]]
    speeds: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    """By name the steps and the values at them."""


@dataclass(frozen=True)
class Chart:
    """To be drawn into the page and into a PNG."""

    title: str
    series: list[Series]
    y_label: str
    x_label: str = "step"
    log_y: bool = False


# --- reading -----------------------------------------------------------------------


def read_run(folder: Path) -> Run:
    """Read what a run has written so far.

    Raises:
        UserError: the folder is none, or no run has written to it.
    """
    if not (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder} is no run's folder: give one, such as outputs/NAME")
    try:
        settings = tomli.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (FileNotFoundError, tomli.TOMLDecodeError, UnicodeDecodeError):
        settings = {}
    return Run(
        folder.resolve().name,
        folder,
        _records(folder / "metrics.jsonl"),
        _records(folder / "validation.jsonl"),
        settings,
        _speeds(folder / "tensorboard"),
    )


def _records(path: Path) -> list[dict[str, Any]]:
    """Its lines, up to one that is not whole: the run is at it, or was killed there."""
    records = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if isinstance(record, dict) and _is_number(record.get("step")):
            records.append(record)
    return records


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _speeds(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """What TensorBoard alone was told, since it differs between equal runs."""
    if not folder.is_dir():
        return {}
    # It warns of steps out of order, as a resumed run has them.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(folder), {"scalars": 0, "images": 1, "tensors": 1})
    events.Reload()
    found = {}
    for name in SPEEDS.keys() & {
        tag.removeprefix("train/") for tag in events.Tags()["scalars"]
    }:
        scalars = events.Scalars(f"train/{name}")
        found[name] = [s.step for s in scalars], [s.value for s in scalars]
    return found


# --- charts ------------------------------------------------------------------------


def training_charts(runs: Sequence[Run]) -> list[Chart]:
    """Of each loss, PSNR, gradient norm and learning rate."""
    names = _names(run.steps for run in runs)
    order = ["loss", "psnr", *sorted(names - {"loss", "psnr"})]
    charts = []
    for name in filter(names.__contains__, order):
        lines = [_binned(run.name, *_column(run.steps, name)) for run in runs]
        values = [y for line in lines for y in line.ys if math.isfinite(y)]
        if name == "skipped" and not any(values):
            continue
        log_y = name not in ("psnr", "learning_rate") and min(values, default=0) > 0
        unit = "dB" if name == "psnr" else ""
        charts.append(Chart(_title(name), lines, unit, log_y=log_y))
    return charts


def validation_charts(runs: Sequence[Run]) -> list[Chart]:
    """Of each measure with its 95 % interval, and of PSNR by a frame's place."""
    charts = []
    for name in [name for name in _measured(runs) if name not in CONSTANT]:
        about = measure_of(name)
        lines = [
            Series(
                run.name,
                *_column(run.validations, name),
                band=_bands(run.validations, name),
            )
            for run in runs
        ]
        charts.append(Chart(about.title, lines, about.unit))
    lines = [
        line
        for run in runs
        for line in _by_place(run, only_last=len(runs) > 1)
        if line.xs
    ]
    if lines:
        title = "PSNR by the place of a frame among those of its latent"
        charts.append(Chart(title, lines, "dB", x_label="place"))
    return charts


def speed_charts(runs: Sequence[Run]) -> list[Chart]:
    """Of what differs between equal runs."""
    return [
        Chart(
            title,
            [_binned(run.name, *run.speeds.get(name, ([], []))) for run in runs],
            "",
        )
        for name, title in SPEEDS.items()
        if any(name in run.speeds for run in runs)
    ]


def _names(tables: Iterator[list[dict[str, Any]]]) -> set[str]:
    """Of all columns with numbers, but for those that count."""
    names = {
        name
        for table in tables
        for record in table
        for name, value in record.items()
        if _is_number(value)
    }
    return names - {"step", "samples", "clips", "seconds"}


def _measured(runs: Sequence[Run]) -> list[str]:
    """Measures that a run has, in the order in which they are known."""
    names = {n for n in _names(run.validations for run in runs) if measure_of(n)}
    places = list(MEASURES)
    return sorted(
        (name for name in names if PLACES not in name),
        key=lambda name: (
            name not in MEASURES,
            places.index(name.removeprefix(DECODER)),
        ),
    )


def _column(
    records: list[dict[str, Any]], name: str
) -> tuple[list[float], list[float]]:
    """The steps that have a value, or null for one that is not finite, and these."""
    having = [record for record in records if name in record]
    values = (record[name] for record in having)
    return [record["step"] for record in having], [
        float(value) if _is_number(value) else math.nan for value in values
    ]


def _bands(records: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    bands = []
    for record in (record for record in records if name in record):
        bounds = (record.get("intervals") or {}).get(name) or [math.nan, math.nan]
        bands.append((float(bounds[0]), float(bounds[1])))
    return bands


def _binned(name: str, xs: Sequence[float], ys: Sequence[float]) -> Series:
    """Means of as many points in a row as it takes to have POINTS at most."""
    size = math.ceil(len(xs) / POINTS) or 1
    bins = [
        [y for y in ys[i : i + size] if math.isfinite(y)]
        for i in range(0, len(xs), size)
    ]
    means = [math.fsum(values) / len(values) if values else math.nan for values in bins]
    return Series(
        name, [xs[min(i + size, len(xs)) - 1] for i in range(0, len(xs), size)], means
    )


def _by_place(run: Run, only_last: bool) -> list[Series]:
    lines = []
    for record in (
        run.validations[-1:]
        if only_last
        else run.validations[:: max(1, len(run.validations) - 1)]
    ):
        places = sorted(
            (int(key.removeprefix(PLACES)), value)
            for key, value in record.items()
            if key.startswith(PLACES) and _is_number(value)
        )
        name = run.name if only_last else f"step {record['step']}"
        lines.append(Series(name, [p for p, _ in places], [v for _, v in places]))
    return lines


def _title(name: str) -> str:
    words = name.replace("psnr", "PSNR").replace("_", " ")
    return f"training {words}" if name in ("loss", "psnr") else words


# --- the page ----------------------------------------------------------------------


def write_report(runs: Sequence[Run], output: Path) -> list[Path]:
    """Write index.html, curves.png and, where runs have pictures, strips.png.

    Args:
        runs: one, or several to be compared.
        output: folder, made if need be.

    Returns:
        The files.
    """
    output.mkdir(parents=True, exist_ok=True)
    training, judged = training_charts(runs), validation_charts(runs)
    speed = speed_charts(runs)
    strips = [strip for run in runs for strip in _strips(run, len(runs) > 1)]
    files = [output / "index.html", output / "curves.png"]
    _draw([*judged, *training, *speed], files[1])
    if strips:
        files.append(output / "strips.png")
        Image.fromarray(_stacked(strips)).save(files[2])
    title = " and ".join(run.name for run in runs)
    body = [page.paragraph(_progress(run)) for run in runs]
    if unlike := _unlike(runs):
        told = "Not judged on the same clips, so that validations do not compare: "
        body.append(page.paragraph(f"{told}{', '.join(unlike)} differ."))
    body += _validation_section(runs, judged)
    if strips:
        body += [page.heading("Held-out clips")]
        pictures = [page.picture(pixels, caption) for pixels, caption in strips]
        is_narrow = max(pixels.shape[1] for pixels, _ in strips) <= NARROW
        body += [page.grid(pictures)] if is_narrow else pictures
        body += _videos(runs)
    body += [page.heading("Training"), *_grid(training)]
    body += [page.heading("Speed"), *_grid(speed)] if speed else []
    body += _settings(runs)
    page.write_page(files[0], title, body)
    return files


def _unlike(runs: Sequence[Run]) -> list[str]:
    """Settings that choose or cut held-out clips, where they are not the same."""
    judged = [_judged_by(table) for table in _tables(runs)]
    keys = dict.fromkeys(itertools.chain(*judged))
    first = judged[0]
    return [key for key in keys if any(j.get(key) != first.get(key) for j in judged)]


def _judged_by(table: Mapping[str, Any]) -> dict[str, Any]:
    """What the held-out clips of a run depend on; a cache has its own."""
    if table["data.cache"]:
        return {"data.cache": table["data.cache"]}
    sizes = {
        f"validation.{key}": table[f"validation.{key}"] or table[f"data.{key}"]
        for key in ("frames", "height", "width")
    }
    return {key: table[key] for key in HELD_OUT} | sizes


def _progress(run: Run) -> str:
    done = int(run.steps[-1]["step"]) if run.steps else 0
    total = run.settings.get("training", {}).get("steps", "?")
    skipped = run.steps[-1].get("skipped", 0) if run.steps else 0
    return f"{run.name}: {done} of {total} steps done, {skipped} of them skipped."


def _validation_section(runs: Sequence[Run], charts: list[Chart]) -> list[str]:
    heading = page.heading("Validation")
    if not charts:
        return [heading, page.paragraph("There has been no validation yet.")]
    rows = [
        [measure_of(name).title, *(_last(run, name) for run in runs)]
        for name in _measured(runs)
    ]
    for row, name in (("step", "step"), ("clips", "clips"), ("seconds", "seconds")):
        rows.append([row, *(_last(run, name) for run in runs)])
    best = [_best(run) for run in runs]
    if any(best):
        rows.append(["best", *best])
    caption = (
        "The last validation: means over its clips with their 95 % intervals "
        "(Student's, which take clips for independent draws)."
    )
    meanings = [
        f"{measure_of(name).title}: {measure_of(name).text}" for name in _measured(runs)
    ]
    return [
        heading,
        page.table(["", *(run.name for run in runs)], rows, caption),
        *_grid(charts),
        page.paragraph("; ".join(meanings) + "."),
    ]


def _last(run: Run, name: str) -> str:
    """A measure's value at the last validation, with its interval."""
    record = run.validations[-1] if run.validations else {}
    value, about = record.get(name), measure_of(name)
    if not _is_number(value):
        return "not finite" if name in record else ""
    unit = f" {about.unit}" if about and about.unit else ""
    low, high = _bands([record], name)[0]
    reach = f" ± {(high - low) / 2:.2g}" if math.isfinite(high - low) else ""
    return f"{value:.4g}{reach}{unit}"


def _best(run: Run) -> str:
    name = run.settings.get("validation", {}).get("best", "psnr")
    best = best_validation(run.validations, name)
    return f"{name} {best.value:.4g} at step {best.step}" if best else ""


def _grid(charts: Sequence[Chart]) -> list[str]:
    return [
        page.grid(
            page.chart(
                chart.series,
                chart.title,
                chart.x_label,
                chart.y_label,
                log_y=chart.log_y,
            )
            for chart in charts
        )
    ]


def _strips(run: Run, only_last: bool) -> list[tuple[np.ndarray, str]]:
    """Pictures with captions: of the first, the best and the last validation."""
    drawn = [
        record["step"]
        for record in run.validations
        if (run.folder / f"samples/step-{record['step']}.png").exists()
    ]
    name = run.settings.get("validation", {}).get("best", "psnr")
    best = best_validation(run.validations, name)
    wanted: dict[int, str] = {}
    if drawn and not only_last:
        wanted = {drawn[0]: "first"}
        if best is not None:
            wanted[best.step] = "best"
    if drawn:
        is_best = wanted.get(drawn[-1]) == "best"
        wanted[drawn[-1]] = "best and last" if is_best else "last"
    strips = []
    for step in sorted(wanted.keys() & set(drawn)):
        with Image.open(run.folder / f"samples/step-{step}.png") as image:
            pixels = np.asarray(image.convert("RGB"))
        strips.append((pixels, f"{run.name}, step {step} ({wanted[step]} validation)"))
    return strips


def _stacked(strips: list[tuple[np.ndarray, str]]) -> np.ndarray:
    """Pictures under one another on white, each below its caption."""
    width = max(max(p.shape[1], LABEL_PIXELS * len(text)) for p, text in strips)
    rows = []
    for pixels, caption in strips:
        margin = (0, CAPTION_PIXELS // 4), (0, width - pixels.shape[1]), (0, 0)
        rows.append(written(caption, CAPTION_PIXELS, width))
        rows.append(np.pad(pixels, margin, constant_values=255))
    return np.concatenate(rows)


def _videos(runs: Sequence[Run]) -> list[str]:
    """The newest clips of each run."""
    shown = []
    for run in runs:
        steps = [record["step"] for record in run.validations]
        files = [run.folder / f"samples/step-{step}.mp4" for step in steps]
        files = [file for file in files if file.exists()]
        if files:
            caption = f"{run.name}, {files[-1].stem}: input, then reconstructions"
            shown.append(page.video(files[-1].read_bytes(), caption))
    return [page.grid(shown)] if shown else []


def _settings(runs: Sequence[Run]) -> list[str]:
    """Those that differ from the defaults or, of several runs, among them."""
    tables = _tables(runs)
    others = tables[1:] or [_flat(asdict(Config()))]
    keys = [k for k in tables[0] if any(t.get(k) != tables[0][k] for t in others)]
    heading = "Settings that differ" if len(runs) > 1 else "Settings"
    if not keys:
        return [page.heading(heading), page.paragraph("All are the same.")]
    rows = [[key, *(json.dumps(t.get(key)) for t in tables)] for key in keys]
    caption = "" if len(runs) > 1 else "All others are at their defaults."
    return [
        page.heading(heading),
        page.table(["", *(run.name for run in runs)], rows, caption),
    ]


def _tables(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """All settings of each run."""
    defaults = _flat(asdict(Config()))
    return [{**defaults, **_flat(run.settings)} for run in runs]


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{name}": value
        for section, values in sections.items()
        if isinstance(values, dict)
        for name, value in values.items()
    }


# --- PNG ---------------------------------------------------------------------------


def _draw(charts: Sequence[Chart], path: Path) -> None:
    """All charts as one picture."""
    rows = math.ceil(len(charts) / COLUMNS) or 1
    width, height = CHART_INCHES
    figure = Figure((width * COLUMNS, height * rows), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axes in grid[len(charts) :]:
        axes.remove()
    for axes, chart in zip(grid, charts, strict=False):
        for i, one in enumerate(chart.series):
            color = COLORS[i % len(COLORS)]
            marker = "o" if len(one.xs) < 30 else ""
            axes.plot(one.xs, one.ys, marker=marker, ms=3, c=color, label=one.name)
            if one.band:
                lows, highs = zip(*one.band, strict=True)
                axes.fill_between(one.xs, lows, highs, color=color, alpha=0.15, lw=0)
        axes.set_title(chart.title, fontsize=10)
        axes.set_xlabel(chart.x_label, fontsize=8)
        axes.set_ylabel(chart.y_label, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if chart.log_y:
            axes.set_yscale("log")
        if len(chart.series) > 1:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Entry of the command line."""
    parser = Parser(
        prog="python -m taehv.report", description="Curves and pictures of runs."
    )
    parser.add_argument(
        "runs", nargs="+", type=local_path, metavar="RUN", help="its folder"
    )
    parser.add_argument(
        "--output",
        type=local_path,
        help="folder for the report (default: RUN/report, or of several runs "
        "RUN-and-others beside the first)",
    )
    arguments = parser.parse_args()
    folders = [folder.expanduser() for folder in arguments.runs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice: name each once")
    runs = [read_run(folder) for folder in folders]
    beside = folders[0].with_name(folders[0].name + "-and-others")
    output = arguments.output or (folders[0] / "report" if len(runs) == 1 else beside)
    try:
        files = write_report(runs, output.expanduser())
    except OSError as error:
        raise UserError(
            f"cannot write the report ({error}): give a folder that you may write to, "
            "by --output"
        ) from None
    print("\n".join(map(str, files)))


if __name__ == "__main__":
    run_command(main)
