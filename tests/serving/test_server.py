"""Behind a real server, over loopback, with a real client."""

from __future__ import annotations

import http.client
import json
import socket
import threading

import pytest
import torch
from torch import nn

import graphopt
from graphopt.runtime.serving import Application
from tests.serving.gated import PATIENCE

uvicorn = pytest.importorskip("uvicorn", reason="needs the extra `serving`")


def test_many_clients_get_their_own_answers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    requests = torch.randn(24, 10, 16)
    with torch.no_grad():
        expected = model(requests)
    graphopt.optimize(model, backend="eager")
    dispatcher = graphopt.serve(model, requests[0, 0], sizes=(1, 8))
    config = uvicorn.Config(Application(dispatcher), log_level="warning", timeout_keep_alive=60)
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    # asyncio does this for the sockets that it makes itself; otherwise each answer takes 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    host, port = listener.getsockname()
    running = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    running.start()
    found = torch.full((24, 10, 4), torch.nan)

    def client(i: int) -> None:
        connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
        for j in range(10):
            connection.request("POST", "/", json.dumps({"inputs": requests[i, j].tolist()}))
            reply = json.loads(connection.getresponse().read())
            found[i, j] = torch.tensor(reply["outputs"])
        connection.close()

    threads = [threading.Thread(target=client, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    server.should_exit = True
    running.join(PATIENCE)
    assert not running.is_alive()
    torch.testing.assert_close(found, expected)
    assert dispatcher.stats().answered == 240
    with pytest.raises(graphopt.GraphoptError, match="closed"):  # the server has ended it
        dispatcher(requests[0, 0])
