"""What K-FAC does with each parameter: decided by the pass, obeyed by the runtime.

The curvature of a weight is approximated by a Kronecker product. The weight's gradient is seen as a
matrix ``M`` of one row per output and one column per input; with the moment ``G`` of the output
gradients on its left and the moment ``A`` of the layer inputs on its right, the preconditioned
gradient is ``G⁻¹ M A⁻¹``. The scale and shift of a norm are preconditioned channel by channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graphopt.errors import StateError

# What the names of all tensors of the curvature begin with in the state of a model.
PREFIX = "kfac/"
# Marks a state that was loaded before there were blocks to compare it with.
UNCHECKED = PREFIX + "unchecked"

# How the statistic of a side is stored: symmetric matrices as their lower triangles, row by row, of
# shape [blocks, size * (size + 1) / 2]; or their diagonals only, of shape [blocks, size].
DENSE = "dense"
DIAGONAL = "diagonal"

# How a parameter holds its matrices of `rows` outputs and `columns` inputs, one per group:
OUT_IN = "out-in"  # [groups, rows, columns]
IN_OUT = "in-out"  # [groups, columns, rows]
IN_OUT_KERNEL = "in-out-kernel"  # [groups, inputs, rows, kernel] with columns = inputs * kernel


@dataclass(frozen=True)
class Side:
    """One Kronecker factor of a block.

    Attributes:
        statistic: name of its statistic among the outputs of the backward.
        size: rows of each of its independent square matrices; the homogeneous coordinate counts.
        blocks: number of independent matrices: groups of a convolution times the pieces that a
            side larger than ``max_dim`` was cut into.
        form: `DENSE` or `DIAGONAL`.
    """

    statistic: str
    size: int
    blocks: int = 1
    form: str = DENSE

    @property
    def entries(self) -> int:
        """Stored numbers."""
        each = self.size * (self.size + 1) // 2 if self.form == DENSE else self.size
        return self.blocks * each


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

    kind: str
    weight: str
    bias: str
    groups: int
    rows: int
    columns: int
    layout: str
    start: int
    left: Side
    right: Side | None
    samples: tuple[str, ...] = ()

    @property
    def sides(self) -> tuple[Side, ...]:
        """Its factors."""
        return (self.left,) if self.right is None else (self.left, self.right)


@dataclass(frozen=True)
class Curvature:
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
        wire: type in which statistics travel between ranks.
        fraction: share of the ranks that precondition one block; 0 for one rank.
    """

    blocks: tuple[Block, ...]
    damping: float
    interval: int
    solver: str
    fisher: str
    loss: str
    reduction: str
    ema: float
    wire: str
    fraction: float

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Whether saved statistics are those of these blocks.

        Raises:
            StateError: they are not, naming the first difference.
        """
        sides = {side.statistic: side for block in self.blocks for side in block.sides}
        end = "/now"
        saved = {n.removeprefix(PREFIX).removesuffix(end): n for n in state if n.endswith(end)}
        saved = {name: key for name, key in saved.items() if key.startswith(PREFIX)}
        hint = "load the state of this model, saved with the same options of kfac"
        for name, side in sides.items() if saved else ():
            if name not in saved:
                raise StateError(f"the saved state lacks the statistic {name!r}", hint=hint)
            if (count := state[saved[name]].numel()) != side.entries:
                raise StateError(
                    f"the statistic {name!r} has {count} numbers in the saved state and "
                    f"{side.entries} here",
                    hint=hint,
                )
        if unknown := next((name for name in saved if name not in sides), None):
            raise StateError(f"the saved state has a statistic {unknown!r} too many", hint=hint)

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Curvature:
        """The inverse of `dataclasses.asdict`."""
        blocks = (
            Block(
                **{
                    **b,
                    "left": Side(**b["left"]),
                    "right": Side(**b["right"]) if b["right"] else None,
                    "samples": tuple(b["samples"]),
                }
            )
            for b in data["blocks"]
        )
        return cls(**{**data, "blocks": tuple(blocks)})


def notes(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """A line for the report: how often statistics are renewed now."""
    chosen = sorted(int(v[0]) for n, v in state.items() if n.endswith("/interval"))
    if not chosen:
        return ()
    steps, middle = int(state[PREFIX + "step"]), chosen[len(chosen) // 2]
    return (
        f"kfac: after {steps} steps {len(chosen)} statistics are renewed every {chosen[0]} to "
        f"{chosen[-1]} steps, half of them every {middle} or less often",
    )
