"""Strangers: malformed messages by the thousand, oversized ones, and connections dropped anywhere leave nothing behind."""

from __future__ import annotations

import random
import signal
import socket
import struct
import time
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed

from tests.serving.conftest import request_of, start_command
from tests.serving.peers import HANDSHAKE, PATIENCE, as_map, asked, encoded, minimal_client

EACH = 25
"""Messages of one example."""
GOOD = encoded(request_of(1))
PICTURE = GOOD.index(request_of(1)["observation/image"].tobytes())
STRUCTURE = [place for place in range(len(GOOD)) if not PICTURE <= place < PICTURE + request_of(1)["observation/image"].nbytes]
"""The places in a request's bytes that are no pixels."""

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=6), st.binary(max_size=6)
)
names = st.sampled_from(["prompt", "seed", "state", "images", "front", "observation/image", "observation/state", "x"])
array_maps = st.fixed_dictionaries({}, optional={
    b"__ndarray__": leaves, b"__npgeneric__": leaves, b"data": st.binary(max_size=32) | leaves,
    b"dtype": st.sampled_from(["<f4", "|u1", "|O", "<c8", "|V8", "<f16", "f4,f4", "|b1"]) | leaves,
    b"shape": st.lists(st.integers(-2, 2**40), max_size=9) | leaves,
})  # fmt: skip
values = st.recursive(leaves | array_maps, lambda any_: st.lists(any_, max_size=3) | st.dictionaries(names, any_, max_size=3))
structures = st.dictionaries(names, values, max_size=5).map(lambda value: bytes(msgpack.packb(value)))


def with_key(pair: tuple[str, Any]) -> bytes:
    request = {key: as_map(v) if isinstance(v, np.ndarray) else v for key, v in request_of(1).items()}
    return bytes(msgpack.packb({**request, pair[0]: pair[1]}))


def flipped(place: int, bits: int) -> bytes:
    return GOOD[:place] + bytes([GOOD[place] ^ bits]) + GOOD[place + 1 :]


messages = st.one_of(
    st.binary(max_size=40), structures, st.tuples(names, values).map(with_key),
    st.integers(0, len(GOOD) - 1).map(lambda end: GOOD[:end]),
    st.builds(flipped, st.sampled_from(STRUCTURE), st.integers(1, 255)), st.text(max_size=20),
    st.sampled_from([b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdc\x01\x00" * 300]),
)  # fmt: skip


def send_messages(url: str, count: int) -> int:
    """Send so many messages that hypothesis makes up; each gets one sentence, or actions. Returns how many got actions."""
    answered = 0
    with minimal_client(url) as (connection, _):

        @settings(
            max_examples=count // EACH, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(st.lists(messages, min_size=EACH, max_size=EACH))
        def send(batch: list[bytes | str]) -> None:
            nonlocal answered
            for message in batch:
                connection.send(message)
                reply = connection.recv(PATIENCE)
                if isinstance(reply, bytes):
                    answered += 1
                    assert b"actions" in reply and len(reply) < 1000
                else:
                    assert reply and "\n" not in reply and "Traceback" not in reply and len(reply) < 1500, reply

        send()
    return answered


def drop_connections(url: str, count: int) -> None:
    """Connect and go at any point: before, within and after the handshake, within a message, with a reply on its way."""
    address, rng = ("127.0.0.1", int(url.rsplit(":", 1)[1])), random.Random(0)
    frame = b"\x82\xfe" + len(GOOD).to_bytes(2, "big") + bytes(4) + GOOD
    for _ in range(count):
        with socket.create_connection(address, timeout=PATIENCE) as connection:
            if rng.random() < 0.5:  # reset the connection instead of closing it
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sent = rng.choice([b"", HANDSHAKE, HANDSHAKE, rng.randbytes(200), HANDSHAKE + frame])
            connection.sendall(sent[: rng.randint(0, len(sent))] if rng.random() < 0.5 else sent)
            if sent.startswith(HANDSHAKE) and rng.random() < 0.5:
                connection.settimeout(0.01)
                try:
                    connection.recv(4096)
                except TimeoutError:
                    continue
                connection.sendall(rng.choice([rng.randbytes(100), frame[: rng.randint(1, len(frame))], frame]))


def send_oversized(url: str, count: int) -> None:
    for _ in range(count):
        with minimal_client(url) as (connection, _), pytest.raises(ConnectionClosed) as closed:
            connection.send(b"x" * 200_000)
            connection.recv(PATIENCE)
        assert closed.value.rcvd is None or closed.value.rcvd.code == 1009


def serving(url: str) -> psutil.Process:
    """The process that listens there, which is not the one that was started where that has forked another."""
    port = int(url.rsplit(":", 1)[1])
    (found,) = (c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port)
    return psutil.Process(found)


def settled(process: psutil.Process) -> tuple[int, int, float]:
    """Descriptors, threads and MiB of memory, once connections that are closing have closed."""
    end, found = time.monotonic() + PATIENCE, (0, 0)
    while time.monotonic() < end and found != (process.num_fds(), process.num_threads()):
        found = (process.num_fds(), process.num_threads())
        time.sleep(0.5)
    return *found, process.memory_info().rss / 2**20


@pytest.mark.usefixtures("warm_python")
@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_strangers_leave_nothing_behind(count: int, model: Path, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        server = start_command(model, "--max-message-mb", "0.1", log=log)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        process = serving(url)
        with minimal_client(url) as (connection, _):
            good = asked(connection, request_of(1))["actions"]
        send_messages(url, 250)
        drop_connections(url, 50)
        send_oversized(url, 5)
        before = settled(process)
        answered = send_messages(url, count)
        drop_connections(url, 300)
        send_oversized(url, 30)
        after = settled(process)
        assert after[:2] == before[:2], "descriptors and threads"
        assert after[2] - before[2] < 30.0, "memory"
        assert answered < count / 4, "most messages are bad ones"
        with minimal_client(url) as (connection, _):
            np.testing.assert_array_equal(asked(connection, request_of(1))["actions"], good)
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE) == 0
    finally:
        server.kill()
        server.communicate()
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert (tmp_path / "log").stat().st_size < 1e6
