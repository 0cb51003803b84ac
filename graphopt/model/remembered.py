"""What an earlier process has compared with eager, so that it is not done again."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphopt.cache import JsonCache, fingerprint
from graphopt.capture.kept.fingerprints import Fingerprints
from graphopt.capture.kept.key import sources
from graphopt.graph import Graph
from graphopt.model.entries import Verification
from graphopt.pipeline import Pipeline
from graphopt.plan import Plan
from graphopt.text import print_graph


@dataclass(frozen=True)
class Known:
    """What an earlier process has verified.

    Attributes:
        key: of what is verified; empty where nothing is remembered.
        verification: that one; ``None`` where there was none.
        ran: fingerprint of what ran: the graph, its plan and the backend.
    """

    key: str = ""
    verification: Verification | None = None
    ran: str = ""

    def other(self, ran: str) -> bool:
        """Whether it was something else that was verified."""
        return self.verification is not None and self.ran != ran


CACHE = JsonCache("verified")
_RESULTS = ("bit-equal", "within tolerance")


def key_of(digest: str, pipeline: Pipeline, level: str, backend: str, place: str = "") -> str:
    """Of a kept capture under these passes; empty where there is none.

    Args:
        digest: of the capture.
        pipeline: the passes with their options; their code counts.
        level: of verification.
        backend: that was asked for.
        place: which rank of how many, in a job; each has batches of its own.
    """
    if not digest:
        return ""
    code = [Fingerprints().kind(pass_) for pass_ in pipeline.passes]
    devices = str(torch.backends.mkldnn.enabled)
    return fingerprint(digest, str(pipeline), *code, level, backend, place, sources(), devices)


def known(key: str) -> Known:
    """What is remembered under a key."""
    match CACHE.read(key) if key else None:
        case {
            "level": str(level),
            "result": str(result),
            "worst_name": str(name),
            "worst_error": float(error),
            "declined": list(declined),
            "ran": str(ran),
        } if result in _RESULTS and all(isinstance(d, str) for d in declined):
            found = Verification(level, result, name, error, 0.0, tuple(declined), earlier=True)
            return Known(key, found, ran)
    return Known(key)


def ran(graph: Graph, plan: Plan) -> str:
    """A fingerprint of what runs."""
    return fingerprint(graph.get(print_graph), plan.digest, plan.backend)


def remember(key: str, found: Verification, ran: str) -> None:
    """Keep a verification that has found nothing wrong."""
    if key and found.result in _RESULTS:
        CACHE.write(
            key,
            {
                "level": found.level,
                "result": found.result,
                "worst_name": found.worst_name,
                "worst_error": found.worst_error,
                "declined": list(found.declined),
                "ran": ran,
            },
        )
