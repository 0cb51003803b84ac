"""Graphs with symbolic sizes, and the graphs of fixed sizes that they stand for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import graphopt
from graphopt.capture import capture
from graphopt.capture.sizes import Dimensions
from graphopt.graph import Graph, value_of
from graphopt.model.controller import Controller, controller_of
from graphopt.passbase import PassContext
from graphopt.pipeline import Pipeline
from graphopt.plan import Role, Signature
from graphopt.testing import inputs_for
from graphopt.verify import verify


class Tagger(nn.Module):
    """Attention, a wide layer and a head over sequences of tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)
        self.mix, self.wide, self.narrow = nn.Linear(16, 48), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.mix(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        scores: Tensor = self.head(x + self.narrow(F.gelu(self.wide(x))))
        return scores


class Images(nn.Module):
    """Convolutions with norms, one with a skip connection and one with a stride, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.one = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.two = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.third, self.head = nn.Conv2d(8, 8, 3, stride=2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.one(self.first(x)))
        h = torch.relu(h + self.two(self.second(h)))
        scores: Tensor = self.head(F.max_pool2d(torch.relu(self.third(h)), 2).mean((2, 3)))
        return scores


def tokens(examples: int, length: int) -> Tensor:
    """A batch for `Tagger`."""
    generator = torch.Generator().manual_seed(100 * examples + length)
    return torch.randint(0, 20, (examples, length), generator=generator)


def images(examples: int, height: int, width: int) -> Tensor:
    """A batch for `Images`."""
    generator = torch.Generator().manual_seed(100 * examples + height + width)
    return torch.randn(examples, 3, height, width, generator=generator)


MODELS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], tuple[int, ...]]] = {
    "tagger": (Tagger, lambda: tokens(4, 6), (0, 1)),
    "images": (Images, lambda: images(4, 12, 10), (0, 2, 3)),
}
"""A model, a batch, and the dimensions of the batch that vary."""


def symbolic(name: str, *, training: bool = True) -> Graph:
    """A copy of a model's graph, captured once per process, in which sizes are symbols."""
    return _symbolic(name, training).copy()


@cache
def _symbolic(name: str, training: bool) -> Graph:
    make, batch, dimensions = MODELS[name]
    x = batch()
    names = {id(x): {number: f"x.{number}" for number in dimensions}}
    with torch.set_grad_enabled(training):
        return capture(make().train(training), (x,), {}, dimensions=Dimensions(names)).graph


def guards_of(graph: Graph) -> list[Any]:
    """The conditions on its symbols that have come up."""
    size = next(value_of(n) for n in graph.inputs if isinstance(value_of(n), torch.SymInt))
    return [guard.expr for guard in size.node.shape_env.guards]


def _symbols(graph: Graph, sizes: Mapping[str, int]) -> dict[Any, int]:
    """What each symbol of a graph is in a call of these sizes."""
    slots = zip(graph.inputs, graph.signature.inputs, strict=True)
    return {value_of(n).node.expr: sizes[s.name] for n, s in slots if s.role is Role.SIZE}


def at_sizes(graph: Graph, sizes: Mapping[str, int]) -> Graph:
    """The graph of fixed sizes that a symbolic one stands for, its values worked out anew.

    Args:
        graph: as captured.
        sizes: of each of its inputs that is a size, by name.
    """
    slots = dict(zip(graph.inputs, graph.signature.inputs, strict=True))
    given = _symbols(graph, sizes)
    made, mode = fx.Graph(), FakeTensorMode()
    env: dict[fx.Node, Any] = {}

    def number(size: Any) -> int:
        return int(size.node.expr.xreplace(given)) if isinstance(size, torch.SymInt) else size

    def value(argument: Any) -> Any:
        return argument.meta["val"] if isinstance(argument, fx.Node) else argument

    def run(node: fx.Node, args: Any, kwargs: Any) -> Any:
        with mode, torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    for node in graph.nodes:
        if node in slots and slots[node].role is Role.SIZE:
            env[node] = sizes[slots[node].name]
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        if isinstance(value_of(node), torch.SymInt):
            env[node] = run(node, args, kwargs)
            continue
        new = env[node] = made.create_node(node.op, node.target, args, kwargs, name=node.name)
        new.meta = dict(node.meta)
        if node.op == "placeholder":
            fake = value_of(node)
            form = tuple(map(number, fake.shape)), tuple(map(number, fake.stride()))
            with mode:
                new.meta["val"] = torch.empty_strided(*form, dtype=fake.dtype, device=fake.device)
        elif node.op == "call_function":
            values = torch.utils._pytree.tree_map_only(fx.Node, value, (args, kwargs))
            new.meta["val"] = run(node, *values)
    inputs = tuple(slot for slot in graph.signature.inputs if slot.role is not Role.SIZE)
    signature = Signature(inputs, graph.signature.outputs)
    return Graph(fx.GraphModule(graph.module, made), signature, graph.level)


def outputs_equal(name: str, spec: str, sizes: Mapping[str, int], *, training: bool = True) -> None:
    """Passes make of a symbolic graph what they make of the one of these sizes, bit for bit.

    What they ask of symbols holds at these sizes, too.
    """
    graph, known = symbolic(name, training=training), {}
    static = at_sizes(graph, sizes)
    inputs = dict(zip(static.signature.inputs, inputs_for(static), strict=True))
    for one in (graph, static):
        states: dict[str, dict[str, Tensor]] = {}
        Pipeline.parse(spec).run(one, PassContext(states=states))
        verify(one, full=True)
        values = [
            sizes[slot.name]
            if slot.role is Role.SIZE
            else _state(states, slot.name)
            if slot.role is Role.STATE
            else inputs[slot]
            for slot in one.signature.inputs
        ]
        with torch.no_grad():
            results = one.module(*copy.deepcopy(values))
        known[one] = dict(zip(one.signature.outputs, results, strict=True))
    given = _symbols(graph, sizes)
    assert all(bool(condition.xreplace(given)) for condition in guards_of(graph))
    assert known[graph].keys() == known[static].keys()
    for slot, result in known[static].items():
        assert torch.equal(known[graph][slot], result), slot


def _state(states: Mapping[str, Mapping[str, Tensor]], name: str) -> Tensor:
    owner, _, what = name.partition("/")
    return states[owner][what]


def trained_equal(
    make: Callable[[], nn.Module], passes: str, batches: Sequence[Tensor], **options: Any
) -> Controller:
    """Steps of a model have the bits that they have where each size is captured for itself.

    Returns:
        What holds the captures of the first one.
    """
    ours, theirs = (
        graphopt.optimize(make(), passes=passes, backend="eager", **given)
        for given in (options, {**options, "dynamic": False})
    )
    for batch in batches:
        found: list[list[Tensor | None]] = []
        for model in (ours, theirs):
            model.zero_grad()
            result = model(batch)
            if model.training:
                result.square().mean().backward()
            found.append([result, *(p.grad for p in model.parameters())])
        for a, b in zip(*found, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]
    controller = controller_of(ours)
    assert controller is not None
    assert not controller.seen.notes
    return controller
