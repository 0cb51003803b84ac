"""Factories, inputs and options that make no sense: a sentence, a line of the user's, a try."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from graphopt.cli.main import app

FILE = """
import argparse
import sys

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(x)


class Several(Net):
    def forward(self, xs):
        return sum(self.linear(x) for x in xs)


def fine():
    return Net(), (torch.randn(2, 8),)


def with_arguments(size):
    return Net(), (torch.randn(2, size),)


def no_inputs():
    return Net(), ()


def without():
    return Net(), None


def no_batches():
    return Net(), []


def empty_list():
    return Several(), ([],)


def no_examples():
    return Net(), (torch.randn(0, 8),)


def wrong_shape():
    return Net(), (torch.randn(2, 7),)


def text():
    return Net(), ("text",)


def second_wrong():
    return Net(), [(torch.randn(2, 8),), (torch.randn(2, 7),)]


def leaving():
    sys.exit(3)


def script():
    argparse.ArgumentParser().parse_args(["--epochs", "3"])
"""
ON = ("--device", "h100")
EAGER = "forward of Net raised with the example inputs, in PyTorch eager, too: "
SHAPES = "RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x7 and 8x4)"
LINE = "return self.linear(x)"
RIGHT = "let the factory return inputs with which model(*inputs) works"
GUARD = "put what runs a script behind if __name__ == '__main__'"
RETURN = "return (model, example_inputs), with a tuple, a dict or (tuple, dict) of inputs"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "user.py"
    path.write_text(FILE)
    return path


def refused(*arguments: str, code: int = 2) -> list[str]:
    """The lines of the error, without where it is."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    assert result.exception is None or isinstance(result.exception, SystemExit)
    lines = result.stderr.strip().splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("[GO-")) :]


@pytest.mark.parametrize(
    ("factory", "message", "line", "hint"),
    [
        (
            "with_arguments",
            "a factory is called without arguments, and this one is missing a required argument: "
            "'size'",
            "",
            "write one without parameters that calls it",
        ),
        ("no_inputs", "missing a required argument: 'x'", "", RETURN),
        ("without", "returned a NoneType as example inputs", "", RETURN),
        ("no_batches", "returned a list of 0 as example inputs", "", RETURN),
        ("wrong_shape", EAGER + SHAPES, LINE, RIGHT),
        ("text", EAGER + "TypeError: linear(): argument 'input'", LINE, RIGHT),
        ("leaving", "the factory raised: SystemExit: 3", "sys.exit(3)", GUARD),
        ("script", "the factory raised: SystemExit: 2", "parse_args", GUARD),
    ],
)
def test_a_factory_that_makes_no_sense(
    factory: str, message: str, line: str, hint: str, file: Path
) -> None:
    said = refused("show", f"{file}:{factory}")
    assert message in said[0]
    assert [each for each in said if each.startswith("  at: ")] == [
        each for each in said if line and line in each and each.startswith(f"  at: {file}:")
    ]
    assert said[-1] == f"  try: {hint}"


@pytest.mark.parametrize(
    "command",
    [
        ("doctor",),
        ("calibrate", "-o", "out.json"),
        ("run", "-p", "cleanup"),
        ("verify", "-p", "cleanup"),
        ("report", "-o", "out.html"),
        ("plan", "--mesh", "dp=8", *ON),
        ("plan", "-p", "low_rank"),
        ("simulate", "--mesh", "dp=8", "--cluster", "summit", *ON),
    ],
    ids=" ".join,
)
def test_inputs_of_a_wrong_shape_are_found_by_every_command(
    command: tuple[str, ...], file: Path
) -> None:
    name, *options = command
    said = refused(name, f"{file}:wrong_shape", *options)
    assert EAGER + SHAPES in said[0]
    assert LINE in said[1]
    assert said[2:] == [f"  try: {RIGHT}"]


def test_the_batch_that_is_wrong_is_named(file: Path) -> None:
    said = refused("calibrate", f"{file}:second_wrong", "-o", "out.json")
    assert "with the example inputs 2, in PyTorch eager, too: " + SHAPES in said[0]
    said = refused("calibrate", f"{file}:no_examples", "-o", "out.json")
    assert said == [
        "[GO-A01] the example inputs of user:no_examples hold no examples",
        "  try: let the factory return a batch with examples in it",
    ]
    assert not Path("out.json").exists()


def test_what_fails_in_the_capture_alone_stays_a_finding(file: Path) -> None:
    said = refused("show", f"{file}:empty_list", code=1)
    assert said[0] == "[GO-C01] forward runs no tensor operator, so there is nothing to capture"


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (("--mesh", "tp=4", *ON), "dimensions that report does not know: tp", "dp=8 are ranks"),
        (("--mesh", "pp=2", *ON), "no pass of 'auto' makes any", "-p partition"),
        (("--mesh", "dp=8"), "does not say what each rank computes with", "--device h100"),
    ],
)
def test_a_mesh_that_a_report_has_no_use_for(
    options: tuple[str, ...], message: str, hint: str, file: Path
) -> None:
    said = refused("report", f"{file}:fine", "-o", "out.html", *options)
    assert message in said[0]
    assert hint in said[-1]
    assert not Path("out.html").exists()


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("show",), "--html"),
        (("report",), "-o"),
        (("report", "-o", "fine.html"), "--trace"),
        (("simulate", "--mesh", "dp=2", "--cluster", "summit", *ON), "--chart"),
    ],
)
def test_a_file_that_cannot_be_written(command: tuple[str, ...], option: str, file: Path) -> None:
    name, *options = command
    said = refused(name, f"{file}:fine", *options, option, "nowhere/out")
    assert said == [
        "[GO-A01] 'nowhere/out' cannot be written: No such file or directory",
        "  try: name a file in a folder that exists",
    ]
