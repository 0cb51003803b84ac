"""Dimensions of arguments whose sizes vary: what the user says of them, and what was seen.

A dimension is written as users see it: ``"ids.1"`` is the second one of the argument ``ids``, and
``"batch.mask.0"`` the first one of the tensor ``mask`` in the argument ``batch``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from graphopt.capture.sizes import NONE, Dimensions, Size
from graphopt.errors import ArgumentError, CaptureError
from graphopt.model.kinds import kind_of
from graphopt.model.trial import named_arguments, tensors_of

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Dim:
    """What a user says of one dimension whose size varies.

    Dimensions of one name have one size in every call.

    Args:
        name: of the size (``"length"``).
        min: the smallest size that is passed.
        max: the largest one; ``None`` if there is no limit.
        multiple: what divides every size that is passed.
    """

    name: str
    min: int = 0
    max: int | None = None
    multiple: int = 1

    def __str__(self) -> str:
        limits = f" of {self.min}..{'' if self.max is None else self.max}"
        factor = f", a multiple of {self.multiple}" if self.multiple != 1 else ""
        return f"{self.name}{limits if self.min or self.max is not None else ''}{factor}"

    def takes(self, size: int) -> bool:
        """Whether this is one of the sizes."""
        within = self.min <= size and (self.max is None or size <= self.max)
        return within and size % self.multiple == 0


@dataclass(frozen=True)
class Declared:
    """The argument `dynamic` of `optimize`.

    Attributes:
        dims: by tensor and dimension.
        automatic: whether sizes that are seen to vary become symbols, too.
    """

    dims: Mapping[str, Mapping[int, Dim]] = field(default_factory=dict)
    automatic: bool = True

    @classmethod
    def of(cls, dynamic: object, forward: Callable[..., object]) -> Declared:
        """From what the user gave.

        Args:
            dynamic: ``None``, ``False``, or names of dimensions by argument and dimension.
            forward: of the model, unbound.

        Raises:
            ArgumentError: it is none of these, or names no argument of forward.
        """
        if dynamic is None or isinstance(dynamic, bool):
            return cls(automatic=dynamic is not False)
        if not isinstance(dynamic, Mapping):
            raise ArgumentError(
                f"dynamic={dynamic!r} is neither False nor a dict of dimensions", hint=_EXAMPLE
            )
        return cls({str(n): _dims(n, dims) for n, dims in _known(dynamic, forward)})

    @property
    def limited(self) -> bool:
        """Whether a call may break what was declared."""
        dims = [dim for dims in self.dims.values() for dim in dims.values()]
        alone = len({dim.name for dim in dims}) == len(dims)
        return not alone or any(dim != Dim(dim.name) for dim in dims)

    def check(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise `ArgumentError` for a call whose sizes are not as declared."""
        first: dict[str, tuple[str, int]] = {}
        for path, tensor in tensors_of(named_arguments(model, args, kwargs)):
            for number, dim in self.dims.get(path, {}).items():
                size, place = _size(path, tensor, number), f"{path}.{number}"
                if not dim.takes(size):
                    raise ArgumentError(
                        f"{place} is {size}, and dynamic= says that it is {dim}",
                        hint="pad the batch, or declare what is passed",
                    )
                other, expected = first.setdefault(dim.name, (place, size))
                if size != expected:
                    raise ArgumentError(
                        f"{other} is {expected} and {place} is {size}, and dynamic= says that both "
                        f"are {dim.name!r}",
                        hint="give dimensions of different sizes different names",
                    )


_EXAMPLE = "dynamic={'ids': {0: 'batch', 1: graphopt.Dim('length', max=512)}}"


def _known(
    dynamic: Mapping[Any, Any], forward: Callable[..., object]
) -> Iterator[tuple[str, object]]:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    for name, dims in dynamic.items():
        if str(name).split(".")[0] not in names and len(names) == len(parameters):
            raise ArgumentError(
                f"dynamic= names {name!r}, and forward takes {', '.join(names) or 'nothing'}",
                hint=_EXAMPLE,
            )
        yield name, dims


def _dims(name: object, dims: object) -> dict[int, Dim]:
    if not isinstance(dims, Mapping) or any(type(number) is not int for number in dims):
        raise ArgumentError(
            f"dynamic= gives {dims!r} for {name!r}, which is no dict of dimensions", hint=_EXAMPLE
        )
    found = {number: Dim(dim) if isinstance(dim, str) else dim for number, dim in dims.items()}
    for number, dim in found.items():
        if not isinstance(dim, Dim):
            raise ArgumentError(
                f"dynamic= gives {dim!r} for dimension {number} of {name!r}, which is neither a "
                "name nor a Dim",
                hint=_EXAMPLE,
            )
    return found


def _size(path: str, tensor: Tensor, number: int) -> int:
    if not -tensor.dim() <= number < tensor.dim():
        raise ArgumentError(
            f"dynamic= names dimension {number} of {path}, which has {tensor.dim()}", hint=_EXAMPLE
        )
    return tensor.shape[number]


# -- what was seen ---------------------------------------------------------------------------------


class Seen:
    """Which sizes of one model's calls vary, and which of them cannot be symbols.

    Args:
        declared: what the user says.

    Attributes:
        notes: why sizes stay constants, by where.
    """

    def __init__(self, declared: Declared) -> None:
        self.declared = declared
        self.notes: dict[str, str] = {}
        self._declared: set[str] = set()
        self._varied: set[tuple[str, int]] = set()
        self._pending: set[tuple[str, int]] = set()
        self._fixed: set[tuple[str, int]] = set()
        self._refused: set[Hashable] = set()
        self._calls: list[tuple[Hashable, Shapes]] = []

    def look(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> frozenset[str]:
        """Compare a call with those that were captured in its mode; returns the sizes that differ.

        Only the captured call that differs in the fewest sizes counts.
        """
        shapes = _shapes(model, args, kwargs)
        mode = kind_of(model, args, kwargs).mode
        differences = [
            found
            for earlier, before in self._calls
            if earlier == mode and (found := _differing(before, shapes))
        ]
        nearest = min(differences, key=len, default=frozenset())
        self._pending = set(nearest) if self.declared.automatic else set()
        return frozenset(f"{path}.{number}" for path, number in nearest)

    def captured(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note that a call was captured: it was no mistake, and what differs in it varies."""
        self._varied |= self._pending
        self._calls.append((kind_of(model, args, kwargs).mode, _shapes(model, args, kwargs)))
        del self._calls[:-_REMEMBERED]

    def symbols(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Dimensions:
        """The sizes that should be symbols when this call is captured."""
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

    def made(self, sizes: Sequence[Size]) -> None:
        """Learn which sizes a capture holds for one value of.

        Raises:
            CaptureError: one of them was declared to vary.
        """
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
            path, _, number = size.name.rpartition(".")
            self._fixed.add((path, int(number)))
            at = f" (at: {size.line.strip()})" if size.line else ""
            self.notes[size.name] = (
                f"{size.name} varies, and each of its sizes has a graph of its own, because the "
                f"model fixes it{at}"
            )

    def refused(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], reason: str
    ) -> None:
        """Note that sizes cannot be symbols in calls of this mode."""
        self._refused.add(kind_of(model, args, kwargs).mode)
        self.notes["training" if model.training else "evaluation"] = (
            f"sizes that vary have a graph each in {'training' if model.training else 'evaluation'}"
            f", because they cannot be symbols: {reason}"
        )

    def _said(self, path: str, tensor: Tensor, number: int) -> bool:
        dims = self.declared.dims.get(path, {})
        return number in dims or number - tensor.dim() in dims


_REMEMBERED = 8


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
