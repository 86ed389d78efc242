"""Reports of runs: done, under way, killed, and several beside one another."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from taehv.config import dumps
from taehv.errors import UserError
from taehv.logging import RunLog
from taehv.report import (
    POINTS,
    Chart,
    main,
    read_run,
    training_charts,
    validation_charts,
    write_report,
)
from taehv.sections import Config, Logging
from taehv.video import write_mp4

SPEED = {"clips_per_second": 4.0, "data_wait": 0.1, "host_memory_gib": 1.5}


def make_run(
    folder: Path, steps: int = 40, lr: float = 1e-3, validations: int = 3
) -> Path:
    """What a training writes, by the same means, of made-up numbers."""
    folder.mkdir()
    config = Config()
    config.job.name, config.optim.lr, config.training.steps = folder.name, lr, 40
    (folder / "config.toml").write_text(dumps(config))
    run_log = RunLog(folder, Logging(interval=10), 0, 40)
    (folder / "samples").mkdir()
    for step in range(steps + 1):
        if step:
            loss = math.nan if step == 7 else 1 / step
            record = {"step": step, "loss": loss, "psnr": 20 + step / 10}
            run_log.step(
                {**record, "learning_rate": lr, "skipped": int(step >= 7)}, SPEED
            )
        if step % 20 == 0 and step < 20 * validations:
            psnr = 20 + step / 10
            values = {"psnr": psnr, "mean_color_psnr": 14.0, "clips": 4, "seconds": 2.5}
            places = {f"psnr_position_{i}": psnr + i for i in (1, 2, 3, 4)}
            run_log.validation(
                step, {**values, **places}, {"psnr": (psnr - 1, psnr + 1)}
            )
            shade = np.full((8, 12, 3), 60 + step, np.uint8)
            Image.fromarray(shade).save(folder / f"samples/step-{step}.png")
            write_mp4(folder / f"samples/step-{step}.mp4", [shade] * 3, 8)
    run_log.close()
    return folder


def media(html: str, kind: str) -> list[bytes]:
    """What is embedded of a kind such as image/jpeg."""
    sources = re.findall(rf'src="data:{kind};base64,([^"]+)"', html)
    return [base64.b64decode(source, validate=True) for source in sources]


def by_title(charts: list[Chart]) -> dict[str, Chart]:
    return {chart.title: chart for chart in charts}


def test_report_of_a_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "mine")
    files = write_report([read_run(folder)], tmp_path / "report")
    assert [file.name for file in files] == ["index.html", "curves.png", "strips.png"]
    html = files[0].read_text(encoding="utf-8")
    assert "mine: 40 of 40 steps done, 1 of them skipped" in html
    assert "24 ± 1 dB" in html and "psnr 24 at step 40" in html
    assert "training.steps" in html and "optim.lr" not in html  # the default
    for caption in ("step 0 (first validation)", "step 40 (best and last validation)"):
        assert f"<figcaption>mine, {caption}</figcaption>" in html
    for name in ("training loss", "PSNR", "clips a second", "host memory, GiB"):
        assert f"<figcaption>{name}</figcaption>" in html
    shades = [
        np.asarray(Image.open(io.BytesIO(jpeg))).mean()
        for jpeg in media(html, "image/jpeg")
    ]
    assert shades == pytest.approx([60, 100], abs=2)  # the first, and the best and last
    assert media(html, "video/mp4") == [(folder / "samples/step-40.mp4").read_bytes()]
    # Each strip of 8 rows below a line that names it.
    assert np.asarray(Image.open(files[2])).shape == (2 * (20 + 8 + 5), 280, 3)
    curves = np.asarray(Image.open(files[1]).convert("RGB"))
    assert curves.shape[1] > 1000 and curves.std() > 5
    assert not re.search(r'(src|href)="(?!data:)', html)  # nothing from elsewhere


def test_curves_are_the_records(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "mine"))
    charts = by_title(training_charts([run]))
    assert charts.keys() == {
        "training loss",
        "training PSNR",
        "learning rate",
        "skipped",
    }
    (loss,) = charts["training loss"].series
    assert charts["training loss"].log_y and not charts["training PSNR"].log_y
    assert loss.xs == list(range(1, 41))
    assert math.isnan(loss.ys[6]) and loss.ys[9] == 0.1
    charts = by_title(validation_charts([run]))
    places = charts.pop("PSNR by the place of a frame among those of its latent")
    assert [(line.name, line.ys) for line in places.series] == [
        ("step 0", [21, 22, 23, 24]),
        ("step 40", [25, 26, 27, 28]),
    ]
    (psnr,) = charts.pop("PSNR").series
    assert (psnr.xs, psnr.ys) == ([0, 20, 40], [20, 22, 24])
    assert psnr.band == [(19, 21), (21, 23), (23, 25)]
    assert charts == {}  # what training cannot change has no curve


def test_long_curves_are_means_of_as_many_steps(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "mine", steps=0)
    count = 3 * POINTS - 1
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, count + 1):
            print(json.dumps({"step": step, "loss": step % 3}), file=file)
    (loss,) = by_title(training_charts([read_run(folder)]))["training loss"].series
    assert len(loss.xs) == POINTS and loss.xs[:2] == [3, 6] and loss.xs[-1] == count
    assert loss.ys[:-1] == [1] * (POINTS - 1) and loss.ys[-1] == 1.5


def test_runs_share_their_charts(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "one"), make_run(tmp_path / "two", 25, 2e-3)]
    files = write_report([read_run(folder) for folder in folders], tmp_path / "both")
    html = files[0].read_text(encoding="utf-8")
    assert "<title>one and two</title>" in html
    assert "two: 25 of 40 steps done" in html
    assert "Not judged on the same clips" not in html
    settings = html[html.index("Settings that differ") :]
    assert "<td>optim.lr</td><td>0.001</td><td>0.002</td>" in settings
    assert "training.steps" not in settings
    assert len(media(html, "image/jpeg")) == len(media(html, "video/mp4")) == 2
    charts = training_charts([read_run(folder) for folder in folders])
    assert [line.name for line in charts[0].series] == ["one", "two"]
    # Each strip of 8 x 12 pixels below a line that names its run.
    pixels = np.asarray(Image.open(tmp_path / "both/strips.png"))
    captions = pixels[:20], pixels[33:53]
    assert pixels.shape[0] == 2 * (20 + 8 + 5)
    assert all(caption.min() < 100 for caption in captions)
    assert not np.array_equal(*captions)


def test_runs_that_were_judged_on_other_clips(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "one"), make_run(tmp_path / "two")]
    config = Config()

    def told(**changes: int) -> str:
        for name, value in changes.items():
            section, key = name.split("__")
            setattr(getattr(config, section), key, value)
        (folders[1] / "config.toml").write_text(dumps(config))
        runs = [read_run(folder) for folder in folders]
        page = write_report(runs, tmp_path / "both")[0].read_text(encoding="utf-8")
        return (re.findall("do not compare: (.*) differ", page) or [""])[0]

    expected = "validation.clips, validation.height"
    assert told(data__height=96, validation__clips=2) == expected
    # Other clips to train on, the same to judge by.
    assert told(validation__height=128, validation__clips=16) == ""
    assert told(data__cache="c").startswith("data.root")
    assert told(data__cache="c").endswith("data.cache")


def test_a_run_killed_while_it_wrote(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "mine", steps=30)
    for name in ("metrics.jsonl", "validation.jsonl"):
        text = (folder / name).read_text()
        (folder / name).write_text(text[:-9])
    (events,) = (folder / "tensorboard").iterdir()
    events.write_bytes(events.read_bytes()[:-7])
    run = read_run(folder)
    assert [record["step"] for record in run.steps] == list(range(1, 30))
    assert [record["step"] for record in run.validations] == [0]
    assert run.speeds["clips_per_second"][0][:2] == [10, 20]
    html = write_report([run], tmp_path / "report")[0].read_text(encoding="utf-8")
    assert "29 of 40 steps done" in html


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "mine", steps=0, validations=0)
    (folder / "config.toml").unlink()
    files = write_report([read_run(folder)], tmp_path / "report")
    html = files[0].read_text(encoding="utf-8")
    assert "0 of ? steps done" in html
    assert "There has been no validation yet." in html
    assert [file.name for file in files] == ["index.html", "curves.png"]


def test_command_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "mine", steps=3)
    done = subprocess.run(
        [sys.executable, "-m", "taehv.report", folder],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{folder}/report/{name}" for name in ("index.html", "curves.png", "strips.png")
    ]
    assert done.stderr == ""


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "mine", steps=3)
    (tmp_path / "file").write_text("")
    for arguments, told in (
        ([tmp_path / "nowhere"], "nowhere is no run's folder: give one"),
        ([tmp_path], "is no run's folder: give one"),
        ([folder, f"{tmp_path}/./mine"], "a run is named twice: name each once"),
        ([f"file://{folder}"], "RUN: file:///.* is a URL: give a local path"),
        ([folder, "--output", tmp_path / "file"], "cannot write the report"),
    ):
        monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
        with pytest.raises(UserError, match=told) as raised:
            main()
        assert len(str(raised.value).splitlines()) == 1
