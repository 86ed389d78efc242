"""AdamW, learning-rate schedules and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from taehv.config import Optim


def build_optimizer(
    parameters: Iterable[nn.Parameter], settings: Optim
) -> torch.optim.AdamW:
    """Fused AdamW whose state exists from the start.

    State that is there before the first step can be loaded in place, and keeps its
    addresses for the whole run.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def learning_rate(step: int, steps: int, settings: Optim) -> float:
    """The learning rate of a step, a pure function of its number.

    Args:
        step: steps done before this one, from 0.
        steps: steps of the whole run.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / (settings.warmup_steps + 1)
    if settings.schedule == "constant":
        return settings.lr
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    share = (
        1 - done if settings.schedule == "linear" else math.cos(done * math.pi / 2) ** 2
    )
    return settings.lr * (
        settings.final_lr_scale + (1 - settings.final_lr_scale) * share
    )


class Ema:
    """Exponential moving average of the weights, sharded as they are."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._parameters = list(parameters.values())
        self.weights: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the weights after a step, faster at first.

        Args:
            step: steps done before this one, from 0.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.weights.values()), self._parameters, 1 - decay)
