"""With and without adversarial guidance: the same run on real clips in the same time.

Each form first trains for a few steps, to learn how long a step takes, and then from
nothing for as many as fit into the time, with the whole schedule of the learning rate.
Prints what the held-out clips measure, the time of a step and the memory, and writes
crops of their frames, the true ones above those of each form.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from taehv import TAEHV
from taehv.augment import to_frames
from taehv.config import read_config
from taehv.data import validation_batches
from taehv.index import build_file_lists
from taehv.metrics import MEASURES
from taehv.visualize import picture_strip

ROOT = Path(__file__).parent.parent.parent
SHOWN = ("psnr", "ssim", "ms_ssim_4", "difference_psnr", "flicker", "fine_detail")
GUIDANCE = ("loss", "accuracy_real", "accuracy_fresh", "gradient_ratio")


@dataclass
class Sizes:
    """How large everything is: on a GPU, or small enough to rehearse on a CPU."""

    frames: int = 13
    side: int = 128
    batch: int = 16
    validation: int = 32
    trial: int = 150
    """Steps to learn the time of a step from."""
    replay: int = 4096


SMALL = Sizes(5, 32, 2, 2, 4, 64)


class Comparison:
    """The runs of one comparison, in a folder of their own."""

    def __init__(
        self, clips: Path, output: Path, sizes: Sizes, given: list[str], is_cpu: bool
    ) -> None:
        self.clips, self.output, self.sizes, self.given = clips, output, sizes, given
        self.device = "cpu" if is_cpu else "cuda"

    def train(self, name: str, steps: int, form: dict[str, object]) -> str:
        """A run of so many steps, and what it told; a failure ends the comparison."""
        sizes = self.sizes
        settings = {
            "job.name": name,
            "job.output_dir": self.output,
            "data.root": self.clips,
            "data.frames": sizes.frames,
            "data.height": sizes.side,
            "data.width": sizes.side,
            "data.crops_per_window": 2,
            "training.steps": steps,
            "training.device": self.device,
            "training.global_batch_size": sizes.batch,
            "seraena.replay_size": sizes.replay,
            "validation.interval": 10**9,
            "validation.clips": sizes.validation,
            "checkpoint.interval": 10**9,
            "logging.interval": 1,
            **form,
        }
        done = subprocess.run(
            [
                *(sys.executable, str(ROOT / "train.py")),
                *(f"--{key}={value}" for key, value in settings.items()),
                *self.given,
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stdout}\n{done.stderr}")
        return done.stderr

    def scalars(self, name: str, tag: str) -> list[float]:
        """The values of one curve in TensorBoard."""
        events = EventAccumulator(str(self.output / name / "tensorboard"))
        return [event.value for event in events.Reload().Scalars(tag)]

    def seconds_a_step(self, name: str) -> float:
        """The median of the last half of a run."""
        speeds = self.scalars(name, "train/clips_per_second")
        return self.sizes.batch / statistics.median(speeds[len(speeds) // 2 :])

    def run(self, name: str, seconds: float, form: dict[str, object]) -> str:
        """Train in a form, and tell how it went."""
        self.train(f"{name}, trial", self.sizes.trial, form)
        steps = max(2, round(seconds / self.seconds_a_step(f"{name}, trial")))
        log = self.train(name, steps, form)
        last = (self.output / name / "validation.jsonl").read_text().splitlines()[-1]
        values = json.loads(last)
        cells = [f"{values.get(key, float('nan')):15.4f}" for key in SHOWN]
        memory = 0.0
        if self.device == "cuda":
            memory = self.scalars(name, "train/memory_gib")[-1]
        time = self.seconds_a_step(name) * 1000
        told = f"{name:22} {steps:6} {time:8.2f} {memory:7.2f} {' '.join(cells)}"
        if form:
            told += "\n" + self.guidance(name)
            told += "".join(
                f"\n{'':22} {line.strip()}"
                for line in log.splitlines()
                if "eraena" in line
            )
        return told

    def guidance(self, name: str) -> str:
        """The discriminator's values, as means over the last tenth of a run."""
        means = []
        for key in GUIDANCE:
            values = self.scalars(name, f"seraena/{key}")
            means.append(f"{key} {statistics.mean(values[-len(values) // 10 :]):.3f}")
        return f"{'':22} {', '.join(means)}"

    @torch.no_grad()
    def picture(self, names: list[str], path: Path, clips: int, columns: int) -> None:
        """Frames of held-out clips, true and from each run's weights, from above."""
        config = self.output / names[0] / "config.toml"
        data = read_config(["--config", str(config)]).data
        _, held_out = build_file_lists(data)
        every = self.sizes.validation
        batches = validation_batches(data, held_out, range(every), every, every)
        frames_NTCHW = to_frames(next(iter(batches)), self.device)
        step = max(1, len(frames_NTCHW) // clips)
        frames_NTCHW = frames_NTCHW[::step][:clips]
        rows = [frames_NTCHW, *(self.decoded(n, frames_NTCHW) for n in names)]
        shown = min(row.shape[1] for row in rows)
        rows = [row[:, :shown].cpu() for row in rows]
        picture = picture_strip(list(zip(*rows, strict=True)), columns)
        image = Image.fromarray(picture)
        image.resize((image.width * 2, image.height * 2), Image.NEAREST).save(path)

    def decoded(self, name: str, frames_NTCHW: Tensor) -> Tensor:
        """What the averaged weights of a run make of clips."""
        model = TAEHV.from_pretrained(self.output / name / "export/taehv.safetensors")
        model.to(self.device)
        return model.decode_video(model.encode_video(frames_NTCHW))


def main() -> None:
    """Train every form, print the table, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clips", type=Path, help="folder of videos")
    parser.add_argument("output", type=Path, help="folder for runs and picture")
    parser.add_argument("--seconds", type=float, default=120, help="training, a form")
    parser.add_argument("--weights", type=float, nargs="*", default=[0.05])
    parser.add_argument("--adaptive", type=float, nargs="*", default=[0.5])
    parser.add_argument("--cpu", action="store_true", help="rehearse, small")
    settings, given = parser.parse_known_args()
    forms: dict[str, dict[str, object]] = {"without": {}}
    for weight in settings.weights:
        form = {"seraena.enable": "true", "seraena.weight": weight}
        forms[f"weight {weight:g}"] = form
    for weight in settings.adaptive:
        form = {"seraena.enable": "true", "seraena.weight": weight}
        forms[f"adaptive {weight:g}"] = {**form, "seraena.adaptive": "true"}
    sizes = SMALL if settings.cpu else Sizes()
    comparison = Comparison(settings.clips, settings.output, sizes, given, settings.cpu)
    device = "CPU" if settings.cpu else torch.cuda.get_device_name()
    print(f"{device}, PyTorch {torch.__version__}, {settings.seconds:g} s a form")
    titles = (MEASURES[key].title for key in SHOWN)
    cells = " ".join(f"{title[:15]:>15}" for title in titles)
    print(f"{'':22} {'steps':>6} {'ms/step':>8} {'GPU GiB':>7} {cells}", flush=True)
    for name, form in forms.items():
        print(comparison.run(name, settings.seconds, form), flush=True)
    path = settings.output / "seraena.png"
    comparison.picture(list(forms), path, clips=6, columns=4)
    print(f"true frames above those of {', '.join(forms)}: {path}")


if __name__ == "__main__":
    main()
