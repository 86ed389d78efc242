"""One optimizer step as the device sees it: forward, backward, clip, update, average.

Nothing in it waits for the device or depends on its values on the host: what the step
found out comes back as one tensor, to be read when it is there. Only an optimizer on
the CPU waits for gradients, after all that the device can do without it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from taehv.distributed import mean_over_ranks, set_gradient_sync
from taehv.losses import (
    Decoded,
    Guide,
    Targets,
    decode,
    distance_gradient,
    training_losses,
)
from taehv.model import TAEHV
from taehv.optim import Ema, Judged, Optimizer
from taehv.sections import Loss
from taehv.seraena import Part, Seraena

Kind = Literal["alone", "guided", "learning"]
"""Without guidance; with it; and with a step of the discriminator, too."""
WARMUP_CALLS = 3
"""Steps before the capture: compiling and the libraries' set-up cannot be captured."""


@dataclass
class StepResult:
    """What a step found out, still on the device."""

    names: list[str]
    values: Tensor
    """The mean over all processes of each named loss, and what is told of adversarial
    guidance; then the gradient's norm, 1 if the step was applied or 0, and this
    process's loss of each micro-batch."""


class TrainingStep:
    """Trains a model by one global batch a call.

    Args:
        model: the student.
        roots: its parts that FSDP2 shards.
        optimizer: of the trained parameters.
        ema: of all parameters.
        loss: section [loss].
        graph: replay all that the device does in a step as one CUDA graph, one for each
            shape of the batches and kind of step; the first few calls of each run as
            they are.
        seraena: adversarial guidance, which the batches then have draws for.
    """

    def __init__(
        self,
        model: TAEHV,
        roots: Sequence[nn.Module],
        optimizer: Optimizer,
        ema: Ema,
        loss: Loss,
        graph: bool,
        seraena: Seraena | None = None,
    ) -> None:
        self.model, self.roots, self.optimizer = model, roots, optimizer
        self.ema, self.loss, self.graph = ema, loss, graph
        self.seraena = seraena
        self._share = torch.zeros_like(optimizer.lr)
        self._calls: Counter[tuple[Kind, Shapes]] = Counter()
        self._captured: dict[tuple[Kind, Shapes], _Capture] = {}
        self._stream = torch.cuda.Stream() if graph else None

    def renew(self, optimizer: Optimizer, ema: Ema, loss: Loss) -> None:
        """Begin another training of the same model, whose weights are set in place.

        What is compiled stays; graphs are captured anew, on the same stream.
        """
        self.release()
        self.optimizer, self.ema, self.loss = optimizer, ema, loss
        self._share = torch.zeros_like(optimizer.lr)

    def release(self) -> None:
        """Let go of the graphs: NCCL ends only when none holds a call of its.

        github.com/pytorch/pytorch/issues/115388
        """
        for captured in self._captured.values():
            captured.graph.reset()
        self._captured.clear()
        self._calls.clear()

    def __call__(self, batches: list[Targets], step: int, rate: float) -> StepResult:
        """Train.

        Args:
            batches: this process's micro-batches, all of one shape, on the device.
            step: steps done before this one.
            rate: learning rate.
        """
        self.optimizer.lr.fill_(rate)
        self._share.fill_(self.ema.share(step))
        result = self._on_device(batches, self._kind(step))
        if self.optimizer.masters is not None:
            # Which also waits until the masters of the step before are uploaded, as
            # their turn was before this step's, and until nothing writes gradients.
            self._update(self.optimizer.arrived())
        return result

    def _on_device(self, batches: list[Targets], kind: Kind) -> StepResult:
        """Run the step, or what of it is not the CPU's, as it is or by its graph."""
        if not self.graph:
            return self._run(batches, kind)
        key = kind, _shapes(batches)
        self._calls[key] += 1
        if self._calls[key] <= WARMUP_CALLS:
            return self._run_aside(batches, kind)
        if key not in self._captured:
            self._captured[key] = self._capture(batches, kind)
        captured = self._captured[key]
        for static, batch in zip(captured.inputs, batches, strict=True):
            _copy(static, batch)
        captured.graph.replay()
        return StepResult(captured.result.names, captured.result.values.clone())

    def _kind(self, step: int) -> Kind:
        if self.seraena is None or not self.seraena.is_on(step):
            return "alone"
        self.seraena.set_weight(step)
        return "learning" if self.seraena.learns(step) else "guided"

    def _run(self, batches: list[Targets], kind: Kind) -> StepResult:
        sums, losses = 0.0, []
        guides = self._guides(batches, kind)
        for index, (targets, guide) in enumerate(zip(batches, guides, strict=True)):
            set_gradient_sync(self.roots, index == len(batches) - 1)
            terms = training_losses(self.model, targets, self.loss, guide)
            (terms["loss"] / len(batches)).backward()
            values = torch.stack([term.detach() for term in terms.values()])
            sums = sums + values
            losses.append(values[0])
        means = sums / len(batches)
        if dist.get_world_size() > 1:
            means = mean_over_ranks(means)
        judged = self.optimizer.judge(means[0])
        if self.optimizer.masters is None:
            self._update(judged)
        health = {}
        if kind != "alone":
            self.seraena.settle(judged.is_good)
            health = {f"seraena/{k}": v for k, v in self.seraena.health.items()}
        found = [*means, *health.values(), judged.norm, judged.is_good, *losses]
        values = torch.stack([x.to(means) for x in found])
        return StepResult([*terms, *health], values)

    def _update(self, judged: Judged) -> None:
        self.optimizer.apply(judged)
        self.ema.update(self._share * judged.is_good)

    def _guides(self, batches: list[Targets], kind: Kind) -> list[Guide | None]:
        """Of each micro-batch.

        The discriminator learns from all of them at once, before any of them is
        corrected. Several are therefore decoded once more, ahead.
        """
        if kind == "alone":
            return [None] * len(batches)
        learns = kind == "learning"
        if len(batches) == 1:
            return [lambda decoded: self._corrected(batches, [decoded], learns)[0]]
        decoded = [decode(self.model, targets, self.loss) for targets in batches]
        corrected = self._corrected(batches, decoded, learns)
        return [lambda _, found=found: found for found in corrected]

    def _corrected(
        self, batches: list[Targets], decoded: list[Decoded], learns: bool
    ) -> list[tuple[Tensor, Tensor]]:
        parts = []
        for targets, made in zip(batches, decoded, strict=True):
            judged_NT = targets.judged_frames_NT
            gradient_N = distance_gradient(made, judged_NT, self.loss)
            if judged_NT is None:
                shape, device = made.frames_NTCHW.shape[:2], made.frames_NTCHW.device
                judged_NT = torch.ones(shape, dtype=torch.bool, device=device)
            _, T, _, H, W = targets.frames_NTCHW.shape
            draws_NG3 = targets.draws_NG3
            parts.append(Part((T, H, W), made, judged_NT, draws_NG3, gradient_N))
        corrected, weight = self.seraena.guide(parts, learns)
        return [(frames_NTCHW, weight) for frames_NTCHW in corrected]

    def _run_aside(self, batches: list[Targets], kind: Kind) -> StepResult:
        """On the stream of the capture, where autograd and FSDP2 then have been."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._run(batches, kind)
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _capture(self, batches: list[Targets], kind: Kind) -> _Capture:
        """Record the step, without running it, over inputs that stay where they are.

        What GPUs send one another is recorded with it; FSDP2 can be since PyTorch 2.11.
        All graphs share their memory: they never run side by side, and
        what one leaves is copied before the next begins.
        """
        inputs = [_clone(batch) for batch in batches]
        first = next(iter(self._captured.values()), None)
        graph = torch.cuda.CUDAGraph()
        # Threads that pin batches or watch NCCL go on as they are.
        with torch.cuda.graph(
            graph,
            pool=first.graph.pool() if first else None,
            stream=self._stream,
            capture_error_mode="thread_local",
        ):
            result = self._run(inputs, kind)
        return _Capture(graph, inputs, result)


@dataclass
class _Capture:
    graph: torch.cuda.CUDAGraph
    inputs: list[Targets]
    result: StepResult


Shapes = tuple[tuple[int, ...], ...]


def _shapes(batches: list[Targets]) -> Shapes:
    return tuple(tuple(batch.frames_NTCHW.shape) for batch in batches)


def _clone(targets: Targets) -> Targets:
    tensors = [x if x is None else x.clone() for x in _tensors(targets)]
    return Targets(*tensors)


def _copy(static: Targets, targets: Targets) -> None:
    for mine, theirs in zip(_tensors(static), _tensors(targets), strict=True):
        if mine is not None:
            mine.copy_(theirs)


def _tensors(targets: Targets) -> list[Tensor | None]:
    return list(vars(targets).values())
