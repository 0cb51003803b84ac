"""K-FAC: natural gradients by Kronecker-factored curvature, with an ordinary optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, fx

from graphopt.errors import ArgumentError
from graphopt.graph import Graph, value_of
from graphopt.passbase import ALGORITHM, Applied, Numerics, Outcome, Pass, PassContext
from graphopt.passes.kfac.emit import Batch, emit_statistics
from graphopt.passes.kfac.sites import find_sites
from graphopt.plan import Phase, Role, Slot
from graphopt.plan.kfac import DIAGONAL, LOW_RANK, Block, Curvature, Side
from graphopt.size_nodes import Size, Sizes

# Operators of losses by the position of their ``reduction`` argument; 2 is the sum.
_LOSSES = {"nll_loss_backward": 4, "nll_loss2d_backward": 4, "mse_loss_backward": 3}
_SUM = 2


@dataclass(frozen=True)
class Kfac(Pass):
    """Precondition every weight's gradient with the Kronecker factors of its Fisher matrix.

    The statistics are nodes of the backward graph, next to the operators that compute the weights'
    gradients, from the very tensors that these read. A step that does not renew them runs a graph
    without them. Afterwards ``p.grad`` is ``G⁻¹ ∇W A⁻¹``, and any optimizer may be used.

    Attributes:
        damping: λ, added to the factors' diagonals by the rule of the solver.
        interval: steps between two statistics, or ``stale`` for SP-NGD's rule, which lengthens the
            interval of each statistic as long as it does not change.
        solver: ``factored`` inverts damped factors (Martens and Grosse, arXiv 1503.05671);
            ``eigen`` damps their product exactly; ``ekfac`` corrects the eigenvalues (George et
            al., arXiv 1806.03884); ``lowrank`` keeps the leading eigenvectors of large sides.
        fisher: ``empirical`` takes the loss's own gradients; ``mc`` samples labels from the model;
            ``type2`` sums over all labels. The latter two need `loss`.
        loss: how labels follow from the model's first output: ``cross_entropy`` of logits, or
            ``mse`` of means.
        reduction: whether the loss is the ``mean`` of the examples' losses or their ``sum``;
            ``auto`` reads a loss inside of the model, and takes the mean where there is none.
        sharing: of weights used at several positions of an example: ``expand`` counts each,
            ``reduce`` sums first (Eschenhagen et al., arXiv 2311.00636).
        ema: weight of the old statistic in a running mean; 0 keeps the newest only.
        clip: largest squared length of the preconditioned gradients in the metric of the curvature:
            their product with the plain ones. Longer ones are shortened, all by one factor, as by
            KAISA; keeps old statistics from making steps too long. 0 shortens none.
        max_dim: largest size of a dense factor.
        rank: of a larger factor, how many directions are kept beside its diagonal, found without
            forming it; 0 to cut it into blocks, or to keep its diagonal alone. `eigen` and `ekfac`
            always cut.
        wire: what statistics travel as between ranks.
        fraction: share of the ranks that keep and apply the inverses of one block (KAISA, Pauloski
            et al., arXiv 2107.01739): 0 for one rank, 1 for all.
    """

    name: ClassVar[str] = "kfac"
    numerics: ClassVar[Numerics] = ALGORITHM
    levels: ClassVar[frozenset[str]] = frozenset({"joint"})
    provides: ClassVar[frozenset[str]] = frozenset({"preconditioned"})
    conflicts: ClassVar[frozenset[str]] = frozenset(
        {"preconditioned", "lowered", "grouped", "staged"}
    )
    changes_signature: ClassVar[bool] = True
    communicates: ClassVar[frozenset[str]] = frozenset({"dp"})
    reduces: ClassVar[bool] = True
    symbolic: ClassVar[bool] = True
    idempotent: ClassVar[bool] = False
    source: ClassVar[str] = "Osawa et al., Scalable and Practical Natural Gradient, 2002.06015"

    damping: float = 1e-3
    interval: int | Literal["stale"] = "stale"
    solver: Literal["factored", "eigen", "ekfac", "lowrank"] = "factored"
    fisher: Literal["empirical", "mc", "type2"] = "empirical"
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    reduction: Literal["auto", "mean", "sum"] = "auto"
    sharing: Literal["expand", "reduce"] = "expand"
    ema: float = 0.0
    clip: float = 0.0
    max_dim: int = 4096
    rank: int = 64
    wire: Literal["native", "bf16"] = "native"
    fraction: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.damping < float("inf"):
            raise ArgumentError(
                f"kfac: damping={self.damping:g} is not positive",
                hint="1e-3 is a usual start; more damping is closer to plain gradients",
            )
        if self.interval != "stale" and self.interval < 1:
            raise ArgumentError(
                f"kfac: interval={self.interval} is not a number of steps",
                hint="interval=10, or interval=stale",
            )
        if not 0 <= self.ema < 1:
            raise ArgumentError(
                f"kfac: ema={self.ema:g} is not in [0, 1)", hint="0 keeps the newest statistic"
            )
        if not 0 <= self.clip < float("inf"):
            raise ArgumentError(
                f"kfac: clip={self.clip:g} is not a length",
                hint="start with clip=1, or leave it out to shorten no step",
            )
        if self.max_dim < 1:
            raise ArgumentError(
                f"kfac: max_dim={self.max_dim} is not a size", hint="leave it out for 4096"
            )
        if self.rank < 0:
            raise ArgumentError(
                f"kfac: rank={self.rank} is not a number of directions",
                hint="leave it out for 64, or rank=0 to cut large factors into blocks",
            )
        if not 0 <= self.fraction <= 1:
            raise ArgumentError(
                f"kfac: fraction={self.fraction:g} is not in [0, 1]", hint="0 or 1 are usual"
            )

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        """Insert the statistics, and decide what the runtime does with them."""
        whole = self.solver in ("eigen", "ekfac")  # they need eigenvectors of whole factors
        sites, declined = find_sites(graph, self.max_dim, 0 if whole else self.rank)
        if not sites:
            return Outcome(declined=tuple(declined))
        sizes = Sizes(graph)
        batch = Batch(
            sizes,
            _batch_size(graph, sizes),
            self.reduction == "mean" or (self.reduction == "auto" and _is_mean(graph)),
            self.sharing == "reduce",
            self.solver == "ekfac",
        )
        blocks: list[Block] = []
        applied: list[Applied] = []
        outputs = dict(zip(graph.signature.outputs, graph.outputs, strict=True))
        for site in sites:
            block, nodes, sharing = emit_statistics(graph, site, batch)
            blocks.append(block)
            applied += _applied(block, sharing, len(site.uses))
            for name, node in nodes.items():
                outputs[Slot(Role.AUX, f"{self.name}/{name}", Phase.BACKWARD)] = node
        graph.set_outputs(outputs)
        graph.changed()
        part = self._curvature(blocks, batch.mean)
        return Outcome(tuple(applied), tuple(declined), part)

    def _curvature(self, blocks: list[Block], mean: bool) -> Curvature:
        return Curvature(
            blocks=tuple(blocks),
            damping=self.damping,
            interval=0 if self.interval == "stale" else self.interval,
            solver=self.solver,
            fisher=self.fisher,
            loss=self.loss,
            reduction="mean" if mean else "sum",
            ema=self.ema,
            wire=self.wire,
            fraction=self.fraction,
            clip=self.clip,
        )


def _batch_size(graph: Graph, sizes: Sizes) -> Size:
    """Leading dimension of the model's first input."""
    for node, slot in zip(graph.inputs, graph.signature.inputs, strict=True):
        value = value_of(node)
        if slot.role is Role.INPUT and isinstance(value, Tensor) and value.dim():
            with graph.fx.inserting_after(graph.inputs[-1]):
                return sizes.of(node, 0)
    return 1


def _is_mean(graph: Graph) -> bool:
    return not any(_sums(node) for node in graph.operators)


def _sums(node: fx.Node) -> bool:
    packet = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    position = _LOSSES.get(packet)
    return position is not None and bool(node.args[position] == _SUM)


def _applied(block: Block, sharing: str, uses: int) -> list[Applied]:
    numbers: dict[str, int | float | str] = {}
    if block.kind == "unitwise":
        size = block.left.size
        what = f"preconditioned by {block.left.blocks} unit-wise blocks {size}x{size}"
    else:
        assert block.right is not None
        what = f"preconditioned by G {_size(block.left)}, A {_size(block.right)}"
        numbers = {"uses": uses, "sharing": sharing}
    numbers["statistics_bytes"] = 4 * sum(side.entries for side in block.sides)
    found = [Applied(block.weight, what, numbers)]
    if block.bias:
        found.append(Applied(block.bias, f"preconditioned by the block of {block.weight}"))
    return found


def _size(side: Side) -> str:
    count = f"{side.blocks} times " if side.blocks > 1 else ""
    if side.form == LOW_RANK:
        return f"{count}rank {side.rank} and diagonal of {side.size}x{side.size}"
    return count + (
        f"diagonal {side.size}" if side.form == DIAGONAL else f"{side.size}x{side.size}"
    )
