"""Code of the eager backend as data and back: the same results, and values die where they did."""

from __future__ import annotations

import gc
import json
import operator
import weakref
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from graphopt.graph import Graph
from graphopt.runtime.backends.kept_code import code_data, code_of
from graphopt.runtime.backends.kept_words import Unreadable, Untold
from graphopt.testing import inference_graphs, inputs_for, joint_graphs

aten = torch.ops.aten


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graph=st.one_of(joint_graphs(), inference_graphs()))
def test_code_computes_what_the_graph_does(graph: Graph) -> None:
    data = json.loads(json.dumps(code_data(graph.fx, graph.module)))
    code = code_of(data)
    results = []
    for run in (fx.Interpreter(graph.module).boxed_run, code.run):
        torch.manual_seed(0)
        given = inputs_for(graph)
        with torch.no_grad():
            results.append(run(given))
        assert not given
    assert (code.inputs, code.results) == (len(graph.inputs), len(graph.outputs))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) or (one.isnan() == other.isnan()).all()
        assert one.stride() == other.stride()


def _graph() -> fx.GraphModule:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    total = graph.call_function(aten.sum.dim_IntList, (x, [0]), {"dtype": torch.float64})
    made = graph.call_function(
        aten.full.default, ([2, 3], float("inf")), {"device": torch.device("cpu")}
    )
    graph.call_function(aten.add_.Tensor, (made, y))
    large = graph.call_function(aten.max.dim, (made, 0))
    first = graph.call_function(operator.getitem, (large, 0))
    graph.output((total, first, None))
    return fx.GraphModule(torch.nn.Module(), graph)


def test_code_is_short_data() -> None:
    module = _graph()
    assert code_data(module.graph, module) == {
        "inputs": 2,
        "constants": [],
        "operators": [
            "aten.sum.dim_IntList", "aten.full.default", "aten.add_.Tensor", "aten.max.dim",
            "getitem",
        ],
        "lines": [
            [0, [{"v": 0}, [0]], {"dtype": {"torch": "float64"}}],
            [1, [[2, 3], float("inf")], {"device": {"device": "cpu"}}],
            [2, [{"v": 3}, {"v": 1}]],
            [3, [{"v": 3}, 0]],
            [4, [{"v": 5}, 0]],
        ],
        "returns": [{"v": 2}, {"v": 6}, None],
    }  # fmt: skip
    total, first, nothing = code_of(code_data(module.graph, module)).run(
        [torch.ones(2), torch.zeros(3)]
    )
    assert total.dtype is torch.float64
    assert first.tolist() == [float("inf")] * 3
    assert nothing is None


def test_values_die_where_they_are_read_last() -> None:
    alive: list[Any] = []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            alive.append(sum(r() is not None for r in seen))
            out = func(*args, **(kwargs or {}))
            seen.append(weakref.ref(out))
            return out

    graph = fx.Graph()
    value = graph.placeholder("x")
    for _ in range(6):
        value = graph.call_function(aten.neg.default, (value,))
    graph.output((value,))
    module = fx.GraphModule(torch.nn.Module(), graph)
    run = code_of(code_data(graph, module)).run
    seen: list[weakref.ref[Tensor]] = []
    gc.collect()
    with Watched():
        run([torch.ones(3)])
    assert max(alive) <= 1


def test_what_is_no_data_is_not_told() -> None:
    graph = fx.Graph()
    graph.output((graph.call_function(print, ()),))
    with pytest.raises(Untold, match="there is no name for <built-in function print>"):
        code_data(graph, torch.nn.Module())
    graph = fx.Graph()
    graph.output((graph.get_attr("weight"),))
    with pytest.raises(Untold, match="it holds a constant that is large, or no plain tensor"):
        code_data(graph, torch.nn.Linear(200, 200))


def test_constants_are_the_same_bits() -> None:
    """As a mask has them."""
    graph, module = fx.Graph(), torch.nn.Module()
    module.mask = torch.randn(64, 64).t()
    graph.output((graph.get_attr("mask"),))
    (found,) = code_of(json.loads(json.dumps(code_data(graph, module)))).run([])
    assert torch.equal(found, module.mask)
    assert found.stride() == (1, 64)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("os.system", ["ls"], "code may not call"),
        ("aten.from_file.default", ["/etc/passwd"], "code may not call"),
        ("aten.add.Tensor", [{"v": 0}, {"v": 1}], "an argument that there is not|there is no"),
        ("aten.add.Tensor", [{"v": 0}, "x"], "other should be Tensor, and is str x"),
        ("aten.add.Tensor", [{"v": 0}], "the argument other is missing"),
        ("aten.sum.default", [{"v": 0, "c": 1}], "too many values"),
        ("aten.sum.default", [{"torch": "load"}], "there is no 'load'"),
        ("getitem", [{"v": 0}, "__class__"], "a line takes nothing"),
    ],
)
def test_data_that_is_no_code_is_refused(name: str, arguments: list[Any], said: str) -> None:
    data = {"inputs": 1, "constants": [], "operators": [name], "returns": []}
    with pytest.raises(Unreadable, match=said):
        code_of({**data, "lines": [[0, arguments]]})
