"""The documents: pass pages are generated, examples run and print what is written, links lead on.

A fenced block whose info string ends in ``# runs`` is an example. ``python # runs`` blocks of the
document are executed in order, in one namespace; a ``text`` block right behind one is what it
prints. A ``console # runs`` block holds a ``$ graphopt ...`` command and what that prints. Times
are compared as times, digests of plans as digests, rounding errors as rounding errors, and a line
``...`` stands for any lines.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import linecache
import re
import shlex
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import measured

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PYTHON = DOCS / "python.md"
CLI = DOCS / "cli.md"
DATA_PARALLEL = DOCS / "data_parallel.md"
PIPELINE = DOCS / "pipeline.md"
DELAYED = DOCS / "delayed_gradients.md"
WITH_PYTHON = [
    README,
    PYTHON,
    CLI,
    DATA_PARALLEL,
    DELAYED,
    DOCS / "checkpoints.md",
    DOCS / "dynamic_sizes.md",
    DOCS / "flexpoint.md",
    DOCS / "hierarchical_arithmetic.md",
    DOCS / "kfac.md",
    DOCS / "gaussian_processes.md",
    DOCS / "hierarchical.md",
    DOCS / "large_batches.md",
    DOCS / "low_rank.md",
    DOCS / "optimizers.md",
    PIPELINE,
    DOCS / "precision.md",
    DOCS / "serving.md",
    DOCS / "sizes.md",
    DOCS / "training_recipe.md",
    DOCS / "writing_a_pass.md",
]
WITH_COMMANDS = [README, CLI, DATA_PARALLEL, PIPELINE]
DOCUMENTS = [
    README,
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(DOCS.rglob("*.md")),
]

_BLOCK = re.compile(r"^```(?P<kind>[^\n]*)\n(?P<text>.*?)^```\n", re.MULTILINE | re.DOTALL)
_TIME = re.compile(r"\b\d[\d.]* (us|ms|s)\b")
_DIGEST = re.compile(r"\b[0-9a-f]{16}\b")
_ROUNDING = re.compile(r"\b\d(\.\d+)?e-\d+\b")
_LINK = re.compile(r"\]\((?P<file>[^)#:]*)(?:#(?P<heading>[^)]+))?\)")


@dataclass(frozen=True)
class Example:
    """A block that runs.

    Attributes:
        kind: ``"python"`` or ``"console"``.
        text: the program or the command.
        printed: what the document says that it prints; ``None`` if it does not say.
        place: where it begins, as ``file:line``.
    """

    kind: str
    text: str
    printed: str | None
    place: str


def examples(file: Path) -> list[Example]:
    """All examples of a Markdown file, in order."""
    document = file.read_text()
    found = []
    blocks = list(_BLOCK.finditer(document))
    for block, after in zip(blocks, [*blocks[1:], None], strict=False):
        kind, _, mark = block["kind"].partition(" # ")
        if mark != "runs":
            continue
        place = f"{file.name}:{document.count(chr(10), 0, block.start()) + 1}"
        text, printed = block["text"], None
        if kind == "console":
            text, _, printed = text.partition("\n")
        elif (
            after and after["kind"] == "text" and not document[block.end() : after.start()].strip()
        ):
            printed = after["text"]
        found.append(Example(kind, text, printed, place))
    return found


def run_python(text: str, module: ModuleType, file: Path) -> str:
    """Run a block in `module`, as `file`; what it prints, without the folder of that file."""
    file.write_text(text)
    linecache.checkcache(str(file))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, str(file), "exec"), vars(module))
    return printed.getvalue().replace(f"{file.parent}/", "")


def run_console(command: str) -> str:
    """What a ``$ graphopt ...`` command prints at a width of 100 columns."""
    from graphopt.cli.main import app

    prompt, name, *arguments = shlex.split(command)
    assert (prompt, name) == ("$", "graphopt")
    result = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1"}).invoke(app, arguments)
    assert result.exit_code in (0, 1), result.output
    return "\n".join(line.rstrip() for line in result.stdout.splitlines()).strip() + "\n"


def says(printed: str, expected: str) -> bool:
    """Whether this is the documented output, up to what differs from run to run."""
    parts = re.split(r"^\.\.\.\n", _steady(expected), flags=re.MULTILINE)
    pattern = r"(?:.*\n)*".join(map(re.escape, parts))
    return re.fullmatch(pattern, _steady(printed)) is not None


def _steady(output: str) -> str:
    output = _DIGEST.sub("DIGEST", _TIME.sub("TIME", output))
    return _ROUNDING.sub("ROUNDING", output)


def headings(document: Path) -> set[str]:
    """The names by which links reach the headings of a Markdown file, as forges make them."""
    prose = _BLOCK.sub("", document.read_text())
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def _hold(example: Example, printed: str) -> None:
    if example.printed is not None:
        message = f"{example.place} prints\n{printed}\nand not\n{example.printed}"
        assert says(printed, example.printed), message


@pytest.mark.parametrize("document", WITH_PYTHON, ids=lambda file: file.stem)
def test_python_examples_run(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = [e for e in examples(document) if e.kind == "python"]
    assert found
    module = ModuleType("documented")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look it up
    with torch.random.fork_rng():
        for example in found:
            _hold(example, run_python(example.text, module, tmp_path / "example.py"))


_CONSOLE = [e for page in WITH_COMMANDS for e in examples(page) if e.kind == "console"]


@pytest.mark.parametrize("example", _CONSOLE, ids=lambda e: f"{e.place} {e.text}")
def test_commands_print_what_the_documents_say(
    example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with torch.random.fork_rng():
        _hold(example, run_console(example.text))


def test_no_example_is_left_out() -> None:
    kinds = {file: {example.kind for example in examples(file)} for file in DOCUMENTS}
    assert {file for file in DOCUMENTS if "python" in kinds[file]} == set(WITH_PYTHON)
    assert {file for file in DOCUMENTS if "console" in kinds[file]} == set(WITH_COMMANDS)


def test_every_command_is_shown() -> None:
    from graphopt.cli.main import app

    commands = {c.callback.__name__ for c in app.registered_commands if c.callback}
    shown = set(re.findall(r"^\$ graphopt (\w+)", CLI.read_text(), re.MULTILINE))
    assert shown == commands
    assert set(re.findall(r"^\| `graphopt (\w+)", README.read_text(), re.MULTILINE)) == commands


def test_the_model_of_the_commands_is_shown_whole() -> None:
    assert (ROOT / "examples" / "small.py").read_text() in CLI.read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.stem)
def test_links_lead_to_files(document: Path) -> None:
    for link in _LINK.finditer(_BLOCK.sub("", document.read_text())):
        target = document.parent / link["file"] if link["file"] else document
        assert target.exists(), link[0]
        if link["heading"]:
            assert link["heading"] in headings(target), link[0]


def test_the_map_leads_to_every_page() -> None:
    mapped = {link["file"] for link in _LINK.finditer((DOCS / "index.md").read_text())}
    assert {page.name for page in DOCS.glob("*.md")} - {"index.md"} <= mapped


def test_the_forge_runs_what_lands_a_change() -> None:
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]
    assert ".ci/run" in [step.get("run") for step in job["steps"]]
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    entries = job["strategy"]["matrix"]["include"]  # each run of it pins the torch of its own
    assert pinned is not None
    assert pinned[1] in {entry["torch"] for entry in entries}
    assert [entry["may-fail"] for entry in entries].count(False) == 1


def test_the_version_is_the_same_everywhere() -> None:
    import graphopt

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == graphopt.__version__


def _generator(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_chart_is_up_to_date(tmp_path: Path) -> None:
    from graphopt.cli.main import app

    generator, chart = _generator("generate_images"), tmp_path / "scaling.svg"
    result = CliRunner().invoke(app, [*generator.COMMAND, "--chart", str(chart)])
    assert result.exit_code == 0, result.output
    assert chart.read_text() == generator.CHART.read_text(), "run `python docs/generate_images.py`"


def test_pass_pages_are_up_to_date() -> None:
    generator = _generator("generate_passes")
    committed = {p.name: p.read_text() for p in (DOCS / "passes").glob("*.md")}
    assert committed == generator.pages(), "run `python docs/generate_passes.py`"
    assert generator.FACTS.read_text() == generator.facts() + "\n"


def test_tables_of_figures_are_those_of_the_kept_results() -> None:
    text = measured.PAGE.read_text()
    assert text == measured.page(text), "run `python -m benchmarks.measured`"


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("a\n1.2 ms\n", "a\n3 us\n", True),
        ("a\nb\nc\n", "a\n...\nc\n", True),
        ("a\n", "a\n...\n", True),
        ("a\nb\n", "a\n", False),
        ("a 2\n", "a 3\n", False),
        ("plan 0123456789abcdef\n", "plan 670e64871dcf7dbe\n", True),
        ("plan 0123456789abcdef\n", "plan\n", False),
        ("off by 2.9e-07\n", "off by 3e-08\n", True),
        ("off by 2.9e-07\n", "off by 0.29\n", False),
    ],
)
def test_comparison_of_outputs(printed: str, expected: str, same: bool) -> None:
    assert says(printed, expected) == same
