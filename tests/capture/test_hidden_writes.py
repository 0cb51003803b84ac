"""Weights that forward changes where autograd does not see it: steps are eager's, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.errors import CaptureError
from graphopt.model.report import Report
from graphopt.model.surface import report


class Net(nn.Module):
    def __init__(self, body: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.key = nn.Linear(4, 4).requires_grad_(False)
        self.words = nn.Embedding(6, 4, max_norm=0.5)
        self.bags = nn.EmbeddingBag(6, 4, max_norm=0.5, norm_type=1.0)
        self.register_buffer("mask", torch.eye(4))
        self.register_buffer("mean", torch.zeros(4))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def clips(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.lin.weight.clamp_(-0.1, 0.1)
    return net.lin(x)


def normalises(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.lin.weight.div_(net.lin.weight.norm(dim=1, keepdim=True))
    return net.lin(x)


def between(net: Net, x: Tensor) -> Tensor:
    y = net.lin(x)
    with torch.no_grad():
        net.lin.weight.mul_(0.5)
    return y + net.lin(x)


def only_written(net: Net, x: Tensor) -> Tensor:
    net.lin.bias.data.zero_()
    return x @ net.lin.weight


def by_data(net: Net, x: Tensor) -> Tensor:
    net.lin.weight.data.clamp_(-0.1, 0.1)
    net.lin.weight.data[0] = 0
    net.lin.weight.data *= 0.9
    net.lin.weight.detach().masked_fill_(net.mask.bool(), 0)
    return net.lin(x)


def assigns(net: Net, x: Tensor) -> Tensor:
    net.lin.weight.data = F.normalize(net.lin.weight.data, dim=1)
    net.mean.data = net.mean.data * 0.9 + x.mean(0) * 0.1
    return net.lin(x) + net.mean


def assigns_twice(net: Net, x: Tensor) -> Tensor:
    net.lin.weight.data = net.lin.weight.data * 0.5
    net.lin.weight.data = net.lin.weight.data + 1
    return net.lin(x)


def averages(net: Net, x: Tensor) -> Tensor:
    for query, key in zip(net.lin.parameters(), net.key.parameters(), strict=True):
        key.data = key.data * 0.9 + query.data * 0.1
    return net.lin(x) - net.key(x)


def embeds(net: Net, x: Tensor) -> Tensor:
    return net.lin(net.words(torch.tensor([0, 1, 1, 5])))


def embeds_bags(net: Net, x: Tensor) -> Tensor:
    return net.lin(net.bags(torch.tensor([[0, 1], [1, 5]]))) + net.words.weight.sum()


def embeds_frozen(net: Net, x: Tensor) -> Tensor:
    return net.lin(F.embedding(torch.tensor([1, 2]), net.key.weight, max_norm=0.3))


WRITES = [
    *(clips, normalises, between, only_written, by_data, assigns),
    *(assigns_twice, averages),
    *(embeds, embeds_bags, embeds_frozen),
]


def _train(net: nn.Module, steps: int = 3) -> list[Tensor]:
    torch.manual_seed(1)
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.5)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        y = net(torch.randn(3, 4))
        y.square().sum().backward()
        gradients = [torch.zeros(()) if p.grad is None else p.grad for p in parameters]
        found += [t.detach().clone() for t in (y, *gradients, *net.state_dict().values())]
        optimizer.step()
    net.eval()
    with torch.no_grad():
        found += [net(torch.randn(3, 4)).clone(), *map(torch.clone, net.state_dict().values())]
    return found


def _same(body: Callable[[Net, Tensor], Tensor], **options: object) -> Report:
    torch.manual_seed(0)
    net = Net(body)
    eager = _train(copy.deepcopy(net))
    options = {"backend": "eager", "passes": "cleanup", "cache": "off"} | options
    graphopt.optimize(net, **options)  # type: ignore[call-overload]
    for actual, expected in zip(_train(net), eager, strict=True):
        assert torch.equal(actual, expected)
    return report(net)


@pytest.mark.parametrize("body", WRITES, ids=lambda body: body.__name__)
def test_steps_are_eagers(body: Callable[[Net, Tensor], Tensor]) -> None:
    found = _same(body)
    assert not found.plain
    assert len(found.specialisations) == 2  # training, and evaluation


def test_schedule_and_grouping_keep_it() -> None:
    _same(clips, passes="cleanup,schedule{link=10gbe}")


def test_what_another_tensor_has_is_refused_and_left_alone() -> None:
    net = Net(assigns)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    old = net.lin.weight.detach()  # would see the new values
    graphopt.optimize(net, backend="eager", cache="off")
    with pytest.raises(CaptureError, match=r"`\.data` of param 'lin.weight', and another"):
        net(torch.randn(3, 4))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    assert old.data_ptr() == net.lin.weight.data_ptr()


def test_a_call_whose_memory_another_tensor_has_runs_plain() -> None:
    net = graphopt.optimize(Net(assigns), backend="eager", passes="cleanup", cache="off")
    net(torch.randn(3, 4))
    old = net.lin.weight.detach()
    before = old.clone()
    net(torch.randn(3, 4))
    assert torch.equal(old, before)
    assert old.data_ptr() != net.lin.weight.data_ptr()


def test_the_gradient_of_a_weight_that_is_only_written_is_none() -> None:
    net = graphopt.optimize(Net(only_written), backend="eager", cache="off")
    net(torch.randn(3, 4)).sum().backward()
    assert net.lin.bias.grad is None
    assert net.lin.weight.grad is not None


# -- draws that are checked ------------------------------------------------------------------------


def samples(net: Net, x: Tensor) -> Tensor:
    categorical = D.Categorical(logits=net.lin(x))
    action = categorical.sample()
    return categorical.log_prob(action) + categorical.entropy()


def straight_through(net: Net, x: Tensor) -> Tensor:
    return D.OneHotCategoricalStraightThrough(logits=net.lin(x)).rsample()


def gaussian(net: Net, x: Tensor) -> Tensor:
    h = net.lin(x)
    normal = D.MultivariateNormal(torch.zeros(3), h @ h.t() + torch.eye(3))
    return normal.rsample() + normal.log_prob(torch.ones(3))


@pytest.mark.parametrize("body", [samples, straight_through, gaussian], ids=lambda b: b.__name__)
def test_distributions_with_validation_draw_once(body: Callable[[Net, Tensor], Tensor]) -> None:
    assert not _same(body).plain


def test_a_covariance_that_is_not_definite_raises_eagers_error() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        covariance = net.lin(x).sum() * 0 - torch.eye(4)
        return D.MultivariateNormal(x, covariance).rsample()

    net = Net(body)
    with pytest.raises(ValueError, match="PositiveDefinite"):
        net(torch.randn(3, 4))
    graphopt.optimize(net, backend="eager", cache="off")
    with pytest.raises(ValueError, match="PositiveDefinite"):
        net(torch.randn(3, 4))
