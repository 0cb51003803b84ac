"""Sizes that vary: one graph has the curvature of each batch, and all graphs share one state."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import graphopt
from graphopt.model.controller import controller_of
from graphopt.passes.kfac import Kfac
from graphopt.testing import check_pass, joint_graphs
from tests.kfac.brute_force import expected
from tests.kfac.cases import MODELS, case
from tests.kfac.explicit import compute
from tests.support.ranks import on_ranks

DAMPING = 1e-3
SPEC = "kfac{damping=1e-3,interval=1,solver=factored}"
BATCHES = (4, 6, 3)
# Each kind of operator once; the others differ in what has no sizes.
KINDS = (
    *("mlp", "conv", "conv_groups", "conv_transposed", "fused_attention", "raw_parameters"),
    *("batch_norm", "group_norm", "rms_norm", "lstm", "tied_embedding", "embedding"),
)


def _close(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        assert p.grad is not None
        error = (p.grad - wanted[name]).norm() / wanted[name].norm()
        assert error < 1e-8, f"{name}: relative error {error:.1e}"


def _made(model: nn.Module) -> int:
    controller = controller_of(model)
    assert controller is not None
    return controller.made


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_those_of_the_dense_solution_for_each_batch(name: str) -> None:
    forward = MODELS[name][0]()
    (argument,) = list(forward.forward.__code__.co_varnames[1:2])
    model = graphopt.optimize(
        copy.deepcopy(case(name).model),
        passes=SPEC,
        backend="eager",
        verify="structure",
        dynamic={argument: {0: "batch"}},
    )
    for batch in BATCHES:
        one = case(name, batch)
        model.load_state_dict(one.model.state_dict())
        model.zero_grad()
        one.loss(model(one.x)).backward()
        _close(model, expected(*compute(one), DAMPING))
    assert _made(model) == 1, model.explain()


class Tokens(nn.Module):
    """A tied embedding, attention over a padded sequence, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8, padding_idx=0)
        self.mix = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        q, k, v = self.mix(self.embed(ids)).chunk(3, -1)
        h = nn.functional.scaled_dot_product_attention(q, k, v)
        return nn.functional.linear(self.norm(h), self.embed.weight).transpose(1, 2)


class Images(nn.Module):
    """Convolutions down and up, norms, and a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 6, 3, stride=2, padding=1)
        self.batch = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False)
        self.group = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.batch(self.down(x)))
        return self.head(self.group(self.up(h)).mean((2, 3)))


def _ids(*shape: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 12, shape)
    return ids, ids.roll(1, 1)


def _images(*shape: int) -> tuple[Tensor, Tensor]:
    n, *size = shape
    return torch.randn(n, 2, *size), torch.randint(0, 3, (n,))


Dynamic = dict[str, dict[int, str]]
DATA: dict[str, tuple[type[nn.Module], Any, Dynamic, tuple[tuple[int, ...], ...]]] = {
    "tokens": (Tokens, _ids, {"ids": {0: "batch", 1: "length"}}, ((4, 5), (6, 7), (3, 9))),
    "images": (
        Images,
        _images,
        {"x": {0: "batch", 2: "height", 3: "width"}},
        ((4, 6, 8), (3, 9, 7), (5, 5, 8)),
    ),
}


def _steps(
    model: nn.Module, data: Sequence[tuple[Tensor, Tensor]]
) -> list[dict[str, Tensor | None]]:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for x, target in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
        optimizer.step()
    return found


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("tokens", "solver=ekfac,interval=2,ema=0.5"),
        ("tokens", "sharing=reduce,clip=0.01,max_dim=9,rank=2"),
        ("tokens", "fisher=mc,interval=1"),
        ("images", "reduction=sum,clip=0.01,max_dim=9,rank=2,interval=1"),
    ],
)
def test_each_size_has_the_bits_of_its_own_graph(kind: str, options: str) -> None:
    make, batch, declared, shapes = DATA[kind]
    torch.manual_seed(1)
    model, data = make(), [batch(*shape) for shape in shapes]
    spec = f"kfac{{{options}}}"
    results = []
    for dynamic in (declared, False):
        one = graphopt.optimize(
            copy.deepcopy(model), passes=spec, backend="eager", verify="structure", dynamic=dynamic
        )
        results.append((one, _steps(one, data)))
    (symbolic, found), (static, wanted) = results
    for step, (one, other) in enumerate(zip(found, wanted, strict=True)):
        for name, gradient in one.items():
            assert gradient is not None
            assert other[name] is not None
            assert torch.equal(gradient, other[name]), f"{name} in step {step}"
    assert _made(symbolic) == 1
    assert _made(static) == len(shapes)


# Batch and length of each rank in each step; a rank captures where the other one does not.
STEPS = (((4, 5), (4, 5)), ((4, 7), (4, 5)), ((3, 6), (6, 9)))


class Words(nn.Module):
    """Each token by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(12, 8), nn.LayerNorm(8), nn.Linear(8, 12))

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.layers(ids)
        return logits.transpose(1, 2)


def _train(rank: int) -> None:
    results = []
    for dynamic in (None, False):
        torch.manual_seed(1)
        model = graphopt.optimize(
            Words(),
            passes="kfac{interval=1},group_gradients",
            backend="eager",
            verify="off",
            dynamic=dynamic,
        )
        torch.manual_seed(2)
        data = [_ids(*shapes[rank]) for shapes in STEPS]
        results.append((model, _steps(model, data)))
    (symbolic, found), (_, wanted) = results
    for one, other in zip(found, wanted, strict=True):
        for name, gradient in one.items():
            assert gradient is not None
            assert other[name] is not None
            assert torch.equal(gradient, other[name]), name
            same = gradient.clone()
            dist.broadcast(same, 0)
            assert torch.equal(same, gradient), name
    assert _made(symbolic) <= 3


@pytest.mark.distributed
def test_ranks_with_batches_of_other_sizes(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _train)


def test_generated_graphs() -> None:
    check_pass(Kfac(), graphs=joint_graphs(symbolic=True), max_examples=10)
