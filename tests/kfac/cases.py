"""Micro-models in double precision with data and loss.

All take one tensor whose first dimension is the batch and are smooth enough that a preconditioned
gradient can be compared to eight digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.kfac import models

BATCH = 4


@dataclass(frozen=True)
class Case:
    """A model with one batch.

    Attributes:
        name: which one.
        model: in training mode and double precision.
        x: its input, of shape [batch, ...].
        target: what `criterion` compares the output with.
        criterion: mean over the batch.
    """

    name: str
    model: nn.Module
    x: Tensor
    target: Tensor
    criterion: nn.Module

    def loss(self, output: Tensor) -> Tensor:
        """The scalar that is differentiated."""
        value: Tensor = self.criterion(output, self.target)
        return value

    def parameters(self) -> dict[str, Tensor]:
        """Detached copies by name; a shared one appears once."""
        named = self.model.named_parameters()
        return {name: p.detach().clone().requires_grad_() for name, p in named}


def _image(convolution: nn.Module) -> nn.Module:
    return models.ConvHead(convolution)


def _norm(norm: nn.Module) -> nn.Module:
    return models.NormHead(nn.Conv2d(2, 4, 3), norm, channels_last=False)


def _tokens(norm: nn.Module) -> nn.Module:
    return models.NormHead(nn.Linear(5, 4), norm, channels_last=True)


# Model and shape of its input without the batch.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (models.mlp, (5,)),
    "conv": (lambda: _image(nn.Conv2d(2, 4, 3, stride=2, padding=1)), (2, 5, 4)),
    "fused_attention": (models.FusedAttention, (3, 4)),
    "checkpoint": (models.Checkpointed, (5,)),
    "conv_same": (lambda: _image(nn.Conv2d(2, 4, 3, padding="same")), (2, 4, 4)),
    "conv_dilation": (lambda: _image(nn.Conv2d(2, 4, 2, dilation=2)), (2, 5, 4)),
    "conv_groups": (lambda: _image(nn.Conv2d(4, 6, 2, groups=2)), (4, 4, 3)),
    "batch_norm": (lambda: _norm(nn.BatchNorm2d(4)), (2, 4, 5)),
    "layer_norm": (lambda: _tokens(nn.LayerNorm(4)), (3, 5)),
    "shared_linear": (models.SharedLinear, (5,)),
    "raw_parameters": (models.RawParameters, (5,)),
    "conv1d": (lambda: _image(nn.Conv1d(3, 4, 3, padding=1)), (3, 5)),
    "lstm": (models.Lstm, (3, 3)),
    "attention": (models.Attention, (3, 4)),
    "tied_embedding": (models.Tied, (3,)),
    "in_place": (models.in_place, (5,)),
    "group_norm": (lambda: _norm(nn.GroupNorm(2, 4)), (2, 4, 5)),
    "rms_norm": (lambda: _tokens(nn.RMSNorm(4, eps=1e-5)), (3, 5)),
    "conv_transposed": (
        lambda: _image(nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1)),
        (2, 3, 2),
    ),
    "conv3d": (lambda: _image(nn.Conv3d(2, 3, 2)), (2, 3, 3, 2)),
    # Beyond the twenty: what hides in two of them.
    "lstm_cell": (models.LstmCell, (3, 3)),
    "embedding": (models.Embedded, (3,)),
}
NAMES = tuple(MODELS)
TWENTY = NAMES[:20]


def case(name: str, batch: int = BATCH) -> Case:
    """The micro-model with parameters and data that do not depend on who asked before."""
    make, shape = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(NAMES.index(name))
        model = make().double()
        if "embedding" in name:
            x = torch.randint(0, 7, (batch, *shape))
        else:
            x = torch.randn(batch, *shape, dtype=torch.float64)
        if name == "mlp":
            return Case(name, model, x, torch.randint(0, 3, (batch,)), nn.CrossEntropyLoss())
        width = 3 * 7 if name == "tied_embedding" else 4 if "attention" in name else 3
        target = torch.randn(batch, width, dtype=torch.float64)
        return Case(name, model, x, target, nn.MSELoss())


def pieces(one: Case) -> Iterator[Case]:
    """The same model on each example alone."""
    for index in range(one.x.shape[0]):
        part = slice(index, index + 1)
        yield Case(one.name, one.model, one.x[part], one.target[part], one.criterion)
