"""The curvature of one model: statistics, when they are renewed, and what is made of them.

Everything lives in one dictionary of tensors, so that it can be saved, restored and sent: ``step``,
per statistic ``now/…`` and ``before/…`` (its last two values), ``interval/…``, ``sum/…`` over the
micro-batches of an unfinished step, and per block its ``solution/…``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from graphopt.notices import warn
from graphopt.ops import low_rank
from graphopt.plan.kfac import DENSE, LOW_RANK, Block, Curvature, Side
from graphopt.runtime.kfac import unitwise
from graphopt.runtime.kfac.interval import Interval, similar
from graphopt.runtime.kfac.layout import from_matrix, to_matrix
from graphopt.runtime.kfac.packing import unpack
from graphopt.runtime.kfac.solve import Problem, Solution, solver
from graphopt.runtime.part import check_dtype

# SP-NGD calls a statistic similar to an older one within this relative distance.
ALPHA = 0.1

_STEP = "step"
_MICRO = "micro-batches"
_OF_SIDE = ("now", "before", "interval")


class CurvatureState:
    """Statistics and solutions of the blocks that one rank keeps.

    Args:
        curvature: what to obey.
        state: where all tensors are kept; shared by all specialisations of a model.
    """

    def __init__(self, curvature: Curvature, state: dict[str, Tensor]) -> None:
        self.curvature = curvature
        self.state = state
        self.solver = solver(curvature.solver)
        self.sides = {side.statistic: side for b in curvature.blocks for side in b.sides}
        self._of_gradients = {b.left.statistic for b in curvature.blocks}
        self._rows = {name for b in curvature.blocks for name in b.samples}
        self._warned: set[str] = set()

    # -- time --------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps so far; micro-batches of one step count once."""
        return int(self.state[_STEP]) if _STEP in self.state else 0

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the step that is not finished."""
        return int(self.state[_MICRO]) if _MICRO in self.state else 0

    def interval(self, name: str) -> Interval:
        """State of the interval rule of a statistic."""
        found = self.state.get(f"interval/{name}")
        return Interval() if found is None else Interval(*found.tolist())

    def due(self) -> set[str]:
        """Names of the statistics that this step renews."""
        step, every = self.step, self.curvature.interval
        if every:
            return set() if step % every else set(self.sides)
        return {name for name in self.sides if self.interval(name).due(step)}

    def advance(self) -> None:
        """The step is over."""
        self.state[_STEP] = torch.tensor(self.step + 1)

    def is_of_gradients(self, name: str) -> bool:
        """Whether a statistic consists of squares of output gradients."""
        return name in self._of_gradients

    # -- statistics --------------------------------------------------------------------------------

    def absorb(self, statistics: Mapping[str, Tensor], loss_scale: float = 1.0) -> None:
        """Add one micro-batch to the statistics of the step; takes the tensors over."""
        first = self.micro_batches == 0
        for name, value in statistics.items():
            if loss_scale != 1.0 and name in self._of_gradients:
                value = self._over(name, value, loss_scale**2)
            elif loss_scale != 1.0 and name.endswith(":g"):
                value = value / loss_scale
            key = f"sum/{name}"
            if not first and key in self.state:
                both = (self.state[key], value)
                value = torch.cat(both) if name in self._rows else self.sum(name, both)
            self.state[key] = value
        self.state[_MICRO] = torch.tensor(self.micro_batches + 1)

    def taken(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The statistics of the whole step; forgets its micro-batches.

        The loss of a step is the mean over all its examples, so each micro-batch of m saw output
        gradients m times too small, and squares of them m² times.
        """
        m = self.micro_batches
        found = {}
        for name in names:
            value = self.state.pop(f"sum/{name}", None)
            if value is None:
                continue
            grows = name in self._of_gradients and self.curvature.reduction == "mean"
            factor = 1.0 if name in self._rows else float(m) if grows else 1.0 / m
            found[name] = value if factor == 1.0 else self._times(name, value, factor)
        for name in [k for k in self.state if k.startswith("sum/")]:
            del self.state[name]
        self.state.pop(_MICRO, None)
        return found

    def take_over(self, blocks: Iterable[Block], fresh: Mapping[str, Tensor]) -> list[Block]:
        """Renew the statistics of these blocks, and solve those that changed; returns these."""
        mine = [b for b in blocks if any(side.statistic in fresh for side in b.sides)]
        names = {side.statistic for b in mine for side in b.sides}
        renewed = self.renew({n: v for n, v in fresh.items() if n in names})
        changed = [
            b
            for b in mine
            if any(side.statistic in renewed for side in b.sides)
            and all(f"now/{side.statistic}" in self.state for side in b.sides)
        ]
        if changed:
            self.solve(changed, fresh)
        return changed

    def renew(self, statistics: Mapping[str, Tensor]) -> set[str]:
        """Take new statistics over; returns the names of those that were usable."""
        renewed: set[str] = set()
        if not statistics:
            return renewed
        # One wait for the device for all of them.
        extremes = torch.stack([e for v in statistics.values() for e in v.aminmax()]).tolist()
        both = zip(extremes[::2], extremes[1::2], strict=True)
        for (name, fresh), (least, largest) in zip(statistics.items(), both, strict=True):
            if not (math.isfinite(least) and math.isfinite(largest)):
                self._warn(name, f"the statistic {name!r} was not finite; the former one is kept")
            elif f"now/{name}" not in self.state or least or largest:
                # Zeros only say that the layer saw no data.
                self._replace(name, fresh)
                renewed.add(name)
            if not self.curvature.interval and name not in renewed:
                self.keep_interval(name, Interval(*self._intervals(name), next=self.step + 1))
        return renewed

    def sum(self, name: str, values: Sequence[Tensor]) -> Tensor:
        """The sum of values of one statistic."""
        side = self.sides.get(name)
        if side is not None and side.form == LOW_RANK:
            return low_rank.low_rank_sum(values, side.size)
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total

    def mean_of_ranks(self, name: str, value: Tensor) -> Tensor:
        """The mean of values of one statistic, which lie behind one another."""
        side = self.sides[name]
        parts = torch.split(value, side.blocks)
        return low_rank.weighted_sum(parts, [1 / len(parts)] * len(parts), side.size)

    def is_low_rank(self, name: str) -> bool:
        """Whether a statistic is kept as low rank plus a diagonal."""
        return name in self.sides and self.sides[name].form == LOW_RANK

    def _similar(self, name: str, fresh: Tensor, old: Tensor | None) -> bool:
        side = self.sides[name]
        return old is not None and bool(similar(fresh, old, ALPHA, side.form, side.size))

    def _times(self, name: str, value: Tensor, factor: float) -> Tensor:
        if self.is_low_rank(name):
            return low_rank.scaled(value, factor, self.sides[name].size)
        return value * factor

    def _over(self, name: str, value: Tensor, divisor: float) -> Tensor:
        return self._times(name, value, 1 / divisor) if self.is_low_rank(name) else value / divisor

    def _mixed(self, name: str, now: Tensor, fresh: Tensor) -> Tensor:
        # A state that was loaded before the model was captured could not be compared earlier.
        check_dtype(f"kfac/now/{name}", now, fresh.dtype)
        ema = self.curvature.ema
        if self.is_low_rank(name):
            return low_rank.weighted_sum([now, fresh], [ema, 1 - ema], self.sides[name].size)
        return now.lerp(fresh, 1 - ema)

    def _intervals(self, name: str) -> tuple[int, int]:
        found = self.interval(name)
        return found.last, found.before

    def _replace(self, name: str, fresh: Tensor) -> None:
        now = self.state.get(f"now/{name}")
        ema = self.curvature.ema
        if ema and now is not None:
            fresh = self._mixed(name, now, fresh)
        if not self.curvature.interval:
            before = self.state.get(f"before/{name}")
            last = self._similar(name, fresh, now)
            # One that has moved since the last refresh is not held against the one before.
            older = last and self._similar(name, fresh, before)
            self.keep_interval(name, self.interval(name).refreshed(self.step, last, older))
            if now is not None:
                self.state[f"before/{name}"] = now
        self.state[f"now/{name}"] = fresh

    def keep_interval(self, name: str, interval: Interval) -> None:
        """Replace the state of the interval rule of a statistic."""
        self.state[f"interval/{name}"] = torch.tensor(
            [interval.last, interval.before, interval.next]
        )

    def keep_only(self, names: Collection[str]) -> None:
        """Drop what is known of blocks with other statistics: a loaded state has all stages'."""
        if self.sides.keys() <= set(names):
            return
        others = [b for b in self.curvature.blocks if b.left.statistic not in names]
        gone = {
            f"{table}/{side.statistic}" for b in others for side in b.sides for table in _OF_SIDE
        }
        solutions = {prefix_of(block) for block in others}
        for key in [k for k in self.state if k in gone or k[: k.rfind("/") + 1] in solutions]:
            del self.state[key]

    # -- solutions ---------------------------------------------------------------------------------

    def solve(self, blocks: Iterable[Block], samples: Mapping[str, Tensor]) -> None:
        """Invert what these blocks' statistics are now."""
        blocks = list(blocks)
        norms = [block for block in blocks if block.kind == "unitwise"]
        kronecker = [block for block in blocks if block.kind != "unitwise"]
        self._forget(blocks)
        moments = [self._now(block.left) for block in norms]
        for block, solution in zip(
            norms, unitwise.solve_all(moments, self.curvature.damping), strict=True
        ):
            self._keep_solution(block, solution)
        problems = [self._problem(b, samples) for b in kronecker]
        for block, found in zip(
            kronecker, self.solver.solve(problems, self.curvature.damping), strict=True
        ):
            self._keep_solution(block, found)

    def _now(self, side: Side) -> Tensor:
        return self.state[f"now/{side.statistic}"]

    def _matrices(self, side: Side) -> Tensor:
        """The newest value of a statistic as `Problem` has it."""
        value = self._now(side)
        if side.form == LOW_RANK:
            return value.view(side.blocks, side.rank + 1, side.size)
        return unpack(value) if side.form == DENSE else value

    def _problem(self, block: Block, samples: Mapping[str, Tensor]) -> Problem:
        assert block.right is not None
        left, right = (self._matrices(side) for side in (block.left, block.right))
        rows = [samples[name] for name in block.samples if name in samples]
        mean = self.curvature.reduction == "mean"
        # Gradients of single examples: the mean over n examples divided them by n.
        pairs = tuple(
            (g * len(g) if mean else g, a) for g, a in zip(*[iter(rows)] * 2, strict=True)
        )
        sides = (("left", block.left), ("right", block.right))
        low_rank = tuple(name for name, side in sides if side.form == LOW_RANK)
        return Problem(block.weight, left, right, pairs, block.groups, low_rank)

    def _forget(self, blocks: Iterable[Block]) -> None:
        """Drop the solutions of these blocks."""
        old = {prefix_of(block) for block in blocks}
        for key in [k for k in self.state if k[: k.rfind("/") + 1] in old]:
            del self.state[key]

    def _keep_solution(self, block: Block, solution: Solution | None) -> None:
        prefix = prefix_of(block)
        if solution is None:
            self._warn(
                block.weight,
                f"the curvature of {block.weight!r} could not be inverted with any damping; its "
                "gradient stays plain until the next statistics",
            )
            return
        if float(solution["damping"]) > self.curvature.damping:
            self._warn(
                f"{block.weight} damping",
                f"the curvature of {block.weight!r} needed a damping of "
                f"{float(solution['damping']):g}",
            )
        self.state.update({prefix + key: value for key, value in solution.items()})

    def _solutions(self) -> dict[str, Solution]:
        """What was made of the blocks' statistics, by `prefix_of` them; one look at the state."""
        found: dict[str, Solution] = {}
        for key, value in self.state.items():
            if key.startswith("solution/"):
                end = key.rfind("/") + 1
                found.setdefault(key[:end], {})[key[end:]] = value
        return found

    def precondition(
        self, blocks: Iterable[Block], gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Preconditioned gradients by parameter name; blocks without a solution are left out."""
        parts: dict[str, list[tuple[int, Tensor]]] = {}
        solutions = self._solutions()
        for block in blocks:
            solution = solutions.get(prefix_of(block))
            names = [n for n in (block.weight, block.bias) if n]
            if solution is None or any(n not in gradients for n in names):
                continue
            if block.kind == "unitwise":
                first = gradients[block.weight]
                second = gradients[block.bias] if block.bias else None
                pair = unitwise.apply(solution, first, second)
                found = {n: t for n, t in zip(names, pair, strict=False) if t is not None}
            else:
                matrix = self.solver.apply(solution, to_matrix(block, gradients))
                found = from_matrix(block, matrix, gradients)
            for name, value in found.items():
                parts.setdefault(name, []).append((block.start, value))
        return {
            name: values[0][1]
            if len(values) == 1 and values[0][1].shape == gradients[name].shape
            else _assembled(gradients[name], values)
            for name, values in parts.items()
        }

    def length(
        self, found: Mapping[str, Tensor], gradients: Mapping[str, Tensor], loss_scale: float = 1.0
    ) -> Tensor | None:
        """The squared length of preconditioned gradients in the metric of the curvature F.

        With ``p = F⁻¹ g`` it is ``pᵀ F p = pᵀ g``; as F, it is that of the loss without its scale.

        Args:
            found: what `precondition` returned.
            gradients: what it was given.
            loss_scale: what the loss was multiplied with.

        Returns:
            float64 of no dimension; ``None`` where no step is shortened.
        """
        if not self.curvature.clip or not found:
            return None
        parts = [
            (value * gradients[name]).sum(dtype=torch.float64) for name, value in found.items()
        ]
        return torch.stack(parts).sum() / loss_scale**2

    def clipped(self, found: dict[str, Tensor], length: Tensor | None) -> dict[str, Tensor]:
        """Preconditioned gradients, shortened to a squared length of at most `clip`."""
        if length is None:
            return found
        factor = (self.curvature.clip / length).sqrt().clamp(max=1.0)
        factor = torch.where(length > 0, factor, 1.0)
        return {name: value * factor.to(value.dtype) for name, value in found.items()}

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warn(f"kfac: {message}", RuntimeWarning)


def prefix_of(block: Block) -> str:
    """What the names of a block's solution in the state begin with."""
    return f"solution/{block.weight}/{block.start}/"


def _assembled(plain: Tensor, parts: list[tuple[int, Tensor]]) -> Tensor:
    """A gradient of which some rows were preconditioned."""
    whole = plain.clone()
    for start, part in parts:
        whole.narrow(0, start, part.shape[0]).copy_(part)
    return whole
