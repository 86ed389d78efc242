"""Losses against formulas of their own, and which frame is compared with which."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from taehv import TAEHV, VARIANTS
from taehv.config import Loss
from taehv.losses import (
    aligned,
    latent_loss,
    latent_scale_loss,
    psnr,
    reconstruction_loss,
    training_losses,
)
from taehv.model import MemoryBlock, TGrow, TPool

# Formulas


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    """Decoded frames, in part out of range, and true ones."""
    generator = torch.Generator().manual_seed(0)
    decoded_NTCHW = 3 * torch.rand(2, 3, 3, 4, 5, generator=generator) - 1
    return decoded_NTCHW, torch.rand(2, 3, 3, 4, 5, generator=generator)


DISTANCES = {
    "mse": lambda difference: difference**2,
    "l1": lambda difference: abs(difference),
    "charbonnier": lambda difference: math.sqrt(difference**2 + 1e-6),
}


@pytest.mark.parametrize("kind", DISTANCES)
def test_reconstruction_loss(pair: tuple[Tensor, Tensor], kind: str) -> None:
    differences = (pair[0] - pair[1]).flatten().tolist()
    expected = sum(map(DISTANCES[kind], differences)) / len(differences)
    assert reconstruction_loss(*pair, kind).item() == pytest.approx(expected)


def test_charbonnier_has_a_gradient_at_zero() -> None:
    decoded_NTCHW = torch.zeros(1, 1, 3, 2, 2, requires_grad=True)
    target_NTCHW = torch.zeros(1, 1, 3, 2, 2)
    reconstruction_loss(decoded_NTCHW, target_NTCHW, "charbonnier").backward()
    assert decoded_NTCHW.grad.isfinite().all()


def test_latent_loss(pair: tuple[Tensor, Tensor]) -> None:
    differences = (pair[0] - pair[1]).flatten().tolist()
    expected = sum(d * d for d in differences) / len(differences)
    assert latent_loss(*pair).item() == pytest.approx(expected)


def test_latent_scale_loss_judges_each_clip() -> None:
    latents_NTCHW = torch.ones(3, 2, 4, 2, 2)
    latents_NTCHW[:, :, ::2] = -1  # only the square counts
    assert latent_scale_loss(latents_NTCHW) == 0
    latents_NTCHW[1] *= 2
    latents_NTCHW[2] = 0
    assert latent_scale_loss(latents_NTCHW).item() == pytest.approx((0 + 9 + 1) / 3)


@pytest.mark.parametrize(
    ("mean_squared_error", "decibels"),
    [(1.0, 0.0), (0.01, 20.0), (0.25, 6.0206), (0.0, 100.0)],
)
def test_psnr(mean_squared_error: float, decibels: float) -> None:
    assert psnr(torch.tensor(mean_squared_error)).item() == pytest.approx(decibels)


# The sum of the terms


class FixedTeacher:
    """Gives the same latents for every clip."""

    def __init__(self, latents_NTCHW: Tensor) -> None:
        self.latent_channels = latents_NTCHW.shape[2]
        self.latents_NTCHW = latents_NTCHW

    def check(self, frames: int, height: int, width: int) -> None:
        """Take any clip."""

    def encode(self, frames_NTCHW: Tensor) -> Tensor:
        """The latents it was made with, in a number format of its own."""
        assert not torch.is_grad_enabled()
        return self.latents_NTCHW


@pytest.fixture(scope="module")
def small() -> tuple[TAEHV, Tensor, FixedTeacher]:
    """A student in double precision, clips of 5 frames, and a teacher for them."""
    torch.manual_seed(0)
    student = TAEHV("taehv").double()
    frames_NTCHW = torch.rand(4, 5, 3, 16, 16).double()
    return student, frames_NTCHW, FixedTeacher(torch.randn(4, 2, 16, 2, 2).bfloat16())


def test_terms_without_a_teacher(small: tuple[TAEHV, Tensor, FixedTeacher]) -> None:
    student, frames_NTCHW, _ = small
    settings = Loss("l1", 3.0, latent_weight=1e9, latent_scale_weight=0.5)
    terms = training_losses(student, None, frames_NTCHW, settings)
    latents_NTCHW = student.encode_video(frames_NTCHW)
    decoded_NTCHW = student.decode_video(latents_NTCHW, clamp=False)
    distance = (decoded_NTCHW - frames_NTCHW).abs().mean()
    scale = latent_scale_loss(latents_NTCHW)
    error = (decoded_NTCHW.clamp(0, 1) - frames_NTCHW).square().mean()
    assert set(terms) == {"loss", "reconstruction", "latent_scale", "mse"}
    assert terms["reconstruction"].item() == pytest.approx(distance.item())
    assert terms["latent_scale"].item() == pytest.approx(scale.item())
    assert terms["mse"].item() == pytest.approx(error.item())
    expected = 3 * distance + 0.5 * scale
    assert terms["loss"].item() == pytest.approx(expected.item())


def test_terms_with_a_teacher(small: tuple[TAEHV, Tensor, FixedTeacher]) -> None:
    student, frames_NTCHW, teacher = small
    settings = Loss("mse", 3.0, latent_weight=0.5, latent_scale_weight=1e9)
    terms = training_losses(student, teacher, frames_NTCHW, settings)
    theirs_NTCHW = teacher.latents_NTCHW.double()
    decoded_NTCHW = student.decode_video(theirs_NTCHW, clamp=False)
    distance = (decoded_NTCHW - frames_NTCHW).square().mean()
    latent = (student.encode_video(frames_NTCHW) - theirs_NTCHW).square().mean()
    assert set(terms) == {"loss", "reconstruction", "latent", "mse"}
    assert terms["reconstruction"].item() == pytest.approx(distance.item())
    assert terms["latent"].item() == pytest.approx(latent.item())
    assert terms["loss"].item() == pytest.approx((3 * distance + latent / 2).item())


def gradient_sizes(student: TAEHV, loss: Tensor) -> tuple[float, float]:
    """Sums of the absolute gradients of encoder and decoder."""
    student.zero_grad()
    loss.backward()
    encoder, decoder = (
        sum(p.grad.abs().sum().item() for p in part.parameters() if p.grad is not None)
        for part in (student.encoder, student.decoder)
    )
    return encoder, decoder


def test_which_term_trains_what(small: tuple[TAEHV, Tensor, FixedTeacher]) -> None:
    student, frames_NTCHW, teacher = small
    terms = training_losses(student, teacher, frames_NTCHW, Loss())
    encoder, decoder = gradient_sizes(student, terms["latent"])
    assert encoder > 0 and decoder == 0
    terms = training_losses(student, teacher, frames_NTCHW, Loss())
    encoder, decoder = gradient_sizes(student, terms["reconstruction"])
    assert encoder == 0 and decoder > 0
    terms = training_losses(student, None, frames_NTCHW, Loss())
    encoder, decoder = gradient_sizes(student, terms["reconstruction"])
    assert encoder > 0 and decoder > 0
    assert not terms["mse"].requires_grad


def test_saturated_frames_keep_their_gradient() -> None:
    student = TAEHV("taehv")
    with torch.no_grad():
        student.decoder[-1].weight.zero_()
        student.decoder[-1].bias.fill_(1.5)
    terms = training_losses(student, None, torch.ones(1, 1, 3, 8, 8), Loss())
    assert terms["reconstruction"].item() == pytest.approx(0.25)
    assert terms["mse"].item() == 0
    terms["loss"].backward()
    assert student.decoder[-1].bias.grad.tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("taught", [False, True])
def test_losses_are_means_over_clips(
    small: tuple[TAEHV, Tensor, FixedTeacher], taught: bool
) -> None:
    """Else the split of a batch over processes would change what is minimised."""
    student, frames_NTCHW, teacher = small
    latents_NTCHW = teacher.latents_NTCHW
    whole = training_losses(student, teacher if taught else None, frames_NTCHW, Loss())
    halves = [
        training_losses(
            student,
            FixedTeacher(latents_NTCHW[half]) if taught else None,
            frames_NTCHW[half],
            Loss(),
        )
        for half in (slice(2), slice(2, 4))
    ]
    for name, value in whole.items():
        mean = (halves[0][name] + halves[1][name]) / 2
        assert value.item() == pytest.approx(mean.item()), name


# Alignment: a video whose frames carry their number


STEP = 1e-3
"""Brightness between two numbers: so small that the decoder's Clamp, a tanh, keeps
all of them to much less than one step."""
LTX = ("taeltx_2", "taeltx2_3", "taeltx2_3_wide")
BLACK = -1
"""Stands for a frame before the first one."""


def numbered(name: str, frames: int) -> Tensor:
    """Grey frames, the first being one step bright; the size is one latent."""
    side = VARIANTS[name].space_factor
    numbers = STEP * torch.arange(1.0, frames + 1)
    return numbers.view(1, -1, 1, 1, 1).expand(-1, -1, 3, side, side)


def numbers_in(frames_NTCHW: Tensor) -> list[int]:
    """The numbers that frames carry, which all their pixels must agree on."""
    pixels_TP = (frames_NTCHW[0].flatten(1) / STEP - 1).round().int()
    assert (pixels_TP == pixels_TP[:, :1]).all()
    return pixels_TP[:, 0].tolist()


def frames_of_latents(name: str, frames: int) -> list[list[int]]:
    """Which frames each latent stands for, by its teacher's rule.

    A causal teacher's latent i ends at frame i times the time factor; CogVideoX codes
    an even number of latents without a lead-in; MiniMax-H3 codes chunks of 17 frames,
    each after 3 black ones.
    """
    if name == "taeh3":
        chunks = [range(start, start + 17) for start in range(0, frames, 17)]
        padded = [[*[BLACK] * 3, *chunk] for chunk in chunks]
        groups = [chunk[i : i + 4] for chunk in padded for i in range(0, 20, 4)]
        return [[min(f, frames - 1) for f in group] for group in groups[:-3]]
    factor = 8 if name in LTX else 4
    latents = math.ceil(frames / factor)
    lead = 0 if name == "taecvx" and latents % 2 == 0 else factor - 1
    starts = [factor * i - lead for i in range(latents)]
    return [
        [f if 0 <= f < frames else BLACK for f in range(start, start + factor)]
        for start in starts
    ]


def compared_frames(name: str, frames: int) -> int:
    """How many frames stand in the latents, and so have something to be judged by."""
    return len(
        {f for group in frames_of_latents(name, frames) for f in group} - {BLACK}
    )


class NumberTeacher:
    """Puts the number of each frame of a latent into a channel of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.latent_channels = VARIANTS[name].latent_channels

    def check(self, frames: int, height: int, width: int) -> None:
        """Take any clip."""

    def encode(self, frames_NTCHW: Tensor) -> Tensor:
        """Frames that numbered() made to latents_NTCHW of one pixel."""
        groups = torch.tensor(frames_of_latents(self.name, frames_NTCHW.shape[1]))
        latents_NTCHW = torch.zeros(1, len(groups), self.latent_channels, 1, 1)
        latents_NTCHW[0, :, : groups.shape[1], 0, 0] = STEP * (groups + 1)
        return latents_NTCHW


def route(conv: nn.Conv2d, sources: dict[int, int]) -> None:
    """Make output channels copies of input channels, and the others zero."""
    conv.weight.zero_()
    if conv.bias is not None:
        conv.bias.zero_()
    middle = conv.kernel_size[0] // 2
    for output, source in sources.items():
        inside = source % conv.weight.shape[1]  # groups have few input channels
        conv.weight[output, inside, middle, middle] = 1


def same(channels: int) -> dict[int, int]:
    """The routing that keeps the first channels."""
    return {channel: channel for channel in range(channels)}


def pack_frames(encoder: nn.Sequential) -> int:
    """Set weights that give each frame of a latent a channel; returns their count."""
    packed = 1
    for block in encoder:
        if isinstance(block, nn.Conv2d):
            route(block, same(packed))
        elif isinstance(block, MemoryBlock):
            route(block.conv[-1], {})
        elif isinstance(block, TPool):
            width, frames = block.conv.out_channels, range(block.stride)
            sources = {
                frame * packed + channel: frame * width + channel
                for frame in frames
                for channel in range(packed)
            }
            route(block.conv, sources)
            packed *= block.stride
    return packed


def unpack_frames(decoder: nn.Sequential, packed: int) -> None:
    """Set weights that make the channels of a latent frames again, in their order."""
    for i, block in enumerate(decoder):
        if isinstance(block, nn.Conv2d):
            to_shuffle = any(isinstance(b, nn.PixelShuffle) for b in decoder[i : i + 3])
            is_last = block is decoder[-1]
            copies = block.out_channels if is_last else 4 if to_shuffle else 1
            route(block, {out: out // copies for out in range(packed * copies)})
        elif isinstance(block, MemoryBlock):
            route(block.conv[-1], {})
        elif isinstance(block, TGrow):
            width, packed = block.conv.in_channels, packed // block.stride
            sources = {
                frame * width + channel: frame * packed + channel
                for frame in range(block.stride)
                for channel in range(packed)
            }
            route(block.conv, sources)


def look_back(decoder: nn.Sequential, packed: int) -> None:
    """Take all frames of a latent but the last from the latent before it.

    A student's latent i begins with the frame that a causal teacher's latent i ends
    with: the others are one latent late.
    """
    first = next(block for block in decoder if isinstance(block, nn.Conv2d))
    late = {packed + frame: 1 + frame for frame in range(packed - 1)}
    route(first, {packed - 1: 0, **late})
    memory = next(block for block in decoder if isinstance(block, MemoryBlock))
    convs = [conv for conv in memory.conv if isinstance(conv, nn.Conv2d)]
    channels = convs[-1].out_channels
    if convs[0].groups == convs[0].in_channels:  # super's depthwise one mixes nothing
        route(convs.pop(0), same(2 * channels))
    route(convs[0], {frame: channels + packed + frame for frame in range(packed - 1)})
    for conv in convs[1:]:
        route(conv, same(packed - 1))


@pytest.fixture(scope="module", params=VARIANTS)
def carrier(request: pytest.FixtureRequest) -> TAEHV:
    """Each variant in turn; its latents and frames carry the numbers of frames."""
    model = TAEHV(request.param)
    with torch.no_grad():
        packed = pack_frames(model.encoder)
        unpack_frames(model.decoder, packed)
    assert packed == model.variant.time_factor
    return model


@pytest.mark.parametrize("frames", [1, 4, 8, 12, 13, 16, 17, 18, 22, 24, 34, 39])
@torch.no_grad()
def test_a_student_is_judged_frame_by_frame(carrier: TAEHV, frames: int) -> None:
    name, packed = carrier.variant_name, carrier.variant.time_factor
    unpack_frames(carrier.decoder, packed)
    if name != "taeh3" and frames_of_latents(name, frames)[0][0] == BLACK:
        look_back(carrier.decoder, packed)
    frames_NTCHW = numbered(name, frames)
    latents_NTCHW = carrier.encode_video(frames_NTCHW)
    decoded_NTCHW = carrier.decode_video(latents_NTCHW, clamp=False)
    target_NTCHW, decoded_NTCHW = aligned(frames_NTCHW, decoded_NTCHW)
    expected = list(range(compared_frames(name, frames)))
    assert numbers_in(target_NTCHW) == expected
    assert numbers_in(decoded_NTCHW) == expected
    terms = training_losses(carrier, None, frames_NTCHW, Loss())
    assert terms["reconstruction"] < 1e-3 * STEP**2


def legal_lengths(name: str) -> list[int]:
    """Clips that the variant's teacher takes."""
    if name == "taeh3":
        return [22, 39]
    if name == "taecvx":
        return [8, 9, 16, 17, 24, 25]
    return [1, 9, 17, 33] if name in LTX else [1, 5, 13, 17, 33]


@torch.no_grad()
def test_a_teachers_latents_decode_to_their_frames(carrier: TAEHV) -> None:
    name = carrier.variant_name
    unpack_frames(carrier.decoder, carrier.variant.time_factor)
    teacher = NumberTeacher(name)
    for frames in legal_lengths(name):
        frames_NTCHW = numbered(name, frames)
        latents_NTCHW = teacher.encode(frames_NTCHW)
        decoded_NTCHW = carrier.decode_video(latents_NTCHW, clamp=False)
        assert numbers_in(decoded_NTCHW) == list(range(frames))
        assert latents_NTCHW.shape[1] == carrier.variant.latents_of(frames)
        terms = training_losses(carrier, teacher, frames_NTCHW, Loss())
        assert terms["reconstruction"] < 1e-3 * STEP**2
