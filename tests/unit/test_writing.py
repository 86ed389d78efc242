"""Files are whole or as before, and growing ones are late but never torn."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import file_size_limit

from taehv.writing import GrowingFile, whole, write_files, write_text


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "text"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new" + "\udc80")
    with path.open() as reader:
        write_text(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"
    write_text(path, "newer")
    assert [p.name for p in tmp_path.iterdir()] == ["text"]


def test_of_several_files_all_are_written_or_none(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    write_files({small: b"old", large: b"old"})
    with file_size_limit(1000), pytest.raises(OSError, match="File too large"):
        write_files({small: b"new", large: bytes(2000)})
    assert [p.read_bytes() for p in (small, large)] == [b"old", b"old"]
    assert sorted(tmp_path.iterdir()) == [large, small]
    write_files({small: b"new", large: bytes(2000)})
    assert small.read_bytes() == b"new" and large.stat().st_size == 2000


def test_a_folder_replaces_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for names in (["a", "b"], ["c"]):
        with whole(target) as unfinished:
            unfinished.mkdir()
            for name in names:
                (unfinished / name).touch()
    with pytest.raises(KeyError), whole(target) as unfinished:
        unfinished.mkdir()
        raise KeyError
    assert sorted(tmp_path.rglob("*")) == [target, target / "c"]


def test_what_a_full_disk_refuses_is_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lines"
    lines = [b"%03d" % i * 100 + b"\n" for i in range(30)]
    file = GrowingFile(path)
    for i, line in enumerate(lines[:20]):
        with file_size_limit(1000 if i >= 5 else 10_000):
            file.write(line)
    assert path.stat().st_size == 1505  # what was there already stays
    for line in lines[20:]:
        file.write(line)
        assert path.read_bytes().endswith(line)
    file.close()
    assert path.read_bytes() == b"".join(lines)
    told = [record.message for record in caplog.records]
    assert len(told) == 2, told
    assert "lines cannot be written (File too large)" in told[0]
    assert "lines can be written again" in told[1]


def test_memory_is_bounded_and_what_is_lost_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("taehv.writing.MOST_WAITING", 250)
    file = GrowingFile(tmp_path / "file")
    with file_size_limit(50):
        for _ in range(5):
            file.write(bytes(100))
        file.close()
    assert (tmp_path / "file").stat().st_size == 50
    # Two blocks and the rest of the first waited, two never did.
    assert "file: 450 bytes could not be written" in caplog.text
