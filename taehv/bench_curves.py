"""Loss curves of one training in every way, beside those of two seeds."""

from __future__ import annotations

import itertools
import statistics

import torch

from taehv import measure
from taehv.bench import REFERENCES, Bench, Student, clips_of, way_settings
from taehv.clips import Batch
from taehv.errors import UserError
from taehv.sections import Config

POINTS = 10
"""Parts of a curve, over each of which losses are averaged and then compared."""
COLUMNS = {
    "way": 22,
    "seed": 4,
    "first loss": 9,
    "last tenth": 9,
    "compared with": 17,
    "mean difference": 9,
    "largest": 7,
}


def bench_curves(bench: Bench) -> None:
    """Train the first size and variant as an autoencoder in every way.

    The curves are to differ by no more than those of three seeds, which have other new
    weights and see the same clips. Ways with adversarial guidance are left out: they
    minimise something else.

    Raises:
        UserError: no way is left.
    """
    options = bench.options
    ways = [w for w in options.ways if w not in REFERENCES and "seraena" not in w]
    if not ways:
        raise UserError(f"--curves needs ways other than {', '.join(options.ways)}")
    configs = {way: _config(bench, way, 0) for way in ways}
    with clips_of(bench, configs[ways[0]], latents=False) as feed:
        batches = list(itertools.islice(feed, options.curve_batches))
    title = f"losses of {options.curve_steps} steps of {options.sizes[0]}"
    bench.report.table(title, COLUMNS)
    base, last, differences = ways[0], ways[-1], [0.0]
    curves: dict[str, list[float]] = {}
    for way, config in configs.items():
        curves[way] = _curve(bench, config, batches)
        compared = (base, curves[base]) if way != base else ()
        differences.append(_row(bench, way, 0, curves[way], *compared))
    seeds = [curves[last]]
    for seed in (1, 2):
        seeds.append(_curve(bench, _config(bench, last, seed), batches))
        _row(bench, last, seed, seeds[-1], last, curves[last])
    spread = max(_difference(*pair) for pair in itertools.combinations(seeds, 2))
    verdict = "no more" if max(differences) <= spread else "MORE"
    bench.report.say(
        f"\nthe ways differ by at most {max(differences):.1%}, {verdict} than three "
        f"seeds, {spread:.1%}"
    )


def _config(bench: Bench, way: str, seed: int) -> Config:
    options = bench.options
    return bench.config(
        {
            "model.variant": options.variants[0],
            "training.steps": options.curve_steps,
            "training.seed": seed,
        },
        options.sizes[0].settings,
        way_settings(way),
    )


def _curve(bench: Bench, config: Config, batches: list[Batch]) -> list[float]:
    """The loss of every step."""
    measure.free()
    student = Student(config, bench.world)
    feed = itertools.islice(itertools.cycle(batches), config.training.steps)
    return torch.stack([student(batch).values[0] for batch in feed]).tolist()


def _row(
    bench: Bench,
    way: str,
    seed: int,
    curve: list[float],
    other_way: str = "",
    other: list[float] | None = None,
) -> float:
    """Print a curve's row and return its mean difference from another one."""
    points, differences = _points(curve), _differences(curve, other or curve)
    compared = {
        "compared with": f"{other_way}, seed 0",
        "mean difference": f"{statistics.mean(differences):.3%}",
        "largest": f"{max(differences):.3%}",
    }
    bench.report.row(
        **{"way": way, "seed": seed, "first loss": curve[0], "last tenth": points[-1]},
        **(compared if other else {}),
        losses=curve,
    )
    return statistics.mean(differences)


def _differences(curve: list[float], other: list[float]) -> list[float]:
    pairs = zip(_points(curve), _points(other), strict=True)
    return [abs(a / b - 1) for a, b in pairs]


def _difference(curve: list[float], other: list[float]) -> float:
    return statistics.mean(_differences(curve, other))


def _points(curve: list[float]) -> list[float]:
    size = max(1, len(curve) // POINTS)
    return [statistics.mean(curve[i : i + size]) for i in range(0, len(curve), size)]
