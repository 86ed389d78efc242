"""Measures that need what others bring: LPIPS, ST-LPIPS, VMAF."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
import torchmetrics
import torchvision
from torch import Tensor

from taehv.errors import UserError
from taehv.perceptual import extra_values, load_measures
from taehv.visualize import to_uint8

CPU = torch.device("cpu")
AFTER_RELU = (1, 4, 7, 9, 11)
"""AlexNet's layers that LPIPS looks at."""


def noise(frames: int, side: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(frames, 3, side, side, generator=generator)


def test_lpips_against_its_definition(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torchvision.models.alexnet(weights=None).eval()
    weights = tmp_path / "alexnet.pth"
    torch.save(network.state_dict(), weights)
    measures = load_measures(str(weights), False, "", CPU)
    frames_TCHW, decoded_TCHW = noise(2, 64, 0), noise(3, 64, 1)
    found = extra_values(measures, frames_TCHW, decoded_TCHW)
    folder = Path(torchmetrics.__file__).parent / "functional/image/lpips_models"
    heads = torch.load(folder / "alex.pth", "cpu", weights_only=True)
    mean = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    deviation = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    clips = [(2 * x[:2] - 1 - mean) / deviation for x in (decoded_TCHW, frames_TCHW)]
    distance, head = 0.0, 0
    for place, layer in enumerate(network.features):
        clips = [layer(x) for x in clips]
        if place in AFTER_RELU:
            units = [x / (x.square().sum(1, True) + 1e-8).sqrt() for x in clips]
            weights_C = heads[f"lin{head}.model.1.weight"].flatten()
            apart_THWC = (units[0] - units[1]).square().movedim(1, -1)
            distance += (apart_THWC * weights_C).sum(-1).mean().item()
            head += 1
    assert found == {"lpips": pytest.approx(distance, rel=1e-4)} and distance > 0
    assert extra_values(measures, noise(1, 63, 0), noise(1, 63, 1)) == {}


def test_weights_that_do_not_serve_are_refused(tmp_path: Path) -> None:
    torch.save({"features.10.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not the weights of torchvision's AlexNet"):
        load_measures(str(tmp_path / "other.pth"), False, "", CPU)
    with pytest.raises(UserError, match="no such file"):
        load_measures(str(tmp_path / "none.pth"), False, "", CPU)


def test_a_missing_package_or_program_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "stlpips_pytorch", None)
    with pytest.raises(UserError, match="pip install stlpips-pytorch"):
        load_measures("", True, "", CPU)
    with pytest.raises(UserError, match="no program"):
        load_measures("", False, str(tmp_path / "ffmpeg"), CPU)
    with pytest.raises(UserError, match="has no libvmaf"):
        load_measures("", False, program(tmp_path, "print('scale')"), CPU)


def program(folder: Path, code: str) -> str:
    """An executable that runs this Python."""
    path = folder / "ffmpeg"
    path.write_text(f"#!{sys.executable}\n{code}\n")
    path.chmod(0o755)
    return str(path)


FFMPEG = """
import json, pathlib, sys
if "-filters" in sys.argv:
    sys.exit(print("libvmaf"))
if "8x6" not in sys.argv:
    sys.exit("first line\\nno such size")
clips = [pathlib.Path(name).read_bytes() for name in ("ours.rgb", "theirs.rgb")]
frames = [{"metrics": {"vmaf": sum(clip) / len(clip)}} for clip in clips]
pathlib.Path("vmaf.json").write_text(json.dumps({"frames": frames}))
"""
"""In place of a real one: its VMAF tells which pixels it was given."""


def test_vmaf_hands_both_clips_to_ffmpeg(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measures = load_measures("", False, program(tmp_path, FFMPEG), CPU)
    frames_TCHW, decoded_TCHW = noise(2, 8, 0)[:, :, :6], noise(2, 8, 1)[:, :, :6]
    expected = [to_uint8(x).mean() for x in (decoded_TCHW, frames_TCHW)]
    found = extra_values(measures, frames_TCHW, decoded_TCHW)
    assert found == {"vmaf": pytest.approx(sum(expected) / 2)}
    with caplog.at_level(logging.WARNING, "taehv"):
        assert extra_values(measures, noise(2, 8, 0), noise(2, 8, 1)) == {}
    assert "a clip has no VMAF" in caplog.text and "no such size" in caplog.text
