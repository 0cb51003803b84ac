"""In which formats one value is kept and read, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphopt.graph import Graph, operator_name, phase_of, value_of
from graphopt.passbase import Row

_CAST = torch.ops.aten._to_copy.default


@dataclass(frozen=True)
class Reading:
    """An operator that reads a value.

    Attributes:
        node: its name.
        operator: what it calls.
        phase: the half of the step that it belongs to.
        format: in which it reads the value.
        cast: the node that casts the value for it; empty where it needs none.
        why: what was decided about it, where that is known.
    """

    node: str
    operator: str
    phase: str
    format: str
    cast: str
    why: str


@dataclass(frozen=True)
class FormatStory:
    """What became of the format of one floating-point value.

    Attributes:
        before: its format as captured; empty for a node that a pass made.
        after: its format in the end; empty where the node is gone.
        why: what was decided about the operator that makes it, where that is known.
        casts: the nodes that cast it, each with the format that it casts to.
        readings: who reads it.
    """

    before: str
    after: str
    why: str
    casts: Mapping[str, str]
    readings: tuple[Reading, ...]


def format_of(node: fx.Node | None) -> str:
    """``"float32"``; empty for what is no floating-point tensor."""
    value = value_of(node) if node is not None else None
    if isinstance(value, Tensor) and value.is_floating_point():
        return str(value.dtype).removeprefix("torch.")
    return ""


def format_story(
    graph: Graph, node: fx.Node | None, before: str, rows: Mapping[str, Row]
) -> FormatStory:
    """The story of a node of a rewritten graph.

    Args:
        graph: as rewritten.
        node: the value; ``None`` where it is gone.
        before: its format as captured.
        rows: what was decided, by node: with ``format``, ``reason`` and ``detail``.
    """
    if node is None:
        return FormatStory(before, "", "", {}, ())
    casts = [user for user in node.users if _is_cast(user, node)]
    direct = [u for u in node.users if u not in casts and u.op == "call_function"]
    readings = [_reading(u, format_of(node), "", rows) for u in direct]
    readings += [
        _reading(user, format_of(cast), cast.name, rows)
        for cast in casts
        for user in cast.users
        if user.op == "call_function"
    ]
    order = {n.name: i for i, n in enumerate(graph.nodes)}
    readings.sort(key=lambda r: order[r.node])
    return FormatStory(
        before,
        format_of(node),
        _why(node.name, rows),
        {cast.name: format_of(cast) for cast in casts},
        tuple(readings),
    )


def _is_cast(user: fx.Node, value: fx.Node) -> bool:
    return user.target is _CAST and format_of(user) not in ("", format_of(value))


def _reading(user: fx.Node, format: str, cast: str, rows: Mapping[str, Row]) -> Reading:
    phase = str(phase_of(user))
    return Reading(user.name, operator_name(user), phase, format, cast, _why(user.name, rows))


def _why(name: str, rows: Mapping[str, Row]) -> str:
    row = rows.get(name)
    if row is None:
        return ""
    words = row["detail"] or row["reason"]
    return f"runs in {row['format']}" + (f": {words}" if words else "")
