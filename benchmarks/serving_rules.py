"""A server of one model, with one of the rules by which batches are made.

Started by `benchmarks.serving` as ``python -m benchmarks.serving_rules RULE CAPACITY``. Prints its
port when it takes requests, and ends when its input ends.
"""

from __future__ import annotations

import itertools
import socket
import sys
import threading
import time

import torch
import uvicorn
from torch import Tensor, nn

import graphopt
from graphopt.runtime.serving import Application, Dispatcher
from graphopt.runtime.serving.queue import Request

FEATURES, WIDTH, LAYERS, CLASSES = 256, 1024, 8, 10
SIZES = (1, 2, 4, 8, 16, 32)
ONE, EAGER, WINDOWS = "one at a time", "Batch Dispatch", (2, 10)
RULES = (ONE, EAGER, *(f"window of {w} ms" for w in WINDOWS))


def make() -> nn.Module:
    """A perceptron of 31 MB: for one request, nearly all of its time is reading weights."""
    torch.manual_seed(0)
    widths = [FEATURES, *[WIDTH] * LAYERS, CLASSES]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


class FixedWindow(Dispatcher):
    """Starts a batch when it is full, or when its oldest request has waited `window` seconds."""

    window = 0.0

    def _next(self) -> list[Request] | None:
        queue, most = self._queue, self.sizes[-1]
        with queue._changed:
            queue._changed.wait_for(lambda: queue._room or queue._closed)
            for oldest in queue._room:
                left = oldest.entered + self.window - time.perf_counter()
                queue._changed.wait_for(lambda: len(queue._room) >= most, max(0.0, left))
                break
        return super()._next()


def serve(rule: str, capacity: int) -> Dispatcher:
    """A dispatcher by the rule of this name."""
    model = make()
    graphopt.optimize(model, passes="cleanup,fold_inference", backend="eager", verify="off")
    example = torch.randn(FEATURES)
    if rule in (ONE, EAGER):
        sizes = (1,) if rule == ONE else SIZES
        return graphopt.serve(model, example, sizes=sizes, capacity=capacity)
    dispatcher = FixedWindow(model, example, sizes=SIZES, capacity=capacity)
    dispatcher.window = 1e-3 * float(rule.split()[2])
    return dispatcher


def decode(body: bytes) -> Tensor:
    return torch.frombuffer(bytearray(body), dtype=torch.float32)


def encode(answer: object) -> bytes:
    assert isinstance(answer, Tensor)
    return answer.numpy().tobytes()


def main(rule: str, capacity: int) -> None:
    torch.set_num_threads(1)
    kind = "application/octet-stream"
    app = Application(serve(rule, capacity), decode=decode, encode=encode, content_type=kind)
    # The same for all rules: no access log, the loop and the parser of the plain installation.
    config = uvicorn.Config(app, log_level="warning", loop="asyncio", http="h11", backlog=512)
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    # asyncio does this for the sockets that it makes itself; otherwise each answer takes 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def until_input_ends() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=until_input_ends, daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    server.run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
