"""Metrics against computations of their own."""

from __future__ import annotations

import logging
import math
from statistics import correlation

import numpy as np
import pytest
import torch
from torch import Tensor

from taehv.metrics import (
    FRAMES_AT_ONCE,
    MEASURES,
    MS_SSIM_BETAS,
    LatentStatistics,
    differences,
    estimate,
    estimates,
    group_positions,
    measure,
    measure_of,
    student_quantile,
    warn_of_scale,
)
from taehv.variants import VARIANTS

CPU = torch.device("cpu")


def noise(frames: int = 3, side: int = 32, seed: int = 0) -> Tensor:
    """A smooth moving pattern under noise, RGB in [0.2, 0.8]."""
    generator = torch.Generator().manual_seed(seed)
    time_T111 = torch.arange(frames).view(-1, 1, 1, 1)
    place_HW = torch.linspace(0, 6, side)[:, None] + torch.linspace(0, 4, side)
    pattern_TCHW = (place_HW + time_T111 / 3).sin().expand(-1, 3, -1, -1)
    grain_TCHW = torch.rand(frames, 3, side, side, generator=generator)
    return 0.5 + 0.2 * pattern_TCHW + 0.1 * (2 * grain_TCHW - 1)


def db(mean_square: float) -> float:
    return 10 * math.log10(1 / mean_square)


def test_a_perfect_reconstruction_has_the_best_of_every_measure() -> None:
    frames_TCHW = noise(frames=5, side=176)
    frames_TCHW[:, :, :9] = 0.5  # something at rest
    values = measure(frames_TCHW, frames_TCHW, [3, 0, 1, 2, 3])
    positions = {f"psnr_position_{place}" for place in (1, 2, 3, 4)}
    named = {"psnr", "ssim", "ms_ssim", "difference_psnr", "flicker", "fine_detail"}
    assert values.keys() == named | positions
    for name, value in values.items():
        best = min(measure_of(name).best, 100)  # dB, where PSNR ends
        assert value == pytest.approx(best, abs=1e-6), name


def test_a_constant_shift_costs_psnr_and_nothing_that_moves() -> None:
    frames_TCHW = noise()
    values = measure(frames_TCHW, frames_TCHW + 0.1)
    assert values["psnr"] == pytest.approx(20, abs=1e-4)
    assert values["difference_psnr"] > 90
    assert values["fine_detail"] == pytest.approx(1, abs=1e-3)
    assert values["ssim"] < 1


def test_distances_of_a_clip_against_numpy() -> None:
    """Longer than what is taken at once, so that nothing is lost between the parts."""
    frames_TCHW = noise(2 * FRAMES_AT_ONCE + 3, 16)
    decoded_TCHW = (frames_TCHW + 0.3 * (noise(len(frames_TCHW), 16, 1) - 0.5)).clamp(
        0, 1
    )
    values = measure(frames_TCHW, decoded_TCHW)
    ours, theirs = decoded_TCHW.double().numpy(), frames_TCHW.double().numpy()
    assert values["psnr"] == pytest.approx(db(((ours - theirs) ** 2).mean()))
    changes = np.diff(ours, axis=0) - np.diff(theirs, axis=0)
    assert values["difference_psnr"] == pytest.approx(db((changes**2).mean()))
    window = np.outer(np.hanning(16), np.hanning(16))
    down, across = np.meshgrid(np.fft.fftfreq(16), np.fft.fftfreq(16), indexing="ij")
    fine = np.hypot(down, across) > 0.25
    energies = [
        (np.abs(np.fft.fft2(x * window)) ** 2 * fine).sum() for x in (ours, theirs)
    ]
    ratio = energies[0] / energies[1]
    assert values["fine_detail"] == pytest.approx(ratio, rel=1e-4)
    at_rest = np.abs(np.diff(theirs, axis=0)).max(1, keepdims=True) < 2.5 / 255
    flicker = 255 * np.abs(changes)[np.broadcast_to(at_rest, changes.shape)].mean()
    assert values["flicker"] == pytest.approx(flicker)


def similarity_maps(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, ...]:
    """SSIM and its contrast term at each pixel, with the published constants."""
    x = np.arange(11) - 5
    kernel = np.exp(-(x**2) / (2 * 1.5**2))
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2

    def blurred(picture: np.ndarray) -> np.ndarray:
        padded = np.pad(picture, ((0, 0), (5, 5), (5, 5)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (11, 11), (1, 2))
        return np.einsum("chwij,ij->chw", windows, kernel)

    mean, mean2 = blurred(ours), blurred(theirs)
    variance, variance2 = blurred(ours**2) - mean**2, blurred(theirs**2) - mean2**2
    covariance = blurred(ours * theirs) - mean * mean2
    contrast = (2 * covariance + 0.03**2) / (variance + variance2 + 0.03**2)
    luminance = (2 * mean * mean2 + 0.01**2) / (mean**2 + mean2**2 + 0.01**2)
    return luminance * contrast, contrast[:, 5:-5, 5:-5]


@pytest.mark.parametrize(("side", "name"), [(99, "ms_ssim_4"), (176, "ms_ssim")])
def test_structural_similarity_against_numpy(side: int, name: str) -> None:
    frames_TCHW = noise(1, side)
    decoded_TCHW = frames_TCHW + 0.2 * (noise(1, side, 1) - 0.5)
    values = measure(frames_TCHW, decoded_TCHW)
    ours, theirs = decoded_TCHW[0].double().numpy(), frames_TCHW[0].double().numpy()
    full, _ = similarity_maps(ours, theirs)
    assert values["ssim"] == pytest.approx(full.mean(), abs=1e-5)
    scales = 4 if name == "ms_ssim_4" else 5
    betas = np.array(MS_SSIM_BETAS[:scales]) / sum(MS_SSIM_BETAS[:scales])
    product = 1.0
    for scale, beta in enumerate(betas, start=1):
        full, contrast = similarity_maps(ours, theirs)
        product *= (full if scale == scales else contrast).mean() ** beta
        ours, theirs = (
            x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
            .reshape(3, x.shape[1] // 2, 2, x.shape[2] // 2, 2)
            .mean((2, 4))
            for x in (ours, theirs)
        )
    assert values[name] == pytest.approx(product, abs=1e-5)
    assert ("ms_ssim" in values) != ("ms_ssim_4" in values)


def test_small_or_single_frames_have_what_they_can_have() -> None:
    assert measure(noise(1, 32), noise(1, 32)).keys() == {"psnr", "ssim", "fine_detail"}
    assert "ssim" not in measure(noise(1, 5), noise(1, 5))
    assert "ms_ssim_4" not in measure(noise(1, 98), noise(1, 98))
    flat_TCHW = torch.full((2, 3, 16, 16), 0.5)
    assert "fine_detail" not in measure(flat_TCHW, flat_TCHW)


def test_shuffled_frames_cost_the_changes_and_no_detail() -> None:
    frames_TCHW = noise(8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    values = measure(frames_TCHW, frames_TCHW[order])
    assert values["fine_detail"] == pytest.approx(1, abs=1e-6)
    still = measure(frames_TCHW, frames_TCHW[:1].expand_as(frames_TCHW))
    assert values["difference_psnr"] < still["difference_psnr"] < 30


def test_flicker_is_of_pixels_at_rest_alone() -> None:
    frames_TCHW = torch.full((4, 3, 16, 16), 0.5)
    frames_TCHW[:, :, :, 8:] += 0.1 * torch.arange(4).view(-1, 1, 1, 1)
    frames_TCHW[1::2, :, 0] += 1.9 / 255  # the noise of a camera is no motion
    decoded_TCHW = frames_TCHW.clone()
    decoded_TCHW[1::2, :, :, :8] += 0.02  # at rest: there and back
    decoded_TCHW[1::2, :, :, 8:] += 0.3
    values = measure(frames_TCHW, decoded_TCHW)
    assert values["flicker"] == pytest.approx(0.02 * 255, rel=1e-4)


def test_blur_loses_and_noise_adds_fine_detail() -> None:
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    smooth_HW, checks_HW = 0.2 * (x / 5).sin(), 0.2 * (-1.0) ** (x + y)
    frames, blurred, rough = (
        (0.5 + smooth_HW + share * checks_HW).expand(2, 3, -1, -1)
        for share in (1, 0.5, 1.1)
    )
    assert measure(frames, blurred)["fine_detail"] == pytest.approx(0.25, rel=1e-2)
    assert measure(frames, rough)["fine_detail"] == pytest.approx(1.21, rel=1e-2)


@pytest.mark.parametrize(
    ("variant", "frames", "positions"),
    [
        ("taehv", 9, [3, 0, 1, 2, 3, 0, 1, 2, 3]),
        ("taehv", 8, [3, 0, 1, 2, 3]),
        ("taecvx", 8, [0, 1, 2, 3, 0, 1, 2, 3]),
        ("taecvx", 9, [3, 0, 1, 2, 3, 0, 1, 2, 3]),
        ("taeltx_2", 9, [7, 0, 1, 2, 3, 4, 5, 6, 7]),
        ("taeh3", 22, [3, *range(4), *range(4), *range(4), *range(4), 3, *range(4)]),
    ],
)
def test_positions_in_the_group_of_a_latent(
    variant: str, frames: int, positions: list[int]
) -> None:
    assert group_positions(VARIANTS[variant], frames) == positions


def test_psnr_by_position() -> None:
    frames_TCHW = noise(9)
    positions = group_positions(VARIANTS["taehv"], 9)
    offsets_T = torch.tensor([0.01 * (position + 1) for position in positions])
    values = measure(frames_TCHW, frames_TCHW + offsets_T.view(-1, 1, 1, 1), positions)
    for place in (1, 2, 3, 4):
        expected = -20 * math.log10(0.01 * place)
        assert values[f"psnr_position_{place}"] == pytest.approx(expected, abs=1e-3)


def test_frames_past_the_input_or_cut_off_are_not_judged() -> None:
    frames_TCHW, decoded_TCHW = noise(6), noise(6, seed=1)
    expected = measure(frames_TCHW[:4], decoded_TCHW[:4], [3, 0, 1, 2])
    longer = [3, 0, 1, 2, 3, 0]
    assert measure(frames_TCHW, decoded_TCHW[:4], longer) == expected
    assert measure(frames_TCHW[:4], decoded_TCHW, longer) == expected


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (99, 1.984)],
)
def test_student_quantile_against_the_printed_table(
    freedom: int, quantile: float
) -> None:
    assert student_quantile(freedom) == pytest.approx(quantile, rel=2e-3)


def test_estimates_are_over_clips_in_any_order() -> None:
    clips = {v: {"psnr": v / 3, "ssim": 0.5} for v in range(5)}
    del clips[3]["ssim"]
    found = estimates(clips)
    assert (found["psnr"].clips, found["ssim"].clips) == (5, 4)
    assert found["psnr"].mean == pytest.approx(2 / 3)
    reach = 2.776 * math.sqrt(2.5) / 3 / math.sqrt(5)
    assert found["psnr"].high - found["psnr"].mean == pytest.approx(reach, rel=1e-3)
    assert found["psnr"].mean - found["psnr"].low == pytest.approx(reach, rel=1e-3)
    assert estimates(dict(reversed(clips.items()))) == found  # to the last bit
    alone = estimate([3.0])
    assert (alone.mean, alone.low, alone.high) == (3, -math.inf, math.inf)


def test_intervals_hold_the_true_mean_as_often_as_they_say() -> None:
    draws = np.random.default_rng(0).normal(30, 2, (2000, 6))
    held = [e.low <= 30 <= e.high for e in map(estimate, draws.tolist())]
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def test_differences_are_of_clips_that_both_have() -> None:
    ours = {0: {"psnr": 30.0, "ssim": 0.9}, 1: {"psnr": 21.0}, 2: {"psnr": 99.0}}
    theirs = {0: {"psnr": 28.0}, 1: {"psnr": 20.0, "ssim": 0.8}}
    found = differences(ours, theirs)
    assert found.keys() == {"psnr"}
    assert (found["psnr"].mean, found["psnr"].clips) == (1.5, 2)


def test_nearer_to_the_best_is_better() -> None:
    order = {"psnr": [30, 20], "flicker": [0.1, 2], "fine_detail": [1.1, 0.7, 1.6]}
    for name, values in order.items():
        gaps = [measure_of(name).gap(value) for value in values]
        assert gaps == sorted(gaps), name
    assert measure_of("decoder_ssim").best == 1
    assert "teacher" in measure_of("decoder_ssim").title
    assert measure_of("psnr_position_2").unit == "dB"
    assert measure_of("seconds") is None
    assert all(about.text for about in MEASURES.values())


def statistics(scale: float = 1.0, batches: int = 1) -> LatentStatistics:
    """Of latents whose first channel is noise and whose others follow the teacher."""
    generator = torch.Generator().manual_seed(0)
    theirs_NTCHW = scale * torch.randn(4, 2, 8, 3, 3, generator=generator)
    ours_NTCHW = 2 * theirs_NTCHW + 0.5
    ours_NTCHW[:, :, 0] = torch.randn(4, 2, 3, 3, generator=generator)
    ours_NTCHW[:, :, 7] = 1  # never changes
    sums = LatentStatistics(8, CPU)
    for ours, theirs in zip(
        ours_NTCHW.chunk(batches), theirs_NTCHW.chunk(batches), strict=True
    ):
        sums.add(ours, theirs)
    sums.ours_NTCHW, sums.theirs_NTCHW = ours_NTCHW, theirs_NTCHW
    return sums


@pytest.mark.parametrize("batches", [1, 2, 4])
def test_latent_report(batches: int) -> None:
    sums = statistics(batches=batches)
    report = sums.report()
    ours_NTCHW, theirs_NTCHW = sums.ours_NTCHW, sums.theirs_NTCHW
    assert report.teacher_mean == pytest.approx(theirs_NTCHW.mean().item(), rel=1e-5)
    assert report.student_mean == pytest.approx(ours_NTCHW.mean().item(), rel=1e-5)
    rms = theirs_NTCHW.square().mean().sqrt().item()
    assert report.teacher_rms == pytest.approx(rms, rel=1e-5)
    noise = correlation(
        ours_NTCHW[:, :, 0].flatten().tolist(), theirs_NTCHW[:, :, 0].flatten().tolist()
    )
    assert report.worst_channel in (0, 7)
    assert report.worst_correlation == pytest.approx(min(noise, 0), abs=1e-5)
    quarters = [(noise + 1) / 2, 1, 1, 0.5]
    assert report.group_correlations == pytest.approx(quarters, abs=1e-5)
    assert report.correlation == pytest.approx(sum(quarters) / 4, abs=1e-5)


@pytest.mark.parametrize(("scale", "warns"), [(1.0, False), (5.0, True), (0.1, True)])
def test_latents_of_no_unit_scale_are_told(
    scale: float, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "taehv"):
        warn_of_scale(statistics(scale).report())
    assert ("mean and deviation" in caplog.text) == warns
