"""Kept captures with symbols that were damaged or poisoned, and what of sizes cannot be kept."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.capture.kept import Entry, Misfit, Store, found
from graphopt.capture.sizes import Dimensions
from tests.capture.test_kept_damaged import _places, body, signed
from tests.capture.test_kept_sizes import Halves, captured

X = torch.ones(4, 8)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one kept capture of an even number of rows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert captured(Halves(), X, x=(0,)).unkept == ""
    (file,) = (tmp_path / "graphopt" / "captures").glob("*.json")
    return file


def _deep(depth: int) -> Any:
    tree: Any = ["==", 1, 1]
    for _ in range(depth):
        tree = ["not", tree]
    return tree


ROW = ["TensorPropertySource", 0, "size", 0]
POISONS: dict[str, Any] = {
    "code": "__import__('this')",
    "code in a call": ["__import__('this')", 1],
    "another function": ["**", 2, 2],
    "a function of Python": ["eval", "print('poison')"],
    "a name of nothing": ["<=", 2, "99999"],
    "a name of something else": ["<=", 2, "0"],
    "a name that is code": ["<=", 2, "L['x'].size()[0]"],
    "a fraction": ["<=", 1.5, 2],
    "truth as a number": ["+", ["==", 1, 1], 1],
    "a number as truth": ["and", 1, ["==", 1, 1]],
    "a large number": ["<=", 2, 2**70],
    "a division by zero": ["==", ["%", 4, 0], 0],
    "too few arguments": ["=="],
    "too deep": _deep(200),
    "too long": ["and", *[["==", 1, 1]] * 1000, ["and", *[["==", 1, 1]] * 1000]],
    "nothing": [],
    "null": None,
}


@pytest.mark.parametrize("name", POISONS)
@pytest.mark.parametrize("where", ["conditions", "known"])
def test_a_condition_that_is_poisoned_is_a_miss_with_one_warning(
    file: Path, name: str, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = body(file)
    if where == "conditions":
        entry["sizes"]["conditions"].append(POISONS[name])
    else:
        graph = json.loads(entry["graph"])
        graph["known"].append(POISONS[name])
        entry["graph"] = json.dumps(graph)
    file.write_text(signed(file, entry))
    with pytest.warns(RuntimeWarning, match="a kept capture is damaged") as said:
        assert captured(Halves(), X, x=(0,)).route == "dynamo"
    assert len(said) == 1
    assert capsys.readouterr().out == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert captured(Halves(), X, x=(0,)).route == "kept"


EDITS: dict[str, Any] = {
    "a size of no tensor": lambda e: e["places"].append(ROW) or e["sizes"]["read"].append(-1),
    "a size of itself": lambda e: e["sizes"]["read"].append(0),
    "a property that there is not": lambda e: e["places"].append([*ROW[:2], "item", 0]),
    "an index that is code": lambda e: e["places"].append([*ROW[:3], "0]; print(1)"]),
    "a range that is none": lambda e: e["sizes"]["named"][0].__setitem__(2, "2"),
    "a name that is none": lambda e: e["sizes"]["named"][0].__setitem__(0, "x"),
    "a list that is none": lambda e: e["sizes"].__setitem__("conditions", {"a": 1}),
    "a form that is none": lambda e: [
        row[2].__setitem__("size", "ab") for row in e["conditions"] if "size" in row[2]
    ],
    "no known": lambda e: e.__setitem__("graph", e["graph"].replace('"known"', '"unknown"')),
    "what is not so": lambda e: e.__setitem__(
        "graph", e["graph"].replace('"known": [', '"known": [["==", "s0", 7], ', 1)
    ),
    "a view that reads a tensor": lambda e: e.__setitem__(
        "graph",
        e["graph"].replace(
            '"aliases": []', '"aliases": [{"output": 0, "input": 0, "size": ["n1"], '
            '"stride": [1], "offset": 0, "detached": false}]'
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_what_is_edited_is_a_miss_with_one_warning(file: Path, name: str) -> None:
    entry = body(file)
    EDITS[name](entry)
    assert entry != body(file)
    file.write_text(signed(file, entry))
    with pytest.warns(RuntimeWarning, match="a kept capture is damaged") as said:
        assert captured(Halves(), X, x=(0,)).route == "dynamo"
    assert len(said) == 1


def test_a_condition_that_divides_by_a_size_never_raises(file: Path) -> None:
    entry = body(file)
    place = str(entry["sizes"]["read"][0])
    entry["sizes"]["conditions"].append(["==", ["%", 12, ["-", place, 8]], 0])
    file.write_text(signed(file, entry))
    net = Halves()
    made = captured(net, X, x=(0,))
    assert made.route == "kept"
    assert not made.holds(net, torch.ones(8, 8))
    assert made.holds(net, torch.ones(14, 8))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        captured(Halves(), X, x=(0,))
    (file,) = (folder / "graphopt" / "captures").glob("*.json")
    return body(file)


@settings(max_examples=40)
@given(data=st.data())
def test_whatever_is_edited_fits_or_does_not(written: Any, data: st.DataObject) -> None:
    """Nothing but `Misfit` is raised, and what fits is for this call."""
    edited = json.loads(json.dumps(written))
    part = data.draw(st.sampled_from(["sizes", "places", "conditions", "known", "inputs"]))
    graph = json.loads(edited["graph"])
    whole = graph if part == "known" else edited
    paths = [path for path in _places(whole) if path[:1] == (part,)]
    path = data.draw(st.sampled_from(sorted(paths, key=str)))
    junk = st.sampled_from([None, 0, -1, 7, 10**30, 1.5, "", "x", "0", "s0", [], ["=="], {}, True])
    at = whole
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = data.draw(junk)
    edited["graph"] = json.dumps(graph)
    net = Halves()
    try:
        entry = found(edited, net, Halves.forward, (X,), {})
    except Misfit:
        return
    assert isinstance(entry, Entry)
    assert entry.guard(net, X)


def test_an_index_of_sizes_that_is_damaged_is_one_warning(file: Path) -> None:
    (index,) = (file.parents[1] / "sizes").glob("*.json")
    index.write_text(signed(index, [["x.0"], ["__import__('this')"]]))
    with pytest.warns(RuntimeWarning, match="a kept size is damaged") as said:
        made = capture(Halves(), (torch.ones(6, 8),), store=Store(), varied=lambda _: Dimensions())
    assert made.route == "dynamo"
    assert len(said) == 1


# -- what cannot be kept ---------------------------------------------------------------------------


class Returning(nn.Linear):
    """Returns a size."""

    def forward(self, input: Tensor) -> Any:
        """And a tensor."""
        return super().forward(input), input.shape[0]


class Dividing(nn.Linear):
    """Returns what it computes of a size."""

    def forward(self, input: Tensor) -> Any:
        """And a tensor."""
        return super().forward(input), input.shape[0] / 4


class Reading(nn.Linear):
    """Reads a number off a tensor."""

    def forward(self, input: Tensor) -> Tensor:
        """Scale by it."""
        return super().forward(input) * self.weight.detach().abs().max().item()


class Rooting(nn.Linear):
    """Branches on a root."""

    def forward(self, input: Tensor) -> Tensor:
        """Of a size."""
        y = super().forward(input)
        return y if input.shape[0] ** 0.5 > 1.5 else -y


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Returning, "forward returns sizes"),
        (Dividing, "forward does more around its graph than take inputs and return results"),
        (Reading, "numbers that it reads off tensors are symbols of its graph"),
        (Rooting, "it has a condition on sizes with torch.sym_float(L['input'].size()[0]) ** 0.5"),
    ],
)
def test_what_cannot_be_kept_says_why(net: type[nn.Linear], reason: str) -> None:
    made = captured(net(2, 2), torch.ones(4, 2), x=(0,))
    assert (made.route, made.unkept) == ("dynamo", reason)


def test_numbers_as_inputs_are_not_kept() -> None:
    class Scaling(nn.Linear):
        def forward(self, input: Tensor, gain: float = 2.0) -> Tensor:
            return super().forward(input) * gain

    x = torch.ones(4, 2)
    names = Dimensions({id(x): {0: "input.0"}})
    made = capture(Scaling(2, 2), (x, 3.0), numbers=["L['gain']"], dimensions=names, store=Store())
    assert made.unkept == "numbers are inputs of its graph"
