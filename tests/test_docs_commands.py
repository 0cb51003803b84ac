"""Every command and every block of Python in the documents: run here, or listed with a reason.

`test_docs.py` runs the blocks that are marked ``# runs`` and compares what they print. Here all
other ``graphopt`` commands run; what else a reader may copy is listed below with the reason why no
test runs it. Blocks of Python that are not marked stand in a job, a server or a class: they have to
parse, their imports have to work, and what they call by ``graphopt.`` has to take these arguments.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from graphopt.cli.main import app
from tests.test_docs import DOCUMENTS, ROOT

PAGES = [*DOCUMENTS, *sorted((ROOT / "examples").rglob("*.md"))]
_BLOCK = re.compile(r"^```(?P<kind>[^\n]*)\n(?P<text>.*?)^```\n", re.MULTILINE | re.DOTALL)

NOT_RUN = {
    r"pip install": "changes the environment; `test_newcomer.py` installs the wheel",
    r"make \w+": "the whole suite, style and benchmarks",
    r"\.venv/bin/python -m pytest": "the suite itself",
    r"torchrun ": "several processes; `tests/examples`, `tests/ranks` and `tests/partition` do it",
    r"python -m graphopt\.examples\.": "trains for minutes; `tests/examples` runs short versions",
    r"python -m examples\.flexpoint\.train": "trains for minutes",
    r"python -m benchmarks\.": "measures for minutes or hours",
    r"python examples/": "trains for minutes",
    r"curl ": "asks a server; `tests/serving` has one",
    r"graphopt simulate \S*resnet50": "27,600 ranks; `test_chart_is_up_to_date` runs it",
    r"graphopt simulate \S*published": "a model of 40 million parameters",
    r"graphopt doctor train\.py:make": "the reader's file; `tests/model/test_parts.py` has one",
}
"""Commands that no test of this file runs, by how they begin, and why."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        kind: its info string.
        text: what is in it.
        place: where it begins.
    """

    kind: str
    text: str
    place: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(m["kind"], m["text"], f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, m.start())}")
        for m in _BLOCK.finditer(text)
    ]


def commands(page: Path) -> list[tuple[str, str]]:
    """Each command of a page with its place, without what is compared with its output."""
    found = []
    for block in blocks(page):
        lines = block.text.splitlines()
        if block.kind == "sh":
            found += [(line, block.place) for line in lines if line]
        if block.kind == "console":
            found += [(line[2:], block.place) for line in lines if line.startswith("$ ")]
    return found


ALL = [command for page in PAGES for command in commands(page)]


def _reasons(command: str) -> list[str]:
    return [reason for start, reason in NOT_RUN.items() if re.match(start, command)]


RUN = {command: place for command, place in ALL if not _reasons(command)}


def test_every_command_is_run_or_has_one_reason() -> None:
    assert len(ALL) > 40
    assert {shlex.split(command)[0] for command in RUN} == {"graphopt"}
    for command, place in ALL:
        assert len(_reasons(command)) <= 1, f"{place}: {command}"
    for start in NOT_RUN:
        assert any(re.match(start, command) for command, _ in ALL), f"no command begins so: {start}"


@pytest.mark.parametrize("command", RUN)
def test_commands_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command, comments=True)[1:]
    with torch.random.fork_rng():
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code in (0, 1), f"{RUN[command]}: {result.stderr}\n{result.exception!r}"
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.stdout
    named = {"-o", "--chart", "--trace", "--html", "--plot"} & set(arguments)
    assert all((tmp_path / arguments[arguments.index(option) + 1]).is_file() for option in named)


PYTHON = [b for page in PAGES for b in blocks(page) if b.kind == "python"]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
def test_python_that_does_not_run_is_python(block: Block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        if isinstance(node, ast.Call):
            _check_call(node)


def _check_call(call: ast.Call) -> None:
    """Whether what is called by ``graphopt.`` exists and takes these keywords."""
    first, *rest = ast.unparse(call.func).split(".")
    if first != "graphopt":
        return
    value: object = importlib.import_module("graphopt")
    for name in rest:
        value = getattr(value, name)
    assert callable(value)
    known = inspect.signature(value).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    unknown = {word.arg for word in call.keywords if word.arg} - set(known)
    assert open_ended or not unknown, f"{ast.unparse(call)}: {unknown}"


def test_what_is_wrong_is_found() -> None:
    for text in ("graphopt.optimise(model)", "graphopt.optimize(model, pases='')"):
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call)
        with pytest.raises((AttributeError, AssertionError)):
            _check_call(call)
