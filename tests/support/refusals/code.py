"""Forward runs code whose effects a graph does not hold."""

from __future__ import annotations

import io
import logging
import threading
import time

import torch
from torch import Tensor, nn

from tests.support.refusals.example import Example, Refusal, Small, Way, small, train

LOCK = threading.Lock()


def locked(s: Small, h: Tensor) -> Tensor:
    with LOCK:
        return h * 2


def acquires(s: Small, h: Tensor) -> Tensor:
    LOCK.acquire()
    h = h * 2
    LOCK.release()
    return h


def watched(s: Small, h: Tensor) -> Tensor:
    with torch.autograd.set_detect_anomaly(True):
        return h * 2


def _locked_outside(model: nn.Module) -> object:
    with LOCK:
        return train(model)


_DOUBLED = Way(small(lambda s, h: h * 2), _locked_outside)

LOCKS = Refusal(
    "locks",
    "takes locks, or enters context managers that Dynamo cannot read",
    "their effect would be lost",
    "enter them around the call",
    (
        Example(
            "lock", small(locked), "context manager", "with LOCK:", "around the call", way=_DOUBLED
        ),
        Example(
            "acquire", small(acquires), "method call", "LOCK.acquire()", "around", way=_DOUBLED
        ),
        Example("anomalies", small(watched), "skipped", "set_detect_anomaly", way=_DOUBLED),
    ),
)


def times(s: Small, h: Tensor) -> Tensor:
    start = time.perf_counter()  # retain_grad and random.random are no reason
    return h * (2 if time.perf_counter() >= start else 1)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = self.make()

    def make(self) -> nn.Module:
        return nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


class Scripted(Chain):
    def make(self) -> nn.Module:
        return torch.jit.script(nn.Linear(4, 4))


OTHER_CODE = Refusal(
    "other code",
    "calls code that Dynamo cannot follow (clocks, files, `torch.save`, `torch.jit.script`, "
    "extensions in C)",
    "its effect would be lost",
    "keep it outside of the model",
    (
        Example(
            "clock", small(times), "skipped", "perf_counter()", "^rewrite this line", way=_DOUBLED
        ),
        Example(
            "file",
            small(lambda s, h: (open(__file__).close(), h * 2)[1]),
            "builtin",
            "open(__file__)",
            way=_DOUBLED,
        ),
        Example(
            "torch.save",
            small(lambda s, h: (torch.save(h.detach(), io.BytesIO()), h * 2)[1]),
            "cannot be captured",
            "torch.save",
            way=_DOUBLED,
        ),
        Example("script", Scripted, r"jit\.script", hint="outside of the model", way=Way(Chain)),
    ),
)

LOG = logging.getLogger(__name__)
LOG.propagate = False
LOG.addHandler(logging.NullHandler())

_LOGGED = Way(small(lambda s, h: (LOG.warning("%.4f", h.mean().item()), h * 2)[1]))


def counts_and_prints(s: Small, h: Tensor) -> Tensor:
    s.kept.append(1)
    print(s.kept)
    return h * 2


MESSAGES = Refusal(
    "messages",
    "prints objects that it has changed, or into a file; formats what it reads off tensors by `%`; "
    "asks a logger for its level",
    "messages come out at the end of a call",
    "an f-string; arguments of the logger",
    (
        Example(
            "changed",
            small(counts_and_prints),
            "Prints what is not known",
            "print(s.kept)",
            "^print",
        ),
        Example(
            "file",
            small(lambda s, h: (print("x", file=io.StringIO()), h * 2)[1]),
            "cannot be captured",
            "print(",
            way=_LOGGED,
        ),
        Example(
            "format",
            small(lambda s, h: (LOG.warning("%.4f" % h.mean().item()), h * 2)[1]),  # noqa: UP031
            "Observed exception",
            "h.mean().item()",
            "^write an f-string",
            way=_LOGGED,
        ),
        Example(
            "level",
            small(lambda s, h: h * 2 if LOG.isEnabledFor(30) else h),
            "logging.Logger method",
            "isEnabledFor",
            "^log by its methods",
            way=_LOGGED,
        ),
    ),
)

ALL = (LOCKS, OTHER_CODE, MESSAGES)
