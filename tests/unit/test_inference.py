"""Whole videos through the command line: counts, times, sound, memory, damage."""

from __future__ import annotations

import gc
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import file_size_limit
from numbered_video import numbered_frame
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from taehv import TAEHV, inference
from taehv.errors import UserError
from taehv.video import TimedFrame, read_frames
from taehv.weights import save_weights

HEIGHT, WIDTH = 27, 45


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of new weights, named by their variants."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("taehv", "taecvx", "taeh3"):
        torch.manual_seed(0)
        path = folder / f"{name}.safetensors"
        save_weights(path, TAEHV(name).state_dict(), {"variant": name})
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command in this process; returns its exit code."""
    words = ["inference", *map(str, arguments), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*words, "--precision", "fp32"])
    try:
        inference.main()
    except SystemExit as stop:
        return int(stop.code)
    return 0


def make_images(folder: Path, frames: int, side: tuple[int, int]) -> Tensor:
    """A folder of numbered PNG files; returns them as frames_1TCHW in [0, 1]."""
    folder.mkdir(parents=True)
    images = [numbered_frame(i, *side) for i in range(frames)]
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"frame-{number:03d}.png")
    return torch.from_numpy(np.stack(images)).movedim(-1, 1)[None] / 255


def make_video(path: Path, times: list[int], sound: bool = True) -> Path:
    """Frames at times in 1/1000 s, with a tone until the last."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        tone = container.add_stream("aac", rate=8000, layout="mono") if sound else None
        for number, pts in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, 48, 64))
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for start in range(0, times[-1] * 8 if tone else 0, 1024):
            wave = np.sin(np.arange(start, start + 1024) / 9, dtype=np.float32)[None]
            samples = av.AudioFrame.from_ndarray(wave, "fltp", "mono")
            samples.sample_rate, samples.pts = 8000, start
            samples.time_base = Fraction(1, 8000)
            container.mux(tone.encode(samples))
        if tone:
            container.mux(tone.encode())
    return path


def frame_times(path: Path) -> list[Fraction]:
    with av.open(str(path)) as container:
        return [frame.pts * frame.time_base for frame in container.decode(video=0)]


def audio_packets(path: Path) -> list[tuple[Fraction, bytes]]:
    with av.open(str(path)) as container:
        packets = [p for p in container.demux() if p.stream.type == "audio"]
        return [(p.pts * p.time_base, bytes(p)) for p in packets if p.size]


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(p)) for p in sorted(folder.iterdir())])


def expected(weights: Path, frames_1TCHW: Tensor, padded: int) -> np.ndarray:
    """What the model makes of all frames at once; uint8 frames_THWC."""
    model = TAEHV.from_pretrained(weights)
    frames, (height, width) = frames_1TCHW.shape[1], frames_1TCHW.shape[-2:]
    factor = model.variant.space_factor
    repeat = [min(i, frames - 1) for i in range(padded)]
    border = (0, -width % factor, 0, -height % factor)
    x_TCHW = torch.nn.functional.pad(frames_1TCHW[0, repeat], border, mode="replicate")
    with torch.no_grad():
        decoded_1TCHW = model.decode_video(model.encode_video(x_TCHW[None]))
    shown_TCHW = decoded_1TCHW[0, :frames, :, :height, :width]
    return (shown_TCHW.movedim(1, -1) * 255).round().byte().numpy()


@pytest.mark.parametrize(
    ("name", "frames", "padded"),
    # How many frames decode to as many; CogVideoX by the rule of both parities.
    [
        *(("taehv", 1, 1), ("taehv", 8, 9), ("taehv", 18, 21)),
        *(("taecvx", 9, 9), ("taecvx", 10, 16), ("taecvx", 16, 16)),
        *(("taeh3", 17, 22), ("taeh3", 23, 39)),
    ],
)
def test_every_frame_comes_back_as_the_model_makes_it(
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    frames: int,
    padded: int,
) -> None:
    frames_1TCHW = make_images(tmp_path / "in/shot", frames, (HEIGHT, WIDTH))
    checkpoint = weights / f"{name}.safetensors"
    wanted = expected(checkpoint, frames_1TCHW, padded)
    for chunk in (1, 10):
        output = tmp_path / f"out-{chunk}"
        code = run(
            *(monkeypatch, checkpoint, tmp_path / "in/shot"),
            *("--output", output, "--chunk", chunk),
        )
        assert code == 0
        names = [path.name for path in sorted((output / "shot").iterdir())]
        assert names == [f"frame-{i:03d}.png" for i in range(frames)]
        shown = pictures(output / "shot")
        assert np.abs(shown.astype(int) - wanted).max() <= 1


def test_times_sound_and_rate_are_kept(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Variable rate, and a count of frames that no latents stand for.
    times = [0, 40, 80, 120, 200, 233, 400, 440, 480, 520, 610]
    source = make_video(tmp_path / "a.mkv", times)
    checkpoint = weights / "taehv.safetensors"
    output = tmp_path / "out/b.mp4"
    assert run(monkeypatch, checkpoint, source, "--output", output, "--crf", 1) == 0
    assert os.listdir(tmp_path / "out") == ["b.mp4"]
    differences = zip(frame_times(output), frame_times(source), strict=True)
    assert all(abs(a - b) < Fraction(1, 900) for a, b in differences)
    ours, theirs = audio_packets(output), audio_packets(source)
    assert [data for _, data in ours] == [data for _, data in theirs] != []
    times = zip(ours, theirs, strict=True)
    assert all(abs(a - b) < Fraction(1, 400) for (a, _), (b, _) in times)
    frames = torch.from_numpy(np.stack(list(read_frames(str(source)))))
    wanted = expected(checkpoint, frames.movedim(-1, 1)[None] / 255, 13)
    decoded = np.stack(list(read_frames(str(output)))).astype(int)
    # Half of the colours' resolution is lost on the way, brightness is not.
    luma = [0.2126, 0.7152, 0.0722]
    error = np.abs((decoded - wanted) @ luma).mean()
    assert error < np.abs((decoded[1:] - wanted[:-1]) @ luma).mean() / 4
    assert error < 3
    with av.open(str(output)) as container:
        video = container.streams.video[0].codec_context
        assert (video.name, video.pix_fmt, video.colorspace) == ("h264", "yuv420p", 1)


def test_side_by_side_and_no_sound(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_video(tmp_path / "a.mp4", [40 * i for i in range(6)])
    checkpoint, output = weights / "taehv.safetensors", tmp_path / "b.mp4"
    run(
        *(monkeypatch, checkpoint, source, "--output", output),
        *("--side-by-side", "--no-sound", "--crf", 1),
    )
    frames = np.stack(list(read_frames(str(source)))).astype(int)
    shown = np.stack(list(read_frames(str(output)))).astype(int)
    assert shown.shape == (6, 48, 128, 3) and not audio_packets(output)
    assert np.abs(shown[:, :, :60] - frames[:, :, :60]).mean() < 5
    assert np.abs(shown[:, :, 64:] - frames).mean() > 10


def test_odd_sizes_gain_a_row_and_a_column(
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    make_images(tmp_path / "shot", 5, (HEIGHT, WIDTH))
    checkpoint, output = weights / "taehv.safetensors", tmp_path / "b.MP4"
    code = run(
        *(monkeypatch, checkpoint, tmp_path / "shot", "--output", output),
        *("--to", "video", "--rate", 12.5),
    )
    assert code == 0 and "gained a row or a column" in capfd.readouterr()[1]
    with av.open(str(output)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate) == (5, 12.5)
        assert (stream.height, stream.width) == (HEIGHT + 1, WIDTH + 1)


@pytest.mark.parametrize("name", ["taehv", "taecvx", "taeh3"])
def test_latents_and_back(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make_images(tmp_path / "shot", 10, (HEIGHT, WIDTH))
    checkpoint = weights / f"{name}.safetensors"
    common = (monkeypatch, checkpoint)
    assert run(*common, tmp_path / "shot", "--output", tmp_path / "direct") == 0
    stored = tmp_path / "shot.safetensors"
    to_latents = ("--to", "latents", "--output", stored, "--latent-scale", 0.5)
    assert run(*common, tmp_path / "shot", *to_latents, "--chunk", 1) == 0
    latents_1TCHW = load_file(stored)["latents"]
    model = TAEHV.from_pretrained(checkpoint)
    padded = model.variant.padded_frames(10)
    assert latents_1TCHW.shape[1] == model.variant.latents_of(padded)
    # As pipelines leave them: N C T H W, or T C H W, in a file of torch.
    torch.save(latents_1TCHW.movedim(1, 2).contiguous(), tmp_path / "a.pt")
    torch.save({"x": latents_1TCHW[0].half()}, tmp_path / "b.pth")
    save_file(
        {"z": latents_1TCHW.movedim(1, 2).contiguous()}, tmp_path / "c.safetensors"
    )
    direct = pictures(tmp_path / "direct/shot").astype(int)
    for path in (stored, *(tmp_path / n for n in ("a.pt", "b.pth", "c.safetensors"))):
        arguments = ("--latents", "--to", "images", "--output", tmp_path / "decoded")
        assert run(*common, path, *arguments, "--latent-scale", 0.5) == 0
        decoded = pictures(tmp_path / "decoded" / path.stem).astype(int)
        if path == stored:  # which knows what was padded
            assert decoded.shape == direct.shape
        else:
            count = model.variant.frames_of(latents_1TCHW.shape[1])
            assert decoded.shape[:3] == (count, HEIGHT + -HEIGHT % 16, 48)
        assert np.abs(decoded[:10, :HEIGHT, :WIDTH] - direct).max() <= 2


def test_latents_that_do_not_tell_their_layout(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    torch.save(torch.randn(1, 16, 16, 2, 3), tmp_path / "a.pt")
    common = (monkeypatch, weights / "taehv.safetensors", tmp_path / "a.pt")
    common = (*common, "--latents", "--output", tmp_path / "out")
    assert run(*common) == 1 and not (tmp_path / "out").exists()
    assert run(*common, "--layout", "NCTHW") == 0
    assert len(frame_times(tmp_path / "out/a.mp4")) == 61


def test_a_bad_file_costs_that_file(
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    make_video(folder / "deep/good.mp4", [40 * i for i in range(5)], sound=False)
    make_video(folder / "good.mp4", [40 * i for i in range(5)], sound=False)
    make_video(folder / "good.mkv", [40 * i for i in range(5)], sound=False)
    (folder / "bad.mp4").write_bytes(b"no video")
    long = make_video(tmp_path / "long.mp4", [40 * i for i in range(100)], sound=False)
    content = bytearray(long.read_bytes())
    middle = content.index(b"mdat") + len(content) // 3
    content[middle : middle + 3000] = bytes(3000)
    (folder / "hurt.mp4").write_bytes(content)
    common = (monkeypatch, weights / "taehv.safetensors", folder)
    common = (*common, "--output", tmp_path / "out")
    assert run(*common) == 1
    printed, told = capfd.readouterr()
    written = sorted(
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")
    )
    assert written == ["deep/good.mp4", "good.mkv.mp4", "good.mp4.mp4"]
    assert [len(frame_times(p)) for p in (tmp_path / "out").rglob("*.mp4")] == [5] * 3
    assert len(printed.splitlines()) == 3
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "bad.mp4" in errors[0] and "hurt.mp4" in errors[1]
    assert "2 of 5 failed" in told
    assert run(*common) == 1  # and what is there is left alone
    assert capfd.readouterr()[1].count("is there already") == 3


def test_mistakes_are_one_line(
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    taehv, taeh3 = (weights / f"{name}.safetensors" for name in ("taehv", "taeh3"))
    video = make_video(tmp_path / "a.mp4", [0, 40, 80], sound=False)
    (tmp_path / "cut.safetensors").write_bytes(taehv.read_bytes()[:-9])
    torch.save(torch.randn(1, 3, 16, 2, 3), tmp_path / "z.pt")
    torch.save({"a": 1, "b": [2]}, tmp_path / "none.pt")
    torch.save(torch.full((1, 3, 16, 2, 3), torch.nan), tmp_path / "nan.pt")
    before = sorted(tmp_path.iterdir())
    for told, arguments in {
        "no such file": (taehv, tmp_path / "b.mp4"),
        "is not a whole": (tmp_path / "cut.safetensors", video),
        "not of variant taecvx": (taeh3, video, "--variant", "taecvx"),
        "looks like latents": (taehv, tmp_path / "z.pt"),
        "--output: file:///x is a URL": (taehv, video, "--output", "file:///x"),
        "inputs: memory://x is a URL": (taehv, "memory://x"),
        "must be from 0 to 51": (taehv, video, "--crf", 52),
        "holds no videos or images": (taehv, weights),
        "name a folder, or for a single input a .mp4": (
            *(taehv, video, "--output", tmp_path / "x.webm"),
        ),
        "single input a .mp4": (taehv, video, "--output", tmp_path / "x.gif"),
        "--rate 12 is for images": (taehv, video, "--rate", 12),
        "--rate 5 is for images": (
            *(taehv, tmp_path / "z.pt", "--latents", "--to", "images", "--rate", 5),
        ),
        "is the input": (taehv, video, "--output", video),
        "No such file or directory": (taehv, video, "--output", "/proc/x.mp4"),
        "which has 24 channels": (taeh3, tmp_path / "z.pt", "--latents"),
        "holds 2 tensors": (taehv, tmp_path / "none.pt", "--latents"),
        "NaN": (taehv, tmp_path / "nan.pt", "--latents"),
        "and give videos without --latents": (taehv, video, "--latents"),
    }.items():
        try:
            code = run(monkeypatch, *arguments[:2], *arguments[2:])
        except UserError as error:  # run_command prints it
            assert told.replace("is not", "not") in str(error)
            assert len(str(error).splitlines()) == 1
            continue
        lines = capfd.readouterr()[1].splitlines()
        assert code == 1 and told in lines[0] and len(lines) == 2, (told, lines)
    assert sorted(tmp_path.iterdir()) == before


def test_a_search_leaves_the_outputs_out_and_tells_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def sources(folder: str) -> list[str]:
        jobs = inference.plan([Path(folder)], Path("reconstructed"), None, False)
        return [str(job.source) for job in jobs]

    caplog.set_level("INFO", "taehv")
    for name in ("a.mp4", "deep/b.mp4", "deep/c.png", "reconstructed/deep/b.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert sources(".") == ["a.mp4", "deep/b.mp4"]
    with pytest.raises(UserError, match=r"reconstructed/deep/b\.mp4 is the input"):
        sources("reconstructed")
    assert not caplog.messages
    make_images(tmp_path / "deep/shot", 1, (8, 8))
    assert sources(".") == ["a.mp4", "deep/b.mp4"]
    assert len(caplog.messages) == 1 and "images in deep/shot are" in caplog.messages[0]


def test_outputs_that_cannot_be(
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    video = make_video(tmp_path / "a.mp4", [0, 40, 80], sound=False)
    (tmp_path / "afile").touch()
    for output in ("afile", "afile/b.mp4"):
        with pytest.raises(UserError, match="afile is a file, not a folder: give"):
            # Before it is seen that there is no such model.
            run(monkeypatch, "nosuch.pth", video, "--output", tmp_path / output)
    common = (monkeypatch, weights / "taehv.safetensors", video)
    assert run(*common, "--output", "/proc/nope/x.mp4") == 1
    assert "the folder /proc/nope cannot be made" in capfd.readouterr()[1]


@pytest.mark.parametrize("to", ["video", "images", "latents"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    to: str,
) -> None:
    video = make_video(tmp_path / "a.mp4", [0, 40, 80], sound=False)
    common = (monkeypatch, weights / "taehv.safetensors", video, "--to", to)
    with file_size_limit(300):
        code = run(*common, "--output", tmp_path / "out")
    told = capfd.readouterr()[1].splitlines()
    assert code == 1 and len(told) == 2 and told[0].startswith("error: "), told
    assert "a.mp4 -> " in told[0] and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_behind(
    weights: Path, tmp_path: Path, number: signal.Signals
) -> None:
    source = make_video(tmp_path / "a.mp4", [40 * i for i in range(400)])
    command = [sys.executable, "-m", "taehv.inference", weights / "taehv.safetensors"]
    command += [source, "--output", tmp_path / "out", "--chunk", "4"]
    process = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob("out/*.part")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert told.splitlines() == ["stopped; what was whole is kept"]
    assert not list((tmp_path / "out").iterdir())


def test_what_is_kept_does_not_grow(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors: list[int] = []

    class Endless(inference.ImageFrames):
        def __iter__(self) -> Iterator[TimedFrame]:
            for number in range(240):
                if number % 60 == 30:
                    kept = (o for o in gc.get_objects() if issubclass(type(o), Tensor))
                    tensors.append(sum(1 for _ in kept))
                yield TimedFrame(np.zeros((8, 8, 3), np.uint8), number, 1)

    make_images(tmp_path / "shot", 1, (8, 8))
    monkeypatch.setattr(inference, "ImageFrames", Endless)
    output = tmp_path / "a.mp4"
    common = (monkeypatch, weights / "taehv.safetensors", tmp_path / "shot")
    assert run(*common, "--to", "video", "--output", output) == 0
    assert len(frame_times(output)) == 240
    assert len(tensors) == 4 and max(tensors[1:]) - min(tensors[1:]) < 40, tensors


@dataclass
class Memory:
    """What a process takes while it runs, in MiB."""

    peak: float
    samples: list[float]
    """Four a second."""


def memory_of(
    weights: Path, folder: Path, frames: int, side: tuple[int, int]
) -> Memory:
    """Take so many frames through the model, and look at the process."""
    folder.mkdir()
    pictures = [numbered_frame(i, *side) for i in range(4)]
    source = folder / "a.mp4"
    with inference.VideoWriter(source, 25) as writer:
        for number in range(frames):
            writer.write(pictures[number % 4])
    command = [sys.executable, "-m", "taehv.inference", weights / "taehv.safetensors"]
    command += [source, "--output", folder / "b.mp4", "--precision", "fp32"]
    process = subprocess.Popen(list(map(str, command)))
    samples = []
    ended, status, usage = 0, 0, None
    while not ended:
        text = Path(f"/proc/{process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s*(\d+) kB", text)
        samples += [int(found[1]) / 1024] if found else []
        time.sleep(0.25)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    with av.open(str(folder / "b.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width) == side and stream.average_rate == 25
        assert stream.frames == frames
    return Memory(usage.ru_maxrss / 1024, samples)


@pytest.mark.soak
def test_memory_of_a_long_video_is_flat(weights: Path, tmp_path: Path) -> None:
    short, long = (
        memory_of(weights, tmp_path / str(n), n, (96, 160)).peak for n in (300, 3000)
    )
    print(f"160 x 96: {short:.0f} MiB at 300 frames, {long:.0f} at 3000")
    # Keeping the frames, 0.04 MiB each, would be seen.
    assert long < short + 60


@pytest.mark.soak
def test_memory_of_large_frames_is_flat(weights: Path, tmp_path: Path) -> None:
    memory = memory_of(weights, tmp_path / "large", 160, (720, 1280))
    # The encoder looks 40 frames ahead: the first third fills what stays full.
    third = len(memory.samples) // 3
    middle, last = (
        statistics.median(memory.samples[i * third : (i + 1) * third]) for i in (1, 2)
    )
    print(f"1280 x 720: {middle:.0f} MiB, then {last:.0f}; peak {memory.peak:.0f}")
    # Keeping the 53 frames of a third, 2.6 MiB each, would be seen.
    assert last < middle + 70
