"""A dispatcher as an ASGI application: any ASGI server makes a web service of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from graphopt.errors import (
    ClosedError,
    DeadlineError,
    GraphoptError,
    QueueFullError,
    RequestError,
    ServingError,
)
from graphopt.runtime.serving.bodies import FromJson, to_json
from graphopt.runtime.serving.dispatcher import Dispatcher

log = logging.getLogger("graphopt")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Decode = Callable[[bytes], object]
Encode = Callable[[object], bytes]

MAX_BYTES = 16 * 2**20


class _Gone(Exception):
    """The client has left."""


class Application:
    """A dispatcher behind HTTP.

    ========================  ====================================================================
    ``POST /``                one request; ``?timeout=0.05`` is its deadline, in seconds
    ``GET /stats``            `Stats` as JSON
    ========================  ====================================================================

    Without `decode` and `encode`, bodies are JSON, as `graphopt.runtime.serving.bodies` has it.

    Errors are JSON with code, message and hint. Status 400 is a request of another form, 413 a body
    that is too large, 503 a full queue (with ``Retry-After``) or a closed dispatcher, 504 a missed
    deadline, 500 an error of the model, whose text goes to the log and not to the client. A client
    that leaves takes its request back. When the server ends, the dispatcher drains and closes.

    Args:
        dispatcher: what answers.
        decode: a request, from the bytes of a body; its ``ValueError`` is the client's error.
        encode: the bytes of a body, from an answer.
        content_type: of encoded answers.
        timeout: the deadline, in seconds, of requests that name none.
        max_bytes: the largest body that is read.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        decode: Decode | None = None,
        encode: Encode | None = None,
        content_type: str = "application/json",
        timeout: float | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.dispatcher = dispatcher
        self._decode = FromJson(dispatcher.form) if decode is None else decode
        self._encode = to_json if encode is None else encode
        self._content_type = content_type.encode("latin-1")
        self._timeout = timeout
        self._max_bytes = max_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One connection's request, as ASGI calls it."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            with contextlib.suppress(_Gone):
                await self._respond(scope, receive, send)
        else:
            raise ServingError(f"{scope['type']} is not served", hint="use HTTP")

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            kind = (await receive())["type"]
            if kind == "lifespan.shutdown":
                await self.dispatcher.aclose()
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

    async def _respond(self, scope: Message, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        allowed = {"/": "POST", "/stats": "GET"}.get(path)
        if allowed is None:
            await _send(send, 404, _problem(ServingError(f"there is no {path}", hint="POST /")))
        elif method != allowed:
            error = ServingError(f"{method} {path} is not served", hint=f"{allowed} {path}")
            await _send(send, 405, _problem(error), (b"allow", allowed.encode()))
        elif path == "/stats":
            await _send(send, 200, json.dumps(self.dispatcher.stats().to_json()).encode())
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            timeout = self._timeout_of(scope)
            body = await self._body(receive)
            try:
                request = self._decode(body)
            except ServingError:
                raise
            except ValueError as error:
                raise RequestError(f"the body cannot be read: {error}") from error
            answer = await _while_there(self.dispatcher.acall(request, timeout=timeout), receive)
            encoded = self._encode(answer)
        except (RequestError, QueueFullError, DeadlineError, ClosedError, _TooLargeError) as error:
            status = next(code for kind, code in _STATUS.items() if isinstance(error, kind))
            retry = ((b"retry-after", b"1"),) if status == 503 else ()
            await _send(send, status, _problem(error), *retry)
        except _Gone:
            raise
        except Exception as error:
            log.exception("a request failed")
            await _send(send, 500, _problem(ServingError(f"the model raised {_kind(error)}")))
        else:
            await _send(send, 200, encoded, kind=self._content_type)

    def _timeout_of(self, scope: Message) -> float | None:
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("timeout")
        if given is None:
            return self._timeout
        try:
            seconds = float(given[-1])
        except ValueError:
            seconds = -1.0
        if not seconds >= 0:
            raise RequestError(f"timeout={given[-1]} is no time to wait", hint="seconds, as 0.05")
        return seconds

    async def _body(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                raise _TooLargeError(
                    f"the body has more than {self._max_bytes} bytes",
                    hint="send one example per request",
                )
            if not message.get("more_body", False):
                return bytes(body)


class _TooLargeError(ServingError):
    """A body with more bytes than are read."""


_STATUS: dict[type[ServingError], int] = {
    RequestError: 400,
    _TooLargeError: 413,
    QueueFullError: 503,
    ClosedError: 503,
    DeadlineError: 504,
}


async def _while_there(answer: Awaitable[object], receive: Receive) -> object:
    """An answer, as long as the client waits for it."""
    answering = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise _Gone
        return answering.result()
    finally:
        for task in (answering, leaving):
            task.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _problem(error: GraphoptError) -> bytes:
    said = {"code": error.code, "message": error.message, "hint": error.hint}
    return json.dumps({"error": said}).encode()


def _kind(error: Exception) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")


async def _send(
    send: Send,
    status: int,
    body: bytes,
    *headers: tuple[bytes, bytes],
    kind: bytes = b"application/json",
) -> None:
    head = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
