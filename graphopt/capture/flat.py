"""A captured forward before its backward is derived, and what every way in has to say about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch._guards import TracingContext

from graphopt.capture.hints import ZEROS, hint, says
from graphopt.capture.sizes import Size
from graphopt.errors import CaptureError
from graphopt.plan import Role, Slot

Runner = Callable[[Sequence[Tensor]], Sequence[Tensor]]
Bind = Callable[[Runner], Callable[..., object]]


def nothing_symbolic() -> tuple[Size, ...]:
    """What became of symbols where there are none."""
    return ()


@dataclass(frozen=True)
class FlatForward:
    """A torch-level graph whose placeholders are all the tensors that the call uses.

    `slots` names the placeholders; parameters and buffers by qualified name, the rest by where they
    came from in the call. `changes_objects` says whether a call changes Python objects that it has
    not made itself; `keeps` which of them it gives tensors or numbers, as Dynamo names them.
    Where sizes are symbols, they are whole numbers among the inputs; `settle` makes `holds`
    complete once the graph is derived, and says what became of them, and `finish` once passes and
    backend are done. `sizes_of` reads the sizes that are symbols off a call. `constants` are the
    numbers that were to be inputs and are not, and `counters` those that forward reads and assigns
    and are none either. `description` says what a later process can know the call by, or why not,
    once `settle` was called.
    `alone` are inputs by position whose memory no other tensor may have.
    """

    module: fx.GraphModule
    slots: tuple[Slot, ...]
    inputs: tuple[Tensor, ...]
    context: TracingContext
    route: str
    bind: Bind
    holds: Callable[..., bool]
    failure: Callable[..., str]
    notes: tuple[str, ...]
    changed: Callable[..., tuple[str, ...]] = lambda *args, **kwargs: ()
    changes_objects: bool = False
    keeps: tuple[str, ...] = ()
    settle: Callable[[], tuple[Size, ...]] = nothing_symbolic
    sizes_of: Callable[..., tuple[int, ...]] = lambda *_, **__: ()
    finish: Callable[[], None] = lambda: None
    constants: Callable[[], frozenset[str]] = frozenset
    counters: frozenset[str] = frozenset()
    description: Callable[[], Mapping[str, Any] | str] = lambda: "it was not asked for"
    alone: tuple[int, ...] = ()

    @property
    def symbolic(self) -> bool:
        """Whether some of the inputs are sizes."""
        return any(slot.role is Role.SIZE for slot in self.slots)

    @property
    def fakes(self) -> tuple[Any, ...]:
        """The inputs as Dynamo saw them, with symbols for sizes that vary.

        A graph that passes have rewritten has them under the name of ours.
        """
        found = [node.meta for node in self.module.graph.find_nodes(op="placeholder")]
        return tuple(m["example_value" if "example_value" in m else "val"] for m in found)


def name_inputs(
    model: nn.Module, inputs: Sequence[Any], fallback: Sequence[str]
) -> tuple[Slot, ...]:
    """Role and name of every flat input, found by identity with the model's own tensors."""
    known = {id(t): Slot(Role.BUFFER, n) for n, t in model.named_buffers(remove_duplicate=True)}
    known |= {id(t): Slot(Role.PARAM, n) for n, t in model.named_parameters()}
    taken = {slot.name for slot in known.values()}
    slots = []
    for tensor, name in zip(inputs, fallback, strict=True):
        slot = known.get(id(tensor))
        if slot is None:
            while name in taken:
                name += "_"
            taken.add(name)
            slot = Slot(Role.INPUT if isinstance(tensor, Tensor) else Role.SIZE, name)
        slots.append(slot)
    return tuple(slots)


def refused(
    error: Exception,
    forward: Callable[..., object],
    model: nn.Module | None = None,
    given: object = None,
) -> CaptureError:
    """What Dynamo said, as one sentence with the user's source line.

    Args:
        error: what was raised.
        forward: what was captured.
        model: the model, where hooks of its modules may be the reason.
        given: the arguments of the call.
    """
    reason = str(error).split("from user code:")[0]  # the user's words are no reason
    if model is not None and "backwards hooks" in reason:
        return _hooked(model)
    frames = getattr(error, "real_stack", None) or ()
    reason += "".join(f"\nin {f.name}" for f in frames if f.name.endswith("trunc_normal_"))
    stack = [f for f in frames if "/torch/" not in f.filename]
    where = f"{stack[-1].filename}:{stack[-1].lineno}: {stack[-1].line}" if stack else ""
    return CaptureError(
        says(reason) or f"forward cannot be captured as one graph: {first_line(error)}",
        where=where or location(forward),
        hint=hint(reason, given, where),
    )


def _hooked(model: nn.Module) -> CaptureError:
    """A graph has no node of autograd for a module inside of the model."""
    for name, module in model.named_modules():
        hooks = (*module._backward_hooks.values(), *module._backward_pre_hooks.values())
        if name and hooks:
            return CaptureError(
                f"a module inside of the model has a full backward hook: {name}",
                where=location(hooks[0]),
                hint=f"remove the hook; {ZEROS}",
            )
    return CaptureError("a module inside of the model has a full backward hook", hint=ZEROS)


def location(forward: Callable[..., object]) -> str:
    """``file:line`` of a function, for messages."""
    code = getattr(forward, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}: def {code.co_name}" if code else ""


def first_line(error: object) -> str:
    """The first line of a message that is not empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
