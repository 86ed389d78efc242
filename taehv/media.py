"""Folders of images and files of latents, read and written piece by piece."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from torch import Tensor

from taehv.errors import UserError
from taehv.video import IMAGE_SUFFIXES, TimedFrame, VideoError
from taehv.weights import LOAD_ERRORS, PICKLE_SUFFIXES, is_dense_float
from taehv.writing import WholeWriter

LATENT_SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors")
Layout = Literal["auto", "NTCHW", "NCTHW"]
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""As safetensors calls them."""
HEADER_BYTES = 4096


def images_in(folder: Path) -> list[Path]:
    """The images that lie in a folder itself, in the order of their names."""
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES
    )


class ImageFrames:
    """The images of a folder as the frames of a video, by the order of their names.

    Raises:
        VideoError: while they are read, one is damaged or of another size.
    """

    pixel_aspect = Fraction(1)

    def __init__(self, folder: Path, rate: Fraction) -> None:
        self.paths = images_in(folder)
        self.rate, self.time_base, self.frames = rate, 1 / rate, len(self.paths)

    def __iter__(self) -> Iterator[TimedFrame]:
        shape = None
        for number, path in enumerate(self.paths):
            pixels_HWC = _read_image(path)
            shape = shape or pixels_HWC.shape
            if pixels_HWC.shape != shape:
                raise VideoError(
                    f"{path} is {pixels_HWC.shape[1]} x {pixels_HWC.shape[0]} and not "
                    f"{shape[1]} x {shape[0]} as the images before it"
                )
            yield TimedFrame(pixels_HWC, number, 1)


def _read_image(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path} is no image that can be read ({error})") from None


class ImageWriter(WholeWriter):
    """Writes uint8 RGB frames HWC as PNG files into a new folder, see WholeWriter."""

    def __init__(self, folder: Path, names: list[str] | None = None) -> None:
        super().__init__(folder)
        self._names = names
        self._written = 0

    def _open(self, unfinished: Path) -> None:
        unfinished.mkdir()
        self._folder = unfinished

    def write(self, frame_HWC: np.ndarray, pts: int = 0, duration: int = 0) -> None:
        """Append a frame; images have no times."""
        number = self._written
        name = self._names[number] if self._names else f"{number:06d}"
        Image.fromarray(frame_HWC).save(self._folder / f"{name}.png")
        self._written += 1

    def _close(self, is_good: bool) -> None:
        """Every image is written already."""


# --- latents -----------------------------------------------------------------------


class LatentWriter(WholeWriter):
    """Writes latents_1TCHW, piece by piece, as tensor "latents" of a safetensors file.

    safetensors' own functions want all of it at once. The format is the length of a
    header, the header in JSON, padded by spaces, and the numbers
    (github.com/huggingface/safetensors, README); shapes of T, C, H, W pieces after one
    another are those of the whole, so that only the header has to be written last.
    See WholeWriter.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.metadata: dict[str, str] = {}
        """Goes into the header, and may be filled until the block ends."""
        self._shape: list[int] = []
        self._dtype = torch.float32

    def _open(self, unfinished: Path) -> None:
        self._file = unfinished.open("wb")
        self._file.write(b" " * HEADER_BYTES)

    def write(self, latents_1TCHW: Tensor) -> None:
        """Append latents, all of one size and type."""
        self._dtype = latents_1TCHW.dtype
        before = self._shape[1] if self._shape else 0
        self._shape = list(latents_1TCHW.shape)
        self._shape[1] += before
        self._file.write(latents_1TCHW.contiguous().view(torch.uint8).numpy().data)

    def _close(self, is_good: bool) -> None:
        with self._file:
            if is_good:
                self._write_header()

    def _write_header(self) -> None:
        end = self._file.tell() - HEADER_BYTES
        tensor = {
            "dtype": DTYPE_NAMES[self._dtype],
            "shape": self._shape,
            "data_offsets": [0, end],
        }
        header = json.dumps({"__metadata__": self.metadata, "latents": tensor}).encode()
        self._file.seek(0)
        self._file.write(struct.pack("<Q", HEADER_BYTES - 8))
        self._file.write(header.ljust(HEADER_BYTES - 8))


class LatentFile:
    """The latents of one video in a .safetensors, .pt or .pth file, never all read.

    Args:
        path: a tensor alone, or in a dict of one or under the key "latents", of
            N T C H W or N C T H W, with N = 1, or without N.
        channels: of the variant, which tell the two layouts apart where `layout` and
            the file's metadata do not.
        layout: NTCHW or NCTHW.

    Raises:
        UserError: the file cannot be read safely, or its shape does not fit.
    """

    def __init__(self, path: Path, channels: int, layout: Layout = "auto") -> None:
        self.path = path
        try:
            self._tensor, self.metadata = _open_latents(path)
        except LOAD_ERRORS as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{path}: not a whole, safe file of latents ({type(error).__name__}); "
                "save the tensor alone with torch.save or safetensors, and give videos "
                "without --latents"
            ) from None
        shape = list(self._tensor.get_shape())
        self._has_batch = len(shape) == 5
        if len(shape) not in (4, 5) or (self._has_batch and shape[0] != 1):
            raise UserError(
                f"{path}: latents have shape {shape}; save one video's, N C T H W with "
                "N = 1"
            )
        if layout == "auto":
            layout = self.metadata.get("layout", "auto")
        self._time_axis = _time_axis(path, shape[-4:], channels, layout)
        self.latents = shape[-4:][self._time_axis]

    def pieces(self, latents: int) -> Iterator[Tensor]:
        """All of them as latents_1TCHW of `latents` at a time."""
        for start in range(0, self.latents, latents):
            cut = slice(start, start + latents)
            where = (cut,) if self._time_axis == 0 else (slice(None), cut)
            if self._has_batch:
                where = (slice(None), *where)
            try:
                piece = self._tensor[where]
            except LOAD_ERRORS as error:
                raise UserError(f"{self.path} is damaged ({error})") from None
            piece = piece if self._has_batch else piece[None]
            piece = piece if self._time_axis == 0 else piece.movedim(1, 2)
            if not piece.isfinite().all():
                raise UserError(f"{self.path} holds NaN or infinity")
            yield piece

    def count_of(self, name: str) -> int:
        """A positive whole number of the metadata; 0 where there is none."""
        text = self.metadata.get(name, "")
        return int(text) if text.isdecimal() and len(text) < 10 else 0


class _Loaded:
    """A tensor in memory with the methods of a slice of safetensors."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, where: tuple[slice, ...]) -> Tensor:
        return self._tensor[where]


def _open_latents(path: Path) -> tuple[_Loaded, Mapping[str, str]]:
    if path.suffix.lower() == ".safetensors":
        file = safe_open(path, framework="pt", device="cpu")
        key = _only(path, list(file.keys()))
        tensor = file.get_slice(key)
        if tensor.get_dtype() not in ("F64", *DTYPE_NAMES.values()):
            raise UserError(f"{path}: {key!r} is {tensor.get_dtype()}, no latents")
        return tensor, file.metadata() or {}
    # Only torch's zip format can be mapped; older files are read whole.
    mmap = zipfile.is_zipfile(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    if isinstance(loaded, dict):
        loaded = loaded[_only(path, list(loaded))]
    if not is_dense_float(loaded):
        raise UserError(f"{path} holds no floating tensor: save the latents alone")
    return _Loaded(loaded), {}


def _only(path: Path, keys: list[str]) -> str:
    if "latents" in keys or len(keys) == 1:
        return "latents" if "latents" in keys else keys[0]
    raise UserError(f"{path} holds {len(keys)} tensors: name the latents 'latents'")


def _time_axis(path: Path, shape: list[int], channels: int, layout: str) -> int:
    """0 for T C H W, 1 for C T H W."""
    fits = {"NTCHW": shape[1] == channels, "NCTHW": shape[0] == channels}
    if layout in fits:
        fits = {layout: fits[layout]}
    fitting = [name for name, does in fits.items() if does]
    if len(fitting) == 1 and all(shape):
        return int(fitting[0] == "NCTHW")
    if fitting:
        raise UserError(
            f"{path}: latents of shape {shape} may be T C H W or C T H W: give --layout"
        )
    raise UserError(
        f"{path}: latents of shape {shape} are not of this model, which has {channels} "
        "channels: take the checkpoint of the pipeline they are from"
    )
