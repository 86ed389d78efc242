"""The best of many validations."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from taehv.errors import UserError
from taehv.metrics import measure_of

BEST_GROUP = "best"
"""Of a checkpoint, which may lack it."""
NUMBERS = 2**30
"""That stand for texts."""


def check_best(name: str) -> None:
    """Raise a UserError where validation.best names no measure."""
    if name and measure_of(name) is None:
        raise UserError(
            f"validation.best = {name} is no measure: take psnr, ssim, "
            "difference_psnr, or another of validation.jsonl"
        )


@dataclass(frozen=True)
class Best:
    """The best validation of a run."""

    step: int
    value: float
    since: int
    """Validations after it, none of them better."""


class BestSoFar:
    """The best of the validations it has seen; of equal ones the first.

    Args:
        name: of the measure that decides; without a meaning there is no best.
        clips: tells by which it is judged.
    """

    def __init__(self, name: str, clips: str = "") -> None:
        self.name, self.clips = name, clips
        self.best: Best | None = None
        self.seen = -1
        """The step of the last validation."""

    def see(self, record: Mapping[str, Any]) -> None:
        """Take in a validation: its step, and by their names what was measured.

        One of a step that is not later than the last is known already.
        """
        about, value = measure_of(self.name), record.get(self.name)
        if about is None or record["step"] <= self.seen:
            return
        self.seen = record["step"]
        is_number = value is not None and math.isfinite(value)
        best = self.best
        if is_number and (best is None or about.gap(value) < about.gap(best.value)):
            self.best = Best(self.seen, value, 0)
        elif best is not None:
            self.best = replace(best, since=best.since + 1)

    def state(self) -> dict[str, Tensor]:
        """All of it, as the tensors of a checkpoint."""
        best = self.best or Best(-1, 0.0, 0)
        told = _number(self.name) * NUMBERS + _number(self.clips)
        return {
            "steps": torch.tensor([best.step, best.since, self.seen, told]),
            "value": torch.tensor(best.value, dtype=torch.float64),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such tensors, unless they are of another measure.

        The best by other clips is none: the next validation decides anew.
        """
        step, since, seen, told = state["steps"].tolist()
        name, clips = divmod(told, NUMBERS)
        if name == _number(self.name):
            self.seen = seen
            if clips == _number(self.clips) and step >= 0:
                self.best = Best(step, float(state["value"]), since)


def _number(text: str) -> int:
    """One that another text hardly has."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % NUMBERS


def best_validation(records: Sequence[Mapping[str, Any]], name: str) -> Best | None:
    """The first that no other is better than; None where none has the measure."""
    so_far = BestSoFar(name)
    for record in records:
        so_far.see(record)
    return so_far.best
