from __future__ import annotations

import logging
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import file_size_limit
from golden_vectors import MANIFEST
from safetensors.torch import load_file, save_file
from torch import Tensor

from taehv import TAEHV, VARIANTS
from taehv.errors import UserError
from taehv.weights import (
    export_weights,
    identify,
    load_state_dict_file,
    save_weights,
)

SUFFIXES = [".pth", ".pt", ".safetensors"]
SAME_SHAPES = ["taehv", "taecvx", "taew2_1", "taeos1_3"]


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return TAEHV("taehv").state_dict()


def published_shapes(name: str) -> dict[str, Tensor]:
    shapes = MANIFEST["variants"][name]["state_dict"]
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def error_of(path: Path) -> str:
    """The one line that loading the file ends in, which names the file."""
    with pytest.raises(UserError) as raised:
        load_state_dict_file(path)
    text = str(raised.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    return text


# Round trips


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_weights_and_metadata_come_back(
    suffix: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "new" / f"weights{suffix}"
    metadata = {"variant": "taew2_1", "latent_space": "Wan 2.1", "step": "100"}
    save_weights(path, weights, metadata)
    loaded, found = load_state_dict_file(path)
    assert found == {**metadata, "format": "taehv"}
    assert list(loaded) == list(weights) or suffix == ".safetensors"
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_other_loaders_take_an_export(
    suffix: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / f"weights{suffix}"
    save_weights(path, weights, {"variant": "taehv"})
    if suffix == ".safetensors":
        plain = load_file(path)
    else:
        plain = torch.load(path, weights_only=True)
    assert set(plain) == set(MANIFEST["variants"]["taehv"]["state_dict"])
    model = TAEHV("taehv")
    model.load_state_dict(plain)
    assert torch.equal(model.decoder[1].weight, weights["decoder.1.weight"])
    torch.nn.ModuleDict({"taehv": model}).load_state_dict(
        OrderedDict((f"taehv.{key}", value) for key, value in plain.items())
    )


def test_old_pth_files_load(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    loaded, metadata = load_state_dict_file(path)
    assert metadata == {} and loaded.keys() == weights.keys()


def test_from_pretrained_loads_half_precision_as_float32(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "half.pth"
    halves = {key: value.half() for key, value in weights.items()}
    torch.save(halves, path)
    model = TAEHV.from_pretrained(path, "taecvx")
    assert model.variant_name == "taecvx"
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, halves[key].float())


def test_a_failed_export_leaves_the_old_file(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(path, weights, {"variant": "taehv"})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_weights(path, weights, {"variant": None})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_full_disk_is_an_os_error_and_leaves_the_old_file(
    weights: dict[str, Tensor], tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(b"old")
    with file_size_limit(2**20), pytest.raises(OSError, match="File too large"):
        save_weights(path, weights, {})
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [name]


def test_an_export_is_both_files_or_none(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    (tmp_path / "best.safetensors").mkdir()
    (tmp_path / "best.safetensors/other").touch()
    with pytest.raises(OSError):
        export_weights(tmp_path / "best", weights, {})
    assert os.listdir(tmp_path) == ["best.safetensors"]


def test_export_to_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name the export .pth, .pt or .safetensors"):
        save_weights(tmp_path / "weights.bin", {}, {})


# Files not to be trusted


class Hostile:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_pickled_code_is_not_run(writer: str, tmp_path: Path) -> None:
    path, victim = tmp_path / "hostile.pth", tmp_path / "victim"
    if writer == "torch":
        torch.save({"encoder.0.weight": Hostile(victim)}, path)
    else:
        path.write_bytes(pickle.dumps(Hostile(victim)))
    assert "not a whole, safe weight file" in error_of(path)
    assert not victim.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.5, 0.99])
def test_truncated_files(
    suffix: str, keep: float, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / f"cut{suffix}"
    save_weights(path, weights, {})
    os.truncate(path, int(keep * path.stat().st_size))
    assert "again" in error_of(path)


@pytest.mark.parametrize("kind", ["zip.pth", "old.pth", "whole.safetensors"])
def test_altered_bytes_end_in_one_line_or_load(kind: str, tmp_path: Path) -> None:
    path, generator = tmp_path / kind, random.Random(0)
    if kind == "old.pth":
        state_dict = {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2)}
        torch.save(state_dict, path, _use_new_zipfile_serialization=False)
    else:
        save_weights(path, {"a.weight": torch.ones(2, 2)}, {"variant": "taehv"})
    whole, refused = path.read_bytes(), 0
    for _ in range(200):
        altered = bytearray(whole)
        for _ in range(3):
            altered[generator.randrange(len(whole))] = generator.randrange(256)
        path.write_bytes(altered)
        try:
            load_state_dict_file(path)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 20


def test_missing_files_and_other_kinds(tmp_path: Path) -> None:
    assert "no such file" in error_of(tmp_path / "absent.pth")
    assert "not a file" in error_of(tmp_path)
    text = tmp_path / "weights.txt"
    text.write_text("weights")
    assert "must be a .pth, .pt or .safetensors" in error_of(text)
    for suffix in SUFFIXES:
        page = tmp_path / f"page{suffix}"
        page.write_text("<html>not found</html>" * 100)
        assert "not a whole, safe weight file" in error_of(page)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"model": {"encoder.0.weight": torch.ones(1)}}, "nested under 'model'"),
        ([torch.ones(1)], "holds no state_dict"),
        ({}, "holds no state_dict"),
        ({"step": 3}, "'step' is not a dense floating tensor"),
        ({0: torch.ones(1)}, "0 is not a dense floating tensor"),
        ({"a": torch.ones(2, dtype=torch.int8)}, "'a' is not a dense floating"),
        ({"a": torch.ones(2, 2).to_sparse()}, "'a' is not a dense floating"),
        ({"a": torch.ones(2, device="meta")}, "'a' is not a dense floating"),
        ({"a": torch.ones(1).expand(10**12)}, "'a' is not a dense floating"),
        ({"a": torch.tensor([1.0, torch.nan])}, "'a' holds NaN or infinity"),
        ({"a": torch.tensor([torch.inf]).half()}, "'a' holds NaN or infinity"),
    ],
)
def test_files_that_hold_something_else(
    content: object, match: str, tmp_path: Path
) -> None:
    path = tmp_path / "other.pth"
    torch.save(content, path)
    assert match in error_of(path)


def test_compressed_entries_are_refused(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(weights, tmp_path / "stored.pth")
    path = tmp_path / "packed.pth"
    with (
        zipfile.ZipFile(tmp_path / "stored.pth") as stored,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    assert "not a whole, safe weight file (BadZipFile)" in error_of(path)


def test_safetensors_with_nan(tmp_path: Path) -> None:
    path = tmp_path / "nan.safetensors"
    save_file({"a": torch.tensor([torch.nan])}, path)
    assert "'a' holds NaN" in error_of(path)


def test_metadata_of_the_wrong_kind_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "odd.pth"
    state_dict = OrderedDict(a=torch.ones(1))
    state_dict._metadata = {"taehv": {"variant": 3, "note": "kept"}}
    torch.save(state_dict, path)
    loaded, metadata = load_state_dict_file(path)
    assert metadata == {"note": "kept"}
    assert not hasattr(loaded, "_metadata")


# Which variant


@pytest.mark.parametrize("name", VARIANTS)
def test_shapes_or_the_users_word_name_each_variant(name: str) -> None:
    state_dict = published_shapes(name)
    assert identify(state_dict, {}, name) == name
    assert identify(state_dict, {"variant": name}) == name
    shapes = {key: value.shape for key, value in state_dict.items()}
    twins = [
        other
        for other in VARIANTS
        if shapes == {k: v.shape for k, v in published_shapes(other).items()}
    ]
    if len(twins) == 1:
        assert identify(state_dict, {}) == name
    else:
        with pytest.raises(UserError, match=", ".join(twins)):
            identify(state_dict, {})
    for other in set(VARIANTS) - set(twins):
        with pytest.raises(UserError, match=f"not of variant {other}.* {name}"):
            identify(state_dict, {}, other)


def test_equal_shapes_ask_for_a_name() -> None:
    with pytest.raises(
        UserError, match="variant=, --variant or --model.variant"
    ) as raised:
        identify(published_shapes("taehv"), {"variant": "another family"})
    assert all(name in str(raised.value) for name in SAME_SHAPES)


def test_the_users_word_beats_the_metadata_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state_dict = published_shapes("taew2_1")
    with caplog.at_level(logging.WARNING, "taehv"):
        assert identify(state_dict, {"variant": "taehv"}, "taew2_1") == "taew2_1"
    assert "'taehv' are used as taew2_1" in caplog.text
    caplog.clear()
    assert identify(state_dict, {"variant": "taew2_1"}, "taew2_1") == "taew2_1"
    assert not caplog.records


def test_metadata_must_fit_the_shapes() -> None:
    with pytest.raises(UserError, match="says taehv but.* taew2_2;"):
        identify(published_shapes("taew2_2"), {"variant": "taehv"})


def test_unknown_names_and_foreign_weights() -> None:
    with pytest.raises(UserError, match="no variant 'wan'; choose one of taehv"):
        identify(published_shapes("taehv"), {}, "wan")
    with pytest.raises(UserError, match="not the weights of a TAEHV variant"):
        identify({"conv.weight": torch.ones(1)}, {})


def test_the_files_name_says_nothing(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "taecvx.pth"
    torch.save(weights, path)
    with pytest.raises(UserError, match=r"taecvx\.pth: .*name one with variant="):
        TAEHV.from_pretrained(path)


@pytest.mark.parametrize("fault", ["missing", "superfluous", "shape"])
def test_files_that_are_almost_a_variant(
    fault: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path, key = tmp_path / "almost.pth", "decoder.4.conv.2.weight"
    faulty = dict(weights)
    if fault == "missing":
        del faulty[key]
    elif fault == "superfluous":
        faulty[key := "decoder.99.weight"] = torch.ones(1)
    else:
        faulty[key] = torch.ones(256, 256, 1, 1)
    torch.save(faulty, path)
    with pytest.raises(UserError, match=f"almost.pth: '{key}' is missing"):
        TAEHV.from_pretrained(path, "taehv")
