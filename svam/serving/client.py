"""A small client of any server that speaks openpi's websocket protocol; how its chunks are executed is `execution.py`."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect

from svam.serving.protocol import ProtocolError, ServingError, pack, unpack

TOO_LARGE = 1009
"""The close code of a message above the receiver's limit."""


class PolicyClient:
    """Asks a policy server for actions; connects at once, and again when the connection is lost.
    Requests of several threads take turns.

    key: sent as `Authorization: Api-Key ...`. connect_seconds, reply_seconds: the longest wait for a connection and for a
    reply. attempts: how often a request is sent, and a connection tried, before it is given up, with `pause_seconds` between.
    max_reply: bytes. metadata: what the server said of itself.

    A request that was sent may be sent again after a lost connection; servers of this protocol keep nothing between requests.
    """

    def __init__(
        self, url: str = "ws://127.0.0.1:8000", *, key: str | None = None, connect_seconds: float = 10.0,
        reply_seconds: float = 30.0, attempts: int = 3, pause_seconds: float = 0.5, max_reply: int = 8 * 2**20,
    ) -> None:  # fmt: skip
        """Raises `ServingError` if there is no policy server at `url`."""
        self.url = url
        self._headers = {"Authorization": f"Api-Key {key}"} if key else {}
        self._connect_seconds, self._reply_seconds, self._max_reply = connect_seconds, reply_seconds, max_reply
        self._attempts, self._pause = attempts, pause_seconds
        self._connection: ClientConnection | None = None
        self._turn = threading.Lock()
        self.metadata: dict[str, Any] = {}
        self._retried(self._connect)

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; the next request opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The server's reply to an observation (its keys are the server's; see README.md for ours), with `actions` checked:
        (K, A) float32, finite.

        Raises:
            ProtocolError: the observation cannot be sent, or the reply is not of the format.
            ServingError: no connection, no reply in time, a refusal (with the server's sentence), or no actions in the reply.
        """
        message = pack(dict(observation))
        with self._turn:
            answer = self._retried(lambda: self._exchange(message))
        if isinstance(answer, str):
            said = [line.strip() for line in answer.splitlines() if line.strip()]  # some servers send a traceback
            raise ServingError(f"{self.url} refused the observation: {said[-1][:500] if said else 'it did not say why'}")
        reply = unpack(answer)
        if not isinstance(reply, dict):
            raise ServingError(f"{self.url} replied with {type(reply).__name__}, expected a map with 'actions'")
        return reply | {"actions": self._checked(reply.get("actions"))}

    def actions(self, observation: Mapping[str, Any]) -> NDArray[np.float32]:
        """The action chunk (K, A) float32 of `infer`."""
        chunk: NDArray[np.float32] = self.infer(observation)["actions"]
        return chunk

    def _checked(self, actions: Any) -> NDArray[np.float32]:
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or 0 in actions.shape or actions.dtype.kind not in "iuf":
            shape = f"{actions.dtype} {actions.shape}" if isinstance(actions, np.ndarray) else type(actions).__name__
            raise ServingError(f"{self.url} replied with actions of {shape}, expected numbers (K, A)")
        if not np.isfinite(actions).all():
            step, dimension = np.argwhere(~np.isfinite(actions))[0]
            raise ServingError(f"{self.url} replied with {actions[step, dimension]} as action {step}, dimension {dimension}")
        return actions.astype(np.float32)

    def _exchange(self, message: bytes) -> bytes | str:
        """Send one message and wait for its reply. After a time-out the connection is given up: the reply that may still come
        would be taken for the next request's."""
        connection = self._connection or self._connect()
        try:
            connection.send(message)
            return connection.recv(self._reply_seconds)
        except TimeoutError:
            self.close()
            raise ServingError(f"{self.url} did not reply within {self._reply_seconds:g} s") from None
        except ConnectionClosed as error:
            self.close()
            if error.rcvd is not None and error.rcvd.code == TOO_LARGE:
                raise ServingError(
                    f"{self.url} takes no message as large as this observation of {len(message)} bytes; send smaller pictures"
                ) from None
            if error.sent is not None and error.sent.code == TOO_LARGE:
                raise ServingError(f"{self.url} sent a reply above max_reply, {self._max_reply} bytes") from None
            raise

    def _retried(self, work: Any) -> Any:
        """Do `work` up to `attempts` times as long as connections fail; what else goes wrong is not tried again."""
        for attempt in range(self._attempts):
            try:
                return work()
            except (OSError, WebSocketException) as error:
                if isinstance(error, InvalidURI):
                    raise ServingError(f"{self.url!r} is no address of a policy server, such as ws://127.0.0.1:8000") from None
                if isinstance(error, InvalidStatus) and error.response.status_code != 503:
                    raise ServingError(f"{self.url} does not let this client in: {_said(error)}") from None
                if attempt + 1 == self._attempts:
                    why = _said(error) if isinstance(error, InvalidStatus) else str(error) or type(error).__name__
                    tried = f"{self._attempts} attempts" if self._attempts > 1 else "one attempt"
                    raise ServingError(f"{self.url} cannot be reached ({tried}): {why}; is the server running there?") from None
            time.sleep(self._pause)
        raise ServingError(f"attempts is {self._attempts}, expected at least 1")

    def _connect(self) -> ClientConnection:
        connection = connect(
            self.url, additional_headers=self._headers, compression=None, proxy=None, open_timeout=self._connect_seconds,
            close_timeout=1.0, max_size=self._max_reply,
        )  # fmt: skip
        self._connection = connection
        # A server that stops reading would otherwise block `send` for ever.
        seconds, rest = divmod(self._reply_seconds, 1.0)
        limit = struct.pack("ll", int(seconds), int(1e6 * rest))
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            self.metadata = self._known(connection.recv(self._connect_seconds))
        except BaseException:
            self.close()
            raise
        return connection

    def _known(self, first: bytes | str) -> dict[str, Any]:
        """The metadata in the server's first message."""
        try:
            metadata = unpack(first) if isinstance(first, bytes) else None
        except ProtocolError:
            metadata = None
        if not isinstance(metadata, dict):
            raise ServingError(f"{self.url} sent no metadata on connecting, so it is no policy server")
        before, weights = (known.get("weights_sha256") for known in (self.metadata, metadata))
        if self.metadata and weights != before:
            raise ServingError(f"{self.url} now serves other weights ({weights}, before {before}); make a new client for them")
        return metadata


def _said(error: InvalidStatus) -> str:
    """What an HTTP response says."""
    body = " ".join((error.response.body or b"").decode(errors="replace").split())[:200]
    return f"{error.response.status_code} {body or error.response.reason_phrase}"
