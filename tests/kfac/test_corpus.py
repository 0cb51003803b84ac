"""K-FAC on captured models of the corpus: what is preconditioned, and what is not."""

from __future__ import annotations

import pytest

from graphopt.passbase import PassContext
from graphopt.passes.kfac import Kfac
from graphopt.plan import Role
from graphopt.verify import verify
from tests.support.captures import captured

pytestmark = pytest.mark.corpus

# Parameters that are left alone, and a word of the reason.
LEFT = {
    "gru_classifier": (8, "dropout between its layers"),
    "embedding_bag": (1, "_embedding_bag_backward"),
    "parametrised": (3, "_weight_norm_interface_backward"),
}


@pytest.mark.parametrize(
    "name",
    [
        "resnet",
        "unet",
        "transformer_encoder",
        "tied_language_model",
        "lstm_ctc",
        "used_twice",
        "checkpointed",
        "in_place",
        "autocast",
        "custom_function",
        "bert",
        "llama",
        *LEFT,
    ],
)
def test_every_parameter_is_preconditioned_or_listed(name: str) -> None:
    graph, _ = captured(name)
    parameters = set(graph.signature.names(Role.PARAM)) & set(graph.signature.names(Role.GRAD))
    outcome = Kfac().apply(graph, PassContext())
    verify(graph, full=True)
    assert {item.site for item in (*outcome.applied, *outcome.declined)} == parameters
    count, reason = LEFT.get(name, (0, ""))
    assert len(outcome.declined) == count
    assert not count or any(reason in item.detail for item in outcome.declined)
