"""A convolution, its bias, a residual and the ReLU after them as one kernel of cuDNN.

PyTorch runs them as two or more, each of which reads and writes the whole activation.
The gradients are those of the layers one by one; the ReLU's comes from its output, so
that nothing but inputs and outputs is kept. cuDNN's ReLU may make 0 of NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rectify(x_BCHW: Tensor, conv: nn.Conv2d, skip_BCHW: Tensor, share: float) -> Tensor:
    """ReLU of the sum of a convolution and of `share` times `skip_BCHW`.

    The kernel reads a residual even where its share is 0, and 0 times NaN is NaN. So
    one is given then, too, which is finite where the input is; PyTorch's call without
    one would take the output's memory as it is.

    Args:
        x_BCHW: input of the convolution.
        conv: ungrouped, with a bias, and of stride and dilation 1.
        skip_BCHW: of the convolution's output's shape.
        share: 0 or 1.
    """
    weight = conv.weight.contiguous(memory_format=torch.channels_last)
    padding = list(conv.padding)
    return _conv_relu(x_BCHW, weight, conv.bias, skip_BCHW, share, padding)


def has_kernel(x_BCHW: Tensor, conv: nn.Conv2d) -> bool:
    """Whether cuDNN computes such convolutions with what follows them.

    Under autocast the weights are of another type, and inputs of more than 2^31 numbers
    are PyTorch's to split.
    """
    return (
        x_BCHW.is_cuda
        and x_BCHW.dtype in (torch.bfloat16, torch.float16)
        and conv.weight.dtype == x_BCHW.dtype
        and x_BCHW[:, 0].numel() * max(conv.weight.shape[:2]) < 2**31
        and torch.backends.cudnn.enabled
        and _fuses(x_BCHW.device)
    )


@torch.compiler.assume_constant_result
def _fuses(device: torch.device) -> bool:
    """Whether cuDNN has kernels there that take other operations along."""
    is_nvidia = torch.version.cuda is not None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


@torch.library.custom_op(
    "taehv::conv_relu",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor skip, float share, "
    "int[] padding) -> Tensor",
)
def _conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    skip: Tensor,
    share: float,
    padding: list[int],
) -> Tensor:
    if not x.is_cuda:
        return F.relu(F.conv2d(x, weight, bias, padding=padding) + share * skip)
    ones = [1, 1]
    return torch.cudnn_convolution_add_relu(
        x, weight, skip, share, bias, ones, padding, ones, 1
    )


@_conv_relu.register_fake
def _(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    """Shape and layout of the output."""
    return F.conv2d(x, weight, padding=others[-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, _, ctx.share, ctx.padding = inputs
    ctx.save_for_backward(x, weight, output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, output = ctx.saved_tensors
    gradient = torch.ops.aten.threshold_backward(gradient, output, 0)
    ones, zeros = [1, 1], [0, 0]
    layers = torch.ops.aten.convolution_backward(
        gradient,
        x,
        weight,
        [len(weight)],
        ones,
        ctx.padding,
        ones,
        False,
        zeros,
        1,
        list(ctx.needs_input_grad[:3]),
    )
    return *layers, gradient if ctx.share else None, None, None


_conv_relu.register_autograd(_backward, setup_context=_keep)
