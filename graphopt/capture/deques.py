"""Deques of limited length that forward finds: Dynamo forgets the limit, and refuses their changes.

Histories and queues of the last few values are kept in them (``deque(maxlen=8)``). Here the limit
is part of what Dynamo knows, with a guard on it. A changed deque is emptied and filled anew, as one
without a limit is: what it holds at the end of forward never exceeds the limit.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch._dynamo.exc import unimplemented
from torch._dynamo.side_effects import SideEffects
from torch._dynamo.source import AttrSource
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import VariableBuilder
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.lists import DequeVariable


@contextmanager
def limited_deques() -> Iterator[None]:
    """While Dynamo captures; everything is put back on leaving."""
    # Dynamo keeps this table of methods from its first use in the process on.
    table = VariableBuilder._type_dispatch()
    deques = {collections.deque: _with_its_limit(VariableBuilder.wrap_listlike)}
    written = _filled_anew(SideEffects.codegen_update_mutated)
    with (
        mock.patch.dict(table, deques),
        mock.patch.object(SideEffects, "codegen_update_mutated", written),
    ):
        yield


def _with_its_limit(original: Callable[..., Any]) -> Callable[..., Any]:
    def wrap_listlike(self: Any, value: Any) -> Any:
        result = original(self, value)
        if isinstance(value, collections.deque):
            if value.maxlen == 0:  # Dynamo takes this for no limit
                unimplemented(
                    gb_type="A deque with maxlen=0 is used",
                    context=str(self.source),
                    explanation="It holds nothing.",
                    hints=["Leave it out of forward"],
                )
            source = AttrSource(self.source, "maxlen")
            result.maxlen = VariableTracker.build(self.tx, value.maxlen, source)
        return result

    return wrap_listlike


def _filled_anew(original: Callable[..., None]) -> Callable[..., None]:
    def codegen_update_mutated(self: Any, *args: Any, **kwargs: Any) -> None:
        deques = [v for v in self._get_modified_vars() if isinstance(v, DequeVariable)]
        limits = [deque.maxlen for deque in deques]
        for deque in deques:
            deque.maxlen = ConstantVariable.create(None)
        try:
            original(self, *args, **kwargs)
        finally:
            for deque, limit in zip(deques, limits, strict=True):
                deque.maxlen = limit

    return codegen_update_mutated
