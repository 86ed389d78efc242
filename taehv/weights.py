"""Weight files: reading untrusted ones, telling variants apart, writing exports."""

from __future__ import annotations

import io
import logging
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from taehv.errors import UserError
from taehv.variants import VARIANTS, Variant
from taehv.writing import write_files

logger = logging.getLogger("taehv")

PICKLE_SUFFIXES = (".pth", ".pt")
EXPORT_SUFFIXES = (".pth", ".safetensors")
METADATA_KEY = "taehv"
# The first convolution of a memory block: base, ConvNeXt-like, pointwise.
DECODER_SHAPES = {
    "base": (256, 512, 3, 3),
    "super": (1024, 1, 7, 7),
    "wide": (1024, 2048, 1, 1),
}
# What torch.load is seen to raise on files that are cut, altered or not its own.
LOAD_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    struct.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    SafetensorError,
)


def load_state_dict_file(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a published or exported weight file, trusting nothing in it.

    Args:
        path: a `.pth` or `.pt` file of one plain state_dict, or `.safetensors`.

    Returns:
        The state_dict, all dense finite floating CPU tensors, and the metadata, empty
        where the file has none.

    Raises:
        UserError: if the file is missing, damaged, of another kind or unsafe to load.
    """
    path = Path(path)
    if not path.is_file():
        found = "not a file" if path.exists() else "no such file"
        raise UserError(
            f"{path}: {found}; give the path of a weight file, or to a command the "
            "folder of a run or checkpoint"
        )
    if path.suffix in PICKLE_SUFFIXES:
        read = _read_pickle
    elif path.suffix == ".safetensors":
        read = _read_safetensors
    else:
        raise UserError(f"{path}: weights must be a .pth, .pt or .safetensors file")
    try:
        state_dict, metadata = read(path)
    except LOAD_ERRORS as error:
        kind = type(error).__name__
        raise UserError(
            f"{path}: not a whole, safe weight file ({kind}); download or export it "
            "again as a plain state_dict of tensors"
        ) from error
    check_tensors(path, state_dict)
    return dict(state_dict), metadata


def _read_pickle(path: Path) -> tuple[object, dict[str, str]]:
    # Only torch's zip format can be mapped; older files are read whole.
    mmap = zipfile.is_zipfile(path)
    if mmap:
        _check_stored(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    attached = getattr(loaded, "_metadata", None)
    metadata = attached.get(METADATA_KEY) if isinstance(attached, dict) else None
    pairs = metadata.items() if isinstance(metadata, dict) else ()
    return loaded, {k: v for k, v in pairs if isinstance(k, str) and isinstance(v, str)}


def _check_stored(path: Path) -> None:
    """Refuse what torch never writes: packed, a small file could fill any memory."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{entry.filename} is compressed")


def _read_safetensors(path: Path) -> tuple[object, dict[str, str]]:
    with safe_open(path, framework="pt", device="cpu") as file:
        state_dict = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return state_dict, file.metadata() or {}


def check_tensors(path: Path | str, state_dict: object) -> None:
    """Raise UserError unless it is a state_dict of dense, finite, floating tensors."""
    if not isinstance(state_dict, dict) or not state_dict:
        raise UserError(f"{path}: holds no state_dict; save model.state_dict() alone")
    for key, value in state_dict.items():
        if isinstance(value, dict):
            raise UserError(
                f"{path}: the weights are nested under {key!r}; save that inner "
                "state_dict alone"
            )
        if not isinstance(key, str) or not is_dense_float(value):
            raise UserError(
                f"{path}: {key!r} is not a dense floating tensor; save "
                "model.state_dict() alone, unquantised"
            )
        if not value.float().isfinite().all():
            raise UserError(
                f"{path}: {key!r} holds NaN or infinity; take an earlier checkpoint"
            )


def is_float(dtype: torch.dtype) -> bool:
    """Whether it is a floating format with a number an element."""
    return dtype.is_floating_point and not str(dtype).endswith("x2")


def is_dense_float(value: object) -> bool:
    """Whether it is a plain floating tensor that is as large as it says."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and is_float(value.dtype)
        # A stride of zero would let a small file claim any amount of memory.
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def identify(
    state_dict: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    variant: str | None = None,
) -> str:
    """Name the variant that weights belong to.

    Shapes decide, then the user's word, then the metadata; never the file's name, which
    says nothing once a file is renamed.

    Args:
        state_dict: weights under the published keys.
        metadata: what the file says of itself; only "variant" is read.
        variant: the user's word, which must fit the shapes.

    Returns:
        A key of `VARIANTS`.

    Raises:
        UserError: if nothing fits, the user's word does not, or more than one does and
            neither the user nor the metadata names one.
    """
    fitting = [name for name in VARIANTS if _fits(state_dict, VARIANTS[name])]
    if not fitting:
        raise UserError(
            "not the weights of a TAEHV variant; give a file with the published keys "
            "(encoder.0.weight, ...)"
        )
    stored = metadata.get("variant")
    if variant is not None:
        return _confirmed(variant, fitting, stored)
    if stored in fitting:
        return stored
    if stored in VARIANTS:
        raise UserError(
            f"the metadata says {stored} but by their shapes the weights are "
            f"{' or '.join(fitting)}; name that with variant= or --model.variant"
        )
    if len(fitting) > 1:
        raise UserError(
            f"the weights may be {', '.join(fitting)}, which have equal shapes; name "
            "one with variant=, --variant or --model.variant"
        )
    return fitting[0]


def _confirmed(variant: str, fitting: list[str], stored: str | None) -> str:
    check_variant(variant)
    if variant not in fitting:
        raise UserError(
            f"the weights are not of variant {variant}; by their shapes they are "
            f"{' or '.join(fitting)}: name that, or give another file"
        )
    if stored is not None and stored != variant:
        logger.warning(
            "weights that say they are %r are used as %s, as asked", stored, variant
        )
    return variant


def check_variant(name: str) -> None:
    """Raise UserError unless `name` is a key of `VARIANTS`."""
    if name not in VARIANTS:
        raise UserError(f"no variant {name!r}; choose one of {', '.join(VARIANTS)}")


def _fits(state_dict: Mapping[str, Tensor], variant: Variant) -> bool:
    image_channels = 3 * variant.patch_size**2
    shapes = {
        "encoder.0.weight": (64, image_channels, 3, 3),
        "encoder.12.conv.weight": (64, 64 * (1 + variant.time_stages[2]), 1, 1),
        "encoder.17.weight": (variant.latent_channels, 64, 3, 3),
        "decoder.3.conv.0.weight": DECODER_SHAPES[variant.decoder],
    }
    return all(
        key in state_dict and tuple(state_dict[key].shape) == shape
        for key, shape in shapes.items()
    )


def save_weights(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write weights that any loader of the published files takes, atomically.

    Args:
        path: where to; `.pth`, `.pt` or `.safetensors` chooses the format.
        state_dict: dense tensors under the published keys.
        metadata: strings that `load_state_dict_file` gives back, such as "variant" and
            "latent_space"; "format" is added. A `.pth` file remains a plain
            state_dict: the strings ride on its `_metadata` attribute.

    Raises:
        UserError: if the suffix names no known format.
        OSError: it cannot be written; what was there before is there still.
    """
    path = Path(path)
    write_files({path: _serialized(path, state_dict, metadata)})


def export_weights(
    path: Path, state_dict: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write PATH.pth and PATH.safetensors as `save_weights` does: both, or neither.

    Raises:
        OSError: they cannot be written; what was there before is there still.
    """
    paths = [path.with_name(path.name + suffix) for suffix in EXPORT_SUFFIXES]
    write_files({path: _serialized(path, state_dict, metadata) for path in paths})


def _serialized(
    path: Path, state_dict: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> bytes:
    if path.suffix not in (*PICKLE_SUFFIXES, ".safetensors"):
        raise UserError(f"{path}: name the export .pth, .pt or .safetensors")
    tensors = OrderedDict(
        (key, value.detach().cpu().contiguous()) for key, value in state_dict.items()
    )
    metadata = {**metadata, "format": "taehv"}
    if path.suffix == ".safetensors":
        return save(dict(tensors), metadata)
    tensors._metadata = {METADATA_KEY: metadata}
    # Into memory, since torch's own writer hides what a full disk says.
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()
