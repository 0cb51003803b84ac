"""From the halves of a step to the engine that runs them, with all runtime parts around."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

from torch import fx

from graphopt.plan import Phase, Plan, Role, Slot
from graphopt.runtime.engine.counted import counted
from graphopt.runtime.engine.halves import (
    Halves,
    numbers_saved,
    sharing_outputs,
    sized_by_data,
)
from graphopt.runtime.engine.inference import InferenceEngine
from graphopt.runtime.engine.plain import PlainBackward, PlainForward
from graphopt.runtime.engine.step import Compile, Half
from graphopt.runtime.engine.training import TrainingEngine
from graphopt.runtime.session import Session

Make = TypeVar("Make", bound=Callable[..., Any])


def training(
    plan: Plan, session: Session, halves: Halves, forward: Compile, backward: Compile
) -> TrainingEngine:
    """The engine of a training step.

    Args:
        plan: what to obey.
        session: of the model.
        halves: of the step.
        forward: makes an executable of a forward half; all of it is called before `backward` is.
        backward: makes an executable of a form of the backward half, also in the middle of a run.
    """
    signature = plan.signature
    outputs = {p: tuple(s for s in signature.outputs if s.phase is p) for p in Phase}
    inputs = tuple(s for s in signature.inputs if s.role is not Role.TANGENT)
    places = tuple(("input", i) for i in range(len(inputs)))
    returned = tuple(s for s in outputs[Phase.FORWARD] if not _writes(halves, s))
    first = Half(halves.forward, returned, places)
    second = Half(halves.backward, outputs[Phase.BACKWARD], halves.sources)
    make_forward = stack(plan, session, "forward", partial(PlainForward, forward))
    forward_half = make_forward(first)
    make_backward = stack(
        plan, session, "backward", partial(PlainBackward, backward, session, inputs)
    )
    return TrainingEngine(
        plan,
        session,
        forward_half,
        make_backward(second),
        halves.sources,
        numbers=numbers_saved(halves),
        sized_by_data=sized_by_data(halves.backward),
        sharing={second.slots[i].name for i in sharing_outputs(halves.backward, len(second.slots))},
    )


def _writes(halves: Halves, slot: Slot) -> bool:
    return slot.role is Role.MUTATION and slot.name in halves.written


def inference(
    plan: Plan, session: Session, module: fx.GraphModule, forward: Compile
) -> InferenceEngine:
    """The engine of a graph without backward; `forward` makes its executable."""
    places = tuple(("input", i) for i in range(len(plan.signature.inputs)))
    make = stack(plan, session, "forward", partial(PlainForward, forward))
    return InferenceEngine(plan, session, make(Half(module, plan.signature.outputs, places)))


def stack(plan: Plan, session: Session, hook: str, innermost: Make) -> Make:
    """`innermost`, surrounded by this hook of all parts, the first pass outermost.

    Raises:
        PluginError: a part gives something else than the step needs.
    """
    make: Any = innermost
    for runtime, part in reversed(session.parts(plan)):
        below = make
        make = getattr(runtime, hook)(part, plan, below)
        if make is not below:
            make = counted(runtime.name, hook, make)
    return cast("Make", make)
