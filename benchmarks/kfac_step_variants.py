"""Models and training steps for `benchmarks.kfac_step`: plain SGD, `kfac`, and other libraries.

A step is everything between two batches: clear the gradients, forward, loss, backward, the
curvature, and plain SGD. The learning rate is small enough that a thousand steps change nothing.

- kfac-pytorch: https://github.com/gpauloski/kfac-pytorch, ``kfac``;
- ASDL: https://github.com/kazukiosawa/asdl, ``asdfghjkl`` on PyPI, ``asdl``.
"""

from __future__ import annotations

import copy
import itertools
import logging
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt

Step = Callable[[], object]
LEARNING_RATE = 1e-6
DAMPING = 1e-3


@dataclass(frozen=True)
class Task:
    """A model and the one batch that it is trained on.

    Attributes:
        model: takes `x`, gives logits ``[n, classes]`` or ``[n, positions, classes]``.
        x: images ``[n, ...]`` or tokens ``[n, positions]``.
        y: labels, ``[n]`` or ``[n, positions]``.
    """

    model: nn.Module
    x: Tensor
    y: Tensor

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean cross entropy."""
        return F.cross_entropy(output.flatten(0, -2), y.flatten())


class _Attention(nn.Module):
    """Causal self-attention and a feed-forward part, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        n, positions, width = h.shape
        parts = self.qkv(self.norm1(h)).chunk(3, -1)
        q, k, v = (t.view(n, positions, self.heads, -1).transpose(1, 2) for t in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).reshape(n, positions, width))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class SmallGPT(nn.Module):
    """A decoder-only transformer in plain modules, as hooks of other libraries need them."""

    def __init__(self, vocabulary: int, positions: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(_Attention(width, 4) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape)
        return self.head(self.norm(self.blocks(self.tokens(x) + self.places(places))))


class _Residual(nn.Module):
    """Two 3x3 convolutions with batch norm, and a 1x1 convolution beside where shapes change."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = outputs // inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.beside: nn.Module = nn.Identity()
        if stride > 1:
            self.beside = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.beside(x))


class SmallResNet(nn.Module):
    """Three stages of `blocks` residual blocks, as ResNets for CIFAR have them."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        widths = [width * 2**stage for stage in range(3) for _ in range(blocks)]
        before = [width, *widths]
        self.blocks = nn.Sequential(*map(_Residual, before, widths))
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(h.mean((2, 3)))


def mlp(batch: int, widths: tuple[int, ...] = (784, 256, 256, 10)) -> Task:
    """Linear layers and ReLUs."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    x, y = torch.randn(batch, widths[0]), torch.randint(widths[-1], (batch,))
    return Task(nn.Sequential(*layers[:-1]), x, y)


def resnet(batch: int, width: int = 16, blocks: int = 1, size: int = 32) -> Task:
    """Images of `size` by `size`, ten classes."""
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    return Task(SmallResNet(width, blocks), x, y)


def gpt(batch: int, positions: int = 64, width: int = 128, layers: int = 2) -> Task:
    """Characters."""
    torch.manual_seed(0)
    x, y = (torch.randint(96, (batch, positions)) for _ in range(2))
    return Task(SmallGPT(96, positions, width, layers), x, y)


# -- steps -----------------------------------------------------------------------------------------


def _training(task: Task, model: nn.Module, between: Step = lambda: None) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        task.loss(model(task.x), task.y).backward()
        between()
        optimizer.step()

    return step


def pytorch(task: Task) -> Step:
    """Plain SGD in eager mode."""
    return _training(task, copy.deepcopy(task.model))


def optimized(task: Task, passes: str, backend: str = "eager") -> tuple[Step, nn.Module]:
    """A step of `graphopt`, and its model."""
    model = graphopt.optimize(copy.deepcopy(task.model), passes=passes, backend=backend)
    return _training(task, model), model


def kfac_spec(interval: int | str) -> str:
    """The pass as it is measured."""
    return f"kfac{{damping={DAMPING},interval={interval}}}"


def kfac_pytorch(task: Task, interval: int, method: str) -> Step:
    """`KFACPreconditioner` with its clipping off, which the others do not have."""
    from kfac.preconditioner import KFACPreconditioner

    model = copy.deepcopy(task.model)
    preconditioner = KFACPreconditioner(
        model,
        factor_update_steps=interval,
        inv_update_steps=interval,
        damping=DAMPING,
        kl_clip=lambda _: None,
        compute_method=method,
        loglevel=logging.NOTSET,
    )
    return _training(task, model, preconditioner.step)


def asdl(task: Task, interval: int) -> Step:
    """`KfacGradientMaker` with the empirical Fisher and no running mean, its fastest form.

    In this form it refuses embeddings: they keep their plain gradients.
    """
    from asdl import FISHER_EMP, KfacGradientMaker, PreconditioningConfig

    model = copy.deepcopy(task.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    config = PreconditioningConfig(
        data_size=task.x.shape[0],
        damping=DAMPING,
        preconditioner_upd_interval=interval,
        ignore_modules=[nn.Embedding],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # containers that it does not precondition
        maker = KfacGradientMaker(model, config, fisher_type=FISHER_EMP)
    # It marks ranges even where there is no GPU.
    silent = types.SimpleNamespace(rangePushA=lambda _: 0, rangePop=lambda: 0)

    def step() -> None:
        optimizer.zero_grad()
        output = maker.setup_model_call(model, task.x)
        maker.setup_loss_call(_flat_cross_entropy, output, task.y)
        with mock.patch("torch.cuda.nvtx._nvtx", silent):
            maker.forward_and_backward()
        optimizer.step()

    return step


def _flat_cross_entropy(output: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """With a reduction of its own, as ASDL asks for."""
    return F.cross_entropy(output.flatten(0, -2), y.flatten(), reduction=reduction)


def peers(task: Task, interval: int) -> dict[str, Step]:
    """One step of each library that is installed and takes the model, by name."""
    makers: dict[str, Callable[[], Step]] = {
        "kfac-pytorch eigen": lambda: kfac_pytorch(task, interval, "eigen"),
        "kfac-pytorch inverse": lambda: kfac_pytorch(task, interval, "inverse"),
        "ASDL": lambda: asdl(task, interval),
    }
    found: dict[str, Step] = {}
    for name, make in makers.items():
        try:
            step = make()
            for _ in range(2):
                step()
        except ModuleNotFoundError:
            continue
        except Exception as error:  # of any kind: the model is left out of its column, and it shows
            print(f"  {name} does not take this model: {type(error).__name__}: {error}", flush=True)
            continue
        found[f"{name}, interval {interval}"] = step
    return found
