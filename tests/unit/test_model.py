from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import golden_vectors
import pytest
import torch
import torch.nn.functional as F
from golden_vectors import MANIFEST, assert_same, cases
from torch import Tensor

from taehv import TAEHV, VARIANTS
from taehv.checkpoint import save_weights_only
from taehv.errors import UserError
from taehv.model import TGrow, TPool, VideoSequential
from taehv.pretrained import initial_model, load_model
from taehv.sections import Model
from taehv.weights import save_weights

LTX = ["taeltx_2", "taeltx2_3", "taeltx2_3_wide"]


@pytest.fixture(scope="module", params=VARIANTS)
def published(request: pytest.FixtureRequest) -> TAEHV:
    """Each variant in turn, with the weights of its golden vectors."""
    return golden_vectors.formula_model(request.param)


@pytest.fixture(scope="module", params=VARIANTS)
def untrained(request: pytest.FixtureRequest) -> TAEHV:
    """Each variant in turn, with new weights: as such its blocks remember nothing."""
    torch.manual_seed(0)
    return TAEHV(request.param)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def noise(model: TAEHV, frames: int, cells: int = 1) -> Tensor:
    """Frames of noise, `cells` latents wide and high."""
    side = cells * model.variant.space_factor
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, frames, 3, side, side, generator=generator)


def changed(a_NTCHW: Tensor, b_NTCHW: Tensor) -> list[int]:
    """The frames in which two videos differ."""
    differs_NT = (a_NTCHW != b_NTCHW).flatten(2).any(2)
    return differs_NT.any(0).nonzero().flatten().tolist()


# The published function


def test_every_published_variant_is_there() -> None:
    assert set(VARIANTS) == set(MANIFEST["variants"])


def test_state_dict_is_the_published_one(published: TAEHV) -> None:
    entry = MANIFEST["variants"][published.variant_name]
    shapes = {key: list(v.shape) for key, v in published.state_dict().items()}
    assert shapes == entry["state_dict"]
    assert sum(p.numel() for p in published.parameters()) == entry["parameters"]
    assert published.variant.time_factor == entry["t_downscale"]
    assert published.time_upscale == entry["t_upscale"]


@pytest.mark.parametrize("parallel", [True, False])
def test_golden_vectors(published: TAEHV, parallel: bool) -> None:
    for case in cases(published.variant_name):
        latents_NTCHW = published.encode_video(case["x"], parallel)
        assert_same(latents_NTCHW, case["encoded"])
        assert_same(published.decode_video(case["z"], parallel), case["decoded"])


@pytest.mark.parametrize("preview", ["time_off", "time_space_off", "half_time"])
def test_previews(preview: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    state_dict = golden_vectors.formula_state_dict("taehv")
    save_weights(path, state_dict, {"variant": "taehv"})
    model = TAEHV.from_pretrained(path, **MANIFEST["previews"][preview])
    arrays = golden_vectors.vectors("taehv_previews")
    assert_same(model.decode_video(arrays["z"]), arrays[preview])


def test_switches_cannot_add_what_the_variant_lacks() -> None:
    with pytest.raises(UserError, match=r"switch off some of \(False, True, True\)"):
        TAEHV("taehv", decoder_time_upscale=(True, True, True))
    with pytest.raises(UserError, match="decoder_space_upscale"):
        TAEHV("taehv", decoder_space_upscale=(True,) * 4)


def test_unclamped_output_exceeds_the_range(published: TAEHV) -> None:
    z_NTCHW = 10 * cases(published.variant_name)[0]["z"]
    free_NTCHW = published.decode_video(z_NTCHW, clamp=False)
    assert free_NTCHW.min() < 0 and free_NTCHW.max() > 1
    assert torch.equal(published.decode_video(z_NTCHW), free_NTCHW.clamp(0, 1))


# Alignment


@pytest.mark.parametrize(
    ("name", "frames", "latents", "returned", "target"),
    [
        ("taehv", 1, 1, 1, 1),
        ("taehv", 4, 1, 1, 1),
        ("taehv", 12, 3, 9, 9),
        ("taehv", 13, 4, 13, 13),
        ("taehv", 14, 4, 13, 13),
        ("taeltx_2", 8, 1, 1, 1),
        ("taeltx_2", 17, 3, 17, 17),
        ("taeltx_2", 24, 3, 17, 17),
        ("taecvx", 12, 3, 9, 9),
        ("taecvx", 16, 4, 16, 16),
        ("taecvx", 17, 5, 17, 17),
        ("taecvx", 13, 4, 16, 13),
        ("taeh3", 3, 2, 5, 3),
        ("taeh3", 17, 2, 5, 5),
        ("taeh3", 18, 7, 22, 18),
        ("taeh3", 22, 7, 22, 22),
        ("taeh3", 34, 7, 22, 22),
        ("taeh3", 39, 12, 39, 39),
    ],
)
def test_counts(
    name: str, frames: int, latents: int, returned: int, target: int
) -> None:
    variant = VARIANTS[name]
    assert variant.latents_of(frames) == latents
    assert variant.frames_of(latents) == returned
    assert variant.target_frames(frames) == target


def test_counts_are_those_of_real_videos(untrained: TAEHV) -> None:
    variant = untrained.variant
    for frames in (1, 2, 5, 8, 9, 16, 17, 18, 23):
        latents_NTCHW = untrained.encode_video(noise(untrained, frames))
        decoded_NTCHW = untrained.decode_video(latents_NTCHW)
        assert latents_NTCHW.shape[1] == variant.latents_of(frames)
        assert decoded_NTCHW.shape[1] == variant.frames_of(latents_NTCHW.shape[1])
        assert 1 <= variant.target_frames(frames) <= decoded_NTCHW.shape[1]


@pytest.mark.parametrize("name", VARIANTS)
def test_counts_are_those_of_the_kept_frames(name: str) -> None:
    variant = VARIANTS[name]
    for upscale in (1, 2, variant.time_factor):
        for latents in range(1, 24):
            runs = variant.kept_frames(latents, upscale)
            kept = sum(run.stop - run.start for run in runs)
            assert variant.frames_of(latents, upscale) == kept


@pytest.mark.parametrize("name", VARIANTS)
def test_frames_padded_so_that_all_come_back(name: str) -> None:
    variant = VARIANTS[name]
    for frames in range(1, 60):
        padded = variant.padded_frames(frames)
        assert variant.target_frames(padded) >= frames
        for fewer in range(frames, padded):
            assert variant.target_frames(fewer) < frames
        assert variant.padded_frames(padded) == padded


def frames_of_latents(
    model: TAEHV, chosen: Iterable[int], latents: int
) -> list[list[int]]:
    """Which returned frames each chosen one of so many latents alone makes."""
    zeros_NTCHW = torch.zeros(1, latents, model.variant.latent_channels, 1, 1)
    still_NTCHW, found = model.decode_video(zeros_NTCHW), []
    for latent in chosen:
        z_NTCHW = zeros_NTCHW.clone()
        z_NTCHW[:, latent] = 1
        found.append(changed(still_NTCHW, model.decode_video(z_NTCHW)))
    return found


def expected_frames(name: str, latent: int, latents: int) -> list[int]:
    """The same from the rules: written as a list of frames and not as a trim."""
    if name == "taecvx" and latents % 2 == 0:
        return list(range(4 * latent, 4 * latent + 4))
    if name == "taeh3":
        first = 17 * (latent // 5) + 4 * (latent % 5) - 3
        end = 17 * ((latents - 1) // 5) + 5
        start = 17 * (latent // 5)
        return [f for f in range(first, first + 4) if start <= f < end]
    factor = 8 if name in LTX else 4
    return [f for f in range(factor * (latent - 1) + 1, factor * latent + 1) if f >= 0]


def test_each_latent_makes_its_frames(untrained: TAEHV) -> None:
    name = untrained.variant_name
    for latents in (1, 2, 6, 7):
        found = frames_of_latents(untrained, range(latents), latents)
        for latent, frames in enumerate(found):
            assert frames == expected_frames(name, latent, latents), (latent, latents)


def test_each_frame_goes_into_its_latent(untrained: TAEHV) -> None:
    variant, length = untrained.variant, 22
    a_NTCHW = noise(untrained, length)
    latents_NTCHW = untrained.encode_video(a_NTCHW)
    for frame in range(length - 1):
        b_NTCHW = a_NTCHW.clone()
        b_NTCHW[:, frame] = 1 - b_NTCHW[:, frame]
        latent = frame // variant.time_factor
        if variant.trim == "chunks":
            latent = frame // 17 * 5 + (frame % 17 + 3) // 4
        kept = [latent] if latent < latents_NTCHW.shape[1] else []
        moved = changed(latents_NTCHW, untrained.encode_video(b_NTCHW))
        # The padding repeats no frame but the last one, which is left out here.
        assert moved == kept, frame


def carry_first_channel(model: TAEHV) -> None:
    """Make a latent its last frame's brightness, and its decoded frames the same."""
    for parameter in model.parameters():
        parameter.zero_()
    for block in [*model.encoder, *model.decoder]:
        if isinstance(block, torch.nn.Conv2d):
            middle = block.kernel_size[0] // 2
            block.weight[:, 0, middle, middle] = 1
        elif isinstance(block, TPool | TGrow):
            width = min(block.conv.weight.shape[:2])
            block.conv.weight[::width, -width] = 1


def latest_frame(name: str, frame: int, frames: int) -> int:
    """The last frame that the latent of output frame `frame` saw."""
    if name == "taeh3":
        start = frame // 17 * 17
        return min(start + math.ceil((frame - start) / 4) * 4, frames - 1)
    if name == "taecvx" and math.ceil(frames / 4) % 2 == 0:
        return min(frame // 4 * 4 + 3, frames - 1)
    factor = 8 if name in LTX else 4
    return min(math.ceil(frame / factor) * factor + factor - 1, frames - 1)


@pytest.fixture(scope="module", params=VARIANTS)
def carrier(request: pytest.FixtureRequest) -> TAEHV:
    """Each variant in turn, whose frames carry their brightness through latents."""
    model = TAEHV(request.param)
    with torch.no_grad():
        carry_first_channel(model)
    return model


@pytest.mark.parametrize("frames", [1, 8, 13, 17, 22, 24, 39])
def test_frames_that_carry_their_number(carrier: TAEHV, frames: int) -> None:
    model, name = carrier, carrier.variant_name
    side = model.variant.space_factor
    numbers = torch.arange(1.0, frames + 1) / 100
    frames_NTCHW = numbers.view(1, -1, 1, 1, 1).expand(-1, -1, 3, side, side)
    decoded_NTCHW = model.decode_video(model.encode_video(frames_NTCHW))
    if model.variant.decoder != "super":
        decoded_NTCHW = 3 * torch.atanh(decoded_NTCHW / 3)  # undo the Clamp
    target = model.variant.target_frames(frames)
    read = (100 * decoded_NTCHW[0, :target, 0, 0, 0] - 1).round().int().tolist()
    assert read == [latest_frame(name, frame, frames) for frame in range(target)]


@pytest.mark.parametrize("latents", [1, 6, 11])
def test_chunked_decoding_shows_no_padding(latents: int) -> None:
    model = golden_vectors.formula_model("taeh3")
    z_NTCHW = torch.randn(1, latents + 1, 24, 1, 1)
    longer_NTCHW = model.decode_video(z_NTCHW)
    shown_NTCHW = model.decode_video(z_NTCHW[:, :latents])
    assert shown_NTCHW.shape[1] == latents // 5 * 17 + 1
    assert_same(shown_NTCHW, longer_NTCHW[:, : shown_NTCHW.shape[1]])
    assert (shown_NTCHW.flatten(2).amax(2) > 0).all()


def test_memory_looks_back_and_never_ahead(published: TAEHV) -> None:
    """Trained blocks carry a latent on to every later frame and to none before."""
    name = published.variant_name
    for latents in (4, 5):
        first = expected_frames(name, 1, latents)[0]
        (moved,) = frames_of_latents(published, [1], latents)
        assert moved == list(range(first, published.variant.frames_of(latents)))


# VideoSequential


@pytest.mark.parametrize("name", ["taew2_2_super", "taeltx2_3_wide"])
def test_compiles_to_one_graph(name: str) -> None:
    model = golden_vectors.formula_model(name)
    frames_NTCHW = noise(model, 8, cells=2)
    latents_NTCHW = model.encode_video(frames_NTCHW)
    decoded_NTCHW = model.decode_video(latents_NTCHW)
    keys = list(model.state_dict())
    torch._dynamo.reset()
    for blocks in (model.encoder, model.decoder):
        blocks.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    assert_same(model.encode_video(frames_NTCHW), latents_NTCHW)
    assert_same(model.decode_video(latents_NTCHW), decoded_NTCHW)
    assert list(model.state_dict()) == keys


def test_every_call_goes_through_the_sequentials() -> None:
    """FSDP2 gathers the weights in the hooks of these modules."""
    model = TAEHV("taeh3")
    calls: list[torch.nn.Module] = []
    for blocks in (model.encoder, model.decoder):
        assert isinstance(blocks, VideoSequential)
        blocks.register_forward_pre_hook(lambda module, _: calls.append(module))
    for parallel in (True, False):
        calls.clear()
        latents_NTCHW = model.encode_video(noise(model, 5), parallel)
        assert set(calls) == {model.encoder}
        calls.clear()
        model.decode_video(latents_NTCHW, parallel)
        assert set(calls) == {model.decoder}


@pytest.mark.parametrize("parallel", [True, False])
def test_gradients_reach_every_parameter(parallel: bool) -> None:
    model = golden_vectors.formula_model("taehv")
    with torch.enable_grad():
        latents_NTCHW = model.encode_video(noise(model, 8, cells=2), parallel)
        model.decode_video(
            latents_NTCHW, parallel, clamp=False
        ).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# Mistakes


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((4, 3, 16, 16), "N T C H W"),
        ((1, 3, 4, 16, 16), "C = 3"),
        ((1, 0, 3, 16, 16), "T >= 1"),
        ((1, 4, 3, 24, 16), "multiples of 16"),
    ],
)
def test_frames_of_the_wrong_shape(shape: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match) as raised:
        TAEHV("taew2_2").encode_video(torch.zeros(shape))
    assert "\n" not in str(raised.value)


def test_latents_of_the_wrong_shape_and_frames_of_bytes() -> None:
    model = TAEHV("taehv")
    with pytest.raises(ValueError, match="C = 16"):
        model.decode_video(torch.zeros(1, 1, 48, 2, 2))
    with pytest.raises(ValueError, match="divided by 255"):
        model.encode_video(torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8))


def test_unknown_variant_lists_the_known() -> None:
    with pytest.raises(UserError, match="taehv, taecvx"):
        TAEHV("taehv2")


# New weights


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def natural_video(model: TAEHV, frames: int) -> Tensor:
    """A soft picture that moves: brightness 0.45, contrast 0.25."""
    side = 8 * model.variant.space_factor
    coarse = torch.randn(1, 3, side // 8 + 4, side // 8 + 4)
    picture = F.interpolate(coarse, scale_factor=8, mode="bicubic")
    picture = (0.45 + 0.25 * picture[0] / picture.std()).clamp(0, 1)
    views = [picture[:, t : t + side, t : t + side] for t in range(frames)]
    return torch.stack(views)[None]


def test_new_weights_keep_the_scale(untrained: TAEHV) -> None:
    levels: list[float] = []
    hooks = [
        block.register_forward_hook(lambda *args: levels.append(rms(args[2])))
        for block in [*untrained.encoder, *untrained.decoder][:-1]
    ]
    torch.manual_seed(0)
    latents_NTCHW = untrained.encode_video(natural_video(untrained, 12))
    untrained.decode_video(torch.randn_like(latents_NTCHW))
    for hook in hooks:
        hook.remove()
    assert 0.4 < rms(latents_NTCHW) < 1.6
    assert min(levels) > 0.45 and max(levels) < 2.2


@torch.no_grad()
def test_new_weights_keep_colors(untrained: TAEHV) -> None:
    torch.manual_seed(0)
    size = 2 * untrained.variant.space_factor
    colors_N1C11 = torch.rand(4, 3)[:, None, :, None, None] * 0.8 + 0.1
    frames_NTCHW = colors_N1C11.expand(-1, 17, -1, size, size)
    latents_NTCHW = untrained.encode_video(frames_NTCHW)
    decoded_NTCHW = untrained.decode_video(latents_NTCHW, clamp=False)
    # MiniMax-H3's first latent is darkened by the black frames before each chunk.
    inside = decoded_NTCHW[:, 1:5, :, size // 4 : -size // 4, size // 4 : -size // 4]
    # The other channels add some random detail.
    assert (inside.mean((1, 3, 4)) - colors_N1C11.flatten(1)).abs().max() < 0.2
    assert 0.01 < inside.std((1, 3, 4)).mean() < 0.2


def test_grown_frames_begin_as_copies(untrained: TAEHV) -> None:
    for block in untrained.decoder:
        if isinstance(block, TGrow) and block.stride == 2:
            first, second = block.conv.weight.chunk(2)
            assert torch.equal(first, second) and first.std() > 0


@pytest.mark.parametrize("name", ["taehv", "taew2_2_super", "taeltx2_3_wide"])
def test_weights_as_pytorch_draws_them(name: str) -> None:
    ours, theirs = TAEHV(name), TAEHV(name)
    ours.init_weights(torch.Generator().manual_seed(3), "pytorch")
    torch.manual_seed(3)
    for module in theirs.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.reset_parameters()
    theirs.decoder[-1].bias.fill_(0.5)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, msg=key)


def test_settings_choose_how_weights_start() -> None:
    first, second = (
        initial_model(Model(initialization=choice)).decoder[3].conv[-1].weight
        for choice in ("he", "pytorch")
    )
    assert not first.any() and second.all()


def test_weights_elsewhere(tmp_path: Path) -> None:
    url, model = f"file://{tmp_path}/checkpoint", TAEHV("taecvx")
    save_weights_only(tmp_path / "checkpoint", model.state_dict(), {})
    read, _ = load_model(url, "taecvx")
    begun = initial_model(Model(variant="taecvx", checkpoint=url))
    for key, value in model.state_dict().items():
        assert torch.equal(read.state_dict()[key], value)
        assert torch.equal(begun.state_dict()[key], value)


def test_new_weights_fill_a_meta_model() -> None:
    """Every parameter is set, and by the given generator alone."""
    with torch.device("meta"):
        empty = TAEHV("taew2_2_super")
    assert all(p.is_meta for p in empty.parameters())
    for model in (models := [empty.to_empty(device="cpu"), TAEHV("taew2_2_super")]):
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
        model.init_weights(torch.Generator().manual_seed(3))
    first, second = (model.state_dict() for model in models)
    for key, value in first.items():
        assert value.isfinite().all() and torch.equal(value, second[key]), key
