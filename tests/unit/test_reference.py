"""The reference that speed is compared with does the same work as the trainer."""

from __future__ import annotations

import pytest
import torch
from golden_vectors import MANIFEST, formula_tensor, vectors

from taehv.bench import Size
from taehv.bench_train import step_flop
from taehv.distributed import shard, started
from taehv.losses import Targets
from taehv.model import TAEHV
from taehv.optim import Ema, Optimizer
from taehv.reference import LEARNING_RATE, PublishedStep, PublishedStream, published
from taehv.reference_seraena import PublishedSeraena
from taehv.sections import Loss, Optim, Parallelism
from taehv.step import TrainingStep
from taehv.variants import VARIANTS


def clip(model: TAEHV, frames: int) -> torch.Tensor:
    torch.manual_seed(1)
    size = model.variant.space_factor * 2
    return torch.rand(1, frames, 3, size, size, dtype=torch.float64)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_published_way_computes_the_same(variant: str) -> None:
    model = TAEHV(variant).double()
    plain = published(model)
    frames_NTCHW = clip(model, 22 if variant == "taeh3" else 5)
    latents_NTCHW = model.encode_video(frames_NTCHW)
    torch.testing.assert_close(plain.encode_video(frames_NTCHW), latents_NTCHW)
    # New weights make most of the blocks do nothing.
    torch.manual_seed(2)
    latents_NTCHW = torch.randn_like(latents_NTCHW)
    for weights in plain.state_dict().values():
        weights.add_(torch.randn_like(weights), alpha=0.02)
    model.load_state_dict(plain.state_dict())
    decoded_NTCHW = model.decode_video(latents_NTCHW, clamp=False)
    torch.testing.assert_close(
        plain.decode_video(latents_NTCHW, clamp=False), decoded_NTCHW
    )
    stream = PublishedStream(plain.decoder)
    raw = [x for latent in latents_NTCHW.unbind(1) for x in stream.decode(latent)]
    whole_NTCHW = model.decoder(latents_NTCHW)
    torch.testing.assert_close(torch.stack(raw, 1), whole_NTCHW)
    assert whole_NTCHW.std() > 0.05


def test_the_published_recipe_learns_the_same() -> None:
    """Of two steps alike but for clipping and averaging; no autocast on the CPU."""
    torch.manual_seed(0)
    plain = published(TAEHV("taehv")).double()
    cpu = torch.device("cpu")
    step = PublishedStep(plain, cpu)
    with started(Parallelism(), "cpu") as world:
        model = TAEHV("taehv").double()
        model.load_state_dict(plain.state_dict())
        roots = [model.encoder, model.decoder]
        shard(roots, world.mesh, torch.float64)
        named = dict(model.named_parameters())
        optim = Optim(max_grad_norm=0, weight_decay=0.01)
        optimizer, ema = Optimizer(named.values(), optim), Ema(named, 0.9)
        ours = TrainingStep(model, roots, optimizer, ema, Loss(), graph=False)
        frames_NTCHW = clip(model, 5)
        latents_NTCHW = torch.randn(1, 2, 16, 2, 2, dtype=torch.float64)
        for number in range(3):
            loss = step(frames_NTCHW, latents_NTCHW)
            targets = Targets(frames_NTCHW, latents_NTCHW)
            found = ours([targets], number, LEARNING_RATE)
            assert found.values[0].item() == pytest.approx(loss.item(), rel=1e-9)
        for name, weights in plain.named_parameters():
            torch.testing.assert_close(named[name].full_tensor(), weights)


def formula_discriminator() -> PublishedSeraena:
    """The discriminator of the golden vectors, in float64."""
    seraena = PublishedSeraena(16, torch.device("cpu"))
    weights = {}
    for key, shape in MANIFEST["seraena"]["state_dict"].items():
        weights[key] = torch.as_tensor(formula_tensor(key, shape))
        if key.endswith("running_var"):
            weights[key] = weights[key].abs() + 0.5
        elif key.endswith(".1.weight") and len(shape) == 1:
            weights[key] = weights[key] + 1
        elif key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(7)
    seraena.discriminator.load_state_dict(weights)
    seraena.discriminator.double()
    return seraena


def test_the_published_guidance() -> None:
    seraena = formula_discriminator()
    golden = {k: torch.as_tensor(v).double() for k, v in vectors("seraena").items()}
    real, fake, ctx = golden["real"], golden["fake"], golden["ctx"]
    correction = seraena.correction(real, fake, ctx)
    torch.testing.assert_close(correction, golden["correction"], atol=1e-3, rtol=1e-3)
    scores = seraena.discriminator(real, ctx)
    torch.testing.assert_close(scores, golden["scores_real_eval"], atol=1e-4, rtol=1e-3)


def test_guided_steps_of_the_published_recipe() -> None:
    torch.manual_seed(0)
    plain = published(TAEHV("taehv"))
    seraena = PublishedSeraena(16, torch.device("cpu"))
    step = PublishedStep(plain, torch.device("cpu"), seraena)
    frames_NTCHW = clip(plain, 12).float()
    latents_NTCHW = torch.randn(1, 3, 16, 2, 2)
    before = seraena.discriminator.blocks[0][0].weight.clone()
    alone = PublishedStep(published(plain), torch.device("cpu"))
    guided_loss = step(frames_NTCHW, latents_NTCHW)
    assert guided_loss > alone(frames_NTCHW, latents_NTCHW) + 0.01
    step(frames_NTCHW, latents_NTCHW)
    assert len(seraena._replay) == 2 * 4
    assert not torch.equal(seraena.discriminator.blocks[0][0].weight, before)


def test_operations_of_a_step() -> None:
    """4.64 * 10^12 for 16 clips, as a trace of the published code counted."""
    assert 16 * step_flop("taehv", Size(12, 128, 128)) == pytest.approx(
        4.64e12, rel=0.01
    )
