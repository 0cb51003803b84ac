"""A model that trains, though its optimized forward is not what is called.

A trainer may call parts of a model, or another method of it: then all of it runs as plain PyTorch,
and nothing else would tell.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from graphopt.notices import warn


class Unrun:
    """Waits for the first gradient of a model, until its forward has run.

    Args:
        model: with parameters, optimized just now.
        note: keeps the sentence for the report.
    """

    def __init__(self, model: nn.Module, note: Callable[[str], None]) -> None:
        self._name, self._note, self._said = type(model).__name__, note, False
        self._parts = [
            n for n, part in model.named_children() if next(part.parameters(), None) is not None
        ]
        made = (p for p in model.parameters() if not is_lazy(p))
        parameter = next((p for p in made if p.requires_grad and p.is_leaf), None)
        self._handle: RemovableHandle | None = None
        if parameter is not None:
            hook = parameter.register_post_accumulate_grad_hook
            self._handle = hook(self._arrived)  # type: ignore[no-untyped-call]

    def _arrived(self, _: Tensor) -> None:
        if self._said or self._handle is None:
            return
        self._said = True
        said = (
            f"{self._name} gets gradients, and its optimized forward was never called: parts or "
            "other methods of it are, and run as plain PyTorch"
        )
        self._note(said)
        part = f" (graphopt.optimize(model.{self._parts[0]}))" if self._parts else ""
        warn(f"{said}. Optimize what is called{part}, or call the model itself.")

    def remove(self) -> None:
        """Wait no longer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
