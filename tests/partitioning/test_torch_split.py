"""Stages of exported graphs: costs, what stays together, what is refused, the whole corpus."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.distributed.pipelining import Pipe, pipeline
from torch.utils._pytree import tree_leaves

from graphopt.analysis.gradient_order import Device
from graphopt.capture import capture
from graphopt.errors import ArgumentError
from graphopt.partitioning.from_exported import ExportedProblem
from graphopt.partitioning.from_graph import from_graph
from graphopt.partitioning.objective import Memory, Objective
from graphopt.partitioning.problem import Problem
from graphopt.partitioning.torch_split import split_policy
from graphopt.testing.corpus import CORPUS

MACHINE = Device(flops=1e10, half_flops=1e10, bandwidth=1e10, overhead=0.0)
# What torch.export refuses, and what torch's pipeline cannot run even when it is not cut.
NOT_EXPORTED = {"lstm_ctc", "dataclass_output"}
GRAPH_INSIDE = {"branching", "autocast", "running_statistics", "parametrised", "llama"}
TIED = {"used_twice"}  # all of its operators share parameters
TOO_SMALL = {"in_place": 2}  # all of it writes into one tensor


def _exported(model: nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
    return torch.export.export(model, args, kwargs).module(check_guards=False)  # type: ignore[return-value]


def _problem(model: nn.Module, *args: Any, device: Device | None = None) -> Problem:
    return ExportedProblem(_exported(model, *args), device).problem


def _make(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model of the corpus that draws no numbers."""
    model, args, kwargs = CORPUS[name].make()
    for module in model.modules():
        for option in ("p", "dropout"):
            if isinstance(getattr(module, option, None), float):
                setattr(module, option, 0.0)
    return model, args, kwargs


# -- costs -----------------------------------------------------------------------------------------


@pytest.mark.corpus
@pytest.mark.parametrize("name", ["resnet", "unet", "gpt2"])
def test_work_is_that_of_the_joint_graph(name: str) -> None:
    """Each operator with its own backward, against what AOTAutograd makes of the whole."""
    model, args, kwargs = _make(name)
    found = ExportedProblem(_exported(model, *args, **kwargs), MACHINE).problem
    model, args, kwargs = _make(name)
    joint = from_graph(capture(model, args, kwargs).graph, device=MACHINE)
    for side in ("forward", "backward"):
        times = [math.fsum(getattr(o, side) for o in p.operators) for p in (found, joint)]
        assert times[0] == pytest.approx(times[1], rel=0.15), side
    kept = [
        sum(o.saved for o in p.operators) + sum(v.bytes for v in p.values if v.saved_by)
        for p in (found, joint)
    ]
    assert kept[0] == pytest.approx(kept[1], rel=0.15)


def test_a_layer() -> None:
    """The first layer's input needs no gradient, the second one's does."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False))
    problem = _problem(model, torch.randn(64, 64), device=MACHINE)
    first, relu, second = problem.operators
    product = 2 * 64**3 / MACHINE.flops
    assert first.forward == pytest.approx(product)
    assert (first.input_grad, first.weight_grad) == (0.0, pytest.approx(product))
    assert (second.input_grad, second.weight_grad) == (
        pytest.approx(product),
        pytest.approx(product),
    )
    assert relu.weight_grad == 0.0
    assert relu.input_grad > 0.0
    kept = {v.name: v.saved_by for v in problem.values}
    assert kept == {
        "input_1": ("linear",),
        "linear": (),
        "relu": ("linear_1", "relu"),
        "linear_1": (),
    }
    assert [p.bytes for p in problem.parameters] == [4 * 64**2, 4 * 64**2]


# -- what stays together ---------------------------------------------------------------------------


class Apart(nn.Module):
    """What may not be cut: views, what writes, counters, and the reader of an old value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.calls = nn.Buffer(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.layer(x))
        early = h + 1
        h[:, 1:] = 0
        self.calls.add_(1)
        first, second = h.t().reshape(8, 2).chunk(2)
        return early.sum() + first.sum() * self.calls + second.sum()


def test_together() -> None:
    exported = ExportedProblem(_exported(Apart(), torch.randn(4, 4)))
    together = [set(group) for group in exported.problem.together]
    by_name = {node.name: host for node, host in exported.host.items()}
    assert by_name["chunk"] == by_name["batch_norm"]
    writers = next(g for g in together if "batch_norm" in g and "add" in g)
    assert "add" in writers, "it reads what is written over later"
    assert {"sum_1", "sum_2"}.isdisjoint(writers)
    assert any({"add__1", "mul"} <= g for g in together), "the counter is read by a product"


def test_running_statistics_of_a_norm_that_is_used_twice() -> None:
    norm = nn.BatchNorm1d(4, affine=False)
    problem = _problem(nn.Sequential(norm, nn.Tanh(), norm), torch.randn(4, 4))
    assert any({"batch_norm", "batch_norm_1"} <= group for group in problem.together)


class Evaluated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        early = h + 1
        return F.dropout(h, 0.5, training=False).mul_(2) + early


def test_dropout_that_returns_its_input() -> None:
    problem = _problem(Evaluated(), torch.randn(4))
    assert any({"tanh", "add", "dropout", "mul_"} <= group for group in problem.together)


# -- splitting -------------------------------------------------------------------------------------


def _run(pipe: Pipe, *args: Any, **kwargs: Any) -> Any:
    return fx.Interpreter(pipe.split_gm).run(*args, *kwargs.values())


def _gradients(named: Callable[[], Any], output: Any) -> dict[str, Tensor]:
    sum(p.float().square().mean() for p in tree_leaves(output) if p.requires_grad).backward()
    return {name: p.grad for name, p in named() if p.grad is not None}


@pytest.mark.corpus
@pytest.mark.parametrize("name", sorted(CORPUS.keys() - NOT_EXPORTED - GRAPH_INSIDE - TIED))
def test_corpus(name: str) -> None:
    """Three stages have the outputs and gradients of the exported whole."""
    model, args, kwargs = _make(name)
    stages = TOO_SMALL.get(name, 3)
    whole = _exported(model, *args, **kwargs)
    wanted = fx.Interpreter(whole).run(*args, *kwargs.values())
    wanted_gradients = _gradients(whole.named_parameters, wanted)
    model, args, kwargs = _make(name)
    policy = split_policy(stages)
    pipe = pipeline(model, args, kwargs, split_policy=policy)
    assert pipe.num_stages == stages
    assert not pipe.replicated_params
    assert policy.found is not None
    found = _run(pipe, *args, **kwargs)
    torch.testing.assert_close(tree_leaves(found), tree_leaves(wanted))
    parts = [pipe.get_stage_module(s) for s in range(stages)]
    gradients = _gradients(lambda: (x for p in parts for x in p.named_parameters()), found)
    assert sorted(map(_size, gradients.values())) == sorted(map(_size, wanted_gradients.values()))
    for parameter, gradient in gradients.items():
        if parameter in wanted_gradients:
            torch.testing.assert_close(gradient, wanted_gradients[parameter])


def _size(gradient: Tensor) -> float:
    return round(gradient.double().abs().sum().item(), 3)


class Swapped(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y) - 2 * x


def test_inputs_in_their_order() -> None:
    """torch hands them over in the order in which they are read."""
    x, y = torch.tensor([1.0]), torch.tensor([3.0])
    stock = pipeline(Swapped(), (x, y)).get_stage_module(0)
    assert torch.equal(stock(x, y), Swapped()(y, x)), "torch has learnt it: nothing to do any more"
    ours = pipeline(Swapped(), (x, y), split_policy=split_policy(1)).get_stage_module(0)
    assert torch.equal(ours(x, y), Swapped()(x, y))


def test_the_certificate() -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    policy = split_policy(2)
    pipe = pipeline(model, (torch.randn(8, 32),), split_policy=policy)
    assert policy.found is not None
    assert policy.found.certificate is not None
    assert policy.found.certificate.gap == 0.0
    assert [s.operators for s in policy.found.stages] == [
        ("linear", "linear_1"),
        ("linear_2", "linear_3"),
    ]
    names = [list(dict(pipe.get_stage_module(s).named_parameters())) for s in range(2)]
    assert names == [
        ["0.weight", "0.bias", "1.weight", "1.bias"],
        ["2.weight", "2.bias", "3.weight", "3.bias"],
    ]


# -- bad input -------------------------------------------------------------------------------------


def _refused(model: nn.Module, *args: Any, stages: int = 2, **options: Any) -> ArgumentError:
    with pytest.raises(ArgumentError) as caught:
        split_policy(stages, **options)(_exported(model, *args))
    return caught.value


def test_more_stages_than_operators() -> None:
    error = _refused(nn.Linear(3, 3), torch.randn(2, 3), stages=3)
    assert error.message == "3 stages are more than the 1 operators"
    assert error.hint == "ask for at most 1"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.head(torch.tanh(self.embed(tokens))))


def test_tied_parameters_stay_together() -> None:
    tokens = torch.tensor([[1, 2]])
    pipe = pipeline(Tied(), (tokens,), split_policy=split_policy(2))
    assert not pipe.replicated_params
    assert list(pipe.get_stage_module(1).parameters()) == []
    error = _refused(Tied(), tokens, stages=3)
    assert error.message == (
        "the operators that share 'embed.weight' have to be in one stage, since PyTorch does not "
        "add up the gradients of its copies; what can be separated then is 2 pieces for 3 stages"
    )


class Written(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1).tanh()


def test_an_input_that_is_written() -> None:
    error = _refused(Written(), torch.randn(3))
    assert error.message == "input 'x' is changed in place, and stages only have copies of it"
    assert "x.add_(1)" in error.where


class Guarded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu"):
            x = F.relu(x @ x)
        return x + 1


def test_a_graph_inside() -> None:
    error = _refused(Guarded(), torch.randn(3, 3))
    assert "runs a graph inside of the graph" in error.message
    assert error.hint == "leave out autocast, no_grad and control flow inside of forward"


def test_a_limit_of_memory() -> None:
    objective = Objective(memory=Memory(limit=100.0))
    error = _refused(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(2, 8), objective=objective
    )
    assert "no partition into 2 stages fits into memory" in error.message
