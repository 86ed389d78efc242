"""Models to train on and to use: from any source, on a device."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from taehv.checkpoint import load_weights
from taehv.distributed import compute_dtype
from taehv.errors import UserError
from taehv.model import TAEHV
from taehv.sections import Model
from taehv.urls import is_url
from taehv.variants import VARIANTS
from taehv.weights import load_state_dict_file

PRECISIONS = ("auto", "bf16", "fp16", "fp32")


def load_model(
    source: str | os.PathLike[str],
    variant: str | None = None,
    weights: str | None = None,
    **switches: Any,
) -> tuple[TAEHV, dict[str, str]]:
    """Read a model, in float32 on the CPU.

    Args:
        source: a run's folder (its newest checkpoint is taken), a checkpoint's folder,
            or a .pth or .safetensors file; of folders also the URL.
        variant: needed where neither shapes nor metadata tell it.
        weights: "ema" or "model" of a run's checkpoint; by default the averaged ones.
        switches: of a preview, see `TAEHV`.

    Returns:
        The model, and what its source says of it.

    Raises:
        UserError: the source cannot be read, or fits no variant.
    """
    if is_folder(source):
        state_dict, about = load_weights(source, weights)
    elif weights is not None:
        raise UserError(f"--weights {weights} is for checkpoints; {source} is none")
    else:
        state_dict, about = load_state_dict_file(source)
    # The model checks keys, shapes and the variant.
    model = TAEHV.from_state_dict(state_dict, about, variant, source=source, **switches)
    return model.eval().requires_grad_(False), about


def initial_model(settings: Model, resumes: bool = False) -> TAEHV:
    """New weights, or those of a weights file or checkpoint folder.

    A run that resumes has weights of its own and needs no others.
    """
    if resumes or not settings.checkpoint:
        model = TAEHV(settings.variant)
        if settings.initialization != "he":
            model.init_weights(initialization=settings.initialization)
        return model
    path = os.path.expanduser(settings.checkpoint)
    if not is_folder(path):
        return TAEHV.from_pretrained(path, settings.variant)
    weights, about = load_weights(path)
    return TAEHV.from_state_dict(weights, about, settings.variant, source=path)


def is_folder(source: str | os.PathLike[str]) -> bool:
    """Whether it is one, as everything elsewhere is taken to be."""
    return is_url(source) or Path(source).is_dir()


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say where a model runs and what it computes in."""
    parser.add_argument("--variant", choices=VARIANTS, help="where nothing tells it")
    parser.add_argument(
        "--weights", choices=("ema", "model"), help="of a checkpoint: averaged or raw"
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto: bf16 on GPUs and CPUs that have it, else fp32",
    )


def choose_device(name: str) -> torch.device:
    """The device that `--device` names; auto takes the first GPU if there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; take cpu")
    is_cuda = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if is_cuda else "cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format that `--precision` names."""
    return torch.float16 if name == "fp16" else compute_dtype(name, device)


def place(model: TAEHV, device: torch.device, dtype: torch.dtype) -> TAEHV:
    """Move a model to where it runs, its convolutions in their fastest layout.

    In fp32 they are computed in fp32 from then on, in this whole process.
    """
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32
    return model.to(device, dtype, memory_format=torch.channels_last)
