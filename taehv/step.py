"""One optimizer step as the device sees it: forward, backward, clip, update, average.

Nothing in it waits for the device or depends on its values on the host: what the step
found out comes back as one tensor, to be read when it is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from taehv.config import Loss
from taehv.distributed import mean_over_ranks, set_gradient_sync
from taehv.losses import Targets, training_losses
from taehv.model import TAEHV
from taehv.optim import AdamW, Ema

WARMUP_CALLS = 3
"""Steps before the capture: compiling and the libraries' set-up cannot be captured."""


@dataclass
class StepResult:
    """What a step found out, still on the device."""

    names: list[str]
    values: Tensor
    """The mean over all processes of each named loss; then the gradient's norm, 1 if
    the step was applied or 0, and this process's loss of each micro-batch."""


class TrainingStep:
    """Trains a model by one global batch a call.

    Args:
        model: the student.
        roots: its parts that FSDP2 shards.
        optimizer: of the trained parameters.
        ema: of all parameters.
        loss: section [loss].
        graph: replay the whole step as one CUDA graph, one for each shape of the
            batches; the first few calls of a shape run as they are.
    """

    def __init__(
        self,
        model: TAEHV,
        roots: Sequence[nn.Module],
        optimizer: AdamW,
        ema: Ema,
        loss: Loss,
        graph: bool,
    ) -> None:
        self.model, self.roots, self.optimizer = model, roots, optimizer
        self.ema, self.loss, self.graph = ema, loss, graph
        self._share = torch.zeros_like(optimizer.lr)
        self._calls: Counter[Shapes] = Counter()
        self._captured: dict[Shapes, _Capture] = {}
        self._stream = torch.cuda.Stream() if graph else None

    def __call__(self, batches: list[Targets], step: int, rate: float) -> StepResult:
        """Train.

        Args:
            batches: this process's micro-batches, all of one shape, on the device.
            step: steps done before this one.
            rate: learning rate.
        """
        self.optimizer.lr.fill_(rate)
        self._share.fill_(self.ema.share(step))
        if not self.graph:
            return self._run(batches)
        shapes = _shapes(batches)
        self._calls[shapes] += 1
        if self._calls[shapes] <= WARMUP_CALLS:
            return self._run_aside(batches)
        if shapes not in self._captured:
            self._captured[shapes] = self._capture(batches)
        captured = self._captured[shapes]
        for static, batch in zip(captured.inputs, batches, strict=True):
            _copy(static, batch)
        captured.graph.replay()
        return StepResult(captured.result.names, captured.result.values.clone())

    def _run(self, batches: list[Targets]) -> StepResult:
        sums, losses = 0.0, []
        for index, targets in enumerate(batches):
            set_gradient_sync(self.roots, index == len(batches) - 1)
            terms = training_losses(self.model, targets, self.loss)
            (terms["loss"] / len(batches)).backward()
            values = torch.stack([term.detach() for term in terms.values()])
            sums = sums + values
            losses.append(values[0])
        means = sums / len(batches)
        if dist.get_world_size() > 1:
            means = mean_over_ranks(means)
        norm, is_applied = self.optimizer.step(means[0])
        self.ema.update(self._share * is_applied)
        found = [*means, norm, is_applied, *losses]
        return StepResult(list(terms), torch.stack([x.to(means) for x in found]))

    def _run_aside(self, batches: list[Targets]) -> StepResult:
        """On the stream of the capture, where autograd and FSDP2 then have been."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._run(batches)
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _capture(self, batches: list[Targets]) -> _Capture:
        """Record the step, without running it, over inputs that stay where they are.

        What GPUs send one another is recorded with it; FSDP2 can be since PyTorch 2.11.
        The graphs of all shapes share their memory: they never run side by side, and
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
            result = self._run(inputs)
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
