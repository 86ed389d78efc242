"""Processes, device, mesh, sharding, compilation, reductions and the stop signal."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from taehv.errors import INTERRUPT_CODE, STOPPED, UserError
from taehv.sections import Compile, Parallelism, Seraena

COMPILED = Path("~/.cache/taehv/inductor")
SHAPES = 64
"""How many shapes of input, of all compiled modules together, a run may have."""
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: which signal the end of its parent sends to a process."""


@dataclass(frozen=True)
class World:
    """This process's place among all of them."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        """Whether this process writes what only one may write."""
        return self.rank == 0


@contextmanager
def started(
    parallelism: Parallelism,
    device: Literal["auto", "cuda", "cpu"],
    patience: timedelta | None = None,
) -> Iterator[World]:
    """Open the process group for the time of the context.

    Works under torchrun and, as a single process, without it. `patience` is how long a
    process waits for the others, by default as long as PyTorch has it.

    Raises:
        UserError: CUDA is asked for and absent, or there are more processes than GPUs.
    """
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device, local_rank)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        if "MASTER_ADDR" not in os.environ:
            raise UserError(
                "RANK is set, but not MASTER_ADDR: start with torchrun, or unset RANK"
            )
        try:
            # torchrun's store remembers the processes that it has started anew
            # since (github.com/pytorch/pytorch/issues/135712).
            store = meeting_store(attempt()) if _has_one_agent() else None
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=patience
            )
        except dist.DistNetworkError as error:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            reason = str(error).splitlines()[0]
            raise UserError(
                f"the processes cannot meet at {place} ({reason}): another job may "
                "use that port, take another (torchrun --standalone finds a free one)"
            ) from None
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield World(rank, size, chosen, make_mesh(chosen, parallelism, size))
    except BaseException:
        # NCCL would first wait for what the others still take part in.
        if size == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def attempt() -> int:
    """How often this machine's torchrun has started its processes anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def meeting_store(attempt: int) -> dist.Store:
    """A connection of its own to the store in which torchrun lets processes meet.

    One connection serves one call at a time, and other threads wait in theirs.

    Args:
        attempt: the same on all processes that are to meet.
    """
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
    )
    return dist.PrefixStore(f"attempt {attempt}", store)


def _has_one_agent() -> bool:
    """Whether one torchrun holds the store, and counts its attempts alone.

    Those of several machines do not count the same.
    """
    holds = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return holds and os.environ["GROUP_WORLD_SIZE"] == "1"


def make_mesh(
    device: torch.device, parallelism: Parallelism, world_size: int
) -> DeviceMesh:
    """All processes, as copies of the model and those that share one (collective)."""
    return init_device_mesh(
        device.type,
        mesh_shape(parallelism, world_size),
        mesh_dim_names=("replicate", "shard"),
    )


def mesh_shape(parallelism: Parallelism, world_size: int) -> tuple[int, int]:
    """(copies of the model, processes that share one copy)."""
    shard = {
        "replicate": 1,
        "fsdp": world_size,
        "hsdp": parallelism.shard_size,
    }[parallelism.mode]
    return world_size // shard, shard


def _device(choice: Literal["auto", "cuda", "cpu"], local_rank: int) -> torch.device:
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "training.device = cuda, but PyTorch sees no GPU here: set it to auto or "
            "cpu, or install a PyTorch built for CUDA"
        )
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > torch.cuda.device_count():
        raise UserError(
            f"{processes} processes on a machine with {torch.cuda.device_count()} "
            f"GPUs: use --nproc_per_node {torch.cuda.device_count()}"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def compute_dtype(
    precision: Literal["auto", "bf16", "fp32", "fp64"], device: torch.device
) -> torch.dtype:
    """The number format of the network's arithmetic on this device."""
    if precision != "auto":
        formats = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
        return formats[precision]
    fast = (
        torch.cuda.is_bf16_supported(False)
        if device.type == "cuda"
        else _cpu_has_bf16()
    )
    return torch.bfloat16 if fast else torch.float32


def _cpu_has_bf16() -> bool:
    """Whether this CPU multiplies in bf16; emulation is slower than float32."""
    # PyTorch has had the private forms longer than torch.cpu.get_capabilities().
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def shard(roots: list[nn.Module], mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Apply FSDP2 to each module as a root of its own.

    Separate roots may be called in any order, and the parent keeps no parameters. On a
    mesh of (N, 1) nothing is gathered or scattered: that is DistributedDataParallel
    with the same DTensors, checkpoints and clipping as the sharded forms.
    """
    policy = MixedPrecisionPolicy()
    if dtype == torch.bfloat16:
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32
        )
    # Nothing writes in place to what encoder and decoder return.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for root in roots:
        fully_shard(root, mesh=mesh, reshard_after_forward=False, mp_policy=policy)


def uses_compile(settings: Compile, device: torch.device) -> bool:
    """Whether networks are to be compiled on this device."""
    return device.type == "cuda" if settings.enable == "auto" else settings.enable


def prepare_networks(settings: Compile, device: torch.device) -> bool:
    """Set PyTorch up for inputs of few, fixed shapes.

    Returns:
        Whether networks are to be compiled.
    """
    # Each algorithm of cuDNN is tried once a shape, compiled or not.
    torch.backends.cudnn.benchmark = True
    enabled = uses_compile(settings, device)
    if enabled:
        keep_compiled_code()
        # All modules of a class share one count, and one too many would end the run.
        torch._dynamo.config.recompile_limit = SHAPES
    return enabled


def cast_at_borders(root: nn.Module, dtype: torch.dtype) -> None:
    """Give a module of bf16 weights the inputs and outputs that `shard` gives it."""
    root.register_forward_pre_hook(lambda _, inputs: tuple(x.to(dtype) for x in inputs))
    root.register_forward_hook(lambda _, inputs, output: output.float())


def compile_in_place(
    roots: list[nn.Module], settings: Compile, device: torch.device
) -> bool:
    """Prepare for inputs of few, fixed shapes, and compile modules, each as one graph.

    Its parameters keep their names.

    Returns:
        Whether the modules are compiled.
    """
    enabled = prepare_networks(settings, device)
    if enabled:
        for root in roots:
            # Without dynamic=False a second shape would compile anew for any shape,
            # and inductor lays out no memory for convolutions of unknown ones.
            root.compile(fullgraph=True, dynamic=False, mode=settings.mode)
    return enabled


def keep_compiled_code(folder: Path = COMPILED) -> None:
    """Let the next run find this one's code, in a folder that outlives a restart.

    Where the user has chosen TORCHINDUCTOR_CACHE_DIR, or the folder cannot be made,
    PyTorch's own choice stays.
    """
    with suppress(OSError):
        folder.expanduser().mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.expanduser()))


def uses_cuda_graph(settings: Compile, seraena: Seraena, device: torch.device) -> bool:
    """Whether the training step is to be replayed as one CUDA graph.

    Raises:
        UserError: it is asked for, and there is no CUDA here.
    """
    if settings.cuda_graph is True and device.type != "cuda":
        raise UserError("compile.cuda_graph = true needs a GPU: set it to auto")
    if settings.cuda_graph != "auto" or device.type != "cuda":
        return settings.cuda_graph is True
    # A graph cannot hold what the host has to take part in.
    is_on_host = seraena.replay_device == "cpu" and seraena.replay_size > 0
    return not (seraena.enable and is_on_host)


def set_gradient_sync(roots: list[nn.Module], enabled: bool) -> None:
    """Reduce gradients over the processes in the next backward pass, or keep them."""
    for root in roots:
        assert isinstance(root, FSDPModule)
        root.set_requires_gradient_sync(enabled)


def mean_over_ranks(values: Tensor) -> Tensor:
    """Average a small tensor over all processes."""
    dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values / dist.get_world_size()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a small tensor over all processes."""
    dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def merged_over_ranks(values: dict[int, Any]) -> dict[int, Any]:
    """The dictionaries of all processes as one, in the order of its keys (collective).

    Args:
        values: what can be pickled, under keys that no other process has.
    """
    parts: list[dict[int, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    return dict(sorted(item for part in parts for item in part.items()))


def check_agreement(values: dict[str, int]) -> None:
    """Raise a UserError on all processes where one of the values differs (collective).

    Args:
        values: by the name that a user knows them by.
    """
    lowest = torch.tensor(list(values.values()))
    highest = lowest.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    for name, low, high in zip(values, lowest, highest, strict=True):
        if low != high:
            raise UserError(
                f"the processes do not see the same {name}: give all machines the "
                "same files, in a folder that they share"
            )


def from_main(value: int) -> int:
    """The main process's value, on all processes (a collective)."""
    shared = torch.tensor(value)
    dist.broadcast(shared, src=0)
    return int(shared)


def _is_launched() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _hear_of_launcher() -> None:
    """Have the kernel send SIGTERM when torchrun ends: once killed, it cannot."""
    if _is_launched() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class StopSignal:
    """Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP on any process, agreed upon by all of them.

    The end of torchrun is a SIGTERM, too. Ctrl-C after any of them ends this process at
    once. Python calls a signal's handler when it next runs the main thread, which may
    be waiting in a collective, so a thread listens as well.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self) -> None:
        self.received = 0
        self._heard = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        _hear_of_launcher()
        self._ear, self._mouth = os.pipe()
        os.set_blocking(self._mouth, False)
        threading.Thread(target=self._listen, args=[self._ear], daemon=True).start()
        signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)
        for number in self.NUMBERS:
            # nohup's wish; torchrun does not keep it, and ends what it has started.
            is_ignored = signal.getsignal(number) == signal.SIG_IGN
            if number == signal.SIGHUP and is_ignored and not _is_launched():
                continue
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(-1)
        os.close(self._mouth)  # which ends the thread

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def _listen(self, ear: int) -> None:
        """Read the numbers of signals as they arrive."""
        while heard := os.read(ear, 1):
            (number,) = heard
            if number not in self.NUMBERS:
                continue
            if self._heard and number == signal.SIGINT:
                print(STOPPED, file=sys.stderr, flush=True)
                os._exit(INTERRUPT_CODE)
            self._heard = self.received = number
        os.close(ear)

    def agreed(self) -> bool:
        """Whether any process was asked to stop (a collective, on the CPU)."""
        flag = torch.tensor(self.received)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)
