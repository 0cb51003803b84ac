"""Writes to tensors from which no graph can be made: what is said of them, and on which line."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from graphopt.errors import CaptureError
from graphopt.graph import source_of
from graphopt.plan import Role, Slot

_OUTSIDE = "change it outside of forward, or compute with a changed copy of it"


def to_input(module: fx.GraphModule, slots: Sequence[Slot], index: int) -> CaptureError:
    """Forward changes a tensor in place which it differentiates, too."""
    slot = slots[index]
    place = module.graph.find_nodes(op="placeholder")[index]
    value = _value(place)
    if slot.role is Role.BUFFER and value is not None:
        return CaptureError(
            f"forward writes a value that requires a gradient into {slot}",
            where=_line(module, place),
            hint="write its detach(), and compute with the value itself",
        )
    return CaptureError(
        f"forward changes {slot}, which requires a gradient, in place",
        where=_line(module, place),
        hint="work on a clone: x = x.clone()" if slot.role is Role.INPUT else _OUTSIDE,
    )


def to_data(module: fx.GraphModule, slots: Sequence[Slot]) -> CaptureError:
    """Forward gives a tensor another memory."""
    placeholders = module.graph.find_nodes(op="placeholder")
    write = next((n for n in module.graph.nodes if _name(n) in ("set_", "resize_")), None)
    changed = write.args[0] if write is not None else None
    slot = slots[placeholders.index(changed)] if changed in placeholders else None
    value = _value(changed)
    trained = value is None or value.requires_grad
    return CaptureError(
        f"forward assigns to the `.data` of {slot or 'a tensor of the model'}",
        where=source_of(write) if write is not None else "",
        hint=_OUTSIDE if trained else "change it in place: with torch.no_grad(): tensor.copy_(…)",
    )


def only_line(module: fx.GraphModule) -> str:
    """The line of the operators in place, where it is one."""
    lines = {source_of(node) for node in module.graph.nodes if _in_place(node)}
    return lines.pop() if len(lines) == 1 else ""


def _line(module: fx.GraphModule, changed: fx.Node) -> str:
    """The first line that writes to the memory of an input; else the only one that uses it."""
    memory = _memory(changed)
    for node in module.graph.nodes:
        if _in_place(node) and memory is not None and _memory(node.args[0]) == memory:
            return source_of(node)
    lines = {source_of(user) for user in changed.users}
    return lines.pop() if len(lines) == 1 else ""


def _in_place(node: fx.Node) -> bool:
    name = _name(node)
    return bool(name.endswith("_") and not name.endswith("__") and node.args)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _value(node: object) -> Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _memory(node: object) -> int | None:
    value = _value(node)
    return None if value is None else value.untyped_storage()._cdata
