"""The discriminator, its samples, its memory and its corrections, in one process."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from golden_vectors import MANIFEST, assert_same, formula_tensor, vectors
from torch import Tensor, nn

from taehv.distributed import World, shard, started
from taehv.errors import UserError
from taehv.losses import Decoded, Targets
from taehv.model import TAEHV
from taehv.optim import Ema, Optimizer
from taehv.sections import Loss, Optim, Parallelism
from taehv.sections import Seraena as Settings
from taehv.seraena import (
    CollapseWatch,
    FrameGroups,
    GlobalBatchNorm,
    Part,
    PatchDiscriminator,
    Replay,
    Samples,
    Seraena,
    View,
    new_discriminator,
    new_view,
)
from taehv.step import TrainingStep
from taehv.variants import VARIANTS

CPU = torch.device("cpu")
LIKE = torch.zeros(())
SHAPE = (9, 16, 16)


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[World]:
    with started(Parallelism(), "cpu") as world:
        yield world


def formula_discriminator() -> PatchDiscriminator:
    """The discriminator of the golden vectors."""
    discriminator = PatchDiscriminator(9, 16).eval()
    shapes = MANIFEST["seraena"]["state_dict"]
    weights = {key: formula_tensor(key, shape) for key, shape in shapes.items()}
    for key in weights:
        if key.endswith("running_var"):
            weights[key] = np.abs(weights[key]) + np.float32(0.5)
        elif key.endswith(".1.weight") and len(shapes[key]) == 1:
            weights[key] = weights[key] + np.float32(1)
        elif key.endswith("num_batches_tracked"):
            weights[key] = np.int64(7)
    discriminator.load_state_dict(
        {key: torch.as_tensor(value) for key, value in weights.items()}
    )
    return discriminator


def seraena(
    world: World,
    discriminator: nn.Module,
    frames: int = 9,
    replay: Replay | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: object,
) -> Seraena:
    shard([discriminator], world.mesh, torch.float32)
    given = Settings(enable=True, ramp_steps=0, weight=1.0, **settings)
    like = LIKE.to(dtype)
    groups = FrameGroups(VARIANTS["taehv"], frames, given.frames, like)
    guide = Seraena(discriminator, given, {SHAPE: View(2, groups, replay)}, like)
    guide.set_weight(0)
    return guide


def part_of(
    frames_NTCHW: Tensor, target_NTCHW: Tensor, latents_NTCHW: Tensor, draws: Tensor
) -> Part:
    N, T = frames_NTCHW.shape[:2]
    return Part(
        SHAPE,
        Decoded(frames_NTCHW, target_NTCHW, latents_NTCHW),
        torch.ones(N, T, dtype=torch.bool),
        draws,
        torch.ones(N, dtype=frames_NTCHW.dtype),
    )


# --- the discriminator -------------------------------------------------------------


def test_keys_and_scores_are_the_published_ones() -> None:
    expected, discriminator = vectors("seraena"), formula_discriminator()
    state = discriminator.state_dict()
    shapes = {key: list(value.shape) for key, value in state.items()}
    assert shapes == MANIFEST["seraena"]["state_dict"]
    with torch.no_grad():
        scores = discriminator(expected["real"], expected["ctx"])
    assert_same(scores, expected["scores_real_eval"])


def test_correction_is_the_published_one(world: World) -> None:
    expected = vectors("seraena")
    guide = seraena(world, formula_discriminator())
    # Each of the vectors is one group and has one latent, which no variant's clip has.
    guide.view.groups._context_GT = torch.ones(1, 1)
    guide.view.groups.starts, guide.view.groups._groups_T = [0], torch.ones(3)
    real, fake = (expected[name].unflatten(1, (3, 3)) for name in ("real", "fake"))
    part = part_of(fake, real, expected["ctx"][:, None], torch.zeros(4, 1, 3))
    (corrected,), weight = guide.guide([part], learns=False)
    assert_same((corrected - fake).flatten(1, 2), expected["correction"])
    assert weight == 1


def test_batch_norm_is_that_of_pytorch() -> None:
    torch.manual_seed(0)
    ours, theirs = GlobalBatchNorm(8), nn.BatchNorm2d(8)
    for norm in (ours, theirs):
        norm.weight.data, norm.bias.data = torch.linspace(-1, 2, 8), torch.ones(8)
    for _ in range(3):
        x_BCHW = torch.randn(4, 8, 5, 5) * 3 + 1
        ours_BCHW, theirs_BCHW = (x_BCHW.clone().requires_grad_() for _ in "ab")
        results = [ours(ours_BCHW), theirs(theirs_BCHW)]
        assert torch.allclose(*results, atol=1e-5)
        for result in results:
            result.pow(3).sum().backward()
        assert torch.allclose(ours_BCHW.grad, theirs_BCHW.grad, rtol=1e-4, atol=1e-3)
    for mine, other in zip(ours.eval().buffers(), theirs.eval().buffers(), strict=True):
        assert torch.allclose(mine, other, rtol=1e-5)
    assert torch.allclose(ours(x_BCHW), theirs(x_BCHW), atol=1e-5)


def on_two_processes(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[int], Tensor]
) -> list[Tensor]:
    """What a call returns on each of two processes, which are threads."""
    own, met, sent = threading.local(), threading.Barrier(2, timeout=10), {}

    def all_reduce(values: Tensor, op: object) -> None:
        sent[own.rank] = values.clone()
        met.wait()
        total = sent[0] + sent[1]
        met.wait()
        values.copy_(total)

    def run(rank: int) -> Tensor:
        own.rank = rank
        return call(rank)

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: own.rank)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


@pytest.mark.parametrize(("mean", "deviation"), [(1, 3), (30, 1e-3)])
def test_batch_norm_of_two_processes_is_that_of_one(
    monkeypatch: pytest.MonkeyPatch, mean: float, deviation: float
) -> None:
    torch.manual_seed(0)
    x_BCHW = torch.randn(8, 4, 6, 6) * deviation + mean
    shares_BCHW = torch.randn(8, 4, 6, 6)
    one = nn.BatchNorm2d(4).double()
    exact_BCHW = x_BCHW.double().requires_grad_()
    expected_BCHW = one(exact_BCHW)
    (expected_BCHW * shares_BCHW).sum().backward()

    def process(rank: int) -> Tensor:
        norm, half_BCHW = GlobalBatchNorm(4), x_BCHW.chunk(2)[rank].requires_grad_()
        result_BCHW = norm(half_BCHW)
        (result_BCHW * shares_BCHW.chunk(2)[rank]).sum().backward()
        torch.testing.assert_close(
            norm.running_var.double(), one.running_var, rtol=1e-3, atol=0
        )
        return torch.stack([result_BCHW.detach(), half_BCHW.grad])

    result_BCHW, gradient_BCHW = torch.cat(on_two_processes(monkeypatch, process), 1)
    for found, expected in (
        (result_BCHW, expected_BCHW),
        (gradient_BCHW, exact_BCHW.grad),
    ):
        error = (found - expected).norm() / expected.norm()
        assert error < (1e-5 if mean == 1 else 3e-3)


def test_batch_norm_takes_statistics_of_bf16_in_fp32() -> None:
    norm = GlobalBatchNorm(4)
    x_BCHW = (torch.randn(8, 4, 16, 16) + 30).bfloat16()
    result = norm(x_BCHW)
    assert result.dtype == torch.bfloat16 and norm.running_mean.dtype == torch.float32
    expected = x_BCHW.float().mean((0, 2, 3)) * 0.1
    assert torch.allclose(norm.running_mean, expected, rtol=1e-5)
    assert abs(result.float().mean()) < 0.01


def test_new_discriminators_depend_on_the_seed_alone() -> None:
    settings, variant = Settings(frames=2), VARIANTS["taew2_2"]
    torch.manual_seed(5)
    first = new_discriminator(settings, variant, seed=1)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1) == after
    again, other = (new_discriminator(settings, variant, seed) for seed in (1, 2))
    weights = [d.blocks[0][0].weight for d in (first, again, other)]
    assert weights[0].shape == (64, 3 * 2 + 48, 3, 3)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# --- samples -----------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_frame_of_any_length_is_in_a_group(name: str) -> None:
    variant = VARIANTS[name]
    for frames in (*range(1, 19), 22, 33, 39):
        decoded_frames = variant.target_frames(frames)
        for size in range(1, min(5, decoded_frames) + 1):
            groups = FrameGroups(variant, frames, size, LIKE)
            numbers_NTCHW = torch.arange(decoded_frames).view(1, -1, 1, 1, 1)
            numbers_BN = groups.images(numbers_NTCHW).flatten(1)
            assert len(numbers_BN) == len(groups) == -(-decoded_frames // size)
            assert numbers_BN.unique().tolist() == list(range(decoded_frames))
            assert (numbers_BN.diff(dim=1) == 1).all()
            ones = torch.ones(1, decoded_frames, 1, 1, 1, requires_grad=True)
            groups.images(ones).sum().backward()
            assert (groups.mean_over_groups(ones.grad) == 1).all()


def test_contexts_are_the_latents_of_the_frames() -> None:
    latents_NTCHW = torch.tensor([0.0, 10, 20, 30]).view(1, -1, 1, 1, 1)

    def contexts(name: str, frames: int, size: int) -> list[float]:
        groups = FrameGroups(VARIANTS[name], frames, size, LIKE)
        count = VARIANTS[name].latents_of(frames)
        return groups.contexts(latents_NTCHW[:, :count]).flatten().tolist()

    # Frame 0 is latent 0's, frames 1 to 4 latent 1's, ...; the last group goes back.
    expected = [20 / 3, 40 / 3, 20, 30, 30]
    assert contexts("taehv", 13, 3) == pytest.approx(expected)
    # An even number of CogVideoX's latents has four frames each.
    assert contexts("taecvx", 8, 2) == [0, 0, 10, 10]
    # LTX: frame 0, then eight frames a latent.
    assert contexts("taeltx_2", 9, 4) == pytest.approx([7.5, 10, 10])
    # MiniMax-H3 has one frame of the first latent of each chunk.
    assert contexts("taeh3", 5, 5) == pytest.approx([8])


def test_groups_tell_of_frames_that_are_in_two() -> None:
    variant = VARIANTS["taehv"]
    assert str(FrameGroups(variant, 9, 3, LIKE)) == "3 groups of 3 of 9 frames"
    text = "5 groups of 3 of 13 frames (the last shares 2 with the one before)"
    assert str(FrameGroups(variant, 13, 3, LIKE)) == text


# --- replay ------------------------------------------------------------------------


def samples(*values: float) -> Samples:
    values_B = torch.tensor(values).view(-1, 1, 1, 1)
    return Samples(values_B.expand(-1, 3, 2, 2), -values_B.expand(-1, 4, 1, 1))


def new_replay(lanes: int, depth: int, images: str = "fp32") -> Replay:
    return Replay(lanes, depth, (3, 2, 2), (4, 1, 1), images, CPU)


def both(draw: float) -> Tensor:
    return torch.full((2,), draw, dtype=torch.float64)


def test_a_ring_fills_up_and_then_replaces_what_is_drawn() -> None:
    replay, kept_B = new_replay(2, 3), torch.tensor([True, True])
    _, is_held_B = replay.read(both(0.5), samples(0, 0))
    assert not is_held_B.any()
    for i in range(3):
        replay.add(samples(i, 10 + i), kept_B, both(0.99))
    for draw, expected in ((0, 0), (0.4, 1), (1 - 2**-53, 2)):
        read, is_held_B = replay.read(both(draw), samples(0, 0))
        assert is_held_B.all()
        assert read.images_BCHW[:, 0, 0, 0].tolist() == [expected, 10 + expected]
        assert read.contexts_BCHW[:, 0, 0, 0].tolist() == [-expected, -10 - expected]
    replay.add(samples(7, 8), kept_B, torch.tensor([0.0, 0.5]))
    assert replay.images[:, :, 0, 0, 0].tolist() == [[7, 1, 2], [10, 8, 12]]
    assert replay.taken.tolist() == [4, 4]


def test_a_ring_forgets_a_bad_step_and_what_is_not_judged() -> None:
    replay, good, bad = new_replay(2, 2), torch.tensor(True), torch.tensor(False)
    replay.add(samples(1, 2), torch.tensor([True, False]), both(0))
    replay.settle(good)
    assert replay.taken.tolist() == [1, 0]
    for values in ((3, 4), (5, 6)):
        replay.add(samples(*values), torch.tensor([True, True]), both(0))
        replay.settle(good)
    state = [tensor.clone() for tensor in (replay.images, replay.contexts)]
    replay.add(samples(float("nan"), 1), torch.tensor([True, True]), both(0))
    replay.settle(bad)
    assert replay.taken.tolist() == [3, 2]
    assert torch.equal(replay.images, state[0])
    assert torch.equal(replay.contexts, state[1])


def test_formats_of_a_ring() -> None:
    given = samples(0.30078125, 1.5)
    for images, expected in (("bf16", 0.30078125), ("uint8", 77 / 255)):
        replay = new_replay(2, 4, images)
        replay.add(given, torch.tensor([True, True]), both(0))
        read, _ = replay.read(both(0), given)
        assert read.images_BCHW.dtype == torch.float32
        values = read.images_BCHW[:, 0, 0, 0].tolist()
        assert values == pytest.approx([expected, 1.5 if images == "bf16" else 1])
        assert read.contexts_BCHW[1, 0, 0, 0] == -1.5
    assert new_replay(2, 4, "uint8").nbytes == 2 * 4 * (12 + 2 * 4)


# --- three steps against plain code ------------------------------------------------


class Reference(nn.Module):
    """The published method in the plainest form: one process, lists, PyTorch's own."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3 * 3 + 16, 64, 128, 256, 512, 512, 512]
        self.blocks = nn.Sequential()
        for i in range(6):
            strided = i in (1, 2, 3)
            conv = nn.Conv2d(
                widths[i],
                widths[i + 1],
                4 if strided else 3,
                1 + strided,
                1,
                bias=False,
            )
            self.blocks.append(
                nn.Sequential(conv, nn.BatchNorm2d(widths[i + 1]), nn.ReLU())
            )
        self.proj = nn.ModuleList(nn.Conv2d(w, 1, 1, bias=False) for w in widths[1:])

    def forward(self, images: Tensor, contexts: Tensor) -> Tensor:
        contexts = F.interpolate(contexts, images.shape[-2:])
        x, maps = torch.cat([images * 2 - 1, contexts], 1), []
        for block, proj in zip(self.blocks, self.proj, strict=True):
            x = block(x)
            maps.append(F.adaptive_avg_pool2d(proj(x), images.shape[-1] // 8))
        return torch.cat(maps, 1)

    def start(self) -> None:
        self.ring: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.optimizer = torch.optim.AdamW(
            self.parameters(), lr=3e-4, betas=(0.9, 0.99), weight_decay=0.01
        )

    def learn(
        self, real: Tensor, fake: Tensor, contexts: Tensor, draws: Tensor
    ) -> float:
        images, seen, said = [], [], []
        for i, (kind, place, again) in enumerate(draws.tolist()):
            lane, new = self.ring.setdefault(i, []), (fake[i], contexts[i])
            if len(lane) < DEPTH:
                lane.append(new)
            else:
                lane[int(place * DEPTH)] = new
            old = lane[int(again * len(lane))]
            image, context = new if kind < 0.75 else old
            images.append(real[i] if kind < 0.5 else image)
            seen.append(contexts[i] if kind < 0.5 else context)
            said.append(-1.0 if kind < 0.5 else 1.0)
        self.train()
        scores = self(torch.stack(images), torch.stack(seen))
        targets = torch.tensor(said).view(-1, 1, 1, 1).expand(scores.shape)
        loss = F.mse_loss(scores, targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def correct(self, real: Tensor, fake: Tensor, contexts: Tensor) -> Tensor:
        self.eval()
        fake = fake.clone().requires_grad_()
        expected = self(real, contexts).detach()
        distance = (self(fake, contexts) - expected).square().mean((1, 2, 3)).sum()
        correction = -torch.autograd.grad(distance, fake)[0]
        return fake.detach() + correction / (correction.std(correction=0) + 1e-5)


DEPTH = 2


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.1), ("float64", 1e-9)])
def test_three_steps_are_those_of_plain_code(
    world: World, dtype: str, tolerance: float
) -> None:
    """In float32 Adam's first steps follow the sign of gradients that are rounding."""
    torch.manual_seed(0)
    exact = getattr(torch, dtype)
    reference, discriminator = (
        Reference().to(exact),
        PatchDiscriminator(9, 16).to(exact),
    )
    discriminator.load_state_dict(reference.state_dict())
    initial = {key: value.clone() for key, value in reference.state_dict().items()}
    replay = Replay(6, DEPTH, (9, 16, 16), (16, 2, 2), "fp32", CPU)
    guide = seraena(world, discriminator, replay=replay, dtype=exact)
    reference.start()
    kinds = set()
    for step in range(3):
        # Such that the ring holds them exactly.
        real, fake = torch.randint(256, (2, 2, 9, 3, 16, 16)).to(exact) / 256
        latents = torch.randint(-32, 32, (2, 3, 16, 2, 2)).to(exact) * 3 / 32
        draws = guide.draws(0, [2 * step, 2 * step + 1], SHAPE)
        kinds |= {int(draw * 4) for draw in draws[..., 0].flatten()}
        part = part_of(fake, real, latents, draws)
        (corrected,), _ = guide.guide([part], learns=True)
        guide.settle(torch.tensor(True))
        # Frame 0, frames 1 to 4 and frames 5 to 8 are of the three latents.
        a, b, c = latents.unbind(1)
        contexts = torch.stack([(a + 2 * b) / 3, (2 * b + c) / 3, c], 1).flatten(0, 1)
        grouped = [
            x.unflatten(1, (3, 3)).flatten(2, 3).flatten(0, 1) for x in (real, fake)
        ]
        loss = reference.learn(*grouped, contexts, draws.flatten(0, 1))
        expected = reference.correct(*grouped, contexts).view_as(corrected)
        assert guide.health["loss"].item() == pytest.approx(loss, rel=tolerance)
        difference = (corrected - expected).norm() / (expected - fake).norm()
        assert difference <= tolerance
    assert kinds == {0, 1, 2, 3}
    ours = discriminator.state_dict()
    for key, value in reference.state_dict().items():
        mine = getattr(ours[key], "full_tensor", lambda key=key: ours[key])()
        change = (value - initial[key]).double().norm()
        assert (mine - value).double().norm() <= tolerance * change, key


# --- micro-batches, masks, bad steps -----------------------------------------------


def random_part(guide: Seraena, clips: int, first: int = 0) -> Part:
    torch.manual_seed(first)
    dtype = guide._weight.dtype
    real, fake = torch.rand(2, clips, guide.view.groups.frames, 3, 16, 16, dtype=dtype)
    latents = torch.randn(clips, 3, 16, 2, 2, dtype=dtype)
    draws = guide.draws(0, list(range(first, first + clips)), SHAPE)
    return part_of(fake, real, latents, draws)


def double_guide(world: World, clips: int, **settings: object) -> Seraena:
    torch.manual_seed(0)
    replay = Replay(3 * clips, 4, (9, 16, 16), (16, 2, 2), "fp32", CPU)
    discriminator = PatchDiscriminator(9, 16).double()
    return seraena(world, discriminator, replay=replay, dtype=torch.float64, **settings)


def split(part: Part) -> list[Part]:
    decoded = zip(*(x.chunk(2) for x in vars(part.decoded).values()), strict=True)
    others = (part.judged_NT, part.draws_NG3, part.gradient_N)
    rest = zip(*(x.chunk(2) for x in others), strict=True)
    return [Part(SHAPE, Decoded(*d), *r) for d, r in zip(decoded, rest, strict=True)]


def test_micro_batches_are_corrected_as_one_batch(world: World) -> None:
    results = []
    for cut in (lambda part: [part], split):
        guide = double_guide(world, clips=2, adaptive=True)
        for step in range(2):
            corrected, weight = guide.guide(cut(random_part(guide, 2, 2 * step)), True)
            guide.settle(torch.tensor(True))
        results.append((torch.cat(corrected), weight))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-12)
    # Given gradients of equal norm, which are those of means over half as many clips.
    assert results[0][1].item() == pytest.approx(2 * results[1][1].item(), rel=1e-9)


def everything(guide: Seraena) -> list[Tensor]:
    state = [x for group in guide.state(rank=0).values() for x in group.values()]
    return [getattr(x, "full_tensor", lambda x=x: x)().clone() for x in state]


@pytest.mark.parametrize(
    ("bad", "student"), [("frames", False), ("gradient", False), ("frames", True)]
)
def test_a_skipped_step_leaves_no_trace(world: World, bad: str, student: bool) -> None:
    """Whether the student's step is skipped, or the discriminator's alone."""
    guide = double_guide(world, clips=2, replay_in_checkpoint=True)
    guide.guide([random_part(guide, 2)], True)
    guide.settle(torch.tensor(True))
    before = everything(guide)
    part = random_part(guide, 2, 2)
    if bad == "frames":
        part.decoded.frames_NTCHW[:] = float("nan")
    (corrected,), _ = guide.guide([part], True)
    assert corrected.isfinite().all() == (bad == "gradient")
    assert not all(map(torch.equal, before, everything(guide)))
    guide.settle(torch.tensor(student))
    after = everything(guide)
    assert len(after) == len(before) > 100
    assert all(map(torch.equal, before, after))


def test_no_gradient_is_left_behind(world: World) -> None:
    guide = double_guide(world, clips=2)
    for learns in (False, True, False):
        part = random_part(guide, 2)
        corrected, _ = guide.guide([part], learns)
        assert not corrected[0].requires_grad and part.decoded.frames_NTCHW.grad is None
        parameters = list(guide.discriminator.parameters())
        assert all(p.requires_grad and p.grad is None for p in parameters)


def test_what_is_not_judged_plays_no_part(world: World) -> None:
    """The first clip's lead-in may be anything, and its first group is left out."""
    results = []
    for noise in (0, 100):
        guide = double_guide(world, clips=2, replay_in_checkpoint=True)
        for step in range(2):
            part = random_part(guide, 2, 2 * step)
            part.judged_NT[0, :4] = False
            part.decoded.frames_NTCHW[0, :4] += noise * torch.randn(4, 3, 16, 16)
            (corrected,), _ = guide.guide([part], True)
            guide.settle(torch.tensor(True))
        correction = corrected - part.decoded.frames_NTCHW
        assert (correction[0, :4].abs() < 1e-9).all()
        judged = torch.cat([correction[0, 4:], correction[1]])
        norm = guide.health["correction_norm"].item()
        deviation = judged.std(correction=0).item()
        assert deviation == pytest.approx(norm / (norm + 1e-5), rel=1e-6)
        results.append([judged, *everything(guide)])
    assert guide.view.replay.taken.tolist() == [0, 2, 2, 2, 2, 2]
    assert all(
        torch.allclose(a.double(), b.double()) for a, b in zip(*results, strict=True)
    )


# --- weight, health ----------------------------------------------------------------


def test_weight_rises_from_its_start(world: World) -> None:
    guide = double_guide(world, clips=2, start_step=10, interval=2)
    guide.settings.ramp_steps = 3
    assert not guide.is_on(9) and guide.is_on(10)
    assert [guide.learns(step) for step in (9, 10, 11, 12)] == [
        False,
        True,
        False,
        True,
    ]
    weights = []
    for step in range(10, 15):
        guide.set_weight(step)
        weights.append(guide._weight.item())
    assert weights == [0.25, 0.5, 0.75, 1, 1]


def test_adaptive_weight_is_a_ratio_of_gradients(world: World) -> None:
    guide = double_guide(world, clips=2, adaptive=True)
    guide._weight.fill_(0.5)
    part = random_part(guide, 2)
    frames = part.decoded.frames_NTCHW.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        F.mse_loss(frames, part.decoded.target_NTCHW), frames
    )
    part.gradient_N = gradient.flatten(1).norm(dim=1)
    (corrected,), weight = guide.guide([part], True)
    loss = weight * F.mse_loss(frames, corrected)
    (ours,) = torch.autograd.grad(loss, frames)
    assert (ours.norm() / gradient.norm()).item() == pytest.approx(0.5)
    assert guide.health["gradient_ratio"].item() == pytest.approx(0.5)


def test_adaptive_weight_of_no_correction_is_finite(world: World) -> None:
    guide = double_guide(world, clips=2, adaptive=True)
    part = random_part(guide, 2)
    part.decoded.frames_NTCHW = part.decoded.target_NTCHW
    (corrected,), weight = guide.guide([part], False)
    assert torch.equal(corrected, part.decoded.frames_NTCHW) and weight.isfinite()


def test_it_learns_to_tell_real_from_fake(world: World) -> None:
    """Fakes are darker: it sees that, and says to brighten them."""
    torch.manual_seed(0)
    guide = seraena(world, PatchDiscriminator(9, 16), discriminator_lr=1e-3)
    for step in range(10):
        part = random_part(guide, 2, 2 * step)
        part.decoded.frames_NTCHW = part.decoded.target_NTCHW - 0.3
        (corrected,), _ = guide.guide([part], True)
        guide.settle(torch.tensor(True))
    assert guide.health["loss"] < 0.6
    assert guide.health["accuracy_real"] > 0.7 and guide.health["accuracy_fresh"] > 0.7
    assert (corrected - part.decoded.frames_NTCHW).mean() > 0
    picture = guide.picture()
    assert picture.shape == (4 * 16, 5 * 16, 3) and picture.dtype == np.uint8
    real, fake = picture[:, 48:64].mean(), picture[:, 64:].mean()
    assert real < fake


def test_collapse_is_told_once() -> None:
    watch = CollapseWatch()

    def seen(real: float, fresh: float, times: int) -> list[bool]:
        record = {"seraena/accuracy_real": real, "seraena/accuracy_fresh": fresh}
        return [watch.see(record) for _ in range(times)]

    assert not any(seen(0.8, 0.9, 300) + seen(1.0, 1.0, 150))
    assert not any(seen(float("nan"), 1.0, 100) + [watch.see({"loss": 0.0})])
    one_sided = seen(0.0, 0.999, 150)
    assert sum(one_sided) == 1 and one_sided[49]
    assert "(real 0.000, decoded 0.999)" in str(watch)
    assert not any(seen(0.5, 0.9, 1))
    assert sum(seen(0.999, 0.999, 400)) == 1


# --- in the training step ----------------------------------------------------------


def training_step(world: World, guide: Seraena | None) -> TrainingStep:
    torch.manual_seed(0)
    model = TAEHV("taehv")
    roots = [model.encoder, model.decoder]
    shard(roots, world.mesh, torch.float32)
    optimizer = Optimizer(model.parameters(), Optim())
    ema = Ema(dict(model.named_parameters()), 0.9)
    return TrainingStep(model, roots, optimizer, ema, Loss(), False, guide)


def small_guide(world: World, **settings: object) -> Seraena:
    replay = Replay(6, 2, (9, 16, 16), (16, 2, 2), "bf16", CPU)
    discriminator = new_discriminator(Settings(), VARIANTS["taehv"], seed=0)
    return seraena(
        world, discriminator, replay=replay, replay_in_checkpoint=True, **settings
    )


def batch(guide: Seraena, step: int) -> Targets:
    torch.manual_seed(step)
    frames_NTCHW = torch.rand(2, 9, 3, 16, 16)
    draws_NG3 = guide.draws(0, [2 * step, 2 * step + 1], SHAPE)
    return Targets(frames_NTCHW, draws_NG3=draws_NG3)


def test_before_its_start_a_step_is_as_without_it(world: World) -> None:
    guide = small_guide(world, start_step=2)
    alone, guided = training_step(world, None), training_step(world, guide)
    for step in range(3):
        results = [s([batch(guide, step)], step, 1e-3) for s in (alone, guided)]
        if step < 2:
            assert results[0].names == results[1].names
            assert torch.equal(results[0].values, results[1].values)
    added = [name for name in results[1].names if name not in results[0].names]
    assert added[:2] == ["adversarial", "seraena/loss"]
    assert results[1].values[0] > results[0].values[0]


def test_a_skipped_step_leaves_the_discriminator_as_it_was(world: World) -> None:
    guide = small_guide(world)
    step = training_step(world, guide)
    step([batch(guide, 0)], 0, 1e-3)
    before = everything(guide)
    bad = batch(guide, 1)
    bad.frames_NTCHW[1, 3, 0, 5, 5] = float("nan")
    result = step([bad], 1, 1e-3)
    is_applied = result.values[len(result.names) + 1]
    assert not is_applied
    assert all(map(torch.equal, before, everything(guide)))
    result = step([batch(guide, 2)], 2, 1e-3)
    assert result.values[0].isfinite() and result.values[len(result.names) + 1]
    assert not all(map(torch.equal, before, everything(guide)))


def test_the_adversarial_gradient_is_the_correction(world: World) -> None:
    """It is what the decoder gets, and the discriminator gets none of the student's."""
    guide = small_guide(world, interval=2)
    step = training_step(world, guide)
    losses = Loss(reconstruction_weight=0, latent_scale_weight=0)
    step.loss = losses
    result = step([batch(guide, 0)], 0, 1e-3)
    told = dict(zip(result.names, result.values.tolist(), strict=False))
    assert told["loss"] == pytest.approx(told["adversarial"])
    scale = told["seraena/correction_norm"] / (told["seraena/correction_norm"] + 1e-5)
    assert told["adversarial"] == pytest.approx(scale**2, rel=1e-2)
    assert all(p.grad is None for p in guide.discriminator.parameters())
    before = [p.detach().clone() for p in guide.discriminator.parameters()]
    result = step([batch(guide, 1)], 1, 1e-3)
    assert "adversarial" in result.names and "seraena/loss" not in result.names
    after = [p.detach() for p in guide.discriminator.parameters()]
    assert all(map(torch.equal, before, after))


def test_a_memory_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taehv.seraena.free_bytes", lambda device: 3 * 2**20)
    about = (VARIANTS["taehv"], SHAPE, 2, 1.0, LIKE)
    told = r"replay_size = 1000 takes 0\.0 GiB, and 0\.0 are left .* of cpu: take (\d+)"
    with pytest.raises(UserError, match=told) as raised:
        new_view(Settings(replay_size=1000), *about)
    fits = int(re.search(told, str(raised.value))[1])
    view = new_view(Settings(replay_size=fits), *about)
    assert 0.9 * 3 * 2**20 < view.replay.nbytes <= 3 * 2**20
