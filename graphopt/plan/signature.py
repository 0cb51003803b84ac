"""Roles and names of all inputs and outputs of a graph."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from types import CodeType
from typing import Annotated, Any

from graphopt.plan.limits import Count, Within


class Role(StrEnum):
    """What an input or output of a graph is to the model.

    ``LOCAL`` is the gradient of this rank's own batch, beside the reduced ``GRAD``: what a step of
    gradient accumulation that does not communicate returns. ``AUX`` is a value that a pass lets
    either half compute for its runtime part, and ``STATE`` a tensor that the part keeps between
    steps; both are named ``"<pass>/<what>"``. ``SIZE`` is a size of one of the call's tensors that
    varies: a Python ``int``, and a symbol of the graph.
    """

    PARAM = "param"
    BUFFER = "buffer"
    INPUT = "input"
    SIZE = "size"
    TANGENT = "tangent"
    STATE = "state"
    OUTPUT = "output"
    GRAD = "grad"
    LOCAL = "local"
    MUTATION = "mutation"
    AUX = "aux"


class Phase(StrEnum):
    """The half of a training step that a node or an output belongs to."""

    FORWARD = "forward"
    BACKWARD = "backward"


INPUT_ROLES = frozenset({Role.PARAM, Role.BUFFER, Role.INPUT, Role.SIZE, Role.TANGENT, Role.STATE})
OUTPUT_ROLES = frozenset({Role.OUTPUT, Role.GRAD, Role.LOCAL, Role.MUTATION, Role.AUX})


@dataclass(frozen=True)
class Slot:
    """One input or output of a graph.

    Attributes:
        role: what it is.
        name: the qualified name of a parameter or buffer (``"layer1.conv.weight"``), the position
            of a plain input, output or tangent (``"0"``), tensor and dimension of a size
            (``"ids.1"``), the name of a pass's state. A ``GRAD`` or ``MUTATION`` output carries the
            name of the input it belongs to.
        phase: the half of the step that produces (output) or first consumes (input) it.
    """

    role: Role
    name: str
    phase: Phase = Phase.FORWARD

    def __str__(self) -> str:
        return f"{self.role} {self.name!r}"


@dataclass(frozen=True)
class Signature:
    """Roles and names of all inputs and outputs of a graph, in order.

    Forward outputs come before backward outputs. A ``MUTATION`` output is written back into the
    input of the same name when its half of the step has run.
    """

    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]

    def __post_init__(self) -> None:
        phases = [slot.phase for slot in self.outputs]
        if phases != sorted(phases, key=list(Phase).index):
            raise ValueError("forward outputs must come before backward outputs")

    @property
    def num_forward_outputs(self) -> int:
        """Outputs of the forward half, mutations included."""
        return sum(slot.phase is Phase.FORWARD for slot in self.outputs)

    def input_index(self, role: Role, name: str) -> int:
        """Position of an input; raises ``KeyError`` when there is none."""
        return _index(self.inputs, role, name)

    def output_index(self, role: Role, name: str) -> int:
        """Position of an output; raises ``KeyError`` when there is none."""
        return _index(self.outputs, role, name)

    def names(self, role: Role) -> tuple[str, ...]:
        """Names of all inputs or outputs with this role, in order."""
        slots = self.inputs if role in INPUT_ROLES else self.outputs
        return tuple(slot.name for slot in slots if slot.role is role)


def _index(slots: tuple[Slot, ...], role: Role, name: str) -> int:
    for index, slot in enumerate(slots):
        if slot.role is role and slot.name == name:
            return index
    raise KeyError(f"{role} {name!r}")


@dataclass(frozen=True)
class OutputAlias:
    """An output of the model that is one of its inputs, or a view of one.

    Attributes:
        output: position among the model's outputs.
        input: position among the graph's inputs.
        size, stride, offset: geometry of the view, where the offset counts from the beginning of
            the input; empty `size` and ``offset == -1`` for the input itself. A text is an
            expression of inputs that are sizes, by position (``"8*n2"``).
        detached: whether no gradient flows from it into the input.
    """

    output: Count
    input: Count
    size: tuple[Count | str, ...] = ()
    stride: tuple[Count | str, ...] = ()
    offset: Annotated[int, Within(-1, 2**63 - 1)] | str = -1
    detached: bool = False

    def __post_init__(self) -> None:
        if len(self.size) != len(self.stride):
            raise ValueError(f"{len(self.size)} sizes have {len(self.stride)} strides")
        for value in (*self.size, *self.stride, self.offset):
            if isinstance(value, str):
                _compiled(value)
        if self.offset == -1 and self.size:
            raise ValueError("a view has an offset")

    @property
    def is_view(self) -> bool:
        """Whether it is another tensor than the input."""
        return self.offset != -1

    def reads(self) -> set[int]:
        """Positions of the inputs that tell its geometry."""
        texts = [v for v in (*self.size, *self.stride, self.offset) if isinstance(v, str)]
        return {position for text in texts for position in _compiled(text)[1]}

    def geometry(self, inputs: Sequence[Any]) -> tuple[list[int], list[int], int]:
        """Size, stride and offset of the view in a call with these inputs of the graph."""
        size, stride = ([_number(n, inputs) for n in part] for part in (self.size, self.stride))
        return size, stride, _number(self.offset, inputs)


_POSITION = re.compile(r"\bn(\d+)\b")


# What expressions of sizes consist of; a plan may come from anywhere, and they are evaluated.
_ARITHMETIC = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Call, ast.Constant, ast.Name, ast.Load,
    ast.IfExp, ast.Compare, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq,
    ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Pow, ast.USub,
)  # fmt: skip
_LONGEST = 2000


@cache
def _compiled(text: str) -> tuple[CodeType, tuple[int, ...]]:
    """The code of a size, and the inputs that it reads.

    Raises:
        ValueError: it is none.
    """
    try:
        if len(text) > _LONGEST or not all(map(_is_arithmetic, ast.walk(tree := _parsed(text)))):
            raise ValueError("it has something else than numbers, inputs, max and min")
        code = compile(tree, "<a size>", "eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text[:60]!r} is no size of a view: {error}") from error
    return code, tuple(map(int, _POSITION.findall(text)))


def _parsed(text: str) -> ast.Expression:
    return ast.parse(text, "<a size>", "eval")


def _is_arithmetic(node: ast.AST) -> bool:
    match node:
        case ast.Constant():
            return type(node.value) is int
        case ast.Name():
            return node.id in ("max", "min") or _POSITION.fullmatch(node.id) is not None
        case ast.BinOp(op=ast.Pow()):
            exponent = getattr(node.right, "value", None)
            return type(exponent) is int and 0 <= exponent <= 8
        case ast.Call():
            return isinstance(node.func, ast.Name) and not node.keywords
    return isinstance(node, _ARITHMETIC)


def _number(value: int | str, inputs: Sequence[Any]) -> int:
    if not isinstance(value, str):
        return value
    code, positions = _compiled(value)
    names = {"max": max, "min": min, "__builtins__": {}}
    return int(eval(code, names, {f"n{i}": inputs[i] for i in positions}))
