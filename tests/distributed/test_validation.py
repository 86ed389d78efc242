"""A validation gives the same numbers for any number of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from taehv.augment import color_transform
from taehv.clips import Clip, collate
from taehv.distributed import StopSignal, started
from taehv.errors import run_command
from taehv.model import TAEHV
from taehv.sections import Parallelism
from taehv.validate import validate

FRAMES, SIDE = 5, 16
CPU = torch.device("cpu")
EXTRA = {"l1": lambda ours, theirs: (ours - theirs).abs().mean().item()}


class Halves:
    """A teacher whose latents are those of the frames' left half, mirrored."""

    def __init__(self, model: TAEHV) -> None:
        self.model = model

    def encode(self, frames_NTCHW: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        return self.model.encode_video(frames_NTCHW.flip(-1)) / 2

    def decode(self, latents_NTCHW: torch.Tensor) -> torch.Tensor:
        return self.model.decode_video(latents_NTCHW * 2).flip(-1)


def results(counts: list[int], rank: int, size: int, at_once: int) -> list[dict]:
    """Validations of this process's part of as many clips as `counts` has."""
    torch.manual_seed(0)
    model = TAEHV("taehv").eval()
    found = []
    for count in counts:
        numbers = range(count * rank // size, count * (rank + 1) // size)
        clips = [clip(number) for number in numbers]
        batches = [
            collate(clips[i : i + at_once]) for i in range(0, len(clips), at_once)
        ]
        result = validate(
            model, Halves(model), batches, CPU, StopSignal(), True, extra=EXTRA
        )
        shown = {**result.scalars(), "intervals": result.intervals()}
        del shown["seconds"]
        found.append(shown)
    return found


def clip(number: int) -> Clip:
    """Noise that another clip does not have."""
    generator = torch.Generator().manual_seed(number)
    shape = (FRAMES, SIDE, SIDE, 3)
    frames = torch.randint(0, 255, shape, generator=generator, dtype=torch.uint8)
    frames[:, :4] = number  # at rest
    return Clip(frames.numpy(), color_transform(0, []), number, f"{number}.mp4")


def main() -> None:
    """One of several processes: prints the results, if it is the first."""
    with started(Parallelism(), "cpu", timedelta(seconds=240)) as world:
        found = results([5, 2], world.rank, world.size, at_once=2)
        if world.is_main:
            print(json.dumps(found))


@pytest.mark.parametrize("processes", [3])
def test_process_counts_and_batch_sizes_give_the_same(processes: int) -> None:
    """Five clips in parts of 1, 2 and 2; two clips, of which the first has none."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), str(Path(__file__))]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout.splitlines()[-1])
    with started(Parallelism(), "cpu"):
        alone = results([5, 2], 0, 1, at_once=1)
        together = results([5, 2], 0, 1, at_once=5)
    for other in (shared, together):
        for ours, theirs in zip(alone, other, strict=True):
            assert ours.keys() == theirs.keys()
            intervals, others = ours.pop("intervals"), theirs.pop("intervals")
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
            assert intervals.keys() == others.keys()
            for name, bounds in intervals.items():
                assert bounds == pytest.approx(others[name], rel=1e-4, abs=1e-6), name
            ours["intervals"], theirs["intervals"] = intervals, others
    assert [result["clips"] for result in alone] == [5, 2]
    measured = {"psnr", "flicker", "decoder_psnr", "decoder_flicker", "teacher_psnr"}
    assert measured | {"l1", "decoder_l1"} <= alone[0].keys()


if __name__ == "__main__":
    run_command(main)
