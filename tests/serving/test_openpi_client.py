"""The public client of the protocol, from an environment of its own, where one is named."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.serving.conftest import MakeServer

PYTHON = os.environ.get("SVAM_OPENPI_PYTHON", "")
SCRIPT = """
import sys
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy

client = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]), api_key="0123456789")
assert client.get_server_metadata()["cameras"] == {"front": [16, 16]}
frame = np.full((16, 16, 3), 7, np.uint8)
request = {"observation/image": frame, "observation/state": np.zeros(2), "prompt": "push a"}
first, second = client.infer(request), client.infer(request)
assert first["actions"].shape == (4, 3) and first["actions"].dtype == np.float32
assert (first["actions"] == second["actions"]).all() and first["server_timing"]["infer_ms"] > 0
try:
    client.infer({"prompt": "push a"})
except RuntimeError as error:
    assert "no picture of camera 'front'" in str(error), error
else:
    raise AssertionError("no error")
assert (client.infer(request)["actions"] == first["actions"]).all()
print("as expected")
"""


@pytest.mark.skipif(
    not PYTHON,
    reason="openpi-client needs NumPy 1, so an environment of its own: python -m venv E && E/bin/pip install openpi-client "
    "typing-extensions; then SVAM_OPENPI_PYTHON=E/bin/python",
)
def test_the_public_client(make_server: MakeServer) -> None:
    with make_server(key="0123456789") as running:
        port = running.url.rsplit(":", 1)[1]
        done = subprocess.run([PYTHON, "-c", SCRIPT, port], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "as expected", done.stderr
