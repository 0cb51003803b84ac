"""Hashes in place of values: equal ones mean equal bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.model import verification
from graphopt.model.comparison import marks
from graphopt.model.surface import report

VALUES = {
    "float": torch.randn(3, 4),
    "view": torch.randn(4, 3).t(),
    "number": torch.tensor(3),
    "empty": torch.zeros(0, 2),
    "short": torch.randn(5).bfloat16(),
    "complex": torch.randn(2, dtype=torch.complex64).conj(),
    "bool": torch.tensor([True, False]),
    "parameter": nn.Parameter(torch.ones(2)),
    "absent": None,
}


def test_equal_values_have_equal_marks() -> None:
    copies = {n: None if v is None else v.detach().clone() for n, v in VALUES.items()}
    assert marks(VALUES) == marks(copies)
    assert marks(VALUES).keys() == VALUES.keys()


def test_one_bit_form_or_name_changes_them() -> None:
    for name, value in VALUES.items():
        if value is None or value.numel() == 0:
            continue
        flat = value.detach().resolve_conj().contiguous().view(-1).clone()
        flat.view(torch.uint8)[-1] ^= 1
        assert marks({name: flat.view(value.shape)}) != marks({name: value}), name
        assert marks({name: value.reshape(1, *value.shape)}) != marks({name: value}), name
        assert marks({name: None}) != marks({name: value}), name


def test_what_has_no_plain_bits_has_none() -> None:
    assert marks({"sparse": torch.eye(2).to_sparse()}) is None
    assert marks({"meta": torch.ones(2, device="meta")}) is None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


def test_eager_runs_again_only_where_marks_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[str] = []
    observe = verification.Trial.observe

    def counted(self: object, call: object) -> object:
        counts.append(getattr(call, "__qualname__", "?"))
        return observe(self, call)

    monkeypatch.setattr(verification.Trial, "observe", counted)
    model = graphopt.optimize(Net(), (torch.ones(2, 3),), backend="eager", cache="off")
    assert report(model).specialisations[0].verification.result == "bit-equal"
    assert len(counts) == 2
    counts.clear()
    monkeypatch.setattr(verification, "marks", lambda values: {"never": object()})
    model = graphopt.optimize(Net(), (torch.ones(2, 3),), backend="eager", cache="off")
    assert report(model).specialisations[0].verification.result == "bit-equal"
    assert len(counts) == 3
