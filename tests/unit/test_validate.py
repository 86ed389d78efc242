"""What follows from a run's validations."""

from __future__ import annotations

import pytest

from taehv.errors import UserError
from taehv.validate import Best, best_validation, check_best


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
