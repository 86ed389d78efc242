"""One run at a time in a folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from taehv.distributed import World, from_main
from taehv.errors import UserError
from taehv.lock import hold
from taehv.storage import Folder

UNFINISHED = (".*.part", "samples/.*.part", "export/**/.*.part")
"""What `writing.whole` leaves where the process is killed."""


@contextmanager
def alone(
    folder: Path, world: World, checkpoints: Folder | None = None
) -> Iterator[None]:
    """Keep other runs out of a run's folder, and clear up what killed ones have left.

    A collective. The main process locks a file, which the system undoes however that
    process ends. Where there is no such file or lock, nothing is kept out.

    Args:
        folder: of the run.
        world: its processes.
        checkpoints: of the run, which others are kept out of if it is on this machine.

    Raises:
        UserError: another run writes there.
    """
    places = {folder: "--job.name"}
    if checkpoints is not None and checkpoints.is_local:
        path = Path(checkpoints.path)
        if not path.resolve().is_relative_to(folder.resolve()):
            places[path] = "--checkpoint.folder"
    with ExitStack() as stack:
        for place, setting in places.items():
            is_mine = True
            if world.is_main:
                is_mine = stack.enter_context(_locked(lock_of(place)))
            if not from_main(int(is_mine)):
                raise UserError(
                    f"another run writes to {place}: wait for its end, or choose "
                    f"another {setting}"
                )
        if world.is_main:
            _clear(folder)
        yield


def lock_of(folder: Path) -> Path:
    """Beside a folder, which only a run that can begin makes."""
    folder = folder.resolve()  # "." has no name
    return folder.parent / f".{folder.name}.lock"


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a file; false where another process does."""
    with ExitStack() as stack:
        is_mine = True
        with suppress(OSError):  # which the run's own files will tell
            path.parent.mkdir(parents=True, exist_ok=True)
            is_mine = hold(stack.enter_context(path.open("ab")))
        yield is_mine


def _clear(folder: Path) -> None:
    for pattern in UNFINISHED:
        for path in folder.glob(pattern):
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
