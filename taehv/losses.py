"""What training minimises; every loss is a mean of per-clip values.

A mean of per-clip values is the same for any split of the batch over processes and
micro-batches of equal size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from taehv.config import Loss
from taehv.errors import UserError
from taehv.model import TAEHV
from taehv.teacher import Teacher

CHARBONNIER_EPS = 1e-3


def training_losses(
    model: TAEHV, teacher: Teacher | None, frames_NTCHW: Tensor, settings: Loss
) -> dict[str, Tensor]:
    """One forward pass of student and teacher, and what it is judged by.

    With a teacher, the encoder learns the teacher's latents and the decoder learns to
    decode them; without, the student is an autoencoder with a latent space of its own.

    Args:
        model: the student.
        teacher: gives the latents to learn, if any.
        frames_NTCHW: RGB in [0, 1].
        settings: section [loss].

    Returns:
        Scalars: "loss" to minimise, its terms, and "mse", the squared error of the
        clamped reconstruction, for PSNR.
    """
    terms: dict[str, Tensor] = {}
    latents_NTCHW = model.encode_video(frames_NTCHW)
    if teacher is None:
        decoder_input_NTCHW = latents_NTCHW
        terms["latent_scale"] = latent_scale_loss(latents_NTCHW)
        loss = settings.latent_scale_weight * terms["latent_scale"]
    else:
        with torch.no_grad():
            decoder_input_NTCHW = teacher.encode(frames_NTCHW).to(frames_NTCHW.dtype)
        terms["latent"] = latent_loss(latents_NTCHW, decoder_input_NTCHW)
        loss = settings.latent_weight * terms["latent"]
    decoded_NTCHW = model.decode_video(decoder_input_NTCHW, clamp=False)
    target_NTCHW, decoded_NTCHW = aligned(frames_NTCHW, decoded_NTCHW)
    terms["reconstruction"] = reconstruction_loss(
        decoded_NTCHW, target_NTCHW, settings.reconstruction
    )
    loss = loss + settings.reconstruction_weight * terms["reconstruction"]
    mse = F.mse_loss(decoded_NTCHW.detach().clamp(0, 1), target_NTCHW)
    return {"loss": loss, **terms, "mse": mse}


def aligned(frames_NTCHW: Tensor, decoded_NTCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The frames that a reconstruction has, and it without frames past the input.

    A decoder gives as many frames as the trim of its variant leaves, and may give more
    than were put in, since an encoder pads the end to whole groups.
    """
    length = min(frames_NTCHW.shape[1], decoded_NTCHW.shape[1])
    return frames_NTCHW[:, :length], decoded_NTCHW[:, :length]


def reconstruction_loss(
    decoded_NTCHW: Tensor,
    frames_NTCHW: Tensor,
    kind: Literal["mse", "l1", "charbonnier"],
) -> Tensor:
    """Distance between decoded and true frames.

    Args:
        decoded_NTCHW: decoder output before clamping (a clamp has no gradient where it
            saturates), RGB, nominally in [0, 1].
        frames_NTCHW: true frames of the same shape, RGB in [0, 1].
    """
    if kind == "mse":
        return F.mse_loss(decoded_NTCHW, frames_NTCHW)
    if kind == "l1":
        return F.l1_loss(decoded_NTCHW, frames_NTCHW)
    difference = decoded_NTCHW - frames_NTCHW
    return (difference.square() + CHARBONNIER_EPS**2).sqrt().mean()


def latent_loss(latents_NTCHW: Tensor, teacher_NTCHW: Tensor) -> Tensor:
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
    return F.mse_loss(latents_NTCHW, teacher_NTCHW)


def latent_scale_loss(latents_NTCHW: Tensor) -> Tensor:
    """Squared distance of each clip's mean square from 1.

    Keeps the latents of a plain autoencoder, which nothing else scales, where a
    diffusion model expects them.
    """
    return (latents_NTCHW.square().mean((1, 2, 3, 4)) - 1).square().mean()


def psnr(mean_squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of frames in [0, 1]."""
    return -10 * mean_squared_error.clamp_min(1e-10).log10()
