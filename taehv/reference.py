"""The published recipe, eager and plain: what speed is compared with.

Source: madebyollin/taehv (`taehv.py`), and TAEHV_Training_Example.ipynb in
madebyollin/seraena.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taehv.losses import aligned
from taehv.model import TAEHV, FrameMemory, MemoryBlock, TGrow, TPool
from taehv.reference_seraena import PublishedSeraena

LEARNING_RATE = 3e-4
BETAS = (0.9, 0.95)


class PublishedSequential(nn.Sequential):
    """Blocks applied to whole videos as the published code applies them."""

    def forward(self, x_NTCHW: Tensor, memory: FrameMemory | None = None) -> Tensor:
        """Run the blocks over whole videos; there is no memory between calls."""
        assert memory is None, "PublishedStream decodes piece by piece"
        N = x_NTCHW.shape[0]
        x_BCHW = x_NTCHW.flatten(0, 1).contiguous()  # and so is all that follows
        for block in self:
            if isinstance(block, MemoryBlock):
                x_NTCHW = x_BCHW.unflatten(0, (N, -1))
                past_NTCHW = F.pad(x_NTCHW, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
                x_BCHW = _remember(block, x_BCHW, past_NTCHW.reshape(x_BCHW.shape))
            elif isinstance(block, TPool):
                C, H, W = x_BCHW.shape[1:]
                x_BCHW = block.conv(x_BCHW.reshape(-1, block.stride * C, H, W))
            elif isinstance(block, TGrow):
                C, H, W = x_BCHW.shape[1:]
                x_BCHW = block.conv(x_BCHW).reshape(-1, C, H, W)
            elif isinstance(block, nn.PixelShuffle):
                x_BCHW = F.pixel_shuffle(x_BCHW, block.upscale_factor)
            else:
                x_BCHW = block(x_BCHW)
        return x_BCHW.unflatten(0, (N, -1))


def _remember(block: MemoryBlock, x_BCHW: Tensor, past_BCHW: Tensor) -> Tensor:
    return block.act(block.conv(torch.cat([x_BCHW, past_BCHW], 1)) + x_BCHW)


def published(model: TAEHV) -> TAEHV:
    """A copy of a model that computes the same in the published way."""
    model = copy.deepcopy(model)
    model.encoder = PublishedSequential(*model.encoder)
    model.decoder = PublishedSequential(*model.decoder)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    # Weights that lie otherwise would make convolutions work in their layout.
    return model.to(memory_format=torch.contiguous_format)


class PublishedStream:
    """Decodes latents that come one by one, in the published way: frame after frame.

    Args:
        decoder: of a `published` model.
    """

    def __init__(self, decoder: nn.Sequential) -> None:
        self.decoder = decoder
        self._past_NCHW: dict[int, Tensor] = {}

    @torch.no_grad()
    def decode(self, latent_NCHW: Tensor) -> list[Tensor]:
        """The raw frames of the next latent, N C H W each, lead-in included."""
        return list(self._frames(latent_NCHW, 0))

    def _frames(self, x_NCHW: Tensor, first: int) -> Iterator[Tensor]:
        for index in range(first, len(self.decoder)):
            block = self.decoder[index]
            if isinstance(block, TGrow):
                for frame_NCHW in block.conv(x_NCHW).chunk(block.stride, 1):
                    yield from self._frames(frame_NCHW, index + 1)
                return
            if isinstance(block, MemoryBlock):
                past_NCHW = self._past_NCHW.get(index, x_NCHW * 0)
                self._past_NCHW[index] = x_NCHW
                x_NCHW = _remember(block, x_NCHW, past_NCHW)
            else:
                x_NCHW = block(x_NCHW)
        yield x_NCHW


class PublishedStep:
    """The published training step: fp16 autocast, AdamW, no clipping.

    Encoder and decoder learn from a teacher's latents. What the notebook does every two
    seconds (averaging weights) and every half minute (pictures) is left out.

    Args:
        model: of `published`, on the device.
        device: whose autocast is used; the CPU has none that helps, and computes in
            the model's own format.
        seraena: adversarial guidance, if any.
    """

    def __init__(
        self,
        model: TAEHV,
        device: torch.device,
        seraena: PublishedSeraena | None = None,
    ) -> None:
        self.model, self.device, self.seraena = model, device, seraena
        self.is_mixed = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            model.parameters(), LEARNING_RATE, betas=BETAS
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.is_mixed)

    def __call__(self, frames_NTCHW: Tensor, latents_NTCHW: Tensor) -> Tensor:
        """Train by one batch.

        Args:
            frames_NTCHW: RGB in [0, 1].
            latents_NTCHW: the teacher's.

        Returns:
            The loss.
        """
        # The notebook lets cuDNN measure its algorithms.
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=True, deterministic=False, allow_tf32=True
        ):
            with torch.autocast(self.device.type, torch.float16, enabled=self.is_mixed):
                loss = self._loss(frames_NTCHW, latents_NTCHW)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss.detach()

    def _loss(self, frames_NTCHW: Tensor, latents_NTCHW: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.float16, enabled=self.is_mixed):
            encoded_NTCHW = self.model.encode_video(frames_NTCHW)
            decoded_NTCHW = self.model.decode_video(latents_NTCHW, clamp=False)
        target_NTCHW, decoded_NTCHW = aligned(
            frames_NTCHW, decoded_NTCHW.to(frames_NTCHW.dtype)
        )
        loss = F.mse_loss(encoded_NTCHW.to(latents_NTCHW.dtype), latents_NTCHW)
        loss = loss + F.mse_loss(decoded_NTCHW, target_NTCHW)
        if self.seraena is None:
            return loss
        corrected_NTCHW = self.seraena.correct(
            decoded_NTCHW, target_NTCHW, latents_NTCHW
        )
        return loss + F.mse_loss(decoded_NTCHW, corrected_NTCHW)
