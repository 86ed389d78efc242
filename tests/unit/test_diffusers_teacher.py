"""Built-in teachers: small random VAEs of diffusers' own classes, saved and loaded."""

from __future__ import annotations

import functools
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
import torch._dynamo.testing
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from taehv.errors import UserError
from taehv.sections import Teacher
from taehv.teacher import DiffusersTeacher, check_teacher, load_teacher
from taehv.variants import VARIANTS

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double()


def random(count: int) -> list[float]:
    """Values from 0.5 to 1.5 for a mean or a standard deviation."""
    return (
        torch.rand(count, generator=torch.Generator().manual_seed(3)) + 0.5
    ).tolist()


@dataclass(frozen=True)
class Family:
    """A reference VAE in small."""

    kind: str
    variant: str
    class_name: str
    config: dict[str, Any]
    frames: tuple[int, ...]
    """Legal lengths, the shortest first."""
    size: int = 32
    """Legal height and width."""


WAN2_2 = {
    "base_dim": 4,
    "num_res_blocks": 1,
    "z_dim": 48,
    "latents_mean": random(48),
    "latents_std": random(48)[::-1],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
FAMILIES = {
    "cogvideox": Family(
        "cogvideox",
        "taecvx",
        "AutoencoderKLCogVideoX",
        {
            "block_out_channels": (4, 4, 4, 8),
            "layers_per_block": 1,
            "norm_num_groups": 2,
        },
        (8, 9, 16, 17),
    ),
    "hunyuanvideo": Family(
        "hunyuanvideo",
        "taehv",
        "AutoencoderKLHunyuanVideo",
        {
            "block_out_channels": (4, 4, 4, 8),
            "layers_per_block": 1,
            "norm_num_groups": 2,
        },
        (5, 13, 29),  # more than 16 frames are coded in overlapping parts
    ),
    "hunyuanvideo1_5": Family(
        "hunyuanvideo1_5",
        "taehv1_5",
        "AutoencoderKLHunyuanVideo15",
        {"block_out_channels": (4, 8, 16, 32, 64), "layers_per_block": 1},
        (5, 13),
    ),
    "wan2_1": Family(
        "wan",
        "taew2_1",
        "AutoencoderKLWan",
        {"base_dim": 4, "num_res_blocks": 1},
        (5, 13),
    ),
    "wan2_2": Family("wan", "taew2_2", "AutoencoderKLWan", WAN2_2, (5, 13)),
    "ltx2": Family(
        "ltx2",
        "taeltx_2",
        "AutoencoderKLLTX2Video",
        {
            "block_out_channels": (4, 8, 16, 32),
            "decoder_block_out_channels": (8, 16, 32),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1),
            "scaling_factor": 0.7,
        },
        (9, 25),
        size=64,
    ),
    "minimax_h3": Family(
        "minimax_h3",
        "taeh3",
        "AutoencoderKLMiniMaxH3",
        {
            "block_out_channels": (4, 4, 4, 8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "decoder_num_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_attention_head_dim": 16,
            "decoder_ffn_mult": 2,
            "latents_mean": random(24),
            "latents_std": random(24)[::-1],
        },
        (22, 39),
    ),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a family's VAE, which no test may change."""

    @functools.cache
    def make(name: str) -> Path:
        family = FAMILIES[name]
        with torch.random.fork_rng():
            torch.manual_seed(1)
            vae = getattr(diffusers, family.class_name)(**family.config)
        if name == "ltx2":
            vae.latents_mean.copy_(torch.tensor(random(128)))
            vae.latents_std.copy_(torch.tensor(random(128)[::-1]))
        folder = tmp_path_factory.mktemp("vaes") / name
        vae.save_pretrained(folder)
        return folder

    return make


def load(
    folder: Path, kind: str, compile: bool = False, **how: Any
) -> DiffusersTeacher:
    """The teacher of a folder, by default without random draws."""
    settings = Teacher(kind, str(folder), **{"latents": "mode", **how})
    teacher = load_teacher(settings, CPU, compile)
    assert isinstance(teacher, DiffusersTeacher)
    return teacher


def clips(name: str, count: int, frames: int) -> Tensor:
    """Random frames_NTCHW that a family's teacher takes."""
    size = FAMILIES[name].size
    generator = torch.Generator().manual_seed(2)
    return torch.rand(count, frames, 3, size, size, generator=generator)


def own_vae(name: str, folder: Path) -> nn.Module:
    """What diffusers makes of the folder by itself."""
    vae = getattr(diffusers, FAMILIES[name].class_name)(**FAMILIES[name].config)
    vae.load_state_dict(load_file(folder / WEIGHTS))
    return vae.eval().requires_grad_(False)


def normalised(name: str, z_NCTHW: Tensor, vae: nn.Module) -> Tensor:
    """The latents that a student learns, in double precision, by family."""
    z_CTHWN = z_NCTHW.double().movedim(0, -1)
    if name == "cogvideox":
        pass
    elif name.startswith("hunyuan"):
        z_CTHWN = z_CTHWN * {"hunyuanvideo": 0.476986, "hunyuanvideo1_5": 1.03682}[name]
    else:
        own = vae if name == "ltx2" else vae.config
        mean, std = torch.as_tensor(own.latents_mean), torch.as_tensor(own.latents_std)
        shape = (-1, 1, 1, 1, 1)
        z_CTHWN = (z_CTHWN - mean.view(shape).double()) / std.view(shape).double()
    return z_CTHWN.movedim(-1, 0) * (0.7 if name == "ltx2" else 1)


# Latents and frames


@every_family
def test_latents_and_frames_are_those_of_the_class(
    folder_of: Callable[[str], Path], name: str
) -> None:
    family, frames_NTCHW = FAMILIES[name], clips(name, 2, FAMILIES[name].frames[0])
    teacher, vae = load(folder_of(name), family.kind), own_vae(name, folder_of(name))
    mean_C, std_C = IMAGENET if name == "minimax_h3" else torch.full((2, 3), 0.5)
    shape = (1, 1, 3, 1, 1)
    pixels_NTCHW = (frames_NTCHW.double() - mean_C.view(shape)) / std_C.view(shape)
    means, decoded = [], []
    for pixels_1TCHW in pixels_NTCHW.float().split(1):
        means.append(vae.encode(pixels_1TCHW.transpose(1, 2)).latent_dist.mean)
        decoded.append(vae.decode(means[-1]).sample.transpose(1, 2))
    latents_NTCHW = teacher.encode(frames_NTCHW, [0, 0])
    expected_NTCHW = normalised(name, torch.cat(means), vae).transpose(1, 2)
    assert latents_NTCHW.dtype == torch.float32
    torch.testing.assert_close(
        latents_NTCHW.double(), expected_NTCHW, rtol=0, atol=2e-5
    )
    variant = VARIANTS[family.variant]
    assert latents_NTCHW.shape[1:3] == (
        variant.latents_of(frames_NTCHW.shape[1]),
        variant.latent_channels,
    )
    assert latents_NTCHW.shape[3] == family.size // variant.space_factor
    again_NTCHW = teacher.decode(latents_NTCHW)
    own_NTCHW = torch.cat(decoded) * std_C.view(shape) + mean_C.view(shape)
    assert again_NTCHW.shape == frames_NTCHW.shape
    torch.testing.assert_close(
        again_NTCHW.double(), own_NTCHW.clamp(0, 1).double(), rtol=0, atol=2e-5
    )
    assert 0 <= again_NTCHW.min() < again_NTCHW.max() <= 1


@every_family
def test_legal_lengths_come_back_whole(
    folder_of: Callable[[str], Path], name: str
) -> None:
    family = FAMILIES[name]
    teacher = load(folder_of(name), family.kind)
    for frames in family.frames[1:]:
        check_teacher(
            teacher, teacher.latent_channels, frames, family.size, family.size
        )
        latents_NTCHW = teacher.encode(clips(name, 1, frames), [0])
        assert latents_NTCHW.shape[1] == VARIANTS[family.variant].latents_of(frames)
        assert teacher.decode(latents_NTCHW).shape[1] == frames


@pytest.mark.parametrize("name", ["wan2_1", "minimax_h3"])
def test_a_draw_depends_on_its_seed_alone(
    folder_of: Callable[[str], Path], name: str
) -> None:
    family, frames_NTCHW = FAMILIES[name], clips(name, 3, FAMILIES[name].frames[0])
    teacher = load(folder_of(name), family.kind, latents="sample")
    drawn_NTCHW = teacher.encode(frames_NTCHW, [7, 8, 9])
    alone_NTCHW = teacher.encode(frames_NTCHW[1:2], [8])
    torch.testing.assert_close(drawn_NTCHW[1:2], alone_NTCHW, rtol=0, atol=1e-5)
    other_NTCHW = teacher.encode(frames_NTCHW[1:2], [9])
    assert (other_NTCHW - alone_NTCHW).std() > 0.1
    vae = own_vae(name, folder_of(name))
    mean_C, std_C = IMAGENET if name == "minimax_h3" else torch.full((2, 3), 0.5)
    pixels_NTCHW = (frames_NTCHW - mean_C.view(3, 1, 1)) / std_C.view(3, 1, 1)
    posterior = vae.encode(pixels_NTCHW.float().transpose(1, 2)).latent_dist
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)]
    own_NTCHW = normalised(name, posterior.sample(generators), vae).transpose(1, 2)
    torch.testing.assert_close(drawn_NTCHW.double(), own_NTCHW, rtol=0, atol=2e-5)


def last_frame(name: str, frames: int, latent: int) -> int:
    """The newest frame that a latent may know of, by the family's alignment."""
    if name == "minimax_h3":
        chunk, place = divmod(latent, 5)
        return min(17 * chunk + 4 * place, frames - 1)
    factor = 8 if name == "ltx2" else 4
    return factor * latent + (3 if name == "cogvideox" and frames % 8 == 0 else 0)


class LocalNorm(nn.GroupNorm):
    """Group normalization by the values of each place and frame alone."""

    def forward(self, input: Tensor) -> Tensor:
        groups = input.unflatten(1, (self.num_groups, -1))
        groups = groups - groups.mean(2, keepdim=True)
        groups = groups * (groups.square().mean(2, keepdim=True) + self.eps).rsqrt()
        shape = (-1,) + (1,) * (input.dim() - 2)
        return groups.flatten(1, 2) * self.weight.view(shape) + self.bias.view(shape)


@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("cogvideox", 16),
        ("cogvideox", 17),
        ("hunyuanvideo", 13),
        ("hunyuanvideo", 29),
        ("hunyuanvideo1_5", 9),
        ("wan2_1", 13),
        ("wan2_2", 13),
        ("ltx2", 17),
        ("minimax_h3", 39),
    ],
)
def test_a_latent_knows_no_frame_after_its_own(
    folder_of: Callable[[str], Path], name: str, frames: int
) -> None:
    teacher = load(folder_of(name), FAMILIES[name].kind)
    for module in teacher.vae.encoder.modules():
        # The statistics of CogVideoX and HunyuanVideo span all frames; what is tested
        # is where their convolutions and their attention put a frame.
        if type(module) is nn.GroupNorm:
            module.__class__ = LocalNorm
    clips_NTCHW = clips(name, 1, frames).repeat(frames + 1, 1, 1, 1, 1)
    for frame in range(frames):
        clips_NTCHW[frame, frame] = 1 - clips_NTCHW[frame, frame]
    latents_NTCHW = teacher.encode(clips_NTCHW, [0] * len(clips_NTCHW))
    known_NT = (latents_NTCHW - latents_NTCHW[-1:]).abs().amax((2, 3, 4)) > 1e-5
    for latent in range(latents_NTCHW.shape[1]):
        knows = known_NT[:, latent].nonzero().flatten().tolist()
        assert knows[-1] == last_frame(name, frames, latent), latent
        if name == "minimax_h3":  # each chunk begins without memory
            assert knows[0] >= 17 * (latent // 5)


@pytest.mark.parametrize(
    ("name", "graphs"), [("cogvideox", 2), ("hunyuanvideo1_5", 1), ("wan2_2", 3)]
)
def test_a_compiled_encoder_gives_the_same_and_is_compiled_once(
    folder_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    graphs: int,
) -> None:
    frames_NTCHW = clips(name, 2, FAMILIES[name].frames[-1])
    eager = load(folder_of(name), FAMILIES[name].kind)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    backend = functools.partial(torch.compile, backend=counter)
    monkeypatch.setattr(torch, "compile", backend)
    compiled = load(folder_of(name), FAMILIES[name].kind, compile=True)
    expected_NTCHW = eager.encode(frames_NTCHW, [0, 0])
    for _ in range(2):
        assert torch.equal(compiled.encode(frames_NTCHW, [0, 0]), expected_NTCHW)
        assert counter.frame_count == graphs


def test_one_clip_at_a_time_and_tiles(folder_of: Callable[[str], Path]) -> None:
    """Tiles of a frame larger than the class's tiles change its latents."""
    frames_NTCHW = torch.rand(1, 5, 3, 288, 32)
    whole = load(folder_of("wan2_1"), "wan")
    tiled = load(folder_of("wan2_1"), "wan", tiling=True)
    assert tiled.vae.use_slicing and not whole.vae.use_slicing
    latents_NTCHW = tiled.encode(frames_NTCHW, [0])
    other_NTCHW = whole.encode(frames_NTCHW, [0])
    assert latents_NTCHW.shape == other_NTCHW.shape
    assert 0 < (latents_NTCHW - other_NTCHW).abs().max() < 1
    long_NTCHW = torch.rand(1, 29, 3, 32, 32)
    name = "hunyuanvideo"
    blended = load(folder_of(name), name)
    once = load(folder_of(name), name, tiling=False)
    assert blended.fingerprint != once.fingerprint
    latents_NTCHW = blended.encode(long_NTCHW, [0])
    other_NTCHW = once.encode(long_NTCHW, [0])
    assert 0 < (latents_NTCHW - other_NTCHW).abs().max() < 1
    h3 = folder_of("minimax_h3")
    assert load(h3, "minimax_h3").vae.use_tiling
    assert not load(h3, "minimax_h3", tiling=False).vae.use_tiling


@pytest.mark.parametrize("ambient", [True, False])
def test_float32_is_that_of_a_cache_in_any_training(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, ambient: bool
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", ambient)
    teacher, seen = load(folder_of("wan2_1"), "wan"), []
    for part in (teacher.vae.encoder, teacher.vae.decoder):
        part.register_forward_pre_hook(
            lambda *_: seen.append(torch.backends.cudnn.allow_tf32)
        )
    teacher.decode(teacher.encode(clips("wan2_1", 1, 5), [0]))
    assert seen and not any(seen)
    assert torch.backends.cudnn.allow_tf32 == ambient


def test_half_precision_and_frozen_weights(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    exact, half = (
        load(folder_of("ltx2"), "ltx2", dtype=dtype) for dtype in ("auto", "bf16")
    )
    frames_NTCHW = clips("ltx2", 1, 9).bfloat16()
    latents_NTCHW = half.encode(frames_NTCHW, [0])
    assert latents_NTCHW.dtype == torch.float32 and not latents_NTCHW.requires_grad
    expected_NTCHW = exact.encode(frames_NTCHW, [0])
    error = (latents_NTCHW - expected_NTCHW).square().mean() / expected_NTCHW.var()
    assert 0 < error < 1e-3
    assert torch.equal(half.std_C111, exact.std_C111)  # never rounded
    for teacher, dtype in ((exact, torch.float32), (half, torch.bfloat16)):
        weights = list(teacher.vae.parameters())
        assert {weight.dtype for weight in weights} == {dtype}
        assert not any(weight.requires_grad for weight in weights)
        assert not teacher.vae.training
    kernel = exact.vae.encoder.conv_in.conv.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last_3d)
    stored = {
        key: value.bfloat16()
        for key, value in load_file(folder_of("ltx2") / WEIGHTS).items()
    }
    shutil.copytree(folder_of("ltx2"), tmp_path / "half")
    save_file(stored, tmp_path / "half" / WEIGHTS)
    assert load(tmp_path / "half", "ltx2").vae.dtype == torch.float32


# Folders and fingerprints


def changed(folder: Path, target: Path, change: Callable[[dict], None]) -> Path:
    """A copy of a folder whose weights are changed."""
    shutil.copytree(folder, target)
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, target / WEIGHTS)
    return target


def with_config(folder: Path, target: Path, **values: object) -> Path:
    """A copy of a folder with other settings; those of None are left out."""
    shutil.copytree(folder, target)
    config = {**json.loads((folder / "config.json").read_text()), **values}
    kept = {key: value for key, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(kept))
    return target


def test_a_vae_is_found_in_the_folder_of_its_pipeline(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(folder_of("wan2_1"), tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    inner, outer = load(folder_of("wan2_1"), "wan"), load(tmp_path / "pipeline", "wan")
    assert inner.fingerprint == outer.fingerprint


def test_the_fingerprint_names_all_that_changes_latents(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    def nudge(weights: dict[str, Tensor]) -> None:
        weights["encoder.conv_in.bias"][-1] += 1e-4

    folder = folder_of("wan2_1")
    std = [*json.loads((folder / "config.json").read_text())["latents_std"]]
    others = [
        load(folder, "wan", latents="sample"),
        load(folder, "wan", dtype="bf16"),
        load(folder, "wan", tiling=True),
        load(changed(folder, tmp_path / "weights", nudge), "wan"),
        load(with_config(folder, tmp_path / "std", latents_std=std[::-1]), "wan"),
        load(folder_of("wan2_2"), "wan"),
    ]
    prints = {teacher.fingerprint for teacher in [load(folder, "wan"), *others]}
    assert len(prints) == 7 and min(map(len, prints)) >= 16
    assert load(folder, "wan").fingerprint == load(folder, "wan").fingerprint


# Rules


@pytest.mark.parametrize(
    ("name", "clip", "told"),
    [
        ("cogvideox", (12, 32, 32), "frames of 12 must be 8k or 8k + 1: take 9 or 16"),
        ("hunyuanvideo", (12, 32, 32), "frames of 12 must be 4k + 1: take 9 or 13"),
        ("hunyuanvideo1_5", (4, 32, 32), "frames of 4 must be 4k + 1: take 1 or 5"),
        ("wan2_1", (14, 32, 32), "frames of 14 must be 4k + 1: take 13 or 17"),
        ("ltx2", (13, 64, 64), "frames of 13 must be 8k + 1: take 9 or 17"),
        ("minimax_h3", (17, 32, 32), "frames of 17 must be 17k + 5: take 22"),
        ("minimax_h3", (23, 32, 32), "must be 17k + 5: take 22 or 39"),
        ("wan2_1", (13, 36, 32), "height of 36 must be 8k: take 32 or 40"),
        ("wan2_2", (13, 32, 40), "width of 40 must be 16k: take 32 or 48"),
        ("ltx2", (9, 32, 64), "height of 32 must be 32k: take 64"),
    ],
)
def test_clips_that_a_class_cannot_take(
    folder_of: Callable[[str], Path], name: str, clip: tuple[int, int, int], told: str
) -> None:
    teacher = load(folder_of(name), FAMILIES[name].kind)
    with pytest.raises(UserError) as raised:
        check_teacher(teacher, teacher.latent_channels, *clip)
    assert str(raised.value).endswith(told)


def test_students_that_a_vae_does_not_suit(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    teacher = load(folder_of("wan2_2"), "wan")
    with pytest.raises(UserError, match="student 16: .*taew2_2 or taew2_2_super$"):
        check_teacher(teacher, 16, 13, 32, 32)
    few = with_config(folder_of("cogvideox"), tmp_path / "few", latent_channels=8)
    vae = diffusers.AutoencoderKLCogVideoX(
        **{**FAMILIES["cogvideox"].config, "latent_channels": 8}
    )
    vae.save_pretrained(few)
    assert "has 8 latent channels, which no" in refusal(few, "cogvideox")


# Mistakes


def refusal(path: Path | str, kind: str) -> str:
    """What a teacher is refused with, which must be one line."""
    with pytest.raises(UserError) as raised:
        load_teacher(Teacher(kind, str(path)), CPU)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)
    return str(raised.value)


def test_folders_that_hold_no_vae(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    assert "is no folder" in refusal(tmp_path / "none", "wan")
    assert "is no folder" in refusal(folder_of("wan2_1") / "config.json", "wan")
    assert "has no config.json" in refusal(tmp_path, "wan")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(folder_of("wan2_1") / "config.json", pickled)
    torch.save({}, pickled / "diffusion_pytorch_model.bin")
    assert "has no .safetensors" in refusal(pickled, "wan")


def test_configs_of_something_else(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    told = refusal(folder_of("wan2_1"), "cogvideox")
    assert told.endswith("holds a AutoencoderKLWan: take teacher.kind = wan")
    folder = folder_of("wan2_1")
    other = with_config(folder, tmp_path / "other", _class_name="AutoencoderKL")
    assert "holds a AutoencoderKL: wan is AutoencoderKLWan" in refusal(other, "wan")
    (other / "config.json").write_text("{")
    assert "not a valid JSON file" in refusal(other, "wan")
    bare = with_config(folder, tmp_path / "bare", latents_std=None)
    assert "config.json has no latents_std" in refusal(bare, "wan")
    wide = with_config(folder, tmp_path / "wide", base_dim=8)
    assert "cannot be loaded" in refusal(wide, "wan")
    (other / "config.json").write_text("[]")
    assert "config.json holds no table" in refusal(other, "wan")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("hunyuanvideo", {"scaling_factor": 0}),
        ("hunyuanvideo", {"scaling_factor": "0.5"}),
        ("hunyuanvideo", {"scaling_factor": [1.0, 2.0]}),
        ("ltx2", {"scaling_factor": "0.5"}),
        ("ltx2", {"scaling_factor": -1}),
        ("wan2_1", {"latents_mean": [0.0] * 15}),
        ("wan2_1", {"latents_std": [1.0] * 15 + [0.0]}),
        ("wan2_1", {"latents_std": [1.0] * 15 + [math.nan]}),
        ("wan2_1", {"latents_std": 1.0}),
        ("wan2_1", {"dim_mult": [1, 2, "3", 4]}),
        ("wan2_1", {"dim_mult": []}),
        ("wan2_1", {"num_res_blocks": "two"}),
        ("hunyuanvideo", {"norm_num_groups": 0}),
    ],
)
def test_configs_with_wrong_values(
    folder_of: Callable[[str], Path], tmp_path: Path, name: str, wrong: dict[str, Any]
) -> None:
    folder = with_config(folder_of(name), tmp_path / "wrong", **wrong)
    assert "cannot be loaded: " in refusal(folder, FAMILIES[name].kind)


def test_no_scaling_factor_at_all(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = with_config(folder_of("hunyuanvideo"), tmp_path / "null")
    text = (folder / "config.json").read_text()
    text = text.replace('"scaling_factor": 0.476986', '"scaling_factor": null')
    (folder / "config.json").write_text(text)
    assert "cannot be loaded: " in refusal(folder, "hunyuanvideo")


def test_damaged_weights(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of("wan2_1")
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    whole = (cut / WEIGHTS).read_bytes()
    (cut / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    assert "download it again" in refusal(cut, "wan")
    key = "encoder.conv_in.weight"
    lacking = changed(folder, tmp_path / "lacking", lambda weights: weights.pop(key))
    assert f"lacks weights, the first being {key}" in refusal(lacking, "wan")
    for value in (math.nan, math.inf):
        spoilt = changed(
            folder,
            tmp_path / str(value),
            lambda weights, value=value: weights[key].view(-1)[3:4].fill_(value),
        )
        assert f"{key} has values that are not finite" in refusal(spoilt, "wan")
    extra = changed(folder, tmp_path / "extra", lambda w: w.update(more=torch.zeros(1)))
    assert "has no place for, the first being more" in refusal(extra, "wan")
    buffer = changed(
        folder_of("ltx2"),
        tmp_path / "buffer",
        lambda weights: weights["latents_std"][5:6].fill_(math.nan),
    )
    assert "latents_std" in refusal(buffer, "ltx2")


class Hub(BaseHTTPRequestHandler):
    """A hub that has nothing."""

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@pytest.fixture
def empty_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HTTPServer]:
    """A hub of this machine, in place of the real one."""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def test_hubs_that_do_not_give_it(
    empty_hub: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    cure = "hf download Wan-AI/Wan9"
    assert "is not a valid model identifier" in (told := refusal("Wan-AI/Wan9", "wan"))
    assert cure in told
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert cure in refusal("Wan-AI/Wan9", "wan")


def test_a_hub_that_cannot_be_reached(
    empty_hub: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_hub.shutdown()
    empty_hub.server_close()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
    assert "hf download Wan-AI/Wan9" in refusal("Wan-AI/Wan9", "wan")


def test_what_was_downloaded_is_found_offline(
    empty_hub: HTTPServer,
    folder_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0" * 40
    for repository, inside in (("pipeline", "vae"), ("plain", ".")):
        cached = tmp_path / "cache" / f"models--owner--{repository}"
        shutil.copytree(folder_of("wan2_1"), cached / "snapshots" / commit / inside)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(commit)
        teacher = load_teacher(Teacher("wan", f"owner/{repository}"), CPU)
        own = load(folder_of("wan2_1"), "wan", latents="sample")
        assert teacher.fingerprint == own.fingerprint


def test_a_diffusers_without_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "AutoencoderKLWan", None)
    with pytest.raises(UserError, match="has no AutoencoderKLWan; pip install"):
        load_teacher(Teacher("wan", "some/folder"), CPU)
