"""Folding batch norm and freezing weights, on small graphs and on captured models."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from graphopt.capture import capture
from graphopt.errors import SpecError
from graphopt.graph import Graph, Level
from graphopt.passbase import PassContext
from graphopt.passes.fold_inference import FoldInference
from graphopt.pipeline import Pipeline
from graphopt.pipeline.spec import parse_spec
from graphopt.plan import Role
from graphopt.testing import run_graph
from tests.support.applying import applied, golden, reasons, targets
from tests.support.graphs import Builder, aten, linear_graph, mutation, output

CONVOLUTION = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)


def normalised(b: Builder, value: fx.Node, features: int = 3, eps: float = 1e-5) -> fx.Node:
    """A batch norm of `value` with parameters and statistics of its own."""
    roles = {"gamma": Role.PARAM, "beta": Role.PARAM, "mean": Role.BUFFER, "var": Role.BUFFER}
    given = [b.input(role, name, (features,)) for name, role in roles.items()]
    norm = aten._native_batch_norm_legit_no_training.default
    return b.call(operator.getitem, b.call(norm, value, *given, 0.1, eps), 0)


def image(b: Builder) -> fx.Node:
    return b.input(Role.INPUT, "0", (2, 2, 4, 4))


def convolved(b: Builder, x: fx.Node, weight: fx.Node | None = None) -> fx.Node:
    weight = weight or b.input(Role.PARAM, "w", (3, 2, 3, 3))
    return b.call(aten.convolution.default, x, weight, None, *CONVOLUTION)


def inference(b: Builder, y: fx.Node) -> Graph:
    # Parameters were made as they were needed; placeholders come first.
    for node in reversed([n for n in b.fx.nodes if n.op == "placeholder"]):
        next(iter(b.fx.nodes)).prepend(node)
    return b.build({output(): y}, Level.INFERENCE)


def test_golden() -> None:
    golden(FoldInference())


# -- batch norm ------------------------------------------------------------------------------------


def shaken(model: nn.Module) -> nn.Module:
    """In evaluation mode, with weights and statistics that are not those of a new model."""
    torch.manual_seed(0)
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.5)
    return model.eval()


def folded(model: nn.Module, *inputs: Tensor) -> tuple[Graph, list[Tensor]]:
    with torch.no_grad():
        captured = capture(model, inputs)
    applied(FoldInference(), captured.graph)
    return captured.graph, list(captured.inputs)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(2, 3, 3), (2, 2, 5)),
        (nn.Conv2d(2, 3, 3, bias=False), (2, 2, 5, 5)),
        (nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1, dilation=2), (2, 4, 7, 7)),
        (nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3)),
        (nn.ConvTranspose2d(2, 3, 3, output_padding=1, stride=2), (2, 2, 4, 4)),
    ],
)
@pytest.mark.parametrize("affine", [True, False])
def test_same_weights_as_pytorch_s_own_fusion(
    layer: nn.Module, shape: tuple[int, ...], affine: bool
) -> None:
    norms = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    norm = norms[len(shape)](layer.out_channels, affine=affine)
    model = shaken(nn.Sequential(copy.deepcopy(layer), norm))
    fused = fuse_conv_bn_eval(model[0], norm, transpose="Transpose" in type(layer).__name__)
    graph, inputs = folded(model, torch.randn(shape))
    assert targets(graph).count("frozen") == 2
    weight, bias = frozen_values(graph, inputs)
    torch.testing.assert_close(weight, fused.weight.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bias, fused.bias.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layer_takes_up_its_norm(bias: bool) -> None:
    model = shaken(nn.Sequential(nn.Linear(4, 3, bias=bias), nn.BatchNorm1d(3)))
    graph, inputs = folded(model, torch.randn(5, 4))
    assert targets(graph)[-1] == "addmm"
    plain = model[0] if bias else nn.Linear(4, 3)
    if not bias:
        plain.weight, plain.bias = model[0].weight, nn.Parameter(torch.zeros(3))
    fused = fuse_linear_bn_eval(plain.eval(), model[1])
    weight, offset = frozen_values(graph, inputs)
    torch.testing.assert_close(weight.t(), fused.weight.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(offset, fused.bias.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 3, 3), (2, 4, 5)),
        (nn.Conv2d(4, 3, 3, bias=False), (2, 4, 5, 5)),
        (nn.Conv2d(4, 6, 3, groups=2, stride=2, dilation=2), (2, 4, 7, 7)),
        (nn.Conv2d(4, 4, 1, groups=4), (2, 4, 3, 3)),
        (nn.Linear(4, 3), (5, 4)),
        (nn.Linear(4, 3, bias=False), (5, 4)),
    ],
    ids=["1d", "2d", "grouped", "depthwise", "linear", "linear without bias"],
)
@pytest.mark.parametrize("affine", [True, False])
def test_layer_takes_up_the_norm_before_it(
    layer: nn.Module, shape: tuple[int, ...], affine: bool
) -> None:
    norms = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    model = shaken(nn.Sequential(norms[len(shape)](4, affine=affine), copy.deepcopy(layer)))
    x = torch.randn(shape)
    graph, inputs = folded(model, x)
    assert not [name for name in targets(graph) if "batch_norm" in name]
    expected = copy.deepcopy(model).double()(x.double()).float()
    torch.testing.assert_close(run_graph(graph, inputs)[0], expected, rtol=1e-5, atol=1e-5)


def frozen_values(graph: Graph, inputs: list[Tensor]) -> list[Tensor]:
    """The two values that are frozen: weight, then bias."""
    shown = graph.copy()
    last = [n for n in shown.operators if "frozen" not in str(n.target)][-1]
    nodes = [n for n in last.all_input_nodes if "frozen" in str(n.target)]
    weight, bias = sorted(nodes, key=lambda n: -n.meta["val"].dim())
    shown.set_outputs({output("0"): weight, output("1"): bias})
    return run_graph(shown, inputs)


def test_folded_graph_follows_its_weights() -> None:
    model = shaken(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)))
    x = torch.randn(2, 2, 4, 4)
    graph, inputs = folded(model, x)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(-2)
        model[1].running_mean.add_(1)
        expected = model(x)
    torch.testing.assert_close(run_graph(graph, inputs)[0], expected, rtol=1e-5, atol=1e-5)


def test_two_norms_in_a_row_both_fold() -> None:
    model = shaken(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
    graph, _ = folded(model, torch.randn(2, 2, 4, 4))
    assert targets(graph)[-1] == "convolution"
    assert targets(graph).count("frozen") == 2


def test_statistics_computed_after_the_layer_can_be_folded() -> None:
    b = Builder()
    y = convolved(b, image(b))
    var = b.call(aten.square.default, b.input(Role.BUFFER, "std", (3,)))
    mean = b.input(Role.BUFFER, "mean", (3,))
    norm = aten._native_batch_norm_legit_no_training.default
    y = b.call(operator.getitem, b.call(norm, y, None, None, mean, var, 0.1, 1e-5), 0)
    graph = inference(b, y)
    assert reasons(applied(FoldInference(), graph)) == []
    assert targets(graph)[-1] == "convolution"


def shared(b: Builder) -> fx.Node:
    y = convolved(b, image(b))
    return b.call(aten.add.Tensor, normalised(b, y), y)


def after_relu(b: Builder) -> fx.Node:
    return normalised(b, b.call(aten.relu.default, convolved(b, image(b))))


def before_padding(b: Builder) -> fx.Node:
    weight = b.input(Role.PARAM, "w", (3, 2, 3, 3))
    padded = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    return b.call(aten.convolution.default, normalised(b, image(b), 2), weight, None, *padded)


def before_transposed(b: Builder) -> fx.Node:
    weight = b.input(Role.PARAM, "w", (2, 3, 3, 3))
    transposed = ([1, 1], [0, 0], [1, 1], True, [0, 0], 1)
    return b.call(aten.convolution.default, normalised(b, image(b), 2), weight, None, *transposed)


def dynamic(b: Builder) -> fx.Node:
    return normalised(b, convolved(b, image(b), b.input(Role.INPUT, "1", (3, 2, 3, 3))))


def batch_statistics(b: Builder) -> fx.Node:
    y = convolved(b, image(b))
    norm = b.call(aten._native_batch_norm_legit.no_stats, y, None, None, True, 0.1, 1e-5)
    return b.call(operator.getitem, norm, 0)


def training_flag(b: Builder) -> fx.Node:
    y = convolved(b, image(b))
    given = [b.input(Role.BUFFER, name, (3,)) for name in ("mean", "var")]
    norm = b.call(aten.native_batch_norm.default, y, None, None, *given, True, 0.1, 1e-5)
    return b.call(operator.getitem, norm, 0)


def statistics_read(b: Builder) -> fx.Node:
    y = convolved(b, image(b))
    given = [b.input(Role.BUFFER, name, (3,)) for name in ("mean", "var")]
    norm = b.call(aten.native_batch_norm.default, y, None, None, *given, False, 0.1, 1e-5)
    parts = [b.call(operator.getitem, norm, i) for i in (0, 1)]
    return b.call(aten.add.Tensor, parts[0], b.call(aten.sum.default, parts[1]))


def without_epsilon(b: Builder) -> fx.Node:
    return normalised(b, convolved(b, image(b)), eps=0.0)


def scaled(b: Builder) -> fx.Node:
    x = b.input(Role.INPUT, "0", (5, 4))
    weight, bias = b.input(Role.PARAM, "w", (4, 3)), b.input(Role.PARAM, "b", (3,))
    return normalised(b, b.call(aten.addmm.default, bias, x, weight, alpha=2))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (shared, "shared-result"),
        (after_relu, "no-layer"),
        (before_padding, "padding"),
        (before_transposed, "transposed"),
        (dynamic, "not-constant"),
        (batch_statistics, "batch-statistics"),
        (training_flag, "batch-statistics"),
        (statistics_read, "statistics-used"),
        (without_epsilon, "no-epsilon"),
        (scaled, "scaled-layer"),
    ],
)
def test_norm_that_cannot_be_folded(make: object, reason: str) -> None:
    b = Builder()
    graph = inference(b, make(b))
    before = targets(graph)
    outcome = applied(FoldInference(), graph)
    assert [item.reason for item in outcome.declined] == [reason]
    assert [name for name in targets(graph) if name != "frozen"] == before


def test_norm_before_a_function_says_which_one_it_is() -> None:
    b = Builder()
    y = b.call(aten.relu.default, normalised(b, image(b), 2))
    (no,) = applied(FoldInference(), inference(b, convolved(b, y))).declined
    assert (no.reason, no.detail) == (
        "function-between",
        "its input comes from input_0, and aten.relu.default stands between it and the next layer",
    )


def test_norm_that_changes_the_layout_stays() -> None:
    b = Builder()
    graph = inference(b, normalised(b, convolved(b, image(b))))
    result = graph.outputs[0]
    result.meta["val"] = result.meta["val"].to(memory_format=torch.channels_last)
    assert [d.reason for d in FoldInference().apply(graph, PassContext()).declined] == ["layout"]


def test_mutated_statistics_are_neither_folded_nor_frozen() -> None:
    b = Builder()
    y = normalised(b, convolved(b, image(b)))
    mean = next(n for n in b.fx.nodes if n.name == "buffer_mean")
    moved = b.call(aten.add.Tensor, mean, 1)
    inverse = b.call(aten.mul.Tensor, b.call(aten.exp.default, mean), 2)
    graph = inference(b, b.call(aten.add.Tensor, y, b.call(aten.sum.default, inverse)))
    graph.set_outputs({mutation("mean"): moved, output(): graph.outputs[0]})
    outcome = applied(FoldInference(), graph)
    assert [(a.site, a.what) for a in outcome.applied] == [("w", "kept for its layers")]
    assert {item.reason for item in outcome.declined} == {"mutated"}
    norm = "_native_batch_norm_legit_no_training"
    assert [item.site for item in outcome.declined] == [norm, "sum_1", "add"]


def test_low_precision_keeps_its_norm_and_freezes_its_casts() -> None:
    model = shaken(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)))
    with torch.autocast("cpu"):
        graph, _ = folded(model, torch.randn(2, 2, 4, 4))
    outcome = FoldInference().apply(graph, PassContext())
    assert reasons(outcome) == [("1", "low-precision")]
    assert targets(graph).count("frozen") == 2


# -- bad input -------------------------------------------------------------------------------------


def test_training_steps_are_skipped_and_the_step_says_so() -> None:
    (step,) = Pipeline((FoldInference(),)).run(linear_graph())
    assert step.skipped == "it works on inference graphs and this is a graph of level joint"
    assert step.outcome.applied == ()


def test_there_are_no_options() -> None:
    with pytest.raises(SpecError, match="fold_inference"):
        parse_spec("fold_inference{eps=1}")
