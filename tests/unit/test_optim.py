"""Learning rates, averaged weights, and an optimizer that is whole from the start."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from taehv.config import Optim
from taehv.optim import Ema, build_optimizer, learning_rate


@pytest.mark.parametrize(
    ("schedule", "middle", "end"),
    [("constant", 2.0, 2.0), ("linear", 1.2, 0.4), ("cosine", 1.2, 0.4)],
)
def test_learning_rate(schedule: str, middle: float, end: float) -> None:
    settings = Optim(lr=2.0, warmup_steps=3, schedule=schedule, final_lr_scale=0.2)
    rates = [learning_rate(step, 23, settings) for step in range(24)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert (rates[13], rates[23]) == pytest.approx((middle, end))
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_cosine_is_slow_at_both_ends() -> None:
    linear, cosine = (
        Optim(lr=1.0, warmup_steps=0, schedule=schedule)
        for schedule in ("linear", "cosine")
    )
    quarter = learning_rate(25, 100, cosine)
    assert quarter == pytest.approx(0.5 + 0.5**1.5)
    assert learning_rate(75, 100, cosine) == pytest.approx(1 - quarter)
    assert learning_rate(25, 100, linear) == pytest.approx(0.75)


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate(0, 10, Optim(lr=3.0, warmup_steps=0)) == 3.0


def test_a_run_shorter_than_its_warmup_only_rises() -> None:
    settings = Optim(lr=1.0, warmup_steps=9)
    assert learning_rate(4, 5, settings) == pytest.approx(0.5)


def small_network() -> nn.Module:
    """A few weights, the same in every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()


def set_gradients(network: nn.Module, seed: int) -> None:
    """Any gradients, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = noise.to(parameter)


def test_averaged_weights_follow_a_loop_by_hand() -> None:
    network = small_network()
    parameters = dict(network.named_parameters())
    ema = Ema(parameters, decay=0.3)
    expected = {name: p.detach().tolist() for name, p in parameters.items()}
    assert {name: w.tolist() for name, w in ema.weights.items()} == expected
    average = parameters["0.bias"].tolist()
    for step, decay in enumerate([1 / 10, 2 / 11, 3 / 12, 0.3, 0.3]):
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(step + 1)
        ema.update(step)
        now = parameters["0.bias"].tolist()
        average = [
            decay * a + (1 - decay) * w for a, w in zip(average, now, strict=True)
        ]
        assert ema.weights["0.bias"].tolist() == pytest.approx(average, rel=1e-12)
    assert not any(weight.requires_grad for weight in ema.weights.values())


def test_state_is_there_before_the_first_step_and_stays_in_place() -> None:
    network = small_network()
    optimizer = build_optimizer(network.parameters(), Optim())
    tensors = [
        optimizer.state[parameter][key]
        for parameter in network.parameters()
        for key in ("step", "exp_avg", "exp_avg_sq")
    ]
    assert all(not tensor.any() for tensor in tensors)
    addresses = [tensor.data_ptr() for tensor in tensors]
    set_gradients(network, 0)
    optimizer.step()
    assert all(tensor.any() for tensor in tensors)
    state = optimizer.state_dict()["state"]
    after = [value.data_ptr() for entry in state.values() for value in entry.values()]
    assert sorted(after) == sorted(addresses)


def test_three_steps_are_those_of_plain_adamw() -> None:
    settings = Optim(lr=0.1, betas=[0.8, 0.7], eps=1e-3, weight_decay=0.2)
    ours, theirs = small_network(), small_network()
    our_optimizer = build_optimizer(ours.parameters(), settings)
    their_optimizer = torch.optim.AdamW(
        theirs.parameters(), 0.1, (0.8, 0.7), 1e-3, 0.2, foreach=False
    )
    for seed in range(3):
        for network in (ours, theirs):
            set_gradients(network, seed)
        our_optimizer.step()
        their_optimizer.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    start = next(small_network().parameters())
    assert (next(ours.parameters()) - start).abs().max() > 0.1
