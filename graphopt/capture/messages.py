"""What forward prints, logs and warns of: it comes at the end of a call, from the graph's values.

Dynamo does so for `print` and `warnings.warn`, but only of what the outermost forward prints, only
of tensors and constants, and without keywords. Messages of loggers it can only leave out.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch._dynamo
from torch._dynamo.exc import unimplemented
from torch._dynamo.source import AttrSource, DictGetItemSource, ImportSource
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.functions import UserFunctionVariable
from torch._dynamo.variables.lists import ListVariable, TupleVariable
from torch._dynamo.variables.misc import (
    DebuggingVariable,
    LoggingLoggerVariable,
    StringFormatVariable,
)
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable

_LEVELS = ("debug", "info", "warning", "error", "critical")
# Methods that transformers adds are cached, hence opaque to Dynamo.
_ONCE = ("warning_once", "info_once", "warning_advice")
METHODS = frozenset([*_LEVELS, "log", *_ONCE])
# Left out where they cannot come later: library code logs a lot, and nothing depends on it.
_IGNORED = frozenset(["debug", "info", "warning", *_ONCE])


@contextmanager
def messages_at_the_end() -> Iterator[None]:
    """While Dynamo captures; everything is put back on leaving."""
    functions = {print, warnings.warn, *(getattr(logging, name) for name in _LEVELS)}
    patches: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (DebuggingVariable, "call_function", _later),
        (LoggingLoggerVariable, "call_method", _log(LoggingLoggerVariable.call_method)),
        (UserFunctionVariable, "call_function", _logger(UserFunctionVariable.call_function)),
    )
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(reorderable_logging_functions=functions))
        for owner, name, function in patches:
            stack.enter_context(mock.patch.object(owner, name, function))
        yield


class _WithKeywords(VariableTracker):
    """A function with keywords that are known already, as Dynamo's code calls it."""

    def __init__(self, function: VariableTracker, keywords: dict[str, VariableTracker]) -> None:
        super().__init__()
        self.function, self.keywords = function, keywords

    def reconstruct(self, codegen: Any) -> None:
        codegen.add_push_null(lambda: codegen.load_import_from("functools", "partial"))
        codegen(self.function)
        for value in self.keywords.values():
            codegen(value)
        names = tuple(self.keywords)
        codegen.extend_output(codegen.create_call_function_kw(1 + len(names), names, False))


def _later(self: Any, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> VariableTracker:
    """A call of a function that prints."""
    if not _print_later(self, tx, args, kwargs):
        unimplemented(
            gb_type="Prints what is not known any more when a message comes out",
            context=f"{self.value}, {args}, {kwargs}",
            explanation="Messages come out at the end of a call.",
            hints=[],
        )
    return ConstantVariable.create(None)


def _print_later(function: Any, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call can be made at the end instead; if so, it will be."""
    if "file" in kwargs:  # trials of a model would print into it
        return False
    try:
        keep = functools.partial(_kept, tx)
        kept, keywords = list(map(keep, args)), {name: keep(v) for name, v in kwargs.items()}
    except _Changes:
        return False
    if keywords:
        function = _WithKeywords(function, keywords)
    # Dynamo looks at those of the outermost frame only.
    tx.output.root_tx.debug_locals.append((function, kept))
    return True


class _Changes(Exception):
    """A value may be another one at the end of the call, or cannot be had there."""


def _kept(tx: Any, value: Any) -> VariableTracker:
    """What is at the end of a call what this is now. Tensors are taken to stay as they are."""
    value = value.realize()
    keep = functools.partial(_kept, tx)
    found: VariableTracker | None
    # Values within a checkpoint or a loop are not to be had outside of it.
    outermost = tx.output.current_tracer is tx.output.root_tracer
    if isinstance(value, StringFormatVariable):
        keywords = {name: keep(v) for name, v in value.sym_kwargs.items()}
        return StringFormatVariable(value.format_string, list(map(keep, value.sym_args)), keywords)
    if isinstance(value, TensorVariable | SymNodeVariable):
        found = value if outermost else None
    elif isinstance(value, TupleVariable | ListVariable) and value.source is None:
        items = list(map(keep, value.items))
        found = ListVariable(items) if isinstance(value, ListVariable) else value
    elif isinstance(value, ConstantVariable):
        found = value
    else:
        # Changes are made after messages have come out.
        same = value.source is not None and not tx.output.side_effects.is_modified(value)
        found = value if same else None
    if found is None:
        raise _Changes
    return found


def _log(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_method(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name not in METHODS:
            return original(self, tx, name, args, kwargs)
        if self.source is not None:
            method = DebuggingVariable(
                getattr(self.value, name), source=AttrSource(self.source, name)
            )
            if _print_later(method, tx, args, kwargs):
                return ConstantVariable.create(None)
        if name in _IGNORED:
            return ConstantVariable.create(None)
        return original(self, tx, name, args, kwargs)

    return call_method


def _logger(original: Callable[..., Any]) -> Callable[..., Any]:
    """`logging.getLogger`, which Dynamo otherwise reads down to its locks."""

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        known = self.fn is logging.getLogger and len(args) == 1 and not kwargs
        if not known or not isinstance(args[0].realize(), ConstantVariable):
            return original(self, tx, args, kwargs)
        name = args[0].as_python_constant()
        source: Any = AttrSource(ImportSource("logging"), "root")
        logger = logging.getLogger(name)
        if logger is not logging.root:
            loggers = AttrSource(AttrSource(source, "manager"), "loggerDict")
            source = DictGetItemSource(loggers, name)
        return VariableTracker.build(tx, logger, source)

    return call_function
