"""Weights folded and frozen in evaluation graphs of any batch and image size."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt
from graphopt.model.controller import controller_of
from graphopt.passbase import PassContext
from graphopt.passes.fold_inference import FoldInference
from graphopt.runtime.frozen import contest
from graphopt.runtime.frozen.fusions import fuse
from graphopt.runtime.frozen.packing import pack
from graphopt.runtime.frozen.prologue import hoist
from graphopt.runtime.frozen.sites import linears
from graphopt.text import parse_graph, print_graph
from tests.support.applying import GOLDEN
from tests.support.sizes import Images, images, outputs_equal, symbolic, trained_equal


def _evaluated() -> nn.Module:
    model = Images()
    for norm in (model.one, model.two):
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
    return model.eval()


def test_golden() -> None:
    graph = symbolic("images", training=False)
    FoldInference().apply(graph, PassContext())
    text = print_graph(graph)
    assert text == (GOLDEN / "fold_inference.sizes.gopt").read_text()
    assert print_graph(parse_graph(text)) == text


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(2, 5), st.integers(9, 14), st.integers(9, 14))
def test_a_graph_of_these_sizes_is_folded_alike(batch: int, height: int, width: int) -> None:
    sizes = {"x.0": batch, "x.2": height, "x.3": width}
    outputs_equal("images", "fold_inference", sizes, training=False)


def test_convolutions_are_packed() -> None:
    graph = symbolic("images", training=False)
    FoldInference().apply(graph, PassContext())
    hoisted = hoist(graph.module)
    fused = fuse(hoisted.main.graph, hoisted.kept)
    assert [node.args[8] for node in fused] == ["relu", "relu", "relu"]
    assert [node.args[7] is not None for node in fused] == [False, True, False]
    packed = pack(hoisted, linears(hoisted.main.graph, hoisted.kept), sums=True)
    assert len(packed.convolutions) == 3
    assert not packed.linears  # how many rows there are is not known


SIZES = ((4, 8, 8), (6, 8, 8), (3, 12, 10), (2, 16, 16), (5, 9, 11))


@torch.no_grad()
def test_images_of_many_sizes_take_three_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    # Bits are compared, and the forms that a measurement chooses among round differently.
    monkeypatch.setattr(contest, "_kept", lambda *_: "plain")
    batches = [images(*size) for size in SIZES]
    assert trained_equal(_evaluated, "cleanup,fold_inference", batches).made == 3


@pytest.mark.slow
@torch.no_grad()
def test_inductor_packs_them_too() -> None:
    batches = [images(*size) for size in SIZES[:3]]
    dynamic = {"x": {0: "batch", 2: "height", 3: "width"}}
    plain = _evaluated()
    model = graphopt.optimize(
        copy.deepcopy(plain), passes="fold_inference", backend="inductor", dynamic=dynamic
    )
    for batch in batches:
        torch.testing.assert_close(model(batch), plain(batch), rtol=1e-4, atol=1e-5)
    controller = controller_of(model)
    assert controller is not None
    assert controller.made <= 2  # what Inductor asks of the first sizes is a condition
    assert not controller.seen.notes
