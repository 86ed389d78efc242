"""Optimizers of this process's shards, learning-rate schedules and averaged weights.

Everything here is elementwise but the gradient's norm, so that it works on the local
parts of sharded tensors: DTensor would add milliseconds a step; Muon gathers what it
needs. Nothing waits for the device, and all that changes from step to step is read from
its memory, so that a CUDA graph can hold it: all of it, or all but what is done on the
CPU where that has the masters of the weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from taehv.muon import Matrix, Muon
from taehv.offload import Masters, Mirror
from taehv.sections import Optim
from taehv.shards import local, locals_of
from taehv.team import Team

HISTORY = 64
"""Norms of gradients of which the median is taken."""


@dataclass
class Judged:
    """The gradients of a step, and what to do with them."""

    gradients: list[Tensor]
    """This process's part of each."""
    norm: Tensor
    """Of all together, over all processes that share them."""
    divisor: Tensor
    """Finite; clips them."""
    is_good: Tensor
    """Whether they are to be applied."""


class Optimizer:
    """Fused AdamW, and Muon for some weights, whose state exists from the start.

    State that is there before the first step can be loaded in place, and keeps its
    addresses for the whole run.

    Args:
        parameters: plain, or sharded by FSDP2.
        settings: section [optim].
        shard_group: processes that share one copy of the parameters; None where each
            has a whole one.
        scales: of the learning rate, of the parameters that have another one.
        matrices: weights that Muon takes, with how many matrices each of them holds.
        masters: to work on, on the CPU; without them it works where the parameters are.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        settings: Optim,
        shard_group: dist.ProcessGroup | None = None,
        scales: Mapping[nn.Parameter, float] | None = None,
        matrices: Mapping[nn.Parameter, int] | None = None,
        masters: Masters | None = None,
    ) -> None:
        self.parameters, self.masters = list(parameters), masters
        self.max_grad_norm = settings.max_grad_norm or math.inf
        self.shard_group = shard_group
        computing = locals_of(parameter.detach() for parameter in self.parameters)
        self.spike_factor = settings.spike_factor
        self.norms = torch.zeros(HISTORY, device=computing[0].device)
        """The last finite norms, newest last; 0 where there was none yet."""
        self._judges = self._team = Team(computing)
        self._locals = computing
        if masters is not None:
            self._locals = masters.of(self.parameters)
            self._team = Team(self._locals)
            # For the gradients and the numbers of what is judged.
            self._mirror = Mirror([*computing, *computing[0].new_zeros(3)])
        device = self._locals[0].device
        # The CUDA kernel reads fp32.
        exact = torch.float64 if device.type == "cpu" else torch.float32
        self.lr = torch.zeros((), dtype=exact, device=device)
        self._scales = [(scales or {}).get(p, 1.0) for p in self.parameters]
        self._rates = {scale: torch.zeros_like(self.lr) for scale in self._scales}
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        self._muon = self._new_muon(matrices, settings) if matrices else None
        self._adamw = [self._new_adamw(part, settings) for part in self._team.parts]

    def _new_muon(self, matrices: Mapping[nn.Parameter, int], settings: Optim) -> Muon:
        found = []
        parts = zip(self.parameters, self._locals, self._scales, strict=True)
        for parameter, part, scale in parts:
            if parameter in matrices:
                momentum = torch.zeros_like(parameter, device=part.device)
                self.state[parameter] = {"momentum": momentum}
                found.append(
                    Matrix(
                        part,
                        local(momentum),
                        parameter.shape,
                        matrices[parameter],
                        self._rates[scale],
                    )
                )
        return Muon(found, settings.weight_decay, self.shard_group)

    def _new_adamw(self, places: list[int], settings: Optim) -> torch.optim.AdamW:
        """Of these parameters, but for those that have a state already."""
        groups: dict[float, list[Tensor]] = {scale: [] for scale in self._rates}
        states = {}
        for place in places:
            parameter, part = self.parameters[place], self._locals[place]
            scale = self._scales[place]
            if parameter not in self.state:
                self.state[parameter] = {
                    "step": torch.zeros((), device=part.device),
                    "exp_avg": torch.zeros_like(parameter, device=part.device),
                    "exp_avg_sq": torch.zeros_like(parameter, device=part.device),
                }
                groups[scale].append(part)
                states[part] = {k: local(v) for k, v in self.state[parameter].items()}
        adamw = torch.optim.AdamW(
            [{"params": v, "lr": self._rates[scale]} for scale, v in groups.items()],
            betas=(settings.betas[0], settings.betas[1]),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
            capturable=self.lr.device.type == "cuda",
        )
        adamw.state.update(states)
        return adamw

    def step(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Judge the gradients and apply them, or skip them.

        Args:
            loss: mean over all processes.

        Returns:
            The norm before clipping, and whether the gradients were applied, as
            tensors.
        """
        judged = self.judge(loss)
        self.apply(judged if self.masters is None else self.arrived())
        return judged.norm, judged.is_good

    @torch.no_grad()
    def judge(self, loss: Tensor) -> Judged:
        """Find out how the gradients are to be clipped, and whether they are good.

        A loss or gradient that is not finite, on any process, is bad on all; so is a
        gradient whose norm is a spike. If there are masters, the gradients are on their
        way to these afterwards.
        """
        gradients = [local(parameter.grad) for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        norm = total_norm(gradients, self._judges, self.shard_group)
        is_good = norm.isfinite() & loss.to(norm.device).isfinite()
        if self.spike_factor:
            is_good = _on_all(is_good & ~self._is_spike(norm))
        divisor = (norm / self.max_grad_norm).clamp_min(1).nan_to_num(1, 1)
        if self.masters is not None:
            numbers = [x.to(gradients[0]) for x in (norm, divisor, is_good)]
            self._mirror.download([*gradients, *numbers])
        return Judged(gradients, norm, divisor, is_good)

    def arrived(self) -> Judged:
        """What was judged last, on the CPU, waiting for it; there are masters."""
        self._mirror.wait()
        *gradients, norm, divisor, is_good = self._mirror.parts
        return Judged(gradients, norm, divisor, is_good > 0)

    @torch.no_grad()
    def apply(self, judged: Judged) -> None:
        """Clip the gradients by their joint norm and apply them, or change nothing."""
        for scale, rate in self._rates.items():
            rate.copy_(self.lr * scale)
        for part, gradient in zip(self._locals, judged.gradients, strict=True):
            part.grad = gradient
        for adamw in self._adamw:
            # The fused kernel divides by the one, and does nothing where the other is
            # set.
            adamw.grad_scale = judged.divisor.float()
            adamw.found_inf = (~judged.is_good).float()
        self._team.map(lambda number: self._adamw[number].step())
        if self._muon is not None:
            self._muon.step(judged.divisor, judged.is_good)
        for part in self._locals:
            part.grad = None
        if self.masters is not None:
            self.masters.upload()

    def _is_spike(self, norm: Tensor) -> Tensor:
        """Whether a norm is out of proportion to those before; takes it in.

        Nothing is while fewer than half of them are known. A spike counts itself from
        then on, so that a lasting change becomes the new measure.
        """
        known = (self.norms > 0).sum()
        ordered = self.norms.masked_fill(self.norms == 0, math.inf).sort().values
        median = ordered.gather(0, (known // 2).view(1)).squeeze()
        grown = torch.cat([self.norms[1:], norm.to(self.norms).view(1)])
        self.norms.copy_(torch.where(norm.isfinite(), grown, self.norms))
        return (norm > self.spike_factor * median) & (known > HISTORY // 2)


def _on_all(flag: Tensor) -> Tensor:
    """Whether it is so on all processes, whose norms may differ by a rounding."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    agreed = flag.float()
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return agreed > 0


def new_optimizer(
    encoder: nn.Module,
    decoder: nn.Module,
    settings: Optim,
    shard_group: dist.ProcessGroup | None = None,
    masters: Masters | None = None,
) -> Optimizer:
    """The optimizer of what is trained of a model; see Optimizer.

    Muon takes the weights of all convolutions but the first and the last of each part,
    and of a grouped convolution the matrix of each group.
    """
    scales: dict[nn.Parameter, float] = {}
    matrices: dict[nn.Parameter, int] = {}
    for part, scale in (
        (encoder, settings.encoder_lr_scale),
        (decoder, settings.decoder_lr_scale),
    ):
        trained = [p for p in part.parameters() if p.requires_grad]
        scales |= dict.fromkeys(trained, scale)
        if trained and settings.optimizer == "muon":
            convs = [block for block in part.modules() if isinstance(block, nn.Conv2d)]
            matrices |= {conv.weight: conv.groups for conv in convs[1:-1]}
    return Optimizer(scales, settings, shard_group, scales, matrices, masters)


def total_norm(
    tensors: list[Tensor], team: Team, shard_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Euclidean norm of all tensors together, over the processes that share them."""
    norms = team.map(
        lambda number: torch._foreach_norm([tensors[i] for i in team.parts[number]])
    )
    norm = torch.linalg.vector_norm(torch.stack(list(itertools.chain(*norms))))
    if shard_group is None:
        return norm
    square = norm.square()
    dist.all_reduce(square, group=shard_group)
    return square.sqrt()


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
    start = settings.warmup_steps
    if settings.schedule == "wsd":
        start = max(start, round(steps * (1 - settings.decay_share)))
    done = min(1.0, max(0, step - start) / max(1, steps - start))
    left = {
        "linear": 1 - done,
        "cosine": math.cos(done * math.pi / 2) ** 2,
        # Better than linear in Haegele et al. 2024, arXiv:2405.18392.
        "wsd": 1 - math.sqrt(done),
    }[settings.schedule]
    return settings.lr * (
        settings.final_lr_scale + (1 - settings.final_lr_scale) * left
    )


class Ema:
    """Exponential moving average of the weights, sharded as they are.

    Args:
        parameters: by name.
        decay: of the average, in the end.
        masters: of the parameters; the average is then on the CPU, as they are.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        decay: float,
        masters: Masters | None = None,
    ) -> None:
        self.decay = decay
        sources = locals_of(parameter.detach() for parameter in parameters.values())
        if masters is not None:
            sources = masters.of(parameters.values())
        self.weights: dict[str, Tensor] = {
            name: torch.zeros_like(parameter, device=source.device)
            for (name, parameter), source in zip(
                parameters.items(), sources, strict=True
            )
        }
        averages = locals_of(self.weights.values())
        torch._foreach_copy_(averages, sources)
        self._team = Team(sources)
        self._parts = [
            ([averages[i] for i in part], [sources[i] for i in part])
            for part in self._team.parts
        ]

    def share(self, step: int) -> float:
        """What part of the average a step's weights become; more at first.

        Args:
            step: steps done before this one, from 0.
        """
        return 1 - min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, share: Tensor) -> None:
        """Move by `share` (a scalar, on the weights' device) towards the weights."""
        if not share.is_cuda:  # in one pass, where the number can be had
            number = share.item()
            self._team.map(lambda i: torch._foreach_lerp_(*self._parts[i], number))
            return
        for averages, sources in self._parts:
            torch._foreach_mul_(averages, 1 - share)
            torch._foreach_add_(averages, torch._foreach_mul(sources, share))
