"""What training minimises; every loss is a mean of per-clip values.

A mean of per-clip values is the same for any split of the batch over processes and
micro-batches of equal size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from taehv.errors import UserError
from taehv.model import TAEHV
from taehv.sections import Loss
from taehv.variants import Variant

CHARBONNIER_EPS = 1e-3
WAVELET_LEVELS = 2


@dataclass
class Targets:
    """What one batch is to be encoded to and decoded to."""

    frames_NTCHW: Tensor
    """RGB in [0, 1]."""
    latents_NTCHW: Tensor | None = None
    """The teacher's; None trains a plain autoencoder."""
    judged_latents_NT: Tensor | None = None
    """Mask of the latents that count; None takes all."""
    judged_frames_NT: Tensor | None = None
    """Mask of the frames that count; None takes all."""
    own_N: Tensor | None = None
    """Clips whose own latents are decoded, not the teacher's; for the mixture."""
    draws_NG3: Tensor | None = None
    """Random numbers for adversarial guidance, see Seraena.draws; None where there is
    none."""


@dataclass
class Decoded:
    """What a student made of one batch, none of it with a gradient."""

    frames_NTCHW: Tensor
    """Decoded, not clamped."""
    target_NTCHW: Tensor
    """True frames of the same shape, RGB in [0, 1]."""
    latents_NTCHW: Tensor
    """What was decoded."""


Guide = Callable[[Decoded], tuple[Tensor, Tensor]]
"""Gives frames to draw nearer to, and the weight of their mean squared error."""


Terms = dict[str, tuple[float | Tensor, Tensor]]
"""Weight and value, by name."""


def training_losses(
    model: TAEHV, targets: Targets, settings: Loss, guide: Guide | None = None
) -> dict[str, Tensor]:
    """One forward pass of the student, and what it is judged by.

    With a teacher, the encoder learns the teacher's latents and the decoder learns to
    decode them, or the student's own; without, the student is an autoencoder with a
    latent space of its own. Frozen parts run only where gradients pass through them.
    Where there is a guide, it says how decoded frames should change.

    Returns:
        Scalars: "loss" to minimise, its terms and, where frames are decoded, "mse",
        the squared error of the clamped reconstruction, for PSNR.

    Raises:
        UserError: the teacher gives another number or size of latents.
    """
    decodes_own = _decodes_own(targets, settings)
    latents_NTCHW = targets.latents_NTCHW
    terms: Terms = {}
    if decodes_own or _is_trained(model.encoder):
        latents_NTCHW = model.encode_video(targets.frames_NTCHW)
        terms |= _latent_terms(latents_NTCHW, targets, settings)
    measured = {}
    if decodes_own or _is_trained(model.decoder):
        latents_NTCHW = _mixed(latents_NTCHW, targets, settings)
        frame_terms, measured = _frame_terms(
            model, latents_NTCHW, targets, settings, guide
        )
        terms |= frame_terms
    loss = sum(weight * value for weight, value in terms.values())
    values = {name: value for name, (_, value) in terms.items()}
    return {"loss": loss, **values, **measured}


@torch.no_grad()
def decode(model: TAEHV, targets: Targets, settings: Loss) -> Decoded:
    """The frames that `training_losses` judges."""
    latents_NTCHW = targets.latents_NTCHW
    if _decodes_own(targets, settings):
        own_NTCHW = model.encode_video(targets.frames_NTCHW)
        latents_NTCHW = _mixed(own_NTCHW, targets, settings)
    decoded_NTCHW = model.decode_video(latents_NTCHW, clamp=False)
    target_NTCHW, decoded_NTCHW = aligned(targets.frames_NTCHW, decoded_NTCHW)
    return Decoded(decoded_NTCHW, target_NTCHW, latents_NTCHW)


def _decodes_own(targets: Targets, settings: Loss) -> bool:
    return targets.latents_NTCHW is None or settings.decoder_latents != "teacher"


def _is_trained(part: nn.Module) -> bool:
    return next(part.parameters()).requires_grad


def _latent_terms(latents_NTCHW: Tensor, targets: Targets, settings: Loss) -> Terms:
    if targets.latents_NTCHW is None:
        value = latent_scale_loss(latents_NTCHW)
        return {"latent_scale": (settings.latent_scale_weight, value)}
    judged_NT = targets.judged_latents_NT
    value = latent_loss(latents_NTCHW, targets.latents_NTCHW, judged_NT)
    return {"latent": (settings.latent_weight, value)}


def _mixed(latents_NTCHW: Tensor, targets: Targets, settings: Loss) -> Tensor:
    """What is decoded: the student's latents, the teacher's, or clip by clip."""
    if not _decodes_own(targets, settings):
        return targets.latents_NTCHW
    if targets.latents_NTCHW is None or settings.decoder_latents == "own":
        return latents_NTCHW
    own_N1111 = targets.own_N.view(-1, 1, 1, 1, 1)
    return torch.where(own_N1111, latents_NTCHW, targets.latents_NTCHW)


def _frame_terms(
    model: TAEHV,
    latents_NTCHW: Tensor,
    targets: Targets,
    settings: Loss,
    guide: Guide | None,
) -> tuple[Terms, dict[str, Tensor]]:
    decoded_NTCHW = model.decode_video(latents_NTCHW, clamp=False)
    target_NTCHW, decoded_NTCHW = aligned(targets.frames_NTCHW, decoded_NTCHW)
    judged_NT = targets.judged_frames_NT
    terms = _distances(decoded_NTCHW, target_NTCHW, judged_NT, settings)
    if settings.consistency_weight:
        value = consistency_loss(
            model, decoded_NTCHW, latents_NTCHW, targets.judged_latents_NT
        )
        terms["consistency"] = (settings.consistency_weight, value)
    if guide is not None:
        parts = (decoded_NTCHW, target_NTCHW, latents_NTCHW)
        corrected_NTCHW, weight = guide(Decoded(*(part.detach() for part in parts)))
        value = reconstruction_loss(decoded_NTCHW, corrected_NTCHW, "mse", judged_NT)
        terms["adversarial"] = (weight, value)
    error_NTCHW = (decoded_NTCHW.detach().clamp(0, 1) - target_NTCHW).square()
    return terms, {"mse": _mean(error_NTCHW, judged_NT)}


def _distances(
    decoded_NTCHW: Tensor,
    target_NTCHW: Tensor,
    judged_NT: Tensor | None,
    settings: Loss,
) -> Terms:
    kind = settings.reconstruction
    value = reconstruction_loss(decoded_NTCHW, target_NTCHW, kind, judged_NT)
    terms: Terms = {"reconstruction": (settings.reconstruction_weight, value)}
    if settings.temporal_weight:
        value = temporal_loss(decoded_NTCHW, target_NTCHW, kind, judged_NT)
        terms["temporal"] = (settings.temporal_weight, value)
    if settings.frequency_weight:
        value = frequency_loss(decoded_NTCHW, target_NTCHW, judged_NT)
        terms["frequency"] = (settings.frequency_weight, value)
    return terms


def distance_gradient(
    decoded: Decoded, judged_NT: Tensor | None, settings: Loss
) -> Tensor:
    """Norm of each clip's gradient, of the distance to the true frames.

    With respect to the decoded frames, of all distances with their weights.
    """
    frames_NTCHW = decoded.frames_NTCHW.detach().requires_grad_()
    with torch.enable_grad():
        terms = _distances(frames_NTCHW, decoded.target_NTCHW, judged_NT, settings)
        loss = sum(weight * value for weight, value in terms.values())
    (gradient_NTCHW,) = torch.autograd.grad(loss, frames_NTCHW)
    return gradient_NTCHW.square().sum((1, 2, 3, 4)).sqrt()


def judged(
    variant: Variant, lead_N: Tensor, latents: int, frames: int
) -> tuple[Tensor, Tensor]:
    """Masks of the latents and the frames of clips that have a lead-in.

    A clip that begins inside a window of which the teacher saw more has first latents
    that the student cannot know, and frames that it cannot decode as well.

    Args:
        variant: aligns frames with latents.
        lead_N: latents at the start of each clip that do not count, on the CPU.
        latents: of each clip.
        frames: of each clip, as many as are decoded.

    Returns:
        judged_latents_NT and judged_frames_NT.
    """
    lead_frames_N = torch.tensor(
        [variant.lead_frames(latents, lead) for lead in lead_N.tolist()]
    )
    return (
        torch.arange(latents) >= lead_N[:, None],
        torch.arange(frames) >= lead_frames_N[:, None],
    )


def _mean(error_NTCHW: Tensor, judged_NT: Tensor | None) -> Tensor:
    """Mean over clips of each clip's mean over what is judged.

    Taken with the channels last, so that the gradient lies in memory as frames do.
    """
    error_NTHWC = error_NTCHW.movedim(2, -1)
    if judged_NT is None:
        return error_NTHWC.mean()
    error_NT = error_NTHWC.mean((2, 3, 4)) * judged_NT
    return (error_NT.sum(1) / judged_NT.sum(1)).mean()


def aligned(frames_NTCHW: Tensor, decoded_NTCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The frames that a reconstruction has, and it without frames past the input.

    A decoder gives as many frames as the trim of its variant leaves, and may give more
    than were put in, since an encoder pads the end to whole groups.
    """
    length = min(frames_NTCHW.shape[1], decoded_NTCHW.shape[1])
    return frames_NTCHW[:, :length], decoded_NTCHW[:, :length]


Distance = Literal["mse", "l1", "charbonnier"]


def _distance(kind: Distance, difference: Tensor) -> Tensor:
    if kind == "mse":
        return difference.square()
    if kind == "l1":
        return difference.abs()
    return (difference.square() + CHARBONNIER_EPS**2).sqrt()


def reconstruction_loss(
    decoded_NTCHW: Tensor,
    frames_NTCHW: Tensor,
    kind: Distance,
    judged_NT: Tensor | None = None,
) -> Tensor:
    """Distance between decoded and true frames.

    Args:
        decoded_NTCHW: decoder output before clamping (a clamp has no gradient where it
            saturates), RGB, nominally in [0, 1].
        frames_NTCHW: true frames of the same shape, RGB in [0, 1].
        kind: of distance.
        judged_NT: the frames that count, at least one a clip; None takes all.
    """
    return _mean(_distance(kind, decoded_NTCHW - frames_NTCHW), judged_NT)


def temporal_loss(
    decoded_NTCHW: Tensor,
    frames_NTCHW: Tensor,
    kind: Distance,
    judged_NT: Tensor | None = None,
) -> Tensor:
    """Distance between the changes from frame to frame, decoded and true.

    Punishes flicker, which a distance of single frames hardly sees. Arguments as for
    reconstruction_loss, with at least two frames to judge.
    """
    change_NTCHW = decoded_NTCHW.diff(dim=1) - frames_NTCHW.diff(dim=1)
    if judged_NT is not None:
        judged_NT = judged_NT[:, :-1]
    return _mean(_distance(kind, change_NTCHW), judged_NT)


def frequency_loss(
    decoded_NTCHW: Tensor, frames_NTCHW: Tensor, judged_NT: Tensor | None = None
) -> Tensor:
    """Mean absolute distance of details, which weighs in a squared one next to nothing.

    Details are the horizontal, vertical and diagonal bands of an orthonormal Haar
    wavelet, on WAVELET_LEVELS levels of equal weight. Height and width are multiples of
    2 ** WAVELET_LEVELS; else arguments as for reconstruction_loss.
    """
    low_NTHWC = (decoded_NTCHW - frames_NTCHW).movedim(2, -1)
    loss = 0.0
    for _ in range(WAVELET_LEVELS):
        low_NTHWC, down_NTHWC = _halves(low_NTHWC, 2)
        low_NTHWC, across_NTHWC = _halves(low_NTHWC, 3)
        bands = [across_NTHWC, *_halves(down_NTHWC, 3)]
        for band_NTHWC in bands:
            value = _mean(band_NTHWC.abs().movedim(-1, 2), judged_NT)
            loss = loss + value / len(bands) / WAVELET_LEVELS
    return loss


def _halves(x_NTHWC: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Low and high band of one step of the Haar wavelet along a dimension."""
    even, odd = x_NTHWC.unflatten(dim, (-1, 2)).unbind(dim + 1)
    return (even + odd) * 0.5**0.5, (even - odd) * 0.5**0.5


def latent_loss(
    latents_NTCHW: Tensor, teacher_NTCHW: Tensor, judged_NT: Tensor | None = None
) -> Tensor:
    """Mean squared error to the teacher's normalised latents.

    Raises:
        UserError: the teacher gives another number or size of latents.
    """
    if latents_NTCHW.shape != teacher_NTCHW.shape:
        raise UserError(
            f"the student makes latents of N T C H W {tuple(latents_NTCHW.shape)}, the "
            f"teacher {tuple(teacher_NTCHW.shape)}: choose data.frames and a variant "
            "that suit the teacher"
        )
    return _mean((latents_NTCHW - teacher_NTCHW).square(), judged_NT)


def latent_scale_loss(latents_NTCHW: Tensor) -> Tensor:
    """Squared distance of each clip's mean square from 1.

    Keeps the latents of a plain autoencoder, which nothing else scales, where a
    diffusion model expects them.
    """
    latents_NTHWC = latents_NTCHW.movedim(2, -1)
    return (latents_NTHWC.square().mean((1, 2, 3, 4)) - 1).square().mean()


def consistency_loss(
    model: TAEHV,
    decoded_NTCHW: Tensor,
    latents_NTCHW: Tensor,
    judged_NT: Tensor | None = None,
) -> Tensor:
    """Mean squared error between latents and what their frames are encoded to again.

    A video that is decoded and encoded in turn, as world models do, then stays where it
    is. Latents whose frames are cut off are left out, if others remain, and so are
    those that do not count.
    """
    again_NTCHW = model.encode_video(decoded_NTCHW)
    frames, factor = decoded_NTCHW.shape[1], model.variant.time_factor
    whole = again_NTCHW.shape[1]
    if model.variant.frames_of(latents_NTCHW.shape[1]) > frames:
        whole = max(1, frames // factor)
    change_NTCHW = again_NTCHW[:, :whole] - latents_NTCHW.detach()[:, :whole]
    if judged_NT is not None:
        judged_NT = judged_NT[:, :whole]
    return _mean(change_NTCHW.square(), judged_NT)


def psnr(mean_squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of frames in [0, 1]."""
    return -10 * mean_squared_error.clamp_min(1e-10).log10()
