"""Iterators of Python and itertools: copies that are as far as they are, and go on alone."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

_BUILT_IN: tuple[Iterable[Any], ...] = (
    iter([]),
    iter(()),
    iter(""),
    iter(b""),
    iter(range(0)),
    iter(range(1 << 80)),
    iter({}),
    iter({}.values()),
    iter({}.items()),
    iter(set()),
    reversed([]),
)
_KINDS = frozenset(
    {
        *map(type, _BUILT_IN),
        *(enumerate, zip, map, filter, reversed),
        *(kind for kind in vars(itertools).values() if isinstance(kind, type)),
    }
)


class _CannotBeCopied(Exception):
    """A generator, a file or something else that only goes forward."""


def is_iterator(value: object) -> bool:
    """Whether a value is an iterator that may be copied."""
    return type(value) in _KINDS


def copy_of_iterator(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of an iterator, or the iterator itself if it cannot be copied.

    Args:
        value: the iterator.
        memo: copies by the identity of what they were made from; more than one iterator may go
            over the same one.
    """
    try:
        with warnings.catch_warnings():  # a later Python no longer tells how far itertools' are
            warnings.simplefilter("ignore")
            return _copy(value, memo)
    except (_CannotBeCopied, TypeError, AttributeError):
        return value


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    if type(value) is tuple:
        return tuple([_copy(item, memo) for item in value])
    if type(value) not in _KINDS:
        if isinstance(value, Iterator):
            raise _CannotBeCopied
        return value
    make, arguments, *rest = value.__reduce__()
    copy = make(*_copy(arguments, memo))
    if rest and rest[0] is not None:
        copy.__setstate__(_state(rest[0], memo))
    memo[id(value)] = copy
    return copy


def _state(state: Any, memo: dict[int, Any]) -> Any:
    """What an iterator remembers; `cycle` goes on writing to its list of what it has seen."""
    if type(state) is tuple:
        return tuple([_state(item, memo) for item in state])
    return list(state) if type(state) is list else _copy(state, memo)
