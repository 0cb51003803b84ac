"""What cannot be used is refused in one sentence, with one thing to try; what is odd works."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graphopt import hierarchical as h
from graphopt.errors import ArgumentError
from tests.hierarchical.oracles import distances, points

_DOUBLE = torch.float64


def _tree(n: int = 50, d: int = 2) -> h.ClusterTree:
    return h.by_points(points("uniform", n, d), 16)


def _nan() -> Tensor:
    found = points("uniform", 10, 2)
    found[3, 1] = float("nan")
    return found


def _infinite() -> Tensor:
    found = torch.eye(50)
    found[7, 9] = float("inf")
    return found


CASES: dict[str, tuple[Callable[[], object], str]] = {
    "no points": (lambda: h.by_points(torch.empty(0, 2)), "no rows"),
    "no rows": (lambda: h.by_index(0), "no rows"),
    "no coordinates": (lambda: h.by_points(torch.empty(5, 0)), "no coordinates"),
    "nan": (lambda: h.by_points(_nan()), "point 3 is not finite"),
    "integers": (lambda: h.by_points(torch.zeros(5, 2, dtype=torch.int64)), "float tensor"),
    "one list": (lambda: h.by_points(torch.zeros(5)), r"\(5,\)"),
    "leaf": (lambda: h.by_points(torch.zeros(5, 1), 1), "leaf=1"),
    "eta": (lambda: h.Strong(0.0), "eta=0.0"),
    "scale": (lambda: h.Gaussian(scale=0.0), "scale"),
    "nan scale": (lambda: h.Gaussian(scale=float("nan")), "scale"),
    "variance": (lambda: h.Gaussian(variance=float("inf")), "variance"),
    "scales": (
        lambda: h.from_kernel(h.Gaussian(scale=torch.ones(3)), _tree()),
        "3 entries for points of 2",
    ),
    "tolerance": (lambda: h.from_kernel(h.Gaussian(), _tree(), tolerance=0.0), "tolerance of 0"),
    "no geometry": (lambda: h.from_kernel(h.Gaussian(), h.by_index(40)), "no points"),
    "spaces": (lambda: h.from_kernel(h.Gaussian(), _tree(), _tree(9, 1)), "2 and of 1"),
    "infinite kernel": (
        lambda: h.from_kernel(h.InverseDistance(at_zero=float("inf")), _tree()),
        "not finite",
    ),
    "dense shape": (lambda: h.from_dense(torch.eye(49), _tree()), r"\[50, 50\]"),
    "dense integers": (lambda: h.from_dense(torch.eye(50).long(), _tree()), "float tensor"),
    "dense infinite": (lambda: h.from_dense(_infinite(), _tree()), r"\(7, 9\)"),
    "dense half": (lambda: h.from_dense(torch.eye(50).half(), _tree()), "float16"),
    "entries": (
        lambda: h.from_entries(lambda i, j: torch.zeros(len(i)), _tree()),
        "return a tensor of",
    ),
    "operand": (
        lambda: h.from_kernel(h.Gaussian(), _tree()) @ torch.ones(49, dtype=_DOUBLE),
        r"50 x 50 times \(49,\)",
    ),
    "no tensor": (lambda: h.by_points([[0.0, 1.0]]), "points are a list"),  # type: ignore[arg-type]
    "kernel in half": (lambda: h.from_kernel(h.Gaussian(), _tree(), dtype=torch.half), "float16"),
    "entries in half": (
        lambda: h.from_entries(lambda i, j: torch.zeros(len(i), len(j)), _tree(), dtype=torch.half),
        "float16",
    ),
    "a number for a kernel": (lambda: h.from_kernel(lambda x, y: 1.0, _tree()), "to float"),  # type: ignore[arg-type, return-value]
    "kernel shape": (
        lambda: h.from_kernel(lambda x, y: torch.ones(3), _tree()),
        r"\[20000, 1, 2\] and \[20000, 1, 2\] to \[3\]",
    ),
    "one-sided kernel": (
        lambda: h.from_kernel(lambda x, y: x[..., :, None, 0] - y[..., None, :, 0], _tree()),
        "not symmetric",
    ),
    "nan kernel": (
        lambda: h.from_kernel(lambda x, y: h.Gaussian()(x, y) * float("nan"), _tree()),
        "not finite",
    ),
    "huge points": (
        lambda: h.from_kernel(h.Matern32(), h.by_points(1e200 * points("uniform", 50, 2), 16)),
        "not finite",
    ),
    "nan entries": (
        lambda: h.from_entries(lambda i, j: torch.full((len(i), len(j)), float("nan")), _tree()),
        "entries are not finite",
    ),
    "nan operand": (
        lambda: h.from_kernel(h.Gaussian(), _tree()).apply(torch.full((50,), torch.nan).double()),
        "operand is not finite",
    ),
    "operand dtype": (lambda: h.from_kernel(h.Gaussian(), _tree()) @ torch.ones(50), "float32"),
    "nothing": (lambda: h.HMatrix(None, _tree(), _tree(), 0.0), "without blocks"),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_refusals(case: str) -> None:
    run, message = CASES[case]
    with pytest.raises(ArgumentError, match=message) as caught:
        run()
    assert caught.value.hint


def test_a_tolerance_out_of_reach_names_the_reachable_one() -> None:
    x = points("uniform", 120, 2)
    tree, values = h.by_points(x, 16), torch.exp(-distances(x, x))
    runs: list[Callable[[float], h.HMatrix]] = [
        lambda t: h.from_kernel(h.Exponential(), tree, tolerance=t, dtype=torch.float32),
        lambda t: h.from_dense(values, tree, tolerance=t, dtype=torch.float32),
        lambda t: h.from_entries(
            lambda i, j: values[i][:, j], tree, tolerance=t, dtype=torch.float32
        ),
    ]
    for run in runs:
        with pytest.raises(ArgumentError, match=r"out of reach of torch\.float32") as caught:
            run(1e-9)
        reachable = float(str(caught.value).split(": ")[1].split(" was")[0])
        assert 1e-9 < reachable < 1e-5
        assert run(2 * reachable).bound <= 2 * reachable * float(values.norm())
    with pytest.raises(ArgumentError, match=r"out of reach of torch\.float64: .*e-1[4-6] was"):
        h.from_kernel(h.Exponential(), tree, tolerance=1e-17)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 1, dtype=_DOUBLE),
        torch.zeros(40, 3, dtype=_DOUBLE),
        torch.zeros(40, 3).repeat(2, 1)[::2],
        points("uniform", 3, 2),
        points("line", 200, 3),
        points("grid", 200, 3),
        points("uniform", 2, 200, 0).T,
        torch.cat([torch.zeros(99, 2), torch.ones(1, 2)]).double(),
        points("uniform", 100, 2).float(),
    ],
    ids=["one", "same", "strided", "few", "line", "grid", "transposed", "apart", "single"],
)
def test_odd_points(x: Tensor) -> None:
    exact = torch.exp(-distances(x, x))
    found = h.from_kernel(h.Exponential(), h.by_points(x, 8), tolerance=1e-7)
    assert float((found.dense() - exact).norm()) <= found.bound
    v = torch.ones(2, len(x), dtype=_DOUBLE).T
    assert float((found.apply(v).value - exact @ v).norm(dim=0).max()) <= found.apply(v).bound
