"""Micro-batches of a batch, and losses of micro-batches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.errors import ArgumentError
from graphopt.runtime.partition.batch import micro_batches
from graphopt.runtime.partition.loss import loss_of, reduction_of, tangents_of


@given(examples=st.integers(1, 40), count=st.integers(1, 12))
def test_micro_batches_are_the_batch(examples: int, count: int) -> None:
    x, y = torch.randn(examples, 3), torch.arange(examples)
    fixed = torch.randn(examples + 1)
    found = micro_batches((x, 0.5, y), {"mask": x > 0, "table": fixed}, count, has_target=True)
    assert len(found) == min(count, examples)
    sizes = [micro.examples for micro in found]
    assert sum(sizes) == examples
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(torch.cat([micro.args[0] for micro in found]), x)
    assert torch.equal(torch.cat([micro.target for micro in found]), y)
    assert torch.equal(torch.cat([micro.kwargs["mask"] for micro in found]), x > 0)
    for micro in found:
        assert micro.args[1:] == (0.5,)
        assert micro.kwargs["table"] is fixed
        assert len(micro.args[0]) == len(micro.target) == micro.examples


def test_nested_batches() -> None:
    batch = {"ids": torch.arange(6).reshape(3, 2), "name": "a"}
    found = micro_batches((batch,), {}, 3, has_target=False)
    assert [micro.args[0]["ids"].tolist() for micro in found] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert {micro.args[0]["name"] for micro in found} == {"a"}
    assert all(micro.target is None for micro in found)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ((torch.ones(4, 2),), "needs inputs and a target"),
        ((1, 2), "no tensor with examples"),
        ((torch.ones(0, 2), torch.ones(0)), "no tensor with examples"),
        ((torch.ones(4, 2), torch.ones(3)), "cannot be divided"),
        ((torch.ones(4, 2), "label"), "cannot be divided"),
    ],
)
def test_batches_that_cannot_be_cut(batch: tuple[object, ...], reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        micro_batches(batch, {}, 2, has_target=True)


def _contrastive(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output @ output.T, torch.arange(len(output)))


def test_how_losses_add_up() -> None:
    torch.manual_seed(0)
    outputs = [torch.rand(n, 4, requires_grad=True) for n in (3, 3, 2)]
    targets = [torch.randint(0, 4, (n,)) for n in (3, 3, 2)]
    whole = torch.cat(targets)
    mean = nn.functional.cross_entropy
    assert reduction_of(mean, outputs, targets, whole) == "mean"
    summed = nn.CrossEntropyLoss(reduction="sum")
    assert reduction_of(summed, outputs, targets, whole) == "sum"
    named = [{"logits": o} for o in outputs]
    assert reduction_of(lambda o, t: mean(o["logits"], t), named, targets, whole) == "mean"
    with pytest.raises(ArgumentError, match="needs the whole batch at once"):
        reduction_of(_contrastive, outputs, targets, whole)


def test_a_rule_does_not_hold_by_chance() -> None:
    outputs = [torch.rand(2, 2) for _ in range(2)]
    targets = [torch.tensor([0, 1]), torch.tensor([0, 1])]  # balanced, as if weights were none
    whole = torch.cat(targets)
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0]))
    ignoring = nn.CrossEntropyLoss(ignore_index=0)
    for loss in (weighted, ignoring):
        with pytest.raises(ArgumentError, match="needs the whole batch at once"):
            reduction_of(loss, _differentiable(outputs), targets, whole)
    summed = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0]), reduction="sum")
    assert reduction_of(summed, _differentiable(outputs), targets, whole) == "sum"


def _differentiable(outputs: list[Tensor]) -> list[Tensor]:
    return [output.requires_grad_() for output in outputs]


def test_a_loss_with_parameters_is_refused() -> None:
    layer = nn.Linear(4, 4)

    def penalised(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target) + layer.weight.square().sum()

    outputs, targets = _differentiable([torch.rand(2, 4)]), [torch.tensor([0, 1])]
    with pytest.raises(ArgumentError, match=r"reads a parameter of shape \[4, 4\]"):
        reduction_of(penalised, outputs, targets, targets[0])


def test_where_a_loss_is() -> None:
    number = torch.ones((), requires_grad=True)
    assert loss_of(None, number, None) is number
    assert loss_of(None, {"loss": number, "logits": 1}, None) is number
    assert loss_of(None, SimpleNamespace(loss=number), None) is number
    for output in (torch.ones(3), {"logits": number}, (number,)):
        with pytest.raises(ArgumentError, match="not one number"):
            loss_of(None, output, None)


def test_tangents_are_gradients_of_the_loss() -> None:
    leaves = {"0": torch.randn(3, requires_grad=True), "1": torch.randn(2, requires_grad=True)}
    loss = leaves["0"].square().sum()
    found = tangents_of(loss, leaves, 0.25)
    assert torch.allclose(found["0"], 0.5 * leaves["0"].detach())
    assert found["1"] is None
    with pytest.raises(ArgumentError, match="does not depend"):
        tangents_of(loss.detach(), leaves, 1.0)
