"""Code of Inductor sends what is ready before it computes on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives
from torch import fx
from torch._inductor import config
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from graphopt.runtime.backends import inductor_code
from graphopt.runtime.backends.inductor import Inductor

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
LAYERS = 6


@pytest.fixture(autouse=True)
def _a_job_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _backward() -> fx.GraphModule:
    """A message for every two gradients, and a large value that is made early and read late."""
    graph = fx.Graph()
    weights = [graph.placeholder(f"w{i}") for i in range(LAYERS)]
    inputs = [graph.placeholder(f"a{i}") for i in range(LAYERS)]
    value = given = graph.placeholder("given")

    def product(a: fx.Node, b: fx.Node, *, turned: bool = False) -> fx.Node:
        left = graph.call_function(aten.t.default, (a,)) if turned else a
        return graph.call_function(aten.mm.default, (left, b))

    large = product(given, graph.call_function(aten.t.default, (given,)))
    sent, flat = [], []
    for weight, x in zip(weights, inputs, strict=True):
        flat.append(graph.call_function(aten.view.default, (product(x, value, turned=True), [-1])))
        if len(flat) == 2:
            joined = graph.call_function(aten.cat.default, (flat,))
            group = dist.group.WORLD.group_name  # type: ignore[union-attr]
            sent.append(graph.call_function(c10d.all_reduce.default, (joined, "sum", group)))
            flat = []
        value = product(value, weight)
    waits = [graph.call_function(c10d.wait_tensor.default, (message,)) for message in sent]
    graph.output((value, product(large, inputs[0], turned=True), *waits))
    module = fx.GraphModule(torch.nn.Module(), graph)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        square, tall = torch.empty(32, 32), torch.empty(256, 32)
    values = [*[square] * LAYERS, *[tall] * LAYERS, tall]
    FakeTensorProp(module, mode).propagate_dont_convert_inputs(*values)
    return module


def _order(module: fx.GraphModule) -> str:
    """``c`` for each product and ``s`` for each message, in the order of the code."""
    code: list[str] = []
    with (
        mock.patch.object(GraphLowering, "save_output_code", code.append),
        config.patch(fx_graph_cache=False),
    ):
        Inductor().function(module)
    lines = code[-1][code[-1].index("def call(") :].splitlines()
    kinds = {r"extern_kernels\.mm\(": "c", r"all_reduce_?\.default\(": "s"}
    found = [k for line in lines for p, k in kinds.items() if re.search(rf"^[^#]*{p}", line)]
    return "".join(found)


def test_messages_go_before_what_is_computed_next() -> None:
    assert _order(_backward()) == "cccsccccsccccsccc"
    with mock.patch.object(inductor_code, "_sends", return_value=False):
        assert _order(_backward()) == "ccccccccsccsccccs"  # which has less memory at once


@pytest.mark.parametrize("wanted", [True, False])
def test_the_order_for_less_memory_stays_where_nothing_is_sent(wanted: bool) -> None:
    seen: list[Any] = []
    module = _backward()
    for node in list(module.graph.nodes):
        if node.target in (c10d.all_reduce.default, c10d.wait_tensor.default):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    from torch._inductor import compile_fx

    inner = compile_fx.compile_fx_inner

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(config.reorder_for_peak_memory)
        return inner(*args, **kwargs)

    with (
        mock.patch.object(compile_fx, "compile_fx_inner", watched),
        config.patch(reorder_for_peak_memory=wanted),
    ):
        Inductor().function(module)
    assert seen == [wanted]
