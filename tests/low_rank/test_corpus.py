"""Models of the corpus through the forward level: as they are, and with all weights in factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import graphopt
from graphopt.capture import capture, capture_forward
from graphopt.capture.forward import Rewritten
from graphopt.graph import Graph
from graphopt.testing.corpus import CORPUS
from graphopt.text import parse_graph, print_graph
from graphopt.verify import verify

pytestmark = pytest.mark.corpus

# What forwards are made of: modes, sub-graphs, writes in place, items, branches, opaque operators.
NAMES = ["autocast", "checkpointed", "custom_function", "branching", "in_place", "lstm"]


@pytest.mark.parametrize("name", [name for name in NAMES if name in CORPUS])
def test_what_is_derived_from_the_forward_graph_is_what_is_captured(name: str) -> None:
    model, args, kwargs = CORPUS[name].make()

    def same(graph: Graph) -> Rewritten:
        verify(graph, full=True)
        return Rewritten((graph.copy(),))

    plain = capture(model, args, kwargs)
    through = capture(model, args, kwargs, rewrite=same)
    assert print_graph(through.graph) == print_graph(plain.graph)
    assert [print_graph(graph) for graph in through.earlier] == [print_graph(plain.graph)]
    forward = capture_forward(model, args, kwargs)
    text = print_graph(forward)
    assert print_graph(parse_graph(text, dict(forward.module.named_buffers()))) == text


# Attention, tied and reused weights, recurrence by hand, several inputs.
CONVERTED = ["transformer_encoder", "tied_language_model", "in_place", "parametrised"]


@pytest.mark.parametrize("name", CONVERTED)
def test_gradients_with_all_weights_in_factors(name: str) -> None:
    """Of full rank, so that nothing but rounding differs."""
    entry = CORPUS[name]
    plain, args, kwargs = entry.make()
    torch.manual_seed(11)
    entry.loss(plain(*args, **kwargs)).backward()
    model, args, kwargs = entry.make()
    spec = "low_rank{tolerance=0.00001,smallest=2,gain=0,cost=roofline},cleanup"
    graphopt.optimize(model, (args, kwargs), passes=spec, backend="eager", verify="eager")
    torch.manual_seed(11)
    entry.loss(model(*args, **kwargs)).backward()
    common = dict(model.named_parameters())
    compared = 0
    for parameter, own in plain.named_parameters():
        if parameter in common and own.grad is not None:
            _close(common[parameter].grad, own.grad, parameter)
            compared += 1
    assert compared
    if name != "parametrised":
        assert any("original0" in parameter for parameter in common)


def _close(a: Tensor | None, b: Tensor, name: str) -> None:
    assert a is not None, name
    assert float((a - b).abs().max()) <= 1e-4 * float(b.abs().max()) + 1e-7, name
