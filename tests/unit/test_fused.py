"""Layers that are computed at once, and the memory format of what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.utils._python_dispatch import TorchDispatchMode

from taehv import TAEHV, VARIANTS, StreamingTAEHV, fused
from taehv.losses import Targets, training_losses
from taehv.sections import Loss

aten = torch.ops.aten
PREVIEWS = [
    {"decoder_time_upscale": (False, False), "decoder_space_upscale": (True,)},
    {"decoder_time_upscale": (True, False), "decoder_space_upscale": (False, True)},
]


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs are fused as large ones are, and others' graphs are forgotten."""
    monkeypatch.setattr(fused, "pays", lambda *inputs: True)
    torch._dynamo.reset()


def is_channels_last(x_BCHW: Tensor) -> bool:
    return x_BCHW.is_contiguous(memory_format=torch.channels_last)


def has_other_layout(arguments: tuple[Any, ...], op: object) -> bool | None:
    """Whether a convolution has an activation or its gradient in another layout.

    None for what is no convolution.
    """
    if op is aten.convolution.default:
        return not is_channels_last(arguments[0])
    if op is aten.convolution_backward.default:
        return not all(map(is_channels_last, arguments[:2]))
    return None


class Convolutions(TorchDispatchMode):
    """Notes of each convolution that runs whether its layout is another."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_dispatch__(
        self, op: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        other = has_other_layout(args, op)
        if other is not None:
            self.found.append(other)
        return op(*args, **(kwargs or {}))


def compile_with(parts: list[nn.Module], forward: Callable, backward: Callable) -> None:
    """Compile as inductor would, with these as the compilers of graphs."""
    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=backward,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    for part in parts:
        part.compile(fullgraph=True, dynamic=False, backend=backend)


def video(
    model: TAEHV,
    frames: int = 8,
    dtype: torch.dtype = torch.float32,
    cells: tuple[int, int] = (3, 2),
) -> Tensor:
    """Frames of noise of two videos, so many latents high and wide."""
    generator = torch.Generator().manual_seed(1)
    size = [model.variant.space_factor * cell for cell in cells]
    shape = (2, frames, 3, *size)
    return torch.rand(shape, generator=generator, dtype=dtype)


def train(model: TAEHV, frames_NTCHW: Tensor) -> dict[str, Tensor]:
    """A model's losses as a plain autoencoder, and its parameters' gradients."""
    model.zero_grad()
    settings = Loss(latent_scale_weight=1.0, temporal_weight=1.0)
    terms = training_losses(model, Targets(frames_NTCHW), settings)
    terms["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {**terms, **gradients}


def perturbed(name: str, **switches: Any) -> TAEHV:
    """New weights with noise, so that no block is its skip connection alone."""
    torch.manual_seed(0)
    model = TAEHV(name, **switches).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_same_losses_and_gradients(name: str) -> None:
    model = perturbed(name)
    frames = 2 * model.variant.time_factor
    frames_NTCHW = video(model, frames, torch.float64, cells=(2, 1))[:1]
    with Convolutions() as fewer:
        found = train(model, frames_NTCHW)
    model.fused = False
    with Convolutions() as all_of_them:
        expected = train(model, frames_NTCHW)
    # Forward and backward; super decoders have a pair at their end alone.
    less = 2 * (4 if model.variant.decoder == "super" else 6)
    assert len(fewer.found) == len(all_of_them.found) - less
    for key, value in expected.items():
        scale = value.abs().max()
        assert scale > 0 and (found[key] - value).abs().max() <= 1e-12 * scale, key


@torch.no_grad()
@pytest.mark.parametrize("switches", PREVIEWS)
@pytest.mark.parametrize("name", ["taehv", "taew2_2_super"])
def test_same_previews(name: str, switches: dict[str, Any]) -> None:
    model = perturbed(name, **switches)
    latents_NTCHW = model.encode_video(video(model, dtype=torch.float64))
    results = []
    for model.fused in (True, False):
        results.append(model.decode_video(latents_NTCHW, clamp=False))
    difference = (results[0] - results[1]).abs().max()
    assert 0 < difference <= 1e-12 * results[1].abs().max()


@pytest.mark.parametrize("name", ["taehv", "taew2_2_super", "taeltx2_3_wide"])
def test_same_in_a_stream(name: str) -> None:
    model = perturbed(name)
    results = []
    for model.fused in (True, False):
        stream = StreamingTAEHV(model)
        latents = stream.encode(video(model, dtype=torch.float64))
        results.append(torch.cat([x for z in latents for x in stream.decode(z)], 1))
    assert (results[0] - results[1]).abs().max() <= 1e-12


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("name", ["taehv", "taew2_2_super", "taeltx2_3_wide"])
def test_convolutions_find_channels_last(name: str, is_fused: bool) -> None:
    """Of frames in any layout, forward and backward; else cuDNN copies them around."""
    model = TAEHV(name)
    model.fused = is_fused
    with Convolutions() as convolutions:
        train(model, video(model, 16))
    assert len(convolutions.found) > 100
    assert not any(convolutions.found)


@pytest.mark.parametrize("name", ["taehv", "taew2_2_super"])
def test_compiled_convolutions_find_channels_last(name: str) -> None:
    model, found = TAEHV(name), []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        for node in graph.graph.nodes:
            values = [getattr(a, "meta", {}).get("val") for a in node.args[:2]]
            other = has_other_layout(tuple(values), node.target)
            if other is not None:
                found.append(other)
        return make_boxed_func(graph)

    compile_with([model.encoder, model.decoder], look, look)
    train(model, video(model, 8))
    assert len(found) > 100
    assert not any(found)


def test_small_inputs_are_not_worth_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    second = torch.empty(64, 64, 3, 3)
    assert fused.pays(torch.empty(2, 32, 4, 8), second)
    assert not fused.pays(torch.empty(1, 32, 7, 9), second)


def kept_bytes(model: TAEHV, frames_NTCHW: Tensor) -> int:
    """How much a forward pass keeps for the backward pass, parameters apart."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        latents_NTCHW = model.encode_video(frames_NTCHW)
        decoded_NTCHW = model.decode_video(latents_NTCHW, clamp=False)
    assert decoded_NTCHW.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("name", ["taehv", "taew2_2_super"])
def test_checkpointing_keeps_less_and_gives_the_same(name: str) -> None:
    model = perturbed(name)
    frames_NTCHW = video(model, dtype=torch.float64, cells=(2, 1))
    expected, all_of_it = train(model, frames_NTCHW), kept_bytes(model, frames_NTCHW)
    model.checkpointing = True
    with Convolutions() as convolutions:
        found = train(model, frames_NTCHW)
    assert not any(convolutions.found)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert kept_bytes(model, frames_NTCHW) < 0.25 * all_of_it


def test_checkpointing_compiles_to_graphs_that_keep_less() -> None:
    kept = []
    weights = {p.shape for p in TAEHV("taehv").parameters()}

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        kept.append(sum(x.nbytes for x in inputs if x.shape not in weights))
        return make_boxed_func(graph)

    results = []
    for checkpointing in (False, True):
        model = perturbed("taehv")
        model.checkpointing = checkpointing
        compile_with([model.encoder], lambda graph, _: make_boxed_func(graph), count)
        frames_NTCHW = video(model, 8, torch.float64, cells=(2, 1))
        results.append(train(model, frames_NTCHW))
    for key, value in results[0].items():
        scale = value.abs().max()
        assert (results[1][key] - value).abs().max() <= 1e-12 * scale, key
    assert kept[1] < 0.5 * kept[0]
