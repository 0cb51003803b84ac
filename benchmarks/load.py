"""Calls and requests for minutes: errors to others, growth, latency.

Run: ``python -m benchmarks.load [SECONDS]`` (600 by default). For half of the time, eight threads
call one model under ``no_grad`` with batches of mixed sizes. For the other half, a dispatcher has
200 callers, threads and tasks of asyncio, of which some die: threads that raise with a request
under way, tasks that are cancelled as those of a client that has gone, futures that are taken
back, requests of a wrong form, and such as the model raises for. Each that dies is followed by
another one. Every answer is compared with the plain model's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from benchmarks.harness import keep
from benchmarks.soak import look, slope
from graphopt.errors import GraphoptError
from graphopt.runtime.serving import Dispatcher

FEATURES, POISON = 16, 1e9
THREADS, CALLERS, TASKS = 8, 150, 50
INPUTS = 256
# Answers without which nothing is said.
LEAST = 1500


class Net(nn.Module):
    """A network that raises for one kind of row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Four numbers for each row."""
        y: Tensor = self.layers(x)
        return y


@dataclass
class Seen:
    """What many callers have seen together.

    Attributes:
        counts: what became of calls and callers.
        errors: what should not have been.
        times: seconds of each answer, by the second in which it came.
        begun: when it began.
        ended: set when callers are to end.
    """

    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    times: dict[int, list[float]] = field(default_factory=dict)
    begun: float = field(default_factory=time.perf_counter)
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answered(self, since: float) -> None:
        """An answer came, and was right."""
        now = time.perf_counter()
        with self.lock:
            self.counts["answers"] += 1
            self.times.setdefault(int(now - self.begun), []).append(now - since)

    def count(self, what: str) -> None:
        """Something happened."""
        with self.lock:
            self.counts[what] += 1

    def error(self, error: BaseException | str) -> None:
        """Something that should not have been."""
        with self.lock:
            self.errors.append(error if isinstance(error, str) else repr(error))


def watched(seconds: float, seen: Seen) -> dict[str, Any]:
    """Look at this process until the time is over; what grew, and how latency went."""
    every = max(0.2, seconds / 100)
    looks: dict[str, list[float]] = {}
    # A machine that is busy may give none for seconds.
    while time.perf_counter() - seen.begun < seconds or (
        seen.counts["answers"] < LEAST and not seen.errors
    ):
        time.sleep(every)
        for name, value in look().items():
            looks.setdefault(name, []).append(value)
    seen.ended.set()
    with seen.lock:
        order = [times for _, times in sorted(seen.times.items())]
    quarter = max(1, len(order) // 4)
    first = [t for times in order[quarter : 2 * quarter] or order for t in times] or [math.nan]
    last = [t for times in order[-quarter:] for t in times] or [math.nan]
    grown = {}
    for name, values in looks.items():
        rest = values[len(values) // 4 :]
        grown[name] = {
            "begin": rest[0],
            "end": statistics.median(rest[-5:]),
            "per minute": round(slope(rest) * 60 / every, 3),
        }
    return {
        "seconds": round(seconds),
        "counts": dict(seen.counts),
        "errors": seen.errors[:5],
        "unexpected": len(seen.errors),
        "milliseconds": {
            when: {
                "p50": round(1e3 * statistics.median(times), 3),
                "p99": round(1e3 * sorted(times)[int(0.99 * len(times))], 3),
            }
            for when, times in (("second quarter", first), ("last quarter", last))
        },
        "process": grown,
    }


def _oracle(model: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.randn(INPUTS, FEATURES, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, model(x)


def threads(seconds: float) -> dict[str, Any]:
    """Eight threads call one model with mixed sizes."""
    plain = Net().eval()
    x, y = _oracle(plain)
    model = graphopt.optimize(Net().eval(), backend="eager")
    seen = Seen()

    def run(number: int) -> None:
        draw = random.Random(number)
        try:
            with torch.no_grad():
                while not seen.ended.is_set():
                    rows = draw.choice((1, 2, 3, 5, 8, 13, 21, 34, 55))
                    start = draw.randrange(INPUTS - rows)
                    since = time.perf_counter()
                    found = model(x[start : start + rows])
                    if not torch.allclose(found, y[start : start + rows], atol=1e-5):
                        seen.error("a wrong answer")
                    seen.answered(since)
        except BaseException as error:
            seen.error(error)

    callers = [threading.Thread(target=run, args=(n,)) for n in range(THREADS)]
    for caller in callers:
        caller.start()
    found = watched(seconds, seen)
    for caller in callers:
        caller.join(60)
    return found


def serving(seconds: float) -> dict[str, Any]:
    """200 callers of a dispatcher, some of whom die."""
    plain = Net().eval()
    x, y = _oracle(plain)
    model = graphopt.optimize(Net().eval(), backend="eager")

    def answer(rows: Tensor) -> object:
        if bool((rows == POISON).any()):
            raise ArithmeticError("a poisoned row")
        return model(rows)

    seen = Seen()
    # Quiet: a thread that dies would print its traceback.
    hook, threading.excepthook = threading.excepthook, lambda _: None
    try:
        with Dispatcher(answer, x[0], sizes=(1, 8, 32, 128)) as dispatcher:
            seen.begun = time.perf_counter()

            pools = [
                threading.Thread(target=_replace, args=(number, dispatcher, x, y, seen))
                for number in range(CALLERS)
            ]
            loop = threading.Thread(target=lambda: asyncio.run(_tasks(dispatcher, x, y, seen)))
            for thread in (*pools, loop):
                thread.start()
            found = watched(seconds, seen)
            for thread in (*pools, loop):
                thread.join(60)
            stats = dispatcher.stats()
    finally:
        threading.excepthook = hook
    found["under way at the end"] = stats.under_way
    return found


def _replace(number: int, dispatcher: Dispatcher, x: Tensor, y: Tensor, seen: Seen) -> None:
    """A caller, and one after the other that takes the place of one that has died."""
    lives = 0
    while not seen.ended.is_set():
        lives += 1
        caller = threading.Thread(
            target=_caller, args=(f"{number} {lives}", dispatcher, x, y, seen)
        )
        caller.start()
        caller.join()


def _caller(name: str, dispatcher: Dispatcher, x: Tensor, y: Tensor, seen: Seen) -> None:
    draw = random.Random(name)
    while not seen.ended.is_set():
        index, how = draw.randrange(INPUTS), draw.random()
        since = time.perf_counter()
        if how < 0.01:
            dispatcher.submit(x[index], wait=True)
            seen.count("threads that died with a request under way")
            raise RuntimeError("this caller dies")
        try:
            if how < 0.03:
                dispatcher.submit(x[index], wait=True).cancel()
                seen.count("futures taken back")
            elif how < 0.04:
                dispatcher(torch.full((FEATURES,), POISON), wait=True)
                seen.error("a poisoned row was answered")
            elif how < 0.05:
                dispatcher(x[index, :3])
                seen.error("a wrong form was answered")
            else:
                found: Any = dispatcher(x[index], wait=True)
                if not torch.allclose(found, y[index], atol=1e-5):
                    seen.error("a wrong answer")
                seen.answered(since)
        except ArithmeticError:
            seen.count("requests the model raised for")
        except (GraphoptError, CancelledError) as error:
            if not how < 0.05:
                seen.error(error)
            seen.count("requests refused")
        time.sleep(draw.random() * 0.02)


async def _tasks(dispatcher: Dispatcher, x: Tensor, y: Tensor, seen: Seen) -> None:
    draw = random.Random(0)

    async def ask() -> None:
        while not seen.ended.is_set():
            index, since = draw.randrange(INPUTS), time.perf_counter()
            found: Any = await dispatcher.acall(x[index])
            if not torch.allclose(found, y[index], atol=1e-5):
                seen.error("a wrong answer")
            seen.answered(since)
            await asyncio.sleep(draw.random() * 0.02)

    running = [asyncio.create_task(ask()) for _ in range(TASKS)]
    while not seen.ended.is_set():
        await asyncio.sleep(0.05)
        place = draw.randrange(TASKS)
        running[place].cancel()
        for done in await asyncio.gather(running[place], return_exceptions=True):
            if not isinstance(done, asyncio.CancelledError):
                seen.error(f"a task ended with {done!r}")
        seen.count("clients that have gone")
        running[place] = asyncio.create_task(ask())
    for done in await asyncio.gather(*running, return_exceptions=True):
        if isinstance(done, BaseException):
            seen.error(done)


def main() -> None:
    """Run both and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", nargs="?", type=float, default=600.0)
    seconds = parser.parse_args().seconds
    results = {"threads": threads(seconds / 2), "serving": serving(seconds / 2)}
    print(json.dumps(results, indent=1))
    if any(found["unexpected"] for found in results.values()):
        sys.exit(1)
    keep("load", results)


if __name__ == "__main__":
    main()
