from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taehv import team
from taehv.distributed import (
    compile_in_place,
    keep_compiled_code,
    uses_cuda_graph,
)
from taehv.sections import Compile, Seraena
from taehv.team import take_cores

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What is set for the whole process does not outlive a test."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "to be restored")
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


def test_every_shape_is_compiled_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """And for many of them, which would otherwise end the run."""
    shapes: list[torch.Size] = []

    def note(graph: torch.fx.GraphModule, inputs: list[Tensor], **_: Any) -> Any:
        shapes.append(inputs[-1].shape)
        return graph.forward

    backend = functools.partial(torch.compile, backend=note)
    monkeypatch.setattr(torch, "compile", backend)
    layer = nn.Linear(2, 2).requires_grad_(False)
    assert compile_in_place([layer], Compile(enable=True), CPU)
    for rows in range(1, 13):
        layer(torch.ones(rows, 2))
    assert shapes == [(rows, 2) for rows in range(1, 13)]
    assert all(type(rows) is int for rows, _ in shapes)
    assert torch.backends.cudnn.benchmark


def test_the_mode_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda call, **how: given.append(how))
    settings = Compile(enable=True, mode="max-autotune-no-cudagraphs")
    compile_in_place([nn.Identity()], settings, CPU)
    assert given[0]["mode"] == "max-autotune-no-cudagraphs"
    assert given[0]["mode"] in torch._inductor.list_mode_options()


def test_nothing_is_compiled_where_it_is_off() -> None:
    layer = nn.Identity()
    assert not compile_in_place([layer], Compile(), CPU)
    assert layer._compiled_call_impl is None and VARIABLE not in os.environ


def test_compiled_code_is_kept(tmp_path: Path) -> None:
    compile_in_place([nn.Identity()], Compile(enable=True), CPU)
    folder = tmp_path / ".cache/taehv/inductor"
    assert os.environ[VARIABLE] == str(folder) and folder.is_dir()


def test_the_users_folder_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "chosen")
    keep_compiled_code()
    assert os.environ[VARIABLE] == "chosen"


def test_a_folder_that_cannot_be_made_is_not_used(tmp_path: Path) -> None:
    (tmp_path / ".cache").touch()
    keep_compiled_code()
    assert VARIABLE not in os.environ


@pytest.mark.parametrize(
    ("launched", "given", "taken"), [("1", 1, 4), ("1", 3, 3), ("", 1, 1)]
)
def test_offloading_takes_its_share_of_cores(
    monkeypatch: pytest.MonkeyPatch, launched: str, given: int, taken: int
) -> None:
    """Where torchrun has started the process, and gave it a single one."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", launched)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(team, "cores", lambda: 9)
    before = torch.get_num_threads()
    torch.set_num_threads(given)
    try:
        take_cores()
        assert torch.get_num_threads() == taken
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("seraena", "expected"),
    [
        ({}, True),
        ({"enable": True}, True),
        ({"enable": True, "replay_device": "cpu"}, False),
        ({"enable": True, "replay_device": "cpu", "replay_size": 0}, True),
    ],
)
def test_graphs_by_default(seraena: dict[str, Any], expected: bool) -> None:
    section = Seraena(**seraena)
    assert uses_cuda_graph(Compile(), section, torch.device("cuda")) is expected
    assert not uses_cuda_graph(Compile(), section, torch.device("cpu"))
    for wanted in (True, False):
        settings = Compile(cuda_graph=wanted)
        assert uses_cuda_graph(settings, section, torch.device("cuda")) is wanted
