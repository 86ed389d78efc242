"""Compare models on videos: tables, JSON, CSV and a page with pictures and clips.

python -m taehv.evaluate outputs/NAME taew2_1.pth --videos ~/videos
python -m taehv.evaluate outputs/a outputs/b --videos list.txt --output a-and-b
python -m taehv.evaluate outputs/NAME --videos ~/videos --preview time both \\
    --teacher-kind wan --teacher-path ~/models/Wan2.1-T2V-1.3B-Diffusers
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from taehv.comparison import (
    Comparison,
    Judged,
    JudgedClip,
    Speed,
    aligned_text,
    difference_rows,
    speed_rows,
    summary_rows,
)
from taehv.comparison_page import write_comparison
from taehv.errors import Parser, UserError, run_command
from taehv.files import READERS, FileList
from taehv.logging import set_up_console
from taehv.losses import psnr
from taehv.measure import peak_gib, synchronize
from taehv.metrics import (
    DECODER,
    LatentStatistics,
    frame_errors,
    group_positions,
    measure,
)
from taehv.model import TAEHV
from taehv.perceptual import ClipMeasure, extra_values, load_measures
from taehv.pretrained import (
    add_device_arguments,
    choose_device,
    choose_dtype,
    is_folder,
    load_model,
    place,
)
from taehv.rules import is_pupil
from taehv.sections import Data
from taehv.sections import Teacher as TeacherSettings
from taehv.teacher import Teacher, check_teacher, load_teacher
from taehv.urls import local_path
from taehv.variants import FRAME_RULES, Variant
from taehv.video import Crop, VideoError, decode_window, probe
from taehv.writing import write_text

log = logging.getLogger("taehv")

USUAL_CLIPS, USUAL_FRAMES, USUAL_SIDE = 32, 33, 320
PREVIEWS: dict[str, dict[str, tuple[bool, ...]]] = {
    "time": {"decoder_time_upscale": (False,) * 3},
    "space": {"decoder_space_upscale": (False,) * 3},
    "both": {
        "decoder_time_upscale": (False,) * 3,
        "decoder_space_upscale": (False,) * 3,
    },
}
"""Cheaper decodings: one frame a latent, an eighth of height and width, or both."""
TIMED_CALLS, TIMED_SECONDS = 5, 2


# --- who is judged -----------------------------------------------------------------


@dataclass
class Student:
    """A TAEHV that is judged; a preview is shown at full size and rate."""

    name: str
    about: dict[str, str]
    model: TAEHV

    @property
    def is_taught(self) -> bool:
        """Whether its latents are meant to be a teacher's: not if trained without."""
        return self.about.get("latent_space") != "own"

    def encode(self, frames_1TCHW: Tensor, number: int) -> Tensor:
        """Frames, RGB in [0, 1], to latents."""
        dtype = next(self.model.parameters()).dtype
        return self.model.encode_video(frames_1TCHW.to(dtype)).float()

    def decode(self, latents_1TCHW: Tensor) -> Tensor:
        """Latents to frames, of a preview as few and as small as it makes them."""
        dtype = next(self.model.parameters()).dtype
        return self.model.decode_video(latents_1TCHW.to(dtype)).float()

    def shown(self, latents_1TCHW: Tensor) -> Tensor:
        """Latents to frames of full count and size."""
        return as_full(self.model, self.decode(latents_1TCHW), latents_1TCHW)


@dataclass
class Reference:
    """The teacher, which is judged beside its students."""

    name: str
    about: dict[str, str]
    teacher: Teacher

    def encode(self, frames_1TCHW: Tensor, number: int) -> Tensor:
        """Frames, RGB in [0, 1], to normalised latents; `number` seeds the draw."""
        return self.teacher.encode(frames_1TCHW, [number]).float()

    def decode(self, latents_1TCHW: Tensor) -> Tensor:
        """Normalised latents to frames."""
        return self.teacher.decode(latents_1TCHW).float().clamp(0, 1)

    shown = decode


Entrant = Student | Reference


def as_full(model: TAEHV, decoded_NTCHW: Tensor, latents_NTCHW: Tensor) -> Tensor:
    """A preview as one sees it: each frame until the next, and enlarged.

    A frame of a preview that grows fewer is the last of those that it stands for, which
    is why it is shown at the times nearest to that one's.
    """
    variant, latents = model.variant, latents_NTCHW.shape[1]
    step = variant.time_factor // model.time_upscale
    if step > 1:
        full = _raw_frames(variant, latents, variant.time_factor)
        preview = [
            (frame + 1) * step - 1
            for frame in _raw_frames(variant, latents, model.time_upscale)
        ]
        places = range(len(preview))
        nearest = [min(places, key=lambda i: abs(preview[i] - f)) for f in full]
        decoded_NTCHW = decoded_NTCHW[:, nearest]
    size = [side * variant.space_factor for side in latents_NTCHW.shape[-2:]]
    if list(decoded_NTCHW.shape[-2:]) == size:
        return decoded_NTCHW
    frames_BCHW = decoded_NTCHW.flatten(0, 1)
    enlarged_BCHW = F.interpolate(frames_BCHW, size, mode="bilinear", antialias=False)
    return enlarged_BCHW.unflatten(0, decoded_NTCHW.shape[:2])


def _raw_frames(variant: Variant, latents: int, upscale: int) -> list[int]:
    runs = variant.kept_frames(latents, upscale)
    return [frame for run in runs for frame in range(run.start, run.stop)]


def load_students(
    sources: Sequence[str],
    names: Sequence[str],
    previews: Sequence[str],
    variant: str | None,
    weights: str | None,
) -> list[Student]:
    """Every checkpoint, each followed by its previews."""
    students = []
    for source, name in zip(sources, names, strict=True):
        kind = weights if is_folder(source) else None
        for preview in ("", *previews):
            model, about = load_model(
                source, variant, kind, **PREVIEWS.get(preview, {})
            )
            size = sum(parameter.numel() for parameter in model.parameters())
            told = {
                **about,
                "source": source,
                "variant": model.variant_name,
                "parameters": f"{size / 1e6:.1f} M",
            }
            label = f"{name} ({preview} preview)" if preview else name
            students.append(Student(label, told, model))
    return students


def choose_names(sources: Sequence[str], asked: Sequence[str]) -> list[str]:
    """A short name for each: the run's or file's, or where that is shared the path."""
    if asked:
        if len(asked) != len(sources) or len(set(asked)) != len(asked):
            raise UserError("--names must be as many, all different, as checkpoints")
        return list(asked)
    names = [
        path.resolve().stem if path.is_file() else _run_name(path)
        for path in map(Path, sources)
    ]
    names = [
        name if names.count(name) == 1 else source
        for name, source in zip(names, sources, strict=True)
    ]
    if len(set(names)) != len(names):
        raise UserError("a checkpoint is named twice: leave one out")
    return names


def _run_name(folder: Path) -> str:
    folder = folder.resolve()
    is_step = re.fullmatch(r"step-\d+", folder.name)
    return f"{folder.parent.parent.name} {folder.name}" if is_step else folder.name


# --- clips -------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """What the clips must be like for every model and the teacher."""

    frames: int
    side: int
    multiple: int


def choose_rules(asked: int, side: int, variants: list[Variant], kind: str) -> Rules:
    """A count of frames that every model gives back whole, and a step of sizes."""

    def fits(frames: int) -> bool:
        allowed = kind not in FRAME_RULES or FRAME_RULES[kind].allows(frames)
        return allowed and all(variant.is_exact(frames) for variant in variants)

    usual = asked or USUAL_FRAMES
    longer = itertools.islice(itertools.count(usual), 2000)
    frames = next(filter(fits, longer), None)
    if frames is None or (asked and frames != asked):
        cure = f"take {frames}" if frames else "compare them apart"
        raise UserError(f"--frames {usual} do not come back whole from all: {cure}")
    multiple = math.lcm(*(variant.space_factor for variant in variants))
    # Reference VAEs need two latents in height and width.
    least = 2 * multiple
    if side < least:
        log.info(f"--side {side} is less than two latents: judging {least} x {least}")
    return Rules(frames, max(side, least), multiple)


def find_files(videos: Path) -> FileList:
    """The videos of a folder or list, or the one that it is."""
    if videos.is_dir():
        return FileList.from_config(Data(root=str(videos)))
    if not videos.is_file():
        raise UserError(f"--videos {videos}: no such file or folder")
    if videos.suffix.lower() in READERS:
        return FileList.from_config(Data(annotations=str(videos)))
    return FileList.from_paths(str(videos.parent), [videos.name])


def choose_windows(files: int, clips: int) -> list[tuple[int, float]]:
    """File and position of each clip: spread evenly over the files and in them."""
    clips = clips or min(files, USUAL_CLIPS)
    if clips <= files:
        return [(int((i + 0.5) * files / clips), 0.5) for i in range(clips)]
    of_file = [len(range(i, clips, files)) for i in range(files)]
    return [(i, (j + 0.5) / n) for i, n in enumerate(of_file) for j in range(n)]


def describe_clips(
    files: FileList, windows: list[tuple[int, float]], rules: Rules
) -> list[JudgedClip]:
    """The clips that can be decoded; the others are named and left out."""
    clips = []
    for file, position in windows:
        try:
            info = probe(files[file])
            scale = min(1.0, rules.side / max(info.height, info.width))
            height, width = (
                max(2, round(side * scale) // rules.multiple) * rules.multiple
                for side in (info.height, info.width)
            )
            clip = JudgedClip(
                files.relative(file), position, rules.frames, height, width
            )
            read_clip(files, clip)
        except VideoError as error:
            log.warning(f"left out a clip, {error}")
            continue
        clips.append(clip)
    if not clips:
        raise UserError("no clip could be decoded: give longer or other --videos")
    return clips


def read_clip(files: FileList, clip: JudgedClip) -> Tensor:
    """The clip's frames_TCHW on the CPU, RGB in [0, 1]."""
    path = os.path.join(files.base, clip.file)
    crop = Crop(clip.height, clip.width)
    frames_THWC = decode_window(path, clip.position, clip.frames, 1, [crop])[0]
    return torch.from_numpy(frames_THWC).movedim(-1, 1).float() / 255


# --- judging -----------------------------------------------------------------------


class Judge:
    """Gives every clip to every entrant.

    Args:
        entrants: who is judged.
        teacher: one of them, whose latents the others are compared with.
        device: where they are.
        extra: further measures, see perceptual.load_measures.
    """

    def __init__(
        self,
        entrants: list[Entrant],
        teacher: Reference | None,
        device: torch.device,
        extra: Mapping[str, ClipMeasure],
    ) -> None:
        self.entrants, self.teacher, self.device = entrants, teacher, device
        self.extra = extra
        self.judged = [Judged(one.name, one.about) for one in entrants]

    @torch.no_grad()
    def add(self, number: int, frames_TCHW: Tensor) -> None:
        """Take in a clip."""
        frames_1TCHW = frames_TCHW[None].to(self.device)
        taught_1TCHW = None
        if self.teacher is not None:
            taught_1TCHW = self.teacher.encode(frames_1TCHW, number)
        for entrant, judged in zip(self.entrants, self.judged, strict=True):
            latents_1TCHW = entrant.encode(frames_1TCHW, number)
            decoded_TCHW = entrant.shown(latents_1TCHW)[0]
            positions = None
            if isinstance(entrant, Student):
                variant = entrant.model.variant
                positions = group_positions(variant, len(frames_TCHW))
            values = self._measured(frames_1TCHW[0], decoded_TCHW, positions)
            is_pupil = isinstance(entrant, Student) and entrant.is_taught
            if taught_1TCHW is not None and is_pupil:
                values |= self._against_teacher(
                    entrant, frames_1TCHW[0], latents_1TCHW, taught_1TCHW
                )
            judged.values[number] = values
            errors_T = frame_errors(
                frames_1TCHW[0, : len(decoded_TCHW)], decoded_TCHW[: len(frames_TCHW)]
            )
            judged.frame_psnr[number] = psnr(errors_T).tolist()

    def _measured(
        self,
        frames_TCHW: Tensor,
        decoded_TCHW: Tensor,
        positions: Sequence[int] | None = None,
    ) -> dict[str, float]:
        values = measure(frames_TCHW, decoded_TCHW, positions)
        return values | extra_values(self.extra, frames_TCHW, decoded_TCHW)

    def _against_teacher(
        self,
        student: Student,
        frames_TCHW: Tensor,
        ours_1TCHW: Tensor,
        theirs_1TCHW: Tensor,
    ) -> dict[str, float]:
        statistics = LatentStatistics(ours_1TCHW.shape[2], ours_1TCHW.device)
        statistics.add(ours_1TCHW, theirs_1TCHW)
        measured = self._measured(frames_TCHW, student.shown(theirs_1TCHW)[0])
        values = {"latent_correlation": statistics.report().correlation}
        return values | {DECODER + name: value for name, value in measured.items()}

    @torch.no_grad()
    def shown(self, number: int, frames_TCHW: Tensor) -> tuple[Tensor, ...]:
        """The clip and what every entrant makes of it, on the CPU."""
        frames_1TCHW = frames_TCHW[None].to(self.device)
        shown = [
            entrant.shown(entrant.encode(frames_1TCHW, number))[0].cpu()
            for entrant in self.entrants
        ]
        frames = min(map(len, (frames_TCHW, *shown)))
        return tuple(x_TCHW[:frames] for x_TCHW in (frames_TCHW, *shown))

    @torch.no_grad()
    def time_all(self, frames_TCHW: Tensor) -> None:
        """Measure how long every entrant takes for a clip."""
        frames_1TCHW = frames_TCHW[None].to(self.device)
        frames, _, height, width = frames_TCHW.shape
        for entrant, judged in zip(self.entrants, self.judged, strict=True):
            reset_peak(self.device)
            latents_1TCHW = entrant.encode(frames_1TCHW, 0)
            encode = self._ms(lambda x, one=entrant: one.encode(x, 0), frames_1TCHW)
            decode = self._ms(entrant.decode, latents_1TCHW)
            peak = read_peak_gib(self.device)
            judged.speed = Speed(encode / frames, decode / frames, peak, height, width)

    def _ms(self, work: Callable[[Tensor], Tensor], given: Tensor) -> float:
        """Median time of a call, after one that does not count."""
        times: list[float] = []
        work(given)
        while not times or (len(times) < TIMED_CALLS and sum(times) < TIMED_SECONDS):
            synchronize(self.device)
            begin = time.perf_counter()
            work(given)
            synchronize(self.device)
            times.append(time.perf_counter() - begin)
        return 1000 * statistics.median(times)


def reset_peak(device: torch.device) -> None:
    """Begin to watch memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        # proc_pid_clear_refs(5): the process's peak becomes what it has now.
        Path("/proc/self/clear_refs").write_text("5")


def read_peak_gib(device: torch.device) -> float | None:
    """The most memory in use since then, of the GPU or else of this process."""
    if device.type == "cuda":
        return peak_gib(device)
    status = Path("/proc/self/status")
    found = status.exists() and re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
    return int(found[1]) / 2**20 if found else None


# --- command line ------------------------------------------------------------------


def evaluate(arguments: argparse.Namespace) -> Comparison:
    """Do what the command line says; see `main`."""
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.precision, device)
    extra = load_measures(arguments.lpips, arguments.st_lpips, arguments.vmaf, device)
    files = find_files(arguments.videos)
    names = choose_names(arguments.checkpoints, arguments.names)
    students = load_students(
        *(arguments.checkpoints, names, arguments.preview),
        *(arguments.variant, arguments.weights),
    )
    check_pupils(arguments.teacher_kind, students)
    rules = choose_rules(
        *(arguments.frames, arguments.side),
        *([student.model.variant for student in students], arguments.teacher_kind),
    )
    windows = choose_windows(len(files), arguments.clips)
    clips = describe_clips(files, windows, rules)
    for student in students:
        place(student.model, device, dtype)
    teacher = find_teacher(arguments, students, clips, device)
    output = make_folder(arguments.output)
    entrants = [*students, *([teacher] if teacher else [])]
    judge = Judge(entrants, teacher, device, extra)
    for number, clip in enumerate(tqdm(clips, unit="clip", disable=None, leave=False)):
        judge.add(number, read_clip(files, clip))
    judge.time_all(read_clip(files, clips[0]))
    about = {
        "frames a clip": rules.frames,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "precision": str(dtype).removeprefix("torch."),
        "PyTorch": torch.__version__,
    }
    comparison = Comparison(about, clips, judge.judged)
    write_results(
        *(output, comparison),
        *(lambda number: judge.shown(number, read_clip(files, clips[number])),),
        arguments.examples,
    )
    return comparison


def check_pupils(kind: str, students: list[Student]) -> None:
    """Refuse models of another latent space than the teacher's; name those of none."""
    for student in students:
        name = student.model.variant_name
        if student.is_taught and not is_pupil(name, kind):
            own = student.model.variant.teacher or "package.module:Class of your own"
            raise UserError(
                f"{student.name} is a {name}, whose latents are not those of "
                f"--teacher-kind {kind}: its own is {own}"
            )
    untaught = [student.name for student in students if not student.is_taught]
    if kind and untaught:
        log.info(
            "trained without a teacher, so that latents are their own and not compared "
            f"with the teacher's: {', '.join(untaught)}"
        )


def find_teacher(
    arguments: argparse.Namespace,
    students: list[Student],
    clips: list[JudgedClip],
    device: torch.device,
) -> Reference | None:
    """The teacher, if one is named, checked against models and clips."""
    settings = TeacherSettings(arguments.teacher_kind, arguments.teacher_path)
    teacher = load_teacher(settings, device)
    if teacher is None:
        return None
    for student, clip in itertools.product(students, clips):
        channels = teacher.latent_channels
        if student.is_taught:
            channels = student.model.variant.latent_channels
        check_teacher(teacher, channels, clip.frames, clip.height, clip.width)
    about = {"source": arguments.teacher_path, "variant": arguments.teacher_kind}
    return Reference("teacher", about, teacher)


def make_folder(path: Path) -> Path:
    """The folder of the results, which must be one that can be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe_file = path / f".{os.getpid()}.part"
        probe_file.touch()
        probe_file.unlink()
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}; name another") from None
    return path


def write_results(
    folder: Path,
    comparison: Comparison,
    shown: Callable[[int], tuple[Tensor, ...]],
    examples: int,
) -> None:
    """Write report.html, results.json and clips.csv."""
    try:
        content: dict[str, Any] = comparison.as_json()
        write_text(folder / "results.json", json.dumps(content, indent=1))
        write_text(folder / "clips.csv", comparison.as_csv())
        write_comparison(folder / "report.html", comparison, shown, examples)
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}; name another") from None


def print_tables(comparison: Comparison) -> None:
    """Means, speed and differences, aligned; the heads bold on a terminal."""
    is_terminal = sys.stdout.isatty()
    tables = [summary_rows(comparison), speed_rows(comparison)]
    if len(comparison.models) > 1:
        tables.append(difference_rows(comparison, of_first=True))
    print("\n\n".join(aligned_text(rows, is_terminal) for rows in tables))


def main() -> None:
    """Read the command line, compare, and say where the report is."""
    arguments = _parser().parse_args()
    for name, least in (("clips", 0), ("frames", 0), ("side", 1), ("examples", 0)):
        value = getattr(arguments, name)
        if value < least:
            raise UserError(f"--{name} {value} must be at least {least}")
    if arguments.teacher_path and not arguments.teacher_kind:
        raise UserError("--teacher-path needs --teacher-kind: name the kind")
    if arguments.teacher_kind in FRAME_RULES and not arguments.teacher_path:
        raise UserError(
            f"--teacher-kind {arguments.teacher_kind} needs --teacher-path: a folder "
            "or hub id"
        )
    set_up_console(0)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        comparison = evaluate(arguments)
    except KeyboardInterrupt:
        log.error("stopped; nothing is written")
        sys.exit(130)
    print_tables(comparison)
    print(f"\n{len(comparison.clips)} clips; {arguments.output / 'report.html'}")


def _parser() -> Parser:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "checkpoints",
        nargs="+",
        help="runs, checkpoints, URLs of them, .pth or .safetensors",
    )
    add("--videos", type=local_path, required=True, help="folder, list, or one")
    add(
        "--output",
        type=local_path,
        default=Path("evaluation"),
        help="folder of the results",
    )
    add("--names", nargs="+", default=[], help="of the checkpoints, in the tables")
    add(
        "--preview",
        nargs="+",
        choices=PREVIEWS,
        default=[],
        help="judge these cheaper decodings of each, too: one frame a latent, an "
        "eighth of the size, or both",
    )
    add("--teacher-kind", default="", help="reference VAE to compare with, as in TOML")
    add("--teacher-path", default="", help="its folder or hub id")
    add("--clips", type=int, default=0, help="0: one of each file, 32 at most")
    add("--frames", type=int, default=0, help="of a clip; 0: 33, or what fits")
    add("--side", type=int, default=USUAL_SIDE, help="longer side of clips, in pixels")
    add("--examples", type=int, default=2, help="worst and best clips to show")
    add(
        "--lpips",
        default="",
        help="weights of torchvision's AlexNet or VGG16 (.pth): measure LPIPS",
    )
    add(
        "--st_lpips",
        "--st-lpips",
        action="store_true",
        help="measure ST-LPIPS, by the package stlpips-pytorch",
    )
    add("--vmaf", default="", help="an ffmpeg that has libvmaf: measure VMAF")
    add_device_arguments(parser)
    return parser


if __name__ == "__main__":
    run_command(main)
