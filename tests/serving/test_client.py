"""The client against servers that share no code with it: what it sends, and one sentence for every fault."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest

from svam.serving.client import PolicyClient
from svam.serving.execution import Asynchronous, run
from svam.serving.protocol import ProtocolError, ServingError
from tests.serving.conftest import MakeServer, request_of
from tests.serving.peers import PATIENCE, encoded, minimal_server

ACTIONS = np.arange(6, dtype=np.float32).reshape(2, 3)
FAST: dict[str, Any] = {"pause_seconds": 0.01, "connect_seconds": PATIENCE, "reply_seconds": PATIENCE}


def test_it_speaks_the_format() -> None:
    seen: list[Any] = []

    def reply(request: Any, number: int) -> bytes:
        seen.append(request)
        return encoded({"actions": ACTIONS.astype(np.float64) + number, "server_timing": {"infer_ms": 1.0}})

    with minimal_server(reply, encoded({"action_horizon": 2})) as url, PolicyClient(url, **FAST) as client:
        assert client.metadata == {"action_horizon": 2}
        frame = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
        found = client.infer({"observation/image": frame, "prompt": "go", "observation/state": np.zeros(2)})
        np.testing.assert_array_equal(found["actions"], ACTIONS + 1)
        assert found["actions"].dtype == np.float32 and found["server_timing"] == {"infer_ms": 1.0}
        np.testing.assert_array_equal(client.actions({"observation/image": frame}), ACTIONS + 2)
    np.testing.assert_array_equal(seen[0]["observation/image"], frame)
    assert seen[0]["prompt"] == "go" and seen[0]["observation/state"].dtype == np.float64


def bad(**changes: Any) -> bytes:
    return encoded({"actions": ACTIONS, **changes})


REPLIES: list[tuple[bytes | str, str]] = [
    ("Traceback (most recent call last):\n  File x\nKeyError: 'state'\n", "refused the observation: KeyError: 'state'$"),
    ("", "did not say why"), (b"\xc1", "not msgpack"), (b"\x01", "replied with int"), (bad(actions=None), "of NoneType"),
    (bad(actions=[[1.0]]), "actions of list"), (bad(actions=ACTIONS[0]), r"actions of float32 \(3,\)"),
    (bad(actions=ACTIONS[:0]), r"\(0, 3\)"), (bad(actions=np.full((2, 3), np.nan)), "nan as action 0, dimension 0"),
    (bad(extra=b"x" * 100_000), "above max_reply, 50000 bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "message"), REPLIES, ids=[str(i) for i in range(len(REPLIES))])
def test_a_bad_reply_is_one_sentence_and_the_next_is_taken(reply: bytes | str, message: str) -> None:
    def answer(_: Any, number: int) -> bytes | str:
        return reply if number == 1 else encoded({"actions": ACTIONS})

    with minimal_server(answer) as url, PolicyClient(url, max_reply=50_000, **FAST) as client:
        with pytest.raises((ServingError, ProtocolError), match=message) as caught:
            client.infer(request_of(1))
        assert "\n" not in str(caught.value)
        np.testing.assert_array_equal(client.actions(request_of(1)), ACTIONS)


def test_a_lost_connection_is_made_again() -> None:
    def third_time(_: Any, number: int) -> bytes | None:
        return encoded({"actions": ACTIONS}) if number == 3 else None

    with minimal_server(third_time) as url, PolicyClient(url, **FAST) as client:
        np.testing.assert_array_equal(client.actions(request_of(1)), ACTIONS)
    with minimal_server(third_time) as url, PolicyClient(url, attempts=2, **FAST) as client:
        with pytest.raises(ServingError, match=r"cannot be reached \(2 attempts\)"):
            client.infer(request_of(1))
        np.testing.assert_array_equal(client.actions(request_of(1)), ACTIONS)


def test_a_late_reply_is_not_the_next_requests() -> None:
    go_on = threading.Event()

    def reply(_: Any, number: int) -> bytes:
        if number == 1:
            go_on.wait(PATIENCE)
        return encoded({"actions": ACTIONS + number})

    with minimal_server(reply) as url, PolicyClient(url, **FAST | {"reply_seconds": 0.2}) as client:
        with pytest.raises(ServingError, match="did not reply within 0.2 s"):
            client.infer(request_of(1))
        go_on.set()
        client._reply_seconds = PATIENCE
        np.testing.assert_array_equal(client.actions(request_of(1)), ACTIONS + 2)


def test_who_is_no_policy_server_is_told_so() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ServingError, match="cannot be reached .*refused.*; is the server running there"):
        PolicyClient(f"ws://127.0.0.1:{port}", attempts=2, **FAST)
    with pytest.raises(ServingError, match="is no address of a policy server"):
        PolicyClient("http://127.0.0.1:8000", **FAST)
    for first in ("hello", b"\xc1", b"\x01"):
        with minimal_server(lambda *_: None, first) as url, pytest.raises(ServingError, match="sent no metadata"):
            PolicyClient(url, **FAST)
    with socket.create_server(("127.0.0.1", 0)) as mute:  # accepts, and says nothing
        url = f"ws://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(ServingError, match="cannot be reached .*timed out"):
            PolicyClient(url, attempts=1, connect_seconds=0.2)


def test_requests_that_cannot_be_sent() -> None:
    with minimal_server(lambda *_: encoded({"actions": ACTIONS})) as url, PolicyClient(url, **FAST) as client:
        with pytest.raises(ProtocolError, match="object cannot be sent"):
            client.infer({"x": object()})
        with pytest.raises(ServingError, match="takes no message as large as this observation of"):
            client.infer({"x": np.zeros(2_000_000, np.uint8)})  # the minimal server takes 1,000,000 bytes
        np.testing.assert_array_equal(client.actions(request_of(1)), ACTIONS)


def test_a_server_that_serves_other_weights_is_another() -> None:
    with minimal_server(lambda *_: None, encoded({"weights_sha256": "new"})) as url:
        client = PolicyClient(url, **FAST)
        client.metadata = {"weights_sha256": "old"}
        client.close()
        with pytest.raises(ServingError, match="now serves other weights .new, before old."):
            client.infer(request_of(1))


def test_with_the_server(make_server: MakeServer) -> None:
    with make_server(key="0123456789") as running:
        for key in (None, "wrong key"):
            with pytest.raises(ServingError, match="does not let this client in: 401 the key is missing or wrong"):
                PolicyClient(running.url, key=key, **FAST)
        with PolicyClient(running.url, key="0123456789", **FAST) as client:
            assert client.metadata["chunk"] == 4
            once = client.actions(request_of(1))
            assert once.shape == (4, 3)
            with pytest.raises(ServingError, match="refused the observation: observation: 'prompt' is NoneType"):
                client.infer(request_of(1, prompt=None))
            client.close()
            np.testing.assert_array_equal(client.actions(request_of(1)), once)  # again, on another connection


def test_a_robot_is_driven_by_chunks(make_server: MakeServer) -> None:
    class Robot:
        def __init__(self) -> None:
            self.actions: list[np.ndarray[Any, Any]] = []

        def observe(self) -> dict[str, Any]:
            return request_of(len(self.actions))

        def execute(self, action: np.ndarray[Any, Any]) -> None:
            self.actions.append(action)

    robot = Robot()
    with make_server() as running, PolicyClient(running.url, **FAST) as client, ThreadPoolExecutor(1) as thread:
        chunks = Asynchronous(partial(thread.submit, client.actions), when_late="hold")
        assert run(chunks.next_action, robot, rate_hz=client.metadata["rate_hz"], steps=12).steps == 12
        first = client.actions(request_of(0))
    assert len(robot.actions) == 12
    np.testing.assert_array_equal(robot.actions[0], first[0])
