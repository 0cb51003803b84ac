"""Elementwise operators write into an operand that dies with them, and into no other memory."""

from __future__ import annotations

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import graphopt
from graphopt.runtime.backends.calls import bind, unpacked
from graphopt.runtime.backends.pieces import write_in_place
from graphopt.runtime.engine.halves import copy_graph

aten = torch.ops.aten
UNARY = ("relu", "gelu", "silu", "sigmoid", "tanh", "hardswish", "neg", "exp")
BINARY = ("add", "sub", "mul")
OTHERS = ("transposed", "row", "scaled", "masked", "chosen", "to_double", "softmax", "sum")
statements = st.lists(
    st.tuples(st.sampled_from((*UNARY, *BINARY, *OTHERS)), st.integers(0, 9), st.integers(0, 9)),
    min_size=2,
    max_size=10,
)


def _run(x: Tensor, program: list[tuple[str, int, int]], kept: int) -> list[Tensor]:
    """A line of values; the last `kept` are returned, and statements may read any earlier one."""
    values = [x, x * 1.5, x.cos()]
    for name, i, j in program:
        a, b = values[-1 - i % min(3, len(values))], values[-1 - j % len(values)]
        if name in UNARY:
            one: Tensor = getattr(aten, name)(a)
        elif name in BINARY:
            one = getattr(torch, name)(a, b)
        elif name == "transposed":
            one = a.t()
        elif name == "row":
            one = a[:1].expand(3, 3)
        elif name == "scaled":
            one = a * 0.5
        elif name == "masked":
            one = a.masked_fill(b > 0, 1.0)
        elif name == "chosen":
            one = torch.where(a > b, a, b)
        elif name == "to_double":
            one = a + b.double()
        elif name == "softmax":
            one = a.softmax(0)
        else:
            one = a.sum(0, keepdim=True) + b
        values.append(one)
    return values[-kept:]


@given(program=statements, kept=st.integers(1, 4))
def test_programs_compute_the_same(program: list[tuple[str, int, int]], kept: int) -> None:
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    module = make_fx(lambda v: _run(v, program, kept))(x)
    for node in module.graph.nodes:  # as captured graphs have it
        node.meta.setdefault("val", node.meta.get("tensor_meta"))
    expected, before = module(x), x.clone()
    module.graph = copy_graph(module.graph)
    write_in_place(module.graph)
    module.graph.lint()
    module.recompile()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(module(x), expected, strict=True))
    assert torch.equal(x, before)


def _targets(function: object, *values: Tensor) -> list[str]:
    module = make_fx(function, tracing_mode="fake")(*values)
    write_in_place(module.graph)
    return [str(n.target) for n in module.graph.nodes if n.op == "call_function"]


def test_the_operand_that_dies_is_written() -> None:
    weight = torch.randn(3, 3)
    assert _targets(lambda x: (x @ x).relu(), weight)[-1] == "aten.relu_.default"
    assert _targets(lambda x: x + x @ x, weight) == ["aten.mm.default", "aten.add.out"]
    assert "aten.mul_.Tensor" in _targets(lambda x: (x.exp(), x.exp() * 2), weight)


def test_what_is_read_or_returned_later_is_not() -> None:
    x = torch.randn(3, 3)
    assert _targets(lambda v: v.relu(), x) == ["aten.relu.default"]

    def returned(v: Tensor) -> tuple[Tensor, Tensor]:
        h = v @ v
        return h, h.relu()

    assert _targets(returned, x) == ["aten.mm.default", "aten.relu.default"]

    def wider(v: Tensor) -> Tensor:
        return (v @ v)[:1] + v

    assert "aten.add.Tensor" in _targets(wider, x)


ACTIVATIONS = (
    *(nn.ReLU(inplace=True), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Sigmoid(), nn.Tanh()),
    *(nn.Hardswish(), nn.Hardsigmoid(), nn.Hardtanh(), nn.ELU(), nn.LeakyReLU(0.1)),
)


def test_activations_have_the_gradients_of_eager() -> None:
    torch.manual_seed(0)
    layers = [m for activation in ACTIVATIONS for m in (nn.Linear(8, 8), activation)]
    plain = nn.Sequential(*layers)
    ours = graphopt.optimize(copy.deepcopy(plain), backend="eager", verify="off")
    x = torch.randn(4, 8)
    for model in (plain, ours):
        out = model(x.clone())
        out.square().sum().backward(retain_graph=True)
        out.sum().backward()
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_calls_are_bound_to_what_eager_calls() -> None:
    bound: dict[str, object] = {}
    assert bind("aten.relu.default", bound) == "op_aten_relu_default("
    assert bound["op_aten_relu_default"] is torch._C._VariableFunctions.relu
    assert bind("aten.view.default", bound) == "op_aten_view_default("
    assert bound["op_aten_view_default"] is torch._C.TensorBase.reshape
    # Without a function of its own it is the operator's.
    bind("aten.threshold_backward.default", bound)
    overload = aten.threshold_backward.default
    assert bound["op_aten_threshold_backward_default"] is overload._op


def test_arguments_are_unpacked_at_once() -> None:
    source = """def forward(self, args_list):
    args_iter = iter(args_list)
    a = next(args_iter)
    b_1 = next(args_iter)
    args_list.clear()
    return (a, b_1)
"""
    assert (
        unpacked(source)
        == """def forward(self, args_list):
    [a, b_1] = args_list
    args_list.clear()
    return (a, b_1)
"""
    )
