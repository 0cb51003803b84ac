"""Which rank looks after which block: a grid of ranks, and the longest job first.

Pauloski et al., "KAISA: An Adaptive Second-Order Optimizer Framework for Deep Neural Networks"
(SC 2021, arXiv 2107.01739): a share of the ranks keeps the solution of a block. With one rank per
block memory is least, and every step shares preconditioned gradients; with all ranks nothing is
shared but solutions, when they are new. Blocks go to owners in the order of falling cost, each to
the one that has least to do (Graham 1969, longest processing time first).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from graphopt.plan.kfac import DENSE, LOW_RANK, Block
from graphopt.runtime.kfac.solve import Problem, Solver

# Larger matrices are not measured, but taken to cost the cube of their size.
LARGEST_MEASURED = 512
# Seconds per stored number of what needs no inversion; only has to be small, and not zero.
_PER_ENTRY = 1e-9
_ROUNDS = 3


@dataclass(frozen=True)
class Grid:
    """All ranks of a job as rows and columns; a block belongs to its owner's column.

    The ranks of a column keep the same solutions and precondition the same gradients; those of a
    row have all blocks together.

    Attributes:
        world: number of ranks.
        rows: ranks that precondition one block; divides `world`.
    """

    world: int
    rows: int

    @classmethod
    def of(cls, world: int, fraction: float) -> Grid:
        """As many rows as `fraction` of the ranks, rounded down to a divisor of their number."""
        most = max(1, round(fraction * world))
        return cls(world, max(k for k in range(1, most + 1) if world % k == 0))

    @property
    def columns(self) -> int:
        """Ranks that share one set of all blocks."""
        return self.world // self.rows

    def column(self, rank: int) -> int:
        """Column of a rank; also its place within its row."""
        return rank % self.columns

    def row(self, rank: int) -> int:
        """Row of a rank; also its place within its column."""
        return rank // self.columns

    def column_ranks(self, column: int) -> list[int]:
        """Its ranks, in the order of rows."""
        return list(range(column, self.world, self.columns))

    def row_ranks(self, row: int) -> list[int]:
        """Its ranks, in the order of columns."""
        return list(range(row * self.columns, (row + 1) * self.columns))


def units(blocks: Sequence[Block]) -> dict[str, list[Block]]:
    """Blocks that one rank has to own together, as they share a parameter or a statistic.

    Returns:
        Blocks by the name of their first one, in the order of the blocks.
    """
    head: dict[str, str] = {}
    merged: dict[str, list[Block]] = {}
    for block in blocks:
        needs = [block.weight, block.bias, *(f"{s.statistic}/" for s in block.sides)]
        needs = [need for need in needs if need]
        found = list(dict.fromkeys(head[need] for need in needs if need in head))
        first = found[0] if found else f"{block.weight}/{block.start}"
        members = merged.setdefault(first, [])
        for other in found[1:]:
            members += merged.pop(other)
            head.update({need: first for need, name in head.items() if name == other})
        members.append(block)
        head.update(dict.fromkeys(needs, first))
    return merged


def assign(costs: Mapping[str, float], load: Sequence[float]) -> dict[str, int]:
    """An owner for every unit: longest first, to the rank with the least load.

    Args:
        costs: seconds by the name of the unit.
        load: seconds that each rank has already.
    """
    total = list(load)
    owners: dict[str, int] = {}
    for name, cost in sorted(costs.items(), key=lambda item: (-item[1], item[0])):
        rank = min(range(len(total)), key=lambda r: (total[r], r))
        total[rank] += cost
        owners[name] = rank
    return {name: owners[name] for name in costs}


def sizes(blocks: Sequence[Block]) -> list[int]:
    """Sizes that are measured: of all matrices, the largest ones cut."""
    sides = [s for b in blocks for s in b.sides if b.kind != "unitwise"]
    found = {s.size for s in sides if s.form == DENSE} | {s.rank for s in sides if s.rank}
    return sorted({min(size, LARGEST_MEASURED) for size in found})


def measure(solver: Solver, wanted: Sequence[int], device: torch.device) -> dict[int, float]:
    """Seconds that the solver needs for one matrix of each size; takes no random numbers."""
    found = {}
    for size in wanted:
        index = torch.arange(size, dtype=torch.float32, device=device)
        matrix = torch.eye(size, device=device) + 1 / (index[:, None] + index[None, :] + 1)
        problem = Problem("", matrix[None], torch.ones(1, 1, device=device))
        best = float("inf")
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            solved = solver.solve([problem], 1e-3)
            # Reading a number waits for the device.
            assert solved[0] is None or float(solved[0]["damping"]) > 0
            best = min(best, time.perf_counter() - start)
        found[size] = best
    return found


def cost(blocks: Sequence[Block], seconds: Mapping[int, float]) -> float:
    """Seconds that solving these blocks takes, by the measured times of `measure`."""
    total = 0.0
    for block in blocks:
        for side in block.sides:
            total += side.entries * _PER_ENTRY
            if side.form == DENSE and block.kind != "unitwise":
                size = min(side.size, LARGEST_MEASURED)
                total += side.blocks * seconds[size] * (side.size / size) ** 3
            elif side.form == LOW_RANK:  # rank² d multiplications, and rank³
                size = min(side.rank, LARGEST_MEASURED)
                total += side.blocks * seconds[size] * (side.rank / size) ** 2 * side.size / size
    return total
