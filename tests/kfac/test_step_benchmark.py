"""The benchmark of K-FAC's step time runs, and measures what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import kfac_step
from benchmarks.kfac_step import Size, measure, memory, peak_bytes, saved_bytes
from benchmarks.kfac_step_variants import (
    Task,
    gpt,
    kfac_spec,
    mlp,
    optimized,
    pytorch,
    resnet,
)

TINY: dict[str, Task] = {
    "mlp": mlp(6, (5, 4, 3)),
    "resnet": resnet(2, width=4, size=8),
    "gpt": gpt(2, positions=4, width=8, layers=1),
}


def test_reports_every_variant() -> None:
    size = Size(rounds=3, settling=3, inductor=False)
    result: Any = measure(TINY["mlp"], size)
    own = {"kfac, interval 1", "kfac, interval 10", "kfac, interval stale", "kfac, stale step"}
    assert own | {"sgd", "graphopt without kfac"} <= result["milliseconds"].keys()
    assert result["overhead"]["sgd"] == {"median": 0, "low": 0, "high": 0}
    # Nothing changes on one batch: the rule has come to intervals of 1, 1, 2 and more.
    assert result["stale intervals"]["least"] >= 2


@pytest.mark.parametrize("name", TINY)
def test_statistics_save_nothing_for_the_backward(name: str) -> None:
    """The tensors that they are made from are those that weights' gradients need anyway."""
    found = memory(TINY[name])
    plain = found["saved for backward, graphopt without kfac"]
    assert found["saved for backward, kfac, refresh step"] == plain > 0
    assert found["saved for backward, kfac, stale step"] == plain


def test_products_are_counted() -> None:
    """A 4x5 and a 3x4 layer, with bias, on 6 rows; the first has no gradient of its input."""
    step, model = optimized(TINY["mlp"], kfac_spec(1))
    step()
    products = 4 * 6 * (4 + 6) + 3 * 5 * (3 + 5)
    forward_and_backward = 6 * (2 * 4 * 5 + 3 * 3 * 4)
    found = kfac_step._products(TINY["mlp"], model)
    assert found == pytest.approx(products / forward_and_backward)


def test_saved_bytes_counts_each_memory_once() -> None:
    a = torch.ones(8, requires_grad=True)
    b = torch.ones(16, requires_grad=True)

    def step() -> Tensor:
        return (a * a[:8]).sum() + b.square().sum()

    assert saved_bytes(step) == 4 * (8 + 16)


def test_peak_is_what_lives_at_once() -> None:
    def step() -> None:
        for _ in range(3):
            torch.ones(1000)
        kept = [torch.ones(500), torch.ones(700)]
        del kept

    assert 4800 <= peak_bytes(step) < 6000


def test_overheads_are_compared_round_by_round() -> None:
    times = {
        "sgd": [1.0, 2.0],
        "kfac, interval 1": [2.0, 3.0],
        "slow, interval 1": [9.0, 9.0],
        "fast, interval 1": [3.0, 4.0],
    }
    found: Any = kfac_step._against_peers(times)
    assert found["kfac, interval 1"]["best peer"] == "fast, interval 1"
    assert found["kfac, interval 1"]["median"] == 0.5


def test_variants_do_not_share_weights() -> None:
    task = TINY["mlp"]
    step = pytorch(task)
    before = [p.clone() for p in task.model.parameters()]
    step()
    assert all(torch.equal(a, b) for a, b in zip(before, task.model.parameters(), strict=True))
