"""Pages of one file: everything in it, nothing from elsewhere, texts escaped."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from taehv import page

OPEN_ENDED = {"meta", "link", "img", "br"}


class Outline(HTMLParser):
    """Tags with their attributes, the texts, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in OPEN_ENDED:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def decoded(source: str | None) -> bytes:
    return base64.b64decode((source or "").partition("base64,")[2], validate=True)


def test_a_page_holds_all_that_it_shows(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    nasty = '<script>alert("x")</script> & more'
    body = [
        page.heading(nasty),
        page.paragraph(nasty),
        page.table(["clip", "dB"], [[nasty, 31.5], ["b", 30]], caption=nasty),
        page.grid(
            [page.picture(pixels, nasty, is_photo=False), page.video(b"mp4", nasty)]
        ),
        page.chart(
            [page.Series(nasty, [1, 2], [3, 4]), page.Series("b", [1], [2])],
            *(nasty, nasty, nasty),
        ),
    ]
    page.write_page(tmp_path / "page.html", nasty, body)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    outline = Outline(text)
    assert "script" not in {tag for tag, _ in outline.tags}
    assert outline.texts.count(nasty) >= 8
    sources = [a[k] for _, a in outline.tags for k in ("src", "href") if k in a]
    assert all(source.startswith("data:") for source in sources)
    assert "url(" not in text and "@import" not in text
    shown = Image.open(io.BytesIO(decoded(outline.find("img")[0]["src"])))
    assert np.array_equal(np.asarray(shown), pixels)
    assert decoded(outline.find("video")[0]["src"]) == b"mp4"


def places(svg: str) -> list[tuple[float, float]]:
    found = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
    return [(float(x), float(y)) for x, y in found]


def test_a_chart_puts_values_where_its_axes_say() -> None:
    drawn = page.chart([page.Series("a", [0, 10, 20], [1, 3, 2])], "c", "x", "y")
    (x0, y0), (x1, y1), (x2, y2) = places(drawn)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and x1 > x0
    assert y0 > y2 > y1 and y0 - y2 == pytest.approx(y2 - y1, abs=0.11)
    ticks = dict(
        (label, float(y) - 4)
        for y, label in re.findall(r'y="([\d.]+)" text-anchor="end">([^<]+)', drawn)
    )
    assert ticks["3"] == pytest.approx(y1, abs=0.11)
    assert ticks["1"] == pytest.approx(y0, abs=0.11)


def test_what_is_counted_has_whole_ticks() -> None:
    drawn = page.chart([page.Series("a", [1, 2, 3], [1, 2, 3])], "c", "clip", "y")
    shown = re.findall(r'text-anchor="middle">([\d.]+)<', drawn)
    assert shown == ["1", "2", "3"]


def test_a_logarithmic_chart_and_values_that_cannot_be_shown() -> None:
    ys = [0.001, 0.1, 10, 0.0, -1, math.nan, math.inf]
    drawn = page.chart(
        [page.Series("a", range(7), ys)], "c", "x", "y", lines=False, log_y=True
    )
    (_, y0), (_, y1), (_, y2) = places(drawn)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)


@pytest.mark.parametrize(
    "ys", [[], [5.0], [5.0, 5.0], [0.0], [math.nan], [1e9, -1e-9], [1e-5, 1e12]]
)
def test_charts_of_hardly_anything(ys: list[float]) -> None:
    for log_y in (False, True):
        series = [page.Series("a", range(len(ys)), ys)]
        drawn = page.chart(series, "c", "x", "y", log_y=log_y)
        assert "nan" not in drawn and "inf" not in drawn
        for x, y in places(drawn):
            assert 0 <= x <= page.WIDTH and 0 <= y <= page.HEIGHT


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(OSError):
        page.write_page(tmp_path / "page.html", "t", [])
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
