"""An end to the time that Inductor may take: whoever waits for a choice wants to train."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from graphopt.errors import BackendError


class _Late(Exception):
    """The time is over."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Within, compilation by Inductor ends after `seconds`.

    It is asked between operators, and while compilers are waited for, which go on: what they have
    made is in Inductor's cache for the next process.

    Raises:
        BackendError: the time was over.
    """
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.graph import GraphLowering

    end = time.perf_counter() + seconds
    late: list[bool] = []

    def left() -> float:
        remaining = end - time.perf_counter()
        if remaining <= 0:
            late.append(True)
            raise _Late
        return remaining

    def lower(original: Callable[..., Any]) -> Callable[..., Any]:
        def run_node(self: Any, node: Any) -> Any:
            left()
            return original(self, node)

        return run_node

    def wait(original: Callable[..., Any]) -> Callable[..., Any]:
        def wait_futures(self: Any, scope: dict[str, Any]) -> Any:
            for value in list(scope.values()):
                future = getattr(value, "future", None)
                if hasattr(value, "result_fn") and future is not None:
                    try:
                        future.result(timeout=left())
                    except TimeoutError:
                        left()
            return original(self, scope)

        return wait_futures

    patches = (
        mock.patch.object(GraphLowering, "run_node", lower(GraphLowering.run_node)),
        mock.patch.object(AsyncCompile, "_wait_futures", wait(AsyncCompile._wait_futures)),
    )
    try:
        with patches[0], patches[1]:
            yield
    except BackendError as error:
        if not late:
            raise
        raise BackendError(
            f"compiling with Inductor takes longer than the {seconds:.0f} s that a choice may take",
            hint="backend='inductor' waits for it; what is compiled by now is kept for later runs",
        ) from error
