"""The tensors that live longer than a step, in one namespace per pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from graphopt.errors import StateError


class States(dict[str, dict[str, Tensor]]):
    """Tensors by namespace and name.

    Attributes:
        written: full names of those that graphs renew themselves, as mutations of ``STATE`` inputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written: set[str] = set()
        self._trials = 0
        self._begun: dict[str, Tensor] = {}

    def needed(self, name: str) -> None:
        """A graph reads this tensor from now on, so it outlives a trial in which it was made."""
        if self._trials:
            self._begun.setdefault(name, self.tensor(name).clone())

    def tensor(self, name: str) -> Tensor:
        """The tensor of a ``STATE`` input ``"<pass>/<what>"``."""
        owner, _, what = name.partition("/")
        return self[owner][what]

    def flat(self) -> dict[str, Tensor]:
        """All tensors by ``"<pass>/<what>"``."""
        return {f"{owner}/{what}": t for owner, own in self.items() for what, t in own.items()}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put everything back afterwards: which tensors there are, and what is in them.

        What graphs that were made in the meantime read stays, as it was when they were made.
        """
        self._trials += 1
        tables = {name: dict(own) for name, own in self.items()}
        values = [(tensor, tensor.clone()) for tensor in self.flat().values()]
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in values:
                    if not _same(tensor, value):
                        tensor.copy_(value)
            for name, own in self.items():
                own.clear()
                own.update(tables.get(name, {}))
            for name, value in self._begun.items():
                owner, _, what = name.partition("/")
                self[owner].setdefault(what, value.clone())
            self._trials -= 1
            if not self._trials:
                self._begun.clear()


class Watch:
    """Notices a part that changes its state at a time when it must not.

    It costs a copy of all state whenever it looks.
    """

    def __init__(self, states: States) -> None:
        self._states = states
        self._before = self._copies()

    def look(self, besides: str = "") -> None:
        """Compare with what was there when it looked last.

        Args:
            besides: a pass whose state may have changed.

        Raises:
            StateError: another one's has; names the part and the tensor.
        """
        before, now = self._before, self._copies()
        for key in sorted(before.keys() | now.keys()):
            owner = key.partition("/")[0]
            if owner != besides and not _same(before.get(key), now.get(key)):
                raise StateError(
                    f"the runtime part of {owner!r} changed its state {key!r} outside of `finish`",
                    hint="keep it in `Step.own` until `finish` is called; trials, saved states and "
                    "copies rely on that",
                )
        self._before = now

    def _copies(self) -> dict[str, Tensor]:
        written = self._states.written
        return {n: t.clone() for n, t in self._states.flat().items() if n not in written}


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether both are there with the same values; NaN equals NaN."""
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())
