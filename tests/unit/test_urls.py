"""Videos and lists that fsspec reaches: searching, decoding, index, copies, faults."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from numbered_video import make_video, numbers_of

from taehv.data import ClipDataset
from taehv.errors import UserError
from taehv.files import FileList, Source
from taehv.index import build_file_lists, open_index, update_index
from taehv.loader import ClipLoader
from taehv.proxy import proxy_command
from taehv.sampler import Steps
from taehv.sections import Config, Data, Proxy
from taehv.urls import UrlError, UrlReader
from taehv.video import Crop, VideoError, decode_window, probe, read_frames


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    (root / "more").mkdir()
    make_video(root / "a.mp4", options={"bf": "2", "g": "10"})
    make_video(root / "more" / "b.mkv", options={"g": "10"})
    (root / "more" / "bad.mp4").write_text("no video")
    (root / "notes.md").write_text("not listed")
    return root


@pytest.fixture
def bucket(videos: Path) -> Iterator[str]:
    """The same in memory."""
    memory = fsspec.filesystem("memory")
    memory.put(str(videos), "/bucket", recursive=True)
    yield "memory://bucket"
    memory.rm("/bucket", recursive=True)


def listed(files: FileList) -> list[str]:
    return [files.relative(i) for i in range(len(files))]


def settings(root: str, **changes: object) -> Data:
    small = {"frames": 5, "height": 48, "width": 64, "workers": 0}
    return Data(root=root, **(small | changes))


def test_folders_globs_and_lists(bucket: str):
    for root in (bucket, bucket + "/"):
        files = Source.of(root, "").files(images=False)
        assert files.base == bucket
        assert listed(files) == ["a.mp4", "more/b.mkv", "more/bad.mp4"]
        assert files[1] == bucket + "/more/b.mkv"
    files = Source.of(bucket + "/*/*.mkv", "").files(images=False)
    assert (files.base, listed(files)) == (bucket, ["more/b.mkv"])
    assert len(Source.of(bucket + "/mor?", "").files(images=False)) == 2
    text = f"more/b.mkv\n/local/c.mp4\nmemory://other/d.mp4\n{bucket}/a.mp4\n"
    fsspec.filesystem("memory").pipe("/bucket/list.txt", text.encode())
    files = Source.of("", bucket + "/list.txt").files(images=False)
    assert [files[i] for i in range(4)] == [
        *("/local/c.mp4", bucket + "/a.mp4"),
        *("memory://other/d.mp4", bucket + "/more/b.mkv"),
    ]


def test_a_local_list_may_name_urls(tmp_path: Path, bucket: str):
    (tmp_path / "list.txt").write_text(f"here.mp4\n{bucket}/a.mp4\n")
    files = Source.of("", str(tmp_path / "list.txt")).files(images=False)
    assert [files[0], files[1]] == [str(tmp_path / "here.mp4"), bucket + "/a.mp4"]


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("memory://nothing", "cannot list memory://nothing .*no such folder"),
        ("memory://bucket/*/*.webm", "holds no videos"),
        ("nonsense://bucket", "cannot reach nonsense://bucket: .*nonsense"),
    ],
)
def test_mistakes_are_told_in_one_line(bucket: str, root: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        Source.of(root, "").files(images=False)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        Source.of("", "memory://bucket/none.txt").files(images=False)


def test_windows_are_the_same_as_of_the_file(videos: Path, bucket: str):
    for name in ("a.mp4", "more/b.mkv"):
        assert probe(f"{bucket}/{name}") == probe(str(videos / name))
        for position in (0.0, 0.4, 1.0):
            ways = [f"{bucket}/{name}", str(videos / name)]
            crops = [Crop(48, 64), Crop(32, 32, 0.6, 0.2, 0.9)]
            one, two = (decode_window(way, position, 5, 2, crops) for way in ways)
            assert all(map(np.array_equal, one, two))
    with pytest.raises(VideoError, match="memory://bucket/gone.mp4: .*gone"):
        decode_window(bucket + "/gone.mp4", 0.5, 5, 1, [Crop(48, 64)])


class Fragile(MemoryFile):
    """Its package's own kind of error, half-way."""

    def read(self, size: int = -1) -> bytes:
        if self.tell() > 50_000:
            raise LookupError("connection lost")
        return super().read(size)


def test_a_failing_connection_costs_the_sample(tmp_path: Path, bucket: str):
    large = {"size": (96, 128), "options": {"qp": "4", "g": "10"}}
    whole = make_video(tmp_path / "a.mkv", **large).read_bytes()
    fsspec.filesystem("memory").store["/bucket/a.mp4"] = Fragile(
        MemoryFileSystem(), "/bucket/a.mp4", whole
    )
    for position in (0.5, 1.0):
        with pytest.raises(VideoError, match="a.mp4: LookupError: connection lost"):
            decode_window(bucket + "/a.mp4", position, 5, 1, [Crop(48, 64)])
    with pytest.raises(VideoError, match="a.mp4: LookupError: connection lost"):
        list(read_frames(bucket + "/a.mp4"))
    data = settings(bucket, stride=[3, 3])
    clips = ClipDataset(data, FileList.from_config(data), 0).__getitems__([*range(9)])
    sources = [clip.source for clip in clips]
    assert bucket + "/more/b.mkv" in sources
    failed = {failure.path for clip in clips for failure in clip.failures}
    assert bucket + "/a.mp4" in failed


@pytest.mark.parametrize(
    ("call", "arguments"), [("seek", [0]), ("tell", []), ("close", [])]
)
def test_every_call_to_a_failing_connection_costs_the_sample(
    bucket: str, monkeypatch: pytest.MonkeyPatch, call: str, arguments: list[int]
):
    def fail(*_: object) -> None:
        raise LookupError("connection lost")

    def opened(*_: object) -> MemoryFile:
        file = MemoryFile(MemoryFileSystem(), "/bucket/a.mp4", content)
        setattr(file, call, fail)
        return file

    content = fsspec.filesystem("memory").cat_file("/bucket/a.mp4")
    monkeypatch.setattr(MemoryFileSystem, "open", opened)
    reader = UrlReader(bucket + "/a.mp4")
    with pytest.raises(UrlError, match="LookupError: connection lost"):
        getattr(reader, call)(*arguments)
    if call == "tell":  # PyAV has no need of it here
        return
    with pytest.raises(VideoError, match="a.mp4: LookupError: connection lost"):
        decode_window(bucket + "/a.mp4", 0.5, 5, 1, [Crop(48, 64)])


def test_worker_processes_read_urls(videos: Path):
    data = settings(f"file://{videos}", workers=1)
    batches = []
    for root in (f"file://{videos}", str(videos)):
        files = FileList.from_config(settings(root))
        loader = ClipLoader(ClipDataset(data, files, seed=5), Steps(0, 4, 4))
        batches.append(list(itertools.islice(loader, 2)))
        loader.close()
    for one, two in zip(*batches, strict=True):
        assert one.sources == [f"file://{path}" for path in two.sources]
        assert np.array_equal(one.frames_NTHWC, two.frames_NTHWC)


def test_an_index_knows_urls(tmp_path: Path, bucket: str):
    data = settings(bucket, index=str(tmp_path), holdout=["a*"])
    train, held = build_file_lists(data)
    assert (listed(train), listed(held)) == (["more/b.mkv"], ["a.mp4"])
    index = open_index(data, Source.of(bucket, ""))
    assert [index.files[i] for i in index.bad] == [bucket + "/more/bad.mp4"]
    memory = fsspec.filesystem("memory")
    memory.cp("/bucket/a.mp4", "/bucket/more/bad.mp4")
    assert len(update_index(data, Source.of(bucket, "")).bad) == 0
    memory.pipe("/bucket/gone.txt", b"gone.mp4\nlost.mp4\n")
    index = update_index(data, Source.of("", bucket + "/gone.txt"))
    assert len(index.bad) == 2 and index.reasons == ["FileNotFoundError: /..."]


def test_copies_are_made_of_urls(tmp_path: Path, bucket: str):
    proxy = Proxy(folder=str(tmp_path / "copies"), height=32)
    proxy_command(Config(data=settings(bucket), proxy=proxy))
    found = sorted(path.name for path in (tmp_path / "copies").rglob("*.m*"))
    assert found == ["a.mp4", "b.mkv"]
    frames = list(read_frames(str(tmp_path / "copies" / "a.mp4")))
    assert numbers_of(np.stack(frames)) == list(range(40))
    with pytest.raises(UserError, match="name a folder of this machine"):
        proxy = Proxy(folder="memory://copies")
        proxy_command(Config(data=settings(bucket), proxy=proxy))


@pytest.mark.parametrize("is_listed", [True, False])
def test_no_copy_leaves_its_folder(tmp_path: Path, bucket: str, is_listed: bool):
    memory, data = fsspec.filesystem("memory"), settings(bucket)
    if is_listed:
        memory.pipe("/bucket/list.txt", b"../bucket/a.mp4\n")
        data = settings(bucket, annotations=bucket + "/list.txt")
    else:
        memory.store["/bucket/../a.mp4"] = memory.store["/bucket/a.mp4"]
    proxy = Proxy(folder=str(tmp_path / "deep" / "copies"), height=32)
    with pytest.raises(UserError, match="a.mp4 does not lie under memory://bucket"):
        proxy_command(Config(data=data, proxy=proxy))
    assert not list(tmp_path.iterdir())
