"""Models and steps that the tests of flexpoint share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.model.controller import controller_of
from graphopt.plan.flexpoint import FlexTensors
from graphopt.runtime.session import Session


def small_net() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Three layers in float32 with an example batch."""
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)]
    return nn.Sequential(*layers), (torch.randn(8, 4),)


class ConvNet(nn.Module):
    """A convolution, a norm, a pooling and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Linear(128, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(torch.relu(self.norm(self.conv(x))), 2).flatten(1)
        return self.head(F.gelu(self.mix(h)))


def conv_net() -> ConvNet:
    """The same one each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvNet()


def batch(step: int = 0, size: int = 16) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(size, 3, 8, 8, generator=generator)
    return images, torch.randint(0, 10, (size,), generator=generator)


def train(model: nn.Module, steps: int, *, first: int = 0, lr: float = 0.1) -> list[float]:
    """Losses of so many steps of plain gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for step in range(first, first + steps):
        images, labels = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def session_of(model: nn.Module) -> Session:
    """What an optimized model keeps."""
    controller = controller_of(model)
    assert controller is not None
    return controller.session


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The state of flexpoint."""
    return session_of(model).state("flexpoint")


def part_of(model: nn.Module) -> FlexTensors:
    """What was decided for the first kind of call."""
    controller = controller_of(model)
    assert controller is not None
    part = controller.variants[0].entry.plan.part(FlexTensors)
    assert part is not None
    return part


def gradients(model: nn.Module) -> Tensor:
    """All gradients, in double precision and one row."""
    found = [p.grad for p in model.parameters()]
    return torch.cat([g.double().flatten() for g in found if g is not None])
