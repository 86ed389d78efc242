"""Weights and gradients in the CPU's memory, for an optimizer that works there.

What goes to the GPU or comes from it goes in one piece through pinned memory, in the
order of the GPU's work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from taehv.shards import locals_of
from taehv.team import take_cores


class Mirror:
    """Tensors in the CPU's memory of the shapes of others, side by side.

    Args:
        tensors: anywhere, of one number format.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        first = tensors[0]
        self._device = first.device
        # Taken now, as a CUDA graph cannot: it holds copies into it.
        self._flat = torch.zeros(
            sum(tensor.numel() for tensor in tensors),
            dtype=first.dtype,
            pin_memory=first.is_cuda,
        )
        self.parts = _split(self._flat, tensors)

    @torch.no_grad()
    def download(self, tensors: Sequence[Tensor]) -> None:
        """Begin to copy tensors to here; a CUDA graph can hold it."""
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self._flat.copy_(flat, non_blocking=True)

    def wait(self) -> None:
        """Until all that was begun on this stream is done."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    @torch.no_grad()
    def upload(self, tensors: Sequence[Tensor]) -> None:
        """Begin to copy from here to tensors."""
        flat = self._flat.to(self._device, non_blocking=True)
        torch._foreach_copy_(tensors, _split(flat, tensors))


def _split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    pieces = flat.split([tensor.numel() for tensor in like])
    return [piece.view(x.shape) for piece, x in zip(pieces, like, strict=True)]


class Masters:
    """The weights in the CPU's memory, which an optimizer changes and `Ema` averages.

    Those on the device are copies of them, and follow by `upload`.

    Args:
        parameters: all of a model, plain or sharded by FSDP2.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        take_cores()
        parameters = list(parameters)
        self._copies = locals_of(parameter.detach() for parameter in parameters)
        self._mirror = Mirror(self._copies)
        self._parts = dict(zip(parameters, self._mirror.parts, strict=True))
        self.refresh()

    def of(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """This process's part of each."""
        return [self._parts[parameter] for parameter in parameters]

    def refresh(self) -> None:
        """Follow the device's weights: to call where those were set from outside."""
        self._mirror.download(self._copies)
        self._mirror.wait()

    def upload(self) -> None:
        """Begin to let the device's weights follow.

        The masters must stay as they are until that is done: until the device has come
        to the end of a later step.
        """
        self._mirror.upload(self._copies)
