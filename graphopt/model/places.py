"""Places where a forward may leave something: how each is remembered, exchanged and put back."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from types import CellType
from typing import Any, ClassVar

# Takes a value, gives what is to be there instead.
Value = Callable[[Any], Any]


class Place:
    """One object with contents that can change; by default none that can be exchanged."""

    def items(self) -> Iterable[tuple[object, Any]]:
        """What was in it, with names."""
        return ()

    def exchange(self, swap: Value) -> None:
        """Put what `swap` gives for each of its contents into it."""

    def restore(self) -> None:
        """Put back what was in it."""
        raise NotImplementedError


class Dict(Place):
    """A dictionary of any class."""

    def __init__(self, target: dict[Any, Any]) -> None:
        self._target = target
        self._saved = dict(target)
        # Subclasses may forbid what their base allows.
        self._base: Any = OrderedDict if isinstance(target, OrderedDict) else dict

    def items(self) -> Iterable[tuple[object, Any]]:
        """See `Place`."""
        return self._saved.items()

    def exchange(self, swap: Value) -> None:
        """See `Place`."""
        for key, value in self._saved.items():
            new = swap(value)
            if new is not value:
                self._base.__setitem__(self._target, key, new)

    def restore(self) -> None:
        """See `Place`."""
        target, saved = self._target, self._saved
        # Keys of one object may compare equal only to themselves, so their identity decides.
        if [*map(id, dict.keys(target))] != [*map(id, saved)]:
            self._base.clear(target)
        for key, value in saved.items():
            if dict.get(target, key, self) is not value:
                self._base.__setitem__(target, key, value)


class Row(Place):
    """What has its values in a row; `kind` writes them, whatever a subclass makes of writing."""

    kind: ClassVar[Any]

    def __init__(self, target: Any) -> None:
        self._target = target
        self._saved = list(target)

    def items(self) -> Iterable[tuple[object, Any]]:
        """See `Place`."""
        return enumerate(self._saved)

    def exchange(self, swap: Value) -> None:
        """See `Place`."""
        for index, value in enumerate(self._saved):
            new = swap(value)
            if new is not value:
                self.kind.__setitem__(self._target, index, new)


class List(Row):
    """A list."""

    kind = list

    def restore(self) -> None:
        """See `Place`."""
        if not _same(self._target, self._saved):
            list.__setitem__(self._target, slice(None), self._saved)


class Deque(Row):
    """A deque."""

    kind = deque

    def restore(self) -> None:
        """See `Place`."""
        if not _same(self._target, self._saved):
            self._target.clear()
            self._target.extend(self._saved)


class Set(Place):
    """A set; what is in it cannot be exchanged."""

    def __init__(self, target: set[Any]) -> None:
        self._target = target
        self._saved = set(target)

    def restore(self) -> None:
        """See `Place`."""
        if {*map(id, self._target)} != {*map(id, self._saved)}:
            self._target.clear()
            self._target.update(self._saved)


class Attributes(Place):
    """Attributes of an object: its dictionary, its slots and its class."""

    def __init__(self, target: object) -> None:
        self._target = target
        self._class = type(target)
        own = getattr(target, "__dict__", None)
        self._own = Dict(own) if type(own) is dict else None
        self._slots: dict[str, tuple[Any, Any]] = {}
        for kind in self._class.__mro__:
            names = kind.__dict__.get("__slots__", ())
            for name in (names,) if isinstance(names, str) else names:
                slot: Any = kind.__dict__.get(name)
                if hasattr(slot, "__set__") and hasattr(slot, "__get__"):
                    value = slot.__get__(target, kind) if _has(slot, target) else _EMPTY
                    self._slots[name] = slot, value

    def items(self) -> Iterable[tuple[object, Any]]:
        """See `Place`."""
        found = dict(self._own.items()) if self._own else {}
        return (found | {k: v for k, (_, v) in self._slots.items() if v is not _EMPTY}).items()

    def exchange(self, swap: Value) -> None:
        """See `Place`."""
        if self._own:
            self._own.exchange(swap)
        for slot, value in self._slots.values():
            if value is not _EMPTY and (new := swap(value)) is not value:
                slot.__set__(self._target, new)

    def restore(self) -> None:
        """See `Place`."""
        if type(self._target) is not self._class:
            object.__setattr__(self._target, "__class__", self._class)
        if self._own:
            self._own.restore()
        for slot, value in self._slots.values():
            if value is not _EMPTY:
                slot.__set__(self._target, value)
            elif _has(slot, self._target):
                slot.__delete__(self._target)


class Cell(Place):
    """A variable of a closure."""

    def __init__(self, target: CellType) -> None:
        self._target = target
        self._saved: Any = _contents(target)

    def items(self) -> Iterable[tuple[object, Any]]:
        """See `Place`."""
        return () if self._saved is _EMPTY else (("", self._saved),)

    def exchange(self, swap: Value) -> None:
        """See `Place`."""
        new = swap(self._saved)
        if new is not self._saved:
            self._target.cell_contents = new

    def restore(self) -> None:
        """See `Place`."""
        if _contents(self._target) is self._saved:
            return
        if self._saved is _EMPTY:
            del self._target.cell_contents
        else:
            self._target.cell_contents = self._saved


_EMPTY = object()


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _EMPTY


def _has(slot: Any, target: object) -> bool:
    try:
        slot.__get__(target, type(target))
    except AttributeError:
        return False
    return True


def _same(now: Iterable[Any], saved: Iterable[Any]) -> bool:
    a, b = list(now), list(saved)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
