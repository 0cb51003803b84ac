"""The forms there are, by name."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.structured.blr import Blr
from graphopt.structured.flat import Flat
from graphopt.structured.form import Form
from graphopt.structured.hodlr import Hodlr
from graphopt.structured.toeplitz import Toeplitz

FORMS: dict[str, type[Form]] = {kind.name: kind for kind in (Flat, Toeplitz, Blr, Hodlr)}


def form_of(name: str, sizes: Sequence[int]) -> Form:
    """The form of this name and sizes."""
    return FORMS[name].of_sizes(sizes)


def form_of_shapes(rows: int, cols: int, shapes: Sequence[tuple[int, ...]]) -> Form | None:
    """The form of a weight [rows, cols] whose factors have these shapes, if there is one."""
    for kind in FORMS.values():
        found = kind.of_shapes(rows, cols, shapes)
        if found is not None and found.shapes == tuple(shapes):
            return found
    return None
