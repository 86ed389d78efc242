"""Settings: what takes precedence, what is refused, and in which words."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

import taehv.sections
from taehv.config import INDIFFERENT, changes, dumps, load_config
from taehv.errors import UserError
from taehv.rules import LIMITS, check_paths
from taehv.sections import Config

ROOT = Path(__file__).parent.parent.parent
DEFAULTS = {
    f"{section}.{name}": value
    for section, values in asdict(Config()).items()
    for name, value in values.items()
}
TRICKY = 'say "hi" # = [x]\\n\n\ttab \x00\x1f\x7f\x85\u2028 Grüße 映像 \U0001f39e \\'

UNUSUAL: dict[str, Any] = {
    "job.name": TRICKY,
    "job.output_dir": TRICKY + "/",
    "model.variant": "taeltx2_3_wide",
    "model.trained": "encoder",
    "model.initialization": "pytorch",
    "model.checkpoint": "C:\\weights\\new.pth",
    "teacher.kind": "a.b:'C'",
    "teacher.path": '"""',
    "teacher.dtype": "bf16",
    "teacher.latents": "mode",
    "teacher.tiling": False,
    "data.root": "'''",
    "data.annotations": "true",
    "data.holdout": ["a, b.mp4", TRICKY, "[!x]*"],
    "data.holdout_fraction": 1.0,
    "data.cache": "~/frames and latents",
    "data.lead_in": 0,
    "data.frames": 9,
    "data.height": 96,
    "data.width": 1_600_000_000_000,
    "data.stride": [2, 2],
    "data.crop_scale": [0.1 + 0.2, 1 / 3 + 0.5],
    "data.flip": 5e-324,
    "data.color_jitter": 1e-7,
    "data.crops_per_window": 2,
    "data.window_frames": 40,
    "data.sources": ["/a", "b, c.txt"],
    "data.weights": [1e-9, 3.5],
    "data.images": True,
    "data.index": "~/'index'",
    "data.min_size": 1,
    "data.min_frames": 2,
    "data.min_rate": 23.976,
    "data.aspect": [0.5, 2 / 3],
    "data.buckets": [[17.0, 64.0, 32.0, 0.1], [9.0, 96.0, 64.0, 1e9]],
    "data.batch_multiple": 96,
    "data.blur": 1.5,
    "data.noise": 0.1,
    "data.workers": 0,
    "data.prefetch": 10**20,
    "cache.windows": 10**12,
    "cache.frames": 17,
    "cache.crop_scale": [0.6, 1.0],
    "cache.height": 1,
    "cache.width": 640,
    "cache.images": "jpeg",
    "cache.shard_windows": 1,
    "cache.batch_size": 3,
    "proxy.folder": "~/small copies",
    "proxy.height": 540,
    "proxy.keyframe_interval": 1,
    "proxy.crf": 0,
    "training.steps": 1,
    "training.seed": 2**63 - 1,
    "training.global_batch_size": 24,
    "training.local_batch_size": 4,
    "training.precision": "fp64",
    "training.device": "cpu",
    "training.activation_checkpointing": True,
    "training.max_bad_steps": 1,
    "training.find_batch_size": True,
    "training.start_timeout": 90.5,
    "training.step_timeout": 30.25,
    "training.gc_interval": 7,
    "optim.optimizer": "muon",
    "optim.encoder_lr_scale": 1e-12,
    "optim.decoder_lr_scale": 3.5,
    "optim.lr": 1.7976931348623157e308,
    "optim.spike_factor": 12.5,
    "optim.betas": [0.0, 0.9999999999999999],
    "optim.eps": 1e22,
    "optim.weight_decay": 123456789.123456789,
    "optim.warmup_steps": 0,
    "optim.schedule": "linear",
    "optim.decay_share": 1 / 7,
    "optim.final_lr_scale": 0.1,
    "optim.max_grad_norm": 0.0,
    "optim.ema_decay": 1.0,
    "loss.reconstruction": "charbonnier",
    "loss.reconstruction_weight": 2 / 3,
    "loss.latent_weight": 1e16,
    "loss.latent_scale_weight": 1e-5,
    "loss.decoder_latents": "mixture",
    "loss.temporal_weight": 0.25,
    "loss.frequency_weight": 0.125,
    "loss.consistency_weight": 1e-300,
    "seraena.enable": True,
    "seraena.start_step": 10**15,
    "seraena.ramp_steps": 0,
    "seraena.weight": 1e-9,
    "seraena.adaptive": True,
    "seraena.discriminator_lr": 2e-5,
    "seraena.interval": 2,
    "seraena.frames": 9,
    "seraena.replay_size": 10**15,
    "seraena.replay_dtype": "uint8",
    "seraena.replay_device": "cpu",
    "seraena.replay_in_checkpoint": True,
    "parallelism.mode": "hsdp",
    "parallelism.shard_size": 3,
    "parallelism.cpu_offload": True,
    "compile.enable": False,
    "compile.mode": "max-autotune-no-cudagraphs",
    "compile.fused": False,
    "compile.cuda_graph": False,
    "checkpoint.interval": 1,
    "checkpoint.folder": "memory://bucket/a run",
    "checkpoint.asynchronous": False,
    "checkpoint.keep_every": 1000,
    "checkpoint.max_failures": 7,
    "checkpoint.time_limit": 30,
    "checkpoint.resume_from": "outputs/before",
    "checkpoint.allow_changed_data": True,
    "checkpoint.export_interval": 50,
    "checkpoint.keep": 0,
    "checkpoint.resume": False,
    "validation.interval": 7,
    "validation.clips": 2,
    "validation.frames": 17,
    "validation.height": 64,
    "validation.width": 96,
    "validation.best": "decoder_ssim",
    "validation.patience": 3,
    "validation.lpips": "weights\\of alexnet.pth",
    "validation.st_lpips": True,
    "validation.vmaf": "~/bin/ffmpeg",
    "logging.interval": 3,
}
"""A legal value of every setting that a careless writer or reader would spoil."""


def get(config: Config, key: str) -> Any:
    """The value of section.setting."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def toml_file(folder: Path, text: str) -> str:
    """The option that reads a file of this text."""
    path = folder / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return f"--config={path}"


def refusal(argv: list[str], world_size: int = 1) -> str:
    """What a command line is refused with, which must be one line."""
    with pytest.raises(UserError) as raised:
        load_config(argv, world_size)
    text = str(raised.value)
    assert len(text.splitlines()) == 1 and text.strip() == text
    return text


# Precedence


def test_command_line_over_file_over_default(tmp_path: Path) -> None:
    text = "[optim]\nlr = 0.5\nwarmup_steps = 7\n[data]\nstride = [2, 4]\n"
    config = load_config(["--optim.lr=0.25", toml_file(tmp_path, text)], 1)
    assert config.optim.lr == 0.25
    assert config.optim.warmup_steps == 7 and config.data.stride == [2, 4]
    assert config.optim.eps == 1e-8 and config.data.frames == 13


def test_defaults_are_shared_by_no_two_configs() -> None:
    first, second = load_config([], 1), load_config([], 1)
    first.data.stride.append(9)
    first.optim.lr = 9.0
    assert second == Config()


def test_world_size_is_that_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="multiple of the 3 processes: take 18"):
        load_config([])


# Round trip


def test_what_changes_the_course_of_a_run_is_named() -> None:
    before = Config()
    assert changes(dumps(before), Config()) == {}
    now = load_config(["--optim.lr=0.5", "--data.stride=1,2", "--job.name=b"], 1)
    now.data.root, now.parallelism.mode, now.logging.interval = "b", "fsdp", 3
    now.validation.height, now.validation.interval = 64, 3
    assert changes(dumps(before), now) == {
        "validation.height": (0, 64),
        "optim.lr": (1e-3, 0.5),
        "data.stride": ([1, 3], [1, 2]),
    }
    # Written before there was such a setting: it had its default.
    assert changes("[optim]\nlr = 0.5\n[validation]\nheight = 64\n", now) == {
        "data.stride": ([1, 3], [1, 2])
    }


def test_what_is_indifferent_is_there() -> None:
    known = DEFAULTS.keys() | {key.split(".")[0] for key in DEFAULTS}
    assert known >= INDIFFERENT


def test_what_to_resume_from_is_a_step_or_a_folder() -> None:
    for text, value in (
        ("100", 100),
        ("outputs/x", "outputs/x"),
        ("s3://b/x", "s3://b/x"),
    ):
        config = load_config([f"--checkpoint.resume_from={text}"], 1)
        assert config.checkpoint.resume_from == value


def test_unusual_values_are_unusual() -> None:
    assert set(UNUSUAL) == set(DEFAULTS)
    assert [key for key in UNUSUAL if UNUSUAL[key] == DEFAULTS[key]] == []


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    config = Config()
    for key, value in UNUSUAL.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    again = load_config([toml_file(tmp_path, dumps(config))], world_size=6)
    for key, value in UNUSUAL.items():
        assert (get(again, key), type(get(again, key))) == (value, type(value)), key


def test_every_setting_can_be_set_on_the_command_line() -> None:
    argv = [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in UNUSUAL.items()
        if key != "data.holdout"  # TOML lacks some of JSON's escapes
    ]
    config = load_config([*argv, "--data.holdout=a.mp4"], world_size=6)
    for key, value in {**UNUSUAL, "data.holdout": ["a.mp4"]}.items():
        assert get(config, key) == value, key


# Values on the command line


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--data.stride", "1,3"], "data.stride", [1, 3]),
        (["--data.stride=2, 5"], "data.stride", [2, 5]),
        (["--data.stride", "[2, 5]"], "data.stride", [2, 5]),
        (["--data.crop_scale", "1,1"], "data.crop_scale", [1.0, 1.0]),
        (["--data.holdout", "a.mp4"], "data.holdout", ["a.mp4"]),
        (["--data.holdout", "test/*,7"], "data.holdout", ["test/*", "7"]),
        (["--data.holdout", '["a,b.mp4"]'], "data.holdout", ["a,b.mp4"]),
        (["--data.holdout=[]"], "data.holdout", []),
        (["--data.holdout="], "data.holdout", []),
        (["--optim.lr=.5"], "optim.lr", 0.5),
        (["--data.root", "7"], "data.root", "7"),
        (["--data.root", "true"], "data.root", "true"),
        (["--data.root="], "data.root", ""),
        (["--job.name", "-1"], "job.name", "-1"),
        (["--data.workers", "-1"], "data.workers", -1),
        (["--optim.lr", "1e-3"], "optim.lr", 1e-3),
        (["--optim.lr", "2"], "optim.lr", 2.0),
        (["--training.steps", "10_000"], "training.steps", 10_000),
        (["--training.steps=5", "--training.steps=6"], "training.steps", 6),
        (["--parallelism.cpu_offload"], "parallelism.cpu_offload", True),
        (["--parallelism.cpu_offload", "False"], "parallelism.cpu_offload", False),
        (["--checkpoint.resume=false"], "checkpoint.resume", False),
        (["--checkpoint.resume", "--job.name=x"], "checkpoint.resume", True),
        (["--compile.enable"], "compile.enable", True),
        (["--compile.enable", "auto"], "compile.enable", "auto"),
        (["--compile.enable", "TRUE"], "compile.enable", True),
    ],
)
def test_values_on_the_command_line(argv: list[str], key: str, value: object) -> None:
    found = get(load_config(argv, 1), key)
    assert found == value and type(found) is type(value)


def test_negative_numbers_reach_the_check_of_their_setting() -> None:
    assert refusal(["--optim.lr", "-1e-3"]) == "optim.lr = -0.001 must be at least 0"
    told = "checkpoint.resume_from = -1 must be at least 0"
    assert refusal(["--checkpoint.resume_from=-1"]) == told
    assert "data.stride = [-1, 3] must be" in refusal(["--data.stride", "-1,3"])


# Wrong types

WRONG = [
    ("training.steps", "true", "an integer"),
    ("training.steps", "5.0", "an integer"),
    ("training.steps", '"5"', "an integer"),
    ("training.steps", "[5]", "an integer"),
    ("training.steps", "1979-05-27", "an integer"),
    ("optim.lr", "true", "a number"),
    ("optim.lr", '"1e-3"', "a number"),
    ("optim.lr", "nan", "a number"),
    ("optim.lr", "-inf", "a number"),
    ("parallelism.cpu_offload", "1", "true or false"),
    ("parallelism.cpu_offload", '"yes"', "true or false"),
    ("compile.enable", "1", 'true or false or "auto"'),
    ("compile.enable", '"on"', 'true or false or "auto"'),
    ("parallelism.mode", '"ddp"', '"replicate" or "fsdp" or "hsdp"'),
    ("parallelism.mode", '["fsdp"]', '"replicate" or "fsdp" or "hsdp"'),
    ("training.precision", "16", '"auto" or "bf16" or "fp32" or "fp64"'),
    ("data.stride", "[1, 2.5]", "a list, each an integer"),
    ("data.stride", "[1, true]", "a list, each an integer"),
    ("data.stride", '["1", "3"]', "a list, each an integer"),
    ("data.crop_scale", '["small", "large"]', "a list, each a number"),
    ("data.crop_scale", "[[0.5, 1.0]]", "a list, each a number"),
]
WRONG_IN_A_FILE_ALONE = [
    ("data.stride", "3", "a list, each an integer"),
    ("data.holdout", '"a.mp4"', "a list, each a text"),
    ("data.holdout", "[1]", "a list, each a text"),
    ("job.name", "5", "a text"),
    ("job.name", "{a = 1}", "a text"),
    ("parallelism.cpu_offload", '"true"', "true or false"),
]


@pytest.mark.parametrize(("key", "text", "wanted"), WRONG + WRONG_IN_A_FILE_ALONE)
def test_wrong_type_in_a_file(tmp_path: Path, key: str, text: str, wanted: str) -> None:
    section, name = key.split(".")
    told = refusal([toml_file(tmp_path, f"[{section}]\n{name} = {text}\n")])
    default = json.dumps(DEFAULTS[key])
    assert told.startswith(f"{tmp_path / 'settings.toml'}: {key} = ")
    assert told.endswith(f"must be {wanted} (the default is {default})")


@pytest.mark.parametrize(("key", "text", "wanted"), WRONG)
def test_wrong_type_on_the_command_line(key: str, text: str, wanted: str) -> None:
    told = refusal([f"--{key}={text}"])
    assert told.startswith(f"the command line: {key} = ") and wanted in told


# Unknown names


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("training.stpes", "training.steps"),
        ("data.rot", "data.root"),
        ("trainin.seed", "training.seed"),
        ("training.lr", "optim.lr"),
        ("model.stride", "data.stride"),
        ("training.warmup_steps", "optim.warmup_steps"),
        ("logging.keep", "checkpoint.keep"),
        ("loging.interval", "logging.interval"),
    ],
)
def test_the_nearest_setting_is_named(
    tmp_path: Path, unknown: str, nearest: str
) -> None:
    long = "/a/long/folder/that/resembles/no/setting/at/all"
    for argv in ([f"--{unknown}", long], [f"--{unknown}={long}"]):
        expected = f"unknown setting --{unknown}: did you mean --{nearest}?"
        assert refusal(argv) == expected
    section, name = unknown.split(".")
    if section in asdict(Config()):
        told = refusal([toml_file(tmp_path, f"[{section}]\n{name} = 1\n")])
        assert told.endswith(f"unknown setting {unknown}: did you mean {nearest}?")


def test_a_setting_without_its_section() -> None:
    assert "did you mean --training.steps?" in refusal(["--steps", "5"])
    assert "did you mean --optim.lr?" in refusal(["--lr=5"])


def test_a_setting_like_no_other_lists_them_all() -> None:
    told = refusal(["--zzzzzzzz=1"])
    assert all(f"--{key}" in told for key in DEFAULTS)


def test_abbreviations_are_no_settings() -> None:
    assert "did you mean --training.steps?" in refusal(["--training.step=5"])


def test_patience_needs_something_to_wait_for() -> None:
    told = "validation.patience = 3 needs validation.best and validation.clips"
    assert told in refusal(["--validation.patience=3", "--validation.best="])
    assert told in refusal(["--validation.patience=3", "--validation.clips=0"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[optimizer]\n", "unknown section [optimizer]: did you mean optim?"),
        ("steps = 5\n", "unknown section [steps]"),
        ("data = 5\n", "data is a section: write [data]"),
        ("[data.video]\nframes = 5\n", "unknown setting data.video"),
        ("[data\n", "is not valid TOML"),
        ("[data]\nframes = 5\nframes = 6\n", "is not valid TOML"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, told: str) -> None:
    assert told in refusal([toml_file(tmp_path, text)])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert refusal([f"--config={tmp_path}/no.toml"]).endswith(
        "no.toml: no such file; train_configs has some"
    )
    assert "directory" in refusal([f"--config={tmp_path}"])
    (tmp_path / "latin.toml").write_bytes('[job]\nname = "Gr\xfc"'.encode("latin-1"))
    assert "UTF-8" in refusal([f"--config={tmp_path}/latin.toml"])


@pytest.mark.parametrize("argv", [["stray"], ["--job.name"], ["--data.stride="]])
def test_malformed_command_lines(argv: list[str]) -> None:
    assert argv[0].strip("-=") in refusal(argv)


# Rules


def test_every_single_number_has_limits() -> None:
    numbers = {key for key, value in DEFAULTS.items() if type(value) in (int, float)}
    assert set(LIMITS) == numbers


@pytest.mark.parametrize("key", LIMITS)
def test_limits_hold(key: str) -> None:
    low, high = LIMITS[key]
    for value, bound in ((low - 1, low), (high + 1, high)):
        if math.isfinite(value):
            told = refusal([f"--{key}={value}"])
            assert told.startswith(f"{key} = ") and str(bound) in told


@pytest.mark.parametrize("key", ["holdout_fraction", "flip", "color_jitter"])
@pytest.mark.parametrize("value", [0, 1])
def test_limits_themselves_are_legal(key: str, value: int) -> None:
    assert get(load_config([f"--data.{key}={value}"], 1), f"data.{key}") == value


CVX = "--teacher.kind=cogvideox --teacher.path=a/b --model.variant=taecvx"
HV = "--teacher.kind=hunyuanvideo --teacher.path=a/b"
LTX = "--teacher.kind=ltx2 --teacher.path=a/b --model.variant=taeltx2_3"
H3 = "--teacher.kind=minimax_h3 --teacher.path=a/b --model.variant=taeh3"

RULES = [
    (1, "--data.stride=1", "data.stride = [1] must be two numbers"),
    (1, "--data.stride=1,2,3", "must be two numbers"),
    (1, "--data.stride=[]", "must be two numbers"),
    (1, "--data.stride=3,1", "smallest and largest, from 1"),
    (1, "--data.stride=0,1", "smallest and largest, from 1"),
    (1, "--data.crop_scale=0.5,1.1", "from 0.01 to 1"),
    (1, "--data.crop_scale=0,1", "from 0.01 to 1"),
    (1, "--cache.crop_scale=0,1", "cache.crop_scale = [0.0, 1.0] must be two numbers"),
    (1, "--validation.height=20", "validation.height = 20 must be a multiple of 8"),
    (1, "--validation.frames=12 --data.cache=c", "validation.frames = 12 is no length"),
    (1, f"--validation.frames=12 {HV}", "validation.frames = 12 must be"),
    (1, "--optim.betas=0.9", "two numbers from 0 to below 1"),
    (1, "--optim.betas=0.9,1", "two numbers from 0 to below 1"),
    (1, "--optim.betas=-0.1,0.9", "two numbers from 0 to below 1"),
    (1, "--job.name=", "job.name = '' must be a folder's name"),
    (1, "--job.output_dir=s3://b/x", "job.output_dir = s3://b/x is a URL: give a"),
    (1, "--job.name=/runs/a", "must be a folder's name"),
    (1, "--model.variant=taew21", "did you mean taew2_1?"),
    (
        1,
        "--loss.temporal_weight=1 --data.frames=4",
        "frames = 4 give 1: take more",
    ),
    (1, "--data.height=20", "multiple of 8, the space factor of taehv: take 16 or 24"),
    (1, "--data.width=7", "multiple of 8, the space factor of taehv: take 8"),
    (1, "--model.variant=taew2_2 --data.width=40", "multiple of 16"),
    (1, "--model.variant=taew2_2 --data.width=40", "take 32 or 48"),
    (1, "--model.variant=taeltx_2 --data.height=80", "take 64 or 96"),
    (1, "--data.cache=c --data.frames=12", "latents of taehv decode to"),
    (1, "--data.cache=c --data.frames=12", "take 9 or 13"),
    (1, "--data.cache=c --data.frames=4 --model.variant=taeh3", "take 5"),
    (1, "--data.cache=c --data.frames=12 --model.variant=taecvx", "take 9 or 16"),
    (1, "--data.cache=c --data.lead_in=4", "none of the 4 latents of data.frames = 13"),
    (1, "--teacher.path=a/b", "teacher.path = a/b without teacher.kind"),
    (1, "--teacher.kind=wam", 'is no "package.module:Class": did you mean wan?'),
    (1, "--teacher.kind=own:", '"own:" is no "package.module:Class"'),
    (1, "--teacher.kind=:Own", '":Own" is no "package.module:Class"'),
    (1, "--teacher.kind=wan", "take taew2_1 or taew2_2 or taew2_2_super, or as"),
    (1, "--teacher.kind=wan", "or as teacher.kind hunyuanvideo"),
    (1, "--teacher.kind=wan --model.variant=taeos1_3", "since none is built in"),
    (1, "--teacher.kind=hunyuanvideo", "needs teacher.path"),
    (1, f"{H3} --data.frames=22 --teacher.dtype=bf16", "bf16 is not for minimax_h3"),
    *[
        (
            1,
            f"{teacher} --data.frames={frames}",
            f"data.frames = {frames} must be {told}",
        )
        for teacher, frames, told in [
            (CVX, 12, "8k or 8k + 1 for teacher.kind = cogvideox: take 9 or 16"),
            (CVX, 7, "8k or 8k + 1 for teacher.kind = cogvideox: take 1 or 8"),
            (HV, 12, "4k + 1 for teacher.kind = hunyuanvideo: take 9 or 13"),
            (LTX, 13, "8k + 1 for teacher.kind = ltx2: take 9 or 17"),
            (H3, 5, "17k + 5 for teacher.kind = minimax_h3: take 22"),
            (H3, 34, "17k + 5 for teacher.kind = minimax_h3: take 22 or 39"),
        ]
    ],
    (3, "--training.steps=1", "multiple of the 3 processes: take 18"),
    (32, "--training.steps=1", "multiple of the 32 processes: take 32"),
    (2, "--training.local_batch_size=3", "must divide the 8 clips that each of 2"),
    (1, "--training.local_batch_size=32", "must divide the 16 clips"),
    (4, "--data.crops_per_window=3", "must divide the 4 clips"),
    (4, "--data.crops_per_window=3", "take training.global_batch_size = 24"),
    (
        3,
        "--data.crops_per_window=4",
        "of the 3 processes times 4 data.crops_per_window: take 24",
    ),
    (1, "--data.crops_per_window=4 --training.local_batch_size=2", "the 2 clips"),
    (1, "--parallelism.shard_size=2", "is for mode hsdp; leave it at 0 for replicate"),
    (1, "--seraena.enable --seraena.frames=6 --data.frames=5", "lower it or take more"),
    (
        1,
        "--seraena.enable --model.trained=encoder --teacher.kind=a:B",
        "set loss.decoder_latents to own or mixture",
    ),
    (
        1,
        "--seraena.enable --seraena.adaptive --loss.reconstruction_weight=0",
        "raise loss.reconstruction_weight",
    ),
    (1, "--seraena.enable --seraena.replay_size=79", "must be 0 or at least 80"),
    (
        1,
        "--seraena.enable --seraena.replay_device=cpu --compile.cuda_graph=true",
        "take one of them",
    ),
    (2, "--parallelism.mode=fsdp --parallelism.shard_size=2", "at 0 for fsdp"),
    (8, "--parallelism.mode=hsdp", "in mode hsdp: take one of 1, 2, 4, 8"),
    (4, "--parallelism.mode=hsdp --parallelism.shard_size=3", "one of 1, 2, 4"),
]


@pytest.mark.parametrize(("world_size", "line", "told"), RULES)
def test_rules_name_the_cure(world_size: int, line: str, told: str) -> None:
    assert told in refusal(line.split(), world_size)


@pytest.mark.parametrize(
    ("world_size", "line"),
    [
        (3, "--training.global_batch_size=18"),
        (2, "--training.local_batch_size=4"),
        (4, "--data.crops_per_window=4"),
        (1, "--data.crops_per_window=2 --training.local_batch_size=2"),
        (4, "--parallelism.mode=hsdp --parallelism.shard_size=2"),
        (1, "--model.variant=taeltx_2 --data.height=64 --data.width=96"),
        (1, "--data.cache=c --data.lead_in=3"),
        (1, "--data.cache=c --data.frames=16 --model.variant=taecvx"),
        (1, "--data.lead_in=4 --data.frames=12"),
        (1, f"{CVX} --data.frames=16"),
        (1, f"{CVX} --data.frames=9"),
        (1, f"{HV} --data.frames=13"),
        (1, f"{LTX} --data.frames=17"),
        (1, f"{H3} --data.frames=39 --teacher.dtype=fp32"),
        (1, "--teacher.kind=own:Class --data.frames=12"),
        (1, "--data.stride=1,1 --data.crop_scale=1,1 --optim.betas=0,0"),
    ],
)
def test_the_cures_cure(world_size: int, line: str) -> None:
    load_config(line.split(), world_size)


# As a program


def program(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the check of a command line as run_train.sh does."""
    return subprocess.run(
        [sys.executable, "-m", "taehv.config", *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=60,
    )


def test_a_mistake_ends_with_code_2_and_one_line() -> None:
    done = program("--training.lr=1")
    expected = "error: unknown setting --training.lr: did you mean --optim.lr?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)
    done = program("--config=")
    assert (done.returncode, done.stderr) == (
        2,
        "error: --config is empty: name a TOML file\n",
    )
    done = program("--data.crops_per_window=3", WORLD_SIZE="4")
    assert done.returncode == 2 and "the 4 clips" in done.stderr


def test_a_good_command_line_ends_silently(tmp_path: Path) -> None:
    done = program("--optim.lr=1", f"--data.root={tmp_path}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("told", "settings"),
    [
        ("data.root is empty", {"data.root": ""}),
        ("data.root = {none} is not there", {"data.root": "{none}"}),
        ("data.root: nothing is like {none}/*", {"data.root": "{none}/*"}),
        (
            "data.sources = {none}.txt is not",
            {"data.sources": "{there},{none}.txt", "data.root": ""},
        ),
        ("data.annotations = {none} is not", {"data.annotations": "{none}"}),
        ("data.cache = {none} is no folder", {"data.cache": "{none}"}),
        ("model.checkpoint = {none} is not", {"model.checkpoint": "{none}"}),
        ("checkpoint.resume_from = {none} is", {"checkpoint.resume_from": "{none}"}),
        ("validation.lpips = {none} is not", {"validation.lpips": "{none}"}),
        (
            "teacher.path = {none} is no folder",
            {"teacher.kind": "hunyuanvideo", "teacher.path": "{none}"},
        ),
        ("", {"data.root": "{there}/*"}),
        ("", {"teacher.kind": "hunyuanvideo", "teacher.path": "owner/name"}),
        ("", {"teacher.kind": "package.module:Class", "teacher.path": "{none}"}),
        ("", {"checkpoint.resume_from": "s3://bucket/run"}),
        ("", {"data.root": "s3://bucket/*/good"}),
        ("", {"checkpoint.resume_from": "500"}),
        ("", {"data.cache": "{there}", "data.root": ""}),
        ("", {"job.name": "begun", "model.checkpoint": "{none}"}),
    ],
)
def test_paths_are_looked_for(
    tmp_path: Path, told: str, settings: dict[str, str]
) -> None:
    places = {"there": tmp_path, "none": tmp_path / "none"}
    (tmp_path / "begun/checkpoints").mkdir(parents=True)
    usual = {"job.output_dir": "{there}", "job.name": "new", "data.root": "{there}"}
    argv = [f"--{k}={v.format(**places)}" for k, v in (usual | settings).items()]
    config = load_config(argv, 1)
    if not told:
        check_paths(config)
        return
    with pytest.raises(UserError) as caught:
        check_paths(config)
    assert str(caught.value).startswith(told.format(**places))


def test_the_script_tells_a_missing_path_in_one_line(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [str(ROOT / "run_train.sh"), f"--data.root={tmp_path / 'none'}"],
        env={**os.environ, "PATH": path, "NGPU": "2"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    expected = (
        f"error: data.root = {tmp_path / 'none'} is not there: correct the path\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("NGPU=x", "NGPU=x: give a whole number from 1 on"),
        ("NGPU=0", "NGPU=0: give a whole number from 1 on"),
        ("MAX_RESTARTS=-1", "MAX_RESTARTS=-1: give a whole number from 0 on"),
        ("NNODES=08", "NNODES=08: give a whole number from 1 on"),
        ("NODE_RANK=1", "NODE_RANK=1: NNODES=1 has none"),
        ("NNODES=2", "RDZV_ENDPOINT=: give host:port of node 0"),
        ("NNODES=2 RDZV_ENDPOINT=host", "RDZV_ENDPOINT=host: give host:port"),
        ("NNODES=2 RDZV_ENDPOINT=host:65536", "RDZV_ENDPOINT=host:65536: give host"),
        ("NGPU=2 LOG_RANK=x", "LOG_RANK=x: give local ranks from 0 to 1, parted"),
        ("NGPU=2 LOG_RANK=0,2", "LOG_RANK=0,2: give local ranks from 0 to 1, parted"),
        (
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1s",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1s: give",
        ),
    ],
)
def test_the_script_tells_a_wrong_variable_in_one_line(given: str, told: str) -> None:
    variables = dict(pair.split("=") for pair in given.split())
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [str(ROOT / "run_train.sh"), "--data.root=/none"],
        env={**os.environ, "PATH": path, "NGPU": "1", **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith(f"error: {told}") and len(done.stderr.splitlines()) == 1
    )


def test_the_configs_that_come_along_are_legal() -> None:
    paths = sorted(ROOT.glob("train_configs/*.toml"))
    for path in paths:
        load_config([f"--config={path}"], 1)
    assert paths


def test_help_explains_every_setting() -> None:
    done = program("--help", COLUMNS="10000", NO_COLOR="1")
    assert done.returncode == 0 and done.stderr == ""
    text = " ".join(done.stdout.split())
    for key, default in DEFAULTS.items():
        ending = re.escape(f"(default: {json.dumps(default)})")
        found = re.search(rf"--{key} (\S+) ((?:(?!--\w).)+?) {ending}", text)
        assert found and len(found[2]) > 20, key
    assert "--data.frames INT Length of a training clip, in frames. (def" in text
    assert "--parallelism.mode replicate|fsdp|hsdp replicate: every process" in text
    assert "--data.stride INT,... Smallest" in text


# The source


def test_every_setting_is_explained_in_the_source() -> None:
    tree = ast.parse(Path(taehv.sections.__file__).read_text())
    sections = {type(section) for section in vars(Config()).values()}
    bodies = {
        node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)
    }
    assert len(sections) == len(fields(Config))
    for section in sections:
        body = bodies[section.__name__]
        explained = {
            above.target.id
            for above, below in zip(body, body[1:], strict=False)
            if isinstance(above, ast.AnnAssign)
            and isinstance(below, ast.Expr)
            and isinstance(below.value.value, str)
        }
        assert explained == {field.name for field in fields(section)}


def test_every_setting_is_read_somewhere() -> None:
    read = {
        node.attr
        for path in Path(taehv.sections.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert {key.split(".")[1] for key in DEFAULTS} <= read
