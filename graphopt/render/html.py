"""A graph as one self-contained HTML fragment, collapsible by module."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from torch import fx

from graphopt.analysis.cost import cost
from graphopt.analysis.regions import Region, regions
from graphopt.analysis.summary import Summary, describe, summary
from graphopt.graph import Graph, operator_name, phase_of, source_of, value_of
from graphopt.plan import Phase
from graphopt.render.units import count, size

_STYLE = """
.graphopt {font: 13px/1.5 ui-monospace, monospace; color-scheme: light dark}
.graphopt details {margin-left: 1.2em}
.graphopt summary {cursor: pointer}
.graphopt table {border-collapse: collapse; margin: .2em 0 .4em 1.2em}
.graphopt td {padding: 0 .8em 0 0; vertical-align: top}
.graphopt .figures {opacity: .65; margin-left: .8em}
.graphopt .forward td:first-child {border-left: 3px solid #3b82c4; padding-left: .5em}
.graphopt .backward td:first-child {border-left: 3px solid #c4703b; padding-left: .5em}
"""


def graph_html(graph: Graph, name: str = "model") -> str:
    """`graph` as HTML: modules fold, operators carry their source line as a tooltip.

    The fragment needs no network, no script and no style sheet; it can be a file of its own or the
    output of a notebook cell.
    """
    body = "".join(_module(graph, graph.get(regions), graph.get(summary), name))
    return f'<div class="graphopt"><style>{_STYLE}</style>{body}</div>\n'


def _module(graph: Graph, region: Region, figures: Summary, label: str) -> Iterator[str]:
    opened = "" if region.path else " open"
    kind = f" <i>{escape(region.kind)}</i>" if region.kind else ""
    yield f"<details{opened}><summary><b>{escape(label)}</b>{kind}{_figures(figures)}</summary>"
    for child, below in zip(region.children, figures.children, strict=True):
        yield from _module(graph, child, below, child.path.rpartition(".")[2])
    if region.nodes:
        yield "<table>"
        yield from (_node(graph, node) for node in region.nodes)
        yield "</table>"
    yield "</details>"


def _figures(figures: Summary) -> str:
    forward, backward = figures.forward, figures.backward
    parts = (
        figures.output,
        f"{count(figures.parameters)} params",
        f"{forward.ops}+{backward.ops} ops",
        f"{count(forward.flops + backward.flops)} FLOP",
        f"{size(forward.bytes + backward.bytes)} moved",
        f"{size(figures.saved)} saved",
    )
    return f'<span class="figures">{escape(" · ".join(p for p in parts if p))}</span>'


def _node(graph: Graph, node: fx.Node) -> str:
    phase = "backward" if phase_of(node) is Phase.BACKWARD else "forward"
    price = graph.get(cost).by_node[node]
    cells = (
        node.name,
        operator_name(node),
        ", ".join(source.name for source in node.all_input_nodes),
        describe(value_of(node)),
        f"{count(price.flops)} FLOP" if price.flops else "",
    )
    tooltip = escape(source_of(node), quote=True)
    columns = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr class="{phase}" title="{tooltip}">{columns}</tr>'
