"""Writes what the flagship downloads, with random weights in its place.

python tests/gpu/random_weights.py TEACHER_FOLDER STUDENT.pth [--small]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX

from taehv import TAEHV


def main() -> None:
    """A CogVideoX VAE of full size (its class's defaults), and a taecvx."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("student", type=Path)
    parser.add_argument("--small", action="store_true")
    settings = parser.parse_args()
    torch.manual_seed(0)
    size = {}
    if settings.small:
        size = {"block_out_channels": (16,) * 4, "layers_per_block": 1}
        size |= {"norm_num_groups": 8}
    AutoencoderKLCogVideoX(**size).save_pretrained(settings.teacher / "vae")
    torch.save(TAEHV("taecvx").state_dict(), settings.student)


if __name__ == "__main__":
    main()
