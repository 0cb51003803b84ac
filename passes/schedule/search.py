"""Finds the order of the backward half whose gradients are reduced first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import fx

from graphopt.analysis.gradient_order import (
    GradientOrder,
    gradient_order,
    measured_order,
    parameter_gradients,
)
from graphopt.analysis.liveness import liveness
from graphopt.graph import Graph
from graphopt.grouping.planner import plan
from graphopt.network.curve import Curve
from graphopt.passes.schedule.order import Task, best_first
from graphopt.passes.schedule.rewrite import arrange, split, splittable, tail
from graphopt.plan.grouping import Grouping, Ready

# A gain below this share of the time to the last reduced gradient is within the error of the costs.
LEAST_GAIN = 0.002


@dataclass(frozen=True)
class _Found:
    """One order, built and evaluated by the same rules as the present one."""

    name: str
    split: list[str]
    order: list[str]
    grouping: Grouping
    peak: int
    moved: int

    @property
    def finish(self) -> float:
        return self.grouping.finish


@dataclass(frozen=True)
class OrderSearch:
    """Compares the present order of a graph with others.

    Attributes:
        graph: is not changed.
        now: its gradients and the times of its operators.
        curve: seconds of one message over its bytes.
        world: number of ranks.
        memory: how much peak memory may grow, as a share of it.
    """

    graph: Graph
    now: GradientOrder
    curve: Curve
    world: int
    memory: float

    def best(self) -> dict[str, Any]:
        """The decision as plain data.

        ``order`` names the operators of `tail` in their new order, after the convolutions named by
        ``split`` were split; it is empty where the graph should stay as it is, with ``reason``.
        ``groups`` are the groups of gradients that are best in the present order and in this one.
        ``numbers`` holds the predicted times, in milliseconds since backward began.
        """
        grouping = self.grouping(self.now)
        default = (c.finish for c in grouping.candidates if c.name == "ddp default")
        numbers: dict[str, Any] = {
            "ddp_ms": milliseconds(next(default, grouping.finish)),
            "grouped_ms": milliseconds(grouping.finish),
            "backward_ms": milliseconds(grouping.backward),
            "link": self.curve.source,
            "times": self.now.times,
        }
        limit = grouping.finish * (1 - LEAST_GAIN)
        found = [one for halved in (False, True) for one in self._orders(halved)]
        gaining = sorted((f for f in found if f.finish < limit), key=lambda f: f.finish)
        peak = liveness(self.graph).peak
        for one in gaining:
            if one.peak > (1 + self.memory) * peak:
                continue
            numbers |= {
                "scheduled_ms": milliseconds(one.finish),
                "peak_bytes_more": one.peak - peak,
            }
            numbers |= {"moved": one.moved, "split": len(one.split)}
            detail = f"reordered ({one.name})"
            return {
                "order": one.order,
                "split": one.split,
                "groups": [[g.names for g in made.groups] for made in (grouping, one.grouping)],
                "detail": detail,
                "numbers": numbers,
            }
        if not gaining:
            reason, detail = "no-gain", "no order found is predicted to reduce all gradients sooner"
        else:
            reason, detail = "memory", "orders that gain keep more memory alive than is allowed"
            numbers["scheduled_ms"] = milliseconds(gaining[0].finish)
        return {"order": [], "reason": reason, "detail": detail, "numbers": numbers}

    def grouping(self, order: GradientOrder) -> Grouping:
        """The best groups of these gradients."""
        return plan(order.ready, self.curve, order.backward, times=order.times, world=self.world)

    def _orders(self, halved: bool) -> list[_Found]:
        """Good orders of the graph as it is, or with all its convolutions split."""
        trial = self.graph.copy()
        halves = split(trial, splittable(trial) if halved else ())
        if halved and not halves:
            return []
        order = self._timed(trial, halves)

        def finish(ready: Sequence[Ready]) -> float:
            return plan(ready, self.curve, order.backward, world=self.world).finish

        tasks, members = tasks_of(trial, order)
        result = []
        for _, name, chosen in best_first(tasks, self.curve, finish):
            sequence = [node for index in chosen for node in members[index]]
            together = _still_together(sequence, halves, order.seconds)
            names = [node.name for node in sequence if node not in together]
            apart = [first.name for first, second in halves.items() if second not in together]
            result.append(self._made(name, apart, names))
        return result

    def _made(self, name: str, apart: list[str], names: list[str]) -> _Found:
        copy = self.graph.copy()
        was = {node.name: index for index, node in enumerate(tail(copy))}
        order = self._timed(copy, arrange(copy, apart, names))
        places = [was[one] for one in names if one in was]
        overtaken = sum(here < max(places[: i + 1]) for i, here in enumerate(places))
        grouping = self.grouping(order)
        return _Found(name, apart, names, grouping, liveness(copy).peak, overtaken)

    def _timed(self, trial: Graph, halves: Mapping[fx.Node, fx.Node]) -> GradientOrder:
        """The gradients of a rewritten copy, with times of the same kind as those of `now`."""
        if self.now.times == "roofline":
            return trial.get(gradient_order)
        known = {node.name: seconds for node, seconds in self.now.seconds.items()}
        seconds = {node: known.get(node.name, 0.0) for node in trial.operators}
        for first, second in halves.items():
            # Both halves have equally many multiplications.
            seconds[first] = seconds[second] = known[first.name] / 2
        return measured_order(trial, seconds)


def tasks_of(
    graph: Graph, order: GradientOrder
) -> tuple[tuple[Task, ...], tuple[tuple[fx.Node, ...], ...]]:
    """What of `tail` has to stay in order and what is free, as tasks with their operators.

    The first task is empty: it releases what is ready when backward begins. Then follow the
    operators that keep their order, one each, then the units that may move.
    """
    gradients = parameter_gradients(graph)
    ready = {item.name: item for item in order.ready}
    free = {node for unit in order.units for node in unit.nodes}
    fixed = [node for node in tail(graph) if node not in free]
    place = {node: index for index, node in enumerate(fixed, start=1)}
    released: dict[int, list[Ready]] = {}
    for name, node in gradients.items():
        if node not in free:
            released.setdefault(place.get(node, 0), []).append(ready[name])
    tasks = [Task(0.0, -1, tuple(released.get(0, ())))]
    for index, node in enumerate(fixed, start=1):
        seconds = order.seconds.get(node, 0.0)
        tasks.append(Task(seconds, index - 1, tuple(released.get(index, ()))))
    for unit in order.units:
        sources = (source for node in unit.nodes for source in node.all_input_nodes)
        after = max((place.get(source, 0) for source in sources), default=0)
        seconds = sum(order.seconds[node] for node in unit.nodes)
        tasks.append(Task(seconds, after, tuple(ready[name] for name in unit.names)))
    members = ((), *((node,) for node in fixed), *(unit.nodes for unit in order.units))
    return tuple(tasks), members


def _still_together(
    sequence: Sequence[fx.Node],
    halves: Mapping[fx.Node, fx.Node],
    seconds: Mapping[fx.Node, float],
) -> set[fx.Node]:
    """Second halves separated from their first by nothing but views: better left in one call."""
    timed = [node for node in sequence if seconds.get(node, 0.0) > 0]
    following = dict(pairwise(timed))
    return {second for first, second in halves.items() if following.get(first) is second}


def milliseconds(seconds: float) -> float:
    """Seconds as reports show them."""
    return round(1e3 * seconds, 4)
