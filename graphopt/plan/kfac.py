"""What K-FAC does with each parameter: decided by the pass, obeyed by the runtime.

The curvature of a weight is approximated by a Kronecker product. The weight's gradient is seen as a
matrix ``M`` of one row per output and one column per input; with the moment ``G`` of the output
gradients on its left and the moment ``A`` of the layer inputs on its right, the preconditioned
gradient is ``G⁻¹ M A⁻¹``. The scale and shift of a norm are preconditioned channel by channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from graphopt.plan.limits import Count, NotNegative, OneOf, OneOrMore, Positive, Share
from graphopt.plan.part import PlanPart

# How the statistic of a side is stored: symmetric matrices as their lower triangles, row by row, of
# shape [blocks, size * (size + 1) / 2]; their diagonals only, of shape [blocks, size]; or `rank`
# rows and the diagonal, of shape [blocks, (rank + 1) * size] (`graphopt.ops.low_rank`).
DENSE = "dense"
DIAGONAL = "diagonal"
LOW_RANK = "low-rank"

# How a parameter holds its matrices of `rows` outputs and `columns` inputs, one per group:
OUT_IN = "out-in"  # [groups, rows, columns]
IN_OUT = "in-out"  # [groups, columns, rows]
IN_OUT_KERNEL = "in-out-kernel"  # [groups, inputs, rows, kernel] with columns = inputs * kernel


@dataclass(frozen=True)
class Side:
    """One Kronecker factor of a block.

    Attributes:
        statistic: its name; the backward returns it as the ``AUX`` output ``kfac/<name>``.
        size: rows of each of its independent square matrices; the homogeneous coordinate counts.
        blocks: number of independent matrices: groups of a convolution times the pieces that a
            side larger than ``max_dim`` was cut into.
        form: `DENSE`, `DIAGONAL` or `LOW_RANK`.
        rank: rows that are kept of `LOW_RANK` form; 0 of others.
    """

    statistic: str
    size: OneOrMore
    blocks: OneOrMore = 1
    form: Annotated[str, OneOf((DENSE, DIAGONAL, LOW_RANK))] = DENSE
    rank: Count = 0

    def __post_init__(self) -> None:
        if (self.rank > 0) != (self.form == LOW_RANK):
            raise ValueError(f"a side of {self.form} form has no rank of {self.rank}")

    @property
    def entries(self) -> int:
        """Stored numbers."""
        if self.form == DENSE:
            return self.blocks * (self.size * (self.size + 1) // 2)
        return self.blocks * self.size * (self.rank + 1)


@dataclass(frozen=True)
class Block:
    """One weight, or the scale and shift of one norm, and how its gradient is preconditioned.

    Attributes:
        kind: ``"kronecker"`` or ``"unitwise"``.
        weight: parameter name; of a norm the scale, or the shift where there is no scale.
        bias: parameter name of what is preconditioned together with it; ``""`` for none.
        groups: number of independent matrices that the weight consists of.
        rows: outputs of each matrix.
        columns: inputs of each matrix, the bias not counted.
        layout: how the parameter holds the matrices: `OUT_IN`, `IN_OUT` or `IN_OUT_KERNEL`.
        start: first row of the parameter (along dimension 0) that this block covers.
        left: moment of output gradients; of a norm the unit-wise moments (``size`` 1 or 2 of
            `DENSE` form, one block per channel).
        right: moment of inputs; ``None`` for a norm.
        samples: names of outputs that hold rows of output gradients and inputs, in pairs, where a
            solver needs more than their moments.
    """

    kind: Annotated[str, OneOf(("kronecker", "unitwise"))]
    weight: str
    bias: str
    groups: OneOrMore
    rows: OneOrMore
    columns: OneOrMore
    layout: Annotated[str, OneOf((OUT_IN, IN_OUT, IN_OUT_KERNEL))]
    start: Count
    left: Side
    right: Side | None
    samples: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.right is None) != (self.kind == "unitwise"):
            raise ValueError(f"{self.weight!r} is {self.kind} and has {len(self.sides)} sides")
        if len(self.samples) % 2:
            raise ValueError(f"the samples of {self.weight!r} are no pairs")

    @property
    def sides(self) -> tuple[Side, ...]:
        """Its factors."""
        return (self.left,) if self.right is None else (self.left, self.right)


@dataclass(frozen=True)
class Curvature(PlanPart):
    """All blocks of a model and the options of the method; part of a plan.

    Attributes:
        blocks: what is preconditioned.
        damping: λ; positive.
        interval: steps between two statistics; 0 for the rule of SP-NGD.
        solver: ``"factored"``, ``"eigen"``, ``"ekfac"`` or ``"lowrank"``.
        fisher: ``"empirical"``, ``"mc"`` or ``"type2"``.
        loss: what the curvature is that of, where `fisher` is not empirical.
        reduction: ``"mean"`` or ``"sum"``: how the loss treats the examples of a batch.
        ema: weight of the old statistic in a running mean; 0 keeps the newest only.
        clip: largest squared length of a step in the metric of the curvature; 0 for any.
        wire: type in which statistics travel between ranks.
        fraction: share of the ranks that precondition one block; 0 for one rank.
    """

    name: ClassVar[str] = "kfac"

    blocks: tuple[Block, ...]
    damping: Positive
    interval: Count
    solver: Annotated[str, OneOf(("factored", "eigen", "ekfac", "lowrank"))]
    fisher: Annotated[str, OneOf(("empirical", "mc", "type2"))]
    loss: Annotated[str, OneOf(("cross_entropy", "mse"))]
    reduction: Annotated[str, OneOf(("mean", "sum"))]
    ema: Share
    wire: Annotated[str, OneOf(("native", "bf16"))]
    fraction: Share
    clip: NotNegative = 0.0
