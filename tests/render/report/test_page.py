"""The page: one file without network, safe against any name, and drawn by a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from graphopt.analysis.gradient_order import roofline
from graphopt.capture import capture
from graphopt.passbase import PassContext
from graphopt.pipeline import Pipeline
from graphopt.render.report.document import Document
from graphopt.render.report.gather import Sources, document
from graphopt.render.report.page import page

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = "</script><script>document.title='taken'</script>&<b>"


@pytest.fixture(scope="module")
def found() -> Document:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 3)))
    graph = capture(model, (torch.randn(4, 8),)).graph
    rewritten = graph.copy()
    steps = Pipeline.parse("cleanup,kfac").run(rewritten, PassContext())
    seconds = roofline(rewritten)
    return document(Sources("net", "cleanup,kfac", graph, rewritten, steps, seconds, ()))


class _Scripts(HTMLParser):
    """What stands in script elements, and every address that an element names."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "script"
        if self._inside:
            self.kinds.append(dict(attrs).get("type") or "")
            self.texts.append("")
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1] += data


def parsed(text: str) -> _Scripts:
    parser = _Scripts()
    parser.feed(text)
    return parser


def test_the_page_is_one_file_that_asks_for_nothing(found: Document) -> None:
    text = page(found)
    assert parsed(text).addresses == []
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", text)
    addresses = set(re.findall(r"https?://[^\s\"']+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not a place


def test_its_data_is_the_document(found: Document) -> None:
    scripts = parsed(page(found))
    assert scripts.kinds == ["application/json", ""]
    data = json.loads(scripts.texts[0])
    assert data["model"] == "net"
    assert [story["name"] for story in data["stories"]] == [s.name for s in found.stories]


def test_names_cannot_end_the_data(found: Document) -> None:
    stories = tuple(replace(story, name=HOSTILE, module=HOSTILE) for story in found.stories)
    scripts = parsed(page(replace(found, model=HOSTILE, passes=HOSTILE, stories=stories)))
    assert scripts.kinds == ["application/json", ""]
    assert json.loads(scripts.texts[0])["stories"][0]["name"] == HOSTILE


def drawn(folder: Path, text: str) -> str:
    """The page as a browser has built it."""
    assert BROWSER is not None
    file = folder / "report.html"
    file.write_text(text, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [BROWSER, *flags, "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium to draw the page")
def test_a_browser_draws_all_of_it(found: Document, tmp_path: Path) -> None:
    hostile = tuple(replace(story, module=HOSTILE) for story in found.stories)
    text = drawn(tmp_path, page(replace(found, stories=hostile)))
    headings = re.findall(r"<h2>([^<]+)</h2>", text)
    assert headings == [
        *("Modules", "Passes", "Time line and memory", "Precision", "K-FAC factors", "Parameters")
    ]
    activities = sum(len(line.activities) for line in found.time_lines)
    assert len(re.findall(r'<rect class="activity', text)) == activities
    for story in found.stories:
        assert f">{story.name}</button>" in text
    assert "<title>net: graphopt report</title>" in text
    assert "<noscript>" not in text
