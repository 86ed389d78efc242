"""Two or three layers as one convolution: the same function with less arithmetic.

The 1x1 convolutions that merge and split frames stand before 3x3 convolutions, with
neither a bias nor an activation between. Such a pair is one convolution, and its weight
a product of both; nearest upsampling before it makes it a transposed convolution, which
needs 16 in place of 36 multiplications for each pixel and channel that comes in. The
products are computed anew in every call, so that gradients reach the parameters
themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve(x_BCHW: Tensor, first: Tensor, second: Tensor, stride: int = 1) -> Tensor:
    """A 1x1 convolution, and a 3x3 one of each part of its output, at once.

    Args:
        x_BCHW: B x I x H x W.
        first: weight of the 1x1 convolution, (S M) x I x 1 x 1.
        second: weight of the 3x3 convolution, O x M x 3 x 3.
        stride: of the 3x3 convolution.

    Returns:
        B x (S O) x H / stride x W / stride: part after part.
    """
    weight = product(first, second).to(x_BCHW.dtype)
    return F.conv2d(x_BCHW, weight, stride=stride, padding=1)


def upsample_and_convolve(x_BCHW: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`convolve` of an input that is first made twice as high and wide.

    Returns:
        B x (S O) x 2 H x 2 W.
    """
    weight = product(first, second).flip(2, 3).transpose(0, 1)
    # Each pixel of the input stands for two by two.
    weight = F.pad(weight, (0, 1)) + F.pad(weight, (1, 0))
    weight = F.pad(weight, (0, 0, 0, 1)) + F.pad(weight, (0, 0, 1, 0))
    return F.conv_transpose2d(x_BCHW, weight.to(x_BCHW.dtype), stride=2, padding=1)


def pays(x_BCHW: Tensor, second: Tensor) -> bool:
    """Whether the product of the weights is less work than what it saves.

    It costs about what the joint convolution costs for M pixels.
    """
    return len(x_BCHW) * x_BCHW[0, 0].numel() >= second.shape[1]


def product(first: Tensor, second: Tensor) -> Tensor:
    """The weight of both convolutions together, (S O) x I x 3 x 3.

    In float32 at least: rounded once, it is closer to the two than they are in bf16.
    """
    exact = torch.promote_types(first.dtype, torch.float32)
    first_SMI = first.to(exact).flatten(1).unflatten(0, (-1, second.shape[1]))
    return torch.einsum("smi,omhw->soihw", first_SMI, second.to(exact)).flatten(0, 1)
