"""Which orders of passes their declared facts allow, and what to say about the others."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt import registry
from graphopt.errors import PipelineError, PluginError
from graphopt.passbase import Pass
from graphopt.pipeline.spec import format_spec

# What capture provides.
CAPTURED = frozenset({"captured"})


def check_order(passes: Sequence[Pass]) -> None:
    """Check that each pass finds the facts it needs and none that it conflicts with.

    Raises:
        PipelineError: one does not; names both passes and an order that works.
    """
    facts = CAPTURED
    for index, pass_ in enumerate(passes):
        if pass_.on_forward and index and not passes[index - 1].on_forward:
            raise _too_late(passes, index)
        if missing := pass_.requires - facts:
            raise _needs(passes, index, min(missing))
        if present := pass_.conflicts & facts:
            raise _conflicts(passes, index, min(present))
        facts |= pass_.provides


def _too_late(passes: Sequence[Pass], index: int) -> PipelineError:
    before = passes[index - 1].name
    return PipelineError(
        f"pass {passes[index].name!r} rewrites the forward graph, so it must run before "
        f"{before!r}, which works on what is derived from it",
        hint=_order_that_works(passes),
    )


def _needs(passes: Sequence[Pass], index: int, fact: str) -> PipelineError:
    name = passes[index].name
    later = next((p.name for p in passes[index + 1 :] if fact in p.provides), None)
    if later is not None:
        return PipelineError(
            f"pass {name!r} needs {fact!r}, which {later!r} provides only after it",
            hint=_order_that_works(passes),
        )
    providers = _providers(fact)
    if not providers:
        return PipelineError(f"pass {name!r} needs {fact!r}, which no pass provides")
    which = " or ".join(map(repr, providers))
    return PipelineError(
        f"pass {name!r} needs {fact!r}, which {which} provides, but that is not in the pipeline",
        hint=f"put {which} before it: {providers[0]},{format_spec(passes)}",
    )


def _conflicts(passes: Sequence[Pass], index: int, fact: str) -> PipelineError:
    earlier = next((p.name for p in passes[:index] if fact in p.provides), "capture")
    return PipelineError(
        f"pass {passes[index].name!r} must run before {earlier!r}, "
        f"because the graph must not be {fact!r} yet when it runs",
        hint=_order_that_works(passes),
    )


def _providers(fact: str) -> list[str]:
    """All known passes that provide a fact."""
    found = []
    for name in registry.names():
        try:
            provides = registry.get(name).provides
        except PluginError:
            continue  # A broken plugin cannot help here; asking for it by name says what is wrong.
        if fact in provides:
            found.append(name)
    return found


def _order_that_works(passes: Sequence[Pass]) -> str:
    """The spec in an order that is as near to the given one as facts allow."""
    waiting, order, facts = list(passes), list[Pass](), CAPTURED
    while waiting:
        able = (p for p in waiting if _may_run(p, [q for q in waiting if q is not p], facts))
        chosen = next(able, None)
        if chosen is None:
            return "leave one of them out, no order of these passes works"
        waiting.remove(chosen)
        order.append(chosen)
        facts |= chosen.provides
    return f"this order works: {format_spec(order)}"


def _may_run(pass_: Pass, others: Sequence[Pass], facts: frozenset[str]) -> bool:
    return (
        (pass_.on_forward or not any(other.on_forward for other in others))
        and pass_.requires <= facts
        and not pass_.conflicts & facts
        and not any(other.conflicts & pass_.provides for other in others)
    )
