"""The lines of a program as comparable items, independent of how values are named."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace

from graphopt.plan import Phase, Role, Slot
from graphopt.text.syntax import (
    NONE,
    Call,
    Constant,
    Input,
    Literal,
    Program,
    Ref,
    Statement,
    SubGraph,
    Type,
    refs,
)
from graphopt.text.writer import write, write_output, write_statement, write_type

_ROLES = frozenset(Role)
_OF_MODULES = frozenset({Role.PARAM, Role.BUFFER, Role.GRAD, Role.LOCAL, Role.MUTATION, Role.AUX})


@dataclass(frozen=True, eq=False)
class Item:
    """One line of a program: an input, a node or an output.

    Attributes:
        position: its place in the program.
        number: equal for all items, of any program of one `Numbering`, that compute the same value.
        op: operator, or role of an input or output.
        detail: its arguments without the values that it uses; the name of an input or output.
        operands: positions of the items that it uses, in order.
        type: type of the value that it makes.
        module: qualified name of the module that it belongs to.
        phase: the half of the step.
        recompute: policy of activation checkpointing, with its region.
        line: its text, without the module.
    """

    position: int
    number: int
    op: str
    detail: str
    operands: tuple[int, ...]
    type: Type
    module: str
    phase: Phase
    recompute: str
    line: str

    @property
    def is_slot(self) -> bool:
        """Whether it is an input or output of the graph."""
        return self.op in _ROLES


class Numbering:
    """Gives equal expressions equal numbers (hash consing)."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def __call__(self, *expression: Hashable) -> int:
        """The number of an expression."""
        return self._numbers.setdefault(expression, len(self._numbers))


def items_of(program: Program, numbering: Numbering) -> tuple[Item, ...]:
    """All lines of a program, in order."""
    items: list[Item] = []
    by_name: dict[str, Item] = {}
    graphs: dict[str, int] = {}
    for statement in program.statements:
        op, detail = _describe(statement, numbering, graphs)
        operands = [by_name[name] for name in _uses(statement)]
        slot = statement.what.slot if isinstance(statement.what, Input) else None
        item = Item(
            position=len(items),
            number=numbering(op, detail, *(operand.number for operand in operands)),
            op=op,
            detail=detail,
            operands=tuple(operand.position for operand in operands),
            type=statement.type,
            module=_owner(slot) if slot else statement.module,
            phase=statement.phase,
            recompute=f"{statement.recompute}:{statement.region}" if statement.recompute else "",
            line=write_statement(replace(statement, module="", source="")),
        )
        items.append(item)
        by_name[statement.name] = item
    items.extend(_outputs(program, by_name, numbering, len(items)))
    return tuple(items)


def _outputs(
    program: Program, by_name: dict[str, Item], numbering: Numbering, start: int
) -> Iterator[Item]:
    for position, (slot, name) in enumerate(program.outputs, start):
        source = by_name[name]
        yield Item(
            position=position,
            number=numbering(slot.role, slot.name, source.number),
            op=slot.role,
            detail=slot.name,
            operands=(source.position,),
            type=NONE,
            module=_owner(slot),
            phase=slot.phase,
            recompute="",
            line=write_output(slot, name),
        )


def _owner(slot: Slot) -> str:
    """The module whose parameter or buffer a slot is about."""
    return slot.name.rpartition(".")[0] if slot.role in _OF_MODULES else ""


def _uses(statement: Statement) -> Iterator[str]:
    if isinstance(statement.what, Call):
        yield from refs(statement.what.args)
        yield from refs(statement.what.kwargs)


def _describe(
    statement: Statement, numbering: Numbering, graphs: dict[str, int]
) -> tuple[str, str]:
    """Operator and detail; `graphs` numbers the sub-graphs shown so far."""
    what = statement.what
    match what:
        case Input(slot):
            return (slot.role, slot.name) if slot else ("arg", write_type(statement.type))
        case Constant():
            held = what.target if what.values is None else repr(what.values)
            return "const", f"{write_type(statement.type)} {held}"
        case SubGraph():
            if what.body:
                graphs[what.target] = _number_body(what, numbering)
            return "graph", str(graphs[what.target])
    return what.op, write((_anonymous(what.args), _anonymous(what.kwargs)))


def _number_body(what: SubGraph, numbering: Numbering) -> int:
    assert what.body
    graphs: dict[str, int] = {}
    numbers: dict[str, int] = {}
    for index, statement in enumerate(what.body.statements):
        op, detail = _describe(statement, numbering, graphs)
        # The arguments of a sub-graph are told apart by their order.
        place = index if isinstance(statement.what, Input) else -1
        numbers[statement.name] = numbering(
            op, detail, place, *(numbers[name] for name in _uses(statement))
        )
    result = what.body.result
    return numbering(write(_anonymous(result)), *(numbers[name] for name in refs(result)))


def _anonymous(value: Literal) -> Literal:
    """The argument with all values it uses made equal."""
    match value:
        case Ref():
            return Ref("")
        case tuple():
            return tuple(_anonymous(item) for item in value)
        case list():
            return [_anonymous(item) for item in value]
        case dict():
            return {key: _anonymous(item) for key, item in value.items()}
    return value
