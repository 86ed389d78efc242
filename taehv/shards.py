"""Tensors that processes share, and their parts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory."""
    return locals_of([tensor])[0]


@torch.no_grad()
def locals_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's part of each tensor, in the same memory."""
    return [x.to_local() if hasattr(x, "to_local") else x for x in tensors]


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every process (a collective if it is sharded)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
