"""A tiny saved policy, servers of it in this process and in one of their own, and requests that it takes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from svam.files import sha256
from svam.models.svam import SVAM
from svam.serving.inference import Inference
from svam.serving.server import PolicyServer, Settings
from tests import ROOT
from tests.conftest import Once
from tests.serving.peers import PATIENCE
from tests.tiny import make_svam, save_all_parts
from tests.tiny_foresight import SIZE, make_store


def save_model(root: Path) -> None:
    root.mkdir()
    store = make_store(root / "episodes.zarr")
    make_svam(store, save_all_parts(root / "parts", store), proprioception=True).save(root / "svam")


@pytest.fixture(scope="session")
def model(once: Once) -> Path:
    """A saved S-VAM that reads one camera, `front`, of 16 x 16 pixels, and two numbers of proprioception."""
    return once("serving", save_model) / "svam"


@pytest.fixture
def svam(model: Path) -> SVAM:
    return SVAM.load(model)


def request_of(number: int, **changes: Any) -> dict[str, Any]:
    """A request of random content; a change to None leaves the key out."""
    rng = np.random.default_rng(number)
    request = {
        "observation/image": rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8),
        "observation/state": rng.normal(size=2).astype(np.float32), "prompt": "push a",
    }  # fmt: skip
    return {key: value for key, value in (request | changes).items() if value is not None}


@dataclass
class Running:
    """A server in a thread of this process."""

    url: str
    server: PolicyServer
    inference: Inference
    stop: Callable[[], object]


MakeServer = Callable[..., AbstractContextManager[Running]]


@pytest.fixture
def make_server(model: Path, svam: SVAM) -> MakeServer:
    @contextmanager
    def running(batch: int = 1, **settings: Any) -> Iterator[Running]:
        inference = Inference(svam, batch)
        inference.warm_up()
        policy = ThreadPoolExecutor(1)
        server = PolicyServer(inference, policy, sha256(model / "manifest.json"), Settings(port=0, **settings))
        ports: list[int] = []
        listening, stop, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()

        def told(port: int) -> None:
            ports.append(port)
            listening.set()

        thread = threading.Thread(target=lambda: loop.run_until_complete(server.run(stop, told)))
        thread.start()
        try:
            assert listening.wait(PATIENCE)
            yield Running(f"ws://127.0.0.1:{ports[0]}", server, inference, partial(loop.call_soon_threadsafe, stop.set))
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()
            loop.close()
            policy.shutdown()

    return running


def start_command(
    model: Path, *options: str, log: IO[str] | int = subprocess.PIPE, **environment: str
) -> subprocess.Popen[str]:
    """`python -m svam.serving` on any free port."""
    command = [sys.executable, "-m", "svam.serving", str(model), "--port", "0", "--threads", "1", *options]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=log, text=True)
