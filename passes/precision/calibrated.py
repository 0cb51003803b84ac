"""What a calibration says of a graph: what its ranges rule out, and what rounding costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx

from graphopt.analysis.weight_uses import depends_on_tangents
from graphopt.calibration.record import FORMATS, Calibration, Range
from graphopt.errors import ArgumentError
from graphopt.graph import Graph, operator_name, phase_of, value_of
from graphopt.passbase import Declined
from graphopt.passes.precision.formats import Format
from graphopt.passes.precision.mincut import Noise
from graphopt.passes.precision.problem import Problem, Unit
from graphopt.passes.precision.rules import Kind
from graphopt.plan import Phase, Role

# A narrow format has to hold four times the largest magnitude that was seen.
HEADROOM = 4.0
# Of the sum of a tensor's magnitudes at most this share may vanish in a narrow format.
UNDERFLOW = 0.01
# Exponent of the scale that gradients have in a narrow format: the first one of dynamic scaling, or
# less where they would overflow.
LOSS_SCALE = 16


@dataclass(frozen=True)
class Calibrated:
    """A calibration of the model that a graph was captured from.

    Attributes:
        calibration: the data.
        graph: the graph.
        format: the format to judge.
        scaled: whether gradients are scaled in it.
    """

    calibration: Calibration
    graph: Graph
    format: Format
    scaled: bool

    @classmethod
    def load(cls, path: str, graph: Graph, format: Format, scaled: bool) -> Calibrated:
        """Read it for this graph.

        Raises:
            ArgumentError: the file is no calibration, or one of another model.
        """
        calibration = Calibration.load(path)
        found = {s.name: n for s, n in zip(graph.signature.inputs, graph.inputs, strict=True)}
        parameters = {
            name: tuple(value_of(found[name]).shape) for name in graph.signature.names(Role.PARAM)
        }
        there = dict(calibration.parameters)
        if parameters != there:
            name = next(n for n in [*parameters, *there] if parameters.get(n) != there.get(n))
            raise ArgumentError(
                f"the calibration is of another model ({calibration.model}): {name} is "
                f"{_shape(there.get(name))} there and {_shape(parameters.get(name))} here",
                where=Path(path).name,
                hint="write one for this model with graphopt calibrate M -o FILE",
            )
        return cls(calibration, graph, format, scaled)

    def check(self, problem: Problem, where: str) -> None:
        """Raise ``ArgumentError`` where it knows no product of the graph."""
        products = [n for n, unit in problem.units.items() if unit.kind is Kind.ALLOW]
        if products and not any(self._known(n) for n in products):
            raise ArgumentError(
                f"the calibration has no operator {products[0].name}: it is of another form of "
                f"{self.calibration.model}",
                where=Path(where).name,
                hint="calibrate in the mode that will run: train() or eval()",
            )

    def ruled_out(self, problem: Problem) -> dict[fx.Node, Declined]:
        """The units that a range keeps in float32, with the number that does."""
        scaled, exponent = self.graph.get(depends_on_tangents), self._loss_scale(problem)
        found = {}
        for node, unit in problem.units.items():
            for value in dict.fromkeys((*unit.values, *unit.read)):
                against = self._against(value, exponent if value in scaled else 0)
                if against is not None:
                    reason, words, numbers = against
                    what = "its result" if value in unit.values else "what it reads"
                    detail = f"{operator_name(node)}: {what} {value.name} {words}"
                    found[node] = Declined(node.name, reason, detail, numbers)
                    break
        return found

    def noise(self, problem: Problem) -> Noise:
        """What rounding costs; that of gradients counts for nothing, as no loss follows."""
        return Noise(
            {node: self._result(unit) for node, unit in problem.units.items()},
            {
                (value, node): self._read(value, node)
                for node, unit in problem.units.items()
                for value in unit.read
            },
        )

    def _known(self, node: fx.Node) -> bool:
        if phase_of(node) is Phase.BACKWARD:
            return node.name in self.calibration.tensors
        found = self.calibration.sensitivities.get(node.name)
        return found is not None and found.operator == operator_name(node)

    def _result(self, unit: Unit) -> float:
        """Operators that move or select values round nothing that their operands have not."""
        if phase_of(unit.node) is Phase.BACKWARD or unit.kind is Kind.CLEAR:
            return 0.0
        if not self._known(unit.node):
            return math.inf
        return _known(self.calibration.sensitivities[unit.node.name].result.get(self.format.name))

    def _read(self, value: fx.Node, reader: fx.Node) -> float:
        if phase_of(reader) is Phase.BACKWARD:
            return 0.0
        if not self._known(reader):
            return math.inf
        reads = self.calibration.sensitivities[reader.name].reads
        return _known(reads.get(value.name, {}).get(self.format.name))

    def _loss_scale(self, problem: Problem) -> int:
        """Exponent of the scale that gradients have in a narrow format."""
        if not self.scaled:
            return 0
        scaled = self.graph.get(depends_on_tangents)
        names = {v.name for v in problem.values() if v in scaled}
        ranges = (self.calibration.tensors.get(name) for name in names)
        largest = [r.log2_amax for r in ranges if r is not None and r.log2_amax is not None]
        if not largest:
            return LOSS_SCALE
        return min(LOSS_SCALE, math.floor(self._limit - max(largest)))

    @property
    def _limit(self) -> float:
        """Logarithm of the largest magnitude that the format may be used for."""
        headroom = 1.0 if self.format.wide else HEADROOM
        return math.log2(torch.finfo(self.format.dtype).max) - math.log2(headroom)

    def _against(self, value: fx.Node, exponent: int) -> tuple[str, str, dict[str, float]] | None:
        seen = self.calibration.tensors.get(value.name)
        if seen is None:
            return None
        if seen.nan:
            return "not-finite", f"was NaN {seen.nan} times", {"nan": seen.nan}
        if seen.log2_amax is not None and seen.log2_amax + exponent > self._limit:
            largest, limit = 2.0 ** (seen.log2_amax + exponent), 2.0**self._limit
            words = f"reaches {largest:.3g}, and {self.format.name} is used up to {limit:.3g}"
            return "out-of-range", words, {"amax": largest, "limit": limit}
        lost = vanishing(seen, self.format, exponent)
        if lost > UNDERFLOW:
            words = f"loses {lost:.1%} of the sum of its magnitudes to zero in {self.format.name}"
            return "underflow", words, {"underflow": lost, "limit": UNDERFLOW}
        return None


def vanishing(seen: Range, format: Format, exponent: int = 0) -> float:
    """Share of the sum of magnitudes that becomes 0 in the format, scaled by ``2**exponent``."""
    info = torch.finfo(format.dtype)
    half = round(math.log2(info.smallest_normal * info.eps)) - 1
    return seen.mass_below(half - exponent)


def change_by(noise: Noise, unit: Unit) -> float:
    """The expected change of the loss by lowering one unit alone."""
    reads = (noise.read[value, unit.node] for value in dict.fromkeys(unit.read))
    return math.fsum([noise.result[unit.node], *reads])


def check_budget(calibration: str, budget: float, policy: str, format: str) -> None:
    """Raise ``ArgumentError`` for options that cannot go together."""
    for wrong, message, hint in _wrong(calibration, budget, policy, format):
        if wrong:
            raise ArgumentError(message, hint=hint)


def _wrong(
    calibration: str, budget: float, policy: str, format: str
) -> Iterator[tuple[bool, str, str]]:
    yield (
        not 0 <= budget < math.inf,
        f"precision: budget={budget:g} is no change of a loss",
        "budget=1e-4 allows the loss to change by that much; 0 allows any change",
    )
    yield (
        bool(budget) and not calibration,
        f"precision: budget={budget:g} needs a calibration, which says what changes the loss",
        "graphopt calibrate M -o FILE, and calibration=FILE beside the budget",
    )
    yield (
        bool(budget) and policy != "mincut",
        f"precision: policy={policy} weighs nothing, so it keeps to no budget",
        "leave the policy out",
    )
    yield (
        bool(calibration) and format not in FORMATS,
        f"precision: calibrations say nothing of rounding to {format}, which is emulated",
        f"format={' or format='.join(FORMATS)}",
    )


def _known(value: float | None) -> float:
    return math.inf if value is None else value


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "a number"
