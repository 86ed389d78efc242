"""Studies of recipes: what is trained, what goes on, and what is told of it."""

from __future__ import annotations

import argparse
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from taehv import bench_recipe
from taehv.bench import Bench
from taehv.bench_recipe import Job, Lab, Pace, _left, points, told_losses, told_steps
from taehv.clips import Batch
from taehv.config import read_config
from taehv.distributed import started
from taehv.errors import UserError
from taehv.index import build_file_lists
from taehv.measure import Report
from taehv.pool import Pool, PoolSize
from taehv.sections import Config, Data, Parallelism, Teacher
from taehv.step import StepResult
from taehv.study import GUIDANCE, Results, Study, Task, diverged, reached
from taehv.teacher import load_teacher
from taehv.variants import VARIANTS, Variant

ROOT = Path(__file__).parent.parent.parent
STUDY = """
baseline = "plain"
clips = 2
points = 1
[pool]
windows = 6
frames = 9
height = 24
width = 24
[common.data]
holdout = ["held*"]
frames = 5
height = 16
width = 16
workers = 0
[common.training]
global_batch_size = 2
precision = "fp32"
[[arms]]
name = "plain"
model.initialization = "pytorch"
optim.betas = [0.9, 0.99]
[[arms]]
name = "default"
[[arms]]
name = "small"
data.frames = 1
data.height = 8
[[arms]]
name = "grown"
of = "small"
then = "default"
[[arms]]
name = "default, bad"
of = "default"
loss.reconstruction_weight = 1e38
loss.temporal_weight = 1e38
[[arms]]
name = "guided"
seraena.enable = true
seraena.start_step = 1
seraena.ramp_steps = 0
seraena.weight = 1.0
seraena.replay_size = 4
[[stages]]
name = "first"
steps = 3
arms = ["plain", "default, bad", "default", "guided", "grown"]
[[stages]]
name = "second"
seconds = 0.3
arms = ["default"]
seeds = [1]
keep = true
against = "first"
"""


TAUGHT = """
[common.teacher]
kind = "hunyuanvideo"
path = "vae"
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(STUDY)
    return path


def test_tasks_have_their_settings_and_keys(study: Path) -> None:
    tasks = Study.read(study, {"data.root": "a"}).tasks
    named = [(task.stage, task.arm, task.seed) for task in tasks]
    arms = ("plain", "default, bad", "default", "guided", "grown")
    assert named == [*(("first", arm, 0) for arm in arms), ("second", "default", 1)]
    assert tasks[0].config.optim.betas == [0.9, 0.99]
    assert tasks[1].config.loss.temporal_weight == 1e38
    assert [task.config.training.steps for task in tasks[:5]] == [3] * 5
    assert tasks[4].config.data.height == 8
    assert [task.later for task in tasks[:4]] == [None] * 4
    assert tasks[4].later == tasks[2].config.data
    assert {task.config.data.root for task in tasks} == {"a"}
    study.write_text(STUDY.replace("0.99]", "0.98]"))
    others = Study.read(study, {"data.root": "a"}).tasks
    same = [a.key == b.key for a, b in zip(tasks, others, strict=True)]
    assert same == [False, *[True] * 5] and len({t.key for t in tasks}) == 6
    of_it = '[[arms]]\nname = "a"\nof = "grown"\noptim.lr = 1e-4\n[[stages]]'
    study.write_text(
        STUDY.replace("[[stages]]", of_it, 1).replace(', "grown"]', ', "a"]')
    )
    assert Study.read(study, {"data.root": "a"}).tasks[4].later == tasks[4].later
    study.write_text(STUDY.replace('then = "default"', ""))
    assert Study.read(study, {"data.root": "a"}).tasks[4].key != tasks[4].key
    # Where it is written is all one, what it is judged by is not.
    for key, is_so in (("job.name", True), ("validation.height", False)):
        (task, *_) = Study.read(study, {"data.root": "a", key: "32"}).tasks
        assert (task.key == tasks[0].key) == is_so
    study.write_text(STUDY.replace("windows = 6", "windows = 7"))
    assert Study.read(study, {"data.root": "a"}).tasks[2].key != tasks[2].key
    # An arm's clips are its own, those that it is judged by are of all.
    keys = set()
    for height in (16, 24):
        text = STUDY.replace('arms = ["default"]', 'arms = ["small"]')
        study.write_text(text.replace("height = 16", f"height = {height}"))
        task = Study.read(study, {"data.root": "a"}).tasks[-1]
        assert (task.arm, task.config.data.height) == ("small", 8)
        keys.add(task.key)
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("clips = 2", "clip = 2", "clip"),
        ("windows = 6", "", "windows"),
        ('of = "default"', 'of = "other"', "other"),
        ('baseline = "plain"', 'baseline = "b"', "no arm 'b'"),
        ('then = "default"', 'then = "late"', "no arm 'late' comes before 'grown'"),
        ("seraena.enable", 'then = "small"\nseraena.enable', "exclude each other"),
        ("data.height = 8", "data.height = 32", "'grown': clips of"),
        ('then = "default"', 'then = ["default"]', "comes before 'grown'"),
        (
            'name = "plain"',
            'name = "odd"\ndata.height = 24\n[[arms]]\nname = "plain"\nthen = "odd"\n'
            'model.variant = "taew2_2"',
            "'plain': then data.height = 24 must be a multiple of 16",
        ),
        ("global_batch_size = 2", "batch = 2", "unknown setting"),
        (
            "width = 16\nworkers = 0\n[common.training]\nglobal_batch_size = 2\n"
            'precision = "fp32"\n[[arms]]\n',
            "width = 24\nworkers = 0\n[common.training]\nglobal_batch_size = 2\n"
            '[[arms]]\nmodel.variant = "taew2_2"\ndata.width = 16\n',
            "'plain': held-out clips: data.width = 24 must be a multiple of 16",
        ),
        ("optim.betas", "validation.height = 24\noptim.betas", "are judged by"),
        ("optim.betas = [0.9, 0.99]", "optim.lr = -1", "'plain': optim.lr = -1.0 must"),
        ("optim.betas", "optim.beta", "toml: arm 'plain': unknown setting"),
        ("workers = 0", "worker = 0", r"toml: \[common\] or --set: unknown setting"),
        ("frames = 9", "frames = 4", "cannot be cut"),
        ('name = "plain"', 'teacher.kind = "a:B"\nname = "plain"', "teacher of"),
        ("optim.betas", "data.stride = [2, 2]\noptim.betas", "the data of"),
        ("optim.betas", "data.lead_in = 0\noptim.betas", "the data of"),
        (
            '[[arms]]\nname = "plain"',
            f'{TAUGHT}[[arms]]\ndata.flip = 0.0\nname = "plain"',
            "the data of",
        ),
        ('against = "first"', 'baseline = "b"', "no arm 'b'"),
        ("[pool]", "[pool", "--study"),
        ("clips = 2", "clips = 0", "clips = 0 must be at least 1"),
        ("windows = 6", "windows = 6.5", "windows = 6.5 must be an integer"),
        ("[pool]", 'other = "x"\n[pool]', "unknown other"),
        ("[common.data]", "[comon.data]", "unknown comon: did you mean common"),
        ("seeds = [1]", "seeds = 1", "seeds = 1 must be a list"),
        ("seeds = [1]", "seeds = [-1]", "arm 'default': training.seed = -1 must be"),
        ("seeds = [1]", "seeds = [1, 1]", r"'second' has one of \[1, 1\] twice"),
        ('arms = ["plain", ', 'arms = ["guided", "plain", ', "has one of .* twice"),
        (
            'name = "guided"',
            'name = "default;bad"\n[[arms]]\nname = "guided"',
            "'default, bad' and 'default;bad' would have one name",
        ),
        ("seeds = [1]", "seeds = []", "needs seconds or steps, above 0, and seeds"),
        ("seconds = 0.3", "seconds = 0", "'second' needs seconds or steps"),
        ("seconds = 0.3", "seconds = 1\nsteps = 1", "'second' needs seconds or"),
        ('name = "second"', 'name = "first"', "several stages 'first'"),
        ('name = "second"', 'name = "a/b"', "letters and digits"),
        ('against = "first"', 'against = "third"', "no stage 'third'"),
        ('name = "default"', 'name = "plain"', "a name of its own"),
        ('name = "default"', 'color = 0.2\nname = "default"', "0.2 must be a table"),
    ],
)
def test_mistakes_in_a_study(study: Path, old: str, new: str, told: str) -> None:
    assert old in STUDY
    study.write_text(STUDY.replace(old, new))
    with pytest.raises(UserError, match=told) as raised:
        Study.read(study, {})
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"seconds_limit": 0}, "--seconds-limit 0 must be above 0"),
        ({"seconds_limit": math.nan}, "--seconds-limit nan"),
        ({"set": ["data.cache=a"]}, "--set data.cache: videos come from --root"),
        ({"set": ["=3"]}, "--set =3: give section.setting=value"),
        ({"stages": ["third"]}, "no stage 'third'"),
        ({"also": "/none"}, "--also /none: data.root = /none is no folder"),
        ({"set": ["model.checkpoint=/none.pth"]}, "/none.pth"),
    ],
)
def test_mistakes_in_a_command(
    videos: Path,
    study: Path,
    tmp_path: Path,
    given: dict[str, object],
    told: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "taehv")
    with pytest.raises(UserError, match=re.escape(told)) as raised:
        bench(videos, study, tmp_path / "output", **given)
    assert len(str(raised.value).splitlines()) == 1
    assert "decoding" not in caplog.text


def test_windows_are_what_the_teacher_takes(
    videos: Path, study: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study.write_text(STUDY.replace("frames = 9", "frames = 11"))
    caplog.set_level("INFO", "taehv")
    teacher = "frequency_teacher:FrequencyTeacher"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tests/gpu"))
        with pytest.raises(UserError, match="11 frames are none of 4 k"):
            given = [f"teacher.kind={teacher}"]
            bench(videos, study, tmp_path / "output", set=given, stages=["second"])
    assert "decoding" not in caplog.text


def test_a_teacher_of_low_frequencies_keeps_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests/gpu"))
    settings = Teacher(kind="frequency_teacher:FrequencyTeacher")
    teacher = load_teacher(settings, torch.device("cpu"))
    ramp_HW = torch.linspace(0.2, 0.8, 16).expand(16, 16)
    colors_C11 = torch.tensor([1.0, 0.5, 0.1])[:, None, None]
    frames_NTCHW = (ramp_HW * colors_C11).expand(1, 5, 3, 16, 16)
    latents_NTCHW = teacher.encode(frames_NTCHW, [0])
    assert latents_NTCHW.shape == (1, 2, 16, 2, 2)
    decoded_NTCHW = teacher.decode(latents_NTCHW)
    torch.testing.assert_close(decoded_NTCHW, frames_NTCHW, atol=0.02, rtol=0)
    noise_NTCHW = torch.rand(frames_NTCHW.shape)
    lost = (teacher.decode(teacher.encode(noise_NTCHW, [0])) - noise_NTCHW).abs()
    assert lost.mean() > 0.1


def test_other_weights_of_a_name_make_another_task(study: Path, tmp_path: Path) -> None:
    keys = []
    path = tmp_path / "weights.pth"
    for content in (b"a", b"b", b"b"):
        path.write_bytes(content)
        given = {"data.root": "a", "model.checkpoint": str(path)}
        keys.append(Study.read(study, given).tasks[0].key)
    assert keys[0] != keys[1] == keys[2]


def test_a_single_video_leaves_none_to_judge_by(
    videos: Path, study: Path, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    shutil.copy(min(videos.glob("*.mp4")), tmp_path / "one")
    with pytest.raises(UserError, match="no video is held out"):
        bench(tmp_path / "one", study, tmp_path / "output", set=["data.holdout=[]"])


def test_bad_videos_are_named(
    videos: Path, study: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "videos"
    shutil.copytree(videos, folder)
    for name in ("held_bad.mp4", "bad.mp4"):
        (folder / name).write_text("not a video")
    with pytest.raises(UserError, match="none of the videos to judge by"):
        bench(folder, study, tmp_path / "a", set=['data.holdout=["held_bad.mp4"]'])
    assert "left out a held-out clip" in caplog.text and "held_bad.mp4" in caplog.text
    caplog.clear()
    data = Data(root=str(folder), frames=5, height=16, width=16, workers=0)
    files, _ = build_file_lists(data)
    Pool.decoded(data, files, PoolSize(64, 5, 16, 16), torch.device("cpu"), None)
    # Each once, however often a window was to be of it.
    for name in ("bad.mp4", "held_bad.mp4"):
        assert caplog.text.count(f"bad video: {folder / name}") == 1


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UserError, match="--output"):
            Results(folder)


@pytest.mark.parametrize("path", sorted(ROOT.glob("tests/gpu/*.toml")), ids=str)
def test_the_studies_that_come_along_are_legal(path: Path) -> None:
    given = {"teacher.path": "vae"} if path.stem == "taught" else {}
    study = Study.read(path, given)
    trained = {task.arm for task in study.tasks}
    assert trained >= study.arms.keys()
    if path.stem == "variants":
        assert {task.config.model.variant for task in study.tasks} == VARIANTS.keys()
    for stage in study.stages:
        assert stage.against in ("", *(other.name for other in study.stages))


@pytest.mark.parametrize(
    ("arm", "name", "sections"),
    [
        ("candidate", "autoencoder", ("model", "optim", "loss", "seraena")),
        ("published", "published", ("model", "optim", "loss")),
    ],
)
def test_arms_of_the_recipe_are_what_users_train_with(
    arm: str, name: str, sections: tuple[str, ...]
) -> None:
    ours = Study.read(ROOT / "tests/gpu/recipe.toml", {"data.root": "a"}).config(arm)
    theirs = read_config(["--config", str(ROOT / f"train_configs/{name}.toml")])
    for section in sections:
        assert getattr(ours, section) == getattr(theirs, section)
    assert ours.training.global_batch_size == theirs.training.global_batch_size
    for key in ("frames", "height", "width", "flip", "color_jitter"):
        assert getattr(ours.data, key) == getattr(theirs.data, key)


def test_when_a_curve_reaches_a_value() -> None:
    curve = [(0.0, 10.0), (2.0, 20.0), (6.0, 24.0)]
    found = [reached(curve, goal) for goal in (9, 15, 20, 23, 25)]
    assert found == [0.0, 1.0, 2.0, 5.0, None]


def test_steps_that_fit_into_a_time() -> None:
    pace = Pace(first_steps=100, first=0.1, later=0.2)
    assert [pace.steps(s) for s in (5, 10, 30)] == [50, 100, 200]
    assert [pace.seconds(n) for n in (50, 100, 200)] == pytest.approx([5, 10, 30])
    assert Pace(0, 0.2, 0.2).steps(3) == 15


def test_guided_and_later_steps_are_timed_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[int] = []
    seconds = 0.0

    def step(lab: Lab, student: SimpleNamespace, data: Data) -> None:
        nonlocal seconds
        begun.append(student.steps)
        seconds += 1.0 if student.steps < 500 and data.frames < 25 else 2.0
        student.steps += 1

    clock = SimpleNamespace(perf_counter=lambda: seconds)
    monkeypatch.setattr(bench_recipe, "time", clock)
    monkeypatch.setattr(bench_recipe, "TIMED_SECONDS", 100)
    monkeypatch.setattr(Lab, "_step", step)
    monkeypatch.setattr(
        Lab, "_begun", lambda lab, config: SimpleNamespace(config=config)
    )
    monkeypatch.setattr(bench_recipe, "TIMED_STEPS", 2)
    lab = object.__new__(Lab)
    lab.device, lab.paces = torch.device("cpu"), {}
    config = Config()
    config.seraena.start_step, config.seraena.interval = 500, 2
    task = Task("a", "b", 0, 30.0, False, config, None, "")
    assert lab._pace(task) == Pace(0, 1, 1)
    assert begun == list(range(18))
    # Half of the steps, not of the time, are of the larger clips.
    larger = replace(config.data, frames=25)
    pace = lab._pace(replace(task, later=larger))
    assert pace == Pace(10, 1, 2) and pace.steps(30) == 20
    config.training.steps = 7
    assert lab._pace(replace(task, later=larger, seconds=0)) == Pace(3, 1, 2)
    begun.clear()
    config.seraena.enable = True
    assert lab._pace(task) == Pace(500, 1, 2)
    assert begun == [*range(18), *range(500, 518)]


def test_points_of_a_curve_are_close_at_the_start() -> None:
    assert points(400, 4) == [0, 25, 100, 225, 400]
    assert points(2, 3) == [0, 0, 1, 2]


def steps_of(losses: list[float]) -> list[dict[str, float]]:
    return [{"loss": loss, "is_good": 1.0} for loss in losses]


def test_what_diverged() -> None:
    steps = steps_of([2 - i / 100 for i in range(100)])
    steps[50] = {"loss": math.inf, "is_good": 0.0}
    told = told_losses(steps)
    assert told["skipped"] == 1 and not diverged(told)
    assert told["first_loss"] == pytest.approx(2, abs=0.05)
    assert "guidance" not in told
    assert diverged(told_losses(steps[::-1]))
    steps[0] = steps[-1] = {"loss": math.nan, "is_good": 0.0}
    assert not diverged(told_losses(steps))
    steps[-1] = {"loss": math.nan, "is_good": 1.0}
    assert diverged(told_losses(steps))
    assert diverged(told_losses([step | {"is_good": 0.0} for step in steps]))


def test_what_is_told_of_guidance() -> None:
    steps = steps_of([2 - i / 400 for i in range(400)])
    for step in steps[100:]:
        step |= {"loss": step["loss"] + 0.2, "adversarial": 4.0, "seraena/weight": 0.05}
        step |= {f"seraena/accuracy_{kind}": 0.9 for kind in ("real", "fresh")}
        step["seraena/gradient_ratio"] = 0.5
    steps[-1]["seraena/accuracy_real"] = math.nan
    told = told_losses(steps)
    assert told["last_loss"] == pytest.approx(1, abs=0.1)
    expected = {"accuracy_real": 0.9, "accuracy_fresh": 0.9, "gradient_ratio": 0.5}
    assert told["guidance"] == pytest.approx(expected) and not told["collapsed"]
    for step in steps[100:]:
        step |= {f"seraena/accuracy_{kind}": 1.0 for kind in ("real", "fresh")}
    assert told_losses(steps)["collapsed"]


def test_steps_have_their_values_by_name() -> None:
    found = [
        StepResult(["loss"], torch.tensor([1.0, 2.0, 1.0, 5.0, 6.0])),
        StepResult(["loss", "mse"], torch.tensor([3.0, 4.0, 2.0, 0.0, 7.0])),
    ]
    assert told_steps(found) == [
        {"loss": 1, "norm": 2, "is_good": 1},
        {"loss": 3, "mse": 4, "norm": 2, "is_good": 0},
    ]


def test_a_line_that_was_cut_off_costs_itself(tmp_path: Path) -> None:
    results = Results(tmp_path / "new")
    assert results.read() == {}
    results.add({"key": "a", "n": 1})
    text = results.path.read_text()
    results.path.write_bytes(text.encode() + b'[1]\n\xff\n{"key": "b", "n"')
    results.add({"key": "c"})
    assert results.read() == {"a": {"key": "a", "n": 1}, "c": {"key": "c"}}


class Corners:
    """A teacher whose latents are one pixel of each of its squares and groups."""

    def encode(self, frames_NTCHW: Tensor, seeds: list[int]) -> Tensor:
        return frames_NTCHW[:, ::4, :1, ::8, ::8].expand(-1, -1, 16, -1, -1)


def test_coded_clips_are_cut_from_windows_as_from_a_cache(videos: Path) -> None:
    data = Data(root=str(videos), frames=5, height=16, width=8, workers=0)
    files, _ = build_file_lists(data)
    size, device = PoolSize(5, 13, 24, 32), torch.device("cpu")
    pool = Pool.decoded(data, files, size, device, Corners())
    assert pool.frames_WTHWC.shape == (5, 13, 24, 32, 3)
    batch = pool.batch(VARIANTS["taehv"], data, 3, range(40))
    clips = {tuple(clip.flatten().tolist()) for clip in batch.frames_NTHWC}
    assert len(clips) > 20 and clips <= every_place(pool, (5, 16, 8), (4, 8, 8))
    expected = batch.frames_NTHWC[:, ::4, ::8, ::8, 0].float() / 255
    found = batch.latents_NTCHW[:, :, 0].float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert set(batch.lead_N.tolist()) == {0, 1}


def every_place(
    pool: Pool, sizes: tuple[int, ...], steps: tuple[int, ...]
) -> set[tuple[int, ...]]:
    """The pixels of all clips that can be cut from the windows."""
    windows = pool.frames_WTHWC
    for dimension, (size, step) in enumerate(zip(sizes, steps, strict=True), start=1):
        windows = windows.unfold(dimension, size, step)
    # W, places, channels, sizes
    places = windows.movedim(4, -1).flatten(0, 3)
    return {tuple(place.flatten().tolist()) for place in places}


def test_free_clips_lie_anywhere_and_have_colors_of_their_own(videos: Path) -> None:
    data = Data(root=str(videos), frames=5, height=22, width=29, workers=0)
    files, _ = build_file_lists(data)
    size, device = PoolSize(5, 6, 24, 32), torch.device("cpu")
    pool = Pool.decoded(data, files, size, device, None)
    variant, still = VARIANTS["taehv"], replace(data, flip=0.0)
    batch = pool.batch(variant, still, 3, range(80))
    clips = {tuple(clip.flatten().tolist()) for clip in batch.frames_NTHWC}
    assert len(clips) > 40 and clips <= every_place(pool, (5, 22, 29), (1, 1, 1))
    assert batch.latents_NTCHW is None and not batch.lead_N.any()
    again = pool.batch(variant, still, 3, range(7, 9)).frames_NTHWC
    assert torch.equal(again, batch.frames_NTHWC[7:9])
    other = pool.batch(variant, still, 4, range(80)).frames_NTHWC
    assert not torch.equal(other, batch.frames_NTHWC)
    # Neither is done to the windows.
    other = Pool.decoded(replace(still, color_jitter=0.5), files, size, device, None)
    assert torch.equal(other.frames_WTHWC, pool.frames_WTHWC)
    flipped = pool.batch(variant, replace(data, flip=1.0), 3, range(80)).frames_NTHWC
    assert torch.equal(flipped, batch.frames_NTHWC.flip(3))
    assert torch.equal(batch.color_N34, torch.eye(3, 4).expand(80, 3, 4))
    recolored = pool.batch(variant, replace(still, color_jitter=0.2), 3, range(80))
    assert torch.equal(recolored.frames_NTHWC, batch.frames_NTHWC)
    assert len(recolored.color_N34.unique(dim=0)) == 80


def bench(videos: Path, study: Path, output: Path, **more: object) -> str:
    """What the command prints, on the CPU; it is quick where time is measured."""
    options = {"root": str(videos), "study": study, "output": output, "set": None}
    options |= {"stages": None, "also": None, "seconds_limit": None, **more}
    printed: list[str] = []
    with started(Parallelism(), "cpu") as world:
        report = Report({}, None, speaks=False)
        report.say = printed.append
        bench_recipe.bench_recipe(Bench(argparse.Namespace(**options), world, report))
    return "\n".join(printed)


def test_a_study_is_trained_and_told(
    videos: Path, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_recipe, "WARMUP_STEPS", 1)
    monkeypatch.setattr(bench_recipe, "TIMED_SECONDS", 0.1)
    output = tmp_path / "output"
    told = bench(videos, study, output, seconds_limit=1)
    assert "\n6 trainings are left: the same command goes on\nnone began:" in told
    told = bench(videos, study, output, also=str(videos))
    records = list(Results(output).read().values())
    plain, bad, default, guided, _, timed = records
    arms = ["plain", "default, bad", "default", "guided", "grown", "default"]
    assert [record["arm"] for record in records] == arms
    assert bad["skipped"] == 3 and plain["skipped"] == default["skipped"] == 0
    assert bad["curve"][0] == bad["curve"][-1] | {"seconds": 0.0}
    assert default["curve"][-1]["raw"] == pytest.approx(default["raw"]["psnr"], abs=0.1)
    # With guidance alone, which is 1 off, it would be 1.
    assert guided["last_loss"] == pytest.approx(default["last_loss"], rel=0.5)
    assert guided["guidance"].keys() == GUIDANCE.keys() and not guided["collapsed"]
    assert timed["steps"] == max(2, round(300 / timed["step_ms"]))
    assert default["also"]["before"] != default["also"]["after"] > 5
    # Another call trains nothing, and tells the same.
    assert bench(videos, study, output, also=str(videos)) == told
    for text in (
        "| default, bad |",
        "1 of 1 |",
        "`optim.betas = [0.9, 0.99]`",
        "first: 3",
        "- grown: `data.frames = 1`, `data.height = 8`, then clips of default",
    ):
        assert text in told
    names = {path.name for path in output.iterdir()}
    assert names >= {"curves-first.png", "crops-second.png", "recipe.md"}
    assert (output / "weights/second-default-1.safetensors").exists()
    # Alone, and not after others, it is the same.
    alone = study.with_name("alone.toml")
    several = 'arms = ["plain", "default, bad", "default", "guided", "grown"]'
    alone.write_text(STUDY.replace(several, 'arms = ["default"]'))
    bench(videos, alone, tmp_path / "alone", stages=["first"])
    (record,) = Results(tmp_path / "alone").read().values()
    assert [p["ema"] for p in record["curve"]] == [p["ema"] for p in default["curve"]]
    assert record["last_loss"] == default["last_loss"]


def test_what_was_not_judged_by_these_other_videos_is_left(
    study: Path, tmp_path: Path
) -> None:
    results = Results(tmp_path / "output")
    read = Study.read(study, {"data.root": "a"})
    for task, of in zip(read.tasks, ("", "b"), strict=False):
        results.add({"key": task.key, "also": {"of": of}})
    others = [read.tasks[0], *read.tasks[2:]]
    for also, left in (("", read.tasks[2:]), ("b", others), ("c", read.tasks)):
        job = Job(study, None, {}, results.folder, also, math.inf)
        assert _left(job, read, results) == left


def test_clips_may_grow(
    videos: Path, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_recipe, "WARMUP_STEPS", 1)
    monkeypatch.setattr(bench_recipe, "TIMED_SECONDS", 0.1)
    heights: list[int] = []
    cut = Pool.batch

    def batch(pool: Pool, variant: Variant, data: Data, *more: Any) -> Batch:
        found = cut(pool, variant, data, *more)
        heights.append(found.frames_NTHWC.shape[2])
        return found

    monkeypatch.setattr(Pool, "batch", batch)
    stage = '[[stages]]\nname = "first"\nsteps = 5\narms = ["grown"]\n'
    study.write_text(STUDY[: STUDY.index("[[stages]]")] + stage)
    bench(videos, study, tmp_path / "output")
    (record,) = Results(tmp_path / "output").read().values()
    assert heights[-5:] == [8, 8, 16, 16, 16] and record["steps"] == 5


@pytest.mark.soak
def test_several_processes_share_a_study(
    videos: Path, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on several GPUs, each of which has a process."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    told = bench(videos, study, tmp_path / "output")
    assert len(Results(tmp_path / "output").read()) == 6
    assert "are left" not in told
