"""Sizes that vary: one graph counts the values of each batch."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.model.controller import controller_of
from tests.batch_statistics.models import check, net, optimized, seen, sgd, train


def _images(n: int, height: int, width: int) -> Tensor:
    x = torch.randn(n, 3, height, width, dtype=torch.float64)
    return x * n + height


def test_norms_count_the_values_of_each_micro_batch() -> None:
    torch.manual_seed(3)
    plain, model = net(), optimized(net(), "batch_statistics{last=2}")
    one, other = sgd(plain), sgd(model)
    shapes = [[(4, 6, 7)], [(4, 9, 5)], [(6, 5, 8), (3, 7, 7)], [(8, 4, 9)], [(2, 5, 5)]]
    steps = []
    for step in shapes:
        batches = [_images(*shape) for shape in step]
        steps.append(seen(plain, batches))
        train(plain, one, batches)
        train(model, other, batches)
        check(model, steps[-2:])
        for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b), name
    controller = controller_of(model)
    assert controller is not None
    assert controller.made == 3
