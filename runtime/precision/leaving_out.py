"""Have an optimizer leave out a step, whatever else has been added to its gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook


class LeavingOut:
    """Parameters whose next optimizer step is left out.

    A backward that overflows gives no gradients, but others before the same optimizer step may:
    micro-batches of a plain loop, two calls of one model under one loss, zeros that a wrapper puts
    in their place. Right before the step these gradients are removed, so that it skips them.
    """

    def __init__(self) -> None:
        self._parameters: dict[int, Tensor] = {}
        self._hook: Any = None

    def add(self, parameters: Iterable[Tensor]) -> None:
        """Leave these out once, each when the optimizer that it belongs to steps."""
        self._parameters = {id(p): p for p in parameters}
        if self._hook is None:
            self._hook = register_optimizer_step_pre_hook(self._remove)

    def _remove(self, optimizer: Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if self._parameters.pop(id(parameter), None) is not None:
                    parameter.grad = None
        if not self._parameters:
            self._hook.remove()
            self._hook = None
