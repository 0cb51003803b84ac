"""An engine as data, and the same engine in another process.

What stands behind capture and passes: both halves, as their backend tells them, and where the
arguments of the backward come from. Only engines that no runtime part surrounds are told; a part
works on graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import fx

from graphopt.errors import BackendError
from graphopt.plan import Phase, Plan, Role
from graphopt.runtime.backends.kept_code import Code
from graphopt.runtime.backends.kept_words import Unreadable, Untold
from graphopt.runtime.engine.halves import (
    Halves,
    numbers_saved,
    sharing_outputs,
    sized_by_data,
)
from graphopt.runtime.engine.inference import InferenceEngine
from graphopt.runtime.engine.plain import PlainBackward, PlainForward
from graphopt.runtime.engine.step import Executable, Half, Source
from graphopt.runtime.engine.tangents import Expected
from graphopt.runtime.engine.training import TrainingEngine
from graphopt.runtime.session import Session


class Readers(Protocol):
    """How a backend makes executables of what it has told of a half."""

    def forward(self, data: Any, saved: int) -> Code:
        """That of a forward, or of a graph without backward; the last `saved` results are saved."""
        ...

    def backward(self, data: Any, sources: tuple[Source, ...]) -> Code:
        """That of the backward, whose arguments come from these places; the forward is made."""
        ...


@dataclass(frozen=True, eq=False)
class _KeptHalf(Half):
    """A half without a graph."""

    writes: tuple[int, ...] = ()
    expected: dict[int, Expected] = field(default_factory=dict)
    lacking: frozenset[int] = frozenset()

    @property
    def written(self) -> tuple[int, ...]:
        return self.writes

    @property
    def tangents(self) -> dict[int, Expected]:
        return self.expected

    @property
    def may_lack(self) -> frozenset[int]:
        return self.lacking


# -- writing ---------------------------------------------------------------------------------------


Tell = Callable[[], Any]
"""Gives what a backend tells of a half; raises `Untold`."""


def training_data(halves: Halves, forward: Tell, backward: Tell) -> dict[str, Any]:
    """A training engine as data.

    Args:
        halves: of its step.
        forward: tells the forward.
        backward: tells the backward.

    Raises:
        Untold: it holds something that is none.
    """
    if numbers_saved(halves) or sized_by_data(halves.backward):
        raise Untold("sizes pass from the forward to the backward")
    half = Half(halves.backward, (), halves.sources)
    count = len(cast("Any", halves.backward.graph.output_node().args[0]))
    return {
        "forward": forward(),
        "backward": backward(),
        "sources": [list(source) for source in halves.sources],
        "written": sorted(halves.written),
        "writes": list(Half(halves.forward, (), ()).written),
        "sharing": list(sharing_outputs(halves.backward, count)),
        "tangents": [
            [i, list(e.size), list(e.stride), str(e.dtype).removeprefix("torch."), str(e.device)]
            for i, e in half.tangents.items()
        ],
        "may_lack": sorted(half.may_lack),
    }


def inference_data(module: fx.GraphModule, forward: Tell) -> dict[str, Any]:
    """An inference engine of a module as data; see `training_data`."""
    return {"forward": forward(), "writes": list(Half(module, (), ()).written)}


# -- reading ---------------------------------------------------------------------------------------


def engine_of(data: Any, plan: Plan, session: Session, readers: Readers) -> Callable[..., Any]:
    """The engine that data is about.

    Raises:
        Unreadable: it is not what was written, or is not one of this plan.
        BackendError: the backend cannot run it.
    """
    try:
        if plan.signature.names(Role.TANGENT):
            return _training(data, plan, session, readers)
        return _inference(data, plan, session, readers)
    except (Unreadable, BackendError):
        raise
    except Exception as error:  # what was edited by hand fails anywhere
        raise Unreadable(f"{type(error).__name__}: {error}") from error


_NO_GRAPH = fx.GraphModule(torch.nn.Module(), fx.Graph())


def _kept(code: Code) -> Callable[[fx.GraphModule], Executable]:
    return lambda _: code.run


def _inference(data: Any, plan: Plan, session: Session, readers: Readers) -> InferenceEngine:
    code, slots = readers.forward(data["forward"], 0), plan.signature.outputs
    places = tuple(("input", i) for i in range(len(plan.signature.inputs)))
    _same(code, len(places), len(slots))
    half = _KeptHalf(_NO_GRAPH, slots, places, _indices(data["writes"], len(places)))
    return InferenceEngine(plan, session, PlainForward(_kept(code), half))


def _training(data: Any, plan: Plan, session: Session, readers: Readers) -> TrainingEngine:
    signature = plan.signature
    inputs = tuple(s for s in signature.inputs if s.role is not Role.TANGENT)
    tangents = len(signature.inputs) - len(inputs)
    outputs = {p: tuple(s for s in signature.outputs if s.phase is p) for p in Phase}
    written = set(data["written"])
    returned = tuple(
        s for s in outputs[Phase.FORWARD] if not (s.role is Role.MUTATION and s.name in written)
    )
    sources = tuple((kind, index) for kind, index in data["sources"])
    saved = [index for kind, index in sources if kind == "saved"]
    most = {"saved": len(saved), "input": len(inputs), "tangent": tangents}
    if any(type(i) is not int or not 0 <= i < most[kind] for kind, i in sources):
        raise Unreadable("the backward reads what there is not")
    if sorted(saved) != list(range(len(saved))):
        raise Unreadable("the backward does not take what the forward saves")
    forward = readers.forward(data["forward"], len(saved))
    backward = readers.backward(data["backward"], sources)
    _same(forward, len(inputs), len(returned) + len(saved))
    _same(backward, len(sources), len(outputs[Phase.BACKWARD]))
    expected = dict(map(_expected, data["tangents"]))
    if expected.keys() != {i for kind, i in sources if kind == "tangent"}:
        raise Unreadable("tangents without a form")
    places = tuple(("input", i) for i in range(len(inputs)))
    first = _KeptHalf(_NO_GRAPH, returned, places, _indices(data["writes"], len(inputs)))
    lacking = frozenset(data["may_lack"])
    if not lacking <= expected.keys():
        raise Unreadable("a tangent that there is not may be missing")
    second = _KeptHalf(_NO_GRAPH, outputs[Phase.BACKWARD], sources, (), expected, lacking)
    sharing = _indices(data["sharing"], len(second.slots))
    make = partial(PlainBackward, _kept(backward), session, inputs)
    return TrainingEngine(
        plan,
        session,
        PlainForward(_kept(forward), first),
        make(second),
        sources,
        sharing={second.slots[i].name for i in sharing},
    )


def _same(code: Code, inputs: int, results: int) -> None:
    if (code.inputs, code.results) != (inputs, results):
        raise Unreadable("its code has other inputs or results than its plan")


def _indices(data: Any, count: int) -> tuple[int, ...]:
    if not all(type(i) is int and 0 <= i < count for i in data):
        raise Unreadable("a place that there is not")
    return tuple(data)


def _expected(row: Any) -> tuple[int, Expected]:
    index, size, stride, dtype, device = row
    kind = getattr(torch, dtype)
    numbers = [index, *size, *stride]
    if not isinstance(kind, torch.dtype) or not all(type(n) is int and n >= 0 for n in numbers):
        raise Unreadable("a tangent of no form")
    if len(size) != len(stride):
        raise Unreadable("a tangent of no form")
    return index, Expected(tuple(size), tuple(stride), kind, torch.device(device))
