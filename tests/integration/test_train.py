"""Training from the command line to the exported weights, as a user runs it."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from taehv import TAEHV
from taehv.errors import UserError
from taehv.video import read_frames


@pytest.fixture(scope="module")
def finished(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A whole run, and what it printed."""
    run = Run(
        tmp_path_factory.mktemp("finished"),
        videos,
        training__steps=18,
        training__global_batch_size=4,
        optim__ema_decay=0.9,
        checkpoint__interval=6,
        checkpoint__keep=2,
        checkpoint__export_interval=9,
        validation__interval=9,
        validation__frames=9,
        logging__interval=3,
        data__workers=1,
    )
    return run, run.finish()


def test_learns(finished: tuple[Run, str]) -> None:
    run, _ = finished
    losses = run.losses()
    assert len(losses) == 18
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    records = [*map(json.loads, (run.folder / "validation.jsonl").open())]
    assert [record["step"] for record in records] == [0, 9, 18]
    assert records[-1]["psnr"] > records[0]["psnr"] + 1
    assert records[-1]["clips"] == 2
    low, high = records[-1]["intervals"]["psnr"]
    assert low < records[-1]["psnr"] < high
    measured = {"ssim", "difference_psnr", "fine_detail", "psnr_position_4", "seconds"}
    assert measured <= records[-1].keys()


def test_leaves_what_the_summary_names(finished: tuple[Run, str]) -> None:
    run, output = finished
    picture = np.asarray(Image.open(run.folder / "samples" / "step-18.png"))
    # Eight of nine frames, where clips to train on have five: rows of the input,
    # the reconstruction and its error, and their names on the left.
    assert picture.shape == (6 * 18 + 2, 98 + 8 * 18, 3)
    frames = list(read_frames(run.folder / "samples" / "step-18.mp4"))
    assert len(frames) == 2 * 9 * 3 and frames[0].shape == (16, 32, 3)
    assert sorted(p.name for p in (run.folder / "checkpoints").iterdir()) == [
        "step-12",
        "step-18",
    ]
    made = sorted(p.name for p in (run.folder / "export").iterdir())
    weights = ["best.pth", "best.safetensors", "taehv.pth", "taehv.safetensors"]
    assert made == sorted(["step-9", "step-18", *weights])
    for name in ("samples/step-18.png", "samples/step-18.mp4", "export/taehv.pth"):
        assert f"{run.folder}/{name}" in output
    assert f"tensorboard --logdir {run.folder}/tensorboard" in output


def test_export_is_the_averaged_model(finished: tuple[Run, str]) -> None:
    run, _ = finished
    exported = torch.load(run.folder / "export/taehv.pth", weights_only=True)
    model = TAEHV("taehv")
    model.load_state_dict(exported)
    again = TAEHV.from_pretrained(run.folder / "export/taehv.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    with safe_open(run.folder / "export/taehv.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["variant"] == "taehv" and metadata["step"] == "18"
    assert metadata["latent_space"] == "own"


def test_exports_on_the_way(finished: tuple[Run, str]) -> None:
    run, _ = finished
    last = run.folder / "export"
    for name in ("taehv.pth", "taehv.safetensors"):
        early, end = last / "step-9" / name, last / "step-18" / name
        assert early.read_bytes() != end.read_bytes()
    exports = [last / "step-9", last / "step-18", last]
    early, end, final = (
        TAEHV.from_pretrained(folder / "taehv.pth").state_dict() for folder in exports
    )
    assert all(torch.equal(final[key], end[key]) for key in final)
    assert any(not torch.equal(final[key], early[key]) for key in final)


def test_tensorboard(finished: tuple[Run, str]) -> None:
    run, _ = finished
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [3, 6, 9, 12, 15, 18]
    assert losses[-1].value == pytest.approx(run.losses()[-1])
    for name in ("learning_rate", "grad_norm", "clips_per_second", "data_wait", "psnr"):
        assert events.Scalars(f"train/{name}")
    for name in ("save_blocked_ms", "save_seconds"):
        saved = events.Scalars(f"train/{name}")
        assert [event.step for event in saved] == [6, 12, 18]
        assert all(event.value > 0 for event in saved)
    assert [event.step for event in events.Scalars("validation/psnr")] == [0, 9, 18]
    clip = events.Images("validation/input_left_of_reconstruction")[-1]
    assert clip.encoded_image_string.startswith(b"GIF8")
    assert "config/text_summary" in events.Tags()["tensors"]


def test_the_written_config_repeats_the_run_also_after_a_stop(
    finished: tuple[Run, str], tmp_path: Path
) -> None:
    reference, _ = finished
    run = Run(tmp_path, tmp_path)
    config = reference.folder / "config.toml"
    run.settings = {"config": config, "job.output_dir": tmp_path}
    process = run.start()
    process.wait_for(lambda: len(run.metrics()) >= 3)
    # As a terminal does it: the decoding processes get the signal too.
    process.send(signal.SIGINT)
    output = process.end()
    stopped = len(run.metrics())
    assert 3 <= stopped < 18 and f"stopped at step {stopped}" in output
    assert (run.folder / f"checkpoints/step-{stopped}/manifest.json").exists()
    run.train()
    assert run.metrics() == reference.metrics()


def test_stop_during_validation(videos: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, videos, training__steps=3)
    process = run.start(validation__clips=400, data__workers=1)
    process.prints("held out")  # the last line before the validation
    time.sleep(1)
    process.send(signal.SIGTERM)
    output = process.end()
    assert "stopped at step 0" in output and "validation at" not in output
    less = {"data__annotations": tmp_path / "less.txt", "optim__lr": 2e-3}
    (tmp_path / "less.txt").write_text("a.mp4\nb.mp4\nheld.mp4\n")
    with pytest.raises(UserError, match="number of training files has changed since"):
        run.train(**less)
    output = run.train(checkpoint__allow_changed_data="true", **less)
    assert "resuming from" in output
    assert "number of training files has changed" in output and "as allowed" in output
    assert "step-0: optim.lr: 0.001 -> 0.002" in output
    assert "step-0: validation.clips: 400 -> " in output
    assert output.count("not the settings of") == 2
    records = [*map(json.loads, (run.folder / "validation.jsonl").open())]
    assert [record["step"] for record in records] == [0, 3]
    less |= {"checkpoint__allow_changed_data": "true"}
    settings = (run.folder / "config.toml").read_text()
    for steps in (2, 3):
        again = {**less, "training__steps": steps, "optim__lr": 3e-3}
        told = f"steps = {steps}, and 3 are done: nothing is left to train"
        assert told in run.train(**again)
        assert (run.folder / "config.toml").read_text() == settings
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    shown = events.Tensors("config/text_summary")
    texts = [event.tensor_proto.string_val[0].decode() for event in shown]
    assert "lr = 0.002" in texts[-1] and "lr = 0.003" not in "".join(texts)
    # Of equal shapes, but of another latent space.
    with pytest.raises(UserError, match="of model.variant taehv, not taew2_1"):
        run.train(model__variant="taew2_1")
    with pytest.raises(UserError, match="training.seed has changed since; take it"):
        run.train(training__seed=1)


def test_the_best_weights_are_kept_and_patience_ends_a_run(
    videos: Path, tmp_path: Path
) -> None:
    # Of the encoder alone, whose steps and checkpoints take less time.
    settings = {"optim__schedule": "constant", "model__trained": "encoder"}
    run = Run(tmp_path, videos, validation__interval=3, **settings)
    run.train(training__steps=6)
    # From here on every step does harm.
    spoiled = {"training__steps": 30, "optim__lr": 10, "validation__patience": 2}
    output = run.finish(processes=2, **spoiled)
    records = [*map(json.loads, (run.folder / "validation.jsonl").open())]
    assert [record["step"] for record in records] == [0, 3, 6, 9, 12]
    psnrs = [record["psnr"] or 0 for record in records]  # null: not finite
    assert max(psnrs) == psnrs[2]
    assert "12 steps done, ended early" in output
    assert f"{run.folder}/export/best.pth and .safetensors: psnr" in output
    for name, step in (("best", "6"), ("taehv", "12")):
        with safe_open(run.folder / f"export/{name}.safetensors", "pt") as file:
            assert file.metadata()["step"] == step
    before = run.metrics()
    (run.folder / "validation.jsonl").unlink()  # the checkpoint knows it, too
    best = run.folder / "export/best.safetensors"
    best.write_bytes((run.folder / "export/taehv.safetensors").read_bytes())
    output = run.train(**spoiled)
    assert "12 steps done, ended early" in output
    assert "best so far" in output and "at step 6" in output  # not in that file
    assert run.metrics() == before and len(before) == 12


def test_a_bad_held_out_file_costs_its_clips(videos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for video in videos.iterdir():
        (folder / video.name).write_bytes(video.read_bytes())
    (folder / "bad_held.mp4").write_text("not a video")
    run = Run(tmp_path, folder, training__steps=1, data__holdout="*held.mp4")
    output = run.train()
    assert output.count("left out a held-out clip") == 2, output  # before and after
    records = [*map(json.loads, (run.folder / "validation.jsonl").open())]
    assert [record["clips"] for record in records] == [1, 1]


def test_bad_videos_cost_only_their_clips(videos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for video in videos.iterdir():
        (folder / video.name).write_bytes(video.read_bytes())
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video")
    cut = (videos / "a.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(cut[: len(cut) // 3])
    run = Run(tmp_path, folder, training__steps=4, training__global_batch_size=4)
    run.settings["validation.clips"] = 0
    output = run.train()
    assert len(run.metrics()) == 4
    for name in ("empty.mp4", "text.mp4", "cut.mp4"):
        assert output.count(f"{folder}/{name}") == 1, output
    (line,) = [line for line in output.splitlines() if "clips of bad videos" in line]
    assert int(line.split("steps, ")[1].split()[0]) >= 3


MISTAKES = {
    "unknown setting": ({"training.stpes": 5}, "did you mean --training.steps"),
    "missing folder": ({"data.root": "no/such/folder"}, "data.root"),
    "missing weights": ({"model.checkpoint": "none.pth"}, "none.pth"),
    "crop": ({"data.height": 20}, "multiple of 8"),
    "no GPU": ({"training.device": "cuda"}, "training.device"),
    "no holdout": ({"data.holdout": "nothing*"}, "data.holdout"),
    "output": ({"job.output_dir": "/proc/none"}, "job.output_dir"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(videos: Path, tmp_path: Path, mistake: str) -> None:
    if mistake == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    settings, told = MISTAKES[mistake]
    run = Run(tmp_path, videos)
    run.settings |= settings
    if mistake == "missing folder":  # one of them as a user sees it
        assert re.fullmatch(rf"error: .*{told}.*\n", run.finish(code=2))
        return
    with pytest.raises(UserError, match=told) as raised:
        run.train()
    assert "\n" not in str(raised.value)
