"""Streams that replay their calls give what they give without.

Where there is no GPU, a tape stands for a CUDA graph: it records every operation on
tensors without its effect, and replays it on the very same tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from taehv import TAEHV, StreamingTAEHV, replay


class Tape(TorchDispatchMode):
    """Stands for a torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable:
            self.before.append((args[0], args[0].clone()))
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tensors(result)))
        return result

    def pool(self) -> None:
        pass

    def replay(self) -> None:
        for func, args, kwargs, places in self.calls:
            results = tensors(func(*args, **kwargs))
            for place, result in zip(places, results, strict=True):
                if place.data_ptr() != result.data_ptr():
                    place.copy_(result)


def tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def record(tape: Tape, **_: Any) -> Iterator[None]:
    """Stands for torch.cuda.graph."""
    with tape:
        yield
    for tensor, value in reversed(tape.before):
        tensor.copy_(value)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(replay, "can_record", lambda x_NTCHW: True)
    monkeypatch.setattr(replay, "WARMUP_CALLS", 1)


def new_model(name: str, **switches: Any) -> TAEHV:
    """One whose memory blocks do look at the frame before."""
    model = TAEHV(name, **switches)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator, initialization="pytorch")
    return model


def coded(
    stream: StreamingTAEHV, x_NTCHW: Tensor, lengths: tuple[int, ...]
) -> list[Tensor]:
    """What comes out while frames, then as many latents, come in by these lengths."""
    ready = []
    model, factor = stream.model, stream.variant.space_factor
    N, T, _, H, W = x_NTCHW.shape
    generator = torch.Generator().manual_seed(T)
    z_NTCHW = torch.randn(
        (N, T, model.variant.latent_channels, H // factor, W // factor),
        generator=generator,
    ).to(x_NTCHW)
    for code, rest_NTCHW in ((stream.encode, x_NTCHW), (stream.decode, z_NTCHW)):
        for length in lengths:
            ready += code(rest_NTCHW[:, :length])
            rest_NTCHW = rest_NTCHW[:, length:]
        assert not rest_NTCHW.shape[1]
    return ready


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    assert all(map(torch.equal, found, expected))


def recordings(stream: StreamingTAEHV) -> int:
    both = (stream._encoder, stream._decoder)
    return sum(len(continuation._recordings) for continuation in both)


def frames(model: TAEHV, T: int, size: int = 1, N: int = 1) -> Tensor:
    side = size * model.variant.space_factor
    generator = torch.Generator().manual_seed(T)
    return torch.rand(N, T, 3, side, side, generator=generator)


@pytest.mark.usefixtures("tapes")
@pytest.mark.parametrize("name", ["taecvx", "taew2_2_super", "taeltx2_3", "taeh3"])
def test_same_by_every_length_and_after_a_reset(name: str) -> None:
    model = new_model(name)
    streams = [StreamingTAEHV(model, trim=True, graph=graph) for graph in (True, False)]
    results: list[list[Tensor]] = [[], []]
    for lengths in ((2, 2, 1, 2, 1, 2), (1, 2, 2, 2, 2)):
        x_NTCHW = frames(model, sum(lengths))
        for stream, ready in zip(streams, results, strict=True):
            ready += coded(stream, x_NTCHW, lengths)
            stream.reset()
    assert_same(*results)
    assert recordings(streams[0]) >= 2 and recordings(streams[1]) == 0


@pytest.mark.usefixtures("tapes")
def test_frame_by_frame_and_of_other_sizes() -> None:
    model = new_model(
        "taew2_2", decoder_time_upscale=(False, True), decoder_space_upscale=(True,)
    )
    streams = [StreamingTAEHV(model, graph=graph) for graph in (True, False)]
    results: list[list[Tensor]] = [[], []]
    for size, N in ((2, 1), (1, 2)):
        x_NTCHW = frames(model, 9, size, N)
        for stream, ready in zip(streams, results, strict=True):
            ready += coded(stream, x_NTCHW, (1,) * 9)
            ready += stream.flush()
    assert_same(*results)
    # A call of the encoder for each count of frames that wait, and one of the decoder.
    assert recordings(streams[0]) == 4 + 1


@pytest.mark.usefixtures("tapes")
def test_weights_may_change() -> None:
    model = new_model("taehv")
    streams = [StreamingTAEHV(model, graph=graph) for graph in (True, False)]

    def assert_agree(dtype: torch.dtype) -> None:
        x_NTCHW = frames(model, 8).to(dtype)
        assert_same(*(coded(stream, x_NTCHW, (4,) * 2) for stream in streams))

    assert_agree(torch.float32)
    with torch.no_grad():
        model.decoder[1].weight.mul_(2)
    assert_agree(torch.float32)
    recorded = recordings(streams[0])
    model.encoder[0].weight.data = model.encoder[0].weight * 2
    assert_agree(torch.float32)
    assert recordings(streams[0]) == recorded + 1
    model.double()
    for stream in streams:
        stream.reset()
    assert_agree(torch.float64)
    assert recordings(streams[0]) == recorded


@pytest.mark.usefixtures("tapes")
def test_large_calls_are_recorded_on_demand_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = new_model("taehv")
    # Four frames of 8 x 8 go into each call, and sixteen come out.
    monkeypatch.setattr(replay, "MOST_PIXELS", 8 * 64)
    for graph, encoder, decoder in (("auto", 1, 0), (True, 1, 1), (False, 0, 0)):
        stream = StreamingTAEHV(model, graph=graph)
        coded(stream, frames(model, 8), (4, 4))
        assert len(stream._encoder._recordings) == encoder
        assert len(stream._decoder._recordings) == decoder


@pytest.mark.usefixtures("tapes")
def test_a_graph_that_does_not_fit_is_done_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = new_model("taehv")
    x_NTCHW = frames(model, 9)
    lengths = (1,) * 9  # some of the frames wait for others
    expected = coded(StreamingTAEHV(model, graph=False), x_NTCHW, lengths)

    def full(tape: Tape, **_: Any) -> Iterator[None]:
        with record(tape):
            yield
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "graph", contextlib.contextmanager(full))
    assert_same(coded(StreamingTAEHV(model), x_NTCHW, lengths), expected)
    with pytest.raises(torch.OutOfMemoryError):
        coded(StreamingTAEHV(model, graph=True), x_NTCHW, lengths)


def test_a_stream_outlives_inference_mode() -> None:
    model = new_model("taehv")
    stream = StreamingTAEHV(model)
    with torch.inference_mode():
        first = coded(stream, frames(model, 4), (1,) * 4)
    stream.reset()
    assert_same(coded(stream, frames(model, 4), (1,) * 4), first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("name", ["taehv", "taew2_2_super", "taeh3"])
def test_same_on_a_gpu(name: str, is_compiled: bool) -> None:
    """Twelve latents and as many frames, before and after a reset."""
    model = new_model(name).to("cuda", torch.float16)
    if is_compiled:
        torch._dynamo.reset()
        model.decoder.compile(fullgraph=True, dynamic=False)
    streams = [StreamingTAEHV(model, graph=graph) for graph in ("auto", False)]
    results: list[list[Tensor]] = [[], []]
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        for _ in range(2):
            x_NTCHW = frames(model, 12, 8).to("cuda", torch.float16)
            for stream, ready in zip(streams, results, strict=True):
                ready += coded(stream, x_NTCHW, (1,) * 12)
                stream.reset()
    assert_same(*results)
    assert recordings(streams[0]) >= 2 and recordings(streams[1]) == 0
