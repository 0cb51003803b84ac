"""Roles of parameters against those that a person gives them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.analysis.matrix_view import MatrixView
from graphopt.analysis.parameter_roles import ParameterRole, find_roles
from graphopt.capture import capture
from graphopt.testing import CORPUS
from tests.analysis import role_models as models
from tests.support.captures import captured


def roles_in(model: nn.Module, *args: Any) -> dict[str, ParameterRole]:
    return find_roles(capture(model, args).graph)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 9, shape)


@pytest.mark.parametrize(
    ("kind", "batch"),
    [
        (models.Functional, torch.randn(4, 6)),
        (models.Rms, torch.randn(2, 3, 8)),
        (models.ConvNet, torch.randn(2, 3, 9, 9)),
        (models.Gpt, tokens(2, 6)),
        (models.Recurrent, tokens(5, 3)),
        (models.Shared, torch.randn(4, 6)),
        (models.LearnedInputs, torch.randn(4, 6)),
    ],
)
def test_roles_are_those_written_beside_the_model(kind: Any, batch: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = kind()
    found = {name: role.role for name, role in roles_in(model, batch).items()}
    named = {name for name, _ in model.named_parameters()}
    assert {n: found.get(n, models.U) for n in named} == kind.roles


def test_shapes_of_matrices() -> None:
    conv = roles_in(models.ConvNet(), torch.randn(2, 3, 9, 9))
    views = {name: role.matrix for name, role in conv.items() if role.matrix}
    assert views == {
        "first.weight": MatrixView(1, 8, 27),
        "grouped.weight": MatrixView(2, 4, 36),
        "depth.weight": MatrixView(8, 1, 9),
        "up.weight": MatrixView(2, 3, 16, "in_out_kernel"),
        "line.weight": MatrixView(1, 4, 18),
        "head.weight": MatrixView(1, 2, 4),
    }
    shared = roles_in(models.Shared(), torch.randn(4, 6))
    assert shared["experts"].matrix == MatrixView(3, 4, 6, "in_out")
    assert shared["mix.weight"].matrix == MatrixView(1, 6, 6)
    functional = roles_in(models.Functional(), torch.randn(4, 6))
    assert functional["a"].matrix == MatrixView(1, 8, 6)
    assert functional["e"].matrix == MatrixView(1, 8, 8, "in_out")
    table = roles_in(models.Recurrent(), tokens(5, 3))["table"]
    assert table.matrix == MatrixView(1, 5, 9, "in_out")


def test_fused_and_tied_weights_say_so() -> None:
    roles = roles_in(models.Gpt(), tokens(2, 6))
    assert "3 parts" in roles["qkv.weight"].reason
    assert "parts" not in roles["up.weight"].reason
    assert roles["tokens.weight"].uses == ("embedding", "head")


# -- the corpus ------------------------------------------------------------------------------------

# What names say where authors named parameters by what they are, and layers where they numbered
# them; the first that matches.
NAMES = {
    "": [
        (r"(?i)(bn|norm|ln_)[^.]*\.(weight|bias)$", "norm"),
        (r"(bias|cls_token|position_embeddings|token|positions)$", "bias"),
        (r"bias_[ih]h_l\d(_reverse)?$", "bias"),
        (r"(lstm|gru)\.", "rnn"),
        (r"(embeddings?|embed_tokens|wte|wpe|shared|bag)\.weight$", "embedding"),
        (r"(positions|attention_bias)\.weight$", "embedding"),
        (r"(head|output|classifier|lm_head|left|right)\.weight$", "head"),
        (r"(patches|projection)\.weight$", "convolution"),
        (r"weight$", "matrix"),
    ],
    "resnet": [(r"^6\.weight", "head"), (r"(0\.0|downsample\.0|conv\d)\.weight", "convolution"),
               (r"^6\.bias", "bias"), (r"", "norm")],
    "densenet": [(r"^6\.weight", "head"), (r"^6\.bias", "bias"), (r"norm|(3|5)\.0\.", "norm"),
                 (r"", "convolution")],
    "unet": [(r"^head\.weight", "head"), (r"\d\.1\.|bottom\.1\.", "norm"), (r"bias$", "bias"),
             (r"", "convolution")],
    "mobilenet": [(r"^8\.weight", "head"), (r"^8\.bias", "bias"),
                  (r"^0\.weight|body\.[036]\.weight", "convolution"), (r"", "norm")],
    "group_and_instance_norm": [(r"^[14]\.", "norm"), (r"bias", "bias"), (r"^6", "head"),
                                (r"", "convolution")],
    "in_place": [(r"bias", "bias"), (r"first", "matrix"), (r"second", "head")],
    "keyword_input": [(r"bias", "bias"), (r"", "head")],
    "running_statistics": [(r"bias", "bias"), (r"", "head")],
    "partly_frozen": [(r"frozen|unused", "unused"), (r"bias", "bias"), (r"", "head")],
    "parametrised": [(r"bias", "bias"), (r"original", "other"), (r"^4", "head")],
    "custom_function": [(r"slope", "other"), (r"bias", "bias"), (r"layer", "matrix"),
                        (r"", "head")],
}  # fmt: skip


@pytest.mark.corpus
@pytest.mark.parametrize("name", list(CORPUS))
def test_every_parameter_of_the_corpus_is_in_the_right_group(name: str) -> None:
    model = CORPUS[name].make()[0]
    found = find_roles(captured(name)[0])
    assert set(found) <= {n for n, _ in model.named_parameters()}
    for parameter, _ in model.named_parameters():
        rules = NAMES.get(name, NAMES[""])
        wanted = next(role for pattern, role in rules if re.search(pattern, parameter))
        role = found[parameter].role if parameter in found else "unused"
        assert role == wanted, parameter
