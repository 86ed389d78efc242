"""run_train.sh on two "nodes": two torchrun agents that meet over loopback."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, Run, Running


def free_port() -> int:
    """Of those that the system gives to nobody else who asks for any."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def test_two_nodes_compute_what_one_does(videos: Path, tmp_path: Path) -> None:
    """Which takes four clips at once, and they two each, one at a time."""
    settings = {
        "training__steps": 3,
        "training__precision": "fp64",
        "training__global_batch_size": 4,
        "validation__clips": 0,
        "optim__optimizer": "muon",
        "optim__schedule": "wsd",
    }
    reference = Run(tmp_path / "one", videos, **settings)
    reference.train()
    run = Run(tmp_path / "two", videos, **settings, training__local_batch_size=1)
    # run_train.sh takes .venv or else python3, which is to be the one of the tests.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shared = {
        "PATH": path,
        "CONFIG_FILE": "train_configs/autoencoder.toml",
        "NNODES": "2",
        "NGPU": "1",
        "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}",
    }
    arguments = [f"--{key}={value}" for key, value in run.settings.items()]
    arguments += ["--data.crops_per_window=1", "--data.color_jitter=0"]
    arguments += ["--data.crop_scale=0.5,1"]
    arguments += ["--optim.lr=1e-3"]
    nodes = [
        Running([ROOT / "run_train.sh", *arguments], **shared, NODE_RANK=str(rank))
        for rank in range(2)
    ]
    outputs = [node.end(seconds=200) for node in nodes]
    assert "the CPU x 2" in outputs[0] and "the CPU x 2" not in outputs[1]
    assert run.losses() == pytest.approx(reference.losses(), rel=1e-5)


def test_a_port_in_use_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        meeting = {"PATH": path, "NNODES": "2", "NGPU": "1"}
        script = subprocess.run(
            [str(ROOT / "run_train.sh"), "--data.root=/"],
            env={**os.environ, **meeting, "RDZV_ENDPOINT": f"127.0.0.1:{port}"},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert script.returncode == 2
        assert script.stderr == (
            f"error: port {port} is in use: take another in RDZV_ENDPOINT, or give "
            "every node its NODE_RANK\n"
        )
        alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        program = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), "--data.root=/"],
            env={**os.environ, **alone, "MASTER_PORT": str(port)},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert program.returncode == 2
        assert f"cannot meet at 127.0.0.1:{port}" in program.stderr
        assert "Traceback" not in program.stderr
        del alone["MASTER_ADDR"]
        program = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), "--data.root=/"],
            env={**os.environ, **alone},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert program.returncode == 2
        assert program.stderr.startswith("error: RANK is set, but not MASTER_ADDR")
