"""Learning rates, averaged weights, and an optimizer that is whole from the start."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from taehv.muon import orthogonal, orthogonal_each
from taehv.offload import Masters
from taehv.optim import (
    Ema,
    Optimizer,
    learning_rate,
    new_optimizer,
    total_norm,
)
from taehv.sections import Optim
from taehv.team import Team


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


def test_wsd_is_constant_up_to_its_decay() -> None:
    settings = Optim(lr=2.0, warmup_steps=10, schedule="wsd", final_lr_scale=0.2)
    rates = [learning_rate(step, 100, settings) for step in range(101)]
    assert rates[9] < 2 and set(rates[10:81]) == {2.0}
    assert rates[85] == pytest.approx(0.4 + 1.6 * 0.5)  # a quarter of the decay
    assert rates[100] == pytest.approx(0.4)
    assert rates[80:] == sorted(rates[80:], reverse=True)
    settings.decay_share = 1.0
    assert learning_rate(10, 100, settings) == 2 > learning_rate(11, 100, settings)
    settings.decay_share = 0.0
    assert learning_rate(99, 100, settings) == 2


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
        assert ema.share(step) == pytest.approx(1 - decay)
        ema.update(torch.tensor(ema.share(step), dtype=torch.float64))
        now = parameters["0.bias"].tolist()
        average = [
            decay * a + (1 - decay) * w for a, w in zip(average, now, strict=True)
        ]
        assert ema.weights["0.bias"].tolist() == pytest.approx(average, rel=1e-12)
    assert not any(weight.requires_grad for weight in ema.weights.values())


GOOD = torch.tensor(1.0)


def tensors_of(optimizer: Optimizer) -> list[torch.Tensor]:
    """Its state."""
    return [value for state in optimizer.state.values() for value in state.values()]


def test_state_is_there_before_the_first_step_and_stays_in_place() -> None:
    network = small_network()
    optimizer = Optimizer(network.parameters(), Optim())
    before = tensors_of(optimizer)
    assert len(before) == 3 * len(list(network.parameters()))
    assert all(not tensor.any() for tensor in before)
    optimizer.lr.fill_(0.1)
    set_gradients(network, 0)
    optimizer.step(GOOD)
    assert all(tensor.any() for tensor in before)


@pytest.mark.parametrize("max_grad_norm", [0, 1e-3, 1.0, 1e3])
def test_three_steps_are_those_of_plain_adamw(max_grad_norm: float) -> None:
    settings = Optim(
        betas=[0.8, 0.7], eps=1e-3, weight_decay=0.2, max_grad_norm=max_grad_norm
    )
    ours, theirs = small_network(), small_network()
    our_optimizer = Optimizer(ours.parameters(), settings)
    their_optimizer = torch.optim.AdamW(
        theirs.parameters(), 0.1, (0.8, 0.7), 1e-3, 0.2, foreach=False
    )
    for seed in range(3):
        for network in (ours, theirs):
            set_gradients(network, seed)
        rate = 0.1 / (seed + 1)
        our_optimizer.lr.fill_(rate)
        their_optimizer.param_groups[0]["lr"] = rate
        expected = torch.nn.utils.clip_grad_norm_(
            theirs.parameters(), max_grad_norm or float("inf")
        )
        norm, is_applied = our_optimizer.step(GOOD)
        their_optimizer.step()
        assert norm.item() == pytest.approx(expected.item()) and is_applied
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            # clip_grad_norm_ adds 1e-6 to the norm, and our scale is in fp32.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert a.grad is None
    start = next(small_network().parameters())
    assert (next(ours.parameters()) - start).abs().max() > 0.01


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(bad: str) -> None:
    network = small_network()
    optimizer = Optimizer(network.parameters(), Optim(weight_decay=0.1))
    optimizer.lr.fill_(0.1)
    set_gradients(network, 0)
    optimizer.step(GOOD)
    everything = [*network.parameters(), *tensors_of(optimizer)]
    before = [tensor.detach().clone() for tensor in everything]
    set_gradients(network, 1)
    loss = GOOD
    if bad == "gradient":
        next(network.parameters()).grad[0, 0, 0, 0] = float("nan")
    else:
        loss = torch.tensor(float("inf"))
    _, is_applied = optimizer.step(loss)
    assert not is_applied
    assert all(map(torch.equal, before, everything))
    set_gradients(network, 1)
    assert optimizer.step(GOOD)[1]
    assert not any(map(torch.equal, before, everything))


# Learning rates of parts, and Muon


class Grouped(nn.Sequential):
    """Convolutions of all kinds between a first and a last one."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3),
            nn.Conv2d(8, 8, 3, bias=False),
            nn.Conv2d(8, 16, 1),
            nn.Conv2d(16, 16, 3, groups=4),
            nn.Conv2d(16, 2, 1),
        )


def grouped_pair() -> tuple[Grouped, Grouped]:
    """An encoder and a decoder, the same in every call."""
    torch.manual_seed(0)
    return Grouped().double(), Grouped().double()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_parts_have_learning_rates_of_their_own(optimizer: str) -> None:
    moved = {}
    for scale in (1.0, 0.5, 0.0):
        encoder, decoder = parts = grouped_pair()
        settings = Optim(optimizer=optimizer, encoder_lr_scale=scale, weight_decay=0.5)
        stepper = new_optimizer(encoder, decoder, settings)
        stepper.lr.fill_(0.1)
        before = [p.detach().clone() for part in parts for p in part.parameters()]
        for seed, part in enumerate(parts):
            set_gradients(part, seed)
        assert stepper.step(GOOD)[1]
        after = [p.detach() for part in parts for p in part.parameters()]
        moved[scale] = [b - a for a, b in zip(before, after, strict=True)]
    half = len(moved[1.0]) // 2
    for i, whole in enumerate(moved[1.0]):
        share = (0.5, 0.0) if i < half else (1.0, 1.0)
        assert whole.any()
        for scale, expected in zip((0.5, 0.0), share, strict=True):
            torch.testing.assert_close(moved[scale][i], expected * whole)


def test_a_frozen_part_has_no_state() -> None:
    encoder, decoder = grouped_pair()
    encoder.requires_grad_(False)
    optimizer = new_optimizer(encoder, decoder, Optim(optimizer="muon"))
    assert optimizer.state.keys() == set(decoder.parameters())


def test_three_steps_of_muon_are_those_of_pytorch() -> None:
    """Of its own Muon, on each group's matrix, and of its AdamW on all else."""
    (ours, decoder), (theirs, _) = grouped_pair(), grouped_pair()
    decoder.requires_grad_(False)
    settings = Optim(optimizer="muon", weight_decay=0.2, max_grad_norm=0)
    optimizer = new_optimizer(ours, decoder, settings)
    hidden = [conv.weight for conv in list(theirs)[1:-1]]
    flat = [
        nn.Parameter(matrix.flatten(1).detach().clone())
        for conv in list(theirs)[1:-1]
        for matrix in conv.weight.chunk(conv.groups)
    ]
    muon = torch.optim.Muon(flat, 0.1, 0.2, adjust_lr_fn="match_rms_adamw")
    others = [p for p in theirs.parameters() if not any(p is w for w in hidden)]
    adamw = torch.optim.AdamW(others, 0.1, (0.9, 0.95), weight_decay=0.2)
    for seed in range(3):
        set_gradients(ours, seed)
        set_gradients(theirs, seed)
        gradients = [
            matrix.flatten(1)
            for conv in list(theirs)[1:-1]
            for matrix in conv.weight.grad.chunk(conv.groups)
        ]
        for matrix, gradient in zip(flat, gradients, strict=True):
            matrix.grad = gradient
        optimizer.lr.fill_(0.1)
        optimizer.step(GOOD)
        muon.step()
        adamw.step()
    found = torch.cat([conv.weight.flatten() for conv in list(ours)[1:-1]])
    expected = torch.cat([matrix.flatten() for matrix in flat])
    # PyTorch's iterates in bf16.
    error = (found - expected).square().mean().sqrt()
    start = torch.cat([weight.flatten() for weight in hidden])
    assert error < 0.02 * (expected - start).square().mean().sqrt()
    names = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if any(parameter is other for other in others):
            torch.testing.assert_close(names[name], parameter)


@pytest.mark.parametrize("shape", [(3, 8, 72), (2, 72, 8), (5, 1, 49)])
def test_orthogonal_matrices(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    matrices_BRC = torch.randn(shape, dtype=torch.float64)
    matrices_BRC[0] = 0
    (found_BRC,) = orthogonal_each([matrices_BRC], 0)
    assert not found_BRC[0].any()
    left, _, right = torch.linalg.svd(matrices_BRC[1:], full_matrices=False)
    singular = torch.einsum("brk,brc,bkc->bk", left, found_BRC[1:], right)
    assert singular.min() > 0.65 and singular.max() < 1.25
    remade = left @ torch.diag_embed(singular) @ right
    torch.testing.assert_close(found_BRC[1:], remade)


@pytest.fixture
def iterated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all that Muon iterates at once."""
    shapes: list[tuple[int, ...]] = []

    def told(wide_BRC: Tensor) -> Tensor:
        shapes.append(tuple(wide_BRC.shape))
        return orthogonal(wide_BRC)

    monkeypatch.setattr("taehv.muon.orthogonal", told)
    return shapes


@pytest.mark.parametrize(
    ("most_rows", "expected"),
    [
        (0, [(3, 8, 72), (3, 8, 16), (1, 8, 8), (2, 4, 9), (5, 1, 49), (1, 4, 30)]),
        (4, [(3, 8, 72), (3, 8, 16), (1, 8, 8), (3, 4, 30), (5, 1, 49)]),
        (8, [(7, 8, 72), (3, 4, 30), (5, 1, 49)]),
    ],
)
def test_matrices_of_several_shapes_are_made_orthogonal(
    most_rows: int, expected: list[tuple], iterated: list[tuple[int, ...]]
) -> None:
    """As each alone, and in as few products as asked for."""
    torch.manual_seed(0)
    shapes = [(3, 8, 72), (2, 16, 8), (1, 8, 8), (2, 4, 9), (5, 1, 49), (1, 4, 30)]
    shapes.append((1, 8, 16))
    batches = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    found = orthogonal_each(batches, most_rows)
    assert iterated == expected
    for batch_BRC, found_BRC in zip(batches, found, strict=True):
        (alone_BRC,) = orthogonal_each([batch_BRC], 0)
        torch.testing.assert_close(found_BRC, alone_BRC)


def test_muon_steps_are_the_same_at_once(iterated: list[tuple[int, ...]]) -> None:
    """As on a GPU, where small matrices are filled up."""
    moved, counts = [], []
    for most_rows in (0, 256):
        iterated.clear()
        encoder, decoder = grouped_pair()
        optimizer = new_optimizer(encoder, decoder, Optim(optimizer="muon"))
        optimizer._muon.most_rows = most_rows
        optimizer.lr.fill_(0.1)
        set_gradients(encoder, 1)
        set_gradients(decoder, 2)
        optimizer.step(GOOD)
        moved.append([*encoder.parameters(), *decoder.parameters()])
        counts.append(len(iterated))
    torch.testing.assert_close(moved[0], moved[1])
    assert 0 < counts[1] < counts[0]


def test_a_bad_step_of_muon_changes_nothing() -> None:
    encoder, decoder = grouped_pair()
    settings = Optim(optimizer="muon", weight_decay=0.1)
    optimizer = new_optimizer(encoder, decoder, settings)
    optimizer.lr.fill_(0.1)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    for is_bad in (False, True, False):
        before = [t.detach().clone() for t in [*parameters, *tensors_of(optimizer)]]
        set_gradients(encoder, 1)
        set_gradients(decoder, 2)
        if is_bad:
            encoder[2].weight.grad[0, 0, 0, 0] = float("nan")
        assert optimizer.step(GOOD)[1] != is_bad
        after = [*parameters, *tensors_of(optimizer)]
        same = list(map(torch.equal, before, after))
        assert all(same) if is_bad else not any(same)


def test_total_norm() -> None:
    tensors = [torch.tensor([3.0]), torch.zeros(0), torch.tensor([[0.0], [4.0]])]
    assert total_norm(tensors, Team(tensors)).item() == 5


def stepped(optimizer: Optimizer, norm: float) -> bool:
    """Whether a step is applied whose gradient has this norm."""
    (weight,) = optimizer.parameters
    weight.grad = torch.full_like(weight, norm / len(weight) ** 0.5)
    before = weight.clone()
    _, is_applied = optimizer.step(torch.tensor(1.0))
    assert bool(is_applied) != torch.equal(before, weight)
    return bool(is_applied)


def test_spikes_are_skipped_once_the_usual_norm_is_known() -> None:
    def optimizer(factor: float) -> Optimizer:
        built = Optimizer([nn.Parameter(torch.ones(4))], Optim(spike_factor=factor))
        built.lr.fill_(1e-3)
        return built

    guarded = optimizer(10)
    usual = [1 + step % 5 for step in range(32)]  # of the median 3
    assert all(stepped(guarded, norm) for norm in usual)
    assert stepped(guarded, 1000)  # one is missing to half of the history
    assert not stepped(guarded, 1000)
    assert not stepped(guarded, math.nan) and not stepped(guarded, 51)
    assert stepped(guarded, 29)
    # What lasts is no spike: it becomes usual.
    applied = [stepped(guarded, 1000) for _ in range(64)]
    assert not any(applied[:20]) and all(applied[40:])
    assert guarded.norms.isfinite().all()
    unguarded = optimizer(0)
    assert all(stepped(unguarded, norm) for norm in (*usual, 1, 1, 1e9))


def test_the_usual_norm_goes_on_from_a_checkpoint() -> None:
    first, second = (
        Optimizer([nn.Parameter(torch.ones(4))], Optim(spike_factor=10))
        for _ in range(2)
    )
    first.lr.fill_(1e-3), second.lr.fill_(1e-3)
    for _ in range(40):
        assert stepped(first, 1)
    second.norms.copy_(first.norms)
    assert not stepped(second, 11) and stepped(second, 9)


# On the CPU, with masters


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_masters_go_the_way_of_weights(kind: str) -> None:
    """To the bit, with a bad step, a part that is frozen, and averages."""
    settings = Optim(optimizer=kind, weight_decay=0.1, max_grad_norm=1.0)
    runs = []
    for new_masters in (lambda parameters: None, Masters):
        encoder, decoder = grouped_pair()
        encoder.requires_grad_(False)
        named = dict(nn.ModuleList([encoder, decoder]).named_parameters())
        masters = new_masters(named.values())
        optimizer = new_optimizer(encoder, decoder, settings, masters=masters)
        ema = Ema(named, 0.5, masters)
        optimizer.lr.fill_(0.1)
        found = []
        for seed in range(3):
            set_gradients(decoder, seed)
            if seed == 1:
                decoder[2].weight.grad[0, 0, 0, 0] = math.nan
            norm, is_good = optimizer.step(GOOD)
            assert is_good == (seed != 1)
            ema.update(torch.tensor(0.3, dtype=torch.float64) * is_good)
            found += [weight.detach().clone() for weight in named.values()]
            found += [average.clone() for average in ema.weights.values()]
        runs.append([*found, *tensors_of(optimizer), norm])
    assert all(map(torch.equal, *runs))
    assert not torch.equal(found[-1], found[len(named) - 1])


def test_masters_follow_weights_that_are_set() -> None:
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0, 2))]
    masters = Masters(weights)
    with torch.no_grad():
        weights[0].fill_(5)
    masters.refresh()
    assert masters.of(weights)[0].tolist() == [5, 5, 5]
    masters.of(weights)[0].fill_(6)
    assert weights[0].tolist() == [5, 5, 5]
    masters.upload()
    assert weights[0].tolist() == [6, 6, 6]
