"""What a pass is: a frozen dataclass that declares what it needs, gives and may change.

Options are the dataclass's fields and live nowhere else. `apply` rewrites the graph in place and
returns an `Outcome` in which every candidate site is either applied or declined with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graphopt.analysis.gradient_order import Device
    from graphopt.graph import Graph, Level
    from graphopt.network.curve import Curve
    from graphopt.plan import PlanPart


@dataclass(frozen=True)
class Numerics:
    """How far a pass may move the results; decides the tolerance of every check.

    Attributes:
        kind: ``"exact"`` (bit-equal in eager), ``"reassociated"`` (float sums in another order),
            ``"lowered"`` (less precision, within `bound`), ``"algorithm"`` (another training method
            by design; the pass brings its own oracle).
        bound: largest allowed error, relative to the largest magnitude of the compared tensor.
    """

    kind: str
    bound: float

    def __str__(self) -> str:
        return f"lowered({self.bound:g})" if self.kind == "lowered" else self.kind


EXACT = Numerics("exact", 0.0)
REASSOCIATED = Numerics("reassociated", 1e-4)
ALGORITHM = Numerics("algorithm", float("inf"))


def lowered(bound: float) -> Numerics:
    """Less precision, with relative error of at most `bound`."""
    return Numerics("lowered", bound)


Number = int | float | str
Row = Mapping[str, Number | None]


@dataclass(frozen=True)
class Applied:
    """One site that a pass rewrote.

    Attributes:
        site: the node, parameter or module that it is about.
        what: a short verb phrase (``"merged with add_3"``).
        numbers: measured or computed figures about it.
    """

    site: str
    what: str
    numbers: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class Declined:
    """One candidate site that a pass left alone.

    Attributes:
        site: the node, parameter or module that it is about.
        reason: a stable code in kebab-case (``"random-op"``).
        detail: one sentence for people.
        numbers: measured or computed figures about it.
    """

    site: str
    reason: str
    detail: str
    numbers: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a pass did to a graph.

    Attributes:
        applied: the sites that it rewrote.
        declined: the candidate sites that it left alone.
        part: what the runtime has to know of its decisions, if anything.
        tables: figures behind the decisions, by name: rows of named values.
        parametrized: parameters that others take the place of, by name, with what
            `torch.nn.utils.parametrize` makes them of those; its ``right_inverse`` gives the first
            values, and its ``tolerance`` says how far off the parameter may be, relative to it.
            Only of a pass at the forward level that was given `PassContext.parameters`.
    """

    applied: tuple[Applied, ...] = ()
    declined: tuple[Declined, ...] = ()
    part: PlanPart | None = None
    tables: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)
    parametrized: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        """Whether the graph was rewritten."""
        return bool(self.applied)


class Waits(Protocol):
    """A message on its way."""

    def wait(self) -> object:
        """Until the sum over all ranks stands in the tensor."""


Send: TypeAlias = "Callable[[Tensor], Waits]"
"""Starts to add up a tensor over all ranks, in place."""


class Communicator(Protocol):
    """The ranks of one mesh dimension that train together, as a pass sees them."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    @property
    def channel(self) -> str:
        """Name under which collectives of the graph find these ranks."""

    def link(self) -> Curve:
        """Measured seconds of an all-reduce over its bytes; the same on all ranks."""

    def agree(self, topic: str, mine: str, decide: Callable[[], str]) -> str:
        """Rank 0's decision, once `mine` was found equal on all ranks.

        Raises:
            RankError: it is not equal, naming the first difference; or a rank did not come.
        """

    def together(self, topic: str, mine: str, run: Callable[[Send], str]) -> str:
        """Rank 0's result of what all ranks run at the same time, once; else as `agree`.

        Args:
            topic: as of `agree`.
            mine: as of `agree`.
            run: is given the way to the other ranks.

        Raises:
            RankError: a message failed.
        """


@dataclass(frozen=True)
class PassContext:
    """What a pass may know beside the graph.

    Attributes:
        ranks: those of a running job by mesh dimension; empty where a plan is made without one.
        mesh: sizes of the parallel dimensions (``{"dp": 8}``); empty on one device.
        states: what each pass keeps between steps, by its name; see `state`.
        running: name of the pass that runs.
        parameters: those of the model by name, while they may be replaced; shared ones under each
            of their names.
        decided: what passes did when they could replace parameters, by their name.
        device: what each rank of a planned machine computes with; ``None`` for the kind of device
            that the graph was captured on.
    """

    ranks: Mapping[str, Communicator] = field(default_factory=dict)
    mesh: Mapping[str, int] = field(default_factory=dict)
    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    running: str = ""
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    decided: Mapping[str, Outcome] = field(default_factory=dict)
    device: Device | None = None

    @property
    def state(self) -> dict[str, Tensor]:
        """Tensors of the running pass, shared by all specialisations of a model.

        A pass that adds a ``STATE`` input ``"<pass>/<what>"`` puts its initial value here under
        ``<what>``, unless it is there already.
        """
        return self.states.setdefault(self.running, {})

    def size(self, dimension: str) -> int:
        """Ranks along a mesh dimension: running ones, else planned ones, else one."""
        found = self.ranks.get(dimension)
        return found.size if found is not None else self.mesh.get(dimension, 1)


@dataclass(frozen=True)
class Pass:
    """Base of all passes.

    Subclasses are frozen dataclasses. The graph is verified before and after `apply`, not during.

    Class attributes:
        name: the name in the spec language.
        numerics: how far results may move; a property where an option decides it.
        levels: names of the graph levels that it works on.
        requires: facts that an earlier pass or capture must have provided.
        provides: facts that hold afterwards.
        conflicts: facts that must not hold yet when it runs (``"lowered"``, where it needs full
            precision).
        changes_signature: whether it may add or remove inputs or outputs.
        communicates: mesh dimensions over which its part of the runtime sends messages; a property
            where an option decides it.
        reduces: whether gradients come out as means over the ranks of ``dp``.
        owns_step: whether its part of the runtime runs whole optimizer steps, with the loss and the
            optimizer given to `optimize`.
        on_one_rank: whether it asks for the ranks of a job of one, too; a property where an option
            decides it.
        symbolic: whether it takes graphs in which sizes of inputs are symbols. Where a pass of a
            pipeline does not, each size has a graph of its own.
        lasting: whether what it does follows from the graph, its options and the mesh alone, so
            that a later process may take it over: it measures nothing, and looks at no value of a
            tensor.
        idempotent: whether a second application, right after the first, changes nothing.
        source: the publication that the method comes from, if any.
    """

    name: ClassVar[str]
    numerics: ClassVar[Numerics] = EXACT
    levels: ClassVar[frozenset[str]] = frozenset({"joint", "inference"})
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    conflicts: ClassVar[frozenset[str]] = frozenset()
    changes_signature: ClassVar[bool] = False
    communicates: ClassVar[frozenset[str]] = frozenset()
    reduces: ClassVar[bool] = False
    owns_step: ClassVar[bool] = False
    on_one_rank: ClassVar[bool] = False
    symbolic: ClassVar[bool] = False
    lasting: ClassVar[bool] = False
    idempotent: ClassVar[bool] = True
    source: ClassVar[str] = ""

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        """Rewrite `graph` in place and say what was done and what was not."""
        raise NotImplementedError

    def micro_batches(self, mesh: Mapping[str, int]) -> int:
        """Into how many micro-batches a step of its own cuts a batch, on a mesh of these sizes."""
        return 1

    def wants_parameters(self, model: nn.Module) -> bool:
        """Whether it may replace parameters of this model, and has to see it before it is run."""
        return False

    @property
    def on_forward(self) -> bool:
        """Whether it rewrites the forward graph, before there is a backward."""
        return "forward" in self.levels

    def works_on(self, level: Level) -> bool:
        """Whether the pass runs on graphs of this level; on others it is skipped and reported."""
        return str(level) in self.levels
