"""Losses against formulas of their own, and which frame is compared with which."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from taehv import TAEHV, VARIANTS
from taehv.losses import (
    Targets,
    aligned,
    consistency_loss,
    frequency_loss,
    judged,
    latent_loss,
    latent_scale_loss,
    psnr,
    reconstruction_loss,
    temporal_loss,
    training_losses,
)
from taehv.model import MemoryBlock, TGrow, TPool
from taehv.sections import Loss

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


@pytest.fixture(scope="module")
def small() -> tuple[TAEHV, Tensor, Tensor]:
    """A student in double precision, clips of 5 frames, and a teacher's latents."""
    torch.manual_seed(0)
    student = TAEHV("taehv").double()
    frames_NTCHW = torch.rand(4, 5, 3, 16, 16).double()
    return student, frames_NTCHW, torch.randn(4, 2, 16, 2, 2).double()


def test_terms_without_a_teacher(small: tuple[TAEHV, Tensor, Tensor]) -> None:
    student, frames_NTCHW, _ = small
    settings = Loss("l1", 3.0, latent_weight=1e9, latent_scale_weight=0.5)
    terms = training_losses(student, Targets(frames_NTCHW), settings)
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


def test_terms_with_a_teacher(small: tuple[TAEHV, Tensor, Tensor]) -> None:
    student, frames_NTCHW, theirs_NTCHW = small
    settings = Loss("mse", 3.0, latent_weight=0.5, latent_scale_weight=1e9)
    terms = training_losses(student, Targets(frames_NTCHW, theirs_NTCHW), settings)
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


def test_which_term_trains_what(small: tuple[TAEHV, Tensor, Tensor]) -> None:
    student, frames_NTCHW, theirs_NTCHW = small
    taught = Targets(frames_NTCHW, theirs_NTCHW)
    terms = training_losses(student, taught, Loss())
    encoder, decoder = gradient_sizes(student, terms["latent"])
    assert encoder > 0 and decoder == 0
    terms = training_losses(student, taught, Loss())
    encoder, decoder = gradient_sizes(student, terms["reconstruction"])
    assert encoder == 0 and decoder > 0
    terms = training_losses(student, Targets(frames_NTCHW), Loss())
    encoder, decoder = gradient_sizes(student, terms["reconstruction"])
    assert encoder > 0 and decoder > 0
    assert not terms["mse"].requires_grad


def test_saturated_frames_keep_their_gradient() -> None:
    student = TAEHV("taehv")
    with torch.no_grad():
        student.decoder[-1].weight.zero_()
        student.decoder[-1].bias.fill_(1.5)
    terms = training_losses(student, Targets(torch.ones(1, 1, 3, 8, 8)), Loss())
    assert terms["reconstruction"].item() == pytest.approx(0.25)
    assert terms["mse"].item() == 0
    terms["loss"].backward()
    assert student.decoder[-1].bias.grad.tolist() == pytest.approx([1 / 3] * 3)


EVERYTHING = Loss(
    decoder_latents="mixture",
    temporal_weight=0.5,
    frequency_weight=0.125,
    consistency_weight=0.25,
)


@pytest.mark.parametrize("taught", [False, True])
def test_losses_are_means_over_clips(
    small: tuple[TAEHV, Tensor, Tensor], taught: bool
) -> None:
    """Else the split of a batch over processes would change what is minimised."""
    student, frames_NTCHW, theirs_NTCHW = small
    own_N = torch.tensor([True, False, False, True])
    masks = judged(student.variant, torch.tensor([0, 1, 1, 0]), 2, 5)

    def losses(clips: slice) -> dict[str, Tensor]:
        targets = Targets(frames_NTCHW[clips])
        if taught:
            mine = [x[clips] for x in (theirs_NTCHW, *masks, own_N)]
            targets = Targets(frames_NTCHW[clips], *mine)
        return training_losses(student, targets, EVERYTHING)

    whole, halves = losses(slice(4)), (losses(slice(2)), losses(slice(2, 4)))
    for name, value in whole.items():
        mean = (halves[0][name] + halves[1][name]) / 2
        assert value.item() == pytest.approx(mean.item()), name


def test_what_the_decoder_decodes(small: tuple[TAEHV, Tensor, Tensor]) -> None:
    student, frames_NTCHW, theirs_NTCHW = small
    own_N = torch.tensor([True, False, True, False])
    targets = Targets(frames_NTCHW, theirs_NTCHW, own_N=own_N)
    ours_NTCHW = student.encode_video(frames_NTCHW)
    for choice, latents_NTCHW in {
        "teacher": theirs_NTCHW,
        "own": ours_NTCHW,
        "mixture": torch.stack(
            [(ours_NTCHW if own else theirs_NTCHW)[i] for i, own in enumerate(own_N)]
        ),
    }.items():
        terms = training_losses(student, targets, Loss(decoder_latents=choice))
        decoded_NTCHW = student.decode_video(latents_NTCHW, clamp=False)
        expected = (decoded_NTCHW - frames_NTCHW).square().mean()
        assert terms["reconstruction"].item() == pytest.approx(expected.item()), choice
        encoder, decoder = gradient_sizes(student, terms["reconstruction"])
        assert (encoder > 0) == (choice != "teacher") and decoder > 0


def test_temporal_loss_sees_changes_alone(pair: tuple[Tensor, Tensor]) -> None:
    decoded_NTCHW, frames_NTCHW = pair
    darker_NTCHW = frames_NTCHW - 0.5
    assert temporal_loss(darker_NTCHW, frames_NTCHW, "mse").item() < 1e-12
    changes = [x[:, 1:] - x[:, :-1] for x in pair]
    expected = (changes[0] - changes[1]).abs().mean().item()
    assert temporal_loss(*pair, "l1").item() == pytest.approx(expected)
    frames_NTCHW[:, 0] = 9
    decoded_NTCHW[:, 0] = -9
    judged_NT = torch.tensor([[False, True, True]] * 2)
    expected = (changes[0] - changes[1])[:, 1:].abs().mean().item()
    assert temporal_loss(*pair, "l1", judged_NT).item() == pytest.approx(expected)


def test_frequency_loss_sees_details_alone() -> None:
    frames_NTCHW = torch.rand(2, 3, 3, 8, 12, dtype=torch.float64)
    flat_NTCHW = frames_NTCHW + torch.rand(2, 3, 3, 1, 1)
    assert frequency_loss(flat_NTCHW, frames_NTCHW).item() < 1e-12
    # One pixel moves each band of both levels; four are one pixel a level further down.
    for side, fine, coarse in ((1, 1 / 2, 1 / 4), (2, 0, 1)):
        decoded_NTCHW = frames_NTCHW.clone()
        decoded_NTCHW[..., :side, :side] += 1
        expected = (fine / (4 * 6) + coarse / (2 * 3)) / 2
        found = frequency_loss(decoded_NTCHW, frames_NTCHW).item()
        assert found == pytest.approx(expected)
        judged_NT = torch.tensor([[True, False, True]] * 2)
        decoded_NTCHW[:, 1] = -9
        found = frequency_loss(decoded_NTCHW, frames_NTCHW, judged_NT).item()
        assert found == pytest.approx(expected)


def test_consistency_re_encodes_what_was_decoded(
    small: tuple[TAEHV, Tensor, Tensor],
) -> None:
    student, frames_NTCHW, theirs_NTCHW = small
    settings = Loss(consistency_weight=2.0)
    terms = training_losses(student, Targets(frames_NTCHW, theirs_NTCHW), settings)
    decoded_NTCHW = student.decode_video(theirs_NTCHW, clamp=False)
    again_NTCHW = student.encode_video(decoded_NTCHW)
    expected = (again_NTCHW - theirs_NTCHW).square().mean()
    assert terms["consistency"].item() == pytest.approx(expected.item())
    assert terms["loss"].item() == pytest.approx(
        (terms["latent"] + terms["reconstruction"] + 2 * expected).item()
    )


def test_consistency_leaves_out_what_is_not_judged(
    small: tuple[TAEHV, Tensor, Tensor],
) -> None:
    student, _, theirs_NTCHW = small
    decoded_NTCHW = student.decode_video(theirs_NTCHW, clamp=False)
    again_NTCHW = student.encode_video(decoded_NTCHW)
    judged_NT = torch.ones(theirs_NTCHW.shape[:2], dtype=torch.bool)
    judged_NT[:, 0] = False
    found = consistency_loss(student, decoded_NTCHW, theirs_NTCHW, judged_NT)
    expected = (again_NTCHW - theirs_NTCHW)[:, 1:].square().mean()
    assert found.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_training_one_part(small: tuple[TAEHV, Tensor, Tensor], part: str) -> None:
    """The other is run only where a gradient passes through it."""
    student, frames_NTCHW, theirs_NTCHW = small
    frozen = student.decoder if part == "encoder" else student.encoder
    frozen.requires_grad_(False)
    taught = training_losses(student, Targets(frames_NTCHW, theirs_NTCHW), Loss())
    other = {"encoder": {"latent"}, "decoder": {"reconstruction", "mse"}}[part]
    assert set(taught) == {"loss", *other}
    for targets in (Targets(frames_NTCHW, theirs_NTCHW), Targets(frames_NTCHW)):
        sizes = gradient_sizes(
            student, training_losses(student, targets, Loss())["loss"]
        )
        encoder, decoder = sizes
        assert (encoder > 0, decoder > 0) == (part == "encoder", part == "decoder")
    frozen.requires_grad_(True)


@pytest.mark.parametrize("lead", [0, 1, 2])
@pytest.mark.parametrize("name", ["taehv", "taecvx", "taeltx_2", "taeh3"])
def test_lead_frames_are_those_of_the_lead_latents(name: str, lead: int) -> None:
    """Changing the lead latents' decoder output changes those frames and no others."""
    variant = VARIANTS[name]
    for latents in (4, 5, 7):
        raw_T = torch.arange(latents * variant.time_factor)
        kept_T = torch.cat([raw_T[run] for run in variant.kept_frames(latents)])
        from_lead = int((kept_T < lead * variant.time_factor).sum())
        frames = len(kept_T)
        masks = judged(variant, torch.tensor([lead, 0]), latents, frames)
        assert masks[0].sum(1).tolist() == [latents - lead, latents]
        assert masks[1].sum(1).tolist() == [frames - from_lead, frames]
        assert masks[1][0, from_lead:].all()


def test_what_is_not_judged_has_no_gradient(
    small: tuple[TAEHV, Tensor, Tensor], pair: tuple[Tensor, Tensor]
) -> None:
    decoded_NTCHW = pair[0].requires_grad_()
    judged_NT = torch.tensor([[False, True, True], [True, True, True]])
    loss = reconstruction_loss(decoded_NTCHW, pair[1], "mse", judged_NT)
    error_NT = (pair[0] - pair[1]).square().mean((2, 3, 4))
    expected = (error_NT[0, 1:].mean() + error_NT[1].mean()) / 2
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert (decoded_NTCHW.grad[0, 0] == 0).all()
    assert (decoded_NTCHW.grad != 0).any((2, 3, 4)).sum() == 5


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


def teach(name: str, frames: int) -> Tensor:
    """Latents_NTCHW of numbered(): each frame's number in a channel of its own."""
    groups = torch.tensor(frames_of_latents(name, frames))
    latents_NTCHW = torch.zeros(1, len(groups), VARIANTS[name].latent_channels, 1, 1)
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
    terms = training_losses(carrier, Targets(frames_NTCHW), Loss())
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
    for frames in legal_lengths(name):
        frames_NTCHW = numbered(name, frames)
        latents_NTCHW = teach(name, frames)
        decoded_NTCHW = carrier.decode_video(latents_NTCHW, clamp=False)
        assert numbers_in(decoded_NTCHW) == list(range(frames))
        assert latents_NTCHW.shape[1] == carrier.variant.latents_of(frames)
        targets = Targets(frames_NTCHW, latents_NTCHW)
        terms = training_losses(carrier, targets, Loss())
        assert terms["reconstruction"] < 1e-3 * STEP**2
