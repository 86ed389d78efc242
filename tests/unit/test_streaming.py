from __future__ import annotations

import io

import golden_vectors
import pytest
import torch
from golden_vectors import assert_same, cases
from torch import Tensor

from taehv import TAEHV, VARIANTS, StreamingTAEHV


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest) -> TAEHV:
    """Each variant in turn, with the weights of its golden vectors."""
    return golden_vectors.formula_model(request.param)


@pytest.fixture(scope="module")
def chunked() -> TAEHV:
    return golden_vectors.formula_model("taeh3")


def pieces(x_NTCHW: Tensor, lengths: list[int]) -> list[Tensor]:
    """Cut into pieces of these lengths in turn."""
    cuts = []
    while x_NTCHW.shape[1]:
        length = lengths[len(cuts) % len(lengths)]
        cuts.append(x_NTCHW[:, :length])
        x_NTCHW = x_NTCHW[:, length:]
    return cuts


def encode(stream: StreamingTAEHV, x_NTCHW: Tensor, lengths: list[int]) -> Tensor:
    ready = [z for piece in pieces(x_NTCHW, lengths) for z in stream.encode(piece)]
    ready += stream.flush_encoder()
    assert all(z.shape[1] == 1 for z in ready)
    return torch.cat(ready, 1)


def decode(stream: StreamingTAEHV, z_NTCHW: Tensor, lengths: list[int]) -> Tensor:
    ready = [x for piece in pieces(z_NTCHW, lengths) for x in stream.decode(piece)]
    ready += stream.flush_decoder()
    assert all(x.shape[1] == 1 for x in ready)
    return torch.cat(ready, 1)


@pytest.mark.parametrize("lengths", [[1], [3, 1, 5], [100]])
def test_golden_vectors(model: TAEHV, lengths: list[int]) -> None:
    for case in cases(model.variant_name):
        stream = StreamingTAEHV(model, total_latents=case["z"].shape[1])
        assert_same(encode(stream, case["x"], lengths), case["encoded"])
        assert_same(decode(stream, case["z"], lengths), case["decoded"])


def test_same_as_parallel_and_reusable_after_a_flush(model: TAEHV) -> None:
    side = model.variant.space_factor
    total = model.variant.latents_of(10)
    stream = StreamingTAEHV(model, total_latents=total)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        x_NTCHW = torch.rand(2, 10, 3, side, side, generator=generator)
        with torch.no_grad():
            expected_NTCHW = model.decode_video(model.encode_video(x_NTCHW))
        frames = []
        for x_N1CHW in x_NTCHW.split(1, 1):
            for z_N1CHW in stream.encode(x_N1CHW):
                frames += stream.decode(z_N1CHW)
        assert_same(torch.cat(frames + stream.flush(), 1), expected_NTCHW)


def test_frames_come_as_soon_as_their_latent() -> None:
    model = golden_vectors.formula_model("taehv")
    stream = StreamingTAEHV(model)
    frame_N1CHW = torch.rand(1, 1, 3, 8, 8)
    assert [len(stream.encode(frame_N1CHW)) for _ in range(8)] == [0, 0, 0, 1] * 2
    latents_N1CHW = torch.randn(1, 1, 16, 1, 1)
    assert [len(stream.decode(latents_N1CHW)) for _ in range(3)] == [1, 4, 4]


def test_reset_forgets_a_begun_video() -> None:
    model = golden_vectors.formula_model("taehv")
    stream = StreamingTAEHV(model)
    z_NTCHW = torch.randn(1, 2, 16, 1, 1)
    stream.encode(torch.rand(1, 3, 3, 8, 8))
    first_NTCHW = torch.cat(stream.decode(z_NTCHW), 1)
    again_NTCHW = torch.cat(stream.decode(z_NTCHW), 1)
    stream.reset()
    assert torch.equal(torch.cat(stream.decode(z_NTCHW), 1), first_NTCHW)
    assert not torch.equal(again_NTCHW[:, :5], first_NTCHW)
    assert stream.flush() == []


@pytest.mark.parametrize("frames", [1, 16, 17, 18, 22, 35])
def test_chunks_of_every_length_encode_as_in_parallel(
    chunked: TAEHV, frames: int
) -> None:
    x_NTCHW = torch.rand(1, frames, 3, 16, 16)
    with torch.no_grad():
        expected_NTCHW = chunked.encode_video(x_NTCHW)
    assert_same(encode(StreamingTAEHV(chunked), x_NTCHW, [2]), expected_NTCHW)


@pytest.mark.parametrize("latents", [1, 2, 3, 4, 5, 6, 7, 11, 12])
def test_chunks_of_every_length_decode_as_in_parallel(
    chunked: TAEHV, latents: int
) -> None:
    z_NTCHW = torch.randn(1, latents, 24, 1, 1)
    with torch.no_grad():
        expected_NTCHW = chunked.decode_video(z_NTCHW)
    assert_same(decode(StreamingTAEHV(chunked), z_NTCHW, [1]), expected_NTCHW)


@pytest.mark.parametrize("latents", [2, 3])
def test_parity_must_be_told(latents: int) -> None:
    model = golden_vectors.formula_model("taecvx")
    z_NTCHW = torch.randn(1, latents, 16, 1, 1)
    with pytest.raises(ValueError, match="total_latents= or trim="):
        StreamingTAEHV(model).decode(z_NTCHW)
    with torch.no_grad():
        expected_NTCHW = model.decode_video(z_NTCHW)
    for told in ({"total_latents": latents}, {"trim": latents % 2 == 1}):
        stream = StreamingTAEHV(model, **told)
        assert_same(decode(stream, z_NTCHW, [1]), expected_NTCHW)


def test_previews_stream_too() -> None:
    model = TAEHV(
        "taeh3", decoder_time_upscale=(False, True), decoder_space_upscale=(True,)
    )
    z_NTCHW = torch.randn(1, 12, 24, 2, 2)
    with torch.no_grad():
        expected_NTCHW = model.decode_video(z_NTCHW)
    assert_same(decode(StreamingTAEHV(model), z_NTCHW, [5]), expected_NTCHW)


@pytest.mark.parametrize("name", ["taehv", "taeh3"])
def test_what_is_kept_does_not_grow(name: str) -> None:
    model = TAEHV(name)
    side = 2 * model.variant.space_factor

    def kept_bytes(frames: int) -> int:
        stream = StreamingTAEHV(model)
        for _ in range(frames):
            for z_N1CHW in stream.encode(torch.rand(1, 1, 3, side, side)):
                stream.decode(z_N1CHW)
        stream.model = None
        file = io.BytesIO()
        torch.save(stream, file)  # whole storages, so views cannot hide any
        return len(file.getvalue())

    # Both counts end a chunk, a group of latents and a pool alike.
    assert abs(kept_bytes(102) - kept_bytes(34)) < 1024


def test_no_gradients_are_kept() -> None:
    stream = StreamingTAEHV(TAEHV("taehv"))
    (latents_N1CHW,) = stream.encode(torch.rand(1, 4, 3, 8, 8))
    assert not latents_N1CHW.requires_grad
    assert not stream.decode(latents_N1CHW)[0].requires_grad
