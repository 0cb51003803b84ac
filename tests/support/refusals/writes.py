"""Forward changes in place what it also differentiates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.refusals.example import Example, Refusal, Small, Way, results, small, train


def clips(s: Small, h: Tensor) -> Tensor:
    with torch.no_grad():
        s.lin.weight.clamp_(-0.1, 0.1)
    return F.linear(h, s.lin.weight)


def assigns(s: Small, h: Tensor) -> Tensor:
    s.lin.weight.data = s.lin.weight.data * 0.5
    return F.linear(h, s.lin.weight)


def scales(s: Small, h: Tensor) -> Tensor:
    s.lin.weight.data.mul_(0.5)
    return F.linear(h, s.lin.weight)


def clipped_copy(s: Small, h: Tensor) -> Tensor:
    weight = s.lin.weight
    return F.linear(h, weight + (weight.clamp(-0.1, 0.1) - weight).detach())


def _clips_after(model: nn.Module) -> object:
    found = train(model)
    with torch.no_grad():
        model.lin.weight.clamp_(-0.1, 0.1)
    return found


_OUTSIDE = "^change it outside of forward, or compute with a changed copy"
_AFTER = Way(small(lambda s, h: F.linear(h, s.lin.weight)), _clips_after, same=False)


class Words(nn.Module):
    def __init__(self, **options: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4, **options)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens)


def _tokens(model: nn.Module) -> object:
    return train(model, x=torch.tensor([1, 2]))


def _renormed(model: nn.Module) -> object:
    with torch.no_grad():
        weight = model.embed.weight
        weight[1:3] = weight[1:3].renorm(2, 0, 0.5)
    return _tokens(model)


PARAMETERS = Refusal(
    "parameters",
    "changes a parameter that is trained, also under `no_grad` or by `.data`; has an `Embedding` "
    "with `max_norm`",
    "the gradient would be the one of another value",
    "change it between the steps, or compute with a changed copy",
    (
        Example("clip", small(clips), "'lin.weight'", "clamp_(-0.1, 0.1)", _OUTSIDE, way=_AFTER),
        Example(
            "copy", small(clips), "in place", "clamp_", way=Way(small(clipped_copy), same=False)
        ),
        Example("assigned", small(assigns), r"`\.data`", "lin.weight.data =", _OUTSIDE, way=_AFTER),
        Example("data", small(scales), "'lin.weight'", "data.mul_(0.5)", _OUTSIDE, way=_AFTER),
        Example(
            "max_norm",
            lambda: Words(max_norm=0.5),
            "'embed.weight'",
            "self.embed(tokens)",
            _OUTSIDE,
            _tokens,
            way=Way(Words, _renormed),
        ),
    ),
)


def averages(s: Small, h: Tensor) -> Tensor:
    s.table.data = s.table.data * 0.9 + h.detach().mean(0) * 0.1
    return h * s.table


def averages_in_place(s: Small, h: Tensor) -> Tensor:
    with torch.no_grad():
        s.table.copy_(s.table * 0.9 + h.mean(0) * 0.1)
    return h * s.table.clone()


DATA = Refusal(
    "data",
    "assigns to the `.data` of other tensors",
    "the tensor gets another memory, of which the graph knows nothing",
    "`with torch.no_grad(): t.copy_(…)`",
    (
        Example(
            "average",
            small(averages),
            r"`\.data` of buffer 'table'",
            "s.table.data =",
            r"with torch\.no_grad\(\): tensor\.copy_",
            way=Way(small(averages_in_place)),
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

ALL = (PARAMETERS, DATA, INPUTS, SAVED)
