"""The ASGI application without a server: what goes in and what comes out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.runtime.serving import Application, Dispatcher
from tests.serving.gated import PATIENCE, Gated, row


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def call(
    app: Application,
    body: bytes = b"",
    *,
    method: str = "POST",
    path: str = "/",
    query: str = "",
    stays: bool = True,
) -> Reply | None:
    """One request, its body in two pieces; ``None`` if nothing was sent back."""
    half = len(body) // 2
    came = [
        {"type": "http.request", "body": body[:half], "more_body": True},
        {"type": "http.request", "body": body[half:]},
    ]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if came:
            return came.pop(0)
        if stays:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode()}
    await app(scope, receive, send)
    if not sent:
        return None
    start, end = sent
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    assert int(headers["content-length"]) == len(end["body"])
    return Reply(start["status"], headers, end["body"])


def post(app: Application, content: object, query: str = "") -> Reply:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    reply = asyncio.run(call(app, body, query=query))
    assert reply is not None
    return reply


@pytest.fixture
def model() -> Gated:
    return Gated()


@pytest.fixture
def dispatcher(model: Gated) -> Iterator[Dispatcher]:
    with model.serve(sizes=(1, 2), capacity=2) as dispatcher:
        yield dispatcher


@pytest.fixture
def app(dispatcher: Dispatcher) -> Application:
    return Application(dispatcher)


def test_a_request_in_json(app: Application) -> None:
    reply = post(app, {"inputs": [3, 4.5]})
    assert (reply.status, reply.json) == (200, {"outputs": [7.0, 10.0]})
    assert reply.headers["content-type"] == "application/json"


def test_json_keeps_the_bits_of_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4000,), generator=generator).to(torch.int32)
    values = bits.view(torch.float32)
    values = values[values.isfinite()]
    with Dispatcher(lambda x: x, values, sizes=(1,)) as dispatcher:
        reply = post(Application(dispatcher), {"inputs": values.tolist()})
    found = torch.tensor(reply.json["outputs"])
    assert torch.equal(found.view(torch.int32), values.view(torch.int32))


def test_structures_in_json() -> None:
    def run(x: Tensor, y: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return x, {"sum": x.sum(1) + y["n"], "on": y["on"]}

    example = (torch.zeros(2), {"n": torch.tensor(3), "on": torch.tensor(True)})
    with Dispatcher(run, example, sizes=(1,)) as dispatcher:
        app = Application(dispatcher)
        reply = post(app, {"inputs": [[1, 2], {"on": False, "n": 5}]})
        assert reply.json == {"outputs": [[1.0, 2.0], {"sum": 8.0, "on": False}]}
        for inputs, message in (
            ([[1, 2]], "inputs must be a list of 2"),
            ([[1, 2], {"n": 5}], "the keys of an object must be 'n', 'on'"),
            ([[1, 2], {"n": 5.5, "on": True}], "its numbers are no int64"),
            ([[1, 2], {"n": 2**70, "on": True}], "input 1['n'] is no tensor"),
            ([[1, [2]], {"n": 5, "on": True}], "input 0 is no tensor"),
        ):
            reply = post(app, {"inputs": inputs})
            assert reply.status == 400
            assert message in reply.json["error"]["message"]


def test_bodies_of_another_kind(dispatcher: Dispatcher) -> None:
    def decode(body: bytes) -> Tensor:
        if len(body) != 8:
            raise ValueError("not two float32")
        return torch.frombuffer(bytearray(body), dtype=torch.float32)

    def encode(answer: object) -> bytes:
        assert isinstance(answer, Tensor)
        return answer.numpy().tobytes()

    kind = "application/octet-stream"
    app = Application(dispatcher, decode=decode, encode=encode, content_type=kind)
    reply = post(app, row(1, 2).numpy().tobytes())
    assert (reply.status, reply.headers["content-type"]) == (200, kind)
    assert torch.frombuffer(bytearray(reply.body), dtype=torch.float32).tolist() == [3.0, 5.0]
    reply = post(app, b"1234")
    assert reply.status == 400
    assert "not two float32" in reply.json["error"]["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1, 2]",
        b'{"input": [1, 2]}',
        b"\xff",
        {"inputs": [1]},
        {"inputs": "ab"},
        b"[" * 9999,
    ],
)
def test_bad_requests(app: Application, content: object) -> None:
    reply = post(app, content)
    assert reply.status == 400
    assert reply.json["error"]["code"] == "GO-Q02"
    assert post(app, {"inputs": [1, 2]}).status == 200


def test_large_bodies(dispatcher: Dispatcher) -> None:
    app = Application(dispatcher, max_bytes=30)
    assert post(app, {"inputs": [1, 2]}).status == 200
    assert post(app, {"inputs": [1, 2.00000000000000000001]}).status == 200
    assert post(app, b" " * 31).status == 413


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/", 405), ("POST", "/stats", 405), ("GET", "/x", 404)]
)
def test_other_places(app: Application, method: str, path: str, status: int) -> None:
    reply = asyncio.run(call(app, method=method, path=path))
    assert reply is not None
    assert reply.status == status
    assert ("allow" in reply.headers) == (status == 405)


def test_stats(app: Application) -> None:
    post(app, {"inputs": [1, 2]})
    reply = asyncio.run(call(app, method="GET", path="/stats"))
    assert reply is not None
    assert reply.json["answered"] == 1
    assert reply.json["latency"]["count"] == 1


def test_an_error_of_the_model_stays_inside(
    app: Application, caplog: pytest.LogCaptureFixture
) -> None:
    reply = post(app, {"inputs": [5, -1]})
    assert reply.status == 500
    assert reply.json["error"]["message"] == "the model raised ValueError"
    assert "5 cannot be computed" in caplog.text


def test_overflow_deadline_and_a_client_that_leaves(
    app: Application, model: Gated, dispatcher: Dispatcher
) -> None:
    body = json.dumps({"inputs": [1, 2]}).encode()

    async def use() -> None:
        late = await call(app, body, query="timeout=0.001")
        assert late is not None
        assert (late.status, late.json["error"]["code"]) == (504, "GO-Q04")
        gone = await call(app, body, stays=False)
        assert gone is None
        while len(dispatcher):  # its task is cancelled, and ends at the next turns of the loop
            await asyncio.sleep(0)
        waiting = [asyncio.create_task(call(app, body)) for _ in range(2)]
        while len(dispatcher) < 2:
            await asyncio.sleep(0)
        full = await call(app, body)
        assert full is not None
        assert (full.status, full.headers["retry-after"]) == (503, "1")
        model._open.set()
        for reply in await asyncio.gather(*waiting):
            assert reply is not None
            assert reply.json == {"outputs": [3.0, 5.0]}

    with model.busy(dispatcher):
        asyncio.run(asyncio.wait_for(use(), PATIENCE))
    stats = dispatcher.stats()
    assert (stats.expired, stats.cancelled, stats.refused) == (1, 1, 1)


@pytest.mark.parametrize("timeout", ["-1", "nan", "soon"])
def test_bad_timeouts(app: Application, timeout: str) -> None:
    assert post(app, {"inputs": [1, 2]}, f"timeout={timeout}").status == 400


def test_a_deadline_for_all(dispatcher: Dispatcher, model: Gated) -> None:
    app = Application(dispatcher, timeout=0.001)
    with model.busy(dispatcher):
        assert post(app, {"inputs": [1, 2]}).status == 504
    assert post(app, {"inputs": [1, 2]}, f"timeout={PATIENCE}").status == 200


def test_the_end_of_the_server_drains(app: Application, model: Gated) -> None:
    dispatcher = app.dispatcher
    sent: list[str] = []

    async def live() -> None:
        came = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

        async def receive() -> Any:
            return came.pop(0)

        async def send(message: Any) -> None:
            sent.append(message["type"])

        await app({"type": "lifespan"}, receive, send)

    with model.busy(dispatcher):
        queued = dispatcher.submit(row(1, 1))
        model._open.set()
        asyncio.run(live())
    assert queued.done()
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert post(app, {"inputs": [1, 2]}).status == 503
