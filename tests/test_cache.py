"""The cache of earlier results: what it holds, and that nothing in it can stop a run."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest

import graphopt.cache
from graphopt.cache import JsonCache, is_duration
from graphopt.model import backend_choice
from graphopt.model.backend_choice import _cached

CACHE = JsonCache("things")


def _folder() -> Path:
    return Path(os.environ["XDG_CACHE_HOME"], "graphopt")


def test_what_was_written_is_read() -> None:
    assert CACHE.read("a") is None
    CACHE.write("a", {"x": [1, 2.5], "y": "z"})
    assert CACHE.read("a") == {"x": [1.0, 2.5], "y": "z"}
    assert CACHE.read("b") is None
    assert [file.name for file in (_folder() / "things").iterdir()] == ["a.json"]
    CACHE.write("a", "other")
    assert CACHE.read("a") == "other"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 100_000, b"\x00\xff", b'{"x": ' + b"9" * 9 + b",}"]
)
def test_what_is_not_json_is_absent(content: bytes) -> None:
    CACHE.write("a", 1)
    (_folder() / "things" / "a.json").write_bytes(content)
    assert CACHE.read("a") is None


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 2, "entry": 1}', '{"format": 1, "entry": 1, "more": 1}']
)
def test_what_is_no_entry_is_ignored_with_one_warning(
    content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphopt.cache, "_warned", set())
    CACHE.write("a", 1)
    (_folder() / "things" / "a.json").write_text(content)
    with pytest.warns(RuntimeWarning, match="an entry in the cache of things is ignored: it is no"):
        assert CACHE.read("a") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CACHE.read("a") is None
        assert CACHE.read("not there") is None


def test_numbers_too_large_for_a_float_are_no_durations() -> None:
    CACHE.write("a", 1)
    for digits in (400, 10_000):
        (_folder() / "things" / "a.json").write_text("9" * digits)
        assert not is_duration(CACHE.read("a"))


@pytest.mark.parametrize("value", [None, 1, True, "1", 0.0, -1.0, 1e308, float("nan"), [1.0]])
def test_what_is_no_duration(value: object) -> None:
    assert not is_duration(value)
    assert is_duration(1e-9)


def test_folders_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").touch()
    for place in (tmp_path / "taken", Path("/proc"), Path("/dev/full")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        CACHE.write("a", 1)
        assert CACHE.read("a") is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "graphopt" / "things" / "a.json").mkdir(parents=True)
    CACHE.write("a", 1)
    assert CACHE.read("a") is None


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    CACHE.write("a", 1)
    assert CACHE.read("a") is None


# -- backend choices -------------------------------------------------------------------------------

CHOICE = {"backend": "inductor", "reason": "faster", "seconds": {"eager": 2.0, "inductor": 1.0}}


def test_a_backend_choice_is_taken() -> None:
    backend_choice.CACHE.write("key", CHOICE)
    assert [p.parent.name for p in _folder().rglob("*.json")] == ["backends"]
    found = _cached("key")
    assert found is not None
    assert (found.backend, found.requested, found.seconds) == (
        "inductor",
        "auto",
        CHOICE["seconds"],
    )
    assert found.reason == "faster (kept from an earlier run)"


@pytest.mark.parametrize(
    "wrong",
    [
        {"backend": None},
        {"backend": 5},
        {"backend": ["eager"]},
        {"backend": "rm -rf"},
        {"reason": {"a": 1}},
        {"seconds": 5},
        {"seconds": {}},
        {"seconds": {"eager": 1.0}},
        {"seconds": {"eager": "x", "inductor": 1.0}},
        {"seconds": {"eager": 1.0, "inductor": float("nan")}},
        {"seconds": {"eager": 1.0, "inductor": -1.0}},
        {"seconds": {"eager": 1.0, "inductor": 1.0, "other": 1.0}},
    ],
)
def test_an_entry_that_is_no_backend_choice_is_absent(wrong: dict[str, object]) -> None:
    backend_choice.CACHE.write("key", json.loads(json.dumps({**CHOICE, **wrong})))
    assert _cached("key") is None
