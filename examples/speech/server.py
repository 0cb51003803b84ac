"""A trained network behind HTTP: one utterance per request, batches by Batch Dispatch.

Started by `graphopt.examples.speech.serve` in a process of its own. Needs the extra `serving`.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import graphopt
from graphopt.examples.common import WorkloadError
from graphopt.examples.speech.data import BANDS, FRAMES, SYMBOLS
from graphopt.examples.speech.model import DeepSpeech
from graphopt.runtime.serving import Application, Dispatcher

BUCKET = FRAMES[-1]
"""What utterances are padded to: all requests to one dispatcher have one shape."""

CAPACITY = 256
"""Requests that may wait; more are told to come again."""

_LENGTH = struct.Struct("<i")


def load(path: Path) -> DeepSpeech:
    """The network that `train` has left, in inference mode.

    Raises:
        WorkloadError: there is none, or it is no such network.
    """
    if not path.exists():
        raise WorkloadError(
            f"there is no network at {path}", "python -m graphopt.examples.speech.train"
        )
    try:
        saved = torch.load(path, weights_only=True)
        model = DeepSpeech(BANDS, len(SYMBOLS), **saved["options"])
        model.load_state_dict(saved["model"])
    except Exception as error:
        raise WorkloadError(
            f"{path} holds no network ({type(error).__name__})",
            "python -m graphopt.examples.speech.train",
        ) from error
    return model.eval()


def dispatcher(model: DeepSpeech, sizes: Sequence[int]) -> Dispatcher:
    """Serve a network in batches of these sizes, as one captured graph each."""
    graphopt.optimize(model, backend="eager")
    draw = torch.Generator().manual_seed(0)
    example = (torch.randn(BUCKET, BANDS, generator=draw), torch.tensor(BUCKET // 2))
    return graphopt.serve(model, example, sizes=sizes, capacity=CAPACITY)


def encode_request(features: Tensor, length: int) -> bytes:
    """A body: frames as an integer, then float32 features (BUCKET, BANDS), all little-endian."""
    return _LENGTH.pack(length) + features.numpy().astype("<f4").tobytes()


def decode_request(body: bytes) -> tuple[Tensor, Tensor]:
    """Features and length.

    Raises:
        ValueError: the body is not one of `encode_request`.
    """
    wanted = _LENGTH.size + 4 * BUCKET * BANDS
    if len(body) != wanted:
        raise ValueError(f"{len(body)} bytes, and {wanted} are an utterance")
    (length,) = _LENGTH.unpack_from(body)
    if not 1 <= length <= BUCKET:
        raise ValueError(f"a length of {length} frames is not between 1 and {BUCKET}")
    features = np.frombuffer(body, "<f4", offset=_LENGTH.size).astype(np.float32)
    if not np.isfinite(features).all():
        raise ValueError("the features hold NaN or infinities")
    return torch.from_numpy(features).reshape(BUCKET, BANDS), torch.tensor(length)


def encode_answer(answer: object) -> bytes:
    """Log-probabilities (frames, symbols) as float32, little-endian."""
    assert isinstance(answer, Tensor)
    return answer.numpy().astype("<f4").tobytes()


def decode_answer(body: bytes) -> Tensor:
    """The reverse of `encode_answer`."""
    return torch.from_numpy(np.frombuffer(body, "<f4").copy()).reshape(-1, len(SYMBOLS))


def run(path: Path, sizes: Sequence[int], parent: Connection) -> None:
    """Serve until the parent says something or is gone; tells it the port first."""
    import uvicorn

    torch.set_num_threads(1)
    application = Application(
        dispatcher(load(path), sizes),
        decode=decode_request,
        encode=encode_answer,
        content_type="application/octet-stream",
    )
    config = uvicorn.Config(application, log_level="warning", timeout_keep_alive=60)
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    # asyncio does this for the sockets that it makes itself; otherwise each answer takes 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def until_told() -> None:
        parent.poll(None)
        server.should_exit = True

    threading.Thread(target=until_told, daemon=True).start()
    parent.send(listener.getsockname()[1])
    server.run(sockets=[listener])
