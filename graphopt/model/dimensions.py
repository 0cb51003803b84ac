"""Which sizes of a model's calls vary: what was declared, and what was seen."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from graphopt.capture.sizes import NONE, Dimensions, Size
from graphopt.errors import CaptureError
from graphopt.model.declared import Declared
from graphopt.model.kinds import kind_of
from graphopt.model.tensors import tensors_of
from graphopt.model.trial import named_arguments

Shapes = Mapping[str, tuple[int, ...]]


class Seen:
    """Which sizes of one model's calls vary, and which of them cannot be symbols.

    Args:
        declared: what the user says.

    Attributes:
        limited: whether a call may break what was declared.
        notes: why sizes stay constants, by where.
    """

    def __init__(self, declared: Declared) -> None:
        self.declared = declared
        self.limited = declared.limited
        self.notes: dict[str, str] = {}
        self._declared: set[str] = set()
        self._varied: set[tuple[str, int]] = set()
        self._pending: set[tuple[str, int]] = set()
        self._fixed: set[tuple[str, int]] = set()
        self._refused: set[Hashable] = set()
        self._calls: list[tuple[Hashable, Shapes]] = []

    def look(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, tuple[int, int]]:
        """Compare a call with those that were captured in its mode.

        Only the captured call that differs in the fewest sizes counts; of two such, the later one.

        Returns:
            the sizes that differ by their names, before and now.
        """
        shapes = _shapes(model, args, kwargs)
        mode = kind_of(model, args, kwargs).mode
        differences = [
            (found, before)
            for earlier, before in reversed(self._calls)
            if earlier == mode and (found := _differing(before, shapes))
        ]
        nearest, before = min(differences, key=lambda d: len(d[0]), default=(frozenset(), {}))
        self._pending = set(nearest) if self.declared.automatic else set()
        return {f"{p}.{number}": (before[p][number], shapes[p][number]) for p, number in nearest}

    def captured(
        self,
        sizes: Sequence[Size],
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Note that a call was captured: it was no mistake, and what differs in it varies.

        So do sizes that are symbols of its graph.
        """
        self._varied |= self._pending
        self._varied |= {_parts(size.name) for size in sizes if not size.fixed}
        self._calls.append((kind_of(model, args, kwargs).mode, _shapes(model, args, kwargs)))
        del self._calls[:-_REMEMBERED]

    def symbols(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Dimensions:
        """The sizes that should be symbols when this call is captured."""
        self.declared.check_names(model, args, kwargs)
        self.declared.check(model, args, kwargs)
        if kind_of(model, args, kwargs).mode in self._refused:
            return NONE
        names: dict[int, dict[int, str]] = {}
        for path, tensor in tensors_of(named_arguments(model, args, kwargs)):
            for number in range(tensor.dim()):
                said = self._said(path, tensor, number)
                if said:
                    self._declared.add(f"{path}.{number}")
                wanted = said or (path, number) in self._varied | self._pending
                if wanted and (path, number) not in self._fixed and tensor.shape[number] > 1:
                    names.setdefault(id(tensor), {})[number] = f"{path}.{number}"
        return Dimensions(names) if names else NONE

    def named(
        self,
        names: Collection[str],
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Dimensions:
        """Sizes of a call by their names, as symbols; none where they cannot all be."""
        if not self.declared.automatic or kind_of(model, args, kwargs).mode in self._refused:
            return NONE
        left = {_parts(name) for name in names}
        found: dict[int, dict[int, str]] = {}
        for path, tensor in tensors_of(named_arguments(model, args, kwargs)):
            for number, size in enumerate(tensor.shape):
                if (path, number) in left - self._fixed and size > 1:
                    found.setdefault(id(tensor), {})[number] = f"{path}.{number}"
                    left.discard((path, number))
        return NONE if left else Dimensions(found)

    def made(
        self,
        sizes: Sequence[Size],
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Learn which sizes the capture of a call holds for one value of.

        Raises:
            CaptureError: one of them was declared to vary.
        """
        names = {size.name for size in sizes}
        constants = {
            number
            for path, shape in _shapes(model, args, kwargs).items()
            for at, number in enumerate(shape)
            if f"{path}.{at}" not in names
        }
        for size in sizes:
            if not size.fixed:
                continue
            if size.name in self._declared:
                raise CaptureError(
                    f"{size.name} is declared to vary, and the graph holds for {size.hint} only",
                    where=size.line,
                    hint="leave it out of dynamic=, or change the line so that it works for all "
                    "sizes",
                )
            if size.hint in constants:  # it may have to equal one that has not varied yet
                continue
            self._fixed.add(_parts(size.name))
            at = f" (at: {size.line.strip()})" if size.line else ""
            self.notes[size.name] = (
                f"{size.name} varies, and each of its sizes has a graph of its own, because the "
                f"model fixes it{at}"
            )

    def refused(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], reason: str
    ) -> str:
        """Note that sizes cannot be symbols in calls of this mode.

        Returns:
            what a user has to be told who declared that they are; else nothing.
        """
        self._refused.add(kind_of(model, args, kwargs).mode)
        form = "training" if model.training else "evaluation"
        known = form in self.notes
        self.notes[form] = (
            f"sizes that vary have a graph each in {form}, because they cannot be symbols: {reason}"
        )
        if not self._declared or known:
            return ""
        return (
            f"dynamic= declares {', '.join(sorted(self._declared))}, and {self.notes[form]}. Leave "
            "dynamic= out, or what keeps them from being symbols."
        )

    @property
    def why(self) -> str:
        """Why sizes have graphs of their own, if one reason is known."""
        never = "" if self.declared.automatic else "dynamic=False gives each size a graph"
        return next(iter(self.notes.values()), never)

    def _said(self, path: str, tensor: Tensor, number: int) -> bool:
        dims = self.declared.dims.get(path, {})
        return number in dims or number - tensor.dim() in dims


_REMEMBERED = 8


def _parts(name: str) -> tuple[str, int]:
    path, _, number = name.rpartition(".")
    return path, int(number)


def _shapes(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Shapes:
    found = tensors_of(named_arguments(model, args, kwargs))
    return {path: tuple(tensor.shape) for path, tensor in found}


def _differing(before: Shapes, now: Shapes) -> frozenset[tuple[str, int]]:
    """Sizes that differ between calls with tensors of equal names and ranks; else none."""
    if {p: len(s) for p, s in before.items()} != {p: len(s) for p, s in now.items()}:
        return frozenset()
    return frozenset(
        (path, number)
        for path, shape in now.items()
        for number, size in enumerate(shape)
        if before[path][number] != size
    )
