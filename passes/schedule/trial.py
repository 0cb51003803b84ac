"""Does a predicted gain hold when all ranks run the order, with its messages?

The best of many orders by one noisy profile looks better than it is, and no profile shows what
messages take from the computation: they use the cores, caches and memory that it uses. So all ranks
run the step in both orders, in turn, and send their gradients while they do. An order is taken only
where its gain is beyond the noise of these pairs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.gradient_order import parameter_gradients
from graphopt.analysis.profile import copied, random_inputs
from graphopt.graph import Graph, value_of
from graphopt.passbase import Send, Waits

# With at most one slower pair in nine, the 96 % interval of the median ratio ends below 1: it is
# that from the second smallest to the second largest of nine, whatever their distribution.
PAIRS = 9
SLOWER_PAIRS = 1


Groups = Sequence[Sequence[str]]
Step = Callable[[], None]


def confirmed(choice: dict[str, Any], ratios: Sequence[float]) -> dict[str, Any]:
    """`choice`, or to keep the present order.

    Args:
        choice: from `OrderSearch.best`, with an order.
        ratios: what `race` found.

    Returns:
        The decision in the form of `OrderSearch.best`; its numbers hold what was measured.
    """
    ordered = sorted(ratios)
    numbers = choice["numbers"] | {
        "pairs": len(ratios),
        "measured_ratio": round(statistics.median(ratios), 4),
        "ratio_low": round(ordered[min(1, len(ratios) - 1)], 4),
        "ratio_high": round(ordered[max(-2, -len(ratios))], 4),
    }
    if len(ratios) == PAIRS and _slower(ratios) <= SLOWER_PAIRS:
        return {**choice, "numbers": numbers}
    detail = "the best order found gained no more than the noise when all ranks ran it"
    return {"order": [], "reason": "not-confirmed", "detail": detail, "numbers": numbers}


def race(present: Step, other: Step, send: Send, device: torch.device) -> list[float]:
    """Times of `other` over those of `present`, in pairs; the same numbers on all ranks.

    It ends when so many pairs were slower that no later one could help.

    Args:
        present: the step in the present order.
        other: in the other one; every rank runs both, equally often.
        send: to the other ranks.
        device: where messages lie.
    """
    ratios: list[float] = []
    for step in (present, other):
        timed(step, send, device)
    while len(ratios) < PAIRS and _slower(ratios) <= SLOWER_PAIRS:
        # Whatever drifts, hits each of them first in every second pair.
        steps = (present, other) if len(ratios) % 2 == 0 else (other, present)
        taken = {step: timed(step, send, device) for step in steps}
        ratios.append(taken[other] / taken[present])
    return ratios


def timed(step: Step, send: Send, device: torch.device) -> int:
    """Nanoseconds of a step that all ranks begin together, summed over ranks."""
    send(torch.zeros(1, device=device)).wait()
    _synchronize(device)
    start = time.perf_counter_ns()
    step()
    _synchronize(device)
    # Whole numbers, so that no rank ends the race before another.
    taken = torch.tensor([time.perf_counter_ns() - start], device=device)
    send(taken).wait()
    return int(taken)


def step_of(graph: Graph, groups: Groups, send: Send) -> Step:
    """Runs `graph` on random inputs and sends the groups of its gradients as they are ready."""
    inputs = random_inputs(graph)

    def step() -> None:
        with torch.random.fork_rng(), torch.no_grad():
            _Sending(graph, groups, send).run(*copied(inputs))

    return step


def device_of(graph: Graph) -> torch.device:
    """Where gradients lie."""
    gradient: Tensor = value_of(next(iter(parameter_gradients(graph).values())))
    return gradient.device


class _Sending(fx.Interpreter):
    """Runs a graph without collectives, and does what they would do."""

    def __init__(self, graph: Graph, groups: Groups, send: Send) -> None:
        super().__init__(graph.module)
        self._send = send
        self._due: dict[fx.Node, list[list[fx.Node]]] = {}
        self._on_their_way: list[Waits] = []
        gradients = parameter_gradients(graph)
        position = {node: i for i, node in enumerate(graph.nodes)}
        last = graph.nodes[0]
        for names in groups:
            group = [gradients[name] for name in names]
            # In the order of the groups, as in the graph that will run.
            last = max(last, *group, key=position.__getitem__)
            self._due.setdefault(last, []).append(group)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        result = super().run(*args, **kwargs)
        for message in self._on_their_way:
            message.wait()
        return result

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.env[n] = result
        for group in self._due.get(n, ()):
            flat = [self.env[node].reshape(-1) for node in group]
            message = torch.cat(flat) if len(flat) > 1 else flat[0]
            self._on_their_way.append(self._send(message))
        return result


def _slower(ratios: Sequence[float]) -> int:
    return sum(ratio >= 1 for ratio in ratios)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
