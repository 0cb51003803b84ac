"""The fastest of several executables of one graph, found out at its first call."""

from __future__ import annotations

import logging
import operator
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tag, fx
from torch._ops import OpOverload

from graphopt.cache import JsonCache, fingerprint, is_duration
from graphopt.runtime.engine.step import Executable

log = logging.getLogger("graphopt")

CACHE = JsonCache("inference")
ROUNDS = 9
SECONDS = 1.5

Make = Callable[[], Executable | None]


class Contest:
    """Runs the fastest of several executables of the same graph.

    All are made at once, and timed in turn at the first call, on its arguments. What was found is
    kept in the user's cache folder, so that a later process makes the winner only.

    Args:
        makers: of each executable, by name, the most trusted first; one that gives ``None`` is out.
        graph: that they run. Where it draws numbers or has operators that are not known to leave
            no trace, it is not run for a measurement, and the last one is taken.
        name: of the kind of executables, a part of the key.
    """

    def __init__(self, makers: Mapping[str, Make], graph: fx.Graph, name: str) -> None:
        self.chosen: Executable | None = None
        self.choice = ""
        self._key = fingerprint(name, *makers, describe(graph))
        kept = _kept(self._key, makers)
        wanted = [kept] if kept is not None else list(makers)
        made = {name: makers[name]() for name in wanted}
        self._made = {name: run for name, run in made.items() if run is not None}
        if not self._made:  # what was kept cannot be made any more
            first = next(iter(makers))
            run = makers[first]()
            assert run is not None
            self._made = {first: run}
        if len(self._made) == 1 or not _is_repeatable(graph):
            self._take(list(self._made)[-1])

    def __call__(self, arguments: list[Any]) -> Sequence[Any]:
        """Outputs for these arguments; empties the list."""
        if self.chosen is None:
            self._measure(arguments)
        assert self.chosen is not None
        return self.chosen(arguments)

    def _measure(self, arguments: Sequence[Any]) -> None:
        seconds: dict[str, list[float]] = {name: [] for name in self._made}
        for run in self._made.values():
            run(list(arguments))
        start = time.perf_counter()
        for _ in range(ROUNDS):
            for name, run in self._made.items():
                begin = time.perf_counter()
                run(list(arguments))
                seconds[name].append(time.perf_counter() - begin)
            if time.perf_counter() - start > SECONDS and len(seconds[name]) > 2:
                break
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        best = min(medians, key=medians.__getitem__)
        log.info("inference runs %r: %s", best, medians)
        CACHE.write(self._key, {"chosen": best, "seconds": medians})
        self._take(best)

    def _take(self, name: str) -> None:
        self.choice, self.chosen = name, self._made[name]
        self._made = {}


def _kept(key: str, names: Mapping[str, Make]) -> str | None:
    match CACHE.read(key):
        case {"chosen": str(chosen), "seconds": dict(seconds), **rest} if not rest:
            if chosen in names and chosen in seconds and all(map(is_duration, seconds.values())):
                return chosen
    return None


def describe(graph: fx.Graph) -> str:
    """A graph with the sizes of its inputs, as text."""
    inputs = [
        f"{node.name} {getattr(value, 'dtype', None)} {tuple(getattr(value, 'shape', ()))} "
        f"{value.stride() if hasattr(value, 'stride') else value}"
        for node in graph.find_nodes(op="placeholder")
        if (value := node.meta.get("val")) is not None
    ]
    return "\n".join([*inputs, str(graph)])


def _is_repeatable(graph: fx.Graph) -> bool:
    return all(
        node.target is operator.getitem or _is_pure(node.target)
        for node in graph.nodes
        if node.op == "call_function"
    )


def _is_pure(target: object) -> bool:
    if not isinstance(target, OpOverload):  # arithmetic of sizes
        return getattr(target, "__module__", None) in ("_operator", "math")
    known = target.namespace in ("aten", "prims", "graphopt", "mkldnn", "mkl")
    is_random = Tag.nondeterministic_seeded in target.tags
    return known and not is_random and not target._schema.is_mutable
