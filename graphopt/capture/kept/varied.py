"""Which sizes were symbols of kept captures of a model: a first call of other sizes finds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.capture.kept.sizes import names_size
from graphopt.capture.kept.store import Store

_STORE = Store("sizes")
_MOST = 4


def all_sizes(args: Sequence[object], kwargs: Mapping[str, object]) -> dict[int, dict[int, str]]:
    """Every size of every tensor of a call as one that varies, for a key that all sizes share."""
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return {id(tensor): dict.fromkeys(range(tensor.dim()), "?") for tensor in tensors}


def symbols_of_earlier(key: str) -> Iterator[tuple[str, ...]]:
    """The names of sizes that were symbols together, newest first."""
    found = _STORE.read(key)
    if found is None:
        return
    rows: list[Any] = found.entry if isinstance(found.entry, list) else [None]
    if not all(isinstance(row, list) and all(map(names_size, row)) for row in rows):
        _STORE.damaged(key, "it names no sizes")
        return
    for row in rows:
        yield tuple(row)


def note_symbols(key: str, names: Sequence[str]) -> None:
    """Let later processes know."""
    known = list(symbols_of_earlier(key))
    new = tuple(sorted(names))
    if known[:1] != [new]:
        _STORE.write(key, [new, *(row for row in known if row != new)][:_MOST])
