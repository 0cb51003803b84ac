"""What of a model can be captured where all of it cannot: its largest submodules that can."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from graphopt.capture import capture, is_uninitialised
from graphopt.capture.lock import one_at_a_time
from graphopt.errors import CaptureError
from graphopt.model.trial import Trial

# Seconds of an error message, and how much of the work a part has to hold to be worth a line.
SECONDS = 5.0
LEAST = 0.05
MOST = 3


@dataclass(frozen=True)
class Part:
    """A submodule that can be captured alone.

    Attributes:
        path: its qualified name.
        kind: its class name.
        share: of the model's floating-point operations in this call, or of its parameters.
        of: which of both.
    """

    path: str
    kind: str
    share: float
    of: str

    @property
    def expression(self) -> str:
        """As Python: ``model.blocks[3].attn``."""
        return "model." + re.sub(r"\.(\d+)", r"[\1]", f".{self.path}").removeprefix(".")

    def __str__(self) -> str:
        held = f"holds {100 * self.share:.0f} % of the {self.of}"
        return f"graphopt.optimize({self.expression}) works and {held}"


@dataclass
class _Seen:
    """The first call of one module."""

    module: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    flops: int = 0
    began: int = 0


class _Done(Exception):
    """The search is over."""


def largest_parts(
    model: nn.Module,
    forward: Callable[..., object],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    around: Callable[[], AbstractContextManager[Any]],
    seconds: float = SECONDS,
) -> tuple[Part, ...]:
    """The largest submodules that can be captured in this call, none inside of another.

    The call runs once, without a trace. Single layers of torch are left out.

    Args:
        model: which cannot be captured as a whole.
        forward: its own forward, unbound.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        around: what surrounds a trial.
        seconds: after which no further submodule is tried.
    """
    found: list[Part] = []
    candidates = {name: m for name, m in model.named_modules() if name and _worth(m)}
    if not candidates or is_uninitialised(model):
        return ()

    def rehearse(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        with FlopCounterMode(display=False) as counter:
            seen = _watch(candidates, counter, lambda: forward(model, *args, **kwargs))
        found.extend(_search(model, seen, counter.get_total_flops(), seconds))
        raise _Done

    trial = Trial(model, list(args), dict(kwargs), around)
    try:
        with one_at_a_time(), trial.untouched():
            trial.step(rehearse)
    except Exception:  # the user's own, too: it is not what is asked here
        return tuple(found)
    return tuple(found)


def name_parts(
    error: CaptureError,
    model: nn.Module,
    forward: Callable[..., object],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    around: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Say in an error which parts of the model can be captured."""
    parts = largest_parts(model, forward, args, kwargs, around)
    if parts:
        said = "; ".join(map(str, parts))
        error.hint = f"{error.hint}; {said}" if error.hint else said


def _worth(module: nn.Module) -> bool:
    """Whether there is something to optimize: more than one layer, with parameters."""
    layer = type(module).__module__.startswith("torch.nn.") and not any(module.children())
    return not layer and any(True for _ in module.parameters())


def _watch(
    modules: Mapping[str, nn.Module], counter: FlopCounterMode, call: Callable[[], object]
) -> dict[str, _Seen]:
    """What modules are called with, and what their calls cost."""
    seen: dict[str, _Seen] = {}
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(_before(module, name, seen, counter).remove)
            stack.callback(_after(module, name, seen, counter).remove)
        call()
    return seen


def _before(module: nn.Module, name: str, seen: dict[str, _Seen], counter: FlopCounterMode) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        one = seen.setdefault(name, _Seen(module, args, kwargs))
        one.began = counter.get_total_flops()

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _after(module: nn.Module, name: str, seen: dict[str, _Seen], counter: FlopCounterMode) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen[name].flops += counter.get_total_flops() - seen[name].began

    return module.register_forward_hook(hook)


def _search(
    model: nn.Module, seen: Mapping[str, _Seen], flops: int, seconds: float
) -> Iterator[Part]:
    """The parts, largest first; where one is refused, what is inside of it is tried."""
    weights = sum(p.numel() for p in model.parameters())
    end = time.perf_counter() + seconds
    queue = [name for name in seen if not _outer(name, seen)]
    found = 0

    def share(name: str) -> float:
        if flops:
            return seen[name].flops / flops
        return sum(p.numel() for p in seen[name].module.parameters()) / max(weights, 1)

    while queue and found < MOST and time.perf_counter() < end:
        name = max(queue, key=share)
        queue.remove(name)
        if share(name) < LEAST:
            return
        if _captured(seen[name]):
            found += 1
            kind = type(seen[name].module).__name__
            yield Part(name, kind, share(name), "FLOPs" if flops else "parameters")
        else:
            queue += [inner for inner in seen if _outer(inner, seen) == name]


def _outer(name: str, seen: Mapping[str, _Seen]) -> str:
    """The innermost other module around one; empty where there is none."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        if path in seen:
            return path
    return ""


def _captured(one: _Seen) -> bool:
    try:
        capture(one.module, one.args, one.kwargs)
    except Exception:  # whatever it is, this part is none
        return False
    return True
