"""``backend="auto"``: time the backends on the user's own step and remember the faster one."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graphopt.cache import JsonCache, fingerprint, is_duration
from graphopt.errors import BackendError
from graphopt.graph import Graph
from graphopt.model.entries import BackendChoice
from graphopt.model.trial import Call, Trial
from graphopt.text import print_graph

log = logging.getLogger("graphopt")

CACHE = JsonCache("backends")
# A compiling backend has to win by this much; anything less is noise.
MARGIN = 0.98
ROUNDS = 7
SECONDS = 4.0


@dataclass(frozen=True)
class Built:
    """A graph, built by one backend: the engine, and a call of the model that runs it."""

    engine: Callable[..., Any]
    call: Call


def choose(
    requested: str, make: Callable[[str], Built], trial: Trial, graph: Graph
) -> tuple[BackendChoice, Built]:
    """The backend for this graph, and what was built with it.

    Args:
        requested: what the user asked for; ``"auto"`` measures.
        make: builds the engine and the call by backend name; may raise `BackendError`.
        trial: the user's own step.
        graph: what will run; its text is part of the key under which the choice is cached.
    """
    if requested != "auto":
        try:
            return BackendChoice(requested, requested, "requested", {}), make(requested)
        except BackendError as error:
            log.warning("falling back to eager: %s", error)
            return BackendChoice("eager", requested, error.message, {}), make("eager")
    return _measured(make, trial, graph)


def _measured(
    make: Callable[[str], Built], trial: Trial, graph: Graph
) -> tuple[BackendChoice, Built]:
    key = fingerprint(print_graph(graph))
    cached = _cached(key)
    if cached is not None and cached.backend == "eager":
        return cached, make("eager")
    eager = make("eager")
    try:
        inductor = make("inductor")
    except BackendError as error:
        return BackendChoice("eager", "auto", error.message, {}), eager
    if cached is not None:
        return cached, inductor
    seconds = _time(trial, {"eager": eager.call, "inductor": inductor.call})
    ratio = seconds["inductor"] / seconds["eager"]
    faster = "inductor" if ratio < MARGIN else "eager"
    reason = f"measured on this step: inductor takes {ratio:.2f}x the time of eager"
    CACHE.write(key, {"backend": faster, "reason": reason, "seconds": seconds})
    choice = BackendChoice(faster, "auto", reason, seconds)
    return choice, inductor if faster == "inductor" else eager


def _cached(key: str) -> BackendChoice | None:
    """The choice of an earlier run; ``None`` unless all of it is what `_measured` writes."""
    match CACHE.read(key):
        case {
            "backend": "eager" | "inductor" as backend,
            "reason": str(reason),
            "seconds": {"eager": eager, "inductor": inductor, **rest},
        } if is_duration(eager) and is_duration(inductor) and not rest:
            seconds = {"eager": eager, "inductor": inductor}
            return BackendChoice(backend, "auto", f"{reason} (kept from an earlier run)", seconds)
    return None


def _time(trial: Trial, calls: dict[str, Call]) -> dict[str, float]:
    """Median seconds per step, alternating, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with trial.untouched():
        for call in calls.values():
            trial.step(call)
        start = time.perf_counter()
        for _ in range(ROUNDS):
            for name, call in calls.items():
                times[name].append(trial.step(call))
            if time.perf_counter() - start > SECONDS:
                break
    return {name: statistics.median(values) for name, values in times.items()}
