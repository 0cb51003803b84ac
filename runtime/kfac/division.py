"""The curvature of a job of several ranks: every block has an owner, and the rest is exchanged.

A step with new statistics averages them at their owners, which solve their blocks and share the
solutions with the ranks that use them. Every step preconditions each gradient on the ranks of one
column of the grid (`graphopt.runtime.kfac.owners`), and the ranks of a row put the results
together. Where no pass reduces gradients, the same messages take them along.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from graphopt.errors import StateError
from graphopt.plan.kfac import Block, Curvature
from graphopt.runtime.kfac.exchange import Exchange, Parcel
from graphopt.runtime.kfac.interval import Interval
from graphopt.runtime.kfac.owners import Grid, assign, cost, measure, sizes, units
from graphopt.runtime.kfac.solve import solver
from graphopt.runtime.kfac.state import CurvatureState, prefix_of
from graphopt.runtime.ranks.ranks import Ranks

# Under which a saved state keeps the owners, so that a resumed run sums in the same order.
_OWNERS = "owners"


@dataclass
class Division:
    """Who owns what in one model; shared by all its specialisations.

    Attributes:
        ranks: all of them.
        stages: those along which others have other blocks, if there are any.
        grid: their rows and columns.
        exchange: their messages.
        owners: rank by unit of blocks.
        keeper: rank by statistic, and by `prefix_of` a block, of what only an owner may answer for.
        load: seconds of solving by rank.
        steps: finished steps.
    """

    ranks: Ranks
    grid: Grid
    exchange: Exchange
    owners: dict[str, int] = field(default_factory=dict)
    keeper: dict[str, int] = field(default_factory=dict)
    load: list[float] = field(default_factory=list)
    steps: int = 0
    stages: Ranks | None = None
    _row: dist.ProcessGroup | None = None
    _column: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, ranks: Ranks, fraction: float, stages: Ranks | None = None) -> Division:
        """Nobody owns anything yet."""
        grid, load = Grid.of(ranks.size, fraction), [0.0] * ranks.size
        return cls(ranks, grid, Exchange(ranks), load=load, stages=stages)

    def copy(self, ranks: Ranks, stages: Ranks | None = None) -> Division:
        """For a copy of the model: the same owners, and messages of its own."""
        owned = dict(self.owners), dict(self.keeper), list(self.load)
        groups = self._row, self._column
        return Division(ranks, self.grid, Exchange(ranks), *owned, 0, stages, *groups)

    @property
    def rank(self) -> int:
        """This process."""
        return self.exchange.rank

    @property
    def row(self) -> dist.ProcessGroup:
        """The ranks that have all blocks together, this one among them."""
        assert self._row is not None
        return self._row

    @property
    def column(self) -> dist.ProcessGroup:
        """The ranks that keep the same solutions as this one."""
        assert self._column is not None
        return self._column

    def owner(self, unit: str) -> int:
        """Rank that keeps the statistics of a unit of blocks, and solves them."""
        return self.owners[unit]

    def prepare(self, curvature: Curvature, state: dict[str, Tensor]) -> None:
        """Find an owner for every block of a curvature; a collective where there are new ones.

        Raises:
            RankError: the ranks have other blocks, or loaded other states.
        """
        loaded = state.pop(_OWNERS, None)
        blocks = units(curvature.blocks)
        new = {name: members for name, members in blocks.items() if name not in self.owners}
        if not new:
            return
        if self._row is None:
            self._row, self._column = self._groups()
        saved = [] if loaded is None else loaded.tolist()
        wanted = sizes([block for members in new.values() for block in members])
        mine = f"{list(new)}\n{wanted}\n{saved}"
        answer = self.ranks.agree(
            "blocks of kfac",
            mine,
            lambda: json.dumps(
                list(measure(solver(curvature.solver), wanted, self.ranks.device).items())
            ),
        )
        if self.stages is not None:  # measured other times; a saved state has one list of owners
            times = answer
            answer = self.stages.agree("blocks of kfac", mine, lambda: times)
        costs = {name: cost(members, dict(json.loads(answer))) for name, members in new.items()}
        owners = assign(costs, self.load)
        if saved and saved[0] == self.grid.world and len(saved) == len(new) + 1:
            owners = dict(zip(new, saved[1:], strict=True))
        for name, rank in owners.items():
            self.load[rank] += costs[name]
            for block in new[name]:
                self.keeper[prefix_of(block)] = rank
                self.keeper.update({side.statistic: rank for side in block.sides})
        self.owners.update(owners)
        self.trim(state)

    def trim(self, state: dict[str, Tensor]) -> None:
        """Drop what other ranks keep, after a whole state was loaded."""
        column = self.grid.column(self.rank)
        for key in list(state):
            owner = self._keeper(key)
            if owner is None or owner == self.rank:
                continue
            if not key.startswith("solution/") or self.grid.column(owner) != column:
                del state[key]

    def whole(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state of all ranks together, on each of them; a collective.

        Raises:
            StateError: within a step.
            RankError: a rank does not answer.
        """
        mine = self.mine(state)
        if not self.owners:
            return mine
        self.exchange.about = "the state"
        return self.exchange.union("saved", self.exchange.inner, mine)

    def mine(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this rank answers for, and who owns what; all ranks' together are the state.

        Raises:
            StateError: within a step.
        """
        if "micro-batches" in state:
            raise StateError(
                "a step is not finished: its micro-batches are on several ranks",
                hint="save the state after a backward pass outside of no_sync()",
            )
        if not self.owners:
            return dict(state)
        found = {k: v for k, v in state.items() if self._keeper(k) in (None, self.rank)}
        found[_OWNERS] = torch.tensor([self.grid.world, *self.owners.values()])
        return found

    def notes(self) -> tuple[str, ...]:
        """A line for the report: bytes per step, over all ranks."""
        if not self.steps:
            return ()
        kinds = ((kind, count) for kind, count in self.exchange.sent.items() if kind != "saved")
        found = ", ".join(f"{kind} {count / self.steps:,.0f}" for kind, count in kinds)
        return (f"kfac sends per step, in bytes over all ranks: {found}",)

    def _keeper(self, key: str) -> int | None:
        table, _, name = key.partition("/")
        if table in ("now", "before"):
            return self.keeper.get(name)
        return self.keeper.get(key[: key.rfind("/") + 1]) if table == "solution" else None

    def _groups(self) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """Those of this rank's row and column; all ranks make all groups in the same order."""
        grid, inner = self.grid, self.exchange.inner
        rows = [_group(inner, grid.row_ranks(i)) for i in range(grid.rows)]
        columns = [_group(inner, grid.column_ranks(i)) for i in range(grid.columns)]
        row, column = rows[grid.row(self.rank)], columns[grid.column(self.rank)]
        return inner if row is None else row, inner if column is None else column

    # -- the end of a step -------------------------------------------------------------------------

    def step(
        self,
        curvature: CurvatureState,
        gradients: Mapping[str, Tensor],
        fresh: Mapping[str, Tensor],
        *,
        reduces: bool,
        loss_scale: float = 1.0,
    ) -> dict[str, Tensor]:
        """Renew statistics and solutions, and precondition.

        Args:
            curvature: of this rank.
            gradients: of the whole step by parameter name.
            fresh: statistics, and rows of examples, that this step computed.
            reduces: whether nobody else averages gradients over ranks.
            loss_scale: what the loss was multiplied with.

        Returns:
            Preconditioned gradients by parameter name; where gradients are reduced here, all.

        Raises:
            RankError: a rank does not answer.
        """
        grid = self.grid
        self.prepare(curvature.curvature, curvature.state)
        blocks = units(curvature.curvature.blocks)
        owner = {name: self.owner(unit) for unit, bs in blocks.items() for name in _needs(bs)}
        self.exchange.about = f"the curvature of step {curvature.step + 1}"
        fresh = dict(sorted(fresh.items()))

        parcels = self._statistics(curvature, fresh, owner)
        everywhere = dict(gradients) if reduces else {}
        if reduces and grid.rows == 1:
            taken = [n for n in gradients if n in owner]
            parcels += [
                Parcel("gradients", n, gradients[n], owner[n], gradients[n].dtype) for n in taken
            ]
            everywhere = {n: g for n, g in gradients.items() if n not in owner}
        received = self.exchange.to_owners(parcels)
        means = self.exchange.mean_everywhere("gradients", everywhere)
        means = {**gradients, **means, **_of_kind(received, "gradients")}

        if fresh:
            own = [b for u, bs in blocks.items() if self.owner(u) == self.rank for b in bs]
            means_of = {
                name: curvature.mean_of_ranks(name, value) if curvature.is_low_rank(name) else value
                for name, value in _of_kind(received, "statistics").items()
            }
            changed = curvature.take_over(own, means_of)
            self._share_solutions(curvature, changed)
            self._share_intervals(curvature, list(fresh), owner)
            self.trim(curvature.state)
        self.steps += 1

        columns: list[list[Block]] = [[] for _ in range(grid.columns)]
        for unit, members in blocks.items():
            columns[grid.column(self.owner(unit))] += members
        mine = columns[grid.column(self.rank)]
        shortened = curvature.precondition(mine, means)
        length = curvature.length(shortened, means, loss_scale)
        if curvature.curvature.clip and grid.columns > 1:
            length = self._over_columns(length)
        means.update(curvature.clipped(shortened, length))
        if grid.columns > 1:
            names = ([n for n in _parameters(bs) if n in gradients] for bs in columns)
            parts = [{n: means[n] for n in some} for some in names]
            means.update(self.exchange.spread("gradients", self.row, parts))
        return means

    def _over_columns(self, length: Tensor | None) -> Tensor:
        """The sum over the columns; each has its part on as many ranks as there are rows."""
        total = torch.zeros(1, dtype=torch.float64, device=self.exchange.device)
        if length is not None:
            total += length
        self.exchange.sum_everywhere("lengths", total)
        return (total / self.grid.rows).squeeze(0)

    def _statistics(
        self, curvature: CurvatureState, fresh: Mapping[str, Tensor], owner: Mapping[str, int]
    ) -> list[Parcel]:
        """Statistics, and rows of examples, on their way to the owners."""
        found = []
        narrow = curvature.curvature.wire == "bf16"
        for name, value in fresh.items():
            rows = name not in curvature.sides
            low_rank = curvature.is_low_rank(name)
            if rows and name.endswith(":g") and curvature.curvature.reduction == "mean":
                # The mean over all ranks' examples weighs each less than that over one rank's.
                value = value / self.exchange.world
            # Rounded rows would make the trace of what they leave out a bound no longer.
            apart = rows or low_rank
            wire = torch.bfloat16 if narrow and not apart else value.dtype
            found.append(Parcel("statistics", name, value, owner[name], wire, mean=not apart))
        return found

    def _share_solutions(self, curvature: CurvatureState, changed: Sequence[Block]) -> None:
        """Give the ranks of the column what this one has solved, and take what they have."""
        if self.grid.rows == 1:
            return
        state = curvature.state
        mine = {}
        for prefix in map(prefix_of, changed):
            # Says that the former solution is void, also where there is no new one.
            mine[prefix] = torch.empty(0, dtype=torch.uint8)
            mine.update({k: v for k, v in state.items() if k.startswith(prefix)})
        found = self.exchange.union("solutions", self.column, mine)
        # Those of this rank, too: strides that only the owner has would give it other roundings.
        for prefix in (name for name in found if name.endswith("/")):
            for key in [k for k in state if k.startswith(prefix)]:
                del state[key]
            state.update({k: v for k, v in found.items() if k.startswith(prefix) and k != prefix})

    def _share_intervals(
        self, curvature: CurvatureState, fresh: Sequence[str], owner: Mapping[str, int]
    ) -> None:
        """Have all ranks renew the same statistics in the same steps."""
        names = [name for name in fresh if name in curvature.sides]
        if curvature.curvature.interval or not names:
            return
        numbers = torch.zeros(len(names), 3, dtype=torch.int64)
        for row, name in zip(numbers, names, strict=True):
            if owner[name] == self.rank:
                known = curvature.interval(name)
                row.copy_(torch.tensor([known.last, known.before, known.next]))
        numbers = numbers.to(self.exchange.device)
        self.exchange.sum_everywhere("intervals", numbers)
        for name, row in zip(names, numbers.tolist(), strict=True):
            curvature.keep_interval(name, Interval(*row))


def _group(inner: dist.ProcessGroup, members: Sequence[int]) -> dist.ProcessGroup | None:
    """A new group; ``None`` for all ranks, and for one, which has nobody to talk to.

    Args:
        inner: all ranks, which may be some of the job's.
        members: by their places among these.
    """
    if len(members) in (1, inner.size()):
        return None
    everybody = dist.get_process_group_ranks(inner)
    timeout = inner._get_backend(torch.device(inner._device_types[0])).options._timeout
    return dist.new_group(  # type: ignore[no-any-return]
        [everybody[i] for i in members], timeout=timeout, use_local_synchronization=True
    )


def _parameters(blocks: Sequence[Block]) -> list[str]:
    return list(dict.fromkeys(n for b in blocks for n in (b.weight, b.bias) if n))


def _needs(blocks: Sequence[Block]) -> list[str]:
    """Names of parameters, statistics and rows of examples."""
    statistics = (name for b in blocks for name in (*(s.statistic for s in b.sides), *b.samples))
    return [*_parameters(blocks), *statistics]


def _of_kind(received: Mapping[tuple[str, str], Tensor], kind: str) -> dict[str, Tensor]:
    return {name: tensor for (found, name), tensor in received.items() if found == kind}
