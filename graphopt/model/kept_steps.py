"""Steps that an earlier process has made of a kept capture: plan, report and code.

What stands behind the passes follows from the capture, the passes with their options and code, the
backend and graphopt itself, if no pass looks at anything else. Then a later process takes it over
and makes no graph. It is JSON, read like any input.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphopt import registry
from graphopt.analysis.parameter_roles import ParameterRole
from graphopt.cache import fingerprint
from graphopt.capture.kept import Store
from graphopt.capture.plainly import has_checks
from graphopt.errors import BackendError
from graphopt.graph import Graph
from graphopt.model import remembered
from graphopt.model.entries import BackendChoice, Verification
from graphopt.model.remembered import Known
from graphopt.passbase import Applied, Declined, Numerics, Outcome, Row
from graphopt.pipeline import Pipeline
from graphopt.pipeline.step import PassStep
from graphopt.plan import Plan, Role
from graphopt.plan.part import from_data, to_data

if TYPE_CHECKING:
    from graphopt.runtime.session import Session

log = logging.getLogger("graphopt")

STORE = Store("steps")


Told = Callable[[], dict[str, Any]] | None


def told_of(engine: object) -> Told:
    """What the backend tells of an engine, taken off it: it holds graphs that no step needs."""
    told: Told = getattr(engine, "__dict__", {}).pop("data", None)
    return told


@dataclass(frozen=True)
class KeptStep:
    """What an earlier process has made of a graph, ready to run.

    Attributes:
        level: of the graph.
        plan: what the engine obeys.
        engine: runs it.
        steps: what the passes did.
        backend: what was chosen, and why.
        verification: how it compared with eager.
        features: see `graphopt.model.features`.
        roles: what each parameter is, by name.
    """

    level: str
    plan: Plan
    engine: Callable[..., Any]
    steps: tuple[PassStep, ...]
    backend: BackendChoice
    verification: Verification
    features: tuple[int, ...]
    roles: Mapping[str, ParameterRole]


@dataclass(frozen=True)
class Steps:
    """Those of one way to make them.

    Attributes:
        pipeline: the passes.
        mesh: sizes of the parallel dimensions.
        backend: that was asked for.
        verify: what is compared with eager.
        session: of the model.
    """

    pipeline: Pipeline
    mesh: Mapping[str, int]
    backend: str
    verify: str
    session: Session

    @classmethod
    def of(
        cls,
        pipeline: Pipeline,
        mesh: Mapping[str, int],
        backend: str,
        verify: str,
        session: Session,
    ) -> Steps | None:
        """Where steps can be kept at all: no ranks, and no pass that looks beyond its graph."""
        lasting = all(pass_.lasting for pass_ in pipeline.passes)
        if session.ranks or not lasting:
            return None
        return cls(pipeline, mesh, backend, verify, session)

    def key(self, digest: str) -> str:
        """That of what is made of one capture."""
        behind = remembered.key_of(digest, self.pipeline, self.verify, self.backend)
        return fingerprint("step", behind, str(sorted(self.mesh.items())))

    def found(self, digest: str) -> KeptStep | None:
        """What an earlier process has made of a capture, by its digest."""
        key = self.key(digest)
        kept = STORE.read(key)
        if kept is None:
            return None
        from graphopt.runtime.backends.kept_words import Misfit

        known = remembered.known(
            remembered.key_of(digest, self.pipeline, self.verify, self.backend)
        )
        try:
            return _read(kept.entry, known, self.verify, self.session)
        except (BackendError, Misfit) as error:
            log.info("a kept step is not taken: %s", error)
            return None
        except Exception as error:  # what was edited by hand fails anywhere
            STORE.damaged(key, f"{type(error).__name__}: {error}")
            return None

    def keep(self, digest: str, graph: Graph, made: KeptStep, told: Told, ran: str) -> None:
        """Keep what was made of a capture, if it can be told.

        Args:
            digest: of the capture.
            graph: behind the passes.
            made: of it.
            told: what the backend tells of the engine.
            ran: fingerprint of what was verified.
        """
        if told is None or made.plan.parts or has_checks(graph.fx):
            return
        if not made.backend.is_first_choice:
            return
        from graphopt.runtime.backends.kept_words import Untold

        try:
            entry = _written(made, ran, told())
        except (Untold, ValueError) as error:
            log.info("the step is not kept: %s", error)
            return
        STORE.write(self.key(digest), entry)


def _written(made: KeptStep, ran: str, engine: Any) -> dict[str, Any]:
    return {
        "level": made.level,
        "plan": made.plan.to_json(),
        "engine": engine,
        "steps": [_step_data(step) for step in made.steps],
        "backend": to_data(made.backend),
        "ran": ran,
        "features": list(made.features),
        "roles": [to_data(role) for role in made.roles.values()],
    }


def _step_data(step: PassStep) -> dict[str, Any]:
    outcome = step.outcome
    if outcome.part is not None or outcome.parametrized:
        raise ValueError(f"{step.spec} has decided something for the runtime")
    return {
        "spec": step.spec,
        "numerics": [step.numerics.kind, step.numerics.bound],
        "applied": to_data(outcome.applied),
        "declined": to_data(outcome.declined),
        "tables": to_data(outcome.tables),
        "nodes": [step.nodes_before, step.nodes_after],
        "skipped": step.skipped,
    }


def _step(data: Any) -> PassStep:
    kind, bound = from_data(tuple[str, float], data["numerics"])
    outcome = Outcome(
        from_data(tuple[Applied, ...], data["applied"]),
        from_data(tuple[Declined, ...], data["declined"]),
        tables=from_data(dict[str, tuple[Row, ...]], data["tables"]),
    )
    before, after = from_data(tuple[int, int], data["nodes"])
    spec, skipped = from_data(tuple[str, str], (data["spec"], data["skipped"]))
    numerics = Numerics(kind, bound)
    return PassStep(spec, numerics, outcome, 0.0, 0.0, before, after, skipped, earlier=True)


def _read(data: Any, known: Known, verify: str, session: Session) -> KeptStep | None:
    """The step, if what it says was verified is what was."""
    plan = Plan.from_json(data["plan"])
    backend = from_data(BackendChoice, data["backend"])
    if plan.parts or plan.signature.names(Role.STATE) or plan.backend != backend.backend:
        raise ValueError("its plan is not one of a kept step")
    verification = known.verification or Verification(verify, "not run")
    if verify in ("eager", "full") and (known.verification is None or known.other(data["ran"])):
        return None
    made: Any = registry.get(plan.backend, registry.BACKENDS)()
    roles = {role.name: role for role in from_data(tuple[ParameterRole, ...], data["roles"])}
    return KeptStep(
        from_data(str, data["level"]),
        plan,
        made.kept(data["engine"], plan, session),
        tuple(map(_step, data["steps"])),
        backend,
        verification,
        _features(data["features"], plan),
        roles,
    )


def _features(data: Any, plan: Plan) -> tuple[int, ...]:
    outputs = {int(name) for name in plan.signature.names(Role.OUTPUT)}
    found = from_data(tuple[int, ...], data)
    if not outputs.issuperset(found):
        raise ValueError("it has no such outputs")
    return found
