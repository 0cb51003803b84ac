"""An optimized model in a notebook."""

from __future__ import annotations

import re

import torch
from torch import nn

import graphopt
from graphopt.model.surface import restore


class _Own(nn.Module):
    """A model that shows itself in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def _repr_html_(self) -> str:
        return "mine"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_a_model_shows_its_modules_folded_and_what_passes_did_in_them() -> None:
    body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = graphopt.optimize(nn.Sequential(body, nn.Linear(4, 2)), passes="kfac", backend="eager")
    before = model._repr_html_()
    assert "nothing is captured yet: the first call does it" in before
    assert "applied" not in before
    model(torch.randn(3, 4)).sum().backward()
    shown = model._repr_html_()
    assert "<b>0</b> <i>Sequential</i> 20 parameters, 2 applied" in shown
    assert "<b>1</b> <i>Linear</i> 10 parameters, 2 applied" in shown
    assert shown.count("<details open><summary><b>Sequential</b>") == 1
    assert shown.count("<details") == len(re.findall("</details>", shown))
    assert "specialisation" not in nn.Sequential.__dict__
    restore(model)
    assert not hasattr(model, "_repr_html_")


def test_a_models_own_way_stays() -> None:
    model = graphopt.optimize(_Own(), backend="eager")
    model(torch.randn(3, 2))
    assert model._repr_html_() == "mine"
