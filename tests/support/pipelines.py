"""Steps that stages on ranks are compared with: plain PyTorch, one micro-batch after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

Loss = Callable[[Any, Any], Tensor]


class Residual(nn.Module):
    """Layers with a skip connection over most of them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a = nn.Linear(8, width)
        self.b = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.c = nn.Linear(width, width)
        self.d = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of three classes for rows of eight numbers."""
        first = torch.relu(self.a(x))
        second = torch.tanh(self.c(self.norm(torch.relu(self.b(first)))))
        scores: Tensor = self.d(second + first)
        return scores


def data(step: int, examples: int = 16) -> tuple[Tensor, Tensor]:
    """A batch for `Residual`, another one for each step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(examples, 8, generator=generator)
    return x, torch.randint(0, 3, (examples,), generator=generator)


def alone() -> dist.ProcessGroup:
    """This rank without the others, for a model that is optimized in one process of a job."""
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    assert group is not None
    return group


def accumulated(
    model: nn.Module,
    loss: Loss | None,
    optimizer: Optimizer | None,
    batch: Sequence[Any],
    count: int,
    *,
    reduction: str = "mean",
    **kwargs: Any,
) -> Tensor:
    """One step of a plain model, whose micro-batches are what `torch.tensor_split` gives.

    Returns:
        The loss of the batch.
    """
    leaves, form = tree_flatten((tuple(batch), kwargs))
    examples = next(leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor))
    parts = min(count, examples)
    cut = [
        torch.tensor_split(leaf, parts)
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == examples
        else [leaf] * parts
        for leaf in leaves
    ]
    if optimizer is not None:
        optimizer.zero_grad()
    losses = []
    for number in range(parts):
        args, named = tree_unflatten([some[number] for some in cut], form)
        size = examples // parts + (number < examples % parts)
        if loss is None:
            output = model(*args, **named)
            found = output if isinstance(output, Tensor) else output["loss"]
        else:
            found = loss(model(*args[:-1], **named), args[-1])
        found = found * (size / examples if reduction == "mean" else 1.0)
        with torch.autocast("cpu", enabled=False):
            found.backward()
        losses.append(found.detach().float())
    if optimizer is not None:
        optimizer.step()
    return torch.stack(losses).sum()


def without_dropout(model: nn.Module) -> nn.Module:
    """The model, whose dropout keeps everything: stages draw other numbers than the whole."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]
    return model


def differing(one: nn.Module, other: nn.Module, *, tolerance: float = 0.0) -> list[str]:
    """Names of what two models have different values of, parameters and buffers."""
    theirs = other.state_dict()
    return [
        f"{name} by {(value.double() - theirs[name].double()).abs().max():.3g}"
        for name, value in one.state_dict().items()
        if not torch.allclose(
            value.double(), theirs[name].double(), rtol=tolerance, atol=tolerance, equal_nan=True
        )
    ]
