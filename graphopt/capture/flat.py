"""A captured forward before its backward is derived, and what every way in has to say about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn
from torch._guards import TracingContext

from graphopt.errors import CaptureError
from graphopt.plan import Role, Slot

Runner = Callable[[Sequence[Tensor]], Sequence[Tensor]]
Bind = Callable[[Runner], Callable[..., object]]


@dataclass(frozen=True)
class FlatForward:
    """A torch-level graph whose placeholders are all the tensors that the call uses.

    `slots` names the placeholders; parameters and buffers by qualified name, the rest by where they
    came from in the call. `changes_objects` says whether a call changes Python objects that it has
    not made itself.
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
    changes_objects: bool = False


def name_inputs(
    model: nn.Module, inputs: Sequence[Tensor], fallback: Sequence[str]
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
            slot = Slot(Role.INPUT, name)
        slots.append(slot)
    return tuple(slots)


def refused(
    error: Exception, forward: Callable[..., object], model: nn.Module | None = None
) -> CaptureError:
    """What Dynamo said, as one sentence with the user's source line."""
    reason = str(error).split("from user code:")[0]  # the user's words are no reason
    if model is not None and "backwards hooks" in reason:
        return _hooked(model)
    stack = [f for f in getattr(error, "real_stack", None) or () if "/torch/" not in f.filename]
    where = f"{stack[-1].filename}:{stack[-1].lineno}: {stack[-1].line}" if stack else ""
    return CaptureError(
        f"forward cannot be captured as one graph: {first_line(error)}",
        where=where or location(forward),
        hint=_hint(reason),
    )


_ZEROS = (
    "add zeros that require a gradient to the value: their gradient is the one of the value, and "
    "they can be hooked"
)


def _hooked(model: nn.Module) -> CaptureError:
    """A graph has no node of autograd for a module inside of the model."""
    for name, module in model.named_modules():
        hooks = (*module._backward_hooks.values(), *module._backward_pre_hooks.values())
        if name and hooks:
            return CaptureError(
                f"a module inside of the model has a full backward hook: {name}",
                where=location(hooks[0]),
                hint=f"remove the hook; {_ZEROS}",
            )
    return CaptureError("a module inside of the model has a full backward hook", hint=_ZEROS)


_HINTS = (
    (
        r"`?Random\.|generator of one's own|RandomState|default_rng|_numpy\.random|method random|`Generator\.",
        "draw by torch, which a graph does at every call: torch.rand(()); or draw outside of the "
        "model and pass what was drawn",
    ),
    (
        r"nested tensors of a padded batch",
        "make the encoder with enable_nested_tensor=False, with which eager does the same",
    ),
    (r"one_hot", "pass num_classes"),
    (
        r"_version",
        "count the changes yourself, in an attribute of the model, or keep what depends on them "
        "outside of the model",
    ),
    (
        r"Prints what is not known|Observed exception.*str % ",
        "give an f-string of it: print(f'{x}')",
    ),
    (r"Logger method", "log by its methods debug, info, warning and error"),
    (r"`?checkpoint_sequential", "checkpoint each segment of it by torch.utils.checkpoint"),
    (
        r"requires_grad=True|nn\.Parameter\(\)",
        "make it in __init__, or pass it to the model",
    ),
    (
        r"requires_grad_\(\)",
        "call requires_grad_ outside of forward; detach() what shall get no gradient",
    ),
    (
        r"tp_iternext",
        "take the next value outside of the model and pass it, or keep a list and an index",
    ),
    (r"SimpleNamespace|non-function __getattr__", "use a small class of your own for it"),
    (r"setattr\(\) on unsupported", "keep it in an attribute of the model"),
    (
        r"(?i)data-dependent",
        "choose by torch.where or torch.cond instead of by Python on tensor values",
    ),
    (
        r"manual_seed|rng_state|fork_rng|\(Generator\)|torch\.random",
        "draw outside of the model and pass what was drawn",
    ),
    (r"retain_grad", _ZEROS),
    (
        r"Non-nullified side effect|Higher Order Operator: torch\.utils\.checkpoint",
        "keep what is counted or recorded outside of what is checkpointed",
    ),
    (r"Unsafe side effect", "return what is recorded, instead of keeping it from inside of a hook"),
    (r"autograd\.grad|backward\(\)", "differentiate by torch.func.grad"),
    (r"tp_iter", "pass a list or a tuple"),
    (r"(?i)pack_(padded_)?sequence|PackedSequence", "pad the sequences, and mask what is padded"),
    (r"(?i)sparse tensor|nested.tensor", "compute with dense tensors, or outside of the model"),
    (r"context manager|`lock\.", "enter it around the call of the model"),
    (r"numpy function", "compute it by torch"),
    (r"inplace view", "give the view another name: y = x.t()"),
)


_OF_DYNAMO = ("torch._dynamo", "file an issue", "Dynamo tracing", "graph break", "docs.google")


def _hint(message: str) -> str:
    """One thing to try: ours where the reason is known, otherwise the first of Dynamo's."""
    for pattern, hint in _HINTS:
        if re.search(pattern, message):
            return hint
    hints = (ln.split("Hint:", 1)[1] for ln in message.splitlines() if "Hint:" in ln)
    first = next((h.split(". ")[0].strip().rstrip(".") for h in hints), "")
    # Dynamo's settings and bug tracker are nothing for a user of graphopt.
    useless = any(words in first for words in _OF_DYNAMO)
    own = "rewrite this line, or keep what it does outside of the model"
    return own if useless or not first else first


def location(forward: Callable[..., object]) -> str:
    """``file:line`` of a function, for messages."""
    code = getattr(forward, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}: def {code.co_name}" if code else ""


def first_line(error: object) -> str:
    """The first line of a message that is not empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
