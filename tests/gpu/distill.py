"""A distillation from end to end: a small teacher of a real class, then its student.

The teacher, an AutoencoderKLHunyuanVideo, is trained from nothing until the time is
up, saved as diffusers saves it, and learned from through the commands that users run:
`taehv.precompute`, then `train.py` from the cache. Prints a line a stage, and at the
end how close the student comes on films that neither has seen.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from taehv.augment import to_frames
from taehv.data import ClipDataset
from taehv.index import build_file_lists
from taehv.loader import ClipLoader
from taehv.losses import psnr
from taehv.sampler import Steps
from taehv.sections import Data

ROOT = Path(__file__).parent.parent.parent
KL_WEIGHT = 1e-6
PEAK_RATE = 1e-3
WARMUP_STEPS = 50


@dataclass
class Sizes:
    """How large everything is: on a GPU, or small enough to rehearse on a CPU."""

    widths: tuple[int, ...] = (32, 64, 128, 128)
    clip: int = 128
    # Smaller clips teach it more in the same time.
    teacher_clip: int = 64
    teacher_batch: int = 16
    batch: int = 16
    windows: int = 5000
    validations: int = 4


SMALL = Sizes((16, 16, 16, 16), 32, 16, 2, 2, 4, 2)


def train_teacher(data: Data, seconds: float, sizes: Sizes, device: str) -> tuple:
    """A VAE trained for so long, and the scale of its latents."""
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=sizes.widths,
        layers_per_block=1,
        norm_num_groups=8,
    ).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95))
    train, _ = build_file_lists(data)
    plan = Steps(0, sizes.teacher_batch, sizes.teacher_batch)
    small = replace(data, height=sizes.teacher_clip, width=sizes.teacher_clip)
    loader = ClipLoader(ClipDataset(small, train, 0), plan, device == "cuda")
    start, step, mean_square = time.monotonic(), 0, torch.ones((), device=device)
    while (spent := time.monotonic() - start) < seconds or step < 2:
        warm = min(1, (step + 1) / WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * warm * max(0.02, 1 - spent / seconds)
        frames_NCTHW = to_frames(next(loader), device).transpose(1, 2) * 2 - 1
        with torch.autocast(device, torch.bfloat16):
            coded = vae.encode(frames_NCTHW).latent_dist
            decoded_NCTHW = vae.decode(coded.sample()).sample
        error = (decoded_NCTHW.float() - frames_NCTHW).square().mean()
        (error + KL_WEIGHT * coded.kl().mean()).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean_square.lerp_(coded.mean.detach().float().square().mean(), 0.05)
        step += 1
    loader.close()
    decibels = psnr(error.detach() / 4).item()
    rms = mean_square.sqrt().item()
    print(
        f"teacher: {step} steps in {seconds:.0f} s, last batch {decibels:.2f} dB, "
        f"RMS {rms:.2f}",
        flush=True,
    )
    return vae, rms


def save_teacher(vae: AutoencoderKLHunyuanVideo, rms: float, folder: Path) -> None:
    """As diffusers' pipelines save theirs, with the factor that makes RMS 1."""
    vae.register_to_config(scaling_factor=1 / rms)
    vae.save_pretrained(folder / "vae")


def run(*command: str) -> str:
    """A command of this project; its failure ends everything."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True
    )
    name = "taehv.precompute" if command[0] == "-m" else command[0]
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return done.stdout + done.stderr


def tell(run_folder: Path) -> None:
    """The validations of a run, and what it waited for."""
    for line in (run_folder / "validation.jsonl").open():
        values = json.loads(line)
        names = ("latent_correlation", "latent_correlation_worst", "decoder_psnr")
        names += ("teacher_psnr", "psnr", "teacher_latent_rms", "latent_rms")
        found = " ".join(f"{name} {values[name]:.4f}" for name in names)
        print(f"step {values['step']}: {found}")
    events = EventAccumulator(str(run_folder / "tensorboard")).Reload()
    for name in ("data_wait", "clips_per_second"):
        values = Tensor([event.value for event in events.Scalars(f"train/{name}")])
        print(f"{name}: median {values.median():.4f}")
    # Far below what validations have, the student knows its clips by heart.
    learned = Tensor([event.value for event in events.Scalars("train/latent")])
    learned = learned[-max(1, len(learned) // 20) :]
    print(f"squared error of latents, last twentieth of training: {learned.mean():.4f}")
    print(f"pictures: {run_folder / 'samples'}")


def main() -> None:
    """Train the teacher, write its cache, train the student."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", type=Path, help="folder of videos")
    parser.add_argument("output", type=Path, help="new folder for all that it writes")
    parser.add_argument("--holdout", default="bikes*,carphone*")
    parser.add_argument("--teacher-seconds", type=float, default=200)
    parser.add_argument(
        "--steps", type=int, default=4000, help="of the student; 0: teacher only"
    )
    parser.add_argument("--cpu", action="store_true", help="rehearse, small")
    settings = parser.parse_args()
    sizes, device = (SMALL, "cpu") if settings.cpu else (Sizes(), "cuda")
    settings.output.mkdir(parents=True)
    data = Data(
        root=str(settings.clips),
        holdout=settings.holdout.split(","),
        frames=13,
        height=sizes.clip,
        width=sizes.clip,
        crop_scale=[0.3, 1.0],
        crops_per_window=min(4, sizes.teacher_batch),
        color_jitter=0.1,
    )
    vae, rms = train_teacher(data, settings.teacher_seconds, sizes, device)
    save_teacher(vae, rms, settings.output / "teacher")
    del vae
    if settings.steps:
        train_student(settings, sizes, device)


def train_student(settings: argparse.Namespace, sizes: Sizes, device: str) -> None:
    """Write the teacher's cache and learn from it."""
    shared = {
        "data.root": settings.clips,
        "data.holdout": settings.holdout,
        "data.frames": 13,
        "data.height": sizes.clip,
        "data.width": sizes.clip,
        "data.crop_scale": "0.3,1",
        "data.cache": settings.output / "cache",
        "training.device": device,
        "validation.clips": 16,
    }
    taught = {
        "model.variant": "taehv",
        "teacher.kind": "hunyuanvideo",
        "teacher.path": settings.output / "teacher",
        "teacher.latents": "mode",
        # As large as the clips: the teacher's normalisation and attention see the whole
        # frame, so that its latents of a crop differ from a crop of its latents.
        "cache.windows": sizes.windows,
        "cache.frames": 13,
        "cache.height": sizes.clip,
        "cache.width": sizes.clip,
        "cache.batch_size": sizes.batch,
    }
    student = {
        "job.name": "student",
        "job.output_dir": settings.output,
        "training.steps": settings.steps,
        "training.global_batch_size": sizes.batch,
        "validation.interval": settings.steps // sizes.validations,
        "checkpoint.interval": settings.steps,
        "optim.lr": 1e-3,
    }
    told = run("-m", "taehv.precompute", *options(shared | taught))
    print(*[line for line in told.splitlines() if "frames/s" in line], sep="\n")
    run("train.py", *options(shared | {"model.variant": "taehv"} | student))
    tell(settings.output / "student")
    shutil.rmtree(settings.output / "cache")


def options(settings: dict[str, object]) -> list[str]:
    """Settings as arguments."""
    return [f"--{key}={value}" for key, value in settings.items()]


if __name__ == "__main__":
    main()
