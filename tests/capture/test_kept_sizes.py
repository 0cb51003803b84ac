"""Kept captures in which sizes are symbols: found at other sizes, for the sizes they are for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.capture import Capture, capture
from graphopt.capture.kept import Store
from graphopt.capture.sizes import Dimensions
from graphopt.text import print_graph
from tests.capture import test_sizes as symbols
from tests.capture.test_kept import Captured


def captured(model: nn.Module, *given: Any, **dims: tuple[int, ...]) -> Capture:
    """A call with these dimensions as symbols, ``x=(0, 1)``, where ``x`` is the first argument."""
    names = {}
    for tensor, (name, numbers) in zip(given, dims.items(), strict=False):
        names[id(tensor)] = {number: f"{name}.{number}" for number in numbers}
    return capture(model, given, dimensions=Dimensions(names), store=Store())


def no_capture(patch: pytest.MonkeyPatch) -> None:
    """Let captures by Dynamo fail."""

    def by_dynamo(*args: object, **kwargs: object) -> object:
        raise Captured

    patch.setattr(sys.modules[capture.__module__], "by_dynamo", by_dynamo)


class Halves(nn.Module):
    """Takes an even number of rows, at most 100."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Add pairs of rows."""
        if x.shape[0] > 100:
            return self.lin(x)
        return self.lin(x).view(x.shape[0] // 2, 2, 4).sum(1)


FOUND = {
    **{name: symbols.MODELS[name] for name in ("dense", "images", "tokens")},
    "halves": (Halves, lambda n, k: torch.randn(2 * n, 8), (0,)),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_call_of_another_size_finds_it_and_has_eagers_bits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, data, numbers = FOUND[name]
    torch.manual_seed(0)
    model = make()
    first = captured(model, data(4, 2), x=numbers)
    assert (first.route, first.unkept) == ("dynamo", "")
    text = print_graph(first.graph)
    first.finish()
    no_capture(monkeypatch)
    x = data(7, 3)
    found = captured(model, x, x=numbers)
    assert (found.route, found.digest) == ("kept", first.digest)
    assert print_graph(found.graph) == text
    hints = {f"x.{number}": x.shape[number] for number in numbers}
    ranges = {size.name: (size.least, size.most) for size in first.sizes}
    assert {size.name: size.hint for size in found.sizes} == hints
    assert {size.name: (size.least, size.most) for size in found.sizes} == ranges
    assert found.sizes_of(model, x) == first.sizes_of(model, x) == tuple(hints.values())
    found.finish()
    assert found.holds.late is None  # type: ignore[attr-defined]  # nothing is asked anew
    for n, k in symbols.SIZES:
        given = data(n, k)
        assert found.holds(model, given), found.failure(model, given)
        symbols._same(found, model, given)
    with torch.no_grad(), pytest.raises(Captured):
        captured(model, x, x=numbers)


# -- which sizes it is for ---------------------------------------------------------------------


class Asks(nn.Module):
    """Branches on what a function says of two sizes."""

    def __init__(self, ask: Callable[[int, int], bool]) -> None:
        super().__init__()
        self.lin = nn.Linear(2, 2)
        self.ask = ask

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Double the sum, or not."""
        total = self.lin(x).sum() + y.sum()
        return total * 2 if self.ask(x.shape[0], y.shape[0]) else total


QUESTIONS: dict[str, Callable[[int, int], bool]] = {
    "range": lambda n, m: 5 <= n < 10,
    "equal": lambda n, m: n == m,
    "divisible": lambda n, m: n % 3 == 0,
    "remainder": lambda n, m: n % 4 == m % 4,
    "quotient": lambda n, m: n // 3 > m // 2,
    "by the other": lambda n, m: n % m == 1,
    "sum": lambda n, m: n + 2 * m < 30,
    "difference": lambda n, m: m - n >= 3,
    "product": lambda n, m: n * m > 60,
    "larger": lambda n, m: max(n, m) > 12,
    "smaller": lambda n, m: min(n + 1, m) > 6,
    "not": lambda n, m: n != 7,
}
EXAMPLES = ((6, 8), (9, 9), (13, 4))


@pytest.fixture(scope="module", params=QUESTIONS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A question, the answer of a captured call, and both guards, the second one of a kept call."""
    ask = QUESTIONS[request.param]
    model = Asks(ask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("asked")))

        def call(n: int, m: int) -> Capture:
            return captured(model, torch.ones(n, 2), torch.ones(m, 2), x=(0,), y=(0,))

        first = call(*EXAMPLES[0])
        assert (first.route, first.unkept) == ("dynamo", "")
        answer = ask(*EXAMPLES[0])
        sizes = ((n, m) for n in range(3, 20) for m in range(2, 20))
        other = next(s for s in sizes if ask(*s) == answer and first.holds(model, *_given(*s)))
        found = call(*other)
        assert found.route == "kept"
        yield model, ask, answer, first, found


def _given(n: int, m: int) -> tuple[Tensor, Tensor]:
    return torch.ones(n, 2), torch.ones(m, 2)


@given(n=st.integers(0, 40), m=st.integers(0, 40))
def test_both_processes_have_guards_for_the_same_sizes(pair: Any, n: int, m: int) -> None:
    model, ask, answer, first, found = pair
    expected = n >= 2 and m >= 2 and ask(n, m) == answer
    assert found.holds(model, *_given(n, m)) == expected
    if m:  # Dynamo's divides by zero before it asks for the range
        assert first.holds(model, *_given(n, m)) == expected


def test_sizes_that_guards_exclude_are_captured() -> None:
    model = Halves()
    assert captured(model, torch.randn(4, 8), x=(0,)).route == "dynamo"
    assert captured(model, torch.randn(100, 8), x=(0,)).route == "kept"
    assert captured(model, torch.randn(102, 8), x=(0,)).route == "dynamo"
    # Both branches are kept.
    assert captured(model, torch.randn(6, 8), x=(0,)).route == "kept"
    assert captured(model, torch.randn(103, 8), x=(0,)).route == "kept"


class Pairs(nn.Module):
    """Two tensors of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Their sum, and a view of the second one."""
        return self.lin(x) + y, y[1:]


def test_sizes_that_have_to_be_equal() -> None:
    model = Pairs()
    first = captured(model, torch.ones(4, 3), torch.ones(4, 3), x=(0,), y=(0,))
    x, y = torch.randn(6, 3), torch.randn(6, 3)
    found = captured(model, x, y, x=(0,), y=(0,))
    assert (first.unkept, found.route) == ("", "kept")
    assert not found.holds(model, torch.ones(4, 3), torch.ones(1, 3))
    assert not found.holds(model, torch.ones(4, 3), torch.ones(5, 3))
    assert found.aliases == first.aliases
    ((length, _),) = [alias.size for alias in found.aliases]
    assert isinstance(length, str)  # an expression


def test_a_view_is_found_as_any_other_tensor() -> None:
    data, model = torch.randn(40, 8), Halves()
    assert captured(model, data[3:9], x=(0,)).unkept == ""
    found = captured(model, data[4:8], x=(0,))
    assert found.route == "kept"
    assert found.holds(model, torch.randn(10, 8))


def test_other_dimensions_strides_and_ranks_are_other_calls() -> None:
    model = nn.ReLU()
    x = torch.ones(4, 6)
    assert captured(model, x, x=(0,)).route == "dynamo"
    assert captured(model, torch.ones(5, 6), x=(0,)).route == "kept"
    for other, numbers in ((x, (1,)), (torch.ones(4, 7), (0,)), (torch.ones(6, 4).t(), (0,))):
        assert captured(model, other, x=numbers).route == "dynamo"
    assert captured(model, torch.ones(6, 9).t(), x=(0,)).route == "kept"
    assert captured(model, torch.ones(4, 6, 1), x=(0,)).route == "dynamo"


def test_what_a_pass_asks_is_a_condition_of_a_kept_graph_too() -> None:
    model = Halves()
    captured(model, torch.randn(4, 8), x=(0,))
    found = captured(model, torch.randn(6, 8), x=(0,))
    assert found.route == "kept"
    assert found.graph.outputs[0].meta["val"].shape[0] < 20  # as a pass may ask
    found.finish()
    assert found.holds(model, torch.randn(38, 8))
    assert not found.holds(model, torch.randn(40, 8))


# -- optimized models ------------------------------------------------------------------------------


class Tagger(nn.Module):
    """Sequences of any length, in batches of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(100, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        """Tags."""
        return self.head(self.embed(ids).cumsum(1))


SIZES = ((8, 12), (8, 17), (5, 9))
LATER = ((6, 30), (7, 24), (8, 12), (2, 2))


def _step(net: nn.Module, n: int, length: int) -> list[Tensor]:
    torch.manual_seed(n)
    net.zero_grad()
    y = net(torch.randint(0, 100, (n, length)))
    y.square().sum().backward()
    return [y, *(p.grad.clone() for p in net.parameters())]  # type: ignore[union-attr]


def _tagger(*, optimized: bool = True, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = Tagger()
    return graphopt.optimize(net, backend="eager", **options) if optimized else net


@pytest.mark.parametrize("cache", ["captures", "verified"])
def test_another_model_of_the_kind_captures_nothing_whatever_its_first_size(
    cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _tagger(cache=cache)
    for sizes in SIZES:
        _step(first, *sizes)
    no_capture(monkeypatch)
    second, eager = _tagger(cache=cache), _tagger(optimized=False)
    for sizes in LATER:
        pairs = zip(_step(second, *sizes), _step(eager, *sizes), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    text = second.explain()  # type: ignore[operator]
    assert "by kept" in text
    assert ("by an earlier process" in text) == (cache == "verified")
    (one,) = graphopt.model.surface.report(second).specialisations  # type: ignore[arg-type]
    assert [str(size) for size in one.sizes] == ["ids.0 2..", "ids.1 2.."]
    with pytest.warns(UserWarning, match="cannot be captured: Captured"):
        second(torch.randint(0, 100, (1, 12)))  # a size of one is never a symbol


def test_sizes_are_no_symbols_where_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    first = _tagger()
    for sizes in SIZES:
        _step(first, *sizes)
    second = _tagger(dynamic=False)
    _step(second, 6, 30)
    (one,) = graphopt.model.surface.report(second).specialisations  # type: ignore[arg-type]
    assert (one.route, one.sizes) == ("dynamo", ())


def test_sizes_that_were_declared_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    dims: Any = {"ids": {0: "batch", 1: "length"}}
    _step(_tagger(dynamic=dims), 8, 12)
    no_capture(monkeypatch)
    second = _tagger(dynamic=dims)
    _step(second, 6, 30)
    assert "by kept" in second.explain()  # type: ignore[operator]


class Dicts(Tagger):
    """Takes a batch as a dictionary."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        """Tags, without padding."""
        return super().forward(batch["ids"]) * batch["mask"].unsqueeze(-1)


def test_sizes_of_tensors_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def batch(length: int) -> dict[str, Tensor]:
        return {"ids": torch.ones(3, length, dtype=torch.long), "mask": torch.ones(3, length)}

    first = graphopt.optimize(Dicts(), backend="eager")
    for length in (4, 6):
        first(batch(length))
    no_capture(monkeypatch)
    second = graphopt.optimize(Dicts(), backend="eager")
    for length in (5, 9):
        assert second(batch(length)).shape == (3, length, 4)
    (one,) = graphopt.model.surface.report(second).specialisations  # type: ignore[arg-type]
    assert {size.name for size in one.sizes} == {"batch.ids.1", "batch.mask.1"}


@pytest.mark.parametrize("passes", ["cleanup,precision", "cleanup,kfac"])
def test_passes_make_the_same_of_it(passes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dims: Any = {"ids": {0: "batch", 1: "length"}}
    found = []
    for _ in range(2):
        net = _tagger(dynamic=dims, passes=passes)
        found.append([value for sizes in SIZES for value in _step(net, *sizes)])
        no_capture(monkeypatch)
    assert "by kept" in net.explain()  # type: ignore[operator]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_step_behind_such_a_graph_is_made_anew() -> None:
    first = _tagger()
    for sizes in SIZES:
        _step(first, *sizes)
    folder = graphopt.cache.folder("steps")
    assert len(list(folder.glob("*.json"))) == 1  # that of the first sizes


CHILD = """
import sys, torch, graphopt, hashlib
from tests.capture.test_kept_sizes import Tagger
torch.manual_seed(0)
net = graphopt.optimize(Tagger(), backend="eager")
for n, length in {sizes}:
    torch.manual_seed(n)
    net.zero_grad()
    y = net(torch.randint(0, 100, (n, length)))
    y.square().sum().backward()
    values = [y, *(p.grad for p in net.parameters())]
    print(hashlib.sha256(b"".join(v.detach().numpy().tobytes() for v in values)).hexdigest())
print([one.route for one in graphopt.model.surface.report(net).specialisations])
"""


@pytest.mark.slow
def test_a_second_process_finds_it_at_sizes_of_its_own() -> None:
    def run(sizes: object) -> list[str]:
        child = [sys.executable, "-c", CHILD.format(sizes=sizes)]
        root = Path(__file__).parents[2]
        made = subprocess.run(child, capture_output=True, text=True, check=True, cwd=root)
        return made.stdout.splitlines()

    first = run((*SIZES, *LATER[:2]))
    second = run(LATER[:2])
    assert first[-1] == "['dynamo', 'dynamo', 'dynamo']"
    assert second[-1] == "['kept']"
    assert second[:2] == first[3:5]
