"""Forward changes in place what it also differentiates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.refusals.example import Example, Refusal, Small, Way, results, small, train


def turns(s: Small, h: Tensor) -> Tensor:
    s.lin.weight.data = s.lin.weight.data.t()
    return F.linear(h, s.lin.weight)


DATA = Refusal(
    "data",
    "assigns to the `.data` of a tensor what has another form, or what another tensor is, too",
    "the tensor gets another memory, of which the graph knows nothing",
    "`with torch.no_grad(): t.copy_(…)`",
    (
        Example(
            "turned",
            small(turns),
            r"`\.data` of param 'lin.weight'",
            "lin.weight.data =",
            "^change it outside of forward, or compute with a changed copy",
            way=Way(small(lambda s, h: F.linear(h, s.lin.weight.t())), same=False),
        ),
    ),
)


def _adds(s: Small, h: Tensor) -> Tensor:
    s.table.mul_(0.5).add_(h.mean(0))
    return h * s.table


def _adds_detached(s: Small, h: Tensor) -> Tensor:
    now = s.table * 0.5 + h.mean(0)
    s.table.copy_(now.detach())
    return h * now


BUFFERS = Refusal(
    "buffers",
    "writes a value that requires a gradient into a buffer, in place",
    "the buffer would be a part of the next step's graph, too",
    "write its `detach()`, and compute with the value itself",
    (
        Example(
            "average",
            small(_adds),
            "into buffer 'table'",
            "add_(h.mean(0))",
            "detach",
            way=Way(small(_adds_detached)),
        ),
    ),
)


class Early(nn.Module):
    """Changes its input before anything else."""

    def __init__(self, change: object) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.change(x))  # type: ignore[operator]


def _with_gradient(model: nn.Module) -> object:
    leaf = torch.randn(4, 4, requires_grad=True)
    model(leaf * 1).square().sum().backward()
    return [leaf.grad, *results(model)]


def _square(model: nn.Module) -> object:
    return train(model, x=torch.randn(4, 4))


INPUTS = Refusal(
    "inputs",
    "changes an input that requires a gradient, or the shape of any input, in place",
    "the caller's tensor would change in another way than in eager",
    "work on `x.clone()`; give the view a name of its own",
    (
        Example(
            "values",
            lambda: Early(lambda x: x.mul_(2)),
            "changes input 'x'",
            "x.mul_(2)",
            "clone",
            _with_gradient,
            way=Way(lambda: Early(lambda x: x.clone().mul_(2)), _with_gradient),
        ),
        Example(
            "shape",
            lambda: Early(lambda x: x.t_()),
            "function call",
            "x.t_()",
            "another name",
            _square,
            way=Way(lambda: Early(lambda x: x.t()), _square),
        ),
    ),
)

SAVED = Refusal(
    "saved",
    "changes in place what its own backward needs",
    "eager refuses it too, in the backward",
    "the operator that is not in place",
    (
        Example(
            "sigmoid",
            small(lambda s, h: h.sigmoid().mul_(2)),
            "eager refuses in the backward.*Sigmoid",
            "mul_(2)",
            "not in place",
            way=Way(small(lambda s, h: h.sigmoid().mul(2)), same=False),
        ),
        Example(
            "inplace layers",
            small(lambda s, h: F.dropout(h.relu_(), 0.5, inplace=True).add_(1)),
            "eager refuses in the backward.*Relu",
            hint="not in place",
            way=Way(small(lambda s, h: F.dropout(h.relu(), 0.5) + 1), same=False),
        ),
    ),
)

ALL = (DATA, BUFFERS, INPUTS, SAVED)
