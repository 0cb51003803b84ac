"""What a `.gopt` text says, as plain data: the meeting point of reader, writer, builder and diff.

A `Program` names operators and values but holds no torch graph, so texts can be compared without
running anything and without the large constants that they refer to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import EllipsisType
from typing import NamedTuple

import torch

from graphopt.plan import INPUT_ROLES, OUTPUT_ROLES, Phase, Role, Slot
from graphopt.text.sizes import Size, Symbol


@dataclass(frozen=True)
class Ref:
    """A use of a value: ``%name``."""

    name: str


@dataclass(frozen=True)
class OpName:
    """An operator that is itself an argument: ``aten.mm.default``."""

    name: str


@dataclass(frozen=True)
class TensorType:
    """Everything about a tensor but its values: ``f32[8,4]{1,8} cuda:0``."""

    dtype: torch.dtype
    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    device: torch.device


@dataclass(frozen=True)
class Slice:
    """``slice(None, %n, None)``: start, stop and step."""

    parts: tuple[Literal, ...]


@dataclass(frozen=True)
class SizeType:
    """A whole number that is known in terms of symbols: ``int 2*s0``."""

    value: Size


# A string is the type of a plain Python value; see `SCALARS`.
Type = TensorType | SizeType | str | tuple["Type", ...]
NONE = "none"
SCALARS = (NONE, "bool", "int", "float")

Literal = (
    None | bool | int | float | complex | str | Ref | OpName | Slice | EllipsisType
    | torch.dtype | torch.device | torch.layout | torch.memory_format
    | tuple["Literal", ...] | list["Literal"] | dict[str, "Literal"]
)  # fmt: skip


class Place(NamedTuple):
    """Where something stands in a text; both count from 1."""

    line: int = 0
    column: int = 0


@dataclass(frozen=True)
class Input:
    """``param "lin.weight"``; without a slot, an ``arg`` of a sub-graph."""

    slot: Slot | None


@dataclass(frozen=True)
class Constant:
    """``const "name" = [1.0, 2.0]``: a tensor of the module.

    Attributes:
        target: its qualified name within the graph or sub-graph.
        values: all elements in row-major order, as numbers or as the bytes of their memory;
            ``None`` for a tensor that the text holds by reference.
    """

    target: str
    values: tuple[bool | int | float, ...] | bytes | None


@dataclass(frozen=True)
class SubGraph:
    """``graph "true_graph_0" { … }``; `body` is ``None`` where the same sub-graph came before."""

    target: str
    body: Body | None


@dataclass(frozen=True)
class Call:
    """``aten.mm.default(%a, %b)``."""

    op: str
    args: tuple[Literal, ...]
    kwargs: dict[str, Literal]


@dataclass(frozen=True)
class Statement:
    """One line: a value, what makes it, and what is known about it.

    Attributes:
        name: the value's name, without ``%``.
        what: how it comes to be.
        type: its type; ``"none"`` for an operator without a result, and for sub-graphs.
        phase: the half of the step.
        module: qualified name of the module that it belongs to.
        recompute: activation-checkpointing policy in lower case, or ``""``.
        region: number of the checkpointed region, or ``None``.
        source: ``file:line`` of the user's code; a comment, not read back.
        place, type_place: where the operator and the type stand.
    """

    name: str
    what: Input | Constant | SubGraph | Call
    type: Type
    phase: Phase = Phase.FORWARD
    module: str = ""
    recompute: str = ""
    region: int | None = None
    source: str = field(default="", compare=False)
    place: Place = field(default=Place(), compare=False)
    type_place: Place = field(default=Place(), compare=False)


@dataclass(frozen=True)
class Body:
    """A sub-graph: its lines, and what it returns."""

    statements: tuple[Statement, ...]
    result: Literal


@dataclass(frozen=True)
class Program:
    """A whole text.

    Attributes:
        level: value of the graph's `Level`.
        torch: ``major.minor`` of the torch release that it was written with.
        facts: what is known about the graph.
        statements: inputs first.
        outputs: output slots with the name of the value that each returns.
        symbols: sizes that vary.
    """

    level: str
    torch: str
    facts: frozenset[str]
    statements: tuple[Statement, ...]
    outputs: tuple[tuple[Slot, str], ...]
    symbols: tuple[Symbol, ...] = ()


def refs(literal: Literal) -> Iterator[str]:
    """Names of the values that an argument uses, in order, with repetitions."""
    if isinstance(literal, Ref):
        yield literal.name
    elif isinstance(literal, tuple | list):
        for item in literal:
            yield from refs(item)
    elif isinstance(literal, dict):
        for item in literal.values():
            yield from refs(item)
    elif isinstance(literal, Slice):
        yield from refs(literal.parts)


def default_stride(shape: tuple[Size, ...]) -> tuple[Size, ...]:
    """The strides that torch gives a new contiguous tensor."""
    strides: list[Size] = []
    step: Size = 1
    for size in reversed(shape):
        strides.append(step)
        step = step * (max(size, 1) if isinstance(size, int) else size)
    return tuple(reversed(strides))


LAST_LINE = "end"
DEFAULT_FACTS = frozenset({"captured"})
INPUT_WORDS = {role.value: role for role in Role if role in INPUT_ROLES}
OUTPUT_WORDS = {role.value: role for role in Role if role in OUTPUT_ROLES}
