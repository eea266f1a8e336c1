"""The policy as a websocket server that speaks openpi's format: one connection a client, one request at a time on each."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from time import perf_counter
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from svam.errors import SvamError
from svam.models.svam import SVAM
from svam.serving.batching import Batcher
from svam.serving.inference import Inference
from svam.serving.protocol import ServingError, pack
from svam.serving.request import read_request

OPEN_SECONDS = 5.0
"""A connection that has not finished its opening handshake by then is dropped; so is one that does not finish closing."""
STOP_SECONDS = 10.0
"""How long a server that is told to stop waits for replies that are on their way."""
LOGGED = 10
"""Refused requests of one client that the log tells; the others are counted."""
log = logging.getLogger("svam.serving")
_library_log = logging.getLogger("svam.serving.websockets")
_library_log.setLevel(logging.CRITICAL)  # whatever a stranger sends would be a traceback there


def describe(svam: SVAM, sha256: str, batch: int) -> dict[str, Any]:
    """The metadata that every client gets on connecting: what an observation must hold, and what a reply will.

    weights_sha256: of the model's manifest, which lists every file's. actions: range of the training demonstrations; None where
    the conversion changed their numbers, since a reply has the data set's own.
    """
    config, actions, convention = svam.config, svam.statistics.actions, svam.statistics.convention
    return {
        "policy": "svam", "weights_sha256": sha256, "cameras": {camera: list(config.image_size) for camera in svam.cameras},
        "proprioception": svam.proprioception, "chunk": config.chunk, "rate_hz": config.rate_hz, "batch": batch,
        "action_dimensions": convention.dimensions,
        "actions": None if convention.changed else {"min": actions.min, "max": actions.max},
        "takes_seed": True,
    }  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Where the server listens and what it allows; the command's options of the same names describe each. port 0: any free one.
    max_message: bytes. gather, ping: seconds.

    Raises:
        ServingError: others than this computer could ask without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = field(default=None, repr=False)
    max_clients: int = 16
    queue: int = 16
    max_message: int = 8 * 2**20
    gather: float = 0.005
    ping: float = 20.0

    def __post_init__(self) -> None:
        with suppress(ValueError):  # a name, which may mean any computer
            if self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback:
                return
        if self.key is None:
            raise ServingError(
                f"--host {self.host} can be reached from elsewhere, but there is no key: name an environment variable that "
                "holds one with --key-env, or listen on 127.0.0.1 and use a tunnel (ssh -L)"
            )


class PolicyServer:
    """Serves one policy until it is told to stop."""

    def __init__(self, inference: Inference, thread: Executor, sha256: str, settings: Settings) -> None:
        """`inference` has been warmed up; `thread`, an executor of one, is where it computes."""
        self._svam, self._settings = inference.svam, settings
        self._metadata = pack(describe(inference.svam, sha256, inference.batch))
        self._clients = 0
        self._replying = 0
        self._stopping = False
        self._batcher = Batcher(inference, thread, inference.batch, settings.queue, settings.gather, lambda: self._clients)

    async def run(self, stop: asyncio.Event, listening: Callable[[int], None]) -> None:
        """Serve until `stop` is set; then finish the replies that are on their way and close every connection.

        listening: is told the port, once clients may connect.

        Raises:
            ServingError: the address cannot be listened on.
        """
        wanted = self._settings
        batches = asyncio.create_task(self._batcher.run())
        stopped = asyncio.create_task(stop.wait())
        try:
            async with serve(
                self._serve_client, wanted.host, wanted.port, process_request=self._admit, compression=None,
                origins=[None],  # a browser names the page it acts for, and a page has no business with a robot
                open_timeout=OPEN_SECONDS, close_timeout=OPEN_SECONDS, ping_interval=wanted.ping, ping_timeout=wanted.ping,
                max_size=wanted.max_message, max_queue=1, logger=_library_log,
            ) as server:  # fmt: skip
                listening(int(server.sockets[0].getsockname()[1]))
                await asyncio.wait({stopped, batches}, return_when=asyncio.FIRST_COMPLETED)
                self._stopping = True
                with suppress(TimeoutError):
                    async with asyncio.timeout(STOP_SECONDS):
                        while self._replying:
                            await asyncio.sleep(0.01)
        except OSError as error:
            raise ServingError(
                f"cannot listen on {wanted.host}:{wanted.port}: {error.strerror or error}; choose another --host or --port"
            ) from None
        finally:
            stopped.cancel()
            batches.cancel()
            with suppress(asyncio.CancelledError):
                await batches

    def _admit(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Answer a plain HTTP request, or let a client in (None)."""
        if request.path.partition("?")[0] == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if self._settings.key is not None:
            given = request.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode(errors="replace"), f"Api-Key {self._settings.key}".encode()):
                return connection.respond(HTTPStatus.UNAUTHORIZED, "the key is missing or wrong\n")
        if self._stopping:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping\n")
        if self._clients >= self._settings.max_clients:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, f"{self._clients} clients are connected, the most\n")
        return None

    async def _serve_client(self, connection: ServerConnection) -> None:
        if self._clients >= self._settings.max_clients:  # others came in during this one's handshake
            await connection.close(1013, f"{self._clients} clients are connected, the most")
            return
        self._clients += 1
        client = _Client(connection, "client {}:{}".format(*(connection.remote_address or "??")[:2]))
        log.info("%s connected, %d in all", client.name, self._clients)
        try:
            await connection.send(self._metadata)
            async for message in connection:
                start = perf_counter()
                self._replying += 1
                try:
                    reply = await self._reply(client, message)
                    if reply is None:  # nobody waits for it any more
                        break
                    await connection.send(reply)
                finally:
                    self._replying -= 1
                client.last = {"prev_total_ms": _milliseconds(perf_counter() - start)}
        except ConnectionClosed:
            pass
        finally:
            self._clients -= 1
            code, reason = connection.close_code, connection.close_reason
            log.info("%s left (%s %s), %d requests refused", client.name, code, reason, client.refused)

    async def _reply(self, client: _Client, message: bytes | str) -> bytes | str | None:
        """The reply to one message: actions as a binary frame, one sentence as a text frame, or None if the client has gone."""
        start = perf_counter()
        try:
            if self._stopping:
                raise ServingError("the server is stopping; connect again later")
            request = read_request(message, self._svam)
            read = perf_counter() - start
            asking = asyncio.create_task(self._batcher.ask(request))
            leaving = asyncio.create_task(client.connection.wait_closed())
            try:
                await asyncio.wait({asking, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not asking.done():
                    return None
                answer, asked = asking.result()
            finally:
                asking.cancel()
                leaving.cancel()
        except SvamError as error:
            sentence = " ".join(str(error).split())
            client.refused += 1
            if client.refused <= LOGGED:
                log.info("%s refused: %s", client.name, sentence)
            return sentence
        except Exception:
            log.exception("a request of %s failed", client.name)
            return "the request failed; the server's log says why"
        waited = asked - answer.timing["infer_ms"] / 1000.0
        timing = {"read_ms": _milliseconds(read), "wait_ms": _milliseconds(waited), **answer.timing, **client.last}
        return pack({"actions": answer.actions, "seed": request.seed, "server_timing": timing})


@dataclass
class _Client:
    """A connection, how many of its requests were refused, and what its last reply took."""

    connection: ServerConnection
    name: str
    refused: int = 0
    last: dict[str, float] = field(default_factory=dict)


def _milliseconds(seconds: float) -> float:
    return round(1000.0 * seconds, 3)
