"""Output for people: what it says, what folds, what fits."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from graphopt.analysis.provenance import provenance
from graphopt.analysis.summary import Summary, Totals, summary
from graphopt.capture import capture
from graphopt.graph import Graph
from graphopt.passbase import EXACT, Applied, Declined, Outcome
from graphopt.pipeline.step import PassStep
from graphopt.render.html import graph_html
from graphopt.render.provenance import provenance_view
from graphopt.render.rows import Row, fitting_depth, rows
from graphopt.render.steps import step_view
from graphopt.render.text import GraphTable
from graphopt.render.units import count, duration, size
from tests.support.graphs import inference_graph, linear_graph
from tests.support.models_for_cli import Net


@pytest.fixture(scope="module")
def net_graph() -> Graph:
    torch.manual_seed(0)
    return capture(Net(blocks=4), (torch.randn(2, 3, 8, 8),)).graph


def printed(view: RenderableType, width: int = 100) -> str:
    console = Console(width=width, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(view)
    return captured.get()


def lines(view: RenderableType, width: int = 100) -> list[str]:
    return [line.rstrip() for line in printed(view, width).splitlines()]


# -- units -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "-"),
        (7, "7"),
        (999, "999"),
        (1000, "1 k"),
        (12345, "12.3 k"),
        (999_499, "999 k"),
        (999_500, "1 M"),
        (5_758_176, "5.76 M"),
        (3.2e18, "3200 P"),
    ],
)
def test_counts_have_three_digits(value: float, text: str) -> None:
    assert count(value) == text


def test_sizes_and_durations_have_units() -> None:
    assert [size(0), size(512), size(151_104)] == ["-", "512 B", "151 kB"]
    assert [duration(0.0123), duration(2.0)] == ["12.3 ms", "2.00 s"]


# -- rows ------------------------------------------------------------------------------------------


def module(path: str, ops: int, *children: Summary) -> Summary:
    return Summary(path, "K", "f32[2]", 0, Totals(ops), Totals(), 0, children)


def trees(path: str = "", depth: int = 3) -> st.SearchStrategy[Summary]:
    def node(ops: int, children: tuple[Summary, ...]) -> Summary:
        return module(path, ops, *children)

    if depth == 0:
        return st.builds(node, st.integers(1, 2), st.just(()))
    below = st.integers(0, 3).flatmap(
        lambda n: st.tuples(*(trees(f"{path}.{i}".lstrip("."), depth - 1) for i in range(n)))
    )
    return st.builds(node, st.integers(1, 2), below)


def stands_for(row: Row) -> Iterator[int]:
    """For every line, how many modules it and the lines above it stand for."""
    yield row.times
    for child in row.children:
        yield from (row.times * below for below in stands_for(child))


@settings(deadline=None)
@given(trees())
def test_lines_stand_for_all_modules_and_neighbours_differ(tree: Summary) -> None:
    row = rows(tree)
    assert sum(stands_for(row)) == sum(1 for _ in tree.walk())
    for line in row.walk(row.height):
        labels = [child.label for child in line.children]
        assert len(set(labels)) == len(labels)


@settings(deadline=None)
@given(trees(), st.integers(1, 20))
def test_the_fitting_depth_is_the_largest_that_fits(tree: Summary, limit: int) -> None:
    row = rows(tree)
    depth = fitting_depth(row, limit)
    used = sum(1 for _ in row.walk(depth))
    assert used <= limit or depth == 1
    if depth < row.height:
        assert sum(1 for _ in row.walk(depth + 1)) > limit


def test_modules_that_differ_deep_inside_are_kept_apart() -> None:
    inner = [module(f"layers.{i}.lin", ops) for i, ops in enumerate((1, 1, 2))]
    layers = [module(f"layers.{i}", 5, child) for i, child in enumerate(inner)]
    labels = [(c.label, c.times) for c in rows(module("layers", 15, *layers)).children]
    assert labels == [("0, 1", 2), ("2", 1)]


# -- text ------------------------------------------------------------------------------------------


def test_the_table_of_a_small_graph() -> None:
    assert lines(GraphTable(linear_graph(), "lin")) == [
        "module output   params ops FLOPs bytes saved",
        "lin    f32[4,2]      6 1+2    96 208 B     -",
        "",
        "forward   1 ops, 48 FLOP, 104 B moved",
        "backward  2 ops, 48 FLOP, 104 B moved",
        "peak      56 B beside inputs and parameters, at mm_1",
    ]


def test_an_inference_graph_has_no_backward_line() -> None:
    text = printed(GraphTable(inference_graph(), "m"))
    assert "backward" not in text
    assert "forward  2 ops" in text


def test_equal_layers_share_a_line_and_the_last_one_differs(net_graph: Graph) -> None:
    table = lines(GraphTable(net_graph, "net", depth=2))
    labels = [line.split("f32")[0].strip() for line in table[1:7]]
    assert labels == [
        "net",
        "stem Conv2d",
        "layers",
        "0 … 2 (x3, each) Block",
        "3 Block",
        "head Linear",
    ]


def test_depth_limits_the_lines_and_narrow_terminals_lose_nothing(net_graph: Graph) -> None:
    table = lines(GraphTable(net_graph, "net", depth=0))
    assert table[1].startswith("net ")
    assert table[2] == ""
    narrow = lines(GraphTable(net_graph, "net"), width=70)
    assert max(map(len, narrow)) <= 70
    assert any(line.startswith("    0 … 2 (x3, each)") for line in narrow)
    assert any(line.startswith("      norm") for line in narrow)


# -- steps and provenance --------------------------------------------------------------------------


def step(outcome: Outcome, skipped: str = "") -> PassStep:
    return PassStep("cleanup{x=[1]}", EXACT, outcome, 0.5, 0.001, 12, 10, skipped)


def test_sites_are_grouped_by_what_was_done_and_by_reason() -> None:
    applied = [Applied(f"layers.{i}", "merged [twice]", {"bytes": 64}) for i in range(6)]
    declined = Declined("dropout", "random-op", "two draws differ", {"p": 0.5})
    text = printed(step_view(step(Outcome(tuple(applied), (declined,)))), width=300)
    assert [line.rstrip() for line in text.splitlines()] == [
        "cleanup{x=[1]}  12 → 10 nodes, exact, 500 ms, checked in 1 ms",
        "  applied 6x merged [twice]: layers.0 (bytes=64), layers.1 (bytes=64), "
        "layers.2 (bytes=64), layers.3 (bytes=64) and 2 more",
        "  declined random-op: two draws differ: dropout (p=0.5)",
        "",
    ]


def test_many_different_things_are_cut_with_their_number() -> None:
    applied = tuple(Applied("w", f"computed mul_{i} once") for i in range(20))
    shown = lines(step_view(step(Outcome(applied))))
    assert len(shown) == 1 + 8 + 1 + 1
    assert shown[-2] == "  applied 12 more, which --json shows"


def test_a_pass_without_candidates_and_a_skipped_one_say_so() -> None:
    assert "no candidate in this graph" in printed(step_view(step(Outcome())))
    text = printed(step_view(step(Outcome(), "it works on joint graphs")))
    assert text == "cleanup{x=[1]}  skipped, it works on joint graphs\n"


def test_a_story_shows_facts_then_decisions(net_graph: Graph) -> None:
    told = provenance(net_graph, "head.weight")
    decision = step(Outcome((Applied("head.weight", "kept"),)))
    shown = lines(provenance_view(told, [decision], removed=True), width=200)
    assert shown[0] == "head.weight  param"
    facts = [line.split("  ")[0] for line in shown[1:]]
    assert facts == [
        "type", "node", "module", "source", "used forward", "used backward", "gradient", "ready",
        "removed", "pass",
    ]  # fmt: skip
    assert shown[-1] == "pass           cleanup{x=[1]}: applied kept"


# -- html ------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """Checks that tags are balanced, and collects headings and tooltips."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.tooltips: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.rows += tag == "tr"
        self.tooltips += [value for key, value in attrs if key == "title" and value]
        assert not {"src", "href"} & {key for key, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["b"]:
            self.headings.append(data)


def test_html_is_balanced_self_contained_and_complete(net_graph: Graph) -> None:
    outline = Outline()
    outline.feed(graph_html(net_graph, "<net>"))
    outline.close()
    assert outline.open == []
    assert outline.headings[:3] == ["<net>", "stem", "layers"]
    assert outline.rows == len(list(net_graph.operators))
    assert any("self.conv(x)" in tooltip for tooltip in outline.tooltips)
    assert len(outline.headings) == sum(1 for _ in net_graph.get(summary).walk())
