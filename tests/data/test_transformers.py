"""Padding of models of the transformers package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.data import PaddingReport, check_padding

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.corpus


def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, 50, (3, 12))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def changed(report: PaddingReport) -> set[str]:
    return {c.kind for c in report.compared if c.error > report.allowed}


@pytest.fixture
def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=4, vocab_size=50, n_positions=32, bos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).train()


def test_gpt2_minds_padding_on_the_left_only(gpt2: Any) -> None:
    assert check_padding(gpt2, kwargs=batch()).ok
    report = check_padding(gpt2, kwargs=batch(), side="left")
    assert changed(report) >= {"outputs", "loss", "gradients"}
    assert report.leaks[0].operator == "arange"
    assert "position_ids" in report.leaks[0].line


def test_padding_on_the_left_predicts_the_first_token() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=50,
        initializer_range=0.5,
    )
    model = transformers.LlamaForCausalLM(config).train()
    assert check_padding(model, kwargs=batch()).ok
    report = check_padding(model, kwargs=batch(), side="left")
    assert changed(report) == {"loss", "gradients"}
    assert report.leaks[0].operator == "nll_loss_forward"
