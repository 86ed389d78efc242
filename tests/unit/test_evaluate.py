"""Comparing models: values against what the metrics say, files, page, mistakes."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
import statistics
import sys
from pathlib import Path

import av
import numbered_video
import pytest
import torch
from PIL import Image

from taehv import TAEHV, VARIANTS, evaluate
from taehv.checkpoint import save_weights_only
from taehv.comparison import difference_rows, summary_rows
from taehv.errors import UserError
from taehv.evaluate import (
    as_full,
    choose_names,
    choose_rules,
    choose_windows,
    find_files,
    read_clip,
)
from taehv.metrics import measure
from taehv.perceptual import ClipMeasure
from taehv.weights import save_weights

FRAMES = 9


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """The command in this process."""
    words = ["evaluate", *map(str, arguments), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*words, "--precision", "fp32"])
    evaluate.main()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos, one of them damaged, a weights file, and a checkpoint that is worse."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "videos").mkdir()
    for name, size in (("a", (48, 64)), ("b", (64, 48)), ("c", (96, 128))):
        numbered_video.make_video(folder / f"videos/{name}.mp4", 20, size=size)
    (folder / "videos/bad.mp4").write_bytes(b"no video")
    torch.manual_seed(0)
    model = TAEHV("taehv")
    about = {"variant": "taehv"}
    save_weights(folder / "good.safetensors", model.state_dict(), about)
    weights = {k: v + 0.02 * torch.randn_like(v) for k, v in model.state_dict().items()}
    save_weights_only(folder / "worse", weights, about)
    return folder


@pytest.fixture(scope="module")
def results(place: Path) -> Path:
    """The results of a whole comparison."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(
            *(monkeypatch, place / "good.safetensors", f"file://{place}/worse"),
            *("--videos", place / "videos", "--output", place / "out"),
            *("--frames", FRAMES, "--side", 64, "--preview", "both", "--examples", 1),
            *("--teacher-kind", "cache_teachers:Projection"),
        )
    return place / "out"


def test_values_are_those_of_the_metrics(place: Path, results: Path) -> None:
    content = json.loads((results / "results.json").read_text())
    models = {model["name"]: model for model in content["models"]}
    assert list(models) == [
        *("good", "good (both preview)", "worse", "worse (both preview)"),
        "teacher",
    ]
    sizes = [(clip["height"], clip["width"]) for clip in content["clips"]]
    assert [clip["file"] for clip in content["clips"]] == ["a.mp4", "b.mp4", "c.mp4"]
    assert sizes == [(48, 64), (64, 48), (48, 64)]
    model = TAEHV.from_pretrained(place / "good.safetensors")
    files = find_files(place / "videos")
    psnr = []
    for number, clip in enumerate(content["clips"]):
        frames_TCHW = read_clip(files, evaluate.JudgedClip(**clip))
        with torch.no_grad():
            latents = model.encode_video(frames_TCHW[None])
            decoded_TCHW = model.decode_video(latents)[0]
        values = models["good"]["values"][str(number)]
        expected = measure(frames_TCHW, decoded_TCHW)
        for name, value in expected.items():
            assert values[name] == pytest.approx(value, rel=1e-4)
        assert {
            "latent_correlation",
            "decoder_psnr",
            "psnr_position_4",
        } <= values.keys()
        errors = (frames_TCHW - decoded_TCHW).square().mean((1, 2, 3))
        by_frame = models["good"]["frame_psnr"][str(number)]
        assert by_frame == pytest.approx((-10 * errors.log10()).tolist(), rel=1e-4)
        psnr.append(values["psnr"])
    mean = models["good"]["means"]["psnr"]
    assert mean["mean"] == pytest.approx(statistics.mean(psnr)) and mean["clips"] == 3
    assert (
        models["good"]["values"]["0"]["psnr"] > models["worse"]["values"]["0"]["psnr"]
    )
    assert all(model["speed"]["decode_ms"] > 0 for model in models.values())
    pairs = {(d["model"], d["less"]): d["means"] for d in content["differences"]}
    assert len(pairs) == 10
    other = [models["worse"]["values"][str(n)]["psnr"] for n in range(3)]
    gap = statistics.mean(b - a for a, b in zip(psnr, other, strict=True))
    assert pairs["worse", "good"]["psnr"]["mean"] == pytest.approx(gap)


def test_further_measures_reach_every_result(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measures themselves are tested where they are made."""
    network, program = tmp_path / "alexnet.pth", tmp_path / "ffmpeg"
    asked = []

    def load(*arguments: object) -> dict[str, ClipMeasure]:
        asked.append(arguments[:-1])
        return {
            "lpips": lambda theirs, ours: float((theirs - ours).abs().mean()),
            "st_lpips": lambda theirs, ours: 0.5,
            "vmaf": lambda theirs, ours: math.nan,
        }

    monkeypatch.setattr(evaluate, "load_measures", load)
    run(
        *(monkeypatch, place / "good.safetensors", "--videos", place / "videos/a.mp4"),
        *("--output", tmp_path / "out", "--frames", 5, "--side", 32, "--examples", 0),
        *("--teacher-kind", "cache_teachers:Projection"),
        *("--lpips", network, "--st_lpips", "--vmaf", program),
    )
    assert asked == [(str(network), True, str(program))]
    content = json.loads((tmp_path / "out/results.json").read_text())
    good, teacher = (model["values"]["0"] for model in content["models"])
    assert good["lpips"] != good["decoder_lpips"] and good["st_lpips"] == 0.5
    assert "lpips" in teacher and "decoder_lpips" not in teacher
    assert not any("vmaf" in name for name in good)  # of no clip
    assert "LPIPS" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_the_csv_has_a_line_for_each_model_and_clip(results: Path) -> None:
    content = json.loads((results / "results.json").read_text())
    rows = list(csv.DictReader((results / "clips.csv").open()))
    assert len(rows) == 15
    for row in rows:
        model = next(m for m in content["models"] if m["name"] == row["model"])
        values = model["values"][row["clip"]]
        assert float(row["psnr"]) == values["psnr"]
        assert row["decoder_psnr"] == str(values.get("decoder_psnr", ""))


def test_the_page_holds_media_that_play(results: Path) -> None:
    text = (results / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', text) and "<script" not in text
    videos = re.findall(r'src="data:video/mp4;base64,([^"]+)"', text)
    assert len(videos) == 2  # the worst and the best
    for coded in videos:
        with av.open(io.BytesIO(base64.b64decode(coded))) as container:
            frames = list(container.decode(video=0))
            context = container.streams.video[0].codec_context
            assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
            assert len(frames) == FRAMES
            # The input and five others beside one another.
            assert frames[0].width in (6 * 64, 6 * 48)
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    assert len(pictures) == 2
    for coded in pictures:
        Image.open(io.BytesIO(base64.b64decode(coded))).load()
    for shown in ("Worst clips of good", "Best clips of good", "worse less good"):
        assert shown in text
    assert text.count("<svg") >= 5 and "nan" not in re.sub('base64[^"]+', "", text)


def test_tables_are_plain_where_they_are_piped(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        *(monkeypatch, place / "good.safetensors", "--videos", place / "videos/a.mp4"),
        *("--output", place / "alone", "--frames", 5, "--side", 32, "--examples", 0),
    )
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and printed.split(maxsplit=1)[0] == "good"
    assert re.search(r"^PSNR dB +\d+\.\d\d$", printed, re.MULTILINE)
    assert printed.splitlines()[-1] == f"1 clips; {place / 'alone/report.html'}"
    assert {p.name for p in (place / "alone").iterdir()} == {
        *("report.html", "results.json", "clips.csv")
    }


@pytest.mark.parametrize("name", ["taehv", "taecvx", "taeltx_2", "taeh3"])
@pytest.mark.parametrize("latents", [2, 5, 7])
def test_a_preview_is_shown_at_its_times_and_enlarged(name: str, latents: int) -> None:
    variant = VARIANTS[name]
    off = (False,) * 3
    model = TAEHV(name, decoder_time_upscale=off, decoder_space_upscale=off)
    runs = variant.kept_frames(latents)
    full = [frame for run in runs for frame in range(run.start, run.stop)]
    runs = variant.kept_frames(latents, 1)
    # A preview's frame is the last of those of its latent.
    step = variant.time_factor
    kept = [(i + 1) * step - 1 for run in runs for i in range(run.start, run.stop)]
    values_T = torch.tensor(kept, dtype=torch.float32)
    decoded_1TCHW = values_T[None, :, None, None, None].expand(1, -1, 3, 2, 3)
    latents_1TCHW = torch.zeros(1, latents, variant.latent_channels, 2, 3)
    shown = as_full(model, decoded_1TCHW, latents_1TCHW)
    factor = variant.space_factor
    assert shown.shape == (1, len(full), 3, 2 * factor, 3 * factor)
    for frame, value in zip(full, shown[0, :, 0, 0, 0].tolist(), strict=True):
        nearest = min(abs(other - frame) for other in kept)
        assert abs(value - frame) == nearest
    assert torch.equal(as_full(TAEHV(name), shown, latents_1TCHW), shown)


def test_latents_of_their_own_are_not_compared(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, told = tmp_path / "own.safetensors", []
    about = {"variant": "taehv", "latent_space": "own"}
    save_weights(own, TAEHV("taehv").state_dict(), about)
    monkeypatch.setattr(evaluate.log, "info", told.append)
    run(
        *(monkeypatch, own, place / "good.safetensors", "--output", tmp_path / "out"),
        *("--videos", place / "videos/a.mp4", "--frames", 5, "--side", 3),
        *("--examples", 0, "--teacher-kind", "cache_teachers:Projection"),
    )
    assert [text.split(": ")[-1] for text in told] == ["own", "judging 16 x 16"]
    content = json.loads((tmp_path / "out/results.json").read_text())
    found = ["latent_correlation" in m["values"]["0"] for m in content["models"]]
    assert found == [False, True, False]


def test_the_count_is_told_of_what_few_clips_have() -> None:
    clips = [evaluate.JudgedClip(f"{i}.mp4", 0.5, 5, 16, 16) for i in range(3)]
    values = {i: {"psnr": 30.0 + i, "ssim": 0.9} for i in range(3)}
    del values[1]["ssim"]
    models = [evaluate.Judged(name, {}, values) for name in "ab"]
    comparison = evaluate.Comparison({}, clips, models)
    for rows in (summary_rows(comparison), difference_rows(comparison)):
        assert [row[0] for row in rows] == ["", "PSNR dB", "SSIM (2 of 3 clips)"]


def test_every_kind_of_list_names_videos(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path\nx/b.mp4\n")
    files = find_files(tmp_path / "a.csv")
    assert [files[i] for i in range(len(files))] == [str(tmp_path / "x/b.mp4")]


def test_clips_are_spread_over_files() -> None:
    assert choose_windows(3, 0) == [(0, 0.5), (1, 0.5), (2, 0.5)]
    assert len(choose_windows(100, 0)) == 32
    assert [file for file, _ in choose_windows(9, 3)] == [1, 4, 7]
    assert choose_windows(2, 5) == [
        *((0, 1 / 6), (0, 0.5), (0, 5 / 6)),
        *((1, 0.25), (1, 0.75)),
    ]


@pytest.mark.parametrize(
    ("names", "kind", "frames"),
    [
        (["taehv"], "", 33),
        (["taeh3"], "", 39),
        (["taehv", "taeh3"], "", 73),
        (["taecvx"], "", 33),
        (["taehv"], "minimax_h3", 73),
    ],
)
def test_lengths_that_all_models_give_back(
    names: list[str], kind: str, frames: int
) -> None:
    variants = [VARIANTS[name] for name in names]
    assert choose_rules(0, 320, variants, kind).frames == frames
    if frames != 33:
        with pytest.raises(UserError, match=f"take {frames}"):
            choose_rules(33, 320, variants, kind)


def test_names_tell_checkpoints_apart(tmp_path: Path) -> None:
    for folder in ("x/checkpoints/step-5", "y"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("a.pth", "y/a.pth"):
        (tmp_path / file).touch()
    paths = [f"{tmp_path}/{n}" for n in ("x", "x/checkpoints/step-5", "y/a.pth")]
    assert choose_names(paths, []) == ["x", "x step-5", "a"]
    urls = ["s3://bucket/x/checkpoints/step-5", "s3://bucket/y"]
    assert choose_names(urls, []) == ["x step-5", "y"]
    both = [f"{tmp_path}/a.pth", f"{tmp_path}/y/a.pth"]
    assert choose_names(both, []) == both
    with pytest.raises(UserError, match="named twice"):
        choose_names(both[:1] * 2, [])
    with pytest.raises(UserError, match="--names must be"):
        choose_names(both, ["one"])


def test_mistakes_are_one_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, videos = place / "good.safetensors", place / "videos"
    (tmp_path / "file").touch()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.mp4").write_bytes(b"no video")
    for told, arguments in {
        "no such file or folder": (good, "--videos", tmp_path / "none"),
        "no such file; give": (tmp_path / "none.pth", "--videos", videos),
        "are not of variant": (good, "--videos", videos, "--variant", "taeh3"),
        "--frames 8 do not come back": (good, "--videos", videos, "--frames", 8),
        "no clip could be decoded": (good, "--videos", tmp_path / "bad"),
        "name another": (
            *(good, "--videos", videos, "--frames", 5, "--side", 32),
            *("--output", tmp_path / "file"),
        ),
        "wan needs --teacher-path": (good, "--videos", videos, "--teacher-kind", "wan"),
        "file:///x is a URL: give a local": (good, "--videos", "file:///x"),
        "memory://x is": (good, "--videos", videos, "--output", "memory://x"),
        "/none has no complete": (f"file://{place}/none", "--videos", videos),
        "needs --teacher-kind": (good, "--videos", videos, "--teacher-path", "x"),
        "has not the weights of": (good, "--videos", videos, "--lpips", good),
        "is no program": (good, "--videos", videos, "--vmaf", tmp_path / "none"),
        "--clips -1": (good, "--videos", videos, "--clips", -1),
        "no hub id": (
            *(good, "--videos", videos, "--frames", 5, "--side", 32),
            *("--teacher-kind", "hunyuanvideo", "--teacher-path", tmp_path / "none"),
        ),
        "latents are not those of --teacher-kind wan: its own is hunyuanvideo": (
            *(good, "--videos", videos, "--teacher-kind", "wan"),
            *("--teacher-path", tmp_path / "none"),
        ),
    }.items():
        if "--output" not in arguments:
            arguments = (*arguments, "--output", tmp_path / "out")
        with pytest.raises(UserError) as caught:
            run(monkeypatch, *arguments)
        text = str(caught.value)
        assert told in text and len(text.splitlines()) == 1, text
    assert not (tmp_path / "out").exists()
