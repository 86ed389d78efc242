"""The published adversarial guidance, plain: what Seraena's speed is compared with.

Source: madebyollin/seraena (`seraena.py` and TAEHV_Training_Example.ipynb).
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUP_FRAMES = 3
REPLAY_SIZE = 16384
LEARNING_RATE = 3e-4
BETAS = (0.9, 0.99)
WIDTHS = (64, 128, 256, 512, 512, 512)
STRIDES = (1, 2, 2, 2, 1, 1)


class PublishedDiscriminator(nn.Module):
    """Scores patches of images from each of its blocks, given latents.

    Args:
        image_channels: of the images.
        context_channels: of the latents.
    """

    def __init__(self, image_channels: int, context_channels: int) -> None:
        super().__init__()
        blocks, width = [], image_channels + context_channels
        for out, stride in zip(WIDTHS, STRIDES, strict=True):
            kernel = 4 if stride == 2 else 3
            conv = nn.Conv2d(width, out, kernel, stride, padding=1, bias=False)
            blocks.append(nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU(True)))
            width = out
        self.blocks = nn.Sequential(*blocks)
        self.proj = nn.ModuleList(nn.Conv2d(n, 1, 1, bias=False) for n in WIDTHS)

    def forward(self, images_BCHW: Tensor, contexts_BChw: Tensor) -> Tensor:
        """A map of scores from each block: -1 for real, 1 for fake."""
        size = images_BCHW.shape[-2:]
        cells = tuple(n // 8 for n in size)
        context_BCHW = F.interpolate(contexts_BChw, size)
        x_BCHW = torch.cat([images_BCHW * 2 - 1, context_BCHW], 1)
        maps = []
        for block, proj in zip(self.blocks, self.proj, strict=True):
            x_BCHW = block(x_BCHW)
            maps.append(F.adaptive_avg_pool2d(proj(x_BCHW), cells))
        return torch.cat(maps, 1)


class PublishedSeraena:
    """Trains a discriminator, and corrects decoded frames by its gradient.

    Args:
        context_channels: of the latents.
        device: whose autocast is used; the CPU computes in float32.
    """

    def __init__(self, context_channels: int, device: torch.device) -> None:
        channels = 3 * GROUP_FRAMES
        discriminator = PublishedDiscriminator(channels, context_channels)
        self.discriminator = discriminator.to(device)
        self.device, self.is_mixed = device, device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.is_mixed)
        self.optimizer = torch.optim.AdamW(
            discriminator.parameters(), LEARNING_RATE, betas=BETAS
        )
        self._replay: list[tuple[Tensor, Tensor]] = []

    def correct(
        self, decoded_NTCHW: Tensor, target_NTCHW: Tensor, latents_NTCHW: Tensor
    ) -> Tensor:
        """One step of the discriminator, then what decoded frames should look like.

        Frames are judged in groups, by the mean of the clip's latents. The first ones
        are repeated at the end, a group of them and what is missing to whole groups: so
        the notebook makes 12 frames again of the 9 that it decodes.
        """
        N, T = decoded_NTCHW.shape[:2]
        groups = min(-(-T // GROUP_FRAMES) + 1, 2 * T // GROUP_FRAMES)
        fake, real = (
            _grouped(x_NTCHW.detach(), groups)
            for x_NTCHW in (decoded_NTCHW, target_NTCHW)
        )
        mean_NCHW = latents_NTCHW.detach().mean(1)
        contexts = mean_NCHW.repeat_interleave(groups, 0)
        self._learn(real, fake, contexts)
        corrected = fake + self.correction(real, fake, contexts)
        frames_NTCHW = corrected.reshape(N, groups * GROUP_FRAMES, 3, *fake.shape[-2:])
        return frames_NTCHW[:, :T]

    def _learn(self, real: Tensor, fake: Tensor, contexts: Tensor) -> None:
        self.discriminator.train()
        for pair in zip(fake, contexts, strict=True):
            if len(self._replay) < REPLAY_SIZE:
                self._replay.append(tuple(x.clone() for x in pair))
            else:
                for old, new in zip(random.choice(self._replay), pair, strict=True):
                    old.copy_(new)
        fresh = len(fake) // 2
        drawn = random.choices(self._replay, k=len(fake) - fresh)
        old, old_contexts = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        fakes = torch.cat([fake[:fresh], old])
        fake_contexts = torch.cat([contexts[:fresh], old_contexts])
        is_fake = torch.rand_like(real[:, :1, :1, :1]) < 0.5
        images = torch.where(is_fake, fakes, real)
        with self._autocast():
            scores = self.discriminator(
                images, torch.where(is_fake, fake_contexts, contexts)
            )
            said = is_fake.float().mul(2).sub(1).expand(scores.shape)
            loss = F.mse_loss(scores, said)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        loss.item()  # the notebook shows it

    def correction(self, real: Tensor, fake: Tensor, contexts: Tensor) -> Tensor:
        """What brings the scores of fake images nearer to those of the real ones."""
        self.discriminator.eval()
        change = torch.zeros_like(fake).requires_grad_()
        with self._autocast():
            with torch.no_grad():
                expected = self.discriminator(real, contexts)
            scores = self.discriminator(fake + change, contexts)
        distance = F.mse_loss(expected, scores, reduction="none").mean((1, 2, 3))
        (gradient,) = torch.autograd.grad(distance.sum(), change)
        return -gradient / (gradient.std(correction=0) + 1e-5)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.float16, enabled=self.is_mixed)


def _grouped(frames_NTCHW: Tensor, groups: int) -> Tensor:
    missing = groups * GROUP_FRAMES - frames_NTCHW.shape[1]
    padded_NTCHW = torch.cat([frames_NTCHW, frames_NTCHW[:, :missing]], 1)
    return padded_NTCHW.unflatten(1, (groups, -1)).flatten(2, 3).flatten(0, 1)
