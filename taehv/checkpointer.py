"""The checkpoints of a run: written beside the training, kept, and found again."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import logging
import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import tomli
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from taehv.checkpoint import (
    ABOUT,
    CONFIG,
    State,
    checkpoint_in,
    complete_steps,
    dcp_writer,
    finish,
    read_config,
    step_folder,
    steps_in,
)
from taehv.distributed import check_agreement
from taehv.errors import UserError
from taehv.sections import Checkpoint
from taehv.shards import local, locals_of
from taehv.storage import Damaged, Folder, verify

log = logging.getLogger("taehv")
T = TypeVar("T")

LONG_WAIT = 1.0
"""Seconds that a save may hold up the training without a warning."""
POLL_STEPS = 8
"""Steps between two looks at a save: processes wait for one another in each."""
USUAL_SWITCH_SECONDS = sys.getswitchinterval()
SWITCH_SECONDS = 1e-4
"""How long a thread keeps Python from others while one saves. The training gives Python
up in every operation of PyTorch, and waits so long to have it again."""


class SaveFailed(Exception):
    """A save that could not be done, on whichever process."""


FAILURES = (SaveFailed, CheckpointException, RuntimeError)
"""What costs a save; gloo raises RuntimeError where a process is late or gone."""


@dataclass
class Saved:
    """A checkpoint that is complete."""

    step: int
    blocked_ms: float
    """How long the training stood still for it on this process."""
    seconds: float
    """From its beginning until it was complete."""


@dataclass
class _Pending:
    """A save in the background."""

    step: int
    done: concurrent.futures.Future[None] = field(repr=False)
    begun: float
    deadline: float
    blocked: float = 0.0
    """Seconds."""
    is_overdue: bool = False
    """Whether the deadline has passed on a process, which all know of."""
    times_late: int = 0
    """How often it was counted as failed."""
    polls: int = 0
    """Calls of `poll` since it began."""
    ended: float = 0.0
    """When its thread was done with it."""


class _Staging:
    """A copy of the state in this process's memory, which training does not change.

    It is made in the order of the device's work, so that nothing waits for it but
    what comes later on the device; the memory is pinned, and used again every time.
    """

    def __init__(self, state: State) -> None:
        tensors = [value for group in state.values() for value in group.values()]
        self.device = next((v.device for v in tensors if v.is_cuda), None)
        self.state = {
            group: {
                name: torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
                for name, value in tensors.items()
            }
            for group, tensors in state.items()
        }
        self._copies = _locals(self.state)
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def fill(self, state: State) -> None:
        """Begin to copy; on the CPU it is done afterwards."""
        values = _locals(state)
        copies = [self._copies[place] for place in values]
        torch._foreach_copy_(copies, list(values.values()), non_blocking=True)
        if self.device is not None:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> None:
        """Until the copy is there."""
        if self._copied is not None:
            # A new thread is at the first GPU, and would take memory there.
            torch.cuda.set_device(self.device)
            self._copied.synchronize()

    def check_finite(self) -> None:
        """Refuse a state that no training could go on from."""
        values = {
            f"{group}.{name}": part
            for group, tensors in self.state.items()
            for name, value in tensors.items()
            if (part := local(value)).is_floating_point() and part.numel()
        }
        # One call, which leaves Python to the training meanwhile.
        largest = torch._foreach_norm(list(values.values()), math.inf)
        for name, bound in zip(values, largest, strict=True):
            if not math.isfinite(bound):
                raise SaveFailed(f"{name} is not finite")


def _locals(state: State) -> dict[tuple[str, str], Tensor]:
    """This process's part of every tensor, by its group and name."""
    places = [(group, name) for group, of in state.items() for name in of]
    tensors = locals_of(state[group][name] for group, name in places)
    return dict(zip(places, tensors, strict=True))


class Checkpointer:
    """The checkpoints of one run: FOLDER/step-N, each written by all processes.

    A save copies the state and writes it in a thread while training goes on. The
    threads have a process group of their own. What became of a save is agreed upon by
    `poll`, which the loop calls at the same step on all processes.

    Args:
        folder: of the run's checkpoints.
        settings: section [checkpoint].
        on_saved: told of every checkpoint that is complete.
        run: its name, where the folder may be another run's.
    """

    def __init__(
        self,
        folder: Folder,
        settings: Checkpoint,
        on_saved: Callable[[Saved], None] = lambda saved: None,
        run: str = "",
    ) -> None:
        self.folder, self.settings, self._on_saved = folder, settings, on_saved
        self._run_name = run
        self.limit = timedelta(seconds=settings.time_limit)
        self.saved_step: int | None = None
        """The newest step that is known to be complete."""
        self.failures = 0
        """In a row."""
        self._staging: _Staging | None = None
        self._pending: _Pending | None = None
        self._group = dist.new_group(backend="gloo", timeout=self.limit)
        self._is_main = dist.get_rank() == 0

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pending is not None:
            futures = [self._pending.done]
            concurrent.futures.wait(futures, self.limit.total_seconds())

    def path(self, step: int) -> Folder:
        """Where the checkpoint of a step lies."""
        return step_folder(self.folder, step)

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, oldest first."""
        return complete_steps(self.folder)

    # --- finding -------------------------------------------------------------------

    def find(self) -> Folder | None:
        """What to go on from (a collective): the newest checkpoint, or the named one.

        Damaged ones are named, and renamed, so that nothing takes them for good ones.

        Raises:
            UserError: all are damaged, there is none of the name, or there are some and
                are not wanted or are another run's.
        """
        named = self.settings.resume_from
        self._check_own()
        if self.steps() and not self.settings.resume:
            raise UserError(
                f"{self.folder} holds checkpoints of an earlier run and "
                "checkpoint.resume is false: choose another --job.name, or delete them"
            )
        check_agreement({"newest checkpoint": max(self.steps(), default=-1)})
        if isinstance(named, int):
            return self._find_from(named)
        steps = self.steps()
        found = self._find_good(steps)
        if found is None and steps:
            raise UserError(
                f"all checkpoints in {self.folder} are damaged: see above; to begin "
                "anew choose another --job.name"
            )
        if named and found is not None:
            log.info(
                f"going on with {self.folder}, which has checkpoints, and not with "
                f"checkpoint.resume_from = {named}: for that take another --job.name"
            )
        elif named:
            found = checkpoint_in(Folder(named))
            if (damage := damage_of(found)) is not None:
                raise UserError(f"checkpoint.resume_from: {damage}; name another")
        return found

    def _check_own(self) -> None:
        """Refuse the folder of another run: each would take the other's for its own."""
        if not self._run_name:
            return
        found = (self._settings_of(step) or {} for step in reversed(self.steps()))
        names = (settings.get("job", {}).get("name") for settings in found)
        owner = next((name for name in names if name), self._run_name)
        if owner != self._run_name:
            raise UserError(
                f"checkpoint.folder = {self.folder} has the checkpoints of job.name "
                f"{owner!r}: name another folder, and to start from that run add "
                f"--checkpoint.resume_from {self.folder}, or for its weights alone "
                f"--model.checkpoint {self.folder}"
            )

    def _find_from(self, first: int) -> Folder:
        """The newest of the course that began at a step, or that step's checkpoint."""
        steps = [step for step in self.steps() if step >= first]
        own = [s for s in steps if s == first or self._is_of_this_course(s)]
        dist.barrier()  # all have seen them
        found = self._find_good(own)
        if found is None:
            there = ", ".join(map(str, self.steps())) or "none"
            told = "is damaged" if own else f"is no checkpoint in {self.folder}"
            raise UserError(
                f"checkpoint.resume_from = {first} {told}: take one that is there "
                f"({there})"
            )
        for step in (step for step in steps if step not in own):
            log.info(f"{self.path(step)} is of another course: set aside")
            self._set_aside(step, "aside")
        return found

    def _is_of_this_course(self, step: int) -> bool:
        settings = self._settings_of(step)
        if settings is None:
            return True  # it is damaged, and will be found so
        begun_from = settings.get("checkpoint", {}).get("resume_from")
        return begun_from == self.settings.resume_from

    def _settings_of(self, step: int) -> dict[str, dict[str, Any]] | None:
        """Those that a checkpoint was made with; None where they are damaged."""
        try:
            return tomli.loads(read_config(self.path(step)))
        except UserError:
            return None

    def _find_good(self, steps: list[int]) -> Folder | None:
        """The newest of these that is as it was written."""
        for step in reversed(steps):
            damage = damage_of(self.path(step))
            if damage is None:
                self.saved_step = step
                return self.path(step)
            if self._is_main:
                log.warning(f"{damage}; taking the checkpoint before it")
            self._set_aside(step, "damaged")
        return None

    def _set_aside(self, step: int, why: str) -> None:
        """Rename a checkpoint, so that it counts no more (a collective)."""
        if self._is_main:
            self.path(step).rename(self._free_name(f"step-{step}.{why}"))
        dist.barrier()

    def _free_name(self, name: str) -> str:
        """The name, with a number if something has it: that stays as it is."""
        there = self.folder.names()
        names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
        return next(name for name in names if name not in there)

    # --- saving --------------------------------------------------------------------

    def prepare(self, state: State) -> None:
        """Take the memory that saves need, which takes longer than a save."""
        if self._staging is None:
            self._staging = _Staging(state)

    def save(self, step: int, state: State, texts: dict[str, str]) -> None:
        """Begin to write the state of a step, or write it (a collective).

        A save before it is waited for.

        Args:
            step: names the folder.
            state: see training_state.
            texts: files to lie beside it, by their names.

        Raises:
            UserError: too many saves in a row have failed.
        """
        before = time.monotonic()
        if self._pending is not None and self._pending.times_late:
            self._check_late()  # training does not wait for it any longer
        else:
            self.wait()
        if self._pending is not None:
            return
        begun = time.monotonic()
        waited = begun - before
        if waited > LONG_WAIT and self._is_main:
            log.warning(
                f"step {step} waited {waited:.0f} s for the save before it: raise "
                "checkpoint.interval, or name a faster checkpoint.folder"
            )
        self.prepare(state)
        self._staging.fill(state)
        deadline = begun + self.settings.time_limit
        self._pending = _Pending(step, concurrent.futures.Future(), begun, deadline)
        arguments = (self._pending, self._staging, texts)
        threading.Thread(target=self._run, args=arguments, daemon=True).start()
        self._pending.blocked = time.monotonic() - begun
        if not self.settings.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Learn after some steps whether the save in the background is done.

        A collective, which costs nothing where there is none, else a reduction on the
        CPU now and then.

        Raises:
            UserError: too many saves in a row have failed.
        """
        if self._pending is not None:
            self._pending.polls += 1
            if self._pending.polls % POLL_STEPS == 0:
                self._agree()

    def _agree(self) -> None:
        """Learn whether the save in the background is done (a collective)."""
        pending = self._pending
        if pending is None:
            return
        begun = time.monotonic()
        done = pending.done.done()
        error = pending.done.exception() if done else None
        if error is not None and not isinstance(error, FAILURES):
            raise error
        is_sound = not isinstance(error, RuntimeError)
        in_time = begun < pending.deadline
        verdict = torch.tensor([done, error is None, is_sound, in_time]).int()
        dist.all_reduce(verdict, op=dist.ReduceOp.MIN)
        done, is_good, is_sound, in_time = map(bool, verdict.tolist())
        pending.blocked += time.monotonic() - begun
        pending.is_overdue = not in_time
        if not done:
            return
        self._pending = None
        if not is_sound:  # what is left of it would disturb the next save
            before = self._group
            self._group = dist.new_group(backend="gloo", timeout=self.limit)
            dist.destroy_process_group(before)  # no thread is left in it
        if is_good:
            self._succeeded(pending)
        elif not pending.times_late:
            self._failed(pending, _cause(error))

    def wait(self) -> None:
        """As `_agree`, once the save is done or too late, and so failed."""
        pending, begun = self._pending, time.monotonic()
        if pending is not None:
            left = pending.deadline - begun
            concurrent.futures.wait([pending.done], max(0.0, left))
            pending.blocked += time.monotonic() - begun
            self._check_late()

    def _check_late(self) -> None:
        """As `_agree`; every time limit that a save takes is a failure."""
        self._agree()
        pending = self._pending
        if pending is not None and pending.is_overdue:
            pending.times_late += 1
            pending.deadline += self.settings.time_limit
            late = pending.times_late * self.settings.time_limit
            self._failed(pending, f"not done in {late} s")

    def _succeeded(self, pending: _Pending) -> None:
        self.failures, self.saved_step = 0, pending.step
        seconds = pending.ended - pending.begun
        saved = Saved(pending.step, pending.blocked * 1000, seconds)
        log.info(
            f"saved step {saved.step} in {saved.seconds:.1f} s, the training stood "
            f"still for {saved.blocked_ms:.1f} ms"
        )
        self._on_saved(saved)

    def _failed(self, pending: _Pending, cause: str) -> None:
        self.failures += 1
        most = self.settings.max_failures
        if self._is_main:
            log.warning(
                f"step {pending.step} is not saved ({cause}); failed saves in a row: "
                f"{self.failures} of at most {most}"
            )
        if self.failures >= most:
            kept = "there is none"
            if self.saved_step is not None:
                kept = f"the last is {self.path(self.saved_step)}"
            raise UserError(
                f"{self.failures} checkpoints in a row could not be written ({cause}): "
                f"mend that, and the same command goes on from the last ({kept})"
            )

    # --- in the background -----------------------------------------------------------

    def _run(self, pending: _Pending, staging: _Staging, texts: dict[str, str]) -> None:
        error = None
        sys.setswitchinterval(SWITCH_SECONDS)
        try:
            self._write(pending.step, staging, texts)
        except BaseException as raised:  # raised again by poll
            error = raised
        sys.setswitchinterval(USUAL_SWITCH_SECONDS)
        pending.ended = time.monotonic()
        if error is None:
            pending.done.set_result(None)
        else:
            pending.done.set_exception(error)

    def _write(self, step: int, staging: _Staging, texts: dict[str, str]) -> None:
        staging.wait()
        self._together(staging.check_finite)
        folder = self.path(step)
        self._together(lambda: self._is_main and _emptied(folder))
        writer, disk = dcp_writer(folder)
        try:
            dcp.save(staging.state, storage_writer=writer, process_group=self._group)
            entries: dict[str, Any] = {}
            for written in self._together(lambda: disk.entries):
                entries |= written
            self._together(lambda: self._is_main and finish(folder, entries, texts))
        except FAILURES:
            if self._is_main:
                with contextlib.suppress(Exception):  # as in _together
                    folder.remove()
            raise
        if self._is_main:
            self._drop(step)

    def _together(self, action: Callable[[], T]) -> list[T]:
        """What each process's action returns; where one fails, all do."""
        mine, told = None, None
        try:
            mine = action()
        except Exception as error:  # every file system has errors of its own
            told = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, (mine, told), group=self._group)
        for _, told in results:
            if told is not None:
                raise SaveFailed(told)
        return [result for result, _ in results]

    def _drop(self, newest: int) -> None:
        """Remove what need not be kept, and what interrupted saves have left."""
        try:
            complete, every = self.steps(), self.settings.keep_every
            kept = set(complete[-self.settings.keep :])
            kept |= {step for step in complete if every and step % every == 0}
            for step in steps_in(self.folder):
                if step < newest and step not in kept:
                    self.path(step).remove()
        except Exception as error:  # as in _together
            log.warning(f"cannot remove old checkpoints in {self.folder} ({error})")


def damage_of(folder: Folder) -> str | None:
    """What is wrong with a checkpoint, which processes verify together (a collective).

    Returns:
        None where all of its bytes are as they were written.
    """
    told = None
    try:
        verify(folder, dist.get_rank(), dist.get_world_size())
    except Damaged as error:
        told = str(error)
    all_told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(all_told, told)
    return next((text for text in all_told if text is not None), None)


def texts_beside(about: dict[str, str], config: str) -> dict[str, str]:
    """The files of text in a checkpoint."""
    return {ABOUT: json.dumps(about, indent=1), CONFIG: config}


def _emptied(folder: Folder) -> None:
    """A new folder: what an interrupted save left behind would be taken along."""
    folder.remove()
    folder.make()


def _cause(error: BaseException | None) -> str:
    """Why a save failed, in one line."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {type(cause).__name__}: {cause}".splitlines()[0]
    return str(error or "another rank failed").splitlines()[0]
