"""Parameters of a model that others take the place of, and the way back."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from graphopt.errors import StateError

# Parameters that no model has any more, while somebody holds them: by identity, with their names.
_gone: dict[int, tuple[weakref.ref[Tensor], str]] = {}
_watching: list[object] = []


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """All parameters; one that several modules have is there under each name.

    A module that the model has twice counts once.
    """
    return {
        f"{path}.{name}" if path else name: parameter
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


class Replaced:
    """Parametrizations on a model, until they are undone.

    Args:
        model: the model.
        parametrized: by name of a parameter, what makes it of others.
    """

    def __init__(self, model: nn.Module, parametrized: Mapping[str, nn.Module]) -> None:
        self._before: list[tuple[nn.Module, type, dict[str, Any], dict[str, Any]]] = []
        self._own: list[tuple[nn.Module, str]] = []
        self.old: dict[str, Tensor] = {}
        try:
            for name, made_by in parametrized.items():
                self._replace(model, name, made_by)
        except BaseException:
            self.undo()
            raise

    def _replace(self, model: nn.Module, name: str, made_by: nn.Module) -> None:
        path, _, tensor = name.rpartition(".")
        module = model.get_submodule(path)
        if all(module is not known for known, *_ in self._before):
            state = (module, type(module), dict(module._parameters), dict(module._modules))
            self._before.append(state)
        self.old[name] = getattr(module, tensor)
        self._own.append((module, tensor))
        # Unsafe leaves out a product to look at its shape.
        parametrize.register_parametrization(module, tensor, made_by, unsafe=True)
        made_by.train(module.training)

    def undo(self) -> None:
        """The model as it was, with the same parameters in the same order."""
        for module, tensor in reversed(self._own):
            parametrizations: Any = module._modules.get("parametrizations")
            if parametrizations is not None and tensor in parametrizations:
                del parametrizations[tensor]
        for module, kind, parameters, modules in self._before:
            for owner, tensor in self._own:
                if owner is module and type(module) is kind:
                    delattr(kind, tensor)  # it was parametrized before, so its class is its own
            module.__class__ = kind
            for table, old in ((module._parameters, parameters), (module._modules, modules)):
                table.clear()
                table.update(old)
        self._before, self._own, self.old = [], [], {}

    def settle(self) -> None:
        """Forget the old parameters, and refuse optimizers that hold one of them."""
        watch(self.old)
        self._before, self._own, self.old = [], [], {}


def watch(parameters: Mapping[str, Tensor]) -> None:
    """Let steps of optimizers that hold one of these raise: it would never change again."""
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_refuse))
    for name, parameter in parameters.items():
        key = id(parameter)
        gone = weakref.ref(parameter, lambda _, key=key: _gone.pop(key, None))  # type: ignore[misc]
        _gone[key] = (gone, name)


def _refuse(optimizer: Optimizer, args: object, kwargs: object) -> None:
    if _gone:
        check_optimizer(optimizer)


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise `StateError` for one that holds a parameter which was replaced."""
    held: Iterable[Tensor] = (p for group in optimizer.param_groups for p in group["params"])
    for parameter in held:
        found = _gone.get(id(parameter))
        if found is not None and found[0]() is parameter:
            raise StateError(
                f"this {type(optimizer).__name__} holds {found[1]!r}, in whose place optimize has "
                "put factors, so it would train nothing",
                hint="make the optimizer after graphopt.optimize, of model.parameters()",
            )
