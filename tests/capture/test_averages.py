"""Batch norms that average over all batches: ``momentum=None``, which `update_bn` sets."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import graphopt
from tests.support.as_graph import assert_same_steps


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_steps_are_eager_s(kind: type[nn.Module], affine: bool) -> None:
    layer = kind(4, momentum=None, affine=affine)
    shape = (5, 4) if kind is nn.BatchNorm1d else (2, 4, 3, 3)
    first = nn.Linear(4, 4) if kind is nn.BatchNorm1d else nn.Conv2d(4, 4, 1)
    calls = [(torch.randn(shape),) for _ in range(4)]
    assert_same_steps(nn.Sequential(first, layer), calls)


def test_update_bn() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimized = graphopt.optimize(copy.deepcopy(plain), backend="eager")
    data = [torch.randn(5, 4) for _ in range(3)]
    averages = []
    for model in (plain, optimized):
        model(data[0]).sum().backward()
        average = AveragedModel(model)
        average.update_parameters(model)
        update_bn(data, average)
        averages.append(average)
    for a, b in zip(averages[0].buffers(), averages[1].buffers(), strict=True):
        assert torch.equal(a, b)
