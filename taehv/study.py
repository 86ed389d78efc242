"""A study of training recipes: what is compared, what was found, how it is shown."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli
import torch
from PIL import Image

from taehv.cache import check_fit, sha256_of
from taehv.config import load_config, table
from taehv.errors import UserError, nearest
from taehv.metrics import Estimate, estimate
from taehv.pool import PoolSize
from taehv.rules import check_config, check_size
from taehv.sections import Config, Data
from taehv.variants import VARIANTS
from taehv.visualize import picture_strip

Settings = dict[str, Any]
Record = dict[str, Any]
BySeed = Mapping[int, Record]
ByArm = Mapping[str, BySeed]
COLUMNS = {
    "psnr": "PSNR",
    "difference_psnr": "PSNR of changes",
    "ssim": "SSIM",
    "fine_detail": "fine detail",
    "flicker": "flicker",
    "lpips": "LPIPS",
    "st_lpips": "ST-LPIPS",
    "decoder_psnr": "PSNR, teacher's latents",
    "latent_correlation": "latent correlation",
}
"""Measures in the table of a stage, where there are any."""
GUIDANCE = {
    "accuracy_real": "accuracy on the real",
    "accuracy_fresh": "on the decoded",
    "gradient_ratio": "gradient ratio",
}
"""What is told of adversarial guidance, of the last twentieth of the steps."""
OF_A_TRAINING = (
    *("model", "teacher", "data", "training", "optim", "loss", "seraena"),
    *("parallelism", "compile"),
)
"""Sections of settings: not what is written, how often and where."""
OF_A_STUDY = ("baseline", "clips", "points", "pool", "common", "arms", "stages")
OF_AN_ARM = ("name", "of", "then")
"""What an arm has beside settings."""
VERSION = 2
"""Changes whenever the same settings would be trained on other clips."""
OF_CLIPS = ("frames", "height", "width", "lead_in")
"""Settings of data that an arm may have to itself: windows are decoded for all."""
OF_FREE_CLIPS = ("frames", "height", "width", "flip", "color_jitter")
"""The same without a teacher; see pool.Pool."""


@dataclass(frozen=True)
class Task:
    """One training: an arm with a seed."""

    stage: str
    arm: str
    seed: int
    seconds: float
    """Of training; 0 where the steps are given."""
    keep: bool
    """Whether the weights are."""
    config: Config
    later: Data | None
    """Of the clips of the second half of the steps, where they are others."""
    key: str
    """Names all that the result depends on, but for the machine and the code."""


@dataclass(frozen=True)
class Stage:
    """Arms that are compared at equal time, or at equal steps."""

    name: str
    seconds: float = 0.0
    steps: int = 0
    arms: list[str] = field(default_factory=list)
    """All if there are none."""
    seeds: list[int] = field(default_factory=lambda: [0])
    keep: bool = False
    baseline: str = ""
    """An arm, where it is not that of the study."""
    against: str = ""
    """Another stage, whose baseline this one's arms are compared with."""


@dataclass(frozen=True)
class Scale:
    """Of a study as a whole."""

    baseline: str
    """An arm."""
    clips: int
    """Held-out ones."""
    points: int
    """Of a curve."""


@dataclass(frozen=True)
class Study:
    """Stages in the order in which they are trained, and the settings of each arm."""

    scale: Scale
    pool: PoolSize
    arms: dict[str, Settings]
    later: dict[str, str]
    """The arm whose clips an arm has in the second half of its steps."""
    stages: list[Stage]
    common: Settings

    @classmethod
    def read(cls, path: Path, given: Settings) -> Study:
        """Read a study's file; see docs/recipe.md.

        Args:
            path: TOML.
            given: settings of all arms, over those of the file.

        Raises:
            UserError: it cannot be read, or something in it is unknown or illegal.
        """
        where = f"--study {path}"
        try:
            tree = tomli.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{where}: {error.strerror}") from None
        except (UnicodeDecodeError, tomli.TOMLDecodeError) as error:
            raise UserError(f"{where}: {error}") from None
        for name in tree:
            if name not in OF_A_STUDY:
                raise UserError(f"{where}: unknown {name}{nearest(name, OF_A_STUDY)}")
        common = {**_flat(tree.pop("common", {}), f"{where}: [common]"), **given}
        listed = _tables(tree, "arms", where)
        arms = _arms(listed, common, where)
        later = _later(listed)
        stages = [
            table(Stage, stage, f"{where}: a stage")
            for stage in _tables(tree, "stages", where)
        ]
        pool = table(PoolSize, _table(tree.pop("pool", {}), where), f"{where}: [pool]")
        study = cls(table(Scale, tree, where), pool, arms, later, stages, common)
        study._check_names(where)
        study._check_numbers(where)
        with _told_of(where):
            tasks = study.tasks
        for task in tasks:
            told = f"{where}: arm {task.arm!r}"
            with _told_of(told):
                check_config(task.config)
            study._check(told, task.config)
            if task.later is not None:
                study._check_later(told, task)
        return study

    def _check_names(self, where: str) -> None:
        names = [stage.name for stage in self.stages]
        own = [s.baseline for s in self.stages if s.baseline]
        listed = itertools.chain(*(s.arms for s in self.stages))
        for name in [self.scale.baseline, *own, *listed]:
            if name not in self.arms:
                raise UserError(f"{where}: no arm {name!r} among {list(self.arms)}")
        files = dict[str, str]()
        for name in self.arms:
            other = files.setdefault(file_name(name), name)
            if other != name:
                raise UserError(
                    f"{where}: the files of arms {other!r} and {name!r} would have one "
                    "name: call one of them otherwise"
                )
        for stage in self.stages:
            if stage.against and stage.against not in names:
                raise UserError(f"{where}: no stage {stage.against!r} among {names}")
            if names.count(stage.name) > 1:
                raise UserError(f"{where}: several stages {stage.name!r}")
            if not re.fullmatch(r"[\w.-]+", stage.name):
                raise UserError(
                    f"{where}: stage {stage.name!r}: files are named by it, so give "
                    "letters and digits"
                )

    def _check_numbers(self, where: str) -> None:
        scale = {"clips": self.scale.clips, "points": self.scale.points}
        for name, number in {**scale, **vars(self.pool)}.items():
            if number < 1:
                raise UserError(f"{where}: {name} = {number} must be at least 1")
        for stage in self.stages:
            if (stage.seconds > 0) == (stage.steps > 0) or not stage.seeds:
                raise UserError(
                    f"{where}: stage {stage.name!r} needs seconds or steps, above 0, "
                    "and seeds"
                )
            for listed in (stage.arms, stage.seeds):
                if len(set(listed)) < len(listed):
                    raise UserError(
                        f"{where}: stage {stage.name!r} has one of {listed} twice"
                    )

    def _check(self, where: str, config: Config) -> None:
        """Whether clips of an arm can be cut from the windows that all share."""
        common, clip = self.config(), config.data.usual_shape[:3]
        if common.teacher.kind:
            check_fit(VARIANTS[config.model.variant], config.data, self.pool.shape)
        elif any(n > size for n, size in zip(clip, self.pool.shape, strict=True)):
            sizes = [" x ".join(map(str, shape)) for shape in (clip, self.pool.shape)]
            raise UserError(
                f"{where}: clips of {sizes[0]} cannot be cut from windows of {sizes[1]}"
            )
        try:  # whether all arms can be judged by the same clips
            check_size(replace(config, data=common.validation_data), "data")
        except UserError as error:
            raise UserError(f"{where}: held-out clips: {error}") from None
        if config.teacher != common.teacher:
            raise UserError(f"{where}: all arms have the teacher of [common]")
        if config.validation != common.validation:
            raise UserError(f"{where}: all arms are judged by [common]'s [validation]")
        own = OF_CLIPS if common.teacher.kind else OF_FREE_CLIPS
        for name, value in vars(common.data).items():
            if name not in own and getattr(config.data, name) != value:
                raise UserError(
                    f"{where} has a data.{name} of its own: all have the data of "
                    f"[common], but for {', '.join(own)}"
                )

    def _check_later(self, where: str, task: Task) -> None:
        if task.config.seraena.enable:
            raise UserError(f"{where}: then and seraena.enable exclude each other")
        mixed = replace(task.config, data=task.later)
        self._check(where, mixed)
        try:
            check_config(mixed)
        except UserError as error:
            raise UserError(f"{where}: then {error}") from None

    def config(self, arm: str | None = None) -> Config:
        """Settings of an arm, or those that all share; not to be changed."""
        return self._configs[arm]

    @functools.cached_property
    def _configs(self) -> dict[str | None, Config]:
        configs = {}
        for name, given in {None: self.common, **self.arms}.items():
            with _told_of("[common] or --set" if name is None else f"arm {name!r}"):
                arguments = [f"--{k}={_text(v)}" for k, v in given.items()]
                configs[name] = load_config(arguments, 1)
        return configs

    @functools.cached_property
    def _judged_by(self) -> str:
        """Whatever all arms are judged by."""
        shape, by = self.config().validation_data.usual_shape, self.config().validation
        return f"{shape} {by.lpips} {by.st_lpips} {by.vmaf}"

    def of_stages(self, names: Sequence[str] | None) -> Study:
        """The same with some stages alone.

        Raises:
            UserError: there is no such stage.
        """
        if names is None:
            return self
        known = {stage.name: stage for stage in self.stages}
        for name in names:
            if name not in known:
                raise UserError(f"--stages: no stage {name!r} among {list(known)}")
        return replace(self, stages=[known[name] for name in names])

    @functools.cached_property
    def tasks(self) -> list[Task]:
        """All trainings in their order: of a stage, every arm before the next seed."""
        found = []
        for stage in self.stages:
            for seed, arm in itertools.product(stage.seeds, stage.arms or self.arms):
                config, other = self.config(arm), self.later.get(arm)
                training = replace(config.training, seed=seed)
                if stage.steps:
                    training = replace(training, steps=stage.steps)
                config = replace(config, training=training)
                seconds = 0.0 if stage.steps else stage.seconds
                later = self.config(other).data if other else None
                # Whatever a curve and its measures are of is part of the key.
                told = (
                    f"{VERSION} {stage.name} {seconds} {stage.keep} {self.pool} "
                    f"{self.scale.clips} {self.scale.points}"
                )
                sections = [getattr(config, name) for name in OF_A_TRAINING]
                told += f" {sections} {later} {self._judged_by}"
                told += _content(config.model.checkpoint)
                key = hashlib.sha256(told.encode()).hexdigest()[:16]
                told_by = (stage.name, arm, seed, seconds, stage.keep)
                found.append(Task(*told_by, config, later, key))
        return found


@contextmanager
def _told_of(where: str) -> Iterator[None]:
    """Say where a mistake is; settings that a study has come as a command line's do."""
    try:
        yield
    except UserError as error:
        told = str(error).removeprefix("the command line: ")
        raise UserError(f"{where}: {told}") from None


def _content(checkpoint: str) -> str:
    """Names what a local file of weights holds; of a folder or URL its name must do."""
    path = Path(checkpoint).expanduser()
    if not checkpoint or not path.is_file():
        return ""
    try:
        return sha256_of(path)
    except OSError as error:
        raise UserError(f"model.checkpoint = {path}: {error.strerror}") from None


def file_name(told: str) -> str:
    """A name for files out of any text."""
    return re.sub(r"[^\w.-]+", "-", told)


def _table(value: Any, where: str) -> Settings:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {json.dumps(value, default=str)} must be a table")
    return value


def _tables(tree: Settings, name: str, where: str) -> list[Settings]:
    """Those of [[name]], of which there must be some."""
    listed = tree.pop(name, [])
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{where}: there must be [[{name}]]")
    return [_table(value, f"{where}: [[{name}]]") for value in listed]


def _arms(listed: list[Settings], common: Settings, where: str) -> dict[str, Settings]:
    arms: dict[str, Settings] = {}
    for arm in listed:
        name, base, then = (arm.get(key) for key in ("name", "of", "then"))
        if not isinstance(name, str) or name in arms:
            raise UserError(f"{where}: each of [[arms]] needs a name of its own")
        for other in (base, then):
            if other is not None and other not in list(arms):
                raise UserError(f"{where}: no arm {other!r} comes before {name!r}")
        sections = {k: v for k, v in arm.items() if k not in OF_AN_ARM}
        settings = _flat(sections, f"{where}: arm {name!r}")
        arms[name] = {**(common if base is None else arms[base]), **settings}
    return arms


def _later(listed: list[Settings]) -> dict[str, str]:
    """The arms whose clips come later, by the names of those that have some."""
    later: dict[str, str] = {}
    for arm in listed:
        then = arm.get("then", later.get(arm.get("of", "")))
        if then is not None:
            later[arm["name"]] = then
    return later


def _flat(tree: Settings, where: str) -> Settings:
    sections = {name: _table(values, where) for name, values in tree.items()}
    return {f"{s}.{k}": v for s, values in sections.items() for k, v in values.items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class Results:
    """What trainings found, a line of JSON each, in a folder with their pictures."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "results.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path.open("a").close()
        except OSError as error:
            raise UserError(f"--output {folder}: {error.strerror}") from None

    def read(self) -> dict[str, Record]:
        """By the keys of their tasks."""
        text = self.path.read_text(encoding="utf-8", errors="replace")
        records = map(_parsed, text.splitlines())
        return {record["key"]: record for record in records if record}

    def add(self, record: Record) -> None:
        """Append, at once, so that an interruption and other processes cost nothing."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(record)}\n")

    def frames(self, key: str) -> Path:
        """Where pictures of a task's reconstructions lie."""
        return self.folder / "frames" / f"{key}.npz"


def _parsed(line: str) -> Record | None:
    """None for a line that was cut off, whose training is done again."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "key" in record else None


# --- what it shows -----------------------------------------------------------------


def write_report(study: Study, results: Results, about: str) -> str:
    """Write recipe.md and its pictures into the folder, and return the tables.

    Args:
        about: a line above them, of what the command was given.
    """
    found, parts = results.read(), []
    done = [task for task in study.tasks if task.key in found]
    every: dict[str, dict[str, dict[int, Record]]] = {s.name: {} for s in study.stages}
    for task in done:
        every[task.stage].setdefault(task.arm, {})[task.seed] = found[task.key]
    for stage in study.stages:
        if by_arm := every[stage.name]:
            tasks = [task for task in done if task.stage == stage.name]
            against = every[stage.against or stage.name]
            base = against.get(stage.baseline or study.scale.baseline, {})
            parts.append(_stage_text(study, stage, by_arm, base))
            _draw_curves(by_arm, results.folder / f"curves-{stage.name}.png")
            _draw_crops(tasks, results, results.folder / f"crops-{stage.name}.png")
    text = "\n".join(parts)
    path = results.folder / "recipe.md"
    path.write_text(f"`{about}`\n\n{text}", encoding="utf-8")
    return text


def _stage_text(study: Study, stage: Stage, by_arm: ByArm, base: BySeed) -> str:
    length = f"{stage.steps} steps" if stage.steps else f"{stage.seconds:g} s"
    devices = {r["device"] for records in by_arm.values() for r in records.values()}
    rows = [_row(arm, records, base) for arm, records in by_arm.items()]
    names = [name for name in rows[0] if any(row.get(name) for row in rows)]
    lines = [
        names,
        ["---"] * len(names),
        *([r.get(n, "") for n in names] for r in rows),
    ]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    arms = "\n".join(f"- {arm}: {_changed(study, arm)}" for arm in by_arm)
    return (
        f"## {stage.name}: {length} of training on {', '.join(sorted(devices))}\n\n"
        f"{table}\n\n![Curves](curves-{stage.name}.png)\n\n"
        f"![Held-out clips](crops-{stage.name}.png)\n\n{arms}\n"
    )


def _changed(study: Study, arm: str) -> str:
    """By what an arm differs from the common settings."""
    listed = [
        f"`{key} = {json.dumps(value)}`"
        for key, value in study.arms[arm].items()
        if study.common.get(key) != value
    ]
    if arm in study.later:
        listed.append(f"then clips of {study.later[arm]}")
    return ", ".join(listed) or "the common settings"


def _row(arm: str, records: BySeed, base: BySeed) -> dict[str, str]:
    row = {
        "arm": arm,
        "seeds": str(len(records)),
        "steps": f"{statistics.mean(r['steps'] for r in records.values()):.0f}",
        "ms": f"{statistics.mean(r['step_ms'] for r in records.values()):.2f}",
        "s": f"{statistics.mean(r['spent'] for r in records.values()):.1f}",
    }
    for weights, prefix in (("ema", ""), ("raw", "raw ")):
        for name, title in COLUMNS.items() if weights == "ema" else [("psnr", "PSNR")]:
            values = [r[weights][name] for r in records.values() if name in r[weights]]
            row[prefix + title] = _told(estimate(values)) if values else ""
        if weights == "ema" and base:
            shared = records.keys() & base.keys() if records != base else []
            gains = [records[s]["ema"]["psnr"] - base[s]["ema"]["psnr"] for s in shared]
            row["gain"] = _told(estimate(gains), "+") if gains else ""
            row["as the baseline after"] = _reached(records, base)
    for key, title in (("before", "also before"), ("after", "also after")):
        values = [r["also"][key] for r in records.values() if r["also"][key]]
        row[title] = _told(estimate(values)) if values else ""
    for key, title in GUIDANCE.items():
        values = [r["guidance"][key] for r in records.values() if "guidance" in r]
        row[title] = _told(estimate(values)) if values else ""
    if any("collapsed" in r for r in records.values()):
        row["collapsed"] = _share([r.get("collapsed", False) for r in records.values()])
    row["skipped"] = str(sum(r["skipped"] for r in records.values()))
    losses = [(r["first_loss"], r["last_loss"]) for r in records.values()]
    row["loss"] = f"{_mean(losses, 0):.4f} to {_mean(losses, 1):.4f}"
    row["diverged"] = _share([diverged(r) for r in records.values()])
    return row


def _mean(pairs: Sequence[tuple[float, float]], place: int) -> float:
    return statistics.mean(pair[place] for pair in pairs)


def _share(values: Sequence[bool]) -> str:
    return "no" if not any(values) else f"{sum(values)} of {len(values)}"


def diverged(record: Mapping[str, Any]) -> bool:
    """Whether a training ended with a loss that is not finite, or no lower than first.

    Steps that were skipped are told apart, unless all were.
    """
    last = record["last_loss"]
    return not (math.isfinite(last) and last < record["first_loss"])


def _told(value: Estimate, sign: str = "") -> str:
    digits = 2 if abs(value.mean) >= 1 else 3
    text = f"{value.mean:{sign}.{digits}f}"
    if value.clips > 1:
        text += f" ± {value.high - value.mean:.{digits}f}"
    return text


def _reached(records: Mapping[int, Any], base: Mapping[int, Any]) -> str:
    """When the mean curve first has the baseline's PSNR at the end."""
    _, goal = mean_curve(list(base.values()), "ema")[-1]
    seconds = reached(mean_curve(list(records.values()), "ema"), goal)
    return "never" if seconds is None else f"{seconds:.1f} s"


def mean_curve(
    records: Sequence[Mapping[str, Any]], weights: str
) -> list[tuple[float, float]]:
    """Seconds and PSNR, the means over seeds of each point."""
    points = zip(*(record["curve"] for record in records), strict=True)
    return [
        (
            statistics.mean(p["seconds"] for p in point),
            statistics.mean(p[weights] for p in point),
        )
        for point in points
    ]


def reached(curve: Sequence[tuple[float, float]], goal: float) -> float | None:
    """The seconds at which a curve first has a value, by straight lines; or None."""
    if curve[0][1] >= goal:
        return curve[0][0]
    for (t0, low), (t1, high) in itertools.pairwise(curve):
        if high >= goal:
            return t0 + (t1 - t0) * (goal - low) / (high - low)
    return None


def _draw_curves(by_arm: ByArm, path: Path) -> None:
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    for number, (arm, records) in enumerate(by_arm.items()):
        style = ("-", "--", ":", "-.")[number // 10 % 4]  # for ten colours each
        seconds, values = zip(*mean_curve(list(records.values()), "ema"), strict=True)
        axes.plot(seconds, values, style, color=f"C{number % 10}", label=arm)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("PSNR of averaged weights on held-out clips, dB")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=110)


def _draw_crops(tasks: Sequence[Task], results: Results, path: Path) -> None:
    """The same frames in and out of every arm, of its first seed that has them."""
    shown: dict[str, np.ndarray] = {}
    for task in tasks:
        file = results.frames(task.key)
        if task.arm not in shown and file.exists():
            with np.load(file) as arrays:
                shown.setdefault("input", arrays["input"])
                # Another variant may decode other frames.
                if np.array_equal(shown["input"], arrays["input"]):
                    shown[task.arm] = arrays["decoded"]
    if shown:
        clips = [
            tuple(torch.from_numpy(x).movedim(-1, 1) / 255 for x in clip)
            for clip in zip(*shown.values(), strict=True)
        ]
        picture = picture_strip(clips, labels=list(shown))
        Image.fromarray(picture).save(path)


def settings_told(task: Task) -> Record:
    """What a record says of its task."""
    names = ("key", "stage", "arm", "seed", "seconds")
    return {name: getattr(task, name) for name in names}
