"""What forward prints, logs and warns of: it comes at the end of a call, from the graph's values.

Dynamo does so for `print` and `warnings.warn`, but only of what the outermost forward prints, only
of tensors and constants, and without keywords. Messages of loggers it can only leave out.
"""

from __future__ import annotations

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
from torch._dynamo.variables.builtin import BuiltinVariable
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.functions import UserFunctionVariable
from torch._dynamo.variables.lists import TupleVariable
from torch._dynamo.variables.misc import (
    DebuggingVariable,
    LoggingLoggerVariable,
    StringFormatVariable,
)
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
from torch._dynamo.variables.user_defined import UserDefinedClassVariable

_LEVELS = ("debug", "info", "warning", "error", "critical")
# Methods that transformers adds are cached, hence opaque to Dynamo.
_ONCE = ("warning_once", "info_once", "warning_advice")
_METHODS = frozenset([*_LEVELS, "log", *_ONCE])
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
    if not all(_keeps(tx, value) for value in (*args, *kwargs.values())):
        unimplemented(
            gb_type="Prints what is not known any more when a message comes out",
            context=f"{self.value}, {args}, {kwargs}",
            explanation="Messages come out at the end of a call.",
            hints=[],
        )
    function = _WithKeywords(self, kwargs) if kwargs else self
    # Dynamo looks at those of the outermost frame only.
    tx.output.root_tx.debug_locals.append((function, list(args)))
    return ConstantVariable.create(None)


def _keeps(tx: Any, value: Any) -> bool:
    """Whether a value is at the end of the call what it is now, and can be had there."""
    value = value.realize()
    if isinstance(value, TupleVariable):
        return all(_keeps(tx, item) for item in value.items)
    if isinstance(value, StringFormatVariable):
        return all(_keeps(tx, v) for v in (*value.sym_args, *value.sym_kwargs.values()))
    if isinstance(value, TensorVariable | SymNodeVariable):
        # Values within a checkpoint or a loop are not to be had outside of it.
        return tx.output.current_tracer is tx.output.root_tracer
    if isinstance(value, BuiltinVariable | UserDefinedClassVariable):
        return value.source is not None
    return isinstance(value, ConstantVariable)


def _log(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_method(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name not in _METHODS:
            return original(self, tx, name, args, kwargs)
        if self.source is not None and all(_keeps(tx, v) for v in (*args, *kwargs.values())):
            method = DebuggingVariable(
                getattr(self.value, name), source=AttrSource(self.source, name)
            )
            return method.call_function(tx, args, kwargs)
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
