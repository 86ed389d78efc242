"""SIGKILL at any moment: the same command goes on to the same numbers, to the bit.

tests/unit/test_cache.py kills precompute.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch
from conftest import Run

from taehv import TAEHV
from taehv.storage import MANIFEST

SETTINGS = {
    "training__steps": 24,
    "data__color_jitter": 0.2,
    "data__workers": 1,
    "optim__ema_decay": 0.9,
    "checkpoint__interval": 3,
    "checkpoint__keep": 2,
    "validation__interval": 4,
    "validation__clips": 16,
}
SHORT = {**SETTINGS, "training__steps": 6, "validation__clips": 4}
PHASES = ("save", "step", "validation")


def is_saving(run: Run) -> bool:
    folders = (run.folder / "checkpoints").glob("step-*")
    return any(not (folder / MANIFEST).exists() for folder in folders)


def kill_once(run: Run, processes: int, phase: str, chance: random.Random) -> bool:
    """Kill all processes in a phase of a step to come; False if the run has ended.

    The phases follow one another at once, so that some kills hit the next.
    """
    done = len(run.metrics())
    process = run.start(processes)
    ahead = chance.randint(1, 6)

    def is_time() -> bool:
        if "steps done" in process.output():
            return True
        steps = len(run.metrics())
        if phase == "save":
            return steps > 1 and is_saving(run)
        is_due = phase == "step" or steps % SETTINGS["validation__interval"] == 0
        # What is not in a checkpoint is done again, and not new.
        return steps >= min(done + ahead, run.settings["training.steps"]) and is_due

    process.wait_for(is_time, 240)
    time.sleep(chance.uniform(0, 0.05))
    has_ended = "steps done" in process.output()
    process.kill()
    return not has_ended


@pytest.fixture(scope="module")
def reference(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing interrupts."""
    run = Run(tmp_path_factory.mktemp("whole"), videos, **SETTINGS)
    run.finish(2)
    return run


def assert_killed_runs_equal(
    reference: Run, folder: Path, seed: int, kills: int, processes: int
) -> dict[str, int]:
    """Kill runs this many times on their way; returns how many hit what.

    A run may end before it is killed, and then another is tried.
    """
    chance = random.Random(seed)
    done, hit = 0, dict.fromkeys((*PHASES, "incomplete checkpoint"), 0)
    for number in range(kills + 4):
        run = Run(folder / f"killed{number}", folder)
        run.settings = {**reference.settings, "job.output_dir": run.folder.parent}
        while done < kills:
            phase = PHASES[(seed + done) % len(PHASES)]
            if not kill_once(run, processes, phase, chance):
                break
            done += 1
            hit[phase] += 1
            hit["incomplete checkpoint"] += is_saving(run)
        run.finish(processes)
        assert run.metrics() == reference.metrics()
        assert_same_export(run, reference)
        if done == kills:
            return hit
    raise AssertionError(f"the runs ended before they were killed: {hit}")


def assert_same_export(run: Run, reference: Run) -> None:
    for file in ("taehv.safetensors", "taehv.pth"):
        ours = TAEHV.from_pretrained(run.folder / "export" / file).state_dict()
        theirs = TAEHV.from_pretrained(reference.folder / "export" / file).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_kill_amid_a_save(videos: Path, tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", videos, **SHORT)
    whole.train()
    hit = assert_killed_runs_equal(whole, tmp_path, seed=0, kills=1, processes=1)
    assert hit["save"] == 1


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_forty_kills(reference: Run, tmp_path: Path, seed: int) -> None:
    hit = assert_killed_runs_equal(reference, tmp_path, seed, kills=4, processes=2)
    print(f"kills: {hit}")
    assert sum(hit[phase] for phase in PHASES) == 4
