"""What surrounds a call and is none of its computation, set aside for a while.

Modes that count or log operators, hooks on saved tensors (checkpointing, offloading), anomaly
detection, and everything that a forward prints, logs or warns of belong to the caller. The grad
mode, autocast and the default device are part of the call and stay.

A fresh thread would start without all of this, but it cannot be used: within a backward on a GPU
the engine's thread waits for the call, and a backward from another thread would wait for the
engine's thread. It would also lack the caller's thread-local and context variables.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from contextvars import ContextVar
from threading import RLock
from typing import Any

import torch
from torch import overrides
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes

from graphopt.capture.checkpoints import without_hooks

# Random streams and modules' dictionaries are shared by all threads: one trial at a time.
_ONE_AT_A_TIME = RLock()
_aside: ContextVar[bool] = ContextVar("aside", default=False)


@contextmanager
def set_aside() -> Iterator[None]:
    """Within, the caller's modes and hooks are not there, and nothing is printed."""
    if _aside.get():
        yield
        return
    token = _aside.set(True)
    try:
        with _ONE_AT_A_TIME, ExitStack() as stack:
            for part in (_silent, _no_function_modes, _disable_current_modes):
                stack.enter_context(part())
            stack.enter_context(without_hooks())
            stack.enter_context(_no_anomaly_detection())
            yield
    finally:
        _aside.reset(token)


def finally_all(*steps: Callable[[], None]) -> None:
    """Run all steps, whatever one of them raises and even if the user interrupts meanwhile."""
    errors: list[BaseException] = []
    for step in steps:
        for _ in range(8):
            try:
                step()
            except KeyboardInterrupt as interrupt:
                errors.insert(0, interrupt)
                continue  # steps put things back: a second time they do no harm
            except BaseException as error:
                errors.append(error)
            break
    if errors:
        raise errors[0]


@contextmanager
def _silent() -> Iterator[None]:
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# Untyped in torch.
_push: Callable[[Any], None] = overrides._push_mode
_pop: Callable[[], Any] = overrides._pop_mode


@contextmanager
def _no_function_modes() -> Iterator[None]:
    """Only the default device is kept; tensors would be made elsewhere without it."""
    modes: list[Any] = []
    while torch._C._len_torch_function_stack():
        modes.insert(0, _pop())
    kept = [mode for mode in modes if isinstance(mode, DeviceContext)]
    try:
        for mode in kept:
            _push(mode)
        yield
    finally:
        while torch._C._len_torch_function_stack():
            _pop()
        for mode in modes:
            _push(mode)


@contextmanager
def _no_anomaly_detection() -> Iterator[None]:
    before = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    torch.set_anomaly_enabled(False)
    try:
        yield
    finally:
        torch.set_anomaly_enabled(*before)
