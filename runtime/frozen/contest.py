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
NOISE = 0.02  # by how much one has to be faster than the first to be chosen
MAKING = 120.0
"""Seconds after which no further executable is made."""

Make = Callable[[], Executable | None]


class Contest:
    """Runs the fastest of several executables of the same graph.

    They are made one after another, until that has taken `MAKING` seconds, and timed in turn at the
    first call, on its arguments. What was found is kept in the user's cache folder, so that a later
    process makes the winner only.

    Args:
        makers: of each executable, by name, the most trusted first; one that gives ``None`` is out.
        graph: that they run. Where it draws numbers or has operators that are not known to leave
            no trace, it is not run for a measurement.
        name: of the kind of executables, a part of the key.
        unmeasured: the executable for a graph that is not measured, where it can be made.
    """

    def __init__(
        self, makers: Mapping[str, Make], graph: fx.Graph, name: str, unmeasured: str
    ) -> None:
        self.chosen: Executable | None = None
        self.choice = ""
        self.seconds: Mapping[str, float] = {}  # of each, where they were measured in this process
        self._key = fingerprint(name, *makers, describe(graph))
        first = next(iter(makers))
        kept = _kept(self._key, makers)
        if not _is_repeatable(graph):
            self._made = _first_made(makers, [unmeasured, first])
        elif kept is not None:
            self._made = _first_made(makers, [kept, first])
        else:
            self._made = _made(makers)
        if len(self._made) == 1:
            self._take(next(iter(self._made)))

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
        first = next(iter(medians))
        if medians[first] <= medians[best] * (1 + NOISE):
            best = first
        log.info("inference runs %r: %s", best, medians)
        CACHE.write(self._key, {"chosen": best, "seconds": medians})
        self.seconds = medians
        self._take(best)

    def _take(self, name: str) -> None:
        self.choice, self.chosen = name, self._made[name]
        self._made = {}


def _made(makers: Mapping[str, Make]) -> dict[str, Executable]:
    made: dict[str, Executable] = {}
    start = time.perf_counter()
    for name, make in makers.items():
        if made and time.perf_counter() - start > MAKING:
            log.info("inference without %r: making the others took long", name)
            break
        run = make()
        if run is not None:
            made[name] = run
    return made


def _first_made(makers: Mapping[str, Make], names: Sequence[str]) -> dict[str, Executable]:
    """The first of these that can be made: what was kept may not be any more."""
    made = ((name, makers[name]()) for name in names)
    return next({name: run} for name, run in made if run is not None)


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
        node.target is operator.getitem or _is_pure(node)
        for node in graph.nodes
        if node.op == "call_function"
    )


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, OpOverload):  # arithmetic of sizes
        return getattr(target, "__module__", None) in ("_operator", "math")
    known = target.namespace in ("aten", "prims", "graphopt", "mkldnn", "mkl")
    return known and not target._schema.is_mutable and not _draws(node, target)


def _draws(node: fx.Node, target: OpOverload) -> bool:
    """Whether an operator draws numbers: attention does not where it drops nothing."""
    if Tag.nondeterministic_seeded not in target.tags:
        return False
    for index, argument in enumerate(target._schema.arguments):
        if argument.name == "dropout_p":
            default = node.kwargs.get(argument.name, argument.default_value)
            return bool((node.args[index] if index < len(node.args) else default) != 0)
    return True
