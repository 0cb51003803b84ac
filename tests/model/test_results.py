"""Results of a step, taken up as hashes or in a file, tell what the results themselves tell."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.model import verification
from graphopt.model.comparison import Observed, compare
from graphopt.model.results import Filed, Marks
from graphopt.model.surface import report

VALUES = {
    "float": torch.randn(3, 4),
    "view": torch.randn(4, 3).t(),
    "number": torch.tensor(3),
    "empty": torch.zeros(0, 2),
    "short": torch.randn(5).bfloat16(),
    "complex": torch.randn(2, dtype=torch.complex64).conj(),
    "bool": torch.tensor([True, False]),
    "parameter": nn.Parameter(torch.ones(2)),
    "absent": None,
}


def marks(values: Mapping[str, object]) -> Mapping[Any, object] | None:
    found = Marks()
    for name, value in values.items():
        found[name] = value
    return found.found


def filed(values: Mapping[str, Tensor | None]) -> Filed:
    found = Filed()
    for name, value in values.items():
        found[name] = value
    return found


def test_equal_values_have_equal_marks() -> None:
    copies = {n: None if v is None else v.detach().clone() for n, v in VALUES.items()}
    assert marks(VALUES) == marks(copies)
    assert marks(VALUES).keys() == VALUES.keys()


def test_one_bit_form_or_name_changes_them() -> None:
    for name, value in VALUES.items():
        if value is None or value.numel() == 0:
            continue
        flat = value.detach().resolve_conj().contiguous().view(-1).clone()
        flat.view(torch.uint8)[-1] ^= 1
        assert marks({name: flat.view(value.shape)}) != marks({name: value}), name
        assert marks({name: value.reshape(1, *value.shape)}) != marks({name: value}), name
        assert marks({name: None}) != marks({name: value}), name


def test_what_has_no_plain_bits_has_none() -> None:
    assert marks({"sparse": torch.eye(2).to_sparse()}) is None
    assert marks({"meta": torch.ones(2, device="meta")}) is None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


def test_eager_runs_again_only_where_marks_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    run = verification.Trial._run

    def counted(self: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
        runs.append(getattr(call, "__qualname__", "?"))
        return run(self, call, *args, **kwargs)

    monkeypatch.setattr(verification.Trial, "_run", counted)
    model = graphopt.optimize(Net(), (torch.ones(2, 3),), backend="eager", cache="off")
    assert report(model).specialisations[0].verification.result == "bit-equal"
    assert len(runs) == 2
    runs.clear()
    monkeypatch.setattr(verification.Trial, "marks", lambda *_: object())
    model = graphopt.optimize(Net(), (torch.ones(2, 3),), backend="eager", cache="off")
    assert report(model).specialisations[0].verification.result == "bit-equal"
    assert len(runs) == 2  # by value, as marks were not asked for


# -- in a file -------------------------------------------------------------------------------------


def test_a_file_gives_back_every_bit_in_the_order_of_appearance() -> None:
    sparse = torch.eye(2).to_sparse()
    values = {**VALUES, "sparse": sparse, "nan": torch.tensor([float("nan"), -0.0])}
    found = filed(values)
    assert list(found) == list(values)
    assert found["sparse"] is not None
    assert found["sparse"].is_sparse
    plain = {name: value for name, value in values.items() if name != "sparse"}
    assert marks({name: found[name] for name in plain}) == marks(plain)


def test_a_result_that_comes_again_counts_as_it_is_then() -> None:
    found = filed({"a": torch.zeros(2), "b": torch.ones(1)})
    found["a"] = torch.ones(3)
    found["b"] = None
    assert len(found) == 2
    assert torch.equal(found["a"] if found["a"] is not None else torch.empty(0), torch.ones(3))
    assert found["b"] is None


def test_without_a_disk_results_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> object:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    value = torch.randn(3)
    kept = filed({"a": value})["a"]
    assert kept is not None
    assert kept.data_ptr() == value.data_ptr()


numbers = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8), st.integers(1, 3))
def test_comparing_in_parts_and_from_a_file_is_comparing(
    pairs: list[tuple[float, float]], part: int
) -> None:
    """The oracle is Python's own arithmetic on the numbers."""
    a, b = (torch.tensor(column) for column in zip(*pairs, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graphopt.model.comparison.PART", part)
        found = compare(Observed(filed({"x": a})), Observed(filed({"x": b})))
    finite = [abs(x) for x, _ in pairs if abs(x) < float("inf")]
    off = [abs(x - y) for x, y in pairs if not (x == y or (x != x and y != y))]
    scale = max(finite, default=0.0)
    if not off:
        assert found.equal
    elif any(x != x for x in off) or max(off) == float("inf"):
        assert found.error == float("inf")
    else:
        assert found.absolute == max(off)
        assert found.error == (max(off) / scale if scale else max(off))
