"""Which of many validations is the best, and what a resumed run knows of it."""

from __future__ import annotations

import math

import pytest

from taehv.best import Best, BestSoFar, best_validation, check_best
from taehv.errors import UserError


def records(name: str, *values: float | None) -> list[dict[str, float | None]]:
    """Validations at steps 0, 10, 20, ..."""
    return [{"step": 10 * i, name: value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [
        ("psnr", [20.0, 25.0, 24.0], Best(10, 25.0, since=1)),
        ("psnr", [20.0, 25.0, 25.0], Best(10, 25.0, since=1)),
        ("flicker", [2.0, 1.0, 1.5, 0.5], Best(30, 0.5, since=0)),
        ("fine_detail", [0.2, 1.1, 1.9], Best(10, 1.1, since=1)),
        ("decoder_ssim", [0.9, 0.8, 0.7], Best(0, 0.9, since=2)),
        ("psnr", [None, 20.0, None], Best(10, 20.0, since=1)),
        ("psnr", [None], None),
        ("psnr", [], None),
    ],
)
def test_best_validation(name: str, values: list[float], best: Best | None) -> None:
    assert best_validation(records(name, *values), name) == best


def test_records_without_the_measure_have_no_best() -> None:
    assert best_validation(records("psnr", 20.0), "ssim") is None
    assert best_validation(records("psnr", 20.0), "") is None


def test_what_is_no_measure_is_refused() -> None:
    for name in ("", "psnr", "decoder_ms_ssim_4", "psnr_position_3"):
        check_best(name)
    with pytest.raises(UserError, match="validation.best = seconds is no measure"):
        check_best("seconds")


@pytest.mark.parametrize("values", [[], [None], [20.0, 25.0, 24.0, 23.0]])
def test_it_goes_on_from_its_tensors(values: list[float | None]) -> None:
    first, second = BestSoFar("psnr"), BestSoFar("psnr")
    for record in records("psnr", *values):
        first.see(record)
    second.load(first.state())
    assert (second.best, second.seen) == (first.best, first.seen)
    for so_far in (first, second):
        so_far.see({"step": 100, "psnr": 24.5})
        so_far.see({"step": 100, "psnr": 99.0})  # seen already
    assert second.best == first.best is not None


def test_the_best_by_another_measure_is_not_taken_over() -> None:
    by_psnr, by_ssim = BestSoFar("psnr"), BestSoFar("ssim")
    by_psnr.see({"step": 10, "psnr": 30.0, "ssim": 0.9})
    by_ssim.load(by_psnr.state())
    assert by_ssim.best is None and by_ssim.seen == -1


def test_the_best_by_other_clips_is_not_taken_over() -> None:
    by_small, by_large = (BestSoFar("psnr", clips) for clips in ("13 x 64", "13 x 128"))
    by_small.see({"step": 10, "psnr": 30.0})
    by_large.load(by_small.state())
    assert by_large.best is None
    # Those before were of the other clips, those to come are not.
    by_large.see({"step": 10, "psnr": 30.0})
    assert by_large.best is None
    by_large.see({"step": 20, "psnr": 25.0})
    assert by_large.best == Best(20, 25.0, since=0)


def test_what_is_not_finite_is_never_the_best() -> None:
    so_far = BestSoFar("psnr")
    for step, value in enumerate((math.nan, 20.0, math.inf)):
        so_far.see({"step": step, "psnr": value})
    assert so_far.best == Best(1, 20.0, since=1)
    assert all(tensor.isfinite().all() for tensor in so_far.state().values())
