"""What is known about each specialisation of a model, as frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graphopt.capture.sizes import Size
from graphopt.pipeline.step import PassStep
from graphopt.plan import Plan


@dataclass(frozen=True)
class BackendChoice:
    """What runs the graph, and why.

    Attributes:
        backend: ``"eager"`` or ``"inductor"``.
        requested: what the user asked for (``"auto"``).
        reason: one sentence.
        seconds: measured time of a step per backend; empty when nothing was measured.
    """

    backend: str
    requested: str
    reason: str
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_first_choice(self) -> bool:
        """Whether it is what was asked for or measured, not what runs because another cannot."""
        return self.backend == self.requested or bool(self.seconds)


@dataclass(frozen=True)
class Verification:
    """How the graph's results compare with those of PyTorch eager.

    Attributes:
        level: what was asked for: ``"off"``, ``"structure"``, ``"eager"`` or ``"full"``.
        result: ``"bit-equal"``, ``"within tolerance"`` or ``"not run"``.
        worst_name: the output or gradient that is farthest off.
        worst_error: its error, relative to its largest magnitude.
        seconds: how long the comparison took.
        declined: passes that change the training method by design, in what runs, so that they were
            not held to eager's results.
        earlier: whether an earlier process has done it, for the same capture, passes and backend.
    """

    level: str
    result: str
    worst_name: str = ""
    worst_error: float = 0.0
    seconds: float = 0.0
    declined: tuple[str, ...] = ()
    earlier: bool = False


@dataclass(frozen=True)
class Samples:
    """How the comparison with eager came out that is repeated every so many steps.

    Attributes:
        every: so many steps; calls, where nothing is trained.
        count: how often it was made.
        step: before which step last.
        first_error, last_error: the largest relative error then, and in the first one.
        worst_name: the output or gradient that was farthest off in any.
        worst_error: its relative error.
        worst_step: in which step.
        failed: how often it could not be made, as for lack of memory.
        seconds: how long all of them took.
    """

    every: int
    count: int = 0
    step: int = 0
    first_error: float = 0.0
    last_error: float = 0.0
    worst_name: str = ""
    worst_error: float = 0.0
    worst_step: int = 0
    failed: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Specialisation:
    """One captured variant of a model.

    Attributes:
        signature: the inputs that it was captured for, in words.
        level: the level of its graph (``"joint"``).
        route: how it was captured (``"dynamo"``), or ``"kept"`` by an earlier process.
        capture_seconds: how long that took.
        steps: one per pass of the pipeline, in order.
        backend: what runs it.
        verification: how it was compared with eager.
        plan: what the runtime obeys.
        notes: what else the user should know.
        sizes: those that vary, with the range that its graph holds for.
        because: what was other than in earlier calls, where it is not the first of its site.
        numbers: those that are inputs of its graph, as users write them (``self.steps``).
        unkept: why later processes have to capture it again; empty where they do not.
        fallen_back: what was found wrong, and does not run here.
        samples: how later comparisons came out; ``None`` where there are none.
    """

    signature: str
    level: str
    route: str
    capture_seconds: float
    steps: tuple[PassStep, ...]
    backend: BackendChoice
    verification: Verification
    plan: Plan
    notes: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ()
    because: str = ""
    numbers: tuple[str, ...] = ()
    unkept: str = ""
    fallen_back: tuple[str, ...] = ()
    samples: Samples | None = None


@dataclass(frozen=True)
class PlainKind:
    """A kind of call that runs as plain PyTorch.

    Attributes:
        signature: the inputs and the mode, in words.
        reason: why, in one sentence.
        where: the user's source line that it is about.
        hint: one thing to try.
        every_later: whether later calls in this mode run plain too, without being tried.
    """

    signature: str
    reason: str
    where: str = ""
    hint: str = ""
    every_later: bool = False
