"""Concurrent callers over loopback: Batch Dispatch, one at a time, and fixed windows.

Run: ``python -m benchmarks.serving`` (eight minutes; needs the extra `serving`). Each rule has
a server process of its own, of the same code up to the rule; the callers are threads of this
process with a connection each. Loads alternate between the servers in random order. Every answer is
held against the plain model's: one that is lost, late, or another caller's would be seen.
"""

from __future__ import annotations

import http.client
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.serving_rules import EAGER, FEATURES, RULES, make

ROUNDS, SECONDS = 5, 3.0
CAPACITY, LITTLE = 512, 64
INPUTS = 4096
# Largest difference from the plain model, of answers about 0.1 apart; see `Oracle.spread`.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Load:
    """Callers that send the next request when they have the last answer, or every `period` s."""

    callers: int
    period: float = 0.0

    def __str__(self) -> str:
        if not self.period:
            return "1 caller" if self.callers == 1 else f"{self.callers} callers"
        return f"{self.callers} streams of {1 / self.period:.0f}/s"


LOADS = (Load(1), Load(8), Load(32), Load(200), Load(10, 1 / 20))


class Oracle:
    """Inputs, and what the plain model answers to each."""

    def __init__(self) -> None:
        x = torch.randn(INPUTS, FEATURES, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            y = make()(x)
        self.bodies = [row.numpy().tobytes() for row in x]
        self.answers = y.numpy()
        distances = torch.cdist(y, y, p=float("inf")) + torch.eye(INPUTS)
        self.spread = float(distances.min())  # how far apart the answers of two requests are


@dataclass
class Caller:
    """What one caller saw; no latency of its first request, which all callers send at once."""

    latencies: list[float] = field(default_factory=list)
    answers: int = 0
    refused: int = 0
    wrong: int = 0
    error: BaseException | None = None


def call(
    port: int, load: Load, number: int, oracle: Oracle, seconds: float, start: threading.Barrier
) -> Caller:
    seen = Caller()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.connect()
    start.wait()
    began = time.perf_counter()
    due = began + load.period * random.Random(number).random()
    until, request = began + seconds, 0
    while (now := time.perf_counter()) < until or request < 2:
        if load.period and now < due:
            time.sleep(due - now)
        due += load.period
        index = (number * 131 + request) % INPUTS
        request += 1
        before = time.perf_counter()
        connection.request("POST", "/", oracle.bodies[index])
        reply = connection.getresponse()
        body = reply.read()
        after = time.perf_counter()
        if reply.status == 503:
            seen.refused += 1
            continue
        if reply.status != 200:
            raise RuntimeError(f"{reply.status}: {body!r}")
        found = np.frombuffer(body, np.float32)
        seen.answers += 1
        seen.wrong += bool(np.abs(found - oracle.answers[index]).max() > TOLERANCE)
        if request > 1:
            seen.latencies.append(after - before)
    connection.close()
    return seen


def stats(port: int) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/stats")
    found: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return found


def measure(port: int, load: Load, oracle: Oracle, seconds: float = SECONDS) -> dict[str, float]:
    """One load on one server; latencies in milliseconds, throughput in answers per second."""
    before = stats(port)
    found = [Caller() for _ in range(load.callers)]
    start = threading.Barrier(load.callers)

    def one(i: int) -> None:
        try:
            found[i] = call(port, load, i, oracle, seconds, start)
        except BaseException as error:
            found[i].error = error
            start.abort()

    threads = [threading.Thread(target=one, args=(i,)) for i in range(load.callers)]
    for thread in threads:
        thread.start()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    after = stats(port)
    for caller in found:
        if caller.error is not None:
            raise caller.error
    latencies = [latency for caller in found for latency in caller.latencies]
    batches = sum(after["batches"].values()) - sum(before["batches"].values())
    answered = after["answered"] - before["answered"]
    answers = sum(caller.answers for caller in found)
    p50, p99 = np.quantile(latencies, [0.5, 0.99])
    return {
        "p50_ms": 1e3 * float(p50),
        "p99_ms": 1e3 * float(p99),
        "per_second": answers / took,
        "mean_batch": answered / batches,
        "answers": answers,
        "lost": answered - answers,
        "wrong": sum(caller.wrong for caller in found),
        "refused": sum(caller.refused for caller in found),
    }


@contextmanager
def server(rule: str, capacity: int) -> Iterator[IO[str]]:
    """A server process; it prints its port when it is ready."""
    command = [sys.executable, "-m", "benchmarks.serving_rules", rule, str(capacity)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield process.stdout
    finally:
        process.stdin.close()
        process.wait(60)


def summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Medians of what is measured, sums of what is counted."""
    counted = ("answers", "lost", "wrong", "refused")
    measured = {k: statistics.median(r[k] for r in rounds) for k in rounds[0] if k not in counted}
    sums = {k: int(sum(r[k] for r in rounds)) for k in counted}
    return {**{k: round(v, 3) for k, v in measured.items()}, **sums}


def compare(ports: dict[str, int], load: Load, oracle: Oracle) -> dict[str, Any]:
    """All rules under one load, alternating."""
    order = random.Random(str(load))
    rounds: dict[str, list[dict[str, float]]] = {rule: [] for rule in ports}
    for _ in range(ROUNDS):
        rules = list(ports)
        order.shuffle(rules)
        for rule in rules:
            rounds[rule].append(measure(ports[rule], load, oracle))
    ratios = {
        f"{EAGER} / {rule}": {
            what: harness.ratio({r: [m[what] for m in rounds[r]] for r in rounds}, EAGER, rule)
            for what in ("p50_ms", "p99_ms", "per_second")
        }
        for rule in ports
        if rule != EAGER
    }
    found = {rule: summary(measures) for rule, measures in rounds.items()}
    for rule, values in found.items():
        print(f"{load!s:20} {rule:16} {values}", flush=True)
    return {"rules": found, "ratios": ratios}


def main(note: str) -> None:
    torch.set_num_threads(1)
    oracle = Oracle()
    results: dict[str, Any] = {
        "note": note,
        "model": "perceptron, 256 -> 8 x 1024 -> 10, float32, one thread of torch per server",
        "server": "uvicorn, asyncio and h11; client: http.client in threads",
        "rounds": ROUNDS,
        "seconds": SECONDS,
        "least_distance_of_two_answers": oracle.spread,
        "tolerance": TOLERANCE,
        "loads": {},
    }
    assert oracle.spread > 2 * TOLERANCE
    with ExitStack() as servers:
        started = {rule: servers.enter_context(server(rule, CAPACITY)) for rule in RULES}
        ports = {rule: int(printed.readline()) for rule, printed in started.items()}
        for port in ports.values():
            measure(port, Load(32), oracle, 1.0)
        for load in LOADS:
            results["loads"][str(load)] = compare(ports, load, oracle)
    with server(EAGER, LITTLE) as printed:
        port = int(printed.readline())
        measures = [measure(port, Load(200), oracle) for _ in range(ROUNDS)]
        results["overflow"] = {"capacity": LITTLE, **summary(measures)}
        print(results["overflow"])
    print(harness.keep("serving_cpu", results))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "on an idle machine")
