"""Networks that go on with a video call after call, replayed as CUDA graphs.

A call of a few frames takes a GPU less time than Python needs to launch its kernels. A
graph launches them all at once.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Literal

import torch
from torch import Tensor

from taehv.model import FrameMemory, VideoSequential

Graphing = bool | Literal["auto"]
WARMUP_CALLS = 2
"""Calls of a kind before one is recorded: the memory's tensors must be there, and what
comes but once is not worth it."""
MOST_PIXELS = 2**21
"""Of all frames of a call that "auto" replays, where they are most. An H200 needs
1.3 ms for 655,360 of them and Python 4 to 5 ms at any size, so that larger calls gain
little, and the memory of a graph counts."""


class Continuation:
    """Blocks and what they remember of one video.

    Args:
        blocks: the network.
        graph: see `StreamingTAEHV`.
    """

    def __init__(self, blocks: VideoSequential, graph: Graphing = "auto") -> None:
        self.graph = graph
        self._blocks = blocks
        self._weights = list(blocks.parameters())
        self._begin(())

    def _begin(self, kind: tuple[object, ...]) -> None:
        """Take frames of another kind."""
        self._kind, self._is_new = kind, True
        self._memory = FrameMemory()
        self._calls: Counter[tuple[object, ...]] = Counter()
        self._recordings: dict[tuple[object, ...], _Recording] = {}

    def reset(self) -> None:
        """Begin a new video; what is recorded stays, and serves frames of one shape."""
        self._memory.reset()
        self._is_new = True

    @torch.inference_mode(False)  # whose tensors could not be written outside of it
    @torch.no_grad()
    def __call__(self, x_NTCHW: Tensor) -> Tensor:
        """Run the blocks; the result may have no frames, and is the caller's."""
        N, T, *frame = x_NTCHW.shape
        kind = (N, *frame, x_NTCHW.dtype, x_NTCHW.device)
        if self._is_new and kind != self._kind:
            self._begin(kind)
        self._is_new = False
        if not self.graph or not can_record(x_NTCHW):
            return self._blocks(x_NTCHW, self._memory)
        places = (weight.data_ptr() for weight in self._weights)
        key = (T, *kind, frozenset(self._memory.waiting.items()), *places)
        if key not in self._recordings:
            if self._calls[key] < WARMUP_CALLS:
                return self._warm_up(x_NTCHW, key)
            waiting = dict(self._memory.waiting)
            try:
                self._recordings[key] = self._record(x_NTCHW)
            except torch.OutOfMemoryError:
                if self.graph is True:
                    raise
                self.graph, self._memory.waiting = False, waiting  # it fits without
                return self(x_NTCHW)
        return self._recordings[key].replay(x_NTCHW, self._memory)

    def _warm_up(self, x_NTCHW: Tensor, key: tuple[object, ...]) -> Tensor:
        result_NTCHW = self._blocks(x_NTCHW, self._memory)
        pixels = max(x[:, :, 0].numel() for x in (x_NTCHW, result_NTCHW))
        if self.graph is True or pixels <= MOST_PIXELS:
            self._calls[key] += 1
        return result_NTCHW

    def _record(self, x_NTCHW: Tensor) -> _Recording:
        # Once more in this thread: cuDNN keeps what it tried for each one by itself.
        self._blocks(x_NTCHW, copy.deepcopy(self._memory))
        other = next(iter(self._recordings.values()), None)
        return _Recording(self._blocks, x_NTCHW, self._memory, other)


def can_record(x_NTCHW: Tensor) -> bool:
    """Whether a call may become a graph: autocast's copies of weights do not last."""
    return x_NTCHW.is_cuda and not torch.is_autocast_enabled("cuda")


class _Recording:
    """One call over an input that stays where it is, recorded without being run.

    Recordings of one network share their memory: they never run side by side, and what
    one leaves is copied before the next begins.
    """

    def __init__(
        self,
        blocks: VideoSequential,
        x_NTCHW: Tensor,
        memory: FrameMemory,
        other: _Recording | None,
    ) -> None:
        self._input_NTCHW = x_NTCHW.clone()
        self._stream = other._stream if other else torch.cuda.Stream(x_NTCHW.device)
        self._graph = torch.cuda.CUDAGraph()
        # Threads that pin memory go on as they are.
        with torch.cuda.graph(
            self._graph,
            pool=other._graph.pool() if other else None,
            stream=self._stream,
            capture_error_mode="thread_local",
        ):
            self._output_NTCHW = blocks(self._input_NTCHW, memory)
        self._waiting = dict(memory.waiting)

    def replay(self, x_NTCHW: Tensor, memory: FrameMemory) -> Tensor:
        self._input_NTCHW.copy_(x_NTCHW)
        self._graph.replay()
        memory.waiting = dict(self._waiting)
        return self._output_NTCHW.clone()
