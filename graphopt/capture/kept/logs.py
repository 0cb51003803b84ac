"""What forward logs at each call, where it is constant text: a logger, a method and its arguments.

Libraries warn of settings in this way, most of them once per process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType, ModuleType
from typing import Any
from unittest import mock

from graphopt.capture.kept.sources import Unreadable
from graphopt.capture.messages import METHODS

_CONSTANTS = (type(None), bool, int, float, str)


def log_of(callee: str, args: Sequence[object], scope: Mapping[str, object]) -> list[Any] | None:
    """A message as data; ``None`` where a call is another one.

    Args:
        callee: what is called, as a name and attributes of it.
        args: its arguments.
        scope: global variables.
    """
    first, *names = callee.split(".")
    at = scope.get(first)
    for name in names:
        own = vars(at) if isinstance(at, ModuleType) else {}
        at = getattr(at, name, None) if isinstance(at, logging.Logger) else own.get(name)
    if not isinstance(at, MethodType) or type(at.__self__) is not logging.Logger:
        return None
    logger, method = at.__self__, names[-1]
    row = [logger.name, method, list(args)]
    return row if _bound(logger.name, method) == at and _are_constants(args) else None


@contextmanager
def silent(rows: Sequence[Sequence[Any]]) -> Iterator[None]:
    """Within, these messages are not given out, nor do those of once per process count as given."""
    with ExitStack() as stack:
        for name, method, _ in rows:
            stack.enter_context(mock.patch.object(_logger(name), method, return_value=None))
        yield


def read_logs(rows: object) -> list[Callable[[], object]]:
    """What gives the messages of a table out.

    Raises:
        Unreadable: it is no such table.
    """
    if not isinstance(rows, list):
        raise Unreadable("it does not say what forward logs")
    return [_read(row) for row in rows]


def _read(row: Any) -> Callable[[], object]:
    if not isinstance(row, list) or len(row) != 3 or not isinstance(row[2], list):
        raise Unreadable("a message that cannot be read")
    name, method, args = row
    bound = _bound(name, method) if type(name) is str and type(method) is str else None
    if bound is None or not _are_constants(args):
        raise Unreadable("a message of no logger")
    return lambda: bound(*args)


def _are_constants(args: Sequence[object]) -> bool:
    return all(type(arg) in _CONSTANTS for arg in args)


def _bound(name: str, method: str) -> MethodType | None:
    """The method of a logger that is there; none is made."""
    logger = _logger(name)
    if method not in METHODS or type(logger) is not logging.Logger:
        return None
    found = getattr(logger, method, None)
    return found if isinstance(found, MethodType) else None


def _logger(name: str) -> object:
    return logging.root.manager.loggerDict.get(name)
