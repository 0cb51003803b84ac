"""The expected change of the loss is what brute force finds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphopt.calibration.curvature import fisher_of_weights
from graphopt.calibration.forward import record_forward
from graphopt.calibration.record import Calibration
from graphopt.calibration.run import calibrate
from graphopt.capture import capture
from graphopt.graph import Graph
from graphopt.pipeline import Pipeline
from graphopt.plan import Role

DRAWS = 100


class Net(nn.Module):
    """A convolution, a value with two readers, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(16, 5)
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x)).mean(3)
        y: Tensor = self.head((h + self.mix(h.transpose(1, 2)).transpose(1, 2)).flatten(1))
        return y


def _net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net(), torch.randn(16, 2, 4, 4)


def _graph(model: nn.Module, x: Tensor) -> tuple[Graph, tuple[Tensor, ...]]:
    captured = capture(model, (x,))
    Pipeline.parse("cleanup").run(captured.graph)
    return captured.graph, captured.inputs


class _Noisy(fx.Interpreter):
    """Runs a forward in float64 with noise on one result, or on one value for one reader."""

    def __init__(self, graph: Graph, place: tuple[str, str], noise: Callable[[Tensor], Tensor]):
        super().__init__(graph.module)
        self.place, self.noise = place, noise

    def run_node(self, n: fx.Node) -> object:
        if n.op != "call_function":
            return super().run_node(n)
        value, reader = self.place

        def operand(source: fx.Node) -> object:
            found = self.env[source]
            noisy = source.name == value and n.name == reader
            return found + self.noise(found) if noisy else found

        args, kwargs = fx.map_arg((n.args, n.kwargs), operand)
        result = n.target(*args, **kwargs)  # type: ignore[operator]
        if not reader and n.name == value:
            result = result + self.noise(result)
        return result


def _outputs(
    graph: Graph, inputs: tuple[Tensor, ...], place: tuple[str, str], noise: object
) -> Tensor:
    tangents = [
        torch.zeros(node.meta["val"].shape, dtype=torch.float64)
        for slot, node in zip(graph.signature.inputs, graph.inputs, strict=True)
        if slot.role is Role.TANGENT
    ]
    wide = [t.detach().double() for t in inputs]
    results = _Noisy(graph, place, noise).run(*wide, *tangents)  # type: ignore[arg-type]
    position = graph.signature.output_index(Role.OUTPUT, "0")
    found: Tensor = results[position]
    return found


def _places(found: Calibration) -> Iterator[tuple[tuple[str, str], float]]:
    """Every result and every read that has a sensitivity, with that in bf16."""
    for name, each in found.sensitivities.items():
        if change := each.result["bf16"]:
            yield (name, ""), change
        for value, cost in each.reads.items():
            if cost["bf16"]:
                yield (value, name), cost["bf16"]


def test_half_the_squared_change_of_the_outputs_by_brute_force() -> None:
    model, x = _net()
    found = calibrate(model, x, probes=300)
    assert found.loss == "outputs"
    graph, inputs = _graph(model, x)
    exact = _outputs(graph, inputs, ("", ""), None)
    generator = torch.Generator().manual_seed(1)

    def noise(value: Tensor) -> Tensor:
        narrow = value.float()
        error = (narrow.bfloat16().float() - narrow).double()
        return error * (2 * torch.randint(0, 2, value.shape, generator=generator) - 1)

    predicted, measured, ratios = 0.0, 0.0, []
    with torch.no_grad():
        for place, change in _places(found):
            changes = [
                float((_outputs(graph, inputs, place, noise) - exact).square().sum()) / 32
                for _ in range(DRAWS)
            ]
            mean = sum(changes) / DRAWS
            predicted, measured = predicted + change, measured + mean
            ratios.append(change / mean)
    assert len(ratios) > 12
    assert predicted / measured == pytest.approx(1, abs=0.05)
    assert min(ratios) > 0.8
    assert max(ratios) < 1.25


def test_a_given_loss_by_brute_force() -> None:
    """For a linear model the curvature of cross-entropy is the one that is estimated."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(12, 6), torch.randn(40, 12), torch.randint(6, (40,))
    found = calibrate(model, [(x, y)], F.cross_entropy, probes=400)
    assert found.loss == "given"
    assert found.value == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-5)
    predicted = next(
        cost["bf16"]
        for each in found.sensitivities.values()
        for value, cost in each.reads.items()
        if value == "weight"
    )
    exact = copy.deepcopy(model).double()
    weight, generator = exact.weight.detach().clone(), torch.Generator().manual_seed(0)
    error = (model.weight.bfloat16().float() - model.weight).detach().double()
    base, total = float(F.cross_entropy(exact(x.double()), y)), 0.0
    for _ in range(300):
        signed = error * (2 * torch.randint(0, 2, error.shape, generator=generator) - 1)
        for sign in (1, -1):
            changed = F.linear(x.double(), weight + sign * signed, exact.bias)
            total += (float(F.cross_entropy(changed, y)) - base) / 600
    assert predicted == pytest.approx(total, rel=0.1)


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.two(torch.relu(self.one(x))), y)


def test_the_models_own_loss_by_gradients_of_single_examples() -> None:
    torch.manual_seed(0)
    model, x, y = OwnLoss(), torch.randn(20, 8), torch.randint(4, (20,))
    found = calibrate(model, (x, y))
    assert found.loss == "model"
    for name in ("one", "two"):
        weight = getattr(model, name).weight
        fisher = torch.zeros_like(weight)
        for a, b in zip(x, y, strict=True):
            (gradient,) = torch.autograd.grad(model(a[None], b[None]), weight)
            fisher += gradient.square() / len(x)
        error = (weight.bfloat16().float() - weight).detach()
        expected = float((fisher * error.square()).sum()) / 2
        costs = [
            cost["bf16"]
            for each in found.sensitivities.values()
            for value, cost in each.reads.items()
            if value == f"{name}_weight"
        ]
        assert costs == [pytest.approx(expected, rel=1e-4)]


def test_fisher_of_weights_is_the_product_of_the_traces() -> None:
    """For rows without structure: half of noise of variance κ²/12 times tr(A) tr(G)."""
    torch.manual_seed(0)
    graph, inputs = _graph(nn.Linear(64, 48, bias=False), torch.randn(512, 64))
    run = record_forward(graph, frozenset(), inputs)
    (output,) = run.outputs.values()
    gradient = torch.randn_like(output) / 512
    parameters = {graph.input(Role.PARAM, "weight")}

    def root(node: fx.Node) -> fx.Node:
        return node if node.op == "placeholder" else node.all_input_nodes[0]

    made = fisher_of_weights(run, [output], [gradient], 512, root, parameters)
    ((_, _, diagonal),) = made
    x = inputs[graph.signature.input_index(Role.INPUT, "input")].detach()
    trace_a = float(x.square().sum(1).mean())
    trace_g = float((512 * gradient).square().sum(1).mean())
    assert float(diagonal.sum()) == pytest.approx(trace_a * trace_g, rel=0.01)


def test_what_a_format_holds_exactly_costs_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.copy_(model.weight.bfloat16())
    found = calibrate(model, torch.randint(-8, 8, (6, 4)).float())
    reads = [r for s in found.sensitivities.values() for v, r in s.reads.items() if v == "weight"]
    assert [r["bf16"] for r in reads] == [0.0]
