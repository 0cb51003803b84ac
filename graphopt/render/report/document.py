"""What a report holds, as plain data; its JSON is `dataclasses.asdict` of it.

Times are predictions in seconds, sizes are bytes, numbers of operations are FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Half:
    """Figures of the forward or the backward half of a module.

    Attributes:
        ops: operators.
        flops: floating-point operations.
        bytes: read and written where nothing is fused.
        seconds: predicted.
    """

    ops: int
    flops: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Module:
    """One module, submodules included.

    Attributes:
        path: qualified name; ``""`` for the whole model.
        kind: class name, where known.
        output: dtype and shape of its last value.
        parameters: elements of the parameters that it reads.
        forward: figures of its forward.
        backward: figures of its backward.
        saved: bytes of activations kept for backward.
        formats: FLOPs by the format in which they are computed.
        children: in the order in which they first run.
    """

    path: str
    kind: str
    output: str
    parameters: int
    forward: Half
    backward: Half
    saved: int
    formats: Mapping[str, int]
    children: tuple[Module, ...]


@dataclass(frozen=True)
class PassEntry:
    """One pass.

    Attributes:
        spec: in the spec language.
        skipped: why it did not run; empty if it did.
        numerics: how far it may move the results.
        nodes: of the graph before and after.
        seconds: that it took.
        applied: ``{site, what, numbers}`` of each site that it rewrote.
        declined: ``{site, reason, detail, numbers}`` of each that it left alone.
    """

    spec: str
    skipped: str
    numerics: str
    nodes: tuple[int, int]
    seconds: float
    applied: tuple[Mapping[str, Any], ...]
    declined: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Activity:
    """Something on one lane of a time line.

    Attributes:
        lane: its name.
        kind: ``"forward"``, ``"backward"``, ``"message"``, ``"transfer"`` or ``"update"``.
        name: module, message or action.
        start: seconds since the step began.
        end: seconds since the step began.
    """

    lane: str
    kind: str
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class TimeLine:
    """A predicted step.

    Attributes:
        title: what is shown.
        assumed: what it rests on, by topic.
        lanes: in the order in which they are shown.
        activities: on them.
        counters: bytes over seconds, by name, whenever they change.
    """

    title: str
    assumed: tuple[tuple[str, str], ...]
    lanes: tuple[str, ...]
    activities: tuple[Activity, ...]
    counters: Mapping[str, tuple[tuple[float, float], ...]]

    @property
    def step(self) -> float:
        """Seconds until all is done."""
        return max((one.end for one in self.activities), default=0.0)


@dataclass(frozen=True)
class Memory:
    """Bytes alive while the step runs, besides inputs, parameters and buffers.

    Attributes:
        points: (seconds, bytes) after each operator.
        peak: the largest.
        peak_at: the node and the module during which that is.
        saved: kept from forward to backward.
    """

    points: tuple[tuple[float, int], ...]
    peak: int
    peak_at: str
    saved: int


@dataclass(frozen=True)
class Factors:
    """The Kronecker factors by which gradients are preconditioned.

    Attributes:
        options: of the method, by name.
        blocks: ``{weight, bias, kind, left, right, entries}`` of each; sides in words.
    """

    options: Mapping[str, Any]
    blocks: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Story:
    """One parameter or buffer.

    Attributes:
        facts: (topic, words), in the order in which they are told.
        decisions: ``{pass, verdict, words}`` of each pass that spoke of it.
        planned: ``{part, path, words}`` of each place where the plan names it.
    """

    name: str
    role: str
    type: str
    module: str
    facts: tuple[tuple[str, str], ...]
    decisions: tuple[Mapping[str, str], ...]
    planned: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        model: its name.
        passes: the pipeline in the spec language; empty for none.
        level: of the graph (``"joint"``).
        versions: of graphopt and of torch.
        figures: (topic, words) of the whole model.
        modules: the tree of the rewritten graph.
        steps: one per pass.
        time_lines: one rank's step, and the stages of a pipeline if there are any.
        memory: of one rank's step.
        factors: where a pass preconditions gradients.
        stories: of parameters and buffers, in the order of the graph.
    """

    model: str
    passes: str
    level: str
    versions: Mapping[str, str]
    figures: tuple[tuple[str, str], ...]
    modules: Module
    steps: tuple[PassEntry, ...]
    time_lines: tuple[TimeLine, ...]
    memory: Memory
    factors: Factors | None
    stories: tuple[Story, ...]
