"""Whether what a runtime part puts around a step gives as much as the step needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from graphopt.errors import PluginError
from graphopt.plan import Plan, Role, Slot
from graphopt.runtime.engine.step import Half

Make = Callable[..., Any]

# What a part may take off the results; everything else belongs to the model.
_OF_PARTS = (Role.AUX, Role.LOCAL)


def counted(owner: str, hook: str, make: object) -> Make:
    """What a hook of the part `owner` has made, with its results counted at every call.

    Raises:
        PluginError: from what is made, where a result is missing; names the part.
    """
    if not callable(make):
        raise PluginError(
            f"{hook}() of the runtime part of {owner!r} returned a {type(make).__name__}",
            hint="return a function that makes what runs, such as `below`",
        )
    if hook == "engine":

        def engine(module: Any, plan: Plan) -> Callable[..., Any]:
            outputs = sum(slot.role is Role.OUTPUT for slot in plan.signature.outputs)
            return Counted(owner, hook, make(module, plan), outputs + len(plan.aliases))

        return engine

    def half(half: Half) -> Callable[..., Any]:
        inner = make(half)
        returns = getattr(inner, "returns", None)
        given = set(returns or ())
        lacking = [s for s in half.slots if s.role not in _OF_PARTS and s not in given]
        if returns is None or lacking:
            what = f"lacks {_words(lacking[0])}" if returns is not None else "is missing"
            raise PluginError(
                f"`returns` of the {hook} of the runtime part of {owner!r} {what}",
                hint="let it be `returns` of what is below, without the AUX results taken off",
            )
        saved = len(half.module.graph.output_node().args[0]) - len(half.slots)  # type: ignore[arg-type]
        return Counted(owner, hook, inner, len(returns) + saved, returns)

    return half


class Counted:
    """One layer around a step.

    Attributes:
        inner: what is counted.
    """

    def __init__(
        self,
        owner: str,
        hook: str,
        inner: Callable[..., Any],
        count: int,
        returns: Sequence[Slot] = (),
    ) -> None:
        self.returns = tuple(returns)
        self._owner, self._hook, self.inner, self._count = owner, hook, inner, count

    def __call__(self, *args: Any) -> Any:
        """Call what is below, and count."""
        results = self.inner(*args)
        given = len(results) if isinstance(results, (list, tuple)) else None
        if given != self._count:
            found = f"a {type(results).__name__}" if given is None else f"{given} results"
            raise PluginError(
                f"the runtime part of {self._owner!r} returned {found} from its {self._hook}, and "
                f"the step needs {self._count}",
                hint="return all results of what is below, in order, with the values it saves "
                "behind them; only AUX results of the part's own may be taken off",
            )
        return results


def _words(slot: Slot) -> str:
    return f"{slot.role.value} {slot.name!r}"
