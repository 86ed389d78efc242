"""Teachers: the frozen reference VAEs whose latent space a student learns."""

from __future__ import annotations

import functools
import hashlib
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from taehv.errors import UserError
from taehv.sections import Teacher as TeacherSettings
from taehv.variants import FRAME_RULES, VARIANTS, CountRule


class Teacher(Protocol):
    """What training asks of a reference VAE.

    A class of your own is named by ``teacher.kind = "package.module:Class"`` and is
    constructed as ``Class(path, device)``.
    """

    latent_channels: int
    fingerprint: str
    """Names the weights and the way of encoding: equal ones give equal latents."""

    def check(self, frames: int, height: int, width: int) -> None:
        """Raise a ValueError that names the nearest legal clip, if this is none."""

    def encode(self, frames_NTCHW: Tensor, seeds: Sequence[int]) -> Tensor:
        """Frames, RGB in [0, 1], to normalised latents_NTCHW.

        A clip's random numbers, if any, must come from its seed alone, so that it has
        the same latents in any batch. No gradient is needed.
        """

    def decode(self, latents_NTCHW: Tensor) -> Tensor:
        """Normalised latents to frames_NTCHW, RGB in [0, 1], to compare with."""


Normalization = tuple[Tensor, Tensor]
"""Mean and standard deviation by channel: what is learned is (z - mean) / std."""


def _raw(vae: nn.Module) -> Normalization:
    # CogVideoX's pipelines scale latents by a factor that differs between models that
    # share one VAE; TAECVX learns what the VAE itself gives.
    return torch.zeros(1), torch.ones(1)


def _scaled(vae: nn.Module) -> Normalization:
    return torch.zeros(1), 1 / torch.tensor([vae.config.scaling_factor])


def _standardised(vae: nn.Module) -> Normalization:
    return torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)


def _standardised_by_buffers(vae: nn.Module) -> Normalization:
    return vae.latents_mean.clone(), vae.latents_std / vae.config.scaling_factor


@dataclass(frozen=True)
class Kind:
    """One of diffusers' reference VAEs and what its numbers mean."""

    class_name: str
    normalization: Callable[[nn.Module], Normalization]
    """Reads from a loaded VAE how its pipelines normalise latents."""
    needed: tuple[str, ...] = ()
    """What config.json must hold, since the class's defaults are another model's."""
    channels: str = "latent_channels"
    """Name of the count of latent channels in config.json."""
    least_latents: int = 1
    """Smallest height and width in latents: paddings by reflection need two."""
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """The VAE's pixels are (RGB in [0, 1] - mean) / std."""
    is_float32: bool = False
    """Whether diffusers keeps the encoder in float32."""


_MOMENTS = ("latents_mean", "latents_std")

KINDS: dict[str, Kind] = {
    "cogvideox": Kind("AutoencoderKLCogVideoX", _raw),
    "hunyuanvideo": Kind("AutoencoderKLHunyuanVideo", _scaled),
    "hunyuanvideo1_5": Kind("AutoencoderKLHunyuanVideo15", _scaled),
    "wan": Kind("AutoencoderKLWan", _standardised, _MOMENTS, channels="z_dim"),
    "ltx2": Kind("AutoencoderKLLTX2Video", _standardised_by_buffers, least_latents=2),
    "minimax_h3": Kind(
        "AutoencoderKLMiniMaxH3",
        _standardised,
        _MOMENTS,
        least_latents=2,
        pixel_mean=(0.485, 0.456, 0.406),
        pixel_std=(0.229, 0.224, 0.225),
        is_float32=True,
    ),
}
"""The built-in kinds, by the names that teacher.kind has for them."""


class DiffusersTeacher:
    """A reference VAE of diffusers: frozen, and whole on this process's device.

    Source: github.com/huggingface/diffusers, `models/autoencoders`, and for the
    normalisation of latents the pipelines of the same families.
    """

    def __init__(
        self, settings: TeacherSettings, device: torch.device, compile: bool = False
    ) -> None:
        """Load a built-in kind, and compile its encoder where asked to.

        Raises:
            UserError: it cannot be loaded whole, or is of another kind.
        """
        self.kind = settings.kind
        kind = KINDS[settings.kind]
        vae, (mean_C, std_C) = _load_vae(settings.kind, settings.path)
        vae.requires_grad_(False).eval()
        self.latent_channels: int = vae.config[kind.channels]
        self.space_factor = _space_factor(settings, self.latent_channels)
        _adapt(vae, settings.kind, settings.tiling)
        is_bf16 = settings.dtype == "bf16" or (
            settings.dtype == "auto" and device.type == "cuda" and not kind.is_float32
        )
        self.dtype = torch.bfloat16 if is_bf16 else torch.float32
        nn.Module.to(vae, self.dtype)  # diffusers' own warns of its float32 parts
        self.fingerprint = _fingerprint(
            vae,
            [kind.class_name, kind.pixel_mean, kind.pixel_std, settings.latents],
            [mean_C.tolist(), std_C.tolist(), vae.use_tiling, _tiles_in_time(vae)],
        )
        self.vae = vae.to(device)
        _check_finite(vae, settings.path)
        _put_channels_last(vae)
        if compile:
            # Not the decoder: validation alone runs it, which would not repay this. Nor
            # the whole of encode: its loops over time would be unrolled.
            vae.encoder.compile(dynamic=False)
        self.samples = settings.latents == "sample"
        self.mean_C111 = mean_C.to(device).reshape(-1, 1, 1, 1)
        self.std_C111 = std_C.to(device).reshape(-1, 1, 1, 1)
        self.pixel_mean_C11 = torch.tensor(kind.pixel_mean, device=device)[
            :, None, None
        ]
        self.pixel_std_C11 = torch.tensor(kind.pixel_std, device=device)[:, None, None]

    def check(self, frames: int, height: int, width: int) -> None:
        """Raise a ValueError that names the nearest legal clip, if this is none."""
        least = self.space_factor * KINDS[self.kind].least_latents
        size = CountRule(self.space_factor, least=least)
        rules = {"frames": FRAME_RULES[self.kind], "height": size, "width": size}
        for (name, rule), count in zip(
            rules.items(), (frames, height, width), strict=True
        ):
            if not rule.allows(count):
                raise ValueError(
                    f"{name} of {count} must be {rule}: take {rule.nearest(count)}"
                )

    @torch.no_grad()
    def encode(self, frames_NTCHW: Tensor, seeds: Sequence[int]) -> Tensor:
        """Frames, RGB in [0, 1], to normalised latents_NTCHW in float32.

        The noise of a clip's draw is made on the CPU, and so is the same everywhere.
        """
        pixels_NTCHW = frames_NTCHW.float().sub(self.pixel_mean_C11)
        pixels_NTCHW = pixels_NTCHW.div_(self.pixel_std_C11).to(self.dtype)
        with _exact_float32():
            coded = self.vae.encode(pixels_NTCHW.transpose(1, 2)).latent_dist
        latents_NCTHW = coded.mean.float()
        if self.samples:
            shape = latents_NCTHW.shape[1:]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            noise = [torch.randn(shape, generator=each) for each in generators]
            noise_NCTHW = torch.stack(noise)
            if latents_NCTHW.is_cuda:  # else the copy would wait for the encoder
                noise_NCTHW = noise_NCTHW.pin_memory()
            noise_NCTHW = noise_NCTHW.to(latents_NCTHW.device, non_blocking=True)
            latents_NCTHW = (
                latents_NCTHW + (coded.logvar.float() / 2).exp() * noise_NCTHW
            )
        return ((latents_NCTHW - self.mean_C111) / self.std_C111).transpose(1, 2)

    @torch.no_grad()
    def decode(self, latents_NTCHW: Tensor) -> Tensor:
        """Normalised latents to frames_NTCHW in float32, RGB in [0, 1]."""
        latents_NCTHW = latents_NTCHW.float().transpose(1, 2)
        raw_NCTHW = latents_NCTHW * self.std_C111 + self.mean_C111
        with _exact_float32():
            pixels_NCTHW = self.vae.decode(raw_NCTHW.to(self.dtype)).sample
        pixels_NTCHW = pixels_NCTHW.transpose(1, 2).float()
        return (pixels_NTCHW * self.pixel_std_C11 + self.pixel_mean_C11).clamp(0, 1)


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Convolve without TF32, in trainings of any precision and for a cache alike."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _tiles_in_time(vae: nn.Module) -> bool:
    """Whether it codes long clips in parts that it blends, tiling or not."""
    return bool(getattr(vae, "use_framewise_encoding", False))


def _adapt(vae: nn.Module, kind: str, tiling: bool | str) -> None:
    if tiling is True:
        vae.enable_tiling()
        vae.enable_slicing()
    elif tiling is False:
        vae.disable_tiling()
        if _tiles_in_time(vae):
            vae.use_framewise_encoding = vae.use_framewise_decoding = False
    if kind == "hunyuanvideo1_5":
        vae.enable_slicing()  # the attention mask of diffusers 0.42 fits one clip alone
        for module in vae.modules():
            if hasattr(module, "prepare_causal_attention_mask"):
                mask = _remembered(module.prepare_causal_attention_mask)
                module.prepare_causal_attention_mask = mask
            if hasattr(module, "add_temporal_downsample"):
                # A numpy.bool_, which torch.compile takes for data.
                module.add_temporal_downsample = bool(module.add_temporal_downsample)


def _remembered(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of numbers that is run once, and a constant of compiled graphs.

    HunyuanVideo 1.5 fills its attention mask row by row: thousands of launches a clip.
    """
    cached = functools.lru_cache(4)(function)

    @torch.compiler.assume_constant_result
    def remembered(*args: object, **options: object) -> Tensor:
        return cached(*args, **options)

    return remembered


def _check_finite(vae: nn.Module, path: str) -> None:
    for name, parameter in vae.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(
                f"teacher.path = {path}: {name} has values that are not finite: "
                "download it again"
            )


def _put_channels_last(vae: nn.Module) -> None:
    for parameter in vae.parameters():
        if parameter.dim() == 5:  # kernels over time and space
            data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
            parameter.data = data


def _space_factor(settings: TeacherSettings, latent_channels: int) -> int:
    # Not from the VAE: what LTX-2's class says of itself is twice what it does unless
    # its config says better.
    for variant in VARIANTS.values():
        if (variant.teacher, variant.latent_channels) == (
            settings.kind,
            latent_channels,
        ):
            return variant.space_factor
    raise UserError(
        f"teacher.path = {settings.path} has {latent_channels} latent channels, which "
        f"no model.variant learns from {settings.kind}: take one of the README's"
    )


def _fingerprint(vae: nn.Module, *about: object) -> str:
    config = sorted((k, v) for k, v in vae.config.items() if not k.startswith("_"))
    digest = hashlib.sha256(repr((about, config)).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


# --- files -------------------------------------------------------------------------

LOAD_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NameError,
    ArithmeticError,
    SafetensorError,
)
"""What diffusers raises for folders that hold something else, damaged or wrong."""


def _load_vae(kind: str, path: str) -> tuple[nn.Module, Normalization]:
    """The VAE of a folder or hub id, in float32 on the CPU, from safetensors alone.

    Returns:
        It, and how its latents are normalised.
    """
    vae_class = _vae_class(kind)
    place, subfolder = _place(vae_class, path)
    try:
        config = vae_class.load_config(place, subfolder=subfolder)
        _check_config(kind, path, config)
        vae, report = vae_class.from_pretrained(
            place,
            subfolder=subfolder,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
        normalization = _normalization(KINDS[kind], vae)
    except UserError:
        raise
    except LOAD_ERRORS as error:
        raise UserError(_cannot_load(path, error)) from None
    for keys, what in (
        ("missing_keys", "lacks weights"),
        ("unexpected_keys", "has weights that its config.json has no place for"),
    ):
        if report[keys]:
            raise UserError(
                f"teacher.path = {path} {what}, the first being {min(report[keys])}: "
                "download it again"
            )
    return vae, normalization


def _normalization(kind: Kind, vae: nn.Module) -> Normalization:
    """How its pipelines normalise latents; a ValueError if that makes no sense."""
    mean_C, std_C = kind.normalization(vae)
    shapes = (1,), (vae.config[kind.channels],)
    finite = mean_C.isfinite().all() and std_C.isfinite().all()
    if not (finite and (std_C > 0).all() and {mean_C.shape, std_C.shape} <= {*shapes}):
        raise ValueError(
            "latents_mean, latents_std or scaling_factor are no numbers to normalise "
            f"{shapes[1][0]} channels with"
        )
    return mean_C, std_C


def _vae_class(kind: str) -> type:
    import diffusers  # takes seconds, and nothing but built-in teachers needs it

    name = KINDS[kind].class_name
    vae_class = getattr(diffusers, name, None)
    if vae_class is None:
        raise UserError(
            f"teacher.kind = {kind}: diffusers {diffusers.__version__} has no {name}; "
            "pip install --upgrade diffusers (0.41 has all kinds)"
        )
    # Without parts that are kept in float32, loading does not need accelerate: all is
    # loaded in float32.
    return type(name, (vae_class,), {"_keep_in_fp32_modules": None})


def _place(vae_class: type, path: str) -> tuple[str, str | None]:
    """The folder or hub id of a VAE, and the subfolder of it."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(_vae_folder(folder)), None
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise UserError(
            f"teacher.path = {path} is no folder, and no hub id (owner/name)"
        )
    try:
        vae_class.load_config(path, subfolder="vae")
    except OSError:  # the repository of a VAE, or one that loading will fail to reach
        return path, None
    return path, "vae"


def _vae_folder(folder: Path) -> Path:
    for candidate in (folder / "vae", folder):
        if (candidate / "config.json").is_file():
            if not any(candidate.glob("*.safetensors")):
                raise UserError(
                    f"teacher.path: {candidate} has no .safetensors, which is all that "
                    "is loaded: download or convert them"
                )
            return candidate
    raise UserError(
        f"teacher.path = {folder} has no config.json, nor has its folder vae: give the "
        "folder of a VAE or of a pipeline of diffusers"
    )


def _check_config(kind: str, path: str, config: object) -> None:
    if not isinstance(config, dict):
        raise ValueError("config.json holds no table")
    found, wanted = config.get("_class_name"), KINDS[kind].class_name
    if found != wanted:
        kinds = [name for name, other in KINDS.items() if other.class_name == found]
        cure = f"take teacher.kind = {kinds[0]}" if kinds else f"{kind} is {wanted}"
        raise UserError(f"teacher.path = {path} holds a {found}: {cure}")
    for key in KINDS[kind].needed:
        if key not in config:
            raise UserError(
                f"teacher.path = {path}: config.json has no {key}, without which its "
                "latents cannot be normalised: take a newer version of it"
            )


def _cannot_load(path: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0].rstrip(".: ")
    if not isinstance(error, OSError):
        reason = f"{type(error).__name__}: {reason}"
    if Path(path).expanduser().is_dir() or not isinstance(error, OSError):
        return f"teacher.path = {path} cannot be loaded: {reason}; download it again"
    return (
        f"teacher.path = {path} is no folder here, and the hub does not give it: "
        f"{reason}; download it where the hub can be reached (hf download {path}), or "
        "give a folder"
    )


# --- loading -----------------------------------------------------------------------


def load_teacher(
    settings: TeacherSettings, device: torch.device, compile: bool = False
) -> Teacher | None:
    """The teacher that the settings name, or None where they name none.

    Args:
        settings: checked by `taehv.rules.check_config`.
        device: where it runs.
        compile: compile the encoder of a built-in kind with torch.compile.

    Raises:
        UserError: it cannot be found or loaded.
    """
    if not settings.kind:
        return None
    if settings.kind in KINDS:
        return DiffusersTeacher(settings, device, compile)
    return _own_class(settings.kind)(settings.path, device)


def _own_class(kind: str) -> type:
    module, _, name = kind.partition(":")
    try:
        package = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"teacher.kind = {kind}: no module named {error.name}; put its folder on "
            "PYTHONPATH"
        ) from None
    factory = getattr(package, name, None)
    if not (isinstance(factory, type) and hasattr(factory, "encode")):
        raise UserError(
            f"teacher.kind = {kind}: {module} has no {name} that is a class with the "
            "methods of taehv.teacher.Teacher"
        )
    return factory


def check_teacher(
    teacher: Teacher, latent_channels: int, frames: int, height: int, width: int
) -> None:
    """Reject a clip or a student that the teacher cannot serve.

    Raises:
        UserError: with the teacher's own words.
    """
    if teacher.latent_channels != latent_channels:
        pupils = [
            name
            for name, variant in VARIANTS.items()
            if variant.latent_channels == teacher.latent_channels
            and variant.teacher == getattr(teacher, "kind", variant.teacher)
        ]
        raise UserError(
            f"the teacher has {teacher.latent_channels} latent channels, the student "
            f"{latent_channels}: choose the model.variant made for this teacher"
            + (f", {' or '.join(pupils)}" if pupils else "")
        )
    try:
        teacher.check(frames, height, width)
    except ValueError as error:
        raise UserError(f"the teacher cannot take this clip: {error}") from None
