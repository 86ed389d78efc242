"""What a user can cause, told in one line."""

from __future__ import annotations

import argparse
import atexit
import difflib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(ValueError):
    """A mistake that the user can mend; the text is one line that names the cure."""


RESTART_CODE = 75
"""Exit code of what a new start of the same command mends (EX_TEMPFAIL)."""


INTERRUPT_CODE = 130
"""128 + SIGINT, which a shell takes for Ctrl-C."""
STOPPED = "stopped at once"


class RestartError(RuntimeError):
    """An end from which the same command goes on; the text is one line."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message} (--help lists the options)")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: what it may be meant for."""
    known = sorted(known)
    # A section's name is so long a part of a key that the right key in the wrong
    # section would look less like it than a wrong key in that section.
    last = name.lstrip("-").split(".")[-1]
    elsewhere = [key for key in known if key.split(".")[-1] == last]
    match = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0)
    match = match or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {match[0]}?" if match else f"; known: {', '.join(known)}"


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run an entry point and end the process.

    A UserError becomes one line on stderr and exit code 2, a RestartError a line and
    RESTART_CODE, Ctrl-C a line and the usual 130, anything else its traceback and 1.
    """
    code = _exit_code(main)
    # Python's own end would kill a thread of gloo that gives back the last tensor just
    # then, and with it the process (SIGABRT, "terminate called without an active
    # exception"; one short run in four with PyTorch 2.14 and Python 3.11).
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_code(main: Callable[[], None]) -> int:
    """Run it, and tell what went wrong.

    Under torchrun every rank tends to hit the same mistake. The first local rank
    speaks at once and the others wait, so that torchrun has ended them before they
    repeat the line; a mistake that only a later rank hits is still told.
    """
    try:
        main()
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", "0")) > 0:
            time.sleep(2)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RestartError as error:
        print(f"error: {error}", file=sys.stderr)
        return RESTART_CODE
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return INTERRUPT_CODE
    except Exception:
        traceback.print_exc()
        return 1
    return 0
