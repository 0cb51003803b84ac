"""Kept captures that were damaged or edited, and folders that do not work."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphopt.capture import capture
from graphopt.capture.kept import Entry, Misfit, Store, found, store
from graphopt.capture.kept.fingerprints import digest


class Net(nn.Sequential):
    """Something small."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 3), nn.ReLU())


X = torch.ones(2, 3)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one kept capture."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert capture(Net(), (X,), store=Store()).route == "dynamo"
    (file,) = tmp_path.rglob("*.json")
    return file


def signed(file: Path, entry: Any, key: str = "") -> str:
    """An entry as somebody writes it who knows how."""
    key, told = key or file.stem, json.dumps(entry)
    return json.dumps({"key": key, "digest": digest([key, told])}) + "\n" + told


def body(file: Path) -> Any:
    return json.loads(file.read_text().partition("\n")[2])


def read(key: str) -> Any:
    found = Store().read(key)
    return found and found.entry


def _edited(entry: Any, name: str, value: object) -> Any:
    return {**entry, name: value}


DAMAGES = {
    "empty": lambda file: "",
    "cut off": lambda file: file.read_text()[:-100],
    "one digit": lambda file: file.read_text().replace('"results": 1', '"results": 2'),
    "no dictionary": lambda file: "[1, 2]",
    "another call's": lambda file: signed(file, body(file), key="another"),
    "deep": lambda file: "[" * 100_000,
    "no text": lambda file: "\ud800",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_captured_anew_with_one_warning(file: Path, name: str) -> None:
    file.write_bytes(DAMAGES[name](file).encode("utf-8", "surrogatepass"))
    with pytest.warns(RuntimeWarning) as caught:
        assert capture(Net(), (X,), store=Store()).route == "dynamo"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert capture(Net(), (X,), store=Store()).route == "kept"


POISONS = {
    "a step that runs code": lambda e: _edited(
        e, "places", [*e["places"], ["AttrSource", 0, "a); print('poison'"]]
    ),
    "an unknown step": lambda e: _edited(e, "places", [["WeakRefCallSource", 0]]),
    "an unknown operator": lambda e: _edited(
        e, "graph", e["graph"].replace("aten.relu", "os.system")
    ),
    "a result that there is not": lambda e: _edited(e, "returns", {"result": 7}),
    "an input that there is not": lambda e: _edited(e, "inputs", [0]),
    "no conditions": lambda e: {k: v for k, v in e.items() if k != "conditions"},
    "nothing": lambda e: {},
}


@pytest.mark.parametrize("name", POISONS)
def test_what_is_poisoned_is_no_capture(
    file: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(signed(file, POISONS[name](body(file))))
    with pytest.warns(RuntimeWarning, match="a kept capture is damaged") as said:
        assert capture(Net(), (X,), store=Store()).route == "dynamo"
    assert len(said) == 1
    assert capsys.readouterr().out == ""


def test_nothing_is_imported_for_a_kept_capture(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(signed(file, _edited(body(file), "imports", {"__import_this": "this"})))
    assert capture(Net(), (X,), store=Store()).route == "dynamo"
    assert capsys.readouterr().out == ""
    assert "__import_this" not in Net.forward.__globals__


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _places(item, (*path, key))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        capture(Net(), (X,), store=Store())
    (file,) = folder.rglob("*.json")
    return body(file)


@settings(max_examples=40)
@given(data=st.data())
def test_whatever_is_edited_fits_or_does_not(written: Any, data: st.DataObject) -> None:
    """Nothing but `Misfit` is raised, and what fits is for this call."""
    edited = {**json.loads(json.dumps(written)), "graph": json.loads(written["graph"])}
    path = data.draw(st.sampled_from(sorted(_places(edited), key=str)[1:]))
    junk = st.sampled_from([None, 0, -1, 10**9, 1.5, "", "x", "a.b", [], {}, True, [[]], {"a": 1}])
    at = edited
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = data.draw(junk)
    if data.draw(st.booleans()) or path != ("graph",):
        edited["graph"] = json.dumps(edited.get("graph"))
    net = Net()
    try:
        entry = found(edited, net, Net.forward, (X,), {})
    except Misfit:
        return
    assert isinstance(entry, Entry)
    assert entry.guard(net, X)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13)])
def test_a_folder_that_is_full_or_read_only_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fails(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.warns(RuntimeWarning, match="captures cannot be kept for later processes") as said:
        assert capture(Net(), (X,), store=Store()).route == "dynamo"
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once per process
        assert capture(Net(), (X,), store=Store()).route == "dynamo"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_made_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning):
        assert capture(Net(), (X,), store=Store()).route == "dynamo"


def test_many_writers_leave_one_whole_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As processes and ranks do that share a folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    entry = {"text": "x" * 200_000}
    seen: list[object] = []

    def work() -> None:
        for _ in range(20):
            Store().write("key", entry)
            seen.append(read("key"))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == [entry] * 80
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["key.json"]


def test_the_oldest_entries_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(store, "MOST", 2)
    for number in range(4):
        Store().write(str(number), {})
    assert len(list(tmp_path.rglob("*.json"))) == 2
    assert read("3") == {}
