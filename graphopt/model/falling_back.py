"""What may run where something is found to compute something else than eager."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from graphopt.errors import GraphoptError, MismatchError
from graphopt.passbase import Pass
from graphopt.pipeline import Pipeline


def without(
    guilty: str, pipeline: Pipeline, backend: str, model: nn.Module, *, job: bool
) -> tuple[Pipeline, str] | None:
    """Passes and backend without the guilty one.

    Args:
        guilty: see `MismatchError`.
        pipeline: the passes so far.
        backend: so far.
        model: the model.
        job: whether gradients have to be reduced over ranks.

    Returns:
        ``None`` where nothing is left that trains the same model: the capture is wrong, the pass
        reduces gradients, runs whole steps or has replaced parameters.
    """
    kind, _, name = guilty.partition(" ")
    if kind == "backend" and name != "eager":
        return pipeline, "eager"
    places = [i for i, pass_ in enumerate(pipeline.passes) if pass_.name == name]
    if kind != "pass" or not places:
        return None
    others = tuple(p for p in pipeline.passes if p.name != name)
    for passes in (others, pipeline.passes[: places[0]]):
        gone = [p for p in pipeline.passes if p not in passes]
        if any(_is_needed(p, model, job=job) for p in gone):
            continue
        try:
            return replace(pipeline, passes=passes), backend
        except GraphoptError:  # others rely on what the guilty one does
            continue
    return None


def _is_needed(pass_: Pass, model: nn.Module, *, job: bool) -> bool:
    kept = pass_.owns_step or pass_.on_forward or pass_.wants_parameters(model)
    return bool(kept or (job and pass_.reduces))


def words(guilty: str) -> str:
    """What runs instead."""
    kind, _, name = guilty.partition(" ")
    if kind == "pass":
        return f"the graph without pass {name!r} runs from now on"
    return f"backend 'eager' runs from now on, in place of {name!r}"


def sentence(guilty: str, error: MismatchError) -> str:
    """What the user is warned of."""
    return f"{words(guilty)} (on_mismatch='warn'): {error}"
