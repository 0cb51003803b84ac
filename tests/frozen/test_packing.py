"""Packed kernels against what fused convolutions and products mean, and models around them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import graphopt
from graphopt.capture import capture
from graphopt.ops.convolution import POSTS, reference
from graphopt.runtime.backends.eager import boxed
from graphopt.runtime.frozen import sites, worth
from graphopt.runtime.frozen.fusions import FUSED, fuse
from graphopt.runtime.frozen.packing import pack
from graphopt.runtime.frozen.prologue import Hoisted, hoist
from graphopt.runtime.frozen.sites import linears

aten = torch.ops.aten

SCALARS: dict[str, tuple[list[float], str]] = {
    "hardtanh": ([-0.5, 2.0], ""),
    "leaky_relu": ([0.2], ""),
    "gelu": ([], "tanh"),
}


def cut(model: nn.Module, *inputs: Tensor, spec: str = "cleanup,fold_inference") -> Hoisted:
    with torch.no_grad():
        graph = capture(model.eval(), inputs).graph
    graphopt.Pipeline.parse(spec).run(graph)
    return hoist(graph.module)


def fused_call(x: Tensor, weight: Tensor, *rest: Any) -> Hoisted:
    """A module of one fused convolution with a frozen weight."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x"), graph.placeholder("w")]
    frozen = graph.call_function(torch.ops.graphopt.frozen.default, (nodes[1],))
    tensors = [t for t in rest if isinstance(t, Tensor)]
    given = iter([graph.placeholder(f"t{i}") for i in range(len(tensors))])
    arguments = [next(given) if isinstance(a, Tensor) else a for a in rest]
    y = graph.call_function(FUSED, (nodes[0], frozen, *arguments))
    graph.output([y])
    for node, value in zip(graph.find_nodes(op="placeholder"), (x, weight, *tensors), strict=True):
        node.meta["val"] = value
    frozen.meta["val"] = weight
    y.meta["val"] = reference(x, weight, *rest)
    return hoist(fx.GraphModule({}, graph))


@settings(max_examples=40, deadline=None)
@given(
    channels=st.sampled_from([(3, 8), (8, 8), (4, 12)]),
    size=st.integers(5, 9),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    grouped=st.booleans(),
    bias=st.booleans(),
    added=st.booleans(),
    post=st.sampled_from(sorted(POSTS)),
    sums=st.booleans(),
    seed=st.integers(0, 99),
)
def test_packed_convolution_is_what_it_stands_for(
    channels: tuple[int, int],
    size: int,
    stride: int,
    padding: int,
    dilation: int,
    grouped: bool,
    bias: bool,
    added: bool,
    post: str,
    sums: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    inputs, outputs = channels
    groups = 4 if grouped and inputs % 4 == 0 else 1
    x, weight = torch.randn(2, inputs, size, size), torch.randn(outputs, inputs // groups, 3, 3)
    offset = torch.randn(outputs) if bias else None
    geometry = ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
    post = post if not added or post == "relu" else "none"
    function = (post, *SCALARS.get(post, ([], "none" if post == "gelu" else "")))
    plain = reference(x, weight, offset, *geometry, None, "none", [], "")
    other = torch.randn_like(plain) if added else None
    hoisted = fused_call(x, weight, offset, *geometry, other, *function)
    assert len(pack(hoisted, (), sums).convolutions) == 1
    hoisted.prune()
    tensors = [t for t in (offset, other) if t is not None]
    kept = boxed(hoisted.prologue)([weight])
    (actual,) = boxed(hoisted.main)([x, weight, *tensors, *kept])
    expected = reference(
        *(t if t is None else t.double() for t in (x, weight, offset)),
        *geometry,
        None if other is None else other.double(),
        *function,
    )
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-4)


FUNCTIONS = [
    *(nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 2.0), nn.Sigmoid(), nn.Tanh(), nn.Hardswish()),
    *(nn.Hardsigmoid(), nn.SiLU(), nn.LeakyReLU(0.2), nn.GELU(), nn.GELU("tanh")),
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=repr)
def test_function_after_a_convolution_is_fused(function: nn.Module) -> None:
    hoisted = cut(nn.Sequential(nn.Conv2d(3, 4, 3), function), torch.randn(1, 3, 6, 6))
    (node,) = fuse(hoisted.main.graph, hoisted.kept)
    call = [n for n in hoisted.main.graph.nodes if n.op == "call_function"]
    assert call == [node]
    y = torch.randn(50)
    torch.testing.assert_close(POSTS[node.args[8]](y, *node.args[9:]), function(y))


@pytest.mark.parametrize("function", [nn.ELU(), nn.Softplus(), nn.Mish()], ids=repr)
def test_other_functions_stay(function: nn.Module) -> None:
    hoisted = cut(nn.Sequential(nn.Conv2d(3, 4, 3), function), torch.randn(1, 3, 6, 6))
    (node,) = fuse(hoisted.main.graph, hoisted.kept)
    assert node.args[8] == "none"


class Layers(nn.Module):
    """Two products with weights, one of them an attention's projection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.last = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.attention(x, x, x, need_weights=False)[0])
        return y


@pytest.mark.skipif(not torch._C.has_mkl, reason="this build has no MKL")
def test_linear_layers_and_projections_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "is_faster", lambda what, make: bool(make()))
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(2, 5, 16)
    hoisted = cut(model, x)
    packed = pack(hoisted, linears(hoisted.main.graph, hoisted.kept), sums=True)
    assert len(packed.linears) == 3
    folded = graphopt.optimize(
        copy.deepcopy(model), passes="cleanup,fold_inference", backend="eager"
    )
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-6)


def test_slower_kernels_are_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def never(what: str, make: object) -> bool:
        asked.append(what)
        return False

    monkeypatch.setattr(sites, "is_faster", never)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    hoisted = cut(model, torch.randn(2, 3, 6, 6))
    assert not fuse(hoisted.main.graph, hoisted.kept, sites.convolution_is_faster)
    assert not any(map(sites.linear_is_faster, linears(hoisted.main.graph, hoisted.kept)))
    assert [what.split()[0] for what in asked] == ["convolution", "linear"]


def test_times_are_kept_and_what_is_no_time_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def make() -> Any:
        calls.append(1)
        return (lambda: None), (lambda: sum(range(20_000)))

    assert worth.is_faster("this", make)
    assert worth.is_faster("this", make)
    assert len(calls) == 1
    (file,) = tmp_path.rglob("*.json")
    file.write_text('{"what": "this", "packed": -1, "plain": 2}')
    assert worth.is_faster("this", make)
    assert len(calls) == 2


def test_bfloat16_layers_are_packed_where_precision_lowers_them() -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16 kernels")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)).eval()
    x = torch.randn(2, 3, 10, 10)
    with torch.autocast("cpu"):
        hoisted = cut(model, x)
        folded = graphopt.optimize(
            copy.deepcopy(model), passes="cleanup,fold_inference", backend="eager"
        )
        with torch.no_grad():
            actual, expected = folded(x), model(x)
    fused = fuse(hoisted.main.graph, hoisted.kept)
    assert [node.meta["val"].dtype for node in fused] == [torch.bfloat16] * 2
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_weights_that_change_reach_packed_layers(backend: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(sites, "is_faster", lambda what, make: True)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 8, 1)),
        *(nn.Flatten(), nn.Linear(128, 4)),
    ).eval()
    x = torch.randn(2, 3, 6, 6)
    folded = graphopt.optimize(
        copy.deepcopy(model), passes="cleanup,fold_inference", backend=backend
    )
    for change in ("mul_", "add_", "data"):
        with torch.no_grad():
            torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
            for changed in (model, folded):
                for value in changed.parameters():
                    if change == "data":
                        value.data = value.data * -0.5
                    else:
                        getattr(value, change)(0.7)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_precision_lowers_what_is_folded_and_its_casts_are_kept() -> None:
    """Folded in float32 first; frozen again, casts of folded weights are kept as well."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16 kernels")
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(16)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    layers = (nn.Conv2d(3, 16, 3), norm, nn.ReLU(), nn.Conv2d(16, 4, 3))
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 3, 10, 10)
    spec = "cleanup,fold_inference,precision{policy=tf},fold_inference"
    hoisted = cut(copy.deepcopy(model), x, spec=spec)
    fused = fuse(hoisted.main.graph, hoisted.kept)
    assert [node.meta["val"].dtype for node in fused] == [torch.bfloat16] * 2
    lowered = graphopt.optimize(copy.deepcopy(model), passes=spec, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(lowered(x), model(x), rtol=3e-2, atol=3e-2)
            for changed in (lowered, model):
                for weight in changed.parameters():
                    weight.data.mul_(0.8)
