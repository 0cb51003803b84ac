"""Stock DistributedDataParallel, given a plan's bucket caps, forms the plan's groups."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from graphopt.analysis.gradient_order import gradient_order
from graphopt.capture import capture
from graphopt.errors import ArgumentError
from graphopt.grouping.ddp import arrival_order, bucket_caps, in_order
from graphopt.grouping.planner import plan
from graphopt.network.curve import Curve
from graphopt.plan.grouping import Group, Grouping, Ready
from tests.support.models_for_cli import Net
from tests.support.ranks import on_ranks

WORLD = 2


class Tied(nn.Module):
    """Embedding and head share their weight, whose gradient is complete at its first use."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 40)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


class Halves(nn.Module):
    """Parameters of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(8, 8)
        self.wide = nn.Linear(8, 4).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(self.narrow(x).double())


def _net() -> tuple[nn.Module, torch.Tensor]:
    return Net(width=8, blocks=4), torch.randn(2, 3, 8, 8)


def _tied() -> tuple[nn.Module, torch.Tensor]:
    return Tied(), torch.randint(0, 40, (2, 6))


def _sizes(model: nn.Module) -> dict[str, tuple[int, str]]:
    return {n: (p.numel() * p.element_size(), str(p.dtype)) for n, p in model.named_parameters()}


def _cut(model: nn.Module, names: Sequence[str], cuts: Sequence[int]) -> Grouping:
    """A plan that cuts `names` behind these positions."""
    sizes = _sizes(model)
    edges = [0, *cuts, len(names)]
    groups = []
    for start, stop in itertools.pairwise(edges):
        members = tuple(names[start:stop])
        groups.append(Group(members, sum(sizes[n][0] for n in members), sizes[members[0]][1]))
    return Grouping(tuple(groups), backward=1.0, finish=1.0, bound=1.0)


# -- two ranks -------------------------------------------------------------------------------------


def _rebuilt(model: nn.Module, x: torch.Tensor, caps: list[float]) -> list[set[str]]:
    """The buckets of the third step, as DDP hands them to a communication hook."""
    names = {id(p): n for n, p in model.named_parameters()}
    wrapped = DistributedDataParallel(model, bucket_cap_mb_list=caps)
    seen: list[set[str]] = []

    def hook(state, bucket):  # DDP refuses annotations that are not evaluated
        seen.append({names[id(p)] for p in bucket.parameters()})
        work = dist.all_reduce(bucket.buffer().div_(WORLD), async_op=True)
        return work.get_future().then(lambda f: f.value()[0])

    wrapped.register_comm_hook(None, hook)
    for _ in range(3):
        seen.clear()
        model.zero_grad()
        wrapped(x).square().mean().backward()
    return seen


def _check(make: Callable[[], tuple[nn.Module, torch.Tensor]], cuts: Sequence[int]) -> None:
    model, x = make()
    wanted = _cut(model, arrival_order(model, (x,), {}), cuts)
    assert _rebuilt(model, x, bucket_caps(wanted)) == [set(g.names) for g in wanted.groups]


def _check_planner(make: Callable[[], tuple[nn.Module, torch.Tensor]]) -> None:
    """From a captured graph to DDP's buckets, as `graphopt plan --emit ddp` does it."""
    model, x = make()
    order = capture(model, (x,), {}).graph.get(gradient_order)
    ready = in_order(order.ready, arrival_order(model, (x,), {}))
    # A latency of a tenth of the backward makes several groups worth their while.
    curve = Curve.affine(order.backward / 10, order.backward / sum(r.bytes for r in ready))
    found = plan(ready, curve, order.backward, world=WORLD)
    assert len(found.groups) > 1
    assert _rebuilt(model, x, bucket_caps(found)) == [set(g.names) for g in found.groups]


def _work(rank: int) -> None:
    torch.manual_seed(0)
    _check(_net, ())
    _check(_net, (1, 2, 7, 8))
    _check(_net, tuple(range(1, 20)))
    _check(_tied, (1, 5))
    _check_planner(_net)
    _check_planner(_tied)


@pytest.mark.distributed
def test_rebuilt_buckets_are_the_groups(tmp_path: Path) -> None:
    on_ranks(tmp_path, WORLD, _work)


# -- one rank --------------------------------------------------------------------------------------


def test_caps_are_exact_and_in_order() -> None:
    sizes = (3, 7 * 2**20 + 1, 2**41 + 5)
    groups = tuple(Group((str(s),), s, "float32 cpu") for s in sizes)
    caps = bucket_caps(Grouping(groups, backward=1.0, finish=1.0, bound=1.0))
    # DDP truncates to whole bytes.
    assert tuple(int(cap * 2**20) for cap in caps) == sizes


def test_one_list_serves_two_dtypes_only_where_it_can() -> None:
    def made(*groups: tuple[int, str]) -> Grouping:
        parts = tuple(Group((f"p{i}",), size, kind) for i, (size, kind) in enumerate(groups))
        return Grouping(parts, backward=1.0, finish=1.0, bound=1.0)

    mib = 2**20
    assert bucket_caps(made((mib, "a"), (mib, "b"), (2 * mib, "a"))) == [1.0, 2.0]
    assert bucket_caps(made((3 * mib, "sparse a"), (mib, "a"))) == [1.0]
    for impossible in (
        made((mib, "a"), (2 * mib, "b"), (mib, "a"), (mib, "b")),  # two sizes at which to close
        made((mib, "a"), (2 * mib, "b"), (mib, "a")),  # the rest of b is larger than a's first
    ):
        with pytest.raises(ArgumentError, match="one list of caps to every dtype"):
            bucket_caps(impossible)
    with pytest.raises(ArgumentError, match="without groups"):
        bucket_caps(made())


def test_arrival_order_of_tied_weights_and_of_a_chain() -> None:
    model, tokens = _tied()
    names = arrival_order(model, (tokens,), {})
    assert sorted(names) == sorted(_sizes(model))
    assert names[0] == "head.bias"
    assert names[-1] == "embed.weight"
    layers = [int(n.split(".")[1]) for n in names if n.startswith("layers")]
    assert layers == sorted(layers, reverse=True)


def test_arrival_order_leaves_gradients_alone() -> None:
    model, x = Halves(), torch.randn(2, 8)
    model.narrow.weight.grad = mine = torch.ones(8, 8)
    model.wide.requires_grad_(False)
    assert set(arrival_order(model, (x,), {})) == {"narrow.weight", "narrow.bias"}
    assert model.narrow.weight.grad is mine
    assert torch.equal(mine, torch.ones(8, 8))
    assert model.narrow.bias.grad is None
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_parameter_without_a_gradient_is_refused_by_name() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    with pytest.raises(ArgumentError, match=r"'idle\.weight' gets no gradient"):
        arrival_order(model, (torch.ones(1, 4),), {})
    with pytest.raises(ArgumentError, match="no output of the model depends"):
        arrival_order(nn.Identity(), (torch.ones(1),), {})


def test_times_follow_another_order_without_going_back() -> None:
    ready = (Ready("a", 4, 1.0), Ready("b", 4, 2.0), Ready("c", 4, 3.0))
    moved = in_order(ready, ("a", "c", "unrelated", "b"))
    assert [(r.name, r.seconds) for r in moved] == [("a", 1.0), ("c", 3.0), ("b", 3.0)]
    with pytest.raises(ArgumentError, match="'c' did not arrive"):
        in_order(ready, ("a", "b"))
