"""Optimizers of this process's shards, learning-rate schedules and averaged weights.

Everything here is elementwise but the gradient's norm, so that it works on the local
parts of sharded tensors: DTensor would add milliseconds a step; Muon gathers what it
needs. Nothing waits for the device, and all that changes from step to step is read from
its memory, so that a CUDA graph can hold it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from taehv.muon import Matrix, Muon
from taehv.sections import Optim
from taehv.team import Team

HISTORY = 64
"""Norms of gradients of which the median is taken."""


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory."""
    return locals_of([tensor])[0]


@torch.no_grad()
def locals_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's part of each tensor, in the same memory."""
    return [x.to_local() if hasattr(x, "to_local") else x for x in tensors]


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
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        settings: Optim,
        shard_group: dist.ProcessGroup | None = None,
        scales: Mapping[nn.Parameter, float] | None = None,
        matrices: Mapping[nn.Parameter, int] | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.max_grad_norm = settings.max_grad_norm or math.inf
        self.shard_group = shard_group
        self._locals = [local(parameter.detach()) for parameter in self.parameters]
        device = self._locals[0].device
        self.spike_factor = settings.spike_factor
        self.norms = torch.zeros(HISTORY, device=device)
        """The last finite norms, newest last; 0 where there was none yet."""
        # The CUDA kernel reads fp32.
        exact = torch.float64 if device.type == "cpu" else torch.float32
        self.lr = torch.zeros((), dtype=exact, device=device)
        self._scales = [(scales or {}).get(p, 1.0) for p in self.parameters]
        self._rates = {scale: torch.zeros_like(self.lr) for scale in self._scales}
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        self._muon = self._new_muon(matrices, settings) if matrices else None
        self._team = Team(self._locals)
        self._adamw = [self._new_adamw(part, settings) for part in self._team.parts]

    def _new_muon(self, matrices: Mapping[nn.Parameter, int], settings: Optim) -> Muon:
        found = []
        parts = zip(self.parameters, self._locals, self._scales, strict=True)
        for parameter, part, scale in parts:
            if parameter in matrices:
                momentum = torch.zeros_like(parameter)
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
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
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

    @torch.no_grad()
    def step(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip the gradients by their joint norm and apply them, or skip them.

        A loss or gradient that is not finite, on any process, changes nothing on all;
        neither does a gradient whose norm is a spike.

        Args:
            loss: mean over all processes.

        Returns:
            The norm before clipping, and whether the gradients were applied, as
            tensors.
        """
        gradients = [local(parameter.grad) for parameter in self.parameters]
        norm = total_norm(gradients, self._team, self.shard_group)
        is_good = norm.isfinite() & loss.to(norm.device).isfinite()
        if self.spike_factor:
            is_good = _on_all(is_good & ~self._is_spike(norm))
        divisor = (norm / self.max_grad_norm).clamp_min(1).nan_to_num(1, 1)
        for scale, rate in self._rates.items():
            rate.copy_(self.lr * scale)
        for part, gradient in zip(self._locals, gradients, strict=True):
            part.grad = gradient
        for adamw in self._adamw:
            # The fused kernel divides by the one, and does nothing where the other is
            # set.
            adamw.grad_scale = divisor.float()
            adamw.found_inf = (~is_good).float()
        self._team.map(lambda number: self._adamw[number].step())
        if self._muon is not None:
            self._muon.step(divisor, is_good)
        for parameter, part in zip(self.parameters, self._locals, strict=True):
            parameter.grad = part.grad = None
        return norm, is_good

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
    return Optimizer(scales, settings, shard_group, scales, matrices)


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
    """Exponential moving average of the weights, sharded as they are."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in parameters.items()
        }
        sources = [local(p.detach()) for p in parameters.values()]
        averages = [local(weight) for weight in self.weights.values()]
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
