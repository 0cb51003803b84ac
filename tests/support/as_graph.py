"""A model that runs as captured graphs in the eager backend, without passes and verification."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.analysis.gradient_sources import gradient_sources
from graphopt.capture import Capture, capture
from graphopt.plan import Plan
from graphopt.runtime.backends import build


class AsGraph:
    """Calls a model through captures of it.

    Args:
        model: the model; its state is the model's own.
        backend: that runs the graphs.

    Attributes:
        captures: one per kind of call so far.
    """

    def __init__(self, model: nn.Module, backend: str = "eager") -> None:
        self.model = model
        self.backend = backend
        self.captures: list[tuple[Capture, Callable[..., object]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for captured, call in self.captures:
            if captured.holds(self.model, *args, **kwargs):
                return call(self.model, *args, **kwargs)
        captured = capture(self.model, args, kwargs)
        graph = captured.graph
        plan = Plan(
            spec="",
            signature=graph.signature,
            gradient_sources=graph.get(gradient_sources),
            aliases=captured.aliases,
            backend=self.backend,
        )
        call = captured.bind(build(graph.module, plan))
        self.captures.insert(0, (captured, call))
        return call(self.model, *args, **kwargs)


def twins(model: nn.Module, backend: str = "eager") -> tuple[nn.Module, AsGraph]:
    """The model, and an equal one that runs as a graph."""
    return model, AsGraph(copy.deepcopy(model), backend)


def step(call: Any, model: nn.Module, *args: Any, loss: Callable[[Any], Tensor]) -> list[Any]:
    """One forward and backward from the same random numbers: outputs, gradients, buffers."""
    torch.manual_seed(3)
    model.zero_grad()
    output = call(*args)
    loss(output).backward()
    gradients = [p.grad for p in model.parameters()]
    return [output, gradients, [b.clone() for b in model.buffers()]]


def assert_equal(left: Any, right: Any) -> None:
    """Equal to the last bit, and of the same types."""
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, Sequence) and not isinstance(left, str):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_equal(a, b)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert_equal(value, right[key])
    else:
        assert left == right


def squares(output: Any) -> Tensor:
    """A loss of all tensors in an output that can have one."""
    parts = output if isinstance(output, tuple) else (output,)
    tensors = [t for t in parts if isinstance(t, Tensor) and t.requires_grad]
    return torch.stack([t.square().sum() for t in tensors]).sum()


def assert_same_steps(
    model: nn.Module,
    calls: Sequence[tuple[Any, ...]],
    captures: int | None = 1,
    loss: Callable[[Any], Tensor] = squares,
) -> AsGraph:
    """Every step of the graph is eager's; `captures` is how many graphs that took."""
    plain, graph = twins(model)
    for args in calls:
        expected = step(plain, plain, *copy.deepcopy(args), loss=loss)
        assert_equal(expected, step(graph, graph.model, *copy.deepcopy(args), loss=loss))
    if captures is not None:
        assert len(graph.captures) == captures
    return graph
