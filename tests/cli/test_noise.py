"""Warnings of libraries do not stand between lines of progress."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import pytest

from graphopt.cli import console, noise


def _library(folder: Path, body: str) -> dict[str, object]:
    """What a module of an installed package defines."""
    file = folder / "site-packages" / "chatty" / "core.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(body)
    names: dict[str, object] = {"__name__": "chatty.core"}
    exec(compile(body, str(file), "exec"), names)
    return names


SPEAK = """
import logging, warnings
def speak():
    for _ in range(3):
        warnings.warn("layers are\\n  deprecated", FutureWarning)
        logging.getLogger("chatty").warning("weights are %s", "new")
        logging.getLogger("chatty").info("nothing")
    warnings.warn("long " * 100)
"""


@pytest.fixture
def chatty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("chatty")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", False)
    return _library(tmp_path, SPEAK)["speak"]


def test_libraries_are_told_once_in_short_and_last(
    chatty, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("chatty").handlers[0], "stream", sys.stderr)
    with noise.gathered(), warnings.catch_warnings():
        warnings.simplefilter("always")
        chatty()
        sys.stderr.write("importing torch… 1.0 s\n")
    assert capsys.readouterr().err.splitlines() == [
        "importing torch… 1.0 s",
        "chatty: FutureWarning: layers are deprecated (3 times)",
        "chatty: weights are new (3 times)",
        f"chatty: UserWarning: {('long ' * 100)[:159]}…",
    ]


def test_a_warning_at_the_users_line_has_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    with noise.gathered():
        warnings.warn("mine", stacklevel=1)
    assert capsys.readouterr().err.startswith(f"{__file__}:")
    with pytest.raises(ZeroDivisionError):
        _warn_and_fail()
    assert "before" in capsys.readouterr().err


def _warn_and_fail() -> None:
    with noise.gathered():
        warnings.warn("before", stacklevel=1)
        raise ZeroDivisionError


def test_files_and_other_handlers_get_their_records(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = _library(tmp_path, SPEAK)
    with noise.gathered(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names["speak"]()  # type: ignore[operator]
    assert [record.getMessage() for record in caplog.records].count("weights are new") == 3


def test_everything_is_as_before_behind_it() -> None:
    before = warnings.showwarning, logging.StreamHandler.emit, list(warnings.filters)
    with noise.gathered():
        pass
    assert before == (warnings.showwarning, logging.StreamHandler.emit, list(warnings.filters))


def test_quiet_turns_progress_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    monkeypatch.setenv("GRAPHOPT_LOG", "quiet")
    with console.phase("counting"):
        pass
    assert capsys.readouterr().err == ""
