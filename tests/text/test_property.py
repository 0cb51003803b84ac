"""Texts of generated graphs: reading inverts printing, and no damage goes unnoticed."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.diff import diff_graphs, diff_texts
from graphopt.errors import TextError
from graphopt.graph import Graph, module_of, phase_of, value_of
from graphopt.testing import inference_graphs, inputs_for, joint_graphs, run_graph
from graphopt.text import parse_graph, print_graph
from graphopt.text.lift import type_of

graphs = st.one_of(joint_graphs(), inference_graphs())


def _constants(graph: Graph) -> dict[str, Tensor]:
    return dict(graph.module.named_buffers())


def _bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


@given(graphs)
def test_reading_inverts_printing(graph):
    text = print_graph(graph)
    parsed = parse_graph(text, _constants(graph))
    assert print_graph(parsed) == text
    assert parsed.signature == graph.signature
    assert (parsed.level, parsed.facts) == (graph.level, graph.facts)
    for read, written in zip(parsed.nodes[:-1], graph.nodes[:-1], strict=True):
        assert (read.name, read.op, read.target) == (written.name, written.op, written.target)
        assert str(read.args) == str(written.args)
        assert str(read.kwargs) == str(written.kwargs)
        assert type_of(value_of(read), "") == type_of(value_of(written), "")
        assert (phase_of(read), module_of(read)) == (phase_of(written), module_of(written))


@given(graphs)
@settings(max_examples=40)
def test_a_parsed_graph_computes_the_same_bits(graph):
    parsed = parse_graph(print_graph(graph), _constants(graph))
    inputs = inputs_for(graph)
    for read, written in zip(run_graph(parsed, inputs), run_graph(graph, inputs), strict=True):
        assert (read.dtype, read.shape, read.stride()) == (
            written.dtype,
            written.shape,
            written.stride(),
        )
        assert _bits(read) == _bits(written)


@given(graphs, st.data())
def test_a_text_cut_anywhere_says_that_it_ends_early(graph, data):
    text = print_graph(graph)
    first_line = text.index("\n")
    cut = text[: data.draw(st.integers(first_line, len(text) - 3))]
    with pytest.raises(TextError) as caught:
        parse_graph(cut, _constants(graph))
    last_line = len(cut.rstrip().split("\n"))
    assert caught.value.message == f"the text ends early, after line {last_line}"


EVERYTHING = (Path(__file__).parents[1] / "golden" / "everything.gopt").read_text()


@given(st.one_of(graphs.map(print_graph), st.just(EVERYTHING)), st.data())
def test_a_damaged_text_is_refused_or_means_something(text, data):
    """Whatever one changes, the parser answers with a graph that prints, or with a `TextError`."""
    tokens = re.split(r"(\W)", text)
    index = data.draw(st.integers(0, len(tokens) - 1))
    others = ["", "0", "f32", "%", '"', "(", "}", "\n", *tokens]
    tokens[index] = data.draw(st.sampled_from(others))
    with contextlib.suppress(TextError):
        again = print_graph(parse_graph("".join(tokens)))
        assert print_graph(parse_graph(again)) == again


@given(graphs)
def test_names_of_values_make_no_difference(graph):
    text = print_graph(graph)
    renamed = re.sub(r"%(\w+)", r"%v_\1_x", text)
    assert not diff_texts(text, renamed)
    assert not diff_graphs(graph, parse_graph(renamed, _constants(graph)))


@given(graphs, graphs)
def test_a_diff_accounts_for_every_line(before, after):
    found = diff_graphs(before, after)
    kinds = [change.kind for change in found.changes]
    lines = [len(g.nodes) - 1 + len(g.outputs) for g in (before, after)]
    assert lines[0] - kinds.count("removed") + kinds.count("added") == lines[1]
    undone = diff_graphs(after, before)
    assert bool(undone) == bool(found) == (_anonymous(before) != _anonymous(after))


def _anonymous(graph: Graph) -> str:
    """The text with values named in the order of their lines."""
    names = {node.name: f"v{index}" for index, node in enumerate(graph.nodes)}
    return re.sub(r"%(\w+)", lambda match: f"%{names[match[1]]}", print_graph(graph))
