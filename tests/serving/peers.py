"""A client and a server of the documented message format that share no code with the project's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import ServerConnection, serve

PATIENCE = 120.0
"""Seconds for what happens at once, but not on a crowded machine."""
HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
)
"""What a client sends first."""


def as_map(array: NDArray[Any]) -> dict[bytes, Any]:
    return {
        b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": list(array.shape),
    }  # fmt: skip


def encoded(value: dict[str, Any]) -> bytes:
    plain = {key: as_map(item) if isinstance(item, np.ndarray) else item for key, item in value.items()}
    return bytes(msgpack.packb(plain))


def decoded(message: bytes) -> Any:
    def hook(value: dict[Any, Any]) -> Any:
        if b"__ndarray__" in value:
            return np.frombuffer(value[b"data"], value[b"dtype"]).reshape(value[b"shape"])
        return value

    return msgpack.unpackb(message, object_hook=hook)


@contextmanager
def minimal_client(url: str, **options: Any) -> Iterator[tuple[ClientConnection, dict[str, Any]]]:
    """A connection, and the metadata that came first."""
    with connect(url, compression=None, max_size=None, proxy=None, **options) as connection:
        first = connection.recv(PATIENCE)
        assert isinstance(first, bytes)
        yield connection, decoded(first)


def asked(connection: ClientConnection, request: dict[str, Any]) -> Any:
    """The reply's content, or the sentence of a text frame."""
    connection.send(encoded(request))
    reply = connection.recv(PATIENCE)
    return reply if isinstance(reply, str) else decoded(reply)


@contextmanager
def minimal_server(reply: Callable[[Any, int], bytes | str | None], metadata: bytes | str = encoded({})) -> Iterator[str]:
    """The address of a server that answers request number n (of all connections) with `reply(request, n)`; None hangs up."""
    count = 0

    def handle(connection: ServerConnection) -> None:
        nonlocal count
        connection.send(metadata)
        for message in connection:
            assert isinstance(message, bytes)
            count += 1
            answer = reply(decoded(message), count)
            if answer is None:
                connection.close()
                return
            connection.send(answer)

    with serve(handle, "127.0.0.1", 0, compression=None, max_size=1_000_000, close_timeout=1) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()
