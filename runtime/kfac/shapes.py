"""What shapes the tensors of a saved curvature have, by the plan they must obey."""

from __future__ import annotations

from graphopt.plan.kfac import DENSE, LOW_RANK, Block, Curvature, Side
from graphopt.runtime.kfac.lowrank import LowRank
from graphopt.runtime.kfac.state import prefix_of

Shape = tuple[int, ...]


def shapes(part: Curvature) -> dict[str, Shape]:
    """Of everything that a state may hold for these blocks; rows of examples have any number."""
    found: dict[str, Shape] = {"step": (), "micro-batches": ()}
    for side in (side for block in part.blocks for side in block.sides):
        stored = (side.blocks, side.entries // side.blocks)
        found |= {f"{table}/{side.statistic}": stored for table in ("now", "before", "sum")}
        found[f"interval/{side.statistic}"] = (3,)
    for block in part.blocks:
        found |= {prefix_of(block) + k: s for k, s in _of_solution(part.solver, block).items()}
    return found


def _of_solution(solver: str, block: Block) -> dict[str, Shape]:
    """What the solver keeps of a block; what the others would keep is not in it."""
    found: dict[str, Shape] = {"damping": ()}
    if block.right is None:
        return found | {"inverse": (block.left.blocks, block.left.entries // block.left.blocks)}
    for name, side in (("left", block.left), ("right", block.right)):
        found |= {f"{name}_{key}": shape for key, shape in _of_side(solver, side).items()}
    if solver == "ekfac":
        found["moments"] = (
            block.left.blocks * block.left.size,
            block.right.blocks * block.right.size,
        )
    return found


def _of_side(solver: str, side: Side) -> dict[str, Shape]:
    blocks, size, rank = side.blocks, side.size, LowRank().rank
    if side.form == LOW_RANK:
        return {"rows": (blocks, side.rank, size), "reciprocal": (blocks, size)}
    dense = side.form == DENSE
    whole = (blocks, size, size) if dense else (blocks, size)
    if solver in ("eigen", "ekfac"):
        return {"values": (blocks, size)} | ({"basis": whole} if dense else {})
    if solver == "lowrank" and dense and size > 4 * rank:
        return {"basis": (blocks, size, rank), "weights": (blocks, rank), "scale": (blocks,)}
    return {"inverse": whole}
