"""Models of the corpus in formats that are emulated: right but for rounding, and they train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graphopt
from graphopt.capture import capture
from graphopt.passbase import PassContext
from graphopt.pipeline import Pipeline
from graphopt.testing import inputs_for, relative_error
from graphopt.testing.corpus import CORPUS
from graphopt.testing.oracles import run_graph_fp64
from tests.precision.test_corpus import made

pytestmark = pytest.mark.corpus

SPECS = {
    "flex16": "cleanup,precision{format=flex16}",
    "mxfp8": "cleanup,precision{format=mxfp8}",
    "float8": "cleanup,precision{format=float8}",
    "float8 row": "cleanup,precision{format=float8,granularity=row}",
}


# Small ones of every kind. oneDNN's recurrent layers do not run in float64, which is needed here.
SMALL = ["resnet", "vit", "tied_language_model", "used_twice", "checkpointed", "in_place", "gpt2"]
SMALL += ["custom_function", "branching", "partly_frozen"]


def test_without_their_rounding_the_graphs_are_what_they_were() -> None:
    lowered = 0
    for name in SMALL:
        model, args, kwargs = made(CORPUS[name])
        graph = capture(model, args, kwargs).graph
        own: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        slots = zip(graph.signature.inputs, inputs_for(graph), strict=True)
        inputs = [own.get(slot.name, value).detach() for slot, value in slots]
        wanted = run_graph_fp64(graph, inputs)
        for spec in (SPECS["mxfp8"], SPECS["float8"]):
            after = graph.copy()
            steps = Pipeline.parse(spec).run(after, PassContext())
            lowered += any("runs in" in a.what for step in steps for a in step.outcome.applied)
            results = zip(wanted, run_graph_fp64(after, inputs), strict=True)
            assert max(relative_error(*pair) for pair in results) <= 1e-6, (name, spec)
    assert lowered == 2 * len(SMALL)


def _losses(name: str, spec: str = "") -> list[float]:
    """Of plain PyTorch without a spec."""
    entry = CORPUS[name]
    model, args, kwargs = made(entry)
    if spec:
        graphopt.optimize(model, passes=spec, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss: Any = entry.loss(model(*args, **kwargs))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("resnet", ("mxfp8", "float8")),
        ("vit", ("flex16", "float8 row")),
        ("lstm_ctc", ("flex16", "float8", "float8 row")),
        ("embedding_bag", ("mxfp8", "float8 row")),
    ],
)
def test_training_goes_as_in_float32(name: str, formats: tuple[str, ...]) -> None:
    """Each format with a network of convolutions or attention and with a small one.

    Verified on their first batch, too.
    """
    start, *_, wide = _losses(name)
    assert wide < start
    for format in formats:
        share = 0.01 if format == "flex16" else 0.1
        *_, low = _losses(name, SPECS[format])
        assert abs(low - wide) <= share * max(start - wide, 0.1 * start), format
