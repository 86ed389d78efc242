"""The golden vectors of the published modules; tests/golden/README.md explains them."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from taehv import TAEHV

FOLDER = Path(__file__).parent.parent / "golden"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())


def formula_tensor(key: str, shape: list[int]) -> np.ndarray:
    """The weight that the formula gives a tensor of this name and shape."""
    seed = [MANIFEST["seed"], zlib.crc32(key.encode())]
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    scale = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) >= 2 else 0.1
    return values * np.float32(scale)


def formula_state_dict(name: str) -> dict[str, Tensor]:
    """The weights that variant `name`'s vectors were made with."""
    entry = MANIFEST["variants"][name]
    arrays = {k: formula_tensor(k, s) for k, s in entry["state_dict"].items()}
    arrays[entry["final_layer"] + ".weight"] *= np.float32(entry["final_weight_scale"])
    arrays[entry["final_layer"] + ".bias"][:] = 0.5
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


def formula_model(name: str) -> TAEHV:
    """Variant `name` with the weights of its vectors."""
    model = TAEHV(name).eval()
    model.load_state_dict(formula_state_dict(name))
    return model


def vectors(name: str) -> dict[str, Tensor]:
    """The arrays of one file, by name without suffix."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(array) for key, array in arrays.items()}


def cases(name: str) -> list[dict[str, Tensor]]:
    """The cases of a variant, each with x, encoded, z and decoded."""
    arrays = vectors(name)
    fields = ("x", "encoded", "z", "decoded")
    count = len(MANIFEST["variants"][name]["cases"])
    return [{field: arrays[f"{i}.{field}"] for field in fields} for i in range(count)]


def assert_same(given: Tensor, expected: Tensor) -> None:
    """Equal in shape, and in value to 1e-4 of the expected values' scale."""
    assert given.shape == expected.shape
    assert given.dtype == expected.dtype
    assert (given - expected).abs().max() <= 1e-4 * expected.abs().max()
