"""One step as the device sees it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from taehv import TAEHV
from taehv.distributed import shard, started
from taehv.losses import Targets
from taehv.offload import Masters
from taehv.optim import Ema, Optimizer
from taehv.sections import Loss, Optim, Parallelism
from taehv.shards import local
from taehv.step import TrainingStep

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Graph:
    """Stands for a torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.is_there = True

    def reset(self) -> None:
        self.is_there = False


class Captured:
    """Stands for what was recorded."""

    def __init__(self) -> None:
        self.graph = Graph()


def test_graphs_are_let_go_of() -> None:
    """NCCL would wait for them without end."""
    optimizer = SimpleNamespace(lr=torch.zeros(()))
    step = TrainingStep(None, [], optimizer, None, Loss(), graph=False)
    for let_go in (step.release, lambda: step.renew(optimizer, None, Loss())):
        captured = Captured()
        step._captured["alone", ()] = captured
        let_go()
        assert not step._captured and not captured.graph.is_there


@ON_GPU
@pytest.mark.parametrize("offload", [False, True])
def test_a_graph_is_captured_anew_after_release(offload: bool) -> None:
    torch.manual_seed(0)
    with started(Parallelism(), "cuda") as world:
        model = TAEHV("taehv").to(world.device)
        roots = [model.encoder, model.decoder]
        shard(roots, world.mesh, torch.bfloat16)
        named = dict(model.named_parameters())
        masters = Masters(named.values()) if offload else None
        optimizer = Optimizer(named.values(), Optim(), masters=masters)
        ema = Ema(named, 0.9, masters)
        step = TrainingStep(model, roots, optimizer, ema, Loss(), True)
        frames_NTCHW = torch.rand(2, 4, 3, 32, 32, device=world.device)
        losses = []
        for number in range(12):
            if number == 6:
                step.release()
            result = step([Targets(frames_NTCHW)], number, 1e-3)
            losses.append(result.values[0].item())
        assert losses[-1] < losses[0] and len(step._captured) == 1
        if masters is not None:
            pairs = zip(named.values(), masters.of(named.values()), strict=True)
            assert all(torch.equal(local(p).cpu(), master) for p, master in pairs)
        step.release()
