"""What a user says of dimensions whose sizes vary: the argument `dynamic` of `optimize`.

A dimension is written as users see it: ``"ids.1"`` is the second one of the argument ``ids``, and
``"batch.mask.0"`` the first one of the tensor ``mask`` in the argument ``batch``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from graphopt.errors import ArgumentError
from graphopt.model.tensors import tensors_of
from graphopt.model.trial import named_arguments


@dataclass(frozen=True)
class Dim:
    """What a user says of one dimension whose size varies.

    Dimensions of one name have one size in every call.

    Args:
        name: of the size (``"length"``).
        min: the smallest size that is passed.
        max: the largest one; ``None`` if there is no limit.
        multiple: what divides every size that is passed.

    Raises:
        ArgumentError: no size is one of these.
    """

    name: str
    min: int = 0
    max: int | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ArgumentError(f"a Dim has the name {self.name!r}", hint="Dim('length', max=512)")
        for what in ("min", "max", "multiple"):
            value = getattr(self, what)
            least = 1 if what == "multiple" else 0
            if value is None and what == "max":
                continue
            if type(value) is not int or value < least:
                raise ArgumentError(
                    f"{what}={value!r} of Dim({self.name!r}) is no whole number from {least} on",
                    hint=f"leave {what} out, if there is no such limit",
                )
        if self.max is None:
            return
        if self.max < self.min:
            raise ArgumentError(
                f"Dim({self.name!r}) has max={self.max} below min={self.min}",
                hint="give the smallest size as min and the largest one as max",
            )
        if self.max // self.multiple * self.multiple < self.min:
            raise ArgumentError(
                f"Dim({self.name!r}) allows no size: no multiple of {self.multiple} is within "
                f"{self.min}..{self.max}",
                hint="give a multiple that divides some of the sizes, or leave it out",
            )

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
        found = {str(n): _dims(n, dims) for n, dims in _known(dynamic, forward)}
        return cls(_of_one_range(found))

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

    def check_names(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise `ArgumentError` where an argument that is given has no such tensor.

        An argument may be left out, and so may a part of one, where it has other tensors that are
        declared.
        """
        arguments = named_arguments(model, args, kwargs)
        for path in self.dims:
            owner = path.partition(".")[0]
            if arguments.get(owner) is None:
                continue
            there = [name for name, _ in tensors_of({owner: arguments[owner]})]
            if not any(name in self.dims for name in there):
                has = f"has {', '.join(there[:4])}" if there else "holds no tensor"
                raise ArgumentError(
                    f"dynamic= names {path!r}, and the argument {owner!r} of this call {has}",
                    hint="name a tensor of it, such as " + repr(there[0]) if there else _EXAMPLE,
                )


_EXAMPLE = "dynamic={'ids': {0: 'batch', 1: graphopt.Dim('length', max=512)}}"


def _known(
    dynamic: Mapping[Any, Any], forward: Callable[..., object]
) -> Iterator[tuple[str, object]]:
    """Tensors by the names that they have in calls, and what is said of them."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    names = [p.name for p in parameters]
    rest = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), "")
    for name, dims in dynamic.items():
        if str(name).partition(".")[0] in names:
            yield name, dims
        elif rest:
            yield f"{rest}.{name}", dims
        else:
            raise ArgumentError(
                f"dynamic= names {name!r}, and forward takes {', '.join(names) or 'nothing'}",
                hint=_EXAMPLE,
            )


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


def _of_one_range(dims: Mapping[str, dict[int, Dim]]) -> dict[str, dict[int, Dim]]:
    """Dimensions of one name with the limits that one of them states."""
    stated: dict[str, tuple[str, Dim]] = {}
    for path, by_number in dims.items():
        for number, dim in by_number.items():
            if dim == Dim(dim.name):
                continue
            place, other = stated.setdefault(dim.name, (f"{path}.{number}", dim))
            if other != dim:
                raise ArgumentError(
                    f"dynamic= says that {place} is {other} and {path}.{number} is {dim}, and "
                    "dimensions of one name have one size",
                    hint="give them one range, or different names",
                )
    return {
        path: {n: stated.get(dim.name, ("", dim))[1] for n, dim in by_number.items()}
        for path, by_number in dims.items()
    }


def _size(path: str, tensor: Tensor, number: int) -> int:
    if not -tensor.dim() <= number < tensor.dim():
        raise ArgumentError(
            f"dynamic= names dimension {number} of {path}, which has {tensor.dim()}", hint=_EXAMPLE
        )
    return tensor.shape[number]
