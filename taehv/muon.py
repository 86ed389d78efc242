"""Muon: steps of weight matrices whose singular values are all about one.

Source: Keller Jordan, Muon: an optimizer for hidden layers in neural networks (2024),
kellerjordan.github.io/posts/muon; the size of a step as in Liu et al. 2025,
arXiv:2502.16982, and torch.optim.Muon's "match_rms_adamw".
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial that each iteration applies to the singular values: they end
between 0.7 and 1.2."""
STEP_RMS = 0.2
"""Root mean square of a step over the learning rate, about that of AdamW, so that both
take one learning rate and weight decay."""
EPS = 1e-7
MOST_ROWS = 256
"""Of matrices that are stepped along with others; larger ones keep a GPU busy alone."""


@dataclass(frozen=True)
class Matrix:
    """A weight that steps as one matrix, or as the several of a grouped convolution."""

    part: Tensor
    """Of this process, with its gradient; sharded along the first dimension."""
    momentum: Tensor
    """Of the same shape."""
    shape: torch.Size
    """Of the whole weight."""
    groups: int
    """Matrices in it, one below the other."""
    rate: Tensor
    """Learning rate."""

    @property
    def size(self) -> tuple[int, int, int]:
        """Matrices, and the rows and columns of each."""
        return self.groups, self.shape[0] // self.groups, self.shape[1:].numel()


class Muon:
    """Steps matrices; those of one shape at once, and on a GPU those of as many rows.

    Nothing waits for the device. Where weights are sharded, each process orthogonalises
    whole ones and keeps its part.

    Args:
        matrices: in an order that all processes have.
        weight_decay: decoupled.
        shard_group: processes that share one copy of the weights, if any do.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        weight_decay: float,
        shard_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.matrices, self.weight_decay = matrices, weight_decay
        self.shard_group = shard_group
        first = matrices[0].part
        # Five products in bf16 are exact enough, and fast where there are tensor cores.
        self.dtype = torch.bfloat16 if first.is_cuda else first.dtype
        self.most_rows = MOST_ROWS if first.is_cuda else 0

    @torch.no_grad()
    def step(self, divisor: Tensor, is_good: Tensor) -> None:
        """Apply the gradients over a finite divisor, or nothing where they are bad."""
        parts = [matrix.part for matrix in self.matrices]
        momenta = [matrix.momentum for matrix in self.matrices]
        # Of one buffer, since a kernel for each takes longer to start than to run.
        flat = torch.cat([part.grad.flatten() for part in parts])
        # What is not finite would remain so times zero.
        flat.nan_to_num_(0, 0, 0).div_(divisor.to(flat.dtype))
        ahead = self._split(flat)
        share = (1 - MOMENTUM) * is_good.to(divisor)
        torch._foreach_mul_(momenta, 1 - share)
        torch._foreach_add_(momenta, torch._foreach_mul(ahead, share))
        torch._foreach_lerp_(ahead, momenta, MOMENTUM)
        if self.weight_decay:
            self._decay(is_good)
        torch._foreach_sub_(parts, self._steps(flat, is_good))

    def _decay(self, is_good: Tensor) -> None:
        alike: dict[Tensor, list[Tensor]] = defaultdict(list)
        for matrix in self.matrices:
            alike[matrix.rate].append(matrix.part)
        for rate, parts in alike.items():
            torch._foreach_mul_(parts, 1 - rate * is_good * self.weight_decay)

    def _split(self, flat: Tensor) -> list[Tensor]:
        """This process's part of each weight, out of all of them."""
        parts = [matrix.part for matrix in self.matrices]
        pieces = flat.split([part.numel() for part in parts])
        return [x.view(part.shape) for x, part in zip(pieces, parts, strict=True)]

    def _steps(self, flat: Tensor, is_good: Tensor) -> list[Tensor]:
        """This process's parts of all steps, of its parts of the directions."""
        wholes = self._whole(self._split(flat.to(self.dtype)))
        alike = defaultdict(list)
        for index, matrix in enumerate(self.matrices):
            alike[matrix.size, matrix.rate].append(index)
        batches = [
            torch.cat([wholes[i].view(size) for i in indices])
            for (size, _), indices in alike.items()
        ]
        each = orthogonal_each(batches, self.most_rows)
        found: dict[int, Tensor] = {}
        for (key, indices), steps_BRC in zip(alike.items(), each, strict=True):
            (groups, *sides), rate = key
            scale = STEP_RMS * math.sqrt(max(sides)) * rate * is_good
            steps_BRC = steps_BRC.to(flat.dtype) * scale
            found |= zip(indices, steps_BRC.split(groups), strict=True)
        matrices = enumerate(self.matrices)
        return [self._own(found[i], matrix.part) for i, matrix in matrices]

    def _whole(self, parts: list[Tensor]) -> list[Tensor]:
        """All processes' parts, each weight's rows of all groups in one matrix."""
        columns = [matrix.size[2] for matrix in self.matrices]
        parts_RC = [p.view(-1, C) for p, C in zip(parts, columns, strict=True)]
        if self.shard_group is None:
            return parts_RC
        size = self.shard_group.size()
        # FSDP2 gives each process the same number of rows, but for the last ones.
        rows = [-(-matrix.shape[0] // size) for matrix in self.matrices]
        padded = [
            F.pad(part_RC, (0, 0, 0, R - len(part_RC))).flatten()
            for part_RC, R in zip(parts_RC, rows, strict=True)
        ]
        flat = torch.cat(padded)
        gathered = flat.new_empty(size * len(flat))
        dist.all_gather_into_tensor(gathered, flat, group=self.shard_group)
        pieces = gathered.view(size, -1).split([len(p) for p in padded], 1)
        return [
            piece.reshape(-1, C)[: matrix.shape[0]]
            for piece, C, matrix in zip(pieces, columns, self.matrices, strict=True)
        ]

    def _own(self, whole_BRC: Tensor, part: Tensor) -> Tensor:
        """The rows of a part, in its shape."""
        whole_RC = whole_BRC.flatten(0, 1)
        if self.shard_group is not None:
            size, rank = self.shard_group.size(), self.shard_group.rank()
            first = -(-len(whole_RC) // size) * rank
            whole_RC = whole_RC[first : first + len(part)]
        return whole_RC.reshape(part.shape)


def orthogonal_each(batches: Sequence[Tensor], most_rows: int) -> list[Tensor]:
    """Of each matrix one of about the same singular vectors, all of about size one.

    What is zero stays zero. Small matrices of as many rows, or columns where these are
    fewer, are iterated at once, filled up with columns of zeros, which change nothing:
    on a GPU a kernel takes longer to start than to run.

    Args:
        batches: B x R x C, of several shapes.
        most_rows: of a matrix that is small; 0 fills up none, so that only those of
            one shape are iterated at once.
    """
    flipped = [x.shape[1] > x.shape[2] for x in batches]
    wide = [x.mT if flip else x for x, flip in zip(batches, flipped, strict=True)]
    together: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, x_BRC in enumerate(wide):
        _, rows, columns = x_BRC.shape
        together[rows, 0 if rows <= most_rows else columns].append(index)
    found = list(wide)
    for indices in together.values():
        some = [wide[i] for i in indices]
        most = max(x.shape[2] for x in some)
        filled = torch.cat([F.pad(x, (0, most - x.shape[2])) for x in some])
        parts = orthogonal(filled).split([len(x) for x in some])
        for i, part_BRC in zip(indices, parts, strict=True):
            found[i] = part_BRC[..., : wide[i].shape[2]]
    return [x.mT if flip else x for x, flip in zip(found, flipped, strict=True)]


def orthogonal(wide_BRC: Tensor) -> Tensor:
    """The same of matrices of one shape, with no more rows than columns.

    By Newton-Schulz iterations in the format of the matrices.
    """
    a, b, c = COEFFICIENTS
    norms_B11 = torch.linalg.vector_norm(wide_BRC, dim=(1, 2), keepdim=True)
    x_BRC = wide_BRC / norms_B11.clamp_min(EPS)
    for _ in range(ITERATIONS):
        gram_BRR = x_BRC @ x_BRC.mT
        gram_BRR = torch.baddbmm(gram_BRR, gram_BRR, gram_BRR, beta=b, alpha=c)
        x_BRC = torch.baddbmm(x_BRC, gram_BRR, x_BRC, beta=a)
    return x_BRC
