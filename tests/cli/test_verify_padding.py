"""`graphopt verify --padding`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from graphopt.cli.main import app

ROOT = Path(__file__).parents[2]
LEAKING, TIGHT = "examples/padding.py:leaking", "examples/padding.py:tight"
NET = "tests/support/models_for_cli.py:net"


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")


def verify(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ("verify", *arguments))
    assert result.exit_code == code, f"{result.stderr}\n{result.stdout}\n{result.exception!r}"
    return result


def test_a_model_that_minds_its_mask() -> None:
    out = verify(TIGHT, "--padding").stdout
    assert "12 positions and 8 of padding: ids with 0, mask with 0" in out
    assert "changes" not in out


def test_a_leak_is_a_finding() -> None:
    out = verify(LEAKING, "--padding", code=1).stdout
    assert "changes, worst output 0" in out
    assert "native_batch_norm takes statistics over padding" in out
    assert "in norm, at examples/padding.py:" in out
    assert verify(LEAKING, "--padding", "--no-grad").exit_code == 0  # in evaluation


def test_as_json() -> None:
    result = verify(LEAKING, "--padding", "--pad", "ids=1:7", "--pad", "mask=1", "--json", code=1)
    found = json.loads(result.stdout)
    assert found["schema"] == "graphopt.verify/1"
    assert found["padded"]["ids"] == {"value": 7.0, "dim": [1], "side": "right"}
    assert (found["ok"], found["length"], found["more"]) == (False, 12, 8)
    assert [c["kind"] for c in found["compared"]] == ["outputs", "gradients", "buffers"]
    assert found["leaks"][0]["module"] == "norm"


def test_what_is_padded_may_be_said() -> None:
    # Images have no mask: a convolution and a mean see what is beside them.
    out = verify(NET, "--padding", "--pad", "x=2,3", "--side", "left", "--no-grad", code=1).stdout
    assert "8 positions and 8 of padding on the left: x with 0" in out
    assert "the call has no mask" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((NET,), "there is nothing to verify"),
        ((NET, "-p", "cleanup", "--padding"), "two questions"),
        ((NET, "-p", "cleanup", "--pad", "x=1"), "add --padding"),
        ((NET, "-p", "cleanup", "--side", "left"), "add --padding"),
        ((NET, "--padding"), "no argument of forward is a mask"),
        ((NET, "--padding", "--pad", "x"), "'x' cannot be read"),
        ((NET, "--padding", "--pad", "=1"), "'=1' cannot be read"),
        ((NET, "--padding", "--pad", "x=1:a"), "'x=1:a' cannot be read"),
        ((NET, "--padding", "--pad", "y=1"), "the call has no tensor 'y'; it has x"),
        ((NET, "--padding", "--pad", "x=4"), "has no dim=4"),
        (("graph.gopt", "--padding"), "cannot be padded"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], message: str) -> None:
    assert message in verify(*arguments, code=2).stderr
