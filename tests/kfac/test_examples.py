"""The examples of K-FAC and of other optimizers run, and their methods differ."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from examples.kfac_digits import report
from examples.kfac_digits import train as digits
from examples.kfac_digits.comparison import (
    ADAMW,
    KFAC,
    LARC_SGD,
    LARS_SGD,
    METHODS,
    MUON,
    SGD_MOMENTUM,
    TORCH_MUON,
    optimizers,
    train,
)
from examples.kfac_language_model import train as characters
from graphopt.model.surface import report as report_of

# -- the examples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [digits, characters], ids=["digits", "characters"])
def test_every_method_trains_the_example(example: object) -> None:
    task = replace(example.task(), every=3)
    values = {}
    for method in METHODS:
        setting = task.settings.get(method)
        *_, run = train(task, method, task.rates[method], seed=0, steps=6, setting=setting)
        assert [step for step, _, _ in run.points] == [3, 6]
        first, last = (value for _, _, value in run.points)
        assert math.isfinite(last)
        assert last > first if task.rising else last < first
        values[method] = last
    # Accuracies of few images may well be equal; losses are not.
    assert task.rising or len(set(values.values())) == len(METHODS)


@pytest.mark.parametrize("example", [digits, characters], ids=["digits", "characters"])
def test_kfac_preconditions_every_parameter(example: object) -> None:
    task = example.task()
    model = task.model().train()
    batch = next(task.batches(0))
    optimizers(KFAC, model, batch[0], 0.01, task.kfac)
    (captured,) = report_of(model).specialisations
    (step,) = captured.steps
    assert {a.site for a in step.outcome.applied} == {name for name, _ in model.named_parameters()}
    assert not step.outcome.declined


def test_torch_muon_gets_inner_matrices_only() -> None:
    model = digits.network()
    muon, adamw = optimizers(TORCH_MUON, model, torch.empty(0), 0.01, "")
    assert [tuple(p.shape) for p in muon.param_groups[0]["params"]] == [(128, 512)]
    counted = sum(len(o.param_groups[0]["params"]) for o in (muon, adamw))
    assert counted == len(list(model.parameters()))


def test_graphopt_muon_gets_the_convolutions_too() -> None:
    (optimizer,) = optimizers(MUON, digits.network(), torch.randn(8, 1, 8, 8), 0.01, "")
    by_method = {g["method"]: [tuple(p.shape) for p in g["params"]] for g in optimizer.param_groups}
    assert by_method["muon"] == [(16, 1, 3, 3), (32, 16, 3, 3), (128, 512)]


@pytest.mark.parametrize("method", [LARC_SGD, LARS_SGD])
def test_norms_and_biases_keep_their_rate(method: str) -> None:
    (optimizer,) = optimizers(method, digits.network(), torch.randn(8, 1, 8, 8), 0.1, "")
    adaptive, plain = optimizer.param_groups
    assert adaptive["adaptive"]
    assert not plain["adaptive"]
    assert [p.dim() for p in adaptive["params"]] == [4, 4, 2, 2]
    assert {p.dim() for p in plain["params"]} == {1}


def test_settings_arrive() -> None:
    def made(method: str) -> Any:
        model, images = digits.network(), torch.randn(8, 1, 8, 8)
        return optimizers(method, model, images, 0.1, "cleanup,kfac{damping=0.02}", 0.5)[0], model

    assert made(SGD_MOMENTUM)[0].param_groups[0]["momentum"] == 0.5
    assert made(ADAMW)[0].param_groups[0]["betas"][1] == 0.5
    assert made(TORCH_MUON)[0].param_groups[0]["momentum"] == 0.5
    assert made(MUON)[0].param_groups[0]["momentum"] == 0.5
    assert made(LARC_SGD)[0].trust == 0.5
    assert made(LARS_SGD)[0].param_groups[0]["trust"] == 0.5
    (captured,) = report_of(made(KFAC)[1]).specialisations
    assert captured.steps[-1].spec == "kfac{damping=0.01}"


def test_characters_come_with_the_next_one() -> None:
    inputs, answers = characters.windows(torch.arange(200), torch.tensor([0, 100]))
    assert inputs.shape == answers.shape == (2, characters.CONTEXT)
    assert torch.equal(answers, inputs + 1)
    assert inputs[1, 0] == 100


def test_the_character_model_does_not_look_ahead() -> None:
    model = characters.CharacterGpt(10).eval()
    text = torch.randint(10, (1, characters.CONTEXT))
    changed = text.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 10
    with torch.no_grad():
        before, after = model(text), model(changed)
    assert torch.allclose(before[:, :20], after[:, :20], atol=1e-6)
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=1e-3)


def test_command_line_prints_a_line_per_method(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "4"])
    report.main(digits.task(), digits.__doc__ or "")
    lines = capsys.readouterr().out.splitlines()
    assert "at most 4 steps" in lines[0]
    assert [line.split("  ")[0] for line in lines[2:]] == list(METHODS)


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="'adam' is none of SGD, momentum, AdamW"):
        optimizers("adam", nn.Linear(1, 1), torch.empty(0), 0.1, "")
