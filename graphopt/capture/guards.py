"""Whether a call is one that a capture was made for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import CodeType
from typing import Any

from torch._dynamo.guards import get_verbose_code_part
from torch.nn.modules import module as of_all_modules

from graphopt.capture.flat import first_line
from graphopt.capture.sizes import Conditions


class Guard:
    """Dynamo's complete guards as a predicate on ``(model, *args, **kwargs)``.

    They cover shapes, dtypes, devices, ``requires_grad``, ``training``, grad mode, autocast, hooks,
    and every Python value that forward read. Hooks on all modules, which Dynamo does not guard,
    must be those that there were.
    """

    manager: Any = None  # Dynamo's own
    constants: Constants | None = None  # numbers that must be what they were
    late: Conditions | None = None  # found after Dynamo's were built
    # Reads the sizes that are symbols off the variables of a call.
    reading: Callable[[dict[str, object]], tuple[int, ...]] | None = None

    def __init__(self, forward: Callable[..., object]) -> None:
        # The guards speak of the variables of the code itself, whatever function it wraps.
        self._signature = inspect.signature(forward, follow_wrapped=False)
        parameters = self._signature.parameters.values()
        plain = all(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in parameters)
        cells = zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True)
        # Cells, not what they hold: it may be another value at each call.
        self._cells = tuple(cells)
        self._names = tuple(self._signature.parameters) if plain and not self._cells else ()
        self._hooks = _hooks_on_all_modules()
        either, named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        rest = inspect.Parameter.VAR_KEYWORD
        usual = all(p.kind in (either, named, rest) for p in parameters)
        self._positional = [p.name for p in parameters if p.kind is either] if usual else None
        self._keywords = {p.name for p in parameters if p.kind in (either, named)}
        self._rest = next((p.name for p in parameters if p.kind is rest), "")
        self._defaults = [(p.name, p.default) for p in parameters if p.default is not p.empty]

    def __call__(self, *args: object, **kwargs: object) -> bool:
        """Whether every guard holds for this call."""
        variables = self.variables(args, kwargs)
        if variables is None or _hooks_on_all_modules() != self._hooks:
            return False
        holds = bool(self.manager.check(variables))
        return holds and (self.late is None or self.late(variables))

    def failure(self, *args: object, **kwargs: object) -> str:
        """The first guard that does not hold for a call, as Dynamo words it."""
        variables = self.variables(args, kwargs)
        if variables is None:
            return "the arguments do not fit"
        if _hooks_on_all_modules() != self._hooks:
            return "a hook on all modules was added or removed"
        parts = self.manager.check_verbose(variables).verbose_code_parts
        if not parts and self.late is not None and not self.late(variables):
            return f"a pass or a backend holds for {self.late} only"
        return first_line(parts[0]) if parts else ""

    def sizes(self, *args: object, **kwargs: object) -> tuple[int, ...]:
        """The sizes of a call that are symbols of the graph; the call is one that it is for."""
        variables = self.variables(args, kwargs) if self.reading is not None else None
        return self.reading(variables) if self.reading and variables is not None else ()

    def changed(self, *args: object, **kwargs: object) -> tuple[str, ...]:
        """The numbers that are other ones in a call, as conditions that do not hold."""
        variables = self.variables(args, kwargs)
        return self.constants.changed(variables) if variables and self.constants else ()

    def variables(
        self, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> dict[str, object] | None:
        """The variables of forward's code in a call; nothing where its arguments do not fit."""
        if not kwargs and len(args) == len(self._names):
            return dict(zip(self._names, args, strict=True))
        bound = self._bound(args, kwargs)
        if bound is None:
            return None
        try:
            closure = {name: cell.cell_contents for name, cell in self._cells}
        except ValueError:  # a variable that was deleted
            return None
        return {**closure, **bound}

    def _bound(
        self, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> dict[str, object] | None:
        """The arguments by name, with defaults; ``None`` where they do not fit.

        `inspect.Signature.bind` takes longer than all guards of a small model.
        """
        if self._positional is None:
            try:
                whole = self._signature.bind(*args, **kwargs)
            except TypeError:
                return None
            whole.apply_defaults()
            return whole.arguments
        if len(args) > len(self._positional):
            return None
        bound = dict(zip(self._positional, args, strict=False))
        others: dict[str, object] = {}
        for name, value in kwargs.items():
            if name in bound:
                return None
            if name in self._keywords:
                bound[name] = value
            else:
                others[name] = value
        for name, default in self._defaults:
            bound.setdefault(name, default)
        if self._rest:
            bound[self._rest] = others
        elif others:
            return None
        return bound if len(bound) == len(self._signature.parameters) else None


class Constants:
    """The numbers that a captured call holds for.

    Args:
        guards: of Dynamo.
        scope: the variables of the captured call (``L``) and of its module (``G``).
    """

    def __init__(self, guards: Iterable[Any], scope: Mapping[str, Any]) -> None:
        self._globals = {"G": scope["G"]}
        self._read: list[tuple[CodeType, object, str]] = []
        for guard in guards:
            if guard.create_fn_name() in ("CONSTANT_MATCH", "EQUALS_MATCH"):
                source = guard.originating_source.name
                code = compile(source, "<a number>", "eval")
                value = self._value(code, scope["L"])
                if type(value) in (int, float):
                    line = get_verbose_code_part(f"{source} == {value!r}", guard)
                    self._read.append((code, value, line))

    def changed(self, variables: Mapping[str, object]) -> tuple[str, ...]:
        """What does not hold for a call with these variables."""
        found = ((self._value(code, variables), value, line) for code, value, line in self._read)
        return tuple(line for new, old, line in found if type(new) is type(old) and new != old)

    def _value(self, code: CodeType, variables: Mapping[str, object]) -> object:
        try:
            return eval(code, {**self._globals, "L": variables})
        except Exception:  # it is not there in this call, or only Dynamo can read it
            return None


_HOOKS: tuple[dict[int, Callable[..., Any]], ...] = (
    of_all_modules._global_forward_pre_hooks,
    of_all_modules._global_forward_hooks,
    of_all_modules._global_backward_pre_hooks,
    of_all_modules._global_backward_hooks,
)


def _hooks_on_all_modules() -> tuple[object, ...]:
    """The hooks that are called around every module there is, in order."""
    return tuple(hook for hooks in _HOOKS for hook in hooks.items()) if any(_HOOKS) else ()
