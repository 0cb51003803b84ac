"""Cleanup on generated steps, against oracles that share no code with it."""

from __future__ import annotations

from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from graphopt.graph import Graph
from graphopt.passbase import PassContext
from graphopt.passes.cleanup import Cleanup, remove_dead
from graphopt.plan import Phase, Role
from graphopt.testing import check_pass, inference_graphs, inputs_for, joint_graphs

GRAPHS = st.one_of(joint_graphs(), inference_graphs())
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Run:
    """The values of all nodes of one step, by brute force; holds them, so memory is not reused."""

    def __init__(self, graph: Graph, inputs: list[Tensor], seed: int) -> None:
        self.graph = graph
        self.values: dict[fx.Node, Any] = dict(zip(graph.inputs, inputs, strict=True))
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            for node in graph.nodes:
                if node.op == "get_attr":
                    self.values[node] = getattr(graph.module, node.target)
                if node.op == "call_function":
                    args, kwargs = tree_map_only(
                        fx.Node, self.values.__getitem__, (node.args, node.kwargs)
                    )
                    self.values[node] = node.target(*args, **kwargs)
            self.random_state = torch.get_rng_state()
        self.outputs = [self.values[node] for node in graph.outputs]
        slots = graph.signature.outputs
        self.returned = [
            (slot, memory(value))
            for slot, value in zip(slots, self.outputs, strict=True)
            if slot.role is not Role.MUTATION
        ]
        self.given = [(s, memory(v)) for s, v in zip(graph.signature.inputs, inputs, strict=True)]
        # Now, since the pass is going to rewrite the graph.
        self.kept = self._kept()
        self.shared = self._shared()

    def _kept(self) -> dict[int, int]:
        """Memory that forward makes and backward reads, with its size."""
        found = {}
        for node in self.graph.operators:
            for operand in node.all_input_nodes:
                if phase(node) is Phase.BACKWARD and phase(operand) is Phase.FORWARD:
                    whole = self.values[operand]
                    value = whole if isinstance(whole, Tensor) else self.values[node]
                    found[memory(value)] = value.untyped_storage().nbytes()
        outside = {owned for _, owned in self.given}
        outside |= {memory(b) for b in self.graph.module.buffers()}
        return {owned: size for owned, size in found.items() if owned not in outside}

    def _shared(self) -> set[tuple[str, str]]:
        """Pairs of things in one memory: outputs, inputs and what is kept for backward."""
        named = [(str(s), m) for s, m in (*self.returned, *self.given)]
        pairs = {(a, b) for a, m in named for b, n in named if m == n and a < b}
        returned = [(str(s), m) for s, m in self.returned]
        return pairs | {(name, "kept") for name, owned in returned if owned in self.kept}


def phase(node: fx.Node) -> Phase:
    return Phase.BACKWARD if "backward" in node.meta["partitioner_tag"] else Phase.FORWARD


def memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def bits(value: Tensor) -> Tensor:
    """The bytes of a tensor, all NaNs alike."""
    if value.is_floating_point():
        value = value.masked_fill(value.isnan(), torch.nan)
    return value.contiguous().view(-1).view(torch.uint8)


@pytest.mark.hypothesis  # examples are generated within
def test_pass_is_proved() -> None:
    check_pass(Cleanup(), max_examples=60)


@QUICK
@given(GRAPHS, st.integers(0, 3))
def test_bits_and_random_state_are_kept(graph: Graph, seed: int) -> None:
    inputs = inputs_for(graph, seed)
    before = Run(graph, inputs, seed)
    Cleanup().apply(graph, PassContext())
    after = Run(graph, inputs, seed)
    assert torch.equal(before.random_state, after.random_state)
    for slot, was, now in zip(graph.signature.outputs, before.outputs, after.outputs, strict=True):
        assert was.stride() == now.stride(), slot
        assert torch.equal(bits(was), bits(now)), slot


@QUICK
@given(joint_graphs())
def test_nothing_new_shares_memory_or_is_kept(graph: Graph) -> None:
    inputs = inputs_for(graph)
    before = Run(graph, inputs, 0)
    Cleanup().apply(graph, PassContext())
    after = Run(graph, inputs, 0)
    assert after.shared <= before.shared
    assert sum(after.kept.values()) <= sum(before.kept.values())


@QUICK
@given(GRAPHS)
def test_what_is_dead_is_what_no_output_reaches(graph: Graph) -> None:
    edges = nx.DiGraph()
    needed = {n.name for n in graph.nodes if n.op in ("placeholder", "output")}
    for node in graph.nodes:
        edges.add_node(node.name)
        edges.add_edges_from((node.name, used.name) for used in node.all_input_nodes)
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            needed.add(node.name)
    alive = needed.union(*(nx.descendants(edges, name) for name in needed))
    removed = remove_dead(graph)
    assert {node.name for node in graph.nodes} == alive
    assert sum(item.numbers["nodes"] for item in removed.applied) == len(edges) - len(alive)


@QUICK
@given(GRAPHS)
def test_every_duplicate_is_merged_or_named(graph: Graph) -> None:
    outcome = Cleanup().apply(graph, PassContext())
    named = {item.site for item in outcome.declined}
    seen: dict[str, fx.Node] = {}
    for node in graph.operators:
        if not node.all_input_nodes or "empty" in str(node.target):
            continue
        call = f"{node.target} {node.args!r} {node.kwargs!r}"
        twin = seen.setdefault(call, node)
        assert twin is node or node.name in named or phase(node) is not phase(twin), node.name
