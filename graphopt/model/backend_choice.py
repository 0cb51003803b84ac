"""``backend="auto"``: time the backends on the user's own step and remember the faster one."""

from __future__ import annotations

import logging
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from graphopt.cache import JsonCache, fingerprint, is_duration
from graphopt.errors import BackendError
from graphopt.graph import Graph
from graphopt.model.bands import MARGIN, Bands
from graphopt.model.entries import BackendChoice
from graphopt.model.trial import Call, Trial
from graphopt.text import print_graph

if TYPE_CHECKING:
    from graphopt.runtime.session import Session

log = logging.getLogger("graphopt")

CACHE = JsonCache("backends")
ROUNDS = 7
SECONDS = 4.0
# What a choice may take: so many seconds, or the time of so many steps where steps are long.
BUDGET = 20.0
STEPS = 50


@dataclass(frozen=True)
class Built:
    """A graph, built by one backend: the engine, and a call of the model that runs it."""

    engine: Callable[..., Any]
    call: Call


@dataclass(frozen=True)
class Chosen:
    """The backend for a graph, and what was built with it.

    Attributes:
        choice: which one, and why.
        built: with it.
        bands: what was measured, where the choice depends on sizes of the call.
        others: what else was built, by backend, where it does.
    """

    choice: BackendChoice
    built: Built
    bands: Bands | None = None
    others: Mapping[str, Built] = field(default_factory=dict)


def choose(
    requested: str,
    make: Callable[[str], Built],
    trial: Trial,
    graph: Graph,
    band: int | None = None,
) -> Chosen:
    """The backend for this graph, and what was built with it.

    Args:
        requested: what the user asked for; ``"auto"`` measures.
        make: builds the engine and the call by backend name; may raise `BackendError`.
        trial: the user's own step.
        graph: what will run; its text is part of the key under which the choice is cached.
        band: of the sizes of the call, where sizes are symbols.
    """
    if requested != "auto":
        try:
            return Chosen(BackendChoice(requested, requested, "requested", {}), make(requested))
        except BackendError as error:
            log.warning("falling back to eager: %s", error)
            return Chosen(BackendChoice("eager", requested, error.message, {}), make("eager"))
    text = graph.get(print_graph)
    if band is None:
        return _measured(make, trial, fingerprint(text))
    # Whatever sizes were captured, the graph is the same.
    return _per_band(make, trial, fingerprint(_HINT.sub(r"\1", text)), band)


_HINT = re.compile(r"^(symbol \w+ =) \d+", re.MULTILINE)


def _per_band(make: Callable[[str], Built], trial: Trial, key: str, band: int) -> Chosen:
    bands = Bands(key)
    if band in bands.seconds and not bands.compiles:
        return Chosen(bands.choice(band), make("eager"))
    eager = make("eager")
    try:
        inductor = _in_time(make, trial, eager)
    except BackendError as error:
        return Chosen(BackendChoice("eager", "auto", error.message, {}), eager)
    built = {"eager": eager, "inductor": inductor}
    if band not in bands.seconds and not bands.full:
        bands.add(band, times(trial, {name: one.call for name, one in built.items()}))
    choice = bands.choice(band)
    others = {name: one for name, one in built.items() if name != choice.backend}
    return Chosen(choice, built[choice.backend], bands, others)


def _measured(make: Callable[[str], Built], trial: Trial, key: str) -> Chosen:
    cached = _cached(key)
    if cached is not None and cached.backend == "eager":
        return Chosen(cached, make("eager"))
    eager = make("eager")
    try:
        inductor = _in_time(make, trial, eager)
    except BackendError as error:
        return Chosen(BackendChoice("eager", "auto", error.message, {}), eager)
    if cached is not None:
        return Chosen(cached, inductor)
    seconds = times(trial, {"eager": eager.call, "inductor": inductor.call})
    ratio = seconds["inductor"] / seconds["eager"]
    faster = "inductor" if ratio < MARGIN else "eager"
    reason = f"measured on this step: inductor takes {ratio:.2f}x the time of eager"
    CACHE.write(key, {"backend": faster, "reason": reason, "seconds": seconds})
    choice = BackendChoice(faster, "auto", reason, seconds)
    return Chosen(choice, inductor if faster == "inductor" else eager)


def _in_time(make: Callable[[str], Built], trial: Trial, eager: Built) -> Built:
    """Inductor's build, where it takes no longer than a choice may.

    Raises:
        BackendError: it takes longer, or cannot be.
    """
    from graphopt.runtime.backends.deadline import within

    with trial.untouched():
        step = trial.step(eager.call)
    with within(max(BUDGET, STEPS * step)):
        return make("inductor")


def _cached(key: str) -> BackendChoice | None:
    """The choice of an earlier run; ``None`` unless all of it is what `_measured` writes."""
    match CACHE.read(key):
        case None:
            return None
        case {
            "backend": "eager" | "inductor" as backend,
            "reason": str(reason),
            "seconds": {"eager": eager, "inductor": inductor, **rest},
        } if is_duration(eager) and is_duration(inductor) and not rest:
            seconds = {"eager": eager, "inductor": inductor}
            return BackendChoice(backend, "auto", f"{reason} (kept from an earlier run)", seconds)
    CACHE.distrust(key, "it is no choice of a backend")
    return None


def times(trial: Trial, calls: Mapping[str, Call]) -> dict[str, float]:
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


def timed(
    session: Session,
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    calls: Mapping[str, Call],
) -> dict[str, float]:
    """Seconds of one call of a model in each backend."""
    return times(Trial(model, args, kwargs, session.trial), calls)
