"""Graphs for Inductor as data and back: the same nodes, names, forms and results."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx
from torch._subclasses import FakeTensorMode

from graphopt.graph import Graph
from graphopt.runtime.backends.inductor_code import mode_of
from graphopt.runtime.backends.kept_graph import graph_data, module_of, retold
from graphopt.runtime.backends.kept_words import Unreadable, Untold
from graphopt.testing import inference_graphs, inputs_for, joint_graphs
from tests.capture.test_kept_damaged import _places

aten = torch.ops.aten
SLOW = [HealthCheck.too_slow]


@settings(max_examples=40, deadline=None, suppress_health_check=SLOW)
@given(graph=st.one_of(joint_graphs(), inference_graphs()))
def test_a_graph_computes_what_it_did(graph: Graph) -> None:
    data = json.loads(json.dumps(graph_data(graph.module)))
    made, again = (module_of(data, FakeTensorMode()) for _ in range(2))
    assert made.code == again.code  # Inductor's code is kept under it
    for node, same in zip(graph.inputs, made.graph.find_nodes(op="placeholder"), strict=True):
        one, other = node.meta["val"], same.meta["val"]
        for what in ("shape", "dtype", "device"):
            assert getattr(one, what) == getattr(other, what)
        assert one.stride() == other.stride()
    results = []
    for module in (graph.module, made):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(fx.Interpreter(module).run(*inputs_for(graph)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) or (one.isnan() == other.isnan()).all()
        assert one.stride() == other.stride()


@settings(max_examples=20, deadline=None, suppress_health_check=SLOW)
@given(graph=joint_graphs())
def test_what_is_known_of_nodes_stays(graph: Graph) -> None:
    module = graph.module
    data = graph_data(module)
    same = retold(module, data, mode_of(module))
    assert same.code == module_of(data, FakeTensorMode()).code
    known = [n.meta for n in module.graph.nodes if n.op == "call_function"]
    kept = [n.meta for n in same.graph.nodes if n.op == "call_function"]
    assert kept == known


def _module(*forms: tuple[tuple[int, ...], tuple[int, ...]]) -> fx.GraphModule:
    graph, mode = fx.Graph(), FakeTensorMode()
    inputs = []
    for index, (size, stride) in enumerate(forms):
        inputs.append(graph.placeholder(f"x{index}"))
        with mode:
            inputs[-1].meta["val"] = torch.empty_strided(size, stride)
    root = torch.nn.Module()
    root.register_buffer("two", torch.tensor(2.0))
    total = graph.call_function(aten.mul.Tensor, (inputs[0], graph.get_attr("two")))
    graph.output((graph.call_function(aten.sum.dim_IntList, (total, [0])), None))
    return fx.GraphModule(root, graph)


def test_a_graph_is_short_data() -> None:
    module = _module(((2, 3), (1, 2)))
    data = graph_data(module)
    assert data == {
        "inputs": 1,
        "forms": [[[2, 3], [1, 2], 0, "float32", "cpu"]],
        "constants": [{"dtype": "float32", "shape": [], "stride": [], "bytes": "00000040"}],
        "operators": ["aten.mul.Tensor", "aten.sum.dim_IntList"],
        "lines": [[0, [{"v": 0}, {"c": 0}]], [1, [{"v": 1}, [0]]]],
        "returns": [{"v": 2}, None],
    }
    total, nothing = module_of(data, FakeTensorMode())(torch.ones(2, 3))
    assert total.tolist() == [4.0, 4.0, 4.0]
    assert nothing is None


def test_where_an_input_begins_in_its_memory_is_told() -> None:
    module = _module(((4, 3), (3, 1)))
    node = module.graph.find_nodes(op="placeholder")[0]
    node.meta["val"] = node.meta["val"][1:, 1:]
    data = graph_data(module)
    assert data["forms"] == [[[3, 2], [3, 1], 4, "float32", "cpu"]]
    (same,) = module_of(data, FakeTensorMode()).graph.find_nodes(op="placeholder")
    assert same.meta["val"].storage_offset() == 4
    assert same.meta["val"].stride() == (3, 1)


@pytest.mark.parametrize("form", [((0, 3), (3, 1)), ((2, 3), (0, 1)), ((), ())])
def test_forms_are_those_of_the_inputs(form: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    module = _module(((2, 3), (3, 1)))
    node = module.graph.find_nodes(op="placeholder")[0]
    with FakeTensorMode():
        node.meta["val"] = torch.empty_strided(*form)
    (same,) = module_of(graph_data(module), FakeTensorMode()).graph.find_nodes(op="placeholder")
    assert (same.meta["val"].shape, same.meta["val"].stride()) == form


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: 3, "no plain tensor"),
        (lambda x: x.to(torch.complex64).conj(), "an input is conjugated"),
        (lambda x: x.to_sparse(), "no plain tensor"),
    ],
)
def test_what_is_no_data_is_not_told(change: Callable[[Any], Any], said: str) -> None:
    module = _module(((2, 3), (3, 1)))
    node = module.graph.find_nodes(op="placeholder")[0]
    node.meta["val"] = change(node.meta["val"])
    with pytest.raises(Untold, match=said):
        graph_data(module)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"operators": ["os.system"]}, "code may not call 'os.system'"),
        ({"operators": ["aten.from_file.default"]}, "code may not call"),
        ({"forms": []}, "it has no such inputs"),
        ({"forms": [[[2, -3], [1, 2], 0, "float32", "cpu"]]}, "an input of no form"),
        ({"forms": [[[2], [1, 2], 0, "float32", "cpu"]]}, "argument 2 is longer"),
        ({"forms": [[[2**40, 2**40], [1, 2], 0, "float32", "cpu"]]}, "an input of no form"),
        ({"forms": [[[2], [1], -1, "float32", "cpu"]]}, "an input of no form"),
        ({"forms": [[[2], [1], 2**60, "float32", "cpu"]]}, "an input of no form"),
        ({"forms": [[[2], [1], 0, "load", "cpu"]]}, "there is no 'load'"),
        ({"lines": [[0, [{"v": 9}, {"v": 0}]]]}, "a value that there is not"),
        ({"lines": [[0, [{"v": 0}, "x"]]]}, "other should be Tensor, and is str x"),
        ({"lines": [[1, [{"v": 0}]]]}, "the argument dim is missing"),
        ({"returns": [{"torch": "load"}]}, "there is no 'load'"),
        ({"returns": 3}, "not iterable"),
    ],
)
def test_data_that_is_no_graph_is_refused(change: dict[str, Any], said: str) -> None:
    data = {**graph_data(_module(((2, 3), (3, 1)))), **change}
    with pytest.raises(Unreadable, match=said):
        module_of(data, FakeTensorMode())


@settings(max_examples=100, deadline=None)
@given(draw=st.data())
def test_whatever_is_edited_is_a_graph_or_none(draw: st.DataObject) -> None:
    edited = json.loads(json.dumps(graph_data(_module(((2, 3), (3, 1))))))
    path = draw.draw(st.sampled_from(sorted(filter(None, _places(edited)), key=str)))
    junk = st.sampled_from([None, 0, -1, 10**9, 1.5, "", "x", "a.b", [], {}, True, [[]], {"v": 1}])
    at = edited
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = draw.draw(junk)
    with contextlib.suppress(Unreadable):
        assert isinstance(module_of(edited, FakeTensorMode()), fx.GraphModule)
