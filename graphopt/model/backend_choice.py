"""``backend="auto"``: measure the backends on the user's own step and keep the verdict."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import BackendError
from graphopt.graph import Graph
from graphopt.model.entries import BackendChoice
from graphopt.model.trial import Call, Trial
from graphopt.text import print_graph

log = logging.getLogger("graphopt")

# A backend that compiles must win by this much; below it, the difference is noise.
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
        requested: what the user asked for; ``"auto"`` runs the duel.
        make: builds the engine and the call by backend name; may raise `BackendError`.
        trial: the user's own step.
        graph: what will run; its text is part of the fingerprint under which verdicts are kept.
    """
    if requested == "eager":
        return BackendChoice("eager", requested, "requested", {}), make("eager")
    if requested == "inductor":
        try:
            return BackendChoice("inductor", requested, "requested", {}), make("inductor")
        except BackendError as error:
            log.warning("falling back to eager: %s", error)
            return BackendChoice("eager", requested, error.message, {}), make("eager")
    return _duel(make, trial, graph)


def _duel(make: Callable[[str], Built], trial: Trial, graph: Graph) -> tuple[BackendChoice, Built]:
    verdicts = _Verdicts()
    key = _fingerprint(graph)
    kept = verdicts.get(key)
    if kept is not None and kept.backend == "eager":
        return kept, make("eager")
    eager = make("eager")
    try:
        inductor = make("inductor")
    except BackendError as error:
        return BackendChoice("eager", "auto", error.message, {}), eager
    if kept is not None:
        return kept, inductor
    seconds = _measure(trial, {"eager": eager.call, "inductor": inductor.call})
    ratio = seconds["inductor"] / seconds["eager"]
    winner = "inductor" if ratio < MARGIN else "eager"
    reason = f"measured on this step: inductor takes {ratio:.2f}x the time of eager"
    choice = BackendChoice(winner, "auto", reason, seconds)
    verdicts.put(key, choice)
    return choice, inductor if winner == "inductor" else eager


def _measure(trial: Trial, calls: dict[str, Call]) -> dict[str, float]:
    """Median seconds per step, alternating, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with trial.untouched():
        for call in calls.values():
            trial.step(call)
        start = time.perf_counter()
        for _ in range(ROUNDS):
            for name, call in calls.items():
                _synchronize(trial)
                begin = time.perf_counter()
                trial.step(call)
                _synchronize(trial)
                times[name].append(time.perf_counter() - begin)
            if time.perf_counter() - start > SECONDS:
                break
    return {name: statistics.median(values) for name, values in times.items()}


def _synchronize(trial: Trial) -> None:
    for device in trial.devices:
        torch.cuda.synchronize(device)


def _fingerprint(graph: Graph) -> str:
    """Same graph, same torch, same machine: same verdict."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    machine = f"{torch.__version__} {device} {torch.get_num_threads()} {os.cpu_count()}"
    return hashlib.sha256(f"{machine}\n{print_graph(graph)}".encode()).hexdigest()[:24]


class _Verdicts:
    """Verdicts of earlier duels, one small JSON file each in the user's cache folder."""

    def __init__(self) -> None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.folder = Path(cache) / "graphopt" / "duels"

    def get(self, key: str) -> BackendChoice | None:
        try:
            data = json.loads((self.folder / f"{key}.json").read_text())
            reason = f"{data['reason']} (kept from an earlier run)"
            return BackendChoice(data["backend"], "auto", reason, data["seconds"])
        except (OSError, ValueError, KeyError):
            return None

    def put(self, key: str, choice: BackendChoice) -> None:
        text = json.dumps(
            {"backend": choice.backend, "reason": choice.reason, "seconds": dict(choice.seconds)}
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f"{key}.{os.getpid()}.tmp"
            partial.write_text(text)
            partial.replace(self.folder / f"{key}.json")
        except OSError as error:  # a read-only home costs the next process a duel, nothing else
            log.info("the verdict could not be kept: %s", error)
