"""Flexpoint over two ranks: equal exponents, and gradients that travel as the integers they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.errors import RankError
from graphopt.runtime.flexpoint.statistics import merged, over_ranks
from tests.flexpoint.models import batch, conv_net, part_of, session_of, state_of
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.distributed

SPEC = "cleanup,flexpoint,group_gradients{wire=int32}"


def _everybodys(mine: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def _equal_on_all(tensors: dict[str, Tensor]) -> None:
    for theirs in _everybodys(tensors):
        assert theirs.keys() == tensors.keys()
        for name, value in theirs.items():
            assert torch.equal(value, tensors[name]), name


def _optimized(spec: str) -> nn.Module:
    return graphopt.optimize(conv_net(), passes=spec, backend="eager", verify="structure")


def _step(model: nn.Module, number: int, rank: int, scale: float = 1.0) -> dict[str, Tensor]:
    images, labels = batch(2 * number + rank)
    model.zero_grad()
    F.cross_entropy(model(scale * images), labels).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _exponents_of_all_ranks(rank: int) -> None:
    model = _optimized(
        "cleanup,flexpoint{rounding=stochastic,master_weights=false},group_gradients"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for number in range(4):
        with model.no_sync():
            _step(model, number, rank)
        _step(model, number, rank, scale=1.0 + 30 * rank * number)
        optimizer.step()
    _equal_on_all(dict(state_of(model)))
    _equal_on_all({n: p.detach() for n, p in model.named_parameters()})
    counters = state_of(model)[f"counters/{part_of(model).key}"]
    assert int(counters[0, 3]) == 2 * 4 * 2 * model.conv.weight.numel()


def _integers_travel_exactly(rank: int) -> None:
    """The mean of two flex gradients, rounded once to float32."""
    own = _step(_optimized("cleanup,flexpoint"), 0, rank)
    model = _optimized(SPEC)
    reduced = _step(model, 0, rank)
    _equal_on_all(reduced)
    gathered = _everybodys(own)
    for name, mean in reduced.items():
        exact = sum(theirs[name].double() for theirs in gathered) / 2
        assert torch.equal(mean, exact.float()), name
        for theirs in gathered:
            value = theirs[name]
            unit = 2.0 ** (torch.frexp(value.abs().max()).exponent - 15)
            assert torch.equal(value / unit, (value / unit).round()), name


def _resumes(rank: int) -> None:
    straight, resumed = _optimized(SPEC), _optimized(SPEC)
    for number in range(3):
        _step(straight, number, rank)
    resumed.load_state_dict(straight.state_dict())
    graphopt.load_state_dict(resumed, graphopt.state_dict(straight))
    for number in range(3, 5):
        one, other = (_step(model, number, rank) for model in (straight, resumed))
        assert all(torch.equal(one[n], other[n]) for n in one)


def _other_tensors(rank: int) -> None:
    model = _optimized("cleanup,flexpoint")
    ranks = session_of(model).ranks["dp"]
    rows = {"key": torch.ones(2, 4, dtype=torch.int64)}
    assert over_ranks(ranks, rows, 1, int)["key"].tolist() == [[1, 2, 2, 2]] * 2
    with pytest.raises(RankError, match="flex tensors"):
        over_ranks(ranks, {f"of rank {rank}": rows["key"]}, 2, int)
    with pytest.raises(
        RankError, match=r"different steps .*: rank 0 is in step 3, rank 1 is in step 4"
    ):
        over_ranks(ranks, rows, 3 + rank, int)


def _other_exponents(rank: int) -> None:
    """One rank has loaded a state, which the other one has not."""
    model = _optimized("cleanup,flexpoint,group_gradients")
    _step(model, 0, rank)
    if rank:
        state = graphopt.state_dict(model)
        moved = {k: v + 1 if "/exponents/" in k else v for k, v in state.items()}
        graphopt.load_state_dict(model, moved)
    expected = "the exponents of flex tensors differ: rank 1 has others than rank 0"
    with pytest.raises(RankError, match=expected) as raised:
        _step(model, 1, rank)
    assert not raised.value.restart


WORK = [
    _exponents_of_all_ranks,
    _integers_travel_exactly,
    _resumes,
    _other_tensors,
    _other_exponents,
]


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__.strip("_"))
def test_two_ranks(work: Any, tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, work)


def test_statistics_of_two_batches() -> None:
    one = torch.tensor([[5, 1, 0, 8], [9, 2, 1, 8]])
    other = torch.tensor([[7, 3, 4, 2], [1, 0, 0, 2]])
    assert merged(one, other).tolist() == [[7, 4, 4, 10], [9, 2, 1, 10]]
