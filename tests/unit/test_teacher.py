"""Teachers of one's own: finding them, what they may refuse, and learning from one."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import Run
from safetensors import safe_open

from taehv.errors import UserError
from taehv.sections import Teacher
from taehv.teacher import check_teacher, load_teacher

CPU = torch.device("cpu")

MODULE = '''
"""A fixed random projection of 8 x 8 patches, averaged over groups of frames."""

import torch
import torch.nn.functional as F


class Projection:
    latent_channels = 16
    fingerprint = "projection"

    def __init__(self, path, device):
        self.path, self.device = path, device
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.randn(16, 3 * 64, generator=generator).to(device)

    def check(self, frames, height, width):
        if frames % 4 != 1:
            legal = round((frames - 1) / 4) * 4 + 1
            raise ValueError(f"{frames} frames are none of 4 k + 1: take {legal}")

    def encode(self, frames_NTCHW, seeds):
        """Latent 0 is frame 0, latent i the mean of frames 4 i - 3 to 4 i."""
        patches = F.pixel_unshuffle(frames_NTCHW.float() - 0.5, 8)
        groups = [patches[:, :1], *patches[:, 1:].split(4, 1)]
        means = torch.stack([group.mean(1) for group in groups], 1)
        return torch.einsum("oc,ntchw->ntohw", self.weight, means) / 4

    def decode(self, latents_NTCHW):
        """Mid grey: what a bad teacher's decoder makes of everything."""
        N, T, _, H, W = latents_NTCHW.shape
        return torch.full((N, 4 * T - 3, 3, 8 * H, 8 * W), 0.5)
'''


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules can be imported, here and in new processes."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "own_teacher.py").write_text(MODULE)
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{before}")
    monkeypatch.syspath_prepend(folder)
    return folder


def refusal(kind: str) -> str:
    """What a teacher is refused with, which must be one line."""
    with pytest.raises(UserError) as raised:
        load_teacher(Teacher(kind), CPU)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_no_teacher() -> None:
    assert load_teacher(Teacher(), CPU) is None


def test_what_cannot_be_imported_is_named(modules: Path) -> None:
    assert "no module named no_such_module; put its folder on PYTHONPATH" in refusal(
        "no_such_module:Class"
    )
    (modules / "needy_teacher.py").write_text("import no_such_package\n")
    assert "no module named no_such_package" in refusal("needy_teacher:Class")
    assert "own_teacher has no Nothing that is a class" in refusal(
        "own_teacher:Nothing"
    )
    # A function would be called with whatever text a settings file holds.
    assert "builtins has no eval that is a class" in refusal("builtins:eval")


def test_errors_of_the_teachers_own_are_not_renamed(modules: Path) -> None:
    (modules / "broken_teacher.py").write_text("import os\nos.no_such_name\n")
    with pytest.raises(AttributeError, match="no_such_name"):
        load_teacher(Teacher("broken_teacher:Class"), CPU)


def test_the_class_gets_path_and_device(modules: Path) -> None:
    teacher = load_teacher(Teacher("own_teacher:Projection", "some/folder"), CPU)
    assert (teacher.path, teacher.device) == ("some/folder", CPU)
    assert teacher.encode(torch.rand(2, 9, 3, 16, 24), [0, 1]).shape == (2, 3, 16, 2, 3)


def test_clips_and_students_that_do_not_fit(modules: Path) -> None:
    teacher = load_teacher(Teacher("own_teacher:Projection"), CPU)
    check_teacher(teacher, 16, 13, 16, 16)
    with pytest.raises(UserError, match="12 frames are none of 4 k [+] 1: take 13"):
        check_teacher(teacher, 16, 12, 16, 16)
    with pytest.raises(UserError, match="16 latent channels, the student 48"):
        check_teacher(teacher, 48, 13, 16, 16)


def test_a_student_learns_the_latents_of_a_teacher(
    modules: Path, videos: Path, tmp_path: Path
) -> None:
    run = Run(
        tmp_path,
        videos,
        teacher__kind="own_teacher:Projection",
        training__steps=24,
        training__global_batch_size=4,
        optim__lr=2e-3,
        validation__interval=100,
    )
    run.train()
    records = run.metrics()
    latent = [record["latent"] for record in records]
    assert sum(latent[-8:]) < 0.5 * sum(latent[:8])
    for record in records:
        assert "latent_scale" not in record
        total = record["latent"] + record["reconstruction"]
        assert record["loss"] == pytest.approx(total, rel=1e-5)
    lines = (run.folder / "validation.jsonl").read_text().splitlines()
    first, *_, last = map(json.loads, lines)
    assert last["latent_correlation"] > first["latent_correlation"] + 0.1
    assert last["teacher_psnr"] == first["teacher_psnr"] < last["decoder_psnr"]
    with safe_open(run.folder / "export/taehv.safetensors", "pt") as file:
        assert file.metadata()["latent_space"] == "HunyuanVideo"
    about = json.loads((run.folder / "checkpoints/step-24/about.json").read_text())
    assert about["latent_space"] == "HunyuanVideo"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"data__frames": 6}, "6 frames are none of 4 k + 1: take 5"),
        ({"model__variant": "taew2_2"}, "choose the model.variant made for this"),
    ],
)
def test_a_training_that_cannot_work_ends_before_it_begins(
    modules: Path, videos: Path, tmp_path: Path, settings: dict[str, object], told: str
) -> None:
    run = Run(tmp_path, videos, teacher__kind="own_teacher:Projection", **settings)
    with pytest.raises(UserError, match=f"^the teacher.*{re.escape(told)}") as raised:
        run.train()
    assert "\n" not in str(raised.value)
    assert not run.folder.exists()
