"""Measures that networks or programs of others make: LPIPS, ST-LPIPS and VMAF.

Each is made only where the user gives what it needs; nothing is downloaded.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from taehv.errors import UserError
from taehv.metrics import FRAMES_AT_ONCE
from taehv.visualize import to_uint8
from taehv.weights import load_state_dict_file

log = logging.getLogger("taehv")

ClipMeasure = Callable[[Tensor, Tensor], float]
"""Of frames_TCHW and decoded_TCHW, RGB in [0, 1]."""
NETWORKS = {"alex": "features.10.weight", "vgg": "features.28.weight"}
"""By torchmetrics' names, the last convolution in torchvision's weights of each."""
LAST_SHAPES = {"alex": (256, 256, 3, 3), "vgg": (512, 512, 3, 3)}
LPIPS_SIDE = 64
"""The least side in pixels: that of the patches LPIPS learned from."""
VMAF_SECONDS = 600


def load_measures(
    lpips: str, st_lpips: bool, vmaf: str, device: torch.device
) -> dict[str, ClipMeasure]:
    """The measures that are asked for, by their names.

    Args:
        lpips: weights of torchvision's AlexNet or VGG16, or empty.
        st_lpips: whether to use the package stlpips-pytorch.
        vmaf: an ffmpeg with libvmaf, or empty.
        device: where the networks are to run.

    Raises:
        UserError: what is given does not serve.
    """
    measures: dict[str, ClipMeasure] = {}
    if lpips:
        measures["lpips"] = NetworkMeasure(load_lpips(Path(lpips).expanduser()), device)
    if st_lpips:
        measures["st_lpips"] = NetworkMeasure(_load_st_lpips(), device)
    if vmaf:
        measures["vmaf"] = Vmaf(vmaf)
    return measures


class NetworkMeasure:
    """The mean over a clip's frames of a network's distance."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network = network.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, frames_TCHW: Tensor, decoded_TCHW: Tensor) -> float:
        """NaN for frames that are smaller than the network knows."""
        if min(frames_TCHW.shape[-2:]) < LPIPS_SIDE:
            return math.nan
        parts = zip(
            frames_TCHW.split(FRAMES_AT_ONCE),
            decoded_TCHW.split(FRAMES_AT_ONCE),
            strict=True,
        )
        distances = [
            self.network(theirs.float(), ours.float(), normalize=True).flatten()
            for theirs, ours in parts
        ]
        return float(torch.cat(distances).double().mean())


def load_lpips(path: Path) -> nn.Module:
    """LPIPS 0.1 on torchvision's AlexNet or VGG16, whose weights the file holds.

    Raises:
        UserError: it cannot be read, or holds neither.
    """
    state_dict, _ = load_state_dict_file(path)
    for name, key in NETWORKS.items():
        if key in state_dict and tuple(state_dict[key].shape) == LAST_SHAPES[name]:
            break
    else:
        raise UserError(
            f"{path} has not the weights of torchvision's AlexNet or VGG16, which "
            "LPIPS needs (alexnet-owt-7be5be79.pth, vgg16-397923af.pth)"
        )
    # Of the network and its linear heads, torchmetrics has the latter with it.
    from torchmetrics.functional.image.lpips import _LPIPS  # takes a second

    network = _LPIPS(net=name, pnet_rand=True)
    for inner, parameter in network.net.named_parameters():
        _, layer, kind = inner.split(".")
        parameter.copy_(state_dict[f"features.{layer}.{kind}"])
    return network


def _load_st_lpips() -> nn.Module:
    try:
        from stlpips_pytorch import stlpips
    except ImportError as error:
        raise UserError(
            f"ST-LPIPS needs a package ({error}): pip install stlpips-pytorch "
            "torchsummary ipython, or switch st_lpips off"
        ) from None
    return stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)


class Vmaf:
    """VMAF by an ffmpeg that has libvmaf, with its default model.

    Raises:
        UserError: the program is not there, or lacks libvmaf.
    """

    def __init__(self, ffmpeg: str) -> None:
        program = shutil.which(str(Path(ffmpeg).expanduser()))
        if program is None:
            raise UserError(f"VMAF needs an ffmpeg, and {ffmpeg} is no program")
        command = [program, "-hide_banner", "-filters"]
        filters = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if "libvmaf" not in filters.stdout:
            raise UserError(
                f"{ffmpeg} has no libvmaf: name another ffmpeg, such as the one that "
                "the package imageio-ffmpeg brings"
            )
        self.program = program

    def __call__(self, frames_TCHW: Tensor, decoded_TCHW: Tensor) -> float:
        """Mean over the frames, from 0 to 100; NaN, and told, where ffmpeg fails."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                self._run(Path(folder), frames_TCHW, decoded_TCHW)
                log_json = Path(folder, "vmaf.json").read_text(encoding="utf-8")
            except (OSError, subprocess.SubprocessError) as error:
                lines = (getattr(error, "stderr", None) or str(error)).splitlines()
                log.warning(f"a clip has no VMAF, {self.program} failed: {lines[-1]}")
                return math.nan
        frames = json.loads(log_json)["frames"]
        return statistics.fmean(frame["metrics"]["vmaf"] for frame in frames)

    def _run(self, folder: Path, frames_TCHW: Tensor, decoded_TCHW: Tensor) -> None:
        height, width = frames_TCHW.shape[-2:]
        inputs: list[str] = []
        for name, clip_TCHW in (("ours", decoded_TCHW), ("theirs", frames_TCHW)):
            to_uint8(clip_TCHW).tofile(folder / f"{name}.rgb")
            inputs += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-r", "25"]
            inputs += ["-s", f"{width}x{height}", "-i", f"{name}.rgb"]
        graph = (
            "[0:v]format=yuv420p[ours];[1:v]format=yuv420p[theirs];"
            "[ours][theirs]libvmaf=log_fmt=json:log_path=vmaf.json"
        )
        command = [self.program, "-nostdin", "-loglevel", "error", *inputs]
        subprocess.run(
            [*command, "-lavfi", graph, "-f", "null", "-"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=VMAF_SECONDS,
            check=True,
        )


def extra_values(
    measures: Mapping[str, ClipMeasure], frames_TCHW: Tensor, decoded_TCHW: Tensor
) -> dict[str, float]:
    """What the measures give of the frames that both have, NaN left out."""
    length = min(len(frames_TCHW), len(decoded_TCHW))
    values = {
        name: measure(frames_TCHW[:length], decoded_TCHW[:length])
        for name, measure in measures.items()
    }
    return {name: value for name, value in values.items() if not math.isnan(value)}
