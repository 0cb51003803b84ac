"""What goes wrong on one rank is an error on all of them, and never a hang."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import graphopt
from graphopt.errors import ArgumentError, RankError
from graphopt.runtime.ranks.agreement import ranks
from graphopt.runtime.ranks.ranks import Ranks
from tests.support.models import batch, mlp
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.distributed


def _refuses(make: Any, passes: str, expected: str) -> None:
    model = make()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(RankError, match=expected):
        graphopt.optimize(model, passes=passes)(batch("mlp", 0))
    assert type(model).__name__ == "Sequential"
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def _other_model(rank: int) -> None:
    _refuses(
        lambda: nn.Sequential(nn.Linear(8, 4 + rank), nn.Tanh()),
        "auto",
        r"rank 0 has '0.weight torch.float32 \[4, 8\]' where rank 1 has '0.weight .*\[5, 8\]'",
    )


def _other_dtype(rank: int) -> None:
    _refuses(lambda: mlp().to(torch.float64 if rank else torch.float32), "auto", "float32.*float64")


def _other_order(rank: int) -> None:
    pair = [("a", nn.Linear(8, 8)), ("b", nn.Linear(8, 8, bias=False))]
    from collections import OrderedDict

    _refuses(lambda: nn.Sequential(OrderedDict(pair[:: -1 if rank else 1])), "auto", "differ")


def _more_parameters(rank: int) -> None:
    _refuses(
        lambda: nn.Sequential(*[nn.Linear(8, 8) for _ in range(1 + rank)]), "auto", "only rank 1"
    )


@pytest.mark.parametrize("work", [_other_model, _other_dtype, _other_order, _more_parameters])
def test_ranks_with_different_models(work: Any, tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, work)


def _other_passes(rank: int) -> None:
    model = mlp()
    wire = "bf16" if rank else "native"
    spec = f"group_gradients{{link=10gbe,wire={wire}}}"
    with pytest.raises(graphopt.errors.GraphoptError, match=r"differ.*native.*bf16"):
        graphopt.optimize(model, passes=spec)(batch("mlp", 0))


def test_ranks_with_different_plans(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _other_passes)


def _missing_rank(rank: int, folder: str) -> None:
    model = mlp()
    if rank == 1:
        _wait_for(Path(folder, "raised"))
        return
    with pytest.raises(RankError, match="rank 1 did not come to agree on models within 3 s"):
        graphopt.optimize(model)
    Path(folder, "raised").touch()


def _wait_for(file: Path) -> None:
    """Wait until another rank has made a file, or for longer than it should take."""
    end = time.monotonic() + 25
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.1)


def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _missing_rank, str(tmp_path), timeout=3)


def _stalls(rank: int, how: str, folder: str) -> None:
    model = graphopt.optimize(mlp(), backend="eager", verify="off")
    model(batch("mlp", rank)).sum().backward()
    if rank == 1:
        Path(folder, "pid").write_text(str(os.getpid()))
        time.sleep(2)
        if how == "stall":
            _wait_for(Path(folder, "raised"))
        os._exit(0)  # without a word to the others
    start = time.monotonic()
    loss = model(batch("mlp", rank)).sum()
    with pytest.raises(RankError, match=r"group 0 \(.*step 2: rank 1 did not answer"):
        loss.backward()
    assert time.monotonic() - start < 20
    Path(folder, "raised").touch()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["die", "stall"])
def test_a_rank_that_dies_or_stalls(how: str, tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _stalls, how, str(tmp_path), timeout=6)
    assert (tmp_path / "raised").exists()


def _nan(rank: int) -> None:
    class Poisoned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good = nn.Linear(8, 4)
            self.bad = nn.Linear(8, 4)

        def forward(self, x: Tensor, factor: Tensor) -> Tensor:
            return self.good(x).sum() + (self.bad(x) * factor).sum()

    model: Any = graphopt.optimize(Poisoned(), backend="eager")
    factor = torch.tensor(float("nan") if rank else 1.0)
    model(batch("mlp", 0), torch.tensor(1.0)).backward()
    with pytest.warns(RuntimeWarning, match="not finite in step 2.*bad"):
        model(batch("mlp", 0), factor).backward()
    assert "not finite: step 2" in model.explain()


def test_nan_is_reported_by_name(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _nan)


def _frozen_and_unused(rank: int) -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(8, 4)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.unused = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(self.used(x))

    model: Any = graphopt.optimize(Partly())
    model(batch("mlp", rank)).sum().backward()
    assert model.used.weight.grad is not None
    assert all(p.grad is None for p in [*model.frozen.parameters(), *model.unused.parameters()])


def test_frozen_and_unused_parameters(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _frozen_and_unused)


def _nothing_to_reduce(rank: int) -> None:
    with pytest.raises(ArgumentError, match="no parameters"):
        graphopt.optimize(nn.Sequential(nn.Tanh()))
    model: Any = graphopt.optimize(nn.Sequential(nn.Linear(8, 2)).requires_grad_(False))
    x = batch("mlp", rank).requires_grad_()
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, model[0].weight.sum(0).expand(6, 8))
    assert "no-gradients" in model.explain()


def test_nothing_to_reduce(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _nothing_to_reduce)


def _other_mesh(rank: int) -> None:
    with pytest.raises(ArgumentError, match="mesh says dp=3, and this job has 2 ranks"):
        graphopt.optimize(mlp(), mesh="dp=3")


def test_mesh_of_another_size(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _other_mesh)


def _mixed_devices(rank: int) -> None:
    # The meta device stands in for a GPU; `optimize` itself refuses it earlier, by its own rule.
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4, device="meta"))
    with pytest.raises(ArgumentError, match=r"several kinds of device: .* on cpu, .* on meta"):
        Ranks.of(model, dist.group.WORLD)


def test_mixed_devices(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _mixed_devices)


def _input_gradient(rank: int) -> None:
    plain = mlp()
    model: Any = graphopt.optimize(mlp(), backend="eager")
    ours, theirs = (batch("mlp", rank).requires_grad_() for _ in range(2))
    model(ours).square().mean().backward()
    plain(theirs).square().mean().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradients_of_inputs_stay_this_ranks_own(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _input_gradient)


def _one_rank(rank: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model: Any = graphopt.optimize(mlp(), passes="group_gradients", backend="eager")
        model(batch("mlp", 0)).sum().backward()
    assert "one-rank" in model.explain()
    assert model.noise_scale() is None


def test_one_rank(tmp_path: Path) -> None:
    on_ranks(tmp_path, 1, _one_rank)


def test_ranks_are_named() -> None:
    assert ranks([1]) == "rank 1"
    assert ranks([0, 2]) == "ranks 0, 2"
    assert ranks(list(range(9))) == "ranks 0, 1, 2, 3 and 5 more"
