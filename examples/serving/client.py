"""Concurrent callers of `app.py`: each sends test images over a connection of its own.

Prints how many answers were right, what the callers waited, and how the server made its batches.
Run: ``python examples/serving/client.py [PORT] [CALLERS]``
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from typing import Any

import torch
from app import PORT, digits

IMAGES_EACH = 10


def connect(port: int) -> http.client.HTTPConnection:
    """A connection, as soon as the server is there."""
    for _ in range(600):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.connect()
        except ConnectionRefusedError:
            time.sleep(0.1)
        else:
            return connection
    raise SystemExit(f"nothing serves port {port}: start examples/serving/app.py first")


def ask(connection: http.client.HTTPConnection, method: str, path: str, content: object) -> Any:
    connection.request(method, path, json.dumps(content))
    return json.loads(connection.getresponse().read())


def main(port: int, callers: int) -> None:
    _, _, images, labels = digits()
    connect(port).close()
    right, seconds = [0] * callers, [[] for _ in range(callers)]

    def caller(number: int) -> None:
        connection = connect(port)
        for i in range(IMAGES_EACH):
            index = (number * IMAGES_EACH + i) % len(labels)
            start = time.perf_counter()
            reply = ask(connection, "POST", "/", {"inputs": images[index].tolist()})
            seconds[number].append(time.perf_counter() - start)
            right[number] += int(torch.tensor(reply["outputs"]).argmax() == labels[index])
        connection.close()

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    waited = sorted(s for each in seconds for s in each)
    stats = ask(connect(port), "GET", "/stats", None)
    print(f"{sum(right)} of {len(waited)} digits are right")
    for name, q in (("median", 0.5), ("99th percentile", 0.99)):
        print(f"{name}: {1e3 * waited[int(q * (len(waited) - 1))]:.1f} ms")
    print("batches by size:", stats["batches"])
    for what in ("queueing", "compute"):
        print(f"{what}: {stats[what]}")


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    main(*(given + [PORT, 200][len(given) :]))
