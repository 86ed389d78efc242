"""The shape of the project: imports go one way, and it stands on its own."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MODULES = {path.stem: path for path in (ROOT / "taehv").glob("*.py")}

GROUND, LEAF, COMPONENT, TRAINER, COMMAND = range(5)
LAYERS = {
    "errors": GROUND,
    "variants": GROUND,
    "sections": GROUND,
    "rules": GROUND,
    "config": GROUND,
    "distributed": COMPONENT,
    "seraena": COMPONENT,
    "watchdog": COMPONENT,
    "local_batch": COMPONENT,
    "claim": COMPONENT,
    "step": COMPONENT,
    "checkpoint": COMPONENT,
    "checkpointer": COMPONENT,
    "validate": COMPONENT,
    "pretrained": COMPONENT,
    "trainer": TRAINER,
    "convert": COMMAND,
    "inference": COMMAND,
    "evaluate": COMMAND,
    "precompute": COMMAND,
    "report": COMMAND,
    "bench": COMMAND,
    "bench_curves": COMMAND,
    "bench_data": COMMAND,
    "bench_decode": COMMAND,
    "bench_memory": COMMAND,
    "bench_recipe": COMMAND,
    "bench_start": COMMAND,
    "bench_teacher": COMMAND,
    "bench_train": COMMAND,
    "benchmark": COMMAND,
}
"""Everything else is a leaf."""


def imported(path: Path) -> set[str]:
    """The package's modules that a file imports, wherever in it that stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write imports in full"
            names |= {node.module or ""}
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names if name.startswith("taehv.")]
    return {part[1] for part in parts} & MODULES.keys()


def layer(module: str) -> int:
    return LAYERS.get(module, LEAF)


def test_layers_name_modules() -> None:
    assert LAYERS.keys() <= MODULES.keys()
    assert imported(MODULES["trainer"]) >= {"checkpoint", "config", "model", "data"}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"__init__"}))
def test_imports_go_one_way(module: str) -> None:
    upwards = {
        name for name in imported(MODULES[module]) if layer(name) > layer(module)
    }
    assert not upwards
    if layer(module) == COMMAND:
        assert "trainer" not in imported(MODULES[module])


def test_imports_never_go_round() -> None:
    waiting = {module: imported(path) for module, path in MODULES.items()}
    del waiting["__init__"]
    while waiting:
        free = [m for m, needed in waiting.items() if not needed & waiting.keys()]
        assert free, f"these import one another: {sorted(waiting)}"
        for module in free:
            del waiting[module]


def loaded_by(statement: str) -> set[str]:
    """The modules that a new process has loaded after a statement."""
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(done.stdout.split())


def test_the_model_comes_without_the_trainer() -> None:
    loaded = loaded_by("import taehv; taehv.TAEHV, taehv.StreamingTAEHV")
    ours = {name for name in loaded if name.startswith("taehv.")}
    assert {"taehv.model", "taehv.streaming", "taehv.variants"} <= ours
    assert {layer(name.removeprefix("taehv.")) for name in ours} == {GROUND, LEAF}
    heavy = {
        "taehv.data",
        "taehv.video",
        "taehv.config",
        "taehv.rules",
        "av",
        "tensorboard",
    }
    assert not loaded & heavy


def test_a_decoding_process_comes_without_the_compiler() -> None:
    loaded = loaded_by("import taehv.data")
    assert "taehv.video" in loaded
    assert not loaded & {"taehv.model", "torch._dynamo", "torchmetrics"}


def test_files_speak_of_nothing_outside_of_the_project() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    # Folders of one machine; "(?:)" keeps this file from finding itself.
    outside = re.compile(
        r"(?<![\w.~$}])/(?:)(work|root|home|tmp|mnt)/|(?<!\w)shared(?:)/"
    )
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix not in {".npz", ".png", ".jpg", ".mp4"} and path.exists():
            text = path.read_text(encoding="utf-8")
            found += [(name, match[0]) for match in outside.finditer(text)]
    assert not found
