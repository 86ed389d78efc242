"""TAEHV, the tiny video autoencoder (madebyollin/taehv), in all published variants."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from taehv import fused
from taehv.errors import UserError
from taehv.rectified import has_kernel, rectify
from taehv.variants import (
    CHUNK_DROPPED_LATENTS,
    CHUNK_FRAMES,
    CHUNK_LEAD_FRAMES,
    VARIANTS,
    Variant,
)
from taehv.weights import check_variant, identify, load_state_dict_file

IMAGE_CHANNELS = 3
ENCODER_WIDTH = 64
DECODER_WIDTHS = {
    "base": (256, 128, 64, 64),
    "super": (512, 256, 128, 64),
    "wide": (1024, 512, 256, 64),
}
WIDE_GROUP_CHANNELS = 64
# New weights: what the latents make of colors, and how strongly a new decoder paints
# with its other, random channels.
COLOR_SCALE = 4.0
DETAIL_SCALE = 0.3
CENTER = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]])
MEAN_OF_FOUR = torch.tensor([[0, 0, 0], [0, 1, 1], [0, 1, 1]]) / 4
SMOOTH = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16


def conv3x3(
    in_channels: int,
    out_channels: int,
    *,
    stride: int = 1,
    groups: int = 1,
    bias: bool = True,
) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size, up to its stride."""
    return nn.Conv2d(
        in_channels, out_channels, 3, stride, padding=1, groups=groups, bias=bias
    )


class Clamp(nn.Module):
    """Soft limit of latents to (-3, 3)."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.tanh(x_BCHW / 3) * 3


class MemoryBlock(nn.Module):
    """Residual block over a frame and the frame before it; keeps the shape."""

    def __init__(self, conv: nn.Sequential, act: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.act = act

    def forward(self, x_BCHW: Tensor, past_BCHW: Tensor) -> Tensor:
        residual_BCHW = self.conv(torch.cat([x_BCHW, past_BCHW], 1))
        return self.act(residual_BCHW + x_BCHW)


class MemBlock(MemoryBlock):
    """The block of the encoder and of the base decoder: three 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        conv = nn.Sequential(
            conv3x3(2 * channels, channels),
            nn.ReLU(),
            conv3x3(channels, channels),
            nn.ReLU(),
            conv3x3(channels, channels),
        )
        super().__init__(conv, nn.ReLU())

    def rectified(self, x_BCHW: Tensor, past_BCHW: Tensor) -> Tensor:
        """The same by fewer kernels, see taehv/rectified.py."""
        first, _, second, _, third = self.conv
        y_BCHW = rectify(torch.cat([x_BCHW, past_BCHW], 1), first, x_BCHW, 0)
        return rectify(rectify(y_BCHW, second, y_BCHW, 0), third, x_BCHW, 1)


class SuperMemBlock(MemoryBlock):
    """The block of the super decoder: 7x7 depthwise, then an inverted bottleneck."""

    def __init__(self, channels: int) -> None:
        both = 2 * channels
        conv = nn.Sequential(
            nn.Conv2d(both, both, 7, padding=3, groups=both, bias=False),
            nn.Conv2d(both, 2 * both, 1),
            nn.ReLU(),
            nn.Conv2d(2 * both, channels, 1, bias=False),
        )
        super().__init__(conv, nn.Identity())


class WideMemBlock(MemoryBlock):
    """The block of the wide decoder: pointwise and grouped 3x3 in turn."""

    def __init__(self, channels: int) -> None:
        groups = channels // WIDE_GROUP_CHANNELS
        conv = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 1),
            nn.ReLU(),
            conv3x3(channels, channels, groups=groups),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
            nn.ReLU(),
            conv3x3(channels, channels, groups=groups),
        )
        super().__init__(conv, nn.ReLU())


DECODER_BLOCKS = {"base": MemBlock, "super": SuperMemBlock, "wide": WideMemBlock}


class PixelShuffle(nn.PixelShuffle):
    """nn.PixelShuffle that keeps memory channels last."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return unfold_patches(x_BCHW, self.upscale_factor)


class TPool(nn.Module):
    """Merge each `stride` frames in turn into one."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(stride * channels, channels, 1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(stack_frames(x_BCHW, self.stride))


class TGrow(nn.Module):
    """Split each frame into `stride` frames in turn."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, stride * channels, 1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return unstack_frames(self.conv(x_BCHW), self.stride)


# The functions below reshape with the channels last, so that copies, those of gradients
# too, lie in memory as convolutions want them.


def stack_frames(x_BCHW: Tensor, stride: int) -> Tensor:
    """Make the channels of each `stride` frames in turn those of one."""
    if stride == 1:
        return x_BCHW
    x_BSHWC = x_BCHW.movedim(1, -1).unflatten(0, (-1, stride))
    return x_BSHWC.movedim(1, -2).flatten(-2).movedim(-1, 1)


def unstack_frames(x_BCHW: Tensor, stride: int) -> Tensor:
    """The inverse of `stack_frames`."""
    if stride == 1:
        return x_BCHW
    x_BHWSC = x_BCHW.movedim(1, -1).unflatten(-1, (stride, -1))
    return x_BHWSC.movedim(-2, 1).flatten(0, 1).movedim(-1, 1)


def fold_patches(x_dCHW: Tensor, size: int) -> Tensor:
    """Squares of pixels to channels, as F.pixel_unshuffle."""
    if size == 1:
        return x_dCHW
    x_dHWC = x_dCHW.movedim(-3, -1)
    x_dhpwqC = x_dHWC.unflatten(-2, (-1, size)).unflatten(-4, (-1, size))
    x_dhwCpq = x_dhpwqC.movedim((-4, -2), (-2, -1))
    return x_dhwCpq.flatten(-3).movedim(-1, -3)


def unfold_patches(x_dCHW: Tensor, size: int) -> Tensor:
    """Channels to squares of pixels, as F.pixel_shuffle."""
    if size == 1:
        return x_dCHW
    x_dhwCpq = x_dCHW.movedim(-3, -1).unflatten(-1, (-1, size, size))
    x_dhpwqC = x_dhwCpq.movedim((-2, -1), (-4, -2))
    return x_dhpwqC.flatten(-3, -2).flatten(-4, -3).movedim(-1, -3)


class FrameMemory:
    """What the blocks of a VideoSequential remember from one call to the next.

    It belongs to one video. Its tensors stay where they are, so that a CUDA graph of a
    call finds them. It is a class, and no list or dict, so that whatever maps over a
    module's inputs (FSDP2 does, to cast them) passes on the object itself.
    """

    def __init__(self) -> None:
        self.waiting: dict[int, int] = {}
        """How many frames wait for more, at which block."""
        self._last_N1HWC: dict[int, Tensor] = {}
        self._waiting_NTHWC: dict[int, Tensor] = {}

    def reset(self) -> None:
        """Begin a new video of frames of the same shape."""
        self.waiting.clear()
        for last_N1HWC in self._last_N1HWC.values():
            last_N1HWC.zero_()

    def before(self, block: int) -> Tensor | None:
        """The frame before those of this call; None, or zeros, at the start."""
        return self._last_N1HWC.get(block)

    def keep(self, block: int, x_NTHWC: Tensor) -> None:
        """Remember the last frame, once the one before is no longer needed."""
        last_N1HWC = x_NTHWC[:, -1:]
        if block in self._last_N1HWC:
            self._last_N1HWC[block].copy_(last_N1HWC)
        else:  # a view would keep all the frames alive
            self._last_N1HWC[block] = last_N1HWC.clone()

    def whole_groups(self, block: int, x_NTHWC: Tensor, stride: int) -> Tensor:
        """The waiting frames and `x_NTHWC`, less a remainder that waits for more."""
        if waiting := self.waiting.pop(block, 0):
            kept_NTHWC = self._waiting_NTHWC[block][:, :waiting]
            x_NTHWC = torch.cat([kept_NTHWC, x_NTHWC], 1)
        whole = x_NTHWC.shape[1] // stride * stride
        if rest := x_NTHWC.shape[1] - whole:
            if block not in self._waiting_NTHWC:
                N, _, *shape = x_NTHWC.shape
                self._waiting_NTHWC[block] = x_NTHWC.new_empty(N, stride - 1, *shape)
            self._waiting_NTHWC[block][:, :rest] = x_NTHWC[:, whole:]
            self.waiting[block] = rest
        return x_NTHWC[:, :whole]


def previous_frames(x_NTHWC: Tensor, first_N1HWC: Tensor | None = None) -> Tensor:
    """Shift by one frame; `first_N1HWC`, or zeros, comes in at the start."""
    if first_N1HWC is None:
        return F.pad(x_NTHWC[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
    if x_NTHWC.shape[1] == 1:
        return first_N1HWC
    return torch.cat([first_N1HWC, x_NTHWC[:, :-1]], 1)


class VideoSequential(nn.Sequential):
    """Blocks applied to whole videos; every frame of a call is computed at once.

    Calling it, and not its blocks, is what lets FSDP2's hooks fire and torch.compile
    see one graph. Activations lie in memory as N T H W C: every convolution finds them
    channels last, and a shift by a frame is one of whole blocks of memory.
    """

    fused = True
    """Whether layers in a row are computed as one, where that is less work."""
    checkpointing = False
    """Whether the backward pass computes activations anew, but for what goes into a
    memory block."""

    def forward(self, x_NTCHW: Tensor, memory: FrameMemory | None = None) -> Tensor:
        """Run the blocks.

        Args:
            x_NTCHW: the frames; without a memory, T must be a multiple of the product
                of the TPool strides.
            memory: makes the call continue the video of the calls before it, and is
                updated. Then T may be anything, and the result may have no frames.

        Returns:
            N T' C' H' W' frames.
        """
        x_NTHWC = x_NTCHW.movedim(2, -1).contiguous()
        if memory is not None:
            x_NTHWC = self._continue(x_NTHWC, memory)
        elif self.checkpointing and torch.is_grad_enabled():
            for stages in self._segments():
                x_NTHWC = checkpoint(
                    partial(_run_all, stages, self.fused),
                    x_NTHWC,
                    use_reentrant=False,
                    preserve_rng_state=False,  # nothing is drawn, and it would wait
                )
        else:
            stages = [blocks for _, blocks in self._stages()]
            x_NTHWC = _run_all(stages, self.fused, x_NTHWC)
        return x_NTHWC.movedim(-1, 2)

    def _continue(self, x_NTHWC: Tensor, memory: FrameMemory) -> Tensor:
        for index, blocks in self._stages():
            if isinstance(blocks[0], TPool):
                x_NTHWC = memory.whole_groups(index, x_NTHWC, blocks[0].stride)
                if x_NTHWC.shape[1] == 0:
                    break
            before_N1HWC = memory.before(index)
            result_NTHWC = _run(blocks, self.fused, x_NTHWC, before_N1HWC)
            if isinstance(blocks[0], MemoryBlock):
                memory.keep(index, x_NTHWC)
            x_NTHWC = result_NTHWC
        return x_NTHWC

    def _segments(self) -> list[list[list[nn.Module]]]:
        """The stages, each memory block with those up to the next one."""
        segments: list[list[list[nn.Module]]] = [[]]
        for _, blocks in self._stages():
            if isinstance(blocks[0], MemoryBlock):
                segments.append([])
            segments[-1].append(blocks)
        return segments

    def _stages(self) -> Iterator[tuple[int, list[nn.Module]]]:
        """Blocks that are computed at once, with the first one's index."""
        blocks = list(self)
        start = 0
        while start < len(blocks):
            count = _fusible(blocks[start:]) if self.fused else 1
            yield start, blocks[start : start + count]
            start += count


def _fusible(blocks: Sequence[nn.Module]) -> int:
    """How many blocks, from the first on, can be one convolution."""
    count = 3 if isinstance(blocks[0], nn.Upsample) else 2
    *_, frames, conv = blocks[:count] if len(blocks) >= count else (None, None)
    fits = isinstance(frames, TPool | TGrow) and isinstance(conv, nn.Conv2d)
    return count if fits else 1


def _run_all(
    stages: Iterable[Sequence[nn.Module]], is_fused: bool, x_NTHWC: Tensor
) -> Tensor:
    for blocks in stages:
        x_NTHWC = _run(blocks, is_fused, x_NTHWC)
    return x_NTHWC


def _run(
    blocks: Sequence[nn.Module],
    is_fused: bool,
    x_NTHWC: Tensor,
    before_N1HWC: Tensor | None = None,
) -> Tensor:
    """Compute blocks that are fusible, or one, which may look at the frame before."""
    first, *others = blocks
    x_BCHW = _images(x_NTHWC)
    if isinstance(first, MemoryBlock):
        past_BCHW = _images(previous_frames(x_NTHWC, before_N1HWC))
        fits = isinstance(first, MemBlock) and has_kernel(x_BCHW, first.conv[0])
        compute = first.rectified if is_fused and fits else first
        x_BCHW = compute(x_BCHW, past_BCHW)
    elif others and fused.pays(x_BCHW, blocks[-1].weight):
        x_BCHW = _run_fused(blocks, x_BCHW)
    else:
        for block in blocks:
            x_BCHW = block(x_BCHW)
    return x_BCHW.movedim(1, -1).unflatten(0, (len(x_NTHWC), -1))


def _images(x_NTHWC: Tensor) -> Tensor:
    """The frames of all videos in turn, B C H W in the same memory."""
    return x_NTHWC.flatten(0, 1).movedim(-1, 1)


def _run_fused(blocks: Sequence[nn.Module], x_BCHW: Tensor) -> Tensor:
    *upsample, frames, conv = blocks
    weights = frames.conv.weight, conv.weight
    if isinstance(frames, TPool):
        x_BCHW = stack_frames(x_BCHW, frames.stride)
        return fused.convolve(x_BCHW, *weights, conv.stride[0])
    if upsample and upsample[0].scale_factor != 1:
        x_BCHW = fused.upsample_and_convolve(x_BCHW, *weights)
    else:
        x_BCHW = fused.convolve(x_BCHW, *weights)
    x_BCHW = unstack_frames(x_BCHW, frames.stride)
    return x_BCHW if conv.bias is None else x_BCHW + conv.bias[:, None, None]


def build_encoder(variant: Variant) -> VideoSequential:
    """Frames, patches folded into channels, to latents."""
    width = ENCODER_WIDTH
    blocks = [conv3x3(IMAGE_CHANNELS * variant.patch_size**2, width), nn.ReLU()]
    for pools in variant.time_stages:
        blocks += [
            TPool(width, 2 if pools else 1),
            conv3x3(width, width, stride=2, bias=False),
            *(MemBlock(width) for _ in range(3)),
        ]
    return VideoSequential(*blocks, conv3x3(width, variant.latent_channels))


def build_decoder(
    variant: Variant, time_upscale: Sequence[bool], space_upscale: Sequence[bool]
) -> VideoSequential:
    """Latents to frames with patches folded into channels."""
    is_super = variant.decoder == "super"
    block, stage = DECODER_BLOCKS[variant.decoder], _super_stage if is_super else _stage
    widths = DECODER_WIDTHS[variant.decoder]
    if is_super:
        blocks = [nn.Conv2d(variant.latent_channels, widths[0], 1, bias=False)]
    else:
        blocks = [Clamp(), conv3x3(variant.latent_channels, widths[0]), nn.ReLU()]
    for i in range(3):
        blocks += [block(widths[i]) for _ in range(3)]
        scales = 2 if space_upscale[i] else 1, 2 if time_upscale[i] else 1
        blocks += stage(widths[i], widths[i + 1], *scales)
    if not is_super:
        blocks.append(nn.ReLU())
    out_channels = IMAGE_CHANNELS * variant.patch_size**2
    return VideoSequential(*blocks, conv3x3(widths[3], out_channels))


def _stage(n_in: int, n_out: int, space: int, time: int) -> list[nn.Module]:
    return [
        nn.Upsample(scale_factor=space),
        TGrow(n_in, time),
        conv3x3(n_in, n_out, bias=False),
    ]


def _super_stage(n_in: int, n_out: int, space: int, time: int) -> list[nn.Module]:
    return [
        conv3x3(n_in, n_out * space**2),
        nn.ReLU(),
        PixelShuffle(space),
        TGrow(n_out, time),
    ]


@torch.no_grad()
def init_blocks(blocks: Iterable[nn.Module], generator: torch.Generator | None) -> None:
    """New weights that keep the mean square of activations, block after block.

    A convolution has He's gain where a ReLU takes its output, else 1 (He et al. 2015,
    arXiv:1502.01852). Memory blocks begin as their skip connection, their last
    convolution being zero, and the frames that a TGrow makes begin as copies.
    """
    blocks = list(blocks)
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if isinstance(block, nn.Conv2d):
            rectifier = getattr(following, "act", following)
            gain = math.sqrt(2) if isinstance(rectifier, nn.ReLU) else 1.0
            _init_conv(block, gain, generator)
        elif isinstance(block, MemoryBlock):
            init_blocks(block.conv, generator)
            nn.init.zeros_(block.conv[-1].weight)
        elif isinstance(block, TPool | TGrow):
            _init_conv(block.conv, 1.0, generator)
        if isinstance(block, TGrow):
            frames = block.conv.weight.unflatten(0, (block.stride, -1))
            frames[1:] = frames[:1]


def _init_conv(conv: nn.Conv2d, gain: float, generator: torch.Generator | None) -> None:
    fan_in = conv.weight[0].numel()
    nn.init.normal_(conv.weight, 0, gain / math.sqrt(fan_in), generator)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def init_as_pytorch(network: nn.Module, generator: torch.Generator | None) -> None:
    """New weights as nn.Conv2d draws them: uniform within 1 / sqrt(fan in)."""
    for conv in network.modules():
        if isinstance(conv, nn.Conv2d):
            bound = 1 / math.sqrt(conv.weight[0].numel())
            for parameter in conv.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator)


@torch.no_grad()
def pass_colors_through(encoder: VideoSequential, decoder: VideoSequential) -> None:
    """Let the first three channels of every block carry red, green and blue.

    A new autoencoder then begins as one that averages each latent's frames and pixels
    and paints them back, and has only the details to learn. Latent channel c begins as
    COLOR_SCALE * (color c - 0.5), which gives it about unit RMS.
    """
    for block in encoder:
        if isinstance(block, TPool):
            frames = block.conv.weight.unflatten(1, (block.stride, -1))
            frames[:3] = 0
            frames[range(3), :, range(3)] = 1 / block.stride
        elif block is encoder[0]:
            _pass_colors(block, CENTER, columns=block.in_channels // 3)
        elif block is encoder[-1]:
            _pass_colors(block, COLOR_SCALE * CENTER)
            block.bias[:3] = -COLOR_SCALE / 2
        elif isinstance(block, nn.Conv2d):
            _pass_colors(block, MEAN_OF_FOUR)
    is_scaled = True  # colors are as in latents until a bias can make them positive
    for index, block in enumerate(decoder):
        if isinstance(block, TGrow):
            frames = block.conv.weight.unflatten(0, (block.stride, -1))
            frames[:, :3] = 0
            frames[:, range(3), range(3)] = 1
        elif isinstance(block, nn.Conv2d):
            plain = block.bias is not None or block.kernel_size == (1, 1)
            rows = _pixels_of(decoder[index:])
            _pass_colors(block, CENTER if plain else SMOOTH, rows=rows)
            if block.bias is not None and is_scaled:
                block.weight[: 3 * rows] /= COLOR_SCALE
                block.bias[: 3 * rows] = 0.5
                is_scaled = False


def _pixels_of(blocks: nn.Sequential) -> int:
    """How many output channels of the first block are one color's pixels."""
    if len(blocks) == 1:
        return blocks[0].out_channels // 3
    following = blocks[2] if len(blocks) > 2 else None
    return following.upscale_factor**2 if isinstance(following, nn.PixelShuffle) else 1


def _pass_colors(
    conv: nn.Conv2d, kernel_KK: Tensor, rows: int = 1, columns: int = 1
) -> None:
    """Make each color's `rows` outputs its `columns` inputs' mean under a kernel."""
    size = conv.kernel_size[0]
    margin = (kernel_KK.shape[0] - size) // 2
    kernel_KK = kernel_KK[margin : margin + size, margin : margin + size]
    if conv.out_channels > 3 * rows:
        conv.weight[: 3 * rows] = 0
    else:  # all that comes out is colors, to which the other channels add
        conv.weight[:, : 3 * columns] = 0
    for color in range(3):
        outputs = slice(color * rows, (color + 1) * rows)
        inputs = slice(color * columns, (color + 1) * columns)
        conv.weight[outputs, inputs] = kernel_KK.to(conv.weight) / columns
    if conv.bias is not None:
        conv.bias[: 3 * rows] = 0


class TAEHV(nn.Module):
    """A tiny video autoencoder with the published `state_dict`.

    Args:
        variant: a key of `VARIANTS`.
        decoder_time_upscale: which of the decoder's three stages double the frame
            rate, None for all that the variant has; two values leave the first stage
            off. Fewer give a cheaper preview with fewer frames.
        decoder_space_upscale: the same for height and width, which all stages double
            by default. Fewer give a smaller preview.

    Raises:
        UserError: if there is no such variant or the switches do not fit it.
    """

    def __init__(
        self,
        variant: str = "taehv",
        *,
        decoder_time_upscale: Sequence[bool] | None = None,
        decoder_space_upscale: Sequence[bool] | None = None,
    ) -> None:
        super().__init__()
        check_variant(variant)
        self.variant_name = variant
        self.variant = VARIANTS[variant]
        stages = self.variant.time_stages[::-1]
        time = _switches("decoder_time_upscale", decoder_time_upscale, stages)
        space = _switches("decoder_space_upscale", decoder_space_upscale, (True,) * 3)
        self.time_upscale = 2 ** sum(time)
        self.encoder = build_encoder(self.variant)
        self.decoder = build_decoder(self.variant, time, space)
        self.init_weights()

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        variant: str | None = None,
        *,
        decoder_time_upscale: Sequence[bool] | None = None,
        decoder_space_upscale: Sequence[bool] | None = None,
    ) -> TAEHV:
        """Load a published or exported `.pth` or `.safetensors` file, in float32.

        Args:
            path: the file.
            variant: needed where neither shapes nor metadata tell the variant.
            decoder_time_upscale: see `TAEHV`.
            decoder_space_upscale: see `TAEHV`.

        Raises:
            UserError: if the file is unusable or its variant unclear.
        """
        return cls.from_state_dict(
            *load_state_dict_file(path),
            variant,
            source=path,
            decoder_time_upscale=decoder_time_upscale,
            decoder_space_upscale=decoder_space_upscale,
        )

    @classmethod
    def from_state_dict(
        cls,
        state_dict: dict[str, Tensor],
        metadata: Mapping[str, str],
        variant: str | None = None,
        *,
        source: str | os.PathLike[str],
        decoder_time_upscale: Sequence[bool] | None = None,
        decoder_space_upscale: Sequence[bool] | None = None,
    ) -> TAEHV:
        """Make a model of weights that are in memory; see `from_pretrained`.

        Args:
            state_dict: weights under the published keys.
            metadata: what their file says of them.
            variant: needed where neither shapes nor metadata tell the variant.
            source: where they are from, for messages.
            decoder_time_upscale: see `TAEHV`.
            decoder_space_upscale: see `TAEHV`.

        Raises:
            UserError: if they fit no variant, or more than one.
        """
        try:
            variant = identify(state_dict, metadata, variant)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        model = cls(
            variant,
            decoder_time_upscale=decoder_time_upscale,
            decoder_space_upscale=decoder_space_upscale,
        )
        state_dict = dict(state_dict)
        model._cut_grow_weights(state_dict)
        _check_shapes(source, state_dict, model)
        model.load_state_dict(state_dict)
        return model

    @property
    def fused(self) -> bool:
        """Whether layers in a row are computed as one.

        On by default: the same function to rounding, of the same parameters, and
        faster. Set it before compiling.
        """
        return self.encoder.fused

    @fused.setter
    def fused(self, enabled: bool) -> None:
        self.encoder.fused = self.decoder.fused = enabled

    @property
    def checkpointing(self) -> bool:
        """Whether training keeps few activations and computes the others anew."""
        return self.encoder.checkpointing

    @checkpointing.setter
    def checkpointing(self, enabled: bool) -> None:
        self.encoder.checkpointing = self.decoder.checkpointing = enabled

    @torch.no_grad()
    def init_weights(
        self,
        generator: torch.Generator | None = None,
        initialization: Literal["he", "pytorch"] = "he",
    ) -> None:
        """Draw new weights in place.

        Args:
            generator: of random numbers; None takes PyTorch's own.
            initialization: he: latents of natural frames begin with an RMS near 1, and
                a reconstruction as a blurred picture of them; pytorch: as PyTorch
                makes convolutions, and frames grey, as the published recipe has it.
        """
        if initialization == "pytorch":
            init_as_pytorch(self, generator)
            nn.init.constant_(self.decoder[-1].bias, 0.5)
            return
        init_blocks(self.encoder, generator)
        init_blocks(self.decoder, generator)
        # Natural frames have an RMS near 0.5.
        self.encoder[0].weight.mul_(2)
        self.decoder[-1].weight.mul_(DETAIL_SCALE)
        pass_colors_through(self.encoder, self.decoder)

    def _cut_grow_weights(self, state_dict: dict[str, Tensor]) -> None:
        """Keep the last output channels where a preview grows fewer frames."""
        for index, block in enumerate(self.decoder):
            key = f"decoder.{index}.conv.weight"
            if isinstance(block, TGrow) and key in state_dict:
                state_dict[key] = state_dict[key][-block.conv.out_channels :]

    def encode_video(self, frames_NTCHW: Tensor, parallel: bool = True) -> Tensor:
        """Encode videos.

        Args:
            frames_NTCHW: RGB in [0, 1]; any T, the end being padded by repeating the
                last frame; H and W multiples of `variant.space_factor`.
            parallel: compute all frames at once; else one by one, in memory that does
                not grow with T.

        Returns:
            Latents of N, `variant.latents_of(T)`, `variant.latent_channels`, and H
            and W divided by `variant.space_factor`; about unit Gaussian if trained.

        Raises:
            ValueError: if the shape does not fit.
        """
        self.check_frames(frames_NTCHW)
        if self.variant.trim == "chunks":
            return self._encode_chunks(frames_NTCHW, parallel)
        frames_NTCHW = pad_frames(frames_NTCHW, self.variant.time_factor)
        x_NTCHW = self.fold_patches(frames_NTCHW)
        return run_blocks(self.encoder, x_NTCHW, parallel)

    def _encode_chunks(self, frames_NTCHW: Tensor, parallel: bool) -> Tensor:
        frames_NTCHW = pad_frames(frames_NTCHW, CHUNK_FRAMES)
        x_NTCHW = self.fold_patches(frames_NTCHW)
        chunks = [
            F.pad(chunk_NTCHW, (0, 0, 0, 0, 0, 0, CHUNK_LEAD_FRAMES, 0))
            for chunk_NTCHW in x_NTCHW.split(CHUNK_FRAMES, 1)
        ]
        if parallel:
            latents = self.encoder(torch.cat(chunks)).chunk(len(chunks))
        else:
            latents = [run_blocks(self.encoder, chunk, False) for chunk in chunks]
        return torch.cat(latents, 1)[:, :-CHUNK_DROPPED_LATENTS]

    def decode_video(
        self, latents_NTCHW: Tensor, parallel: bool = True, clamp: bool = True
    ) -> Tensor:
        """Decode videos.

        Args:
            latents_NTCHW: latents, about unit Gaussian.
            parallel: compute all frames at once; else one latent after the other, in
                memory that does not grow with T but for the result.
            clamp: limit the result to [0, 1]. Train without: a clamp passes no
                gradient where it saturates.

        Returns:
            RGB frames of N, `variant.frames_of(T)`, 3, and height and width of the
            latents times `variant.space_factor`, unless preview switches are set.

        Raises:
            ValueError: if the shape does not fit.
        """
        self.check_latents(latents_NTCHW)
        runs = self.variant.kept_frames(latents_NTCHW.shape[1], self.time_upscale)
        x_NTCHW = run_blocks(self.decoder, latents_NTCHW, parallel)
        # Cut with the channels last, so that gradients lie in memory as they do.
        x_NTHWC = x_NTCHW.movedim(2, -1)
        parts = [x_NTHWC[:, run] for run in runs]
        x_NTHWC = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        frames_NTCHW = self.unfold_patches(x_NTHWC.movedim(-1, 2))
        return frames_NTCHW.clamp(0, 1) if clamp else frames_NTCHW

    def fold_patches(self, frames_NTCHW: Tensor) -> Tensor:
        """Frames to the encoder's input: squares of pixels become channels."""
        return fold_patches(frames_NTCHW, self.variant.patch_size)

    def unfold_patches(self, x_NTCHW: Tensor) -> Tensor:
        """The decoder's output to frames: the inverse of `fold_patches`."""
        return unfold_patches(x_NTCHW, self.variant.patch_size)

    def check_frames(self, frames_NTCHW: Tensor) -> None:
        """Raise UserError unless `encode_video` can take the frames."""
        _check_video("frames", frames_NTCHW, IMAGE_CHANNELS)
        factor = self.variant.space_factor
        H, W = frames_NTCHW.shape[-2:]
        if H % factor or W % factor:
            raise UserError(
                f"frames are {H} x {W}; crop or pad height and width to multiples of "
                f"{factor} for {self.variant_name}"
            )

    def check_latents(self, latents_NTCHW: Tensor) -> None:
        """Raise UserError unless `decode_video` can take the latents."""
        _check_video("latents", latents_NTCHW, self.variant.latent_channels)


def pad_frames(frames_NTCHW: Tensor, multiple: int) -> Tensor:
    """Repeat the last frame until T is a multiple."""
    missing = -frames_NTCHW.shape[1] % multiple
    last_NTCHW = frames_NTCHW[:, -1:].expand(-1, missing, -1, -1, -1)
    return torch.cat([frames_NTCHW, last_NTCHW], 1) if missing else frames_NTCHW


def run_blocks(blocks: VideoSequential, x_NTCHW: Tensor, parallel: bool) -> Tensor:
    """Run blocks over a video, at once or frame by frame."""
    if parallel:
        return blocks(x_NTCHW)
    memory = FrameMemory()
    results = [blocks(x_N1CHW, memory) for x_N1CHW in x_NTCHW.split(1, 1)]
    return torch.cat([result for result in results if result.shape[1]], 1)


def _switches(
    name: str, switches: Sequence[bool] | None, stages: tuple[bool, ...]
) -> tuple[bool, ...]:
    """The upscalings that a preview uses, `stages` being those of the variant."""
    if switches is None:
        return stages
    padded = (False,) * (len(stages) - len(switches)) + tuple(switches)
    if len(padded) != len(stages) or any(
        on and not able for on, able in zip(padded, stages, strict=True)
    ):
        raise UserError(f"{name} is {tuple(switches)}; switch off some of {stages}")
    return padded


def _check_shapes(
    path: str | os.PathLike[str], state_dict: dict[str, Tensor], model: TAEHV
) -> None:
    own = {key: value.shape for key, value in model.state_dict().items()}
    given = {key: value.shape for key, value in state_dict.items()}
    wrong = sorted(dict(own.items() ^ given.items()))
    if wrong:
        raise UserError(
            f"{path}: {wrong[0]!r} is missing, superfluous or of the wrong shape for "
            f"{model.variant_name}; give a file with exactly the published keys"
        )


def _check_video(name: str, x_NTCHW: Tensor, channels: int) -> None:
    shape = tuple(x_NTCHW.shape)
    if x_NTCHW.ndim != 5 or x_NTCHW.shape[2] != channels or x_NTCHW.shape[1] == 0:
        raise UserError(
            f"{name} have shape {shape}; pass N T C H W with C = {channels} and T >= 1"
        )
    if not x_NTCHW.is_floating_point():
        raise UserError(
            f"{name} are {x_NTCHW.dtype}; pass floating point, frames divided by 255"
        )
