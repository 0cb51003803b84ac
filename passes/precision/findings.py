"""What was decided, operator by operator and in total: for reports, tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from graphopt.analysis.cost import Costs, cost, tensor_bytes
from graphopt.analysis.gradient_order import ASSUMED
from graphopt.analysis.liveness import liveness
from graphopt.graph import Graph, module_of, operator_name, phase_of, value_of
from graphopt.passbase import Applied, Declined, Number, Outcome, Row
from graphopt.passes.precision.calibrated import change_by
from graphopt.passes.precision.decision import Decision
from graphopt.passes.precision.formats import Format
from graphopt.passes.precision.mincut import Noise
from graphopt.passes.precision.problem import Problem
from graphopt.passes.precision.rules import Kind

# Root mean square of the relative error of one rounding, in distances from 1 to the next number,
# where significands are spread as those of most data are, evenly in their logarithms.
_ROUNDING = math.sqrt(3 / (96 * math.log(2)))


@dataclass(frozen=True)
class Findings:
    """A decision with the figures behind it, taken before the graph is rewritten.

    Attributes:
        format: the lower one.
        problem: what was decided.
        decision: how.
        budget: the largest change of the loss; 0 for any.
        noise: by a calibration, if there is one.
        costs: of the graph in float32.
        saved: bytes that it saves for backward.
        nodes: its operators.
    """

    format: Format
    problem: Problem
    decision: Decision
    budget: float
    noise: Noise | None
    costs: Costs
    saved: int
    nodes: tuple[fx.Node, ...]

    @classmethod
    def of(
        cls,
        graph: Graph,
        format: Format,
        problem: Problem,
        decision: Decision,
        noise: Noise | None,
        budget: float,
    ) -> Findings:
        """Of a graph that is still in float32."""
        saved = graph.get(liveness).saved_bytes
        costs, nodes = graph.get(cost), tuple(graph.operators)
        return cls(format, problem, decision, budget, noise, costs, saved, nodes)

    def outcome(
        self, left_out: Sequence[Declined], casts: Sequence[fx.Node] = (), saved: int | None = None
    ) -> Outcome:
        """Everything that the pass reports.

        Args:
            left_out: what could not be chosen at all.
            casts: those of the rewritten graph.
            saved: bytes that it saves for backward; as before where it was not rewritten.
        """
        declined = (*left_out, *self._declined())
        totals = self._totals(casts, self.saved if saved is None else saved)
        tables: dict[str, tuple[Row, ...]] = {
            "operators": tuple(self._rows(declined)),
            "totals": (totals,),
        }
        if self.decision.front:
            tables["front"] = tuple(self._front())
        return Outcome(tuple(self._applied(totals)), declined, tables=tables)

    def _applied(self, totals: Row) -> Iterator[Applied]:
        low, times, name = self.decision.low, self.decision.times, self.format.name
        if not low:
            return
        counts: dict[str, list[bool]] = {}
        for node in self.problem.units:
            counts.setdefault(operator_name(node), []).append(node in low)
        yield Applied(
            "operators",
            f"in {name}, of all that can be",
            {o: f"{sum(c)} of {len(c)}" for o, c in counts.items() if any(c)},
        )
        for node in (n for n in self.problem.units if n in low):
            numbers = {"float32_us": 1e6 * times.high[node], f"{name}_us": 1e6 * times.low[node]}
            yield Applied(node.name, f"{operator_name(node)} runs in {name}", numbers)
        chosen = {k: v for k in ("casts", "cast_bytes") if (v := totals[k]) is not None}
        yield Applied("casts", "inserted casts", chosen)
        shown: dict[str, Number] = {"flops": f"{totals['flops_lowered']:.1%}"}
        if totals["change"] is not None:
            shown["expected_change_of_loss"] = totals["change"]
        yield Applied("products", f"share of the FLOPs in {name}", shown)
        if totals["saved_before"] and totals["saved_after"] is not None:
            saved = {"before": totals["saved_before"], "after": totals["saved_after"]}
            yield Applied("activations", "bytes saved for backward", saved)

    def _declined(self) -> Iterator[Declined]:
        """Operators that could have been lowered and were not."""
        times = self.decision.times
        for node, unit in self.problem.units.items():
            if unit.kind is not Kind.ALLOW or node in self.decision.low:
                continue
            numbers = {"float32_us": 1e6 * times.high[node], "low_us": 1e6 * times.low[node]}
            if self._over_budget(node):
                detail = f"{operator_name(node)} would be faster, and the budget is spent"
                change = self._change(node)
                more = {} if change is None else {"change": change}
                yield Declined(node.name, "over-budget", detail, {**numbers, **more})
            else:
                detail = f"{operator_name(node)} with its casts is not faster in lower precision"
                yield Declined(node.name, "not-faster", detail, numbers)

    def _over_budget(self, node: fx.Node) -> bool:
        front = self.decision.front
        unknown = self._change(node) is None
        return bool(self.budget) and bool(front) and (node in front[0].low or unknown)

    def _change(self, node: fx.Node) -> float | None:
        """The expected change of the loss by lowering this one alone, where it is known."""
        if self.noise is None:
            return None
        change = change_by(self.noise, self.problem.units[node])
        return change if math.isfinite(change) else None

    def _rows(self, declined: Sequence[Declined]) -> Iterator[Row]:
        against = {d.site: d for d in declined}
        for node in self.nodes:
            unit = self.problem.units.get(node)
            if unit is None and node.name not in against:
                continue
            refusal = against.get(node.name)
            lowered = node in self.decision.low
            price = self.costs.by_node[node]
            yield {
                "site": node.name,
                "module": module_of(node),
                "operator": operator_name(node),
                "phase": str(phase_of(node)),
                "kind": str(unit.kind) if unit else None,
                "float32_us": 1e6 * self.decision.times.high[node] if unit else None,
                "low_us": 1e6 * self.decision.times.low[node] if unit else None,
                "flops": price.flops,
                "bytes": price.bytes,
                "bound": _bound(node, price.flops, price.bytes),
                "error": self._error(node) if unit else None,
                "change": self._change(node) if unit else None,
                "format": self.format.name if lowered else "float32",
                "reason": refusal.reason if refusal else "" if lowered else "as-operands",
                "detail": refusal.detail if refusal else "",
            }

    def _error(self, node: fx.Node) -> float | None:
        """Of a product's result, relative, from rounding its operands and itself."""
        unit = self.problem.units[node]
        if unit.kind is not Kind.ALLOW:
            return None
        roundings = len(dict.fromkeys(unit.read)) + 1
        return _ROUNDING * 2 * self.format.unit * math.sqrt(roundings)

    def _totals(self, casts: Sequence[fx.Node], saved: int) -> Row:
        low, times = self.decision.low, self.decision.times
        flops = sum(self.costs.by_node[n].flops for n in self.nodes)
        lowered = sum(self.costs.by_node[n].flops for n in low)
        moved = (tensor_bytes(value_of(n)) for c in casts for n in (c, c.all_input_nodes[0]))
        noise = self.noise.total(self.problem, low) if self.noise is not None else None
        return {
            "format": self.format.name,
            "operators": len(self.problem.units),
            "lowered": len(low),
            "flops": flops,
            "flops_lowered": lowered / flops if flops else 0.0,
            "casts": len(casts),
            "cast_bytes": sum(moved),
            "saved_before": self.saved,
            "saved_after": saved,
            "float32_us": 1e6 * times.total(self.problem, frozenset()),
            "chosen_us": 1e6 * times.total(self.problem, low),
            "change": noise if noise is not None and math.isfinite(noise) else None,
            "budget": self.budget or None,
            "times": self.decision.source,
        }

    def _front(self) -> Iterator[Row]:
        for point in self.decision.front:
            yield {
                "seconds": point.seconds,
                "change": point.change,
                "lowered": len(point.low),
                "chosen": int(point.low == self.decision.low),
            }


def _bound(node: fx.Node, flops: int, moved: int) -> str | None:
    """By arithmetic intensity in float32, on the assumed device of its class."""
    if not moved:
        return None
    value = value_of(node)
    first = value[0] if isinstance(value, tuple | list) else value
    device = ASSUMED.get(getattr(getattr(first, "device", None), "type", "cpu"), ASSUMED["cuda"])
    return "compute" if flops / moved >= device.flops / device.bandwidth else "memory"
