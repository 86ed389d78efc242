"""Teachers: the frozen reference VAEs whose latent space a student learns."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from taehv.config import Teacher as TeacherSettings
from taehv.errors import UserError


class Teacher(Protocol):
    """What training asks of a reference VAE.

    A class of your own is named by ``teacher.kind = "package.module:Class"`` and is
    constructed as ``Class(path, device)``.
    """

    latent_channels: int
    fingerprint: str
    """Names the weights and the way of encoding: equal ones give equal latents."""

    def check(self, frames: int, height: int, width: int) -> None:
        """Raise a ValueError that names the nearest legal clip, if this is none."""

    def encode(self, frames_NTCHW: Tensor, seeds: Sequence[int]) -> Tensor:
        """Frames, RGB in [0, 1], to normalised latents_NTCHW.

        A clip's random numbers, if any, must come from its seed alone, so that it has
        the same latents in any batch. No gradient is needed.
        """

    def decode(self, latents_NTCHW: Tensor) -> Tensor:
        """Normalised latents to frames_NTCHW, RGB in [0, 1], to compare with."""


def load_teacher(settings: TeacherSettings, device: torch.device) -> Teacher | None:
    """The teacher that the settings name, or None where they name none.

    Raises:
        UserError: it cannot be found.
    """
    if not settings.kind:
        if settings.path:
            raise UserError(
                f"teacher.path = {settings.path} without teacher.kind: name the class"
            )
        return None
    module, _, name = settings.kind.partition(":")
    if not (module and name):
        raise UserError(
            f'teacher.kind = "{settings.kind}" must be "package.module:Class", or '
            "empty for none"
        )
    try:
        package = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"teacher.kind = {settings.kind}: no module named {error.name}; put its "
            "folder on PYTHONPATH"
        ) from None
    factory = getattr(package, name, None)
    if not (isinstance(factory, type) and hasattr(factory, "encode")):
        raise UserError(
            f"teacher.kind = {settings.kind}: {module} has no {name} that is a class "
            "with the methods of taehv.teacher.Teacher"
        )
    return factory(settings.path, device)


def check_teacher(
    teacher: Teacher, latent_channels: int, frames: int, height: int, width: int
) -> None:
    """Reject a clip or a student that the teacher cannot serve.

    Raises:
        UserError: with the teacher's own words.
    """
    if teacher.latent_channels != latent_channels:
        raise UserError(
            f"the teacher has {teacher.latent_channels} latent channels, the student "
            f"{latent_channels}: choose the model.variant made for this teacher"
        )
    try:
        teacher.check(frames, height, width)
    except ValueError as error:
        raise UserError(f"the teacher cannot take this clip: {error}") from None
