"""Convolutions with their bias, residual and ReLU as one operation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from taehv import TAEHV, model
from taehv.losses import Targets, training_losses
from taehv.model import MemBlock, VideoSequential
from taehv.rectified import has_kernel, rectify
from taehv.sections import Loss

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the operation on the CPU and in every number format, too."""
    monkeypatch.setattr(model, "has_kernel", lambda x_BCHW, conv: True)
    torch._dynamo.reset()


@pytest.mark.parametrize("share", [0, 1])
@pytest.mark.parametrize("size", [1, 3])
def test_gradients(size: int, share: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 2, size, padding=size // 2).double()
    x_BCHW = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    skip_BCHW = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def compute(x: Tensor, skip: Tensor, *parameters: Tensor) -> Tensor:
        weights = dict(zip(("weight", "bias"), parameters, strict=True))
        return torch.func.functional_call(
            Rectified(conv), weights, (x, skip, float(share))
        )

    inputs = [x_BCHW, skip_BCHW, *conv.parameters()]
    expected = torch.relu(conv(x_BCHW) + share * skip_BCHW)
    torch.testing.assert_close(compute(*inputs), expected)
    torch.autograd.gradcheck(compute, inputs)


class Rectified(nn.Module):
    """A convolution that is rectified; its parameters are called as those of it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.padding = conv.weight, conv.bias, conv.padding

    def forward(self, x_BCHW: Tensor, skip_BCHW: Tensor, share: float) -> Tensor:
        return rectify(x_BCHW, self, skip_BCHW, share)


def train(student: TAEHV, frames_NTCHW: Tensor) -> list[Tensor]:
    """The loss as a plain autoencoder, and all gradients."""
    student.zero_grad()
    loss = training_losses(student, Targets(frames_NTCHW), Loss())["loss"]
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in student.parameters())]


def new_student(dtype: torch.dtype, device: str = "cpu") -> tuple[TAEHV, Tensor]:
    """New weights with noise, and frames."""
    torch.manual_seed(0)
    student = TAEHV("taehv").to(dtype)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    frames_NTCHW = torch.rand(2, 8, 3, 16, 24, dtype=dtype)
    return student.to(device), frames_NTCHW.to(device)


@pytest.mark.usefixtures("everywhere")
def test_same_training() -> None:
    student, frames_NTCHW = new_student(torch.float64)
    student.fused = False
    expected = train(student, frames_NTCHW)
    student.fused = True
    with torch.profiler.profile() as profile:
        found = train(student, frames_NTCHW)
    called = [e.count for e in profile.key_averages() if e.key == "taehv::conv_relu"]
    assert sum(called) == 3 * 18  # three in each memory block
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@pytest.mark.usefixtures("everywhere")
def test_compiled() -> None:
    torch.manual_seed(0)
    blocks = VideoSequential(MemBlock(4)).double()
    x_NTCHW = torch.randn(1, 3, 4, 5, 6, dtype=torch.float64)
    weights = torch.randn_like(x_NTCHW)
    found = []
    for blocks.fused in (False, True):
        if blocks.fused:
            blocks.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        blocks.zero_grad()
        (blocks(x_NTCHW) * weights).sum().backward()
        found.append([p.grad for p in blocks.parameters()])
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).abs().max() <= 1e-12 * theirs.abs().max()


def test_where_there_is_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = nn.Conv2d(8, 4, 3, padding=1).bfloat16()
    x_BCHW = torch.empty(1, 4, 2, 2, dtype=torch.bfloat16)
    assert not has_kernel(x_BCHW, conv)  # on the CPU
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr("taehv.rectified._fuses", lambda device: True)
    assert has_kernel(x_BCHW, conv)
    assert not has_kernel(x_BCHW, conv.float())  # as under autocast
    large = torch.empty(1, 1, 1, 1, dtype=torch.bfloat16).expand(2**14, 4, 2**7, 2**7)
    assert not has_kernel(large, conv.bfloat16())


@ON_GPU
def test_autocast() -> None:
    student, frames_NTCHW = new_student(torch.float32, "cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        latents_NTCHW = student.encode_video(frames_NTCHW)
    exact_NTCHW = student.encode_video(frames_NTCHW)
    assert (latents_NTCHW - exact_NTCHW).abs().max() < 0.1 * exact_NTCHW.abs().max()


@ON_GPU
def test_nan_stays() -> None:
    conv = nn.Conv2d(64, 64, 3, padding=1).cuda().bfloat16().requires_grad_(False)
    conv.bias[0] = torch.nan
    x_BCHW = torch.rand(2, 64, 32, 32, device="cuda", dtype=torch.bfloat16)
    x_BCHW = x_BCHW.to(memory_format=torch.channels_last)
    assert rectify(x_BCHW, conv, x_BCHW, 0)[:, 0].isnan().all()


@ON_GPU
def test_one_call_is_one_kernel() -> None:
    conv = nn.Conv2d(64, 64, 3, padding=1).cuda().bfloat16()
    conv.to(memory_format=torch.channels_last)
    x_BCHW = torch.rand(8, 64, 32, 32, device="cuda", dtype=torch.bfloat16)
    x_BCHW = x_BCHW.to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.profiler.profile() as profile:
        found = rectify(x_BCHW, conv, x_BCHW, 1)
    assert found.is_contiguous(memory_format=torch.channels_last)
    kernels = [e for e in profile.events() if e.device_type.name == "CUDA"]
    assert len(kernels) <= 2, [e.name for e in kernels]
