"""What a run tells: console, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from taehv.board import Board
from taehv.sections import Logging
from taehv.writing import GrowingFile, write_text

log = logging.getLogger("taehv")


def set_up_console(rank: int) -> None:
    """Send the package's messages to stderr: all of rank 0, warnings of the others."""
    handler = logging.StreamHandler()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(prefix + "%(message)s"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def truncate_records(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Drop the records after a step, which a resumed run will write again.

    Returns:
        The records that stay. A line that a crash cut short is dropped too.
    """
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] <= last_step:
            records.append(record)
    write_text(path, b"".join(map(_line, records)).decode())
    return records


class RunLog:
    """The records of a run, written by its main process alone.

    Args:
        folder: the run's folder.
        settings: section [logging].
        step: steps done before this process began.
        steps: steps of the whole run.
    """

    def __init__(self, folder: Path, settings: Logging, step: int, steps: int) -> None:
        self.interval = settings.interval
        self.steps = steps
        self._first, self._start = step, time.monotonic()
        last = step or -1  # a run that starts anew has no validation yet either
        truncate_records(folder / "metrics.jsonl", last)
        self.validations = truncate_records(folder / "validation.jsonl", last)
        self._metrics = GrowingFile(folder / "metrics.jsonl")
        self._validation = GrowingFile(folder / "validation.jsonl")
        self.board = Board(folder / "tensorboard", step + 1)
        self._open = ExitStack()
        for part in (self._validation, self._metrics, self.board):
            self._open.callback(part.close)
        self._open.enter_context(logging_redirect_tqdm([log]))
        self._bar = tqdm(
            initial=step,
            total=steps,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._open.callback(self._bar.close)

    def step(self, record: dict[str, Any], speed: dict[str, float]) -> None:
        """Note one finished step.

        Args:
            record: exact values for metrics.jsonl: step, losses, psnr, ...
            speed: what differs between equal runs: clips/s, data wait, memory.
        """
        step = record["step"]
        exact = {key: _or_null(value) for key, value in record.items()}
        self._metrics.write(_line(exact))
        psnr = f"PSNR {record['psnr']:5.2f} dB | " if "psnr" in record else ""
        line = (
            f"loss {record['loss']:.4f} | {psnr}{speed['clips_per_second']:.1f} clips/s"
        )
        self._bar.set_postfix_str(line, refresh=False)
        self._bar.update()
        if step % self.interval and step != self.steps:
            return
        for name, value in {**record, **speed}.items():
            if name != "step":
                self.board.scalar(_tag(name), value, step)
        if self._bar.disable:
            left = (time.monotonic() - self._start) / (step - self._first)
            left *= self.steps - step
            log.info(f"step {step}/{self.steps} | {line} | {clock(left)} left")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Show in TensorBoard what differs between equal runs."""
        for name, value in values.items():
            self.board.scalar(_tag(name), value, step)

    def validation(
        self,
        step: int,
        values: dict[str, float],
        intervals: dict[str, tuple[float, float]] | None = None,
    ) -> None:
        """Note the result of a validation.

        Args:
            step: at which the model was judged.
            values: of each measure.
            intervals: that hold the mean over all clips there could be, with 95 %.
        """
        exact = {name: _or_null(value) for name, value in values.items()}
        record = {"step": step, **exact, "intervals": intervals or {}}
        self.validations.append(record)
        self._validation.write(_line(record))
        for name, value in values.items():
            self.board.scalar(f"validation/{name}", value, step)

    def close(self) -> None:
        """Write out what is not written yet; a second call does nothing."""
        self._open.close()


def clock(seconds: float) -> str:
    """Seconds as minutes, or hours and minutes."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _or_null(value: float) -> float | None:
    """JSON has no numbers that are not finite."""
    return value if math.isfinite(value) else None


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _tag(name: str) -> str:
    return name if "/" in name else f"train/{name}"
