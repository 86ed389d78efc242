"""Locks of files, which the system undoes however a process ends."""

from __future__ import annotations

import fcntl
import logging
import time
from typing import IO

log = logging.getLogger("taehv")

PATIENCE = 30.0
"""Seconds in which a process that a new start replaces may still be dying."""


def hold(file: IO[bytes]) -> bool:
    """Lock a file until it is closed; false where another process keeps it locked.

    A killed process gives its locks back only when all that it had is cleared away, so
    whoever is started in its place waits for up to `PATIENCE` seconds.

    Raises:
        OSError: its file system has no locks.
    """
    begun = time.monotonic()
    is_told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not is_told:
                log.info(
                    f"{file.name} is locked by another process: waiting for its end"
                )
            is_told = True
        if time.monotonic() - begun >= PATIENCE:
            return False
        time.sleep(0.1)
