"""A disk that is full for a while costs a run some pictures and time."""

from __future__ import annotations

import os
from pathlib import Path

from conftest import Run, Running, file_size_limit
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEPS, LIMIT = 24, 500


def test_a_full_disk(videos: Path, tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        videos,
        training__steps=STEPS,
        # Elsewhere: here only what a run tells and shows is at stake.
        checkpoint__folder="memory://checkpoints",
        checkpoint__interval=8,
        checkpoint__export_interval=16,
        validation__interval=8,
        logging__interval=1,
    )
    # What it prints goes through a pipe, which is on no disk.
    piped = ["bash", "-c", 'set -o pipefail; "$@" 2>&1 | cat', "bash"]
    running = Running([*piped, *run.command()])
    running.wait_for(lambda: len(run.metrics()) >= 3)
    (pid,) = (
        pid for pid in running.tree() if "python" in os.readlink(f"/proc/{pid}/exe")
    )
    with file_size_limit(LIMIT, pid):
        running.prints("export best is not written")
        running.prints("the pictures of step 8 are not in")
    running.prints("export can be written again: no export is missing")
    output = running.end()
    assert "Traceback" not in output
    for name in ("metrics.jsonl", "validation.jsonl", "tfevents"):
        told = [line for line in output.splitlines() if name in line]
        assert len(told) == 2, output
        assert "cannot be written (File too large)" in told[0]
        assert "can be written again" in told[1]
    assert [record["step"] for record in run.metrics()] == list(range(1, STEPS + 1))
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    losses = [event.step for event in events.Scalars("train/loss")]
    assert losses == list(range(1, STEPS + 1))
    given_up = {line.split()[1] for line in output.splitlines() if "given up" in line}
    exported = {f"step-{step}/taehv" for step in range(16, STEPS + 1, 16)}
    exports = run.folder / "export"
    for suffix in (".pth", ".safetensors"):
        names = {str(path.relative_to(exports)) for path in exports.rglob("*" + suffix)}
        made = {name.removesuffix(suffix) for name in names}
        assert made == (exported - given_up) | {"best", "taehv"}, output
    for path in (run.folder / "export").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            in_name = path.parent.name.removeprefix("step-")
            assert in_name in ("export", file.metadata()["step"])
    assert not list(run.folder.rglob("*.part"))
