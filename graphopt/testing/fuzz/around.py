"""What daily code puts around a layer: reuse, contexts, hooks, frozen parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graphopt.capture import is_uninitialised


class _Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Twice(_Around):
    """The same layer again on its own result."""

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.inner(self.inner(h))
        return y


class Residual(_Around):
    """Around which the value goes on."""

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = h + self.inner(h)
        return y


class Checkpointed(_Around):
    """Computed again in backward."""

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = checkpoint(self.inner, h, use_reentrant=False)
        return y


class CheckpointedReentrant(_Around):
    """Computed again in backward, by the older way."""

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = checkpoint(self.inner, h, use_reentrant=True)
        return y


class NoGrad(_Around):
    """Without gradients."""

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        with torch.no_grad():
            y: Tensor = self.inner(h)
        return h + y


class Autocast(_Around):
    """In bfloat16 where autocast says so."""

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: Tensor = self.inner(h)
        return y.float()


class AlwaysEval(_Around):
    """A part that stays in eval mode."""

    def train(self, mode: bool = True) -> AlwaysEval:  # noqa: D102
        super().train(mode)
        self.inner.eval()
        return self

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.inner(h)
        return y


def frozen(inner: nn.Module) -> nn.Module:
    """Parameters without gradients."""
    if not is_uninitialised(inner):
        inner.requires_grad_(False)
    return inner


def changed_by_a_hook(inner: nn.Module) -> nn.Module:
    """A forward hook that returns another value."""
    inner.register_forward_hook(lambda _module, _args, output: output * 0.5)
    return inner


def changed_by_a_pre_hook(inner: nn.Module) -> nn.Module:
    """A forward pre-hook that returns other arguments."""
    inner.register_forward_pre_hook(lambda _module, args: (args[0] + 0.25,))
    return inner


def recorded_by_a_hook(inner: nn.Module) -> nn.Module:
    """A forward hook that keeps what passes."""
    outer = Seen(inner)

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        outer.seen.append(output.detach().mean())
        outer.last = output

    inner.register_forward_hook(keep)
    return outer


class Seen(_Around):
    """Holds what the hook of its inner layer records."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.seen: list[Tensor] = []
        self.last: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.inner(h)
        return y


def with_a_backward_hook(inner: nn.Module) -> nn.Module:
    """A full backward hook that changes the gradient."""

    def halve(_module: nn.Module, gradients: Any, _outputs: Any) -> Any:
        return tuple(None if g is None else g * 0.5 for g in gradients)

    inner.register_full_backward_hook(halve)
    return inner


def spectral(inner: nn.Module) -> nn.Module:
    """A parametrisation with state on each linear layer."""
    for module in inner.modules():
        if type(module) is nn.Linear:
            nn.utils.parametrizations.spectral_norm(module)
    return inner


AROUND: dict[str, Callable[[nn.Module], nn.Module]] = {
    "": lambda inner: inner,
    "residual": Residual,
    "twice": Twice,
    "no_grad": NoGrad,
    "autocast": Autocast,
    "frozen": frozen,
    "always_eval": AlwaysEval,
    "checkpoint": Checkpointed,
    "checkpoint_reentrant": CheckpointedReentrant,
    "hook_changes": changed_by_a_hook,
    "pre_hook_changes": changed_by_a_pre_hook,
    "hook_records": recorded_by_a_hook,
    "spectral_norm": spectral,
    "backward_hook": with_a_backward_hook,
}
"""By name; the plain layer comes first, because failures shrink towards it."""
