"""Adversarial guidance: a discriminator, what it remembers, and what it corrects.

A patch discriminator learns to tell groups of real frames from groups of decoded ones,
given the latents, and its gradient says how decoded frames should change to look real.
The method, its discriminator and its constants are madebyollin/seraena's (MIT), written
anew for sharded training: every statistic, scale and draw is that of the global batch,
so that any number of processes and micro-batches gives the same result.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from taehv.checkpoint import optimizer_state
from taehv.distributed import sum_over_ranks
from taehv.errors import UserError
from taehv.losses import Decoded
from taehv.memory import free_bytes
from taehv.optim import Optimizer
from taehv.sampler import GUIDED, draw
from taehv.sections import Optim
from taehv.sections import Seraena as Settings
from taehv.shards import local
from taehv.variants import Variant
from taehv.visualize import to_uint8

log = logging.getLogger("taehv")

SERAENA_GROUPS = {"discriminator", "replay"}
"""Of a checkpoint, which may lack them."""
BETAS = [0.9, 0.99]
WEIGHT_DECAY = 0.01
REAL, FAKE = -1.0, 1.0
"""What the discriminator is to say."""
SMALLEST_SCALE = 1e-5
"""Added to the deviation that corrections are divided by."""
SCORE_DOWNSCALE = 8
"""Pixels a score, in height and in width."""
KINDS = ("real", "fresh", "replayed")
PICTURED = 4
"""Samples that a picture shows."""
CORRECTION_SHOWN = 0.1
"""What part of a correction, which is large, a picture shows."""


# --- the discriminator -------------------------------------------------------------


class _OfAllRanks(torch.autograd.Function):
    """A tensor of every process, R in number, each of which has a loss of its own.

    The gradient of the mean of all losses is then the sum of what comes back to each.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        gathered_R = values.new_zeros(dist.get_world_size(), *values.shape)
        gathered_R[dist.get_rank()] = values
        return sum_over_ranks(gathered_R)

    @staticmethod
    def backward(ctx: Any, gradient_R: Tensor) -> Tensor:
        return sum_over_ranks(gradient_R.clone())[dist.get_rank()]


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch norm with the statistics of all processes' samples, equally many on each.

    nn.SyncBatchNorm runs on CUDA alone. Statistics are taken and applied in float32 or
    better whatever the format of the input, and of the weights.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        exact_BCHW = x_BCHW.to(torch.promote_types(x_BCHW.dtype, torch.float32))
        if self.training:
            mean_C, variance_C = self._statistics(exact_BCHW)
        else:
            mean_C, variance_C = self.running_mean, self.running_var
        scale_C = self.weight * (variance_C + self.eps).rsqrt()
        centered_BCHW = exact_BCHW - mean_C.view(1, -1, 1, 1)
        normed_BCHW = centered_BCHW * scale_C.view(1, -1, 1, 1)
        return (normed_BCHW + self.bias.view(1, -1, 1, 1)).to(x_BCHW.dtype)

    def _statistics(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, which the running ones move towards."""
        variance_C, mean_C = torch.var_mean(x_BCHW, (0, 2, 3), correction=0)
        count = x_BCHW.numel() // len(mean_C) * dist.get_world_size()
        if dist.get_world_size() > 1:
            # Not by means of squares, whose difference may round to less than zero.
            moments_R2C = _OfAllRanks.apply(torch.stack([mean_C, variance_C]))
            means_RC, variances_RC = moments_R2C.unbind(1)
            spread_C, mean_C = torch.var_mean(means_RC, 0, correction=0)
            variance_C = variances_RC.mean(0) + spread_C
        with torch.no_grad():
            unbiased_C = variance_C * (count / (count - 1))
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(unbiased_C, self.momentum)
            self.num_batches_tracked.add_(1)
        return mean_C, variance_C


def _block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    kernel = 4 if stride == 2 else 3
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=1, bias=False),
        GlobalBatchNorm(out_channels),
        nn.ReLU(inplace=True),
    )


class PatchDiscriminator(nn.Module):
    """Scores patches of images, given their latents; keys are the published ones.

    Args:
        image_channels: of the images, 3 for each frame of a group.
        context_channels: of the latents.
    """

    def __init__(self, image_channels: int, context_channels: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            _block(image_channels + context_channels, 64),
            _block(64, 128, stride=2),
            _block(128, 256, stride=2),
            _block(256, 512, stride=2),
            _block(512, 512),
            _block(512, 512),
        )
        self.proj = nn.ModuleList(
            nn.Conv2d(block[0].out_channels, 1, 1, bias=False) for block in self.blocks
        )

    def forward(self, images_BCHW: Tensor, contexts_BChw: Tensor) -> Tensor:
        """Score images.

        Args:
            images_BCHW: frames of a group in the channels, RGB in [0, 1]; H and W
                multiples of 8.
            contexts_BChw: latents, about unit Gaussian; H and W multiples of h and w.

        Returns:
            scores_B6HW, a map a block at an eighth of H and W: -1 for real, 1 for fake.
        """
        size = images_BCHW.shape[-2:]
        contexts_BCHW = F.interpolate(contexts_BChw, size)
        x_BCHW = torch.cat([images_BCHW * 2 - 1, contexts_BCHW], 1)
        maps = []
        for block, proj in zip(self.blocks, self.proj, strict=True):
            x_BCHW = block(x_BCHW)
            cell = x_BCHW.shape[-1] * SCORE_DOWNSCALE // size[-1]
            maps.append(F.avg_pool2d(proj(x_BCHW), cell))
        return torch.cat(maps, 1)


def new_discriminator(
    settings: Settings, variant: Variant, seed: int
) -> PatchDiscriminator:
    """A discriminator of groups of frames; leaves other random draws as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PatchDiscriminator(3 * settings.frames, variant.latent_channels)


# --- samples -----------------------------------------------------------------------


class FrameGroups:
    """How clips are cut into the groups of frames that count as one image.

    Every decoded frame is in a group. Where the frames are no multiple of the group,
    the last group reaches back into the one before.

    Args:
        variant: aligns frames with latents.
        frames: of a clip that is encoded and decoded.
        size: frames of a group.
        like: has the device and the number format of what is grouped.
    """

    def __init__(self, variant: Variant, frames: int, size: int, like: Tensor) -> None:
        self.frames, self.size = variant.target_frames(frames), size
        last = self.frames - size
        self.starts = [min(i, last) for i in range(0, self.frames, size)]
        latents = variant.latents_of(frames)
        sources = variant.latents_of_frames(latents)
        context_GT = like.new_zeros(len(self.starts), latents)
        groups_T = like.new_zeros(self.frames)
        for group, start in enumerate(self.starts):
            groups_T[start : start + size] += 1
            for frame in range(start, start + size):
                context_GT[group, sources[frame]] += 1 / size
        self._context_GT, self._groups_T = context_GT, groups_T

    def __len__(self) -> int:
        """Groups of a clip."""
        return len(self.starts)

    def __str__(self) -> str:
        """For the log, with what is unusual about it."""
        text = f"{len(self)} groups of {self.size} of {self.frames} frames"
        shared = len(self) * self.size - self.frames
        return text + (
            f" (the last shares {shared} with the one before)" * bool(shared)
        )

    def images(self, frames_NTCHW: Tensor) -> Tensor:
        """N T C H W frames to N * groups images, a group's frames in the channels."""
        groups = [frames_NTCHW[:, i : i + self.size] for i in self.starts]
        return torch.stack(groups, 1).flatten(2, 3).flatten(0, 1)

    def contexts(self, latents_NTCHW: Tensor) -> Tensor:
        """Of each group the mean over its frames of the latent that each comes from."""
        contexts_NGCHW = torch.einsum(
            "gt,ntchw->ngchw", self._context_GT, latents_NTCHW
        )
        return contexts_NGCHW.flatten(0, 1)

    def judged(self, judged_NT: Tensor) -> Tensor:
        """Of each group whether any of its frames is."""
        groups = [judged_NT[:, i : i + self.size].any(1) for i in self.starts]
        return torch.stack(groups, 1).flatten()

    def mean_over_groups(self, frames_NTCHW: Tensor) -> Tensor:
        """Sums over the groups that a frame is in, as gradients are, to means."""
        return frames_NTCHW / self._groups_T.view(-1, 1, 1, 1)


Shape = tuple[int, int, int]
"""Frames, height and width of the clips of a step."""


@dataclass
class Part:
    """What is to be corrected of one micro-batch."""

    clip_THW: Shape
    decoded: Decoded
    judged_NT: Tensor
    """Frames that count."""
    draws_NG3: Tensor
    """Random numbers; see Seraena.draws."""
    gradient_N: Tensor
    """Norm of each clip's gradient of the other losses, with respect to its frames."""


@dataclass
class Samples:
    """What the discriminator judges."""

    images_BCHW: Tensor
    """The frames of a group in the channels, RGB, nominally in [0, 1]."""
    contexts_BCHW: Tensor
    """Latents."""


# --- the memory of earlier reconstructions -----------------------------------------


class Replay:
    """A ring of earlier reconstructions, for a discriminator that must not forget.

    Every sample of the global batch has a lane of its own, a part of the ring that its
    place in the batch fills and draws from. So the same samples meet for any number of
    processes, none needs what another holds, and a checkpoint fits them all. A lane is
    filled first; then each new sample takes the place of one drawn uniformly.

    Args:
        lanes: of this process.
        depth: samples a lane.
        image, context: shapes of one sample's parts.
        images: format of the images; uint8 clamps them to [0, 1].
        device: that holds the ring.
    """

    FORMATS = {"bf16": torch.bfloat16, "uint8": torch.uint8, "fp32": torch.float32}

    def __init__(
        self,
        lanes: int,
        depth: int,
        image: tuple[int, ...],
        context: tuple[int, ...],
        images: Literal["bf16", "uint8", "fp32"],
        device: torch.device,
    ) -> None:
        stored = self.FORMATS[images]
        inexact = torch.bfloat16 if stored == torch.uint8 else stored
        self.depth, self.device = depth, device
        shape = (lanes, depth)
        self.images = torch.zeros(*shape, *image, dtype=stored, device=device)
        self.contexts = torch.zeros(*shape, *context, dtype=inexact, device=device)
        self.taken = torch.zeros(lanes, dtype=torch.int64, device=device)
        """Samples that each lane has taken in; it holds the last `depth` at most."""
        self._lanes = torch.arange(lanes, device=device)

    @property
    def nbytes(self) -> int:
        """Memory that the ring takes on this process."""
        return self.images.nbytes + self.contexts.nbytes

    def __str__(self) -> str:
        """For the log."""
        lanes, depth = self.images.shape[:2]
        total = lanes * depth * dist.get_world_size()
        gib = self.nbytes / 2**30
        return f"{total} earlier ones, {gib:.3g} GiB on {self.device} a process"

    def add(self, samples: Samples, kept_B: Tensor, draws_B: Tensor) -> None:
        """Take in a sample a lane.

        Args:
            samples: B is the number of lanes.
            kept_B: where there is one to take in.
            draws_B: uniform in [0, 1).
        """
        self._kept_B = kept_B.to(self.device)
        drawn_B = (draws_B.to(self.device) * self.depth).long()
        self._slots_B = torch.where(self.taken < self.depth, self.taken, drawn_B)
        place = self._lanes, self._slots_B
        self._before = self.images[place], self.contexts[place]
        self.taken += self._kept_B.long()
        images_BCHW = samples.images_BCHW
        if self.images.dtype == torch.uint8:
            images_BCHW = (images_BCHW.clamp(0, 1) * 255).round()
        self._put(self._kept_B, images_BCHW, samples.contexts_BCHW)

    def settle(self, is_good: Tensor) -> None:
        """Give back what the last `add` took in, unless `is_good`."""
        is_undone_B = self._kept_B & ~is_good.to(self.device)
        self.taken -= is_undone_B.long()
        self._put(is_undone_B, *self._before)

    def read(self, draws_B: Tensor, like: Samples) -> tuple[Samples, Tensor]:
        """Draw a sample a lane.

        Returns:
            The samples, on the device and in the format of `like`, and where there
            is one at all.
        """
        held_B = self.taken.clamp(max=self.depth)
        place = self._lanes, (draws_B.to(self.device) * held_B).long()
        images_BCHW = self.images[place].to(like.images_BCHW)
        if self.images.dtype == torch.uint8:
            images_BCHW = images_BCHW / 255
        contexts_BCHW = self.contexts[place].to(like.contexts_BCHW)
        is_held_B = (held_B > 0).to(images_BCHW.device)
        return Samples(images_BCHW, contexts_BCHW), is_held_B

    def _put(self, where_B: Tensor, images_BCHW: Tensor, contexts_BCHW: Tensor) -> None:
        place = self._lanes, self._slots_B
        new = ((self.images, images_BCHW), (self.contexts, contexts_BCHW))
        for ring, values_BCHW in new:
            ring[place] = _choose(where_B, values_BCHW.to(ring), ring[place])

    def state(self, first_clip: int, lanes: int) -> dict[str, Tensor]:
        """By a clip's place in the global batch, of which each has so many lanes."""
        parts = {"images": self.images, "contexts": self.contexts, "taken": self.taken}
        return {
            f"{first_clip + i}.{name}": part
            for name, tensor in parts.items()
            for i, part in enumerate(tensor.split(lanes))
        }


@dataclass
class View:
    """What goes with clips of one shape."""

    clips: int
    """Of a step, on this process."""
    groups: FrameGroups
    replay: Replay | None
    """This process's part of the ring; None does without."""
    shown: tuple[Tensor, ...] = ()
    """A few samples of the last step."""


def warn_if_idle(settings: Settings, steps: int, where: str = "") -> None:
    """Tell that guidance which is on begins after the last step of a training."""
    if settings.enable and settings.start_step >= steps:
        log.warning(
            f"{where}guidance never begins: seraena.start_step = "
            f"{settings.start_step}, and there are {steps} steps"
        )


def new_view(
    settings: Settings,
    variant: Variant,
    clip_THW: Shape,
    clips: int,
    share: float,
    like: Tensor,
) -> View:
    """For clips of one shape.

    Args:
        settings: section [seraena].
        variant: aligns frames with latents.
        clip_THW: the shape.
        clips: that this process takes in a step, as do all others.
        share: of the places to remember samples in.
        like: has the device of the training and the number format of the frames.
    """
    T, *size = clip_THW
    groups = FrameGroups(variant, T, settings.frames, like)
    lanes = len(groups) * clips
    depth = int(settings.replay_size * share) // (lanes * dist.get_world_size())
    if not depth:
        return View(clips, groups, None)
    on_cpu = settings.replay_device == "cpu"
    device = torch.device("cpu") if on_cpu else like.device
    image = (3 * settings.frames, *size)
    context = (variant.latent_channels, *(x // variant.space_factor for x in size))
    about = (lanes, depth, image, context, settings.replay_dtype)
    needed, free = Replay(*about, torch.device("meta")).nbytes, free_bytes(device)
    if needed > free:
        # What is not a whole number of samples a lane is cut off.
        fits = int(lanes * depth * free / needed) * dist.get_world_size() / share
        raise UserError(
            f"seraena.replay_size = {settings.replay_size} takes "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are left of the memory "
            f"of {device}: take {int(fits)} or less"
        )
    return View(clips, groups, Replay(*about, device))


# --- guidance ----------------------------------------------------------------------


class Seraena:
    """Trains a discriminator along with a student, and corrects what that decodes.

    Args:
        discriminator: from new_discriminator, moved to its device, compiled if wanted,
            and then sharded.
        settings: section [seraena].
        views: by the shape of the clips that a step may have.
        like: has the device and the number format of the frames.
        shard_group: processes that share one copy of the discriminator.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        settings: Settings,
        views: dict[Shape, View],
        like: Tensor,
        shard_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.discriminator, self.settings = discriminator, settings
        self.views, self.view = views, next(iter(views.values()))
        optim = Optim(betas=BETAS, weight_decay=WEIGHT_DECAY, max_grad_norm=0)
        self._parameters = dict(discriminator.named_parameters())
        self.optimizer = Optimizer(self._parameters.values(), optim, shard_group)
        self.optimizer.lr.fill_(settings.discriminator_lr)
        self.health: dict[str, Tensor] = {}
        """What the last step found out, alike on all processes."""
        self._weight = like.new_zeros(())
        self._began = torch.tensor(0)
        self._has_learned = False

    def __str__(self) -> str:
        """For the log."""
        size = sum(weight.numel() for weight in self.discriminator.parameters()) / 1e6
        views = " or ".join(
            f"{view.groups}, with {view.replay or 'no earlier ones'}"
            for view in self.views.values()
        )
        return f"Seraena: {size:.1f} M parameters on {views}"

    # --- on the host ---------------------------------------------------------------

    def go_on(self, step: int, filled: set[str]) -> None:
        """Take up a run after `step` steps; `filled` are the groups of `state` it had.

        A new discriminator in a run that is under way begins as at a run's start.
        """
        if "discriminator" not in filled:
            self._began.fill_(step)
            log.info("the checkpoint has no discriminator like this: it begins anew")
        if self.view.replay is not None and "replay" not in filled:
            log.info("the checkpoint has no earlier decoded frames: they gather anew")

    def _since(self, step: int) -> int:
        return step - max(self.settings.start_step, int(self._began))

    def is_on(self, step: int) -> bool:
        """Whether there is guidance, `step` steps being done."""
        return self._since(step) >= 0

    def learns(self, step: int) -> bool:
        """Whether the discriminator learns in that step, too."""
        return self.is_on(step) and self._since(step) % self.settings.interval == 0

    def set_weight(self, step: int) -> None:
        """Put the weight of a step where the device, and a CUDA graph, reads it."""
        share = min(1.0, (self._since(step) + 1) / (self.settings.ramp_steps + 1))
        self._weight.fill_(self.settings.weight * share)

    def draws(self, seed: int, numbers: list[int], clip_THW: Shape) -> Tensor:
        """The random numbers of clips, a pure function of their sample numbers.

        Args:
            seed: of the run.
            numbers: of the samples.
            clip_THW: their shape.

        Returns:
            draws_NG3 on the CPU, uniform in [0, 1): for each group what is judged, its
            place in the ring, and which earlier one is looked at again.
        """
        count = 3 * len(self.views[clip_THW].groups)
        rows = [draw(seed, number, 0, GUIDED, count) for number in numbers]
        return torch.tensor(rows, dtype=torch.float64).unflatten(1, (-1, 3))

    def state(self, rank: int) -> dict[str, dict[str, Tensor]]:
        """What goes into a checkpoint, by group; a load fills it in place."""
        parameters = self._parameters
        state = {
            "discriminator": {
                **{name: value.detach() for name, value in parameters.items()},
                **dict(self.discriminator.named_buffers()),
                **optimizer_state(parameters, self.optimizer),
                "began": self._began,
            },
        }
        if self.settings.replay_in_checkpoint and self.view.replay is not None:
            state["replay"] = {}
            for shape, view in self.views.items():
                first, lanes = rank * view.clips, len(view.groups)
                for name, tensor in view.replay.state(first, lanes).items():
                    state["replay"]["x".join(map(str, shape)) + f".{name}"] = tensor
        return state

    def picture(self) -> np.ndarray | None:
        """A few samples of the last step, a row each.

        The first frame of the group, true, decoded and as the correction would have
        it; the means of the score maps of the true and the decoded one, real in black
        and fake in white.

        Returns:
            picture_HWC, uint8; None before there was a step.
        """
        if not self.view.shown:
            return None
        real, decoded, correction, *maps = self.view.shown
        size = real.shape[-2:]
        shown = [real, decoded, decoded + CORRECTION_SHOWN * correction]
        for scores_B6HW in maps:
            grey = (scores_B6HW.mean(1, keepdim=True) - REAL) / (FAKE - REAL)
            shown.append(F.interpolate(grey, size).expand(-1, 3, -1, -1))
        rows = torch.cat([x.float() for x in shown], 3)
        return np.concatenate(list(to_uint8(rows)))

    # --- on the device -------------------------------------------------------------

    def guide(self, parts: list[Part], learns: bool) -> tuple[list[Tensor], Tensor]:
        """Let the discriminator learn, if it is to, and correct the decoded frames.

        Args:
            parts: this process's micro-batches of one step, all of them.
            learns: whether the discriminator learns in this step.

        Returns:
            Of each part the corrected frames, constants to draw nearer to by the mean
            squared error, and the weight of that.
        """
        self.view = self.views[parts[0].clip_THW]
        columns = zip(*(vars(part.decoded).values() for part in parts), strict=True)
        whole = Decoded(*map(torch.cat, columns))
        judged_NT = torch.cat([part.judged_NT for part in parts])
        judged_NT111 = judged_NT[:, :, None, None, None]
        # What is not judged looks real: it teaches nothing and needs no correction.
        fake_NTCHW = torch.where(judged_NT111, whole.frames_NTCHW, whole.target_NTCHW)
        contexts_BCHW = self.view.groups.contexts(whole.latents_NTCHW)
        real = Samples(self.view.groups.images(whole.target_NTCHW), contexts_BCHW)
        self.health = {}
        self._has_learned = learns
        if learns:
            self._keep_state()
            fake = Samples(self.view.groups.images(fake_NTCHW), contexts_BCHW)
            draws_B3 = torch.cat([part.draws_NG3 for part in parts]).flatten(0, 1)
            self._learn(real, fake, self.view.groups.judged(judged_NT), draws_B3)
        gradient_NTCHW, *maps = self._gradient(real, fake_NTCHW)
        correction_NTCHW = self._scaled(-gradient_NTCHW * judged_NT111, judged_NT)
        gradient_N = torch.cat([part.gradient_N for part in parts])
        weight = self._weighed(correction_NTCHW, judged_NT, gradient_N, len(parts))
        self._show(real, fake_NTCHW, correction_NTCHW, maps)
        corrected_NTCHW = whole.frames_NTCHW + correction_NTCHW
        return list(corrected_NTCHW.chunk(len(parts))), weight

    def settle(self, is_good: Tensor) -> None:
        """Undo what the discriminator learned, unless the step was good.

        Args:
            is_good: whether the student's was; the discriminator's own counts, too.
        """
        if not self._has_learned:
            return
        is_good = is_good & self._is_applied.to(is_good.device)
        for now, before in zip(self._buffers(), self._buffers_before, strict=True):
            now.copy_(torch.where(is_good.to(now.device), now, before))
        # These are finite, as AdamW applies nothing else, so that products will do.
        for now, before in zip(self._learned(), self._learned_before, strict=True):
            good = is_good.to(now[0])
            torch._foreach_mul_(now, good)
            torch._foreach_add_(now, torch._foreach_mul(before, 1 - good))
        if self.view.replay is not None:
            self.view.replay.settle(is_good)

    def _buffers(self) -> list[Tensor]:
        return list(self.discriminator.buffers())

    def _learned(self) -> list[list[Tensor]]:
        """This process's part of the weights and of the optimizer's state, by kind."""
        states = self.optimizer.state
        kinds = zip(*(state.values() for state in states.values()), strict=True)
        return [[local(x.detach()) for x in kind] for kind in (states, *kinds)]

    def _keep_state(self) -> None:
        self._buffers_before = [buffer.clone() for buffer in self._buffers()]
        self._learned_before = [[x.clone() for x in kind] for kind in self._learned()]

    def _learn(
        self, real: Samples, fake: Samples, judged_B: Tensor, draws_B3: Tensor
    ) -> None:
        """One step: half of the samples are real, a quarter fresh, a quarter old."""
        kind_B, place_B, again_B = draws_B3.unbind(1)
        is_real_B, is_old_B = kind_B < 0.5, torch.zeros_like(judged_B)
        images_BCHW, contexts_BCHW = fake.images_BCHW, fake.contexts_BCHW
        if self.view.replay is not None:
            self.view.replay.add(fake, judged_B, place_B)
            old, is_held_B = self.view.replay.read(again_B, fake)
            is_old_B = (kind_B >= 0.75) & is_held_B
            images_BCHW = _choose(is_old_B, old.images_BCHW, images_BCHW)
            contexts_BCHW = _choose(is_old_B, old.contexts_BCHW, contexts_BCHW)
        images_BCHW = _choose(is_real_B, real.images_BCHW, images_BCHW)
        counted_B = judged_B | is_old_B
        said_B = torch.where(is_real_B, REAL, FAKE).to(images_BCHW)
        self.discriminator.train()
        scores_B6HW = self.discriminator(images_BCHW, contexts_BCHW)
        self._descend(scores_B6HW, said_B, counted_B)
        is_right_B6HW = scores_B6HW.detach() * said_B.view(-1, 1, 1, 1) > 0
        kinds_3B = torch.stack([is_real_B, ~is_real_B & ~is_old_B, is_old_B])
        self._note_accuracy(is_right_B6HW, kinds_3B & counted_B)

    def _descend(self, scores_B6HW: Tensor, said_B: Tensor, counted_B: Tensor) -> None:
        share = dist.get_world_size() / _summed(counted_B.to(scores_B6HW).sum())
        error_B6HW = (scores_B6HW - said_B.view(-1, 1, 1, 1)).square()
        loss = (error_B6HW.mean((1, 2, 3)) * counted_B).sum() * share
        loss.backward()
        self.health["loss"] = _summed(loss.detach()) / dist.get_world_size()
        norm, self._is_applied = self.optimizer.step(self.health["loss"])
        self.health["grad_norm"] = norm

    def _note_accuracy(self, is_right_B6HW: Tensor, kinds_3B: Tensor) -> None:
        right_B = is_right_B6HW.to(self._weight.dtype).mean((1, 2, 3))
        kinds_3B = kinds_3B.to(right_B)
        right_3, count_3 = _summed(torch.stack([kinds_3B @ right_B, kinds_3B.sum(1)]))
        for kind, accuracy in zip(KINDS, right_3 / count_3, strict=True):
            self.health[f"accuracy_{kind}"] = accuracy

    def _gradient(
        self, real: Samples, fake_NTCHW: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the distance of fake score maps to the real ones; and both maps.

        Pulling fake scores to those of the same clip's real frames, not to "real", has
        an effect however well the discriminator does.
        """
        fake_NTCHW = fake_NTCHW.detach().requires_grad_()
        self.discriminator.eval()
        with _frozen(self.discriminator):
            with torch.no_grad():
                expected_B6HW = self.discriminator(real.images_BCHW, real.contexts_BCHW)
            images_BCHW = self.view.groups.images(fake_NTCHW)
            scores_B6HW = self.discriminator(images_BCHW, real.contexts_BCHW)
            distance_B = (scores_B6HW - expected_B6HW).square().mean((1, 2, 3))
            (gradient_NTCHW,) = torch.autograd.grad(distance_B.sum(), fake_NTCHW)
        gradient_NTCHW = self.view.groups.mean_over_groups(gradient_NTCHW)
        return gradient_NTCHW, expected_B6HW, scores_B6HW.detach()

    def _scaled(self, correction_NTCHW: Tensor, judged_NT: Tensor) -> Tensor:
        """Divided by one standard deviation over all that is judged everywhere."""
        values = correction_NTCHW[0, 0].numel()
        sums = correction_NTCHW.sum(), correction_NTCHW.square().sum()
        first, second, count = _summed(torch.stack([*sums, judged_NT.sum() * values]))
        deviation = (second / count - (first / count).square()).sqrt()
        self.health["correction_norm"] = deviation
        return correction_NTCHW / (deviation + SMALLEST_SCALE)

    def _weighed(
        self,
        correction_NTCHW: Tensor,
        judged_NT: Tensor,
        gradient_N: Tensor,
        parts: int,
    ) -> Tensor:
        """The weight; notes its part in the gradient that reaches the decoded frames.

        Both gradients are those of means over a micro-batch of means over a clip.
        """
        values_N = judged_NT.sum(1) * correction_NTCHW[0, 0].numel()
        clips = len(values_N) // parts
        norm_N = 2 * correction_NTCHW.square().sum((1, 2, 3, 4)).sqrt() / values_N
        squares = (norm_N / clips).square().sum(), gradient_N.square().sum()
        ours, others = _summed(torch.stack(squares)).sqrt()
        weight = self._weight
        if self.settings.adaptive:
            # No correction at all must not make the weight infinite.
            weight = weight * others / ours.clamp_min(torch.finfo(ours.dtype).eps)
        self.health["weight"] = weight
        self.health["gradient_ratio"] = weight * ours / others
        return weight

    def _show(
        self,
        real: Samples,
        fake_NTCHW: Tensor,
        correction_NTCHW: Tensor,
        maps: list[Tensor],
    ) -> None:
        """Keep a few samples for a picture."""
        others = (self.view.groups.images(x) for x in (fake_NTCHW, correction_NTCHW))
        firsts = [x_BCHW[:, :3] for x_BCHW in (real.images_BCHW, *others)]
        samples = [x[:PICTURED] for x in (*firsts, *maps)]
        # Always in the same place, as several CUDA graphs write there.
        self.view.shown = self.view.shown or tuple(map(torch.empty_like, samples))
        for kept, sample in zip(self.view.shown, samples, strict=True):
            kept.copy_(sample)


def _choose(where_B: Tensor, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    return torch.where(where_B.view(-1, 1, 1, 1), a_BCHW, b_BCHW)


def _summed(values: Tensor) -> Tensor:
    """Over all processes."""
    return sum_over_ranks(values) if dist.get_world_size() > 1 else values


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Its weights take no gradients, which a compiled module would compute unasked."""
    assert isinstance(module, FSDPModule)
    module.unshard()  # the weights that it computes with
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
        module.reshard()


class CollapseWatch:
    """Tells of a discriminator that gives no guidance any more.

    Healthy ones are right in most places and wrong in some. One that always is right,
    or always says the same, has an accuracy of 1 or 0 on the real and on the fresh.
    """

    PATIENCE = 200
    """Steps of learning that it takes to be sure."""
    MARGIN = 0.005

    def __init__(self) -> None:
        self._in_row = 0
        self._accuracies = (math.nan, math.nan)

    def __str__(self) -> str:
        """For the log, when `see` says so."""
        real, fresh = self._accuracies
        return (
            f"the discriminator has had accuracies of 0 or 1 for {self.PATIENCE} steps "
            f"(real {real:.3f}, decoded {fresh:.3f}) and guides little: lower or raise "
            "seraena.discriminator_lr, or raise seraena.interval if both are 1"
        )

    def see(self, record: Mapping[str, float]) -> bool:
        """Take in what a step told; whether it is time to warn.

        A step without samples of a kind has no accuracy (NaN) and counts for nothing.
        """
        names = ("seraena/accuracy_real", "seraena/accuracy_fresh")
        found = tuple(record.get(name, math.nan) for name in names)
        if any(map(math.isnan, found)):
            return False
        self._accuracies = found
        extreme = all(min(x, 1 - x) <= self.MARGIN for x in found)
        self._in_row = self._in_row + 1 if extreme else 0
        return self._in_row == self.PATIENCE
