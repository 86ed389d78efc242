"""Checkpoints to weight files that any loader takes, and back.

python -m taehv.convert outputs/NAME taew2_1.safetensors
python -m taehv.convert outputs/NAME/checkpoints/step-500 out.pth --dtype fp16
python -m taehv.convert checkpoints/taecvx.pth start/ --variant taecvx
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException

from taehv.checkpoint import reason, save_weights_only
from taehv.errors import Parser, UserError, run_command
from taehv.pretrained import load_model
from taehv.urls import local_path
from taehv.variants import VARIANTS
from taehv.weights import save_weights

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def convert(
    source: str | os.PathLike[str],
    target: Path,
    weights: str | None = None,
    dtype: str = "fp32",
    variant: str | None = None,
) -> str:
    """Convert weights between a checkpoint folder and a file.

    Args:
        source: a run's folder (its newest checkpoint is taken), a checkpoint's folder,
            the URL of either, or a .pth or .safetensors file.
        target: a .pth or .safetensors file, or, without a suffix, the folder of a
            checkpoint that --model.checkpoint takes.
        weights: "ema" or "model" of a run's checkpoint; by default the averaged ones.
        dtype: a key of DTYPES, the format of the numbers written.
        variant: needed where neither shapes nor metadata tell it.

    Returns:
        The variant.

    Raises:
        UserError: a source that cannot be read, or a target that is there already.
    """
    is_file = target.suffix in (".pth", ".pt", ".safetensors")
    if target.suffix and not is_file:
        raise UserError(
            f"{target}: name a .pth or .safetensors file, or for a checkpoint's folder "
            "a name without suffix"
        )
    model, about = load_model(source, variant, weights)
    if target.exists():
        raise UserError(f"{target} is there already: name another, or delete it")
    about = {**about, "variant": model.variant_name}
    about.setdefault("latent_space", model.variant.latent_space)
    converted = {k: v.to(DTYPES[dtype]) for k, v in model.state_dict().items()}
    write = save_weights if is_file else save_weights_only
    try:
        write(target, converted, about)
    except OSError as error:
        raise UserError(
            f"cannot write {target} ({error.strerror or error}): name a place that you "
            "may write to"
        ) from None
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise UserError(f"cannot write {target}: {reason(cause)}") from None
    return model.variant_name


def main() -> None:
    """Read the command line and convert."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="run, checkpoint, URL of one, or weights file")
    parser.add_argument(
        "target", type=local_path, help=".pth, .safetensors or new folder"
    )
    parser.add_argument("--weights", choices=("ema", "model"), help="averaged or raw")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--variant", choices=VARIANTS, help="where nothing tells it")
    settings = vars(parser.parse_args())
    variant = convert(**settings)
    print(f"{settings['target']}: {variant}, {settings['dtype']}")


if __name__ == "__main__":
    run_command(main)
