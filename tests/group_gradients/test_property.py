"""On generated graphs: identical ranks must find their own gradients again, whatever travels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._C._distributed_c10d import Work, _register_process_group, _unregister_process_group

from graphopt.analysis.linearity import linear_in_tangents
from graphopt.graph import Graph
from graphopt.passbase import PassContext
from graphopt.passes.group_gradients import GroupGradients
from graphopt.plan import Role
from graphopt.testing import inputs_for, joint_graphs, run_graph
from graphopt.text import parse_graph, print_graph
from graphopt.verify import verify

RANKS = 4


class _Done(Work):
    def wait(self, *_: Any) -> bool:
        return True


class _Alike(dist.ProcessGroup):
    """Ranks that all hold the same: a sum is a product, a maximum is the value itself."""

    def __init__(self) -> None:
        super().__init__(0, RANKS)

    def allreduce(self, tensors: list[torch.Tensor], options: Any = None) -> Work:
        if options.reduceOp == dist.ReduceOp.SUM:
            for tensor in tensors:
                tensor *= RANKS
        return _Done()

    def getBackendName(self) -> str:
        return "alike"


@pytest.fixture(scope="module", autouse=True)
def _channel() -> Iterator[None]:
    group = _Alike()
    _register_process_group("dp", group)
    yield
    _unregister_process_group("dp")


@pytest.mark.hypothesis  # examples are generated within
@pytest.mark.parametrize(("wire", "tolerance"), [("native", 1e-6), ("bf16", 2e-2), ("int32", 1e-6)])
def test_identical_ranks_change_nothing(wire: str, tolerance: float) -> None:
    seen = []

    @settings(max_examples=25, deadline=None)
    @given(before=joint_graphs(), seed=st.integers(0, 3))
    def property_holds(before: Graph, seed: int) -> None:
        after = before.copy()
        grouping = GroupGradients(link="10gbe", wire=wire)
        outcome = grouping.apply(after, PassContext(mesh={"dp": RANKS}))
        verify(after, full=True)
        if not outcome.applied:
            return
        seen.append(1)
        text = print_graph(after)
        assert print_graph(parse_graph(text, dict(after.module.named_buffers()))) == text
        inputs = inputs_for(before, seed)
        scaled = wire == "native" and before.get(linear_in_tangents)
        given_after = [
            value / RANKS if scaled and slot.role is Role.TANGENT else value
            for slot, value in zip(before.signature.inputs, inputs, strict=True)
        ]
        expected = dict(zip(before.signature.outputs, run_graph(before, inputs), strict=True))
        actual = dict(zip(after.signature.outputs, run_graph(after, given_after), strict=True))
        parameters = set(before.signature.names(Role.PARAM))
        for slot, value in expected.items():
            if slot.role is not Role.GRAD or slot.name not in parameters:
                continue
            largest = float(value.abs().max()) if value.numel() else 0.0
            error = (actual[slot] - value).abs().max() if value.numel() else torch.tensor(0.0)
            assert float(error) <= tolerance * largest + 1e-30, slot
            assert actual[slot].stride() == value.stride() or value.numel() <= 1

    property_holds()
    assert seen, "no generated graph was grouped"
