"""Smaller copies of videos that decode faster: H.264 with close keyframes."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from taehv.errors import UserError
from taehv.files import VIDEO_SUFFIXES, FileList, Source, sources_of
from taehv.index import NAMED, list_files
from taehv.loader import worker_count
from taehv.pools import CRASHES, shared
from taehv.sections import Config, Proxy
from taehv.urls import is_url
from taehv.video import DISK_ERRORS, VideoError, is_image, reencode
from taehv.writing import write_text

log = logging.getLogger("taehv")

ABOUT = "proxy.json"
BAD_FILES = "bad_files.txt"
IN_THE_WAY = (FileExistsError, NotADirectoryError, IsADirectoryError)
"""A file where a folder must be, or the other way: copies of what is no more."""
NO_FOLDER = errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.ENOENT
"""Of a folder in which the user may not write, or that cannot be made."""


@dataclass(frozen=True)
class Copier:
    """Writes the copies of one data set; a copy that is there is not written again."""

    settings: Proxy
    files: FileList

    def target(self, i: int) -> str:
        """Where the copy of file i lies: under its own path, so that lists, held-out
        files and their hashes stay as they are."""
        return os.path.join(self.settings.folder, self.files.relative(i))

    def __call__(self, i: int) -> str:
        """Copy file i; what is wrong with it, or nothing."""
        path, target = self.files[i], self.target(i)
        try:
            if _is_newer(target, path):
                return ""
            os.makedirs(os.path.dirname(target), exist_ok=True)
            settings = self.settings
            if is_image(path):
                raise VideoError(f"{path} is a still image")
            reencode(
                path, target, settings.height, settings.keyframe_interval, settings.crf
            )
        except VideoError as error:
            return str(error)
        except (FileNotFoundError, *IN_THE_WAY) as error:
            return f"{path}: {error}"
        return ""


def _is_newer(target: str, path: str) -> bool:
    if is_url(path):  # which may not tell when it was written
        return os.path.exists(target)
    with suppress(FileNotFoundError, NotADirectoryError):
        return os.stat(target).st_mtime_ns >= os.stat(path).st_mtime_ns
    return False


def proxy_command(config: Config) -> None:
    """Write what is missing of the copies; bad files are named and left out.

    Raises:
        UserError: a setting is missing, the folder has copies of another kind, or
            there is nothing to copy.
    """
    copier = _copier(config)
    folder = Path(copier.settings.folder)
    try:
        bad = _write_copies(copier, worker_count(config.data.workers))
    except OSError as error:
        if error.errno not in DISK_ERRORS + NO_FOLDER:
            raise
        raise UserError(
            f"proxy.folder: {error.filename or folder} cannot be written "
            f"({error.strerror}): mend that, or name another folder"
        ) from None
    count = len(copier.files) - len(bad)
    if not count:
        raise UserError(
            f"none of {len(bad)} files can be copied: mend what {folder / BAD_FILES} "
            "says, or name others by data.root or data.annotations"
        )
    print(
        f"{count} copies in {folder}, {len(bad)} bad files"
        + (f" (listed in {folder / BAD_FILES})" if bad else "")
        + f"; train from them with --data.root {folder}"
    )


def _write_copies(copier: Copier, workers: int) -> list[str]:
    """Write what is missing, and a list of what is bad, which is returned."""
    folder, bad = Path(copier.settings.folder), []
    _check_folder(folder, copier.settings)
    bar = tqdm(total=len(copier.files), unit="file", disable=None)
    for reason in _copied(copier, workers):
        bar.update()
        if reason:
            bad.append(reason)
            log.warning(f"left out {reason}")
    bar.close()
    _tell_gone(copier)
    (folder / BAD_FILES).write_text(
        "".join(f"{reason}\n" for reason in sorted(bad)), errors="surrogateescape"
    )
    return bad


def _tell_gone(copier: Copier) -> None:
    """Name copies of what is not listed any more, which the user may delete."""
    wanted = {os.path.normpath(copier.target(i)) for i in range(len(copier.files))}
    found = (str(path) for path in Path(copier.settings.folder).rglob("*"))
    videos = (path for path in found if path.lower().endswith(VIDEO_SUFFIXES))
    if gone := sorted(path for path in videos if path not in wanted):
        more = f" and {len(gone) - NAMED} more" * (len(gone) > NAMED)
        log.warning(
            f"{len(gone)} copies are of videos that are not listed any more, and would "
            f"be trained on: delete {', '.join(gone[:NAMED])}{more}"
        )


def _copier(config: Config) -> Copier:
    if not config.proxy.folder:
        raise UserError("proxy.folder is empty: name the folder for the copies")
    if is_url(config.proxy.folder):
        raise UserError("proxy.folder is a URL: name a folder of this machine")
    if len(config.data.sources) > 1:
        raise UserError("proxy copies one data set at a time: name it by data.root")
    folder = os.path.abspath(os.path.expanduser(config.proxy.folder))
    (source,) = sources_of(config.data)
    files = list_files(config.data, source)
    _check_apart(folder, files.base, source)
    for i in range(len(files)):
        relative = files.relative(i)
        if os.path.isabs(relative) or is_url(relative) or ".." in relative.split("/"):
            raise UserError(
                f"{files[i]} does not lie under {files.base}, so that its copy has no "
                "place: set data.root to a folder that holds all videos"
            )
    settings = Proxy(**asdict(config.proxy) | {"folder": folder})
    return Copier(settings, files)


def _check_apart(folder: str, base: str, source: Source) -> None:
    """Refuse a folder whose copies would take the place of videos, or be copied."""
    folder, base = os.path.realpath(folder), os.path.realpath(base)
    is_searched = not source.annotations and folder.startswith(os.path.join(base, ""))
    if folder == base or is_searched:
        raise UserError("proxy.folder is data.root or inside it: name another folder")


def _check_folder(folder: Path, settings: Proxy) -> None:
    """Refuse to mix copies of several kinds in a folder."""
    about = {k: v for k, v in asdict(settings).items() if k != "folder"}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / ABOUT).exists():
        there = json.loads((folder / ABOUT).read_text())
        if there != about:
            raise UserError(
                f"{folder} has copies made with {there}, not {about}: take those "
                "settings, or name another proxy.folder"
            )
    elif any(folder.iterdir()):
        raise UserError(f"{folder} holds other files: name an empty proxy.folder")
    else:
        write_text(folder / ABOUT, json.dumps(about))


def _copied(copier: Copier, workers: int) -> Iterator[str]:
    """What is wrong with each file, or nothing, as they are done, in any order."""
    count = len(copier.files)
    if workers == 0:
        yield from map(copier, range(count))
        return
    with TemporaryDirectory(prefix="taehv-") as folder:
        sent = replace(copier, files=copier.files.save(folder))
        for i, reason in shared(sent, range(count), workers, "taehv.proxy"):
            yield f"{copier.files[i]}: {CRASHES}" if reason is None else reason
