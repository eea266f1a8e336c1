"""The server with a real, tiny policy, asked by a client that shares no code with it."""

from __future__ import annotations

import asyncio
import http.client
import logging
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosed, InvalidStatus

from svam.contract import Observation
from svam.files import sha256
from svam.models.svam import SVAM
from svam.serving.__main__ import app
from svam.serving.inference import Inference
from svam.serving.protocol import ServingError
from svam.serving.request import read_request
from svam.serving.server import PolicyServer, Settings
from tests.serving.conftest import MakeServer, request_of, start_command
from tests.serving.peers import HANDSHAKE, PATIENCE, asked, encoded, minimal_client
from tests.tiny_foresight import SIZE
from tests.toy import invoke


def together(urls: list[str], requests: list[dict[str, Any]]) -> list[Any]:
    """The replies to requests that clients of their own send at the same time."""
    barrier = threading.Barrier(len(requests))

    def one(url: str, request: dict[str, Any]) -> Any:
        with minimal_client(url) as (connection, _):
            barrier.wait()
            return asked(connection, request)

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(one, urls, requests))


def test_metadata_and_reply(model: Path, make_server: MakeServer, svam: SVAM) -> None:
    request = request_of(1, seed=7)
    expected = svam.act([Observation({"front": request["observation/image"]}, "push a", request["observation/state"])], [7])
    with make_server() as running, minimal_client(running.url) as (connection, metadata):
        assert metadata["cameras"] == {"front": [SIZE, SIZE]} and metadata["proprioception"] == 2
        assert (metadata["chunk"], metadata["action_dimensions"], metadata["rate_hz"], metadata["batch"]) == (4, 3, 20.0, 1)
        assert metadata["actions"]["max"] == svam.statistics.actions.max
        assert metadata["weights_sha256"] == sha256(model / "manifest.json")
        first, second, *others = (asked(connection, request) for _ in range(8))
    np.testing.assert_array_equal(first["actions"], expected[0])
    np.testing.assert_array_equal(second["actions"], expected[0])
    assert first["actions"].dtype == np.float32 and first["seed"] == 7
    timing = second["server_timing"]
    parts = {"autoencoder_and_text_ms", "video_model_ms", "teachers_ms", "decouplers_ms", "policy_ms"}
    assert set(timing) == parts | {"read_ms", "wait_ms", "infer_ms", "batch", "prev_total_ms"}
    shares = [sum(t[part] for part in parts) / t["infer_ms"] for t in (timing, *(other["server_timing"] for other in others))]
    assert 0.8 < max(shares) <= 1.0, "the best of several: another program may run between two parts"
    assert set(first["server_timing"]) == set(timing) - {"prev_total_ms"}


def test_names_that_a_request_may_use(svam: SVAM) -> None:
    plain = request_of(1)
    picture, state = plain["observation/image"], plain["observation/state"]
    other, gone = np.zeros((5, 5, 3), np.uint8), {"observation/image": None}
    expected = read_request(encoded(plain), svam)
    for changes in (
        {"observation/front": picture} | gone, {"front": picture} | gone, {"front": picture, "observation/image": other},
        {"state": state.astype(np.float64), "observation/state": None}, {"observation/wrist_image": other, "wrist": other},
        {"observation/joint": 3.5},
    ):  # fmt: skip
        found = read_request(encoded(request_of(1, **changes)), svam)
        np.testing.assert_array_equal(found.observation.frames["front"], picture)
        np.testing.assert_array_equal(found.observation.proprioception, state)  # type: ignore[arg-type]
        assert found.seed == expected.seed


def test_without_a_seed_the_noise_is_the_contents(svam: SVAM) -> None:
    seeds = {
        read_request(encoded(request), svam).seed
        for request in (
            request_of(1), request_of(2), request_of(1, prompt="pull b"),
            request_of(1, **{"observation/state": np.zeros(2, np.float32)}),
        )
    }  # fmt: skip
    assert len(seeds) == 4 and read_request(encoded(request_of(1)), svam).seed in seeds
    assert read_request(encoded(request_of(1, seed=2**63 - 1)), svam).seed == 2**63 - 1


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "'prompt' is NoneType, expected a sentence"), ({"prompt": "  "}, "'prompt' is a text of 2 characters"),
    ({"prompt": "push " * 300}, "'prompt' is a text of 1500 characters"),
    ({"prompt": "push " * 60}, "tokens, the text encoder has"),
    ({"observation/image": None}, "no picture of camera 'front'"), ({"observation/image": "x"}, "'observation/image' is str"),
    ({"observation/image": np.zeros((SIZE, SIZE, 3), np.float32)}, "gives float32"),
    ({"observation/image": np.zeros((3, SIZE, SIZE), np.uint8)}, r"expected uint8 \(16, 16, 3\)"),
    ({"observation/state": None}, r"proprioception has shape None, expected \(2,\)"),
    ({"observation/state": np.zeros(3, np.float32)}, r"proprioception has shape \(3,\)"),
    ({"observation/state": np.array([0, np.nan])}, "NaN or infinity"),
    ({"observation/state": np.array([0, 1e300])}, "NaN or infinity"),
    ({"observation/state": [1.0, 2.0]}, "'observation/state' is list"),
    ({"observation/state": np.zeros(2, bool)}, "'observation/state' is bool array"),
    ({"seed": -1}, "'seed' is -1"), ({"seed": 2**63}, "'seed' is"), ({"seed": 1.5}, "'seed' is 1.5"),
    ({"seed": True}, "'seed' is True"), ({"sede": 4}, "unknown key 'sede'; did you mean 'seed'"),
]  # fmt: skip


def test_what_does_not_fit_is_one_sentence_and_the_connection_goes_on(make_server: MakeServer) -> None:
    with make_server() as running, minimal_client(running.url) as (connection, _):
        good = asked(connection, request_of(1))
        for changes, message in BAD:
            sentence = asked(connection, request_of(1, **changes))
            assert isinstance(sentence, str) and "\n" not in sentence and "Traceback" not in sentence, (changes, sentence)
            assert re.search(message, sentence), (message, sentence)
        for raw, message in (
            (b"", "not msgpack"), ("text", "a text frame"), (b"\x01", "found int"), (b"\x81\xc4\x01a\x01", "text keys"),
        ):  # fmt: skip
            connection.send(raw)
            sentence = connection.recv(PATIENCE)
            assert isinstance(sentence, str) and message in sentence
        np.testing.assert_array_equal(asked(connection, request_of(1))["actions"], good["actions"])


def test_a_replys_bits_do_not_depend_on_who_else_asks(make_server: MakeServer, svam: SVAM) -> None:
    requests = [request_of(number) for number in range(3)]
    svam.pad_to = 4
    seen = [read_request(encoded(request), svam) for request in requests]
    expected = [svam.act([request.observation], [request.seed])[0] for request in seen]
    svam.pad_to = None
    with make_server(batch=4, gather=20.0) as running:
        assert running.inference.batch == 4, "rows agree on this machine"
        for chosen in ([0], [0, 1], [2, 0], [2, 1, 0], [0, 0, 0], [1, 2, 0, 1]):
            replies = together([running.url] * len(chosen), [requests[i] for i in chosen])
            for number, reply in zip(chosen, replies, strict=True):
                np.testing.assert_array_equal(reply["actions"], expected[number])
                assert reply["server_timing"]["batch"] == len(chosen), "they were joined in one batch"


def test_one_bad_request_spoils_no_others(make_server: MakeServer) -> None:
    """A state of huge numbers is NaN by the end of the network; a sentence may be too long for the text encoder."""
    good, huge = request_of(1), request_of(2, **{"observation/state": np.array([3e38, -3e38], np.float32)})
    with make_server(batch=4, gather=20.0) as running:
        (alone,) = together([running.url], [good])
        replies = together([running.url] * 3, [huge, good, request_of(3, prompt="push " * 60)])
        assert "NaN" in replies[0] and "tokens" in replies[2]
        np.testing.assert_array_equal(replies[1]["actions"], alone["actions"])


def test_rows_that_do_not_agree_are_computed_alone(svam: SVAM, caplog: pytest.LogCaptureFixture) -> None:
    inference, sample = Inference(svam, 3), svam.sample
    svam.sample = lambda inputs, seeds: sample(inputs, seeds) + np.arange(3).reshape(3, 1, 1) * 1e-7  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        inference.warm_up()
    assert inference.batch == 1 and "rows of a batch of 3 do not agree" in caplog.text


def test_a_fault_of_ours_is_told_to_the_log_alone(
    make_server: MakeServer, svam: SVAM, caplog: pytest.LogCaptureFixture
) -> None:
    with make_server() as running, minimal_client(running.url) as (connection, _):
        encode = svam.encode
        svam.encode = lambda *_: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        assert asked(connection, request_of(1)) == "the policy failed on this observation; the server's log says why"
        svam.encode = encode  # type: ignore[method-assign]
        assert asked(connection, request_of(1))["actions"].shape == (4, 3)
    assert "ZeroDivisionError" in caplog.text


def test_clients_and_queue_are_bounded(make_server: MakeServer, svam: SVAM) -> None:
    entered, go_on, encode = threading.Semaphore(0), threading.Event(), svam.encode

    def slow(*arguments: Any) -> Any:
        entered.release()
        assert go_on.wait(PATIENCE)
        return encode(*arguments)

    with make_server(max_clients=3, queue=1) as running:
        svam.encode = slow  # type: ignore[method-assign]
        with minimal_client(running.url) as (one, _), minimal_client(running.url) as (two, _):
            with minimal_client(running.url) as (three, _):
                with pytest.raises(InvalidStatus) as refused, minimal_client(running.url):
                    pass
                assert refused.value.response.status_code == 503 and b"3 clients" in (refused.value.response.body or b"")
                one.send(encoded(request_of(1)))
                assert entered.acquire(timeout=PATIENCE)  # computed now
                two.send(encoded(request_of(2)))
                while not running.server._batcher._waiting:
                    time.sleep(0.005)
                assert "busy: 1 requests wait already" in asked(three, request_of(3))
                assert health(running.url) == (200, b"OK\n"), "the event loop is free while the policy computes"
            two.close()  # who leaves, leaves the queue
            while running.server._batcher._waiting or running.server._clients > 1:
                time.sleep(0.005)
            go_on.set()
            assert isinstance(one.recv(PATIENCE), bytes)
            assert not entered.acquire(blocking=False), "the request of the client that left was not computed"


def health(url: str, path: str = "/healthz") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(url.removeprefix("ws://"), timeout=PATIENCE)
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body


def test_keys_origins_and_plain_http(make_server: MakeServer) -> None:
    with make_server(key="0123456789") as running:
        for headers in ({}, {"Authorization": "Api-Key 012345678"}, {"Authorization": "Bearer 0123456789"}):
            with pytest.raises(InvalidStatus) as refused, minimal_client(running.url, additional_headers=headers):
                pass
            assert refused.value.response.status_code == 401
        headers = {"Authorization": "Api-Key 0123456789"}
        with minimal_client(running.url, additional_headers=headers) as (connection, _):
            assert asked(connection, request_of(1))["actions"].shape == (4, 3)
        with (
            pytest.raises(InvalidStatus) as refused,
            minimal_client(running.url, additional_headers=headers, origin="http://localhost"),
        ):
            pass
        assert refused.value.response.status_code == 403, "no page of a browser"
        assert health(running.url) == (200, b"OK\n") and health(running.url, "/")[0] == 401
    assert "0123456789" not in repr(Settings(key="0123456789"))


def test_it_listens_elsewhere_only_with_a_key(svam: SVAM) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", ""):
        with pytest.raises(ServingError, match="there is no key"):
            Settings(host=host)
    for host, key in {"0.0.0.0": "0123456789", "localhost": None, "::1": None, "127.0.0.2": None}.items():
        Settings(host, key=key)
    with socket.create_server(("127.0.0.1", 0)) as taken, ThreadPoolExecutor(1) as thread:
        server = PolicyServer(Inference(svam, 1), thread, "", Settings(port=taken.getsockname()[1]))
        with pytest.raises(ServingError, match="cannot listen on 127.0.0.1:.* choose another"):
            asyncio.run(server.run(asyncio.Event(), print))


def test_an_oversized_message_ends_its_connection(make_server: MakeServer) -> None:
    with make_server(max_message=10_000) as running:
        with minimal_client(running.url) as (connection, _):
            assert asked(connection, request_of(1, **{"observation/extra": np.zeros(8000, np.uint8)}))["seed"] > 0
            connection.send(encoded(request_of(1, **{"observation/extra": np.zeros(20_000, np.uint8)})))
            with pytest.raises(ConnectionClosed) as closed:
                connection.recv(PATIENCE)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009
        with minimal_client(running.url) as (connection, _):
            assert asked(connection, request_of(1))["actions"].shape == (4, 3)


def test_a_stop_finishes_what_is_computed(make_server: MakeServer, svam: SVAM) -> None:
    entered, go_on, encode = threading.Event(), threading.Event(), svam.encode

    def slow(*arguments: Any) -> Any:
        entered.set()
        assert go_on.wait(PATIENCE)
        return encode(*arguments)

    with make_server() as running, minimal_client(running.url) as (one, _), minimal_client(running.url) as (two, _):
        svam.encode = slow  # type: ignore[method-assign]
        one.send(encoded(request_of(1)))
        assert entered.wait(PATIENCE)
        running.stop()
        while not running.server._stopping:
            time.sleep(0.005)
        assert asked(two, request_of(2)) == "the server is stopping; connect again later"
        assert health(running.url, "/")[0] == 503
        go_on.set()
        assert isinstance(one.recv(PATIENCE), bytes)
        for connection in (one, two):
            with pytest.raises(ConnectionClosed) as closed:
                connection.recv(PATIENCE)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001


def test_a_client_that_falls_silent_is_dropped_and_others_are_served(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svam.serving.server.OPEN_SECONDS", 0.5)
    with make_server(ping=1.0) as running:
        address = ("127.0.0.1", int(running.url.rsplit(":", 1)[1]))
        with socket.create_connection(address, timeout=PATIENCE) as silent:
            silent.sendall(HANDSHAKE)
            silent.sendall(b"\x82\xff" + (1000).to_bytes(8, "big") + b"mask" + b"half of a message")
            with minimal_client(running.url) as (connection, _):
                assert asked(connection, request_of(1))["actions"].shape == (4, 3)
            with suppress(ConnectionResetError):
                while silent.recv(4096):  # ends when the server closes; a time-out would raise
                    pass
        while running.server._clients:
            time.sleep(0.005)


def test_one_at_a_time_is_made_ready_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the rows of a batch do not agree: a GPU would launch kernel by kernel what it has no graph of."""
    made: list[Any] = []

    def stopped(*_: object) -> None:
        raise ServingError("stopped")

    monkeypatch.setattr("svam.models.control.for_control", lambda svam, *settings: made.append(settings))
    for left in (3, 1):
        made.clear()
        warm = SimpleNamespace(batch=left, warm_up=lambda: None)
        monkeypatch.setattr("svam.serving.inference.Inference", lambda *_, warm=warm: warm)
        monkeypatch.setattr("svam.serving.server.PolicyServer", stopped)
        invoke(app, model, "--device", "cpu", "--threads", "1", "--batch", "3")
        assert [batch for _, batch, _ in made] == [3, 1][: 1 if left == 3 else 2]


def test_the_command(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVAM_TEST_KEY", "short")
    for options, said in (
        (["--host", "0.0.0.0"], "there is no key"),
        (["--key-env", "SVAM_TEST_KEY"], "SVAM_TEST_KEY: that environment variable holds no key"),
    ):
        refused = invoke(app, model, *options)
        assert refused.exit_code == 1 and said in " ".join(refused.output.split())

    made: list[Any] = []

    def ready(svam: SVAM, *settings: object) -> object:
        assert isinstance(svam, SVAM)
        made.append(settings)
        return settings

    def served(policy: object, batch: int) -> None:
        raise ServingError(f"made ready {policy is made[-1]}, {batch} a batch")

    monkeypatch.setattr("svam.models.control.for_control", ready)
    monkeypatch.setattr("svam.serving.inference.Inference", served)
    for options, compiled in (([], True), (["--no-compile"], False)):
        refused = invoke(app, model, "--device", "cpu", "--threads", "1", "--batch", "3", *options)
        assert refused.exit_code == 1 and "made ready True, 3 a batch" in " ".join(refused.output.split())
        assert made[-1] == (torch.device("cpu"), 3, compiled)

    process = start_command(model, "--host", "localhost", "--key-env", "SVAM_TEST_KEY", SVAM_TEST_KEY="0123456789")
    assert process.stdout is not None
    url = process.stdout.readline().split()[-1]
    with minimal_client(url, additional_headers={"Authorization": "Api-Key 0123456789"}) as (connection, metadata):
        assert metadata["weights_sha256"] == sha256(model / "manifest.json")
        assert asked(connection, request_of(1))["actions"].shape == (4, 3)
        assert health(url) == (200, b"OK\n")
        process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(PATIENCE)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0 and "Traceback" not in errors and "0123456789" not in errors
