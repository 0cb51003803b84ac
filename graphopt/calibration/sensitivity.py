"""How much the loss is expected to change where one forward operator rounds.

Rounding errors ``δ`` of zero mean and independent signs change a loss by ``½ Σ h_i δ_i²`` on
average, with ``h`` the diagonal of its curvature (`graphopt.calibration.curvature`). For errors
spread evenly over a distance ``κ`` between numbers this is ``(κ² / 24) Σ h_i``; here each element
has the error that it really has in the format, so what the format holds exactly costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from graphopt.analysis.aliasing import storage
from graphopt.calibration.curvature import fisher_of_weights
from graphopt.calibration.forward import Recorded
from graphopt.calibration.record import FORMATS, Sensitivity
from graphopt.graph import Graph, operator_name
from graphopt.plan import Role

Omega = dict[str, float]

Curvature = Callable[[list[Tensor]], list[Tensor]]
"""From values of a run to the diagonal of the curvature at each of them."""


@dataclass
class SensitivitySums:
    """Sums of sensitivities over batches, each weighted by its examples."""

    samples: int = 0
    operators: dict[str, str] = field(default_factory=dict)
    results: dict[str, Omega] = field(default_factory=dict)
    reads: dict[str, dict[str, Omega]] = field(default_factory=dict)

    def add(self, run: Recorded, curvature: Curvature, samples: int) -> None:
        """Add one batch; a value that leaves a format makes its sum infinite."""
        results = [(node, value) for node, parts in run.results.items() for value in parts]
        reads = list(run.reads.items())
        values = [value for _, value in results] + [value for _, value in reads]
        found = curvature(values)
        for node in run.results:
            self.operators[node.name] = operator_name(node)
            self.results.setdefault(node.name, dict.fromkeys(FORMATS, 0.0))
        for (node, value), diagonal in zip(results, found[: len(results)], strict=True):
            _accumulate(self.results[node.name], omega(value, diagonal), samples)
        for ((read, reader), value), diagonal in zip(reads, found[len(results) :], strict=True):
            self._read(read, reader, omega(value, diagonal), samples)
        self.samples += samples

    def add_weights(
        self,
        run: Recorded,
        graph: Graph,
        outputs: list[Tensor],
        tangents: list[Tensor],
        samples: int,
    ) -> None:
        """Put what weights cost by `fisher_of_weights` in place of what a batch added for them."""
        views = graph.get(storage).views

        def root(node: fx.Node) -> fx.Node:
            while node in views:
                node = node.all_input_nodes[0]
            return node

        slots = zip(graph.signature.inputs, graph.inputs, strict=True)
        parameters = {node for slot, node in slots if slot.role is Role.PARAM}
        chains: dict[tuple[fx.Node, fx.Node], Omega] = {}
        for operand, product, diagonal in fisher_of_weights(
            run, outputs, tangents, samples, root, parameters
        ):
            cost = omega(run.reads[operand, product], diagonal)
            reader, read = product, operand
            while True:
                _accumulate(chains.setdefault((read, reader), dict.fromkeys(FORMATS, 0.0)), cost, 1)
                if read not in views:
                    break
                read, reader = read.all_input_nodes[0], read
        for (read, reader), cost in chains.items():
            value = run.reads[read, reader]
            (gradient,) = torch.autograd.grad(
                outputs, value, tangents, retain_graph=True, allow_unused=True
            )
            if gradient is not None:
                self._read(read, reader, omega(value, samples * gradient.square()), -samples)
            self._read(read, reader, cost, samples)

    def found(self) -> dict[str, Sensitivity]:
        """The means; empty where no batch was added."""
        if not self.samples:
            return {}
        return {
            name: Sensitivity(
                kind,
                self._mean(self.results[name]),
                {read: self._mean(cost) for read, cost in self.reads.get(name, {}).items()},
            )
            for name, kind in self.operators.items()
        }

    def _read(self, read: fx.Node, reader: fx.Node, cost: Omega, weight: int) -> None:
        of_reader = self.reads.setdefault(reader.name, {})
        # What only shows its operand is no operator of its own, but it is asked for its reads.
        self.operators.setdefault(reader.name, operator_name(reader))
        self.results.setdefault(reader.name, dict.fromkeys(FORMATS, 0.0))
        _accumulate(of_reader.setdefault(read.name, dict.fromkeys(FORMATS, 0.0)), cost, weight)

    def _mean(self, cost: Omega) -> dict[str, float | None]:
        means = {name: max(0.0, value / self.samples) for name, value in cost.items()}
        return {n: m if m == m and m != float("inf") else None for n, m in means.items()}


def omega(value: Tensor, diagonal: Tensor) -> Omega:
    """``½ Σ h δ²`` for the rounding errors of a tensor in each format."""
    exact = value.detach()
    finite = exact.isfinite()
    found = {}
    for name, dtype in FORMATS.items():
        error = torch.where(finite, exact.to(dtype).float() - exact, 0.0)
        found[name] = float((0.5 * diagonal.double() * error.double().square()).sum())
    return found


def _accumulate(sums: Omega, cost: Omega, weight: int) -> None:
    for name, value in cost.items():
        sums[name] += weight * value
