"""What the README and the shipped settings promise is accepted by the program."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from taehv.config import load_config, read_config
from taehv.precompute import check_precompute

ROOT = Path(__file__).parent.parent.parent
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
PAGES = [*READMES, ROOT / "docs/cache.md"]


def commands() -> list[str]:
    """Every command that takes settings, with continued lines joined."""
    lines: list[str] = []
    for page in PAGES:
        blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
        lines += "\n".join(blocks).replace("\\\n", " ").splitlines()
    trains = re.compile(r"(torchrun .*train\.py|run_train\.sh|taehv\.precompute)")
    return sorted({line for line in lines if trains.search(line)})


def test_readme_has_commands() -> None:
    assert len(commands()) >= 4


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_readme_are_accepted(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.removeprefix("srun bash -c ").strip("'"), comments=True)
    settings = dict(word.split("=") for word in words if re.match(r"[A-Z_]+=", word))
    if "taehv.precompute" in words:
        argv = words[words.index("taehv.precompute") + 1 :]
        check_precompute(read_config(argv))
        return
    start = next(i for i, w in enumerate(words) if w.endswith((".sh", ".py")))
    argv = words[start + 1 :]
    if words[start].endswith(".sh"):
        default = "train_configs/debug.toml"
        if "CONFIG_FILE" not in settings and "SLURM" in command:
            default = "train_configs/autoencoder.toml"
        argv = ["--config", settings.get("CONFIG_FILE", default), *argv]
    processes = 8 * int(settings.get("NNODES", 4 if "SLURM" in command else 1))
    if "debug" in argv[1]:
        argv += ["--training.global_batch_size", str(2 * processes)]
    load_config(argv, processes)


@pytest.mark.parametrize("path", sorted(ROOT.glob("train_configs/*.toml")), ids=str)
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_shipped_settings_suit_these_processes(path: Path, processes: int) -> None:
    batch = ["--training.global_batch_size", str(2 * processes)]
    extra = batch if path.name == "debug.toml" else []  # as run_train.sh does
    load_config(["--config", str(path), *extra], processes)


def test_links_of_the_readme_lead_somewhere() -> None:
    for readme in READMES:
        for target in re.findall(r"\]\(([^)]+)\)", readme.read_text()):
            assert target.startswith("https://") or (ROOT / target).exists(), target
