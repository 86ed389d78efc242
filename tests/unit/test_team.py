"""Threads that share the optimizer's work on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from taehv.optim import Ema, Optimizer
from taehv.sections import Optim
from taehv.team import Team, parts


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many PyTorch may use; with one, the caller works."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_parts_are_of_about_one_size() -> None:
    assert parts([5, 1, 4, 3, 3], 2) == [[0, 4], [1, 2, 3]]
    assert parts([7, 7], 8) == [[0], [1]]


def test_each_thread_computes_alone(threads: int) -> None:
    team = Team([torch.zeros(4) for _ in range(9)])

    def compute(number: int) -> int:
        torch.rand(10**6).add_(1)
        return torch.get_num_threads()

    assert team.map(compute) == [1] * threads
    assert torch.get_num_threads() == threads
    assert sorted(place for part in team.parts for place in part) == list(range(9))


def test_an_error_reaches_the_caller(threads: int) -> None:
    with pytest.raises(ZeroDivisionError):
        Team([torch.zeros(1)] * 4).map(lambda number: 1 // 0)


def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    assert len(Team([torch.zeros(1)] * 8).parts) == threads
    mine, norms = trained()
    torch.set_num_threads(2)
    others, other_norms = trained()
    assert torch.equal(norms, other_norms)
    assert all(map(torch.equal, mine, others))


def trained() -> tuple[list[Tensor], Tensor]:
    """Weights, averaged ones and norms after three steps."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(n, 700)) for n in (1, 90, 3, 60, 17)]
    optimizer = Optimizer(parameters, Optim(max_grad_norm=1.0))
    optimizer.lr.fill_(1e-2)
    ema = Ema(dict(zip("abcde", parameters, strict=True)), 0.5)
    norms = []
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        norms.append(optimizer.step(torch.zeros(()))[0])
        ema.update(torch.tensor(0.5))
    return [*parameters, *ema.weights.values()], torch.stack(norms)
