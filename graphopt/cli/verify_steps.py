"""Steps of a model as it would be optimized, for `graphopt verify`."""

from __future__ import annotations

import copy

import torch

from graphopt.api import optimize
from graphopt.cli.model import Example
from graphopt.cli.verify_rows import BAD, Row
from graphopt.errors import MismatchError
from graphopt.model.surface import report
from graphopt.model.tensors import tensors_of
from graphopt.model.verification import GENERATED
from graphopt.pipeline import Pipeline

STEPS = 2
_RESULTS = {"bit-equal": "bit-equal", "within tolerance": "within its class"}


def rows(example: Example, pipeline: Pipeline, backend: str) -> list[Row]:
    """What runs, compared with eager; and forms of its backward, with each other.

    Args:
        example: the model and its call; a copy is optimized.
        pipeline: the passes.
        backend: what runs them.
    """
    if any(pass_.owns_step for pass_ in pipeline.passes):
        return []  # its steps are not calls of the model
    model = copy.deepcopy(example.model)
    inputs = (tuple(example.args), dict(example.kwargs))
    try:
        optimize(model, inputs, passes=list(pipeline.passes), backend=backend, cache="off")
        for _ in range(STEPS):
            outputs = [t for _, t in tensors_of(model(*example.args, **example.kwargs))]
            losses = [t.float().mean() for t in outputs if t.requires_grad]
            if losses and torch.is_grad_enabled():
                torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    except MismatchError as error:
        name = error.guilty or "what runs"
        return [Row(name, "", 0.0, float("inf"), error.message, BAD)]
    found = report(model)
    entry = found.specialisations[0]
    check = entry.verification
    result = _RESULTS.get(check.result, "skipped")
    name = f"backend {entry.backend.backend}"
    made = [Row(name, "", GENERATED, check.worst_error, check.worst_name, result)]
    for form in found.forms:
        if form.result in _RESULTS:
            name, result = f"part {form.part}, {form.name}", _RESULTS[form.result]
            made.append(Row(name, "", GENERATED, form.worst_error, form.worst_name, result))
    return made
