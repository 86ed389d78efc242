"""Random access against sequential decoding, crops, colours, damage and writing."""

from __future__ import annotations

import os
import random
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
from numbered_video import make_video, number_of, numbers_of, promise

from taehv.video import (
    Crop,
    Tally,
    VideoError,
    VideoWriter,
    _Converter,
    decode_window,
    probe,
    read_frames,
    write_mp4,
)

FULL = Crop(48, 64)
FILES = {
    "h264_b_frames.mp4": {"options": {"bf": "3", "g": "12"}},
    "h264_one_keyframe.mkv": {"options": {"bf": "2", "b-pyramid": "normal"}},
    "h264_open_gop.mp4": {"options": {"x264-params": "open-gop=1:keyint=8:bframes=3"}},
    "h264_times_are_dts.mp4": {"options": {"bf": "2"}, "times_are_dts": True},
    "h264.avi": {"options": {"bf": "1", "g": "8"}},
    "h264_raw.h264": {"options": {"bf": "2"}},
    "h264.ts": {"options": {"bf": "2", "g": "12"}},
    "hevc_open_gop.mp4": {
        "codec": "libx265",
        "options": {"x265-params": "keyint=8:open-gop=1:bframes=3:log-level=none"},
    },
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg4_b_frames.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mpeg4_b_frames.mkv": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mpeg2_open_gop.mpg": {"codec": "mpeg2video", "options": {"bf": "2", "g": "9"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "g": "15"}},
    "no_duration.mkv": {"options": {"g": "12"}, "muxer": {"live": "1"}},
    "h264_10_bit_444.mkv": {
        "options": {"bf": "2", "g": "12"},
        "pixel_format": "yuv444p10le",
    },
    "h264_fragmented.mp4": {
        "options": {"bf": "2", "g": "8"},
        "muxer": {"movflags": "frag_keyframe+empty_moov"},
    },
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12", "g": "15"}},
    "variable_rate.mp4": {
        "options": {"bf": "2", "g": "12"},
        "times": [i * 40 + i * i % 37 + 500 * (i // 10) for i in range(40)],
    },
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("videos")
    return {name: str(make_video(folder / name, **FILES[name])) for name in FILES}


@pytest.mark.parametrize("name", FILES)
def test_any_window_equals_sequential_decoding(files: dict[str, str], name: str):
    reference = list(read_frames(files[name]))
    assert numbers_of(np.stack(reference)) == list(range(40))
    rng = random.Random(name)
    firsts = set()
    for i, position in enumerate([0.0, 1.0, *(rng.random() for _ in range(13))]):
        stride = 1 + i % 3
        (clip,) = decode_window(files[name], position, 9, stride, [FULL])
        first = number_of(clip[0])
        firsts.add(first)
        expected = reference[first : first + 8 * stride + 1 : stride]
        np.testing.assert_array_equal(clip, np.stack(expected))
    assert len(firsts) >= 5


WRONG_HEADER = "wrong_duration.mkv"
MORE_FILES = {
    "turned.mp4": {"options": {"bf": "2", "g": "12"}, "rotation": 90},
    "odd.mkv": {"codec": "mpeg4", "size": (49, 65)},
    "edited.mp4": {"options": {"bf": "2"}, "times": [i * 40 - 280 for i in range(40)]},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"bf": "2", "g": "9"}},
    "hevc.mkv": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "15"}},
    "every_frame_a_keyframe.mov": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
    "vp9_hidden_frames.mkv": {
        "codec": "libvpx-vp9",
        "options": {"cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "12"},
    },
    "hevc_10_bit.mp4": {
        "codec": "libx265",
        "options": {"x265-params": "bframes=3:keyint=20:log-level=none"},
        "pixel_format": "yuv420p10le",
    },
    "mpeg1.mpg": {"codec": "mpeg1video", "options": {"bf": "2"}},
    "wmv2.wmv": {"codec": "wmv2"},
    "ffv1.mkv": {"codec": "ffv1"},
    "prores.mov": {"codec": "prores_ks", "pixel_format": "yuv422p10le"},
    "flv1.flv": {"codec": "flv"},
    WRONG_HEADER: {"options": {"bf": "2", "g": "12"}},
}


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        *((name, 8) for name in MORE_FILES),
        *(
            pytest.param(name, 60, marks=pytest.mark.soak)
            for name in (*FILES, *MORE_FILES)
        ),
    ],
)
def test_windows_of_any_kind_of_file_are_exact(tmp_path: Path, name: str, windows: int):
    kind = (FILES | MORE_FILES)[name]
    path = str(make_video(tmp_path / name, frames=160, **kind_of_length(kind, 160)))
    if name == WRONG_HEADER:
        promise(Path(path), seconds=8)
    reference = list(read_frames(path))
    places = {frame.tobytes(): i for i, frame in enumerate(reference)}
    assert len(places) == len(reference) >= 150
    rng, firsts = random.Random(name), set()
    height, width = reference[0].shape[:2]
    for _ in range(windows):
        stride = rng.randint(1, 3)
        whole = Crop(height, width)
        (clip,) = decode_window(path, rng.random(), 12, stride, [whole])
        found = [places[frame.tobytes()] for frame in clip]
        first = found[0]
        assert found == list(range(first, first + 11 * stride + 1, stride))
        firsts.add(first)
    assert len(firsts) >= windows * 2 // 5


def kind_of_length(kind: dict, frames: int) -> dict:
    """The same kind of file, with times for so many frames where it has its own."""
    if "times" not in kind:
        return kind
    if kind["times"][0] < 0:
        return {**kind, "times": [i * 40 - 280 for i in range(frames)]}
    times = [i * 40 + i * i % 37 + 500 * (i // 10) for i in range(frames)]
    return {**kind, "times": times}


@pytest.mark.parametrize(
    "name",
    [
        *("h264_b_frames.mp4", "h264_open_gop.mp4", "h264.ts", "h264_raw.h264"),
        *("mpeg4.avi", "mpeg2_open_gop.mpg", "vp9.webm", "no_duration.mkv"),
    ],
)
def test_positions_span_all_starts(files: dict[str, str], name: str):
    def first(position: float) -> int:
        (clip,) = decode_window(files[name], position, 5, 2, [FULL])
        return number_of(clip[0])

    assert first(0.0) == 0
    assert first(1.0) == 40 - 9
    assert abs(first(0.5) - 15.5) <= 1


def test_short_files_reduce_the_stride(tmp_path: Path):
    path = str(make_video(tmp_path / "short.mp4", frames=20))
    (clip,) = decode_window(path, 0.0, 9, 4, [FULL])
    assert numbers_of(clip) == list(range(0, 17, 2))
    (clip,) = decode_window(path, 1.0, 20, 3, [FULL])
    assert numbers_of(clip) == list(range(20))
    with pytest.raises(VideoError, match="has 20 frames and 21 are needed"):
        decode_window(path, 0.5, 21, 1, [FULL])


def test_frames_that_an_edit_list_cuts_never_show(tmp_path: Path):
    times = [i * 40 - 280 for i in range(40)]
    path = str(make_video(tmp_path / "cut.mp4", times=times, options={"bf": "2"}))
    shown = numbers_of(np.stack(list(read_frames(path))))
    assert shown == list(range(7, 40))
    (clip,) = decode_window(path, 0.0, 5, 1, [FULL])
    assert numbers_of(clip) == list(range(7, 12))
    with pytest.raises(VideoError, match="has 33 frames and 34 are needed"):
        decode_window(path, 0.0, 34, 1, [FULL])


def test_crops_of_one_decode_equal_single_crops(files: dict[str, str]):
    crops = [Crop(24, 32, 0.7, 0.2, 0.9), Crop(32, 32, 0.5, 0.0, 1.0, flip=True), FULL]
    together = decode_window(files["h264_b_frames.mp4"], 0.4, 5, 2, crops)
    for crop, clip in zip(crops, together, strict=True):
        (single,) = decode_window(files["h264_b_frames.mp4"], 0.4, 5, 2, [crop])
        assert clip.shape == (5, crop.height, crop.width, 3)
        np.testing.assert_array_equal(clip, single)


def assert_close_inside(crop: np.ndarray, box: np.ndarray) -> None:
    """Chroma at the border has other neighbours than in the whole frame."""
    difference = np.abs(crop.astype(int) - box.astype(int))
    assert difference[:, 2:-2, 2:-2].max() <= 2


def test_crop_takes_its_box(files: dict[str, str]):
    corner = Crop(24, 32, scale=0.5, y=1.0, x=0.0)
    mirrored = Crop(24, 32, scale=0.5, y=1.0, x=0.0, flip=True)
    odd = Crop(24, 32, scale=0.5, y=0.5, x=17.5 / 32)
    full, crop, flipped, inner = decode_window(
        files["h264_b_frames.mp4"], 0.4, 5, 1, [FULL, corner, mirrored, odd]
    )
    assert_close_inside(crop, full[:, 24:, :32])
    np.testing.assert_array_equal(flipped, crop[:, :, ::-1])
    # Column 17 would split a pair of pixels that share their colour.
    assert_close_inside(inner, full[:, 12:36, 16:48])


def _stored_frames(path: str) -> np.ndarray:
    with av.open(path) as container:
        return np.stack(
            [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        )


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_is_applied(tmp_path: Path, rotation: int):
    path = str(make_video(tmp_path / "turned.mp4", frames=12, rotation=rotation))
    upright = np.rot90(_stored_frames(path), rotation // 90, axes=(1, 2)).astype(int)
    height, width = upright.shape[1:3]
    info = probe(path)
    assert (info.height, info.width, info.rotation) == (height, width, rotation % 360)
    whole, corner = decode_window(
        path,
        0.0,
        12,
        1,
        [Crop(height, width), Crop(height // 2, width // 2, 0.5, 0, 1)],
    )
    assert np.abs(whole - upright).mean() < 3
    assert np.abs(corner - upright[:, : height // 2, width // 2 :]).mean() < 3


def test_odd_sizes(tmp_path: Path):
    odd = {"codec": "mpeg4", "size": (49, 65), "frames": 12}
    path = str(make_video(tmp_path / "odd.mkv", **odd))
    reference = np.stack(list(read_frames(path)))
    assert reference.shape[1:] == (49, 65, 3)
    (clip,) = decode_window(path, 0.0, 12, 1, [Crop(49, 65)])
    np.testing.assert_array_equal(clip, reference)


@pytest.mark.parametrize(
    ("size", "tag", "range_", "luma_weights"),
    [
        ((720, 1280), 2, 0, (0.2126, 0.0722)),
        ((48, 64), 2, 0, (0.299, 0.114)),
        ((48, 64), 1, 1, (0.2126, 0.0722)),
        ((720, 1280), 6, 1, (0.299, 0.114)),
        ((48, 64), 1, 2, (0.2126, 0.0722)),
        ((48, 64), 6, 2, (0.299, 0.114)),
    ],
    ids=[
        *("untagged_hd", "untagged_sd", "tagged_bt709", "tagged_bt601"),
        *("full_range_bt709", "full_range_bt601"),
    ],
)
def test_color_matrix(
    tmp_path: Path,
    size: tuple[int, int],
    tag: int,
    range_: int,
    luma_weights: tuple[float, float],
):
    path = str(tmp_path / "color.mp4")
    height, width = size
    luma, blue, red = 120, 90, 170
    planes = np.full((height * 3 // 2, width), luma, np.uint8)
    planes[height : height * 5 // 4] = blue
    planes[height * 5 // 4 :] = red
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.colorspace = tag
        stream.codec_context.color_range = range_
        image = av.VideoFrame.from_ndarray(planes, format="yuv420p")
        container.mux(stream.encode(image))
        container.mux(stream.encode(None))
    (clip,) = decode_window(path, 0.0, 1, 1, [Crop(32, 32)])

    weight_r, weight_b = luma_weights
    if range_ == 2:
        y, cb, cr = luma / 255, (blue - 128) / 255, (red - 128) / 255
    else:
        y, cb, cr = (luma - 16) / 219, (blue - 128) / 224, (red - 128) / 224
    r, b = y + 2 * (1 - weight_r) * cr, y + 2 * (1 - weight_b) * cb
    g = (y - weight_r * r - weight_b * b) / (1 - weight_r - weight_b)
    expected = np.array([r, g, b]) * 255
    assert np.abs(clip - expected).max() <= 0.6


def _make_sound(path: Path) -> None:
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(8000))


def test_files_without_video_are_named(tmp_path: Path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    _make_sound(tmp_path / "sound.wav")
    os.mkfifo(tmp_path / "pipe.mp4")
    for name in ("empty.mp4", "text.mp4", "sound.wav", "missing.mp4", "pipe.mp4"):
        with pytest.raises(VideoError, match=name):
            decode_window(str(tmp_path / name), 0.5, 5, 1, [FULL])
        with pytest.raises(VideoError, match=name):
            list(read_frames(str(tmp_path / name)))


def test_flagged_damage_gives_exact_frames_or_an_error(tmp_path: Path):
    options = {"bf": "2", "g": "10"}
    path = make_video(tmp_path / "damaged.mp4", frames=60, options=options)
    reference = list(read_frames(str(path)))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = b"\xff" * 400
    path.write_bytes(content)
    failed = 0
    for i in range(20):
        try:
            (clip,) = decode_window(str(path), i / 19, 5, 1, [FULL])
        except VideoError:
            failed += 1
            continue
        first = number_of(clip[0])
        np.testing.assert_array_equal(clip, np.stack(reference[first : first + 5]))
    assert 0 < failed < 15


def test_counted_frames_that_are_damaged_are_an_error(tmp_path: Path):
    options = {"bf": "1", "g": "8"}
    path = make_video(tmp_path / "damaged.avi", frames=60, options=options)
    content = path.read_bytes()
    # Encoders write other bytes on other processors: a place is looked for where
    # damage leaves frames that the decoder flags.
    for place in range(len(content) // 2, len(content) * 3 // 4, 50):
        damaged = content[:place] + b"\xff" * 400 + content[place + 400 :]
        path.write_bytes(damaged)
        if flagged := flagged_frames(path):
            break
    failed = 0
    for i in range(50):
        tally = Tally()
        try:
            decode_window(str(path), (i + 0.5) / 60, 1, 1, [FULL], tally)
        except VideoError as error:
            assert "a frame of the window is damaged" in str(error)
            assert tally.packets - 1 in flagged
            failed += 1
        else:
            assert tally.packets - 1 not in flagged
    assert failed


def flagged_frames(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "NONE"
        try:
            frames = list(container.decode(video=0))
        except av.FFmpegError:
            return []
    return [i for i, frame in enumerate(frames) if frame.is_corrupt]


@pytest.mark.parametrize(
    ("seconds", "ticks", "told"),
    [(16, 1_000_000, 16), (9e12, 1, None), (-5, 1_000_000, None)],
)
def test_a_wrong_duration_is_only_a_hint(
    tmp_path: Path, seconds: float, ticks: int, told: float | None
):
    path = make_video(tmp_path / "long.mkv", options={"g": "10"})
    promise(path, seconds, ticks)
    assert probe(str(path)).duration == told
    for position in (0.0, 0.3, 1.0):
        (clip,) = decode_window(str(path), position, 9, 2, [FULL])
        first = number_of(clip[0])
        assert numbers_of(clip) == list(range(first, first + 17, 2))


def test_written_video_reads_back(tmp_path: Path):
    rows, columns = np.mgrid[0:47, 0:63]
    image = np.stack([rows * 5, columns * 4, 255 - rows * 5], -1).astype(np.uint8)
    frames = np.stack([np.roll(image, shift, axis=1) for shift in range(0, 30, 3)])
    path = tmp_path / "out.mp4"
    write_mp4(path, frames, 12.5)
    info = probe(str(path))
    assert (info.height, info.width, info.rate, info.codec) == (48, 64, 12.5, "h264")
    back = np.stack(list(read_frames(str(path))))
    assert len(back) == len(frames)
    assert np.abs(back[:, :47, :63].astype(int) - frames).mean() < 4
    assert np.abs(back[:, 47].astype(int) - back[:, 46]).mean() < 4
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range, frame.format.name) == (
            *(1, 1),
            "yuv420p",
        )
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


def test_threads_convert_as_swscale_does():
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (24, 27, 45, 3), np.uint8)
    with ThreadPoolExecutor(3) as pool:
        converted = list(pool.map(_Converter(28, 46), frames))
    for frame_HWC, found in zip(frames, converted, strict=True):
        even_HWC = np.pad(frame_HWC, ((0, 1), (0, 1), (0, 0)), mode="edge")
        wanted = av.VideoFrame.from_ndarray(even_HWC).reformat(
            format="yuv420p",
            dst_colorspace="ITU709",
            dst_color_range="MPEG",
            interpolation="BICUBIC",
        )
        np.testing.assert_array_equal(found.to_ndarray(), wanted.to_ndarray())


@pytest.mark.parametrize(
    "frame_HWC",
    [np.zeros((8, 6, 3), np.uint8), np.zeros((8, 8, 3)), np.zeros((8, 8, 1), np.uint8)],
)
def test_a_frame_that_is_not_as_the_first_is_an_error_and_leaves_nothing(
    tmp_path: Path, frame_HWC: np.ndarray
):
    with (
        pytest.raises(ValueError, match="not as the first"),
        VideoWriter(tmp_path / "out.mp4", 25) as writer,
    ):
        writer.write(np.zeros((8, 8, 3), np.uint8))
        writer.write(frame_HWC)
    assert not list(tmp_path.iterdir())


def test_interrupted_writing_leaves_nothing(tmp_path: Path):
    with (
        pytest.raises(KeyboardInterrupt),
        VideoWriter(tmp_path / "a.mp4", 25) as writer,
    ):
        for _ in range(100):
            writer.write(np.zeros((16, 16, 3), np.uint8))
        assert list(tmp_path.iterdir())
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
