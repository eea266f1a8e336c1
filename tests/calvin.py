"""CALVIN's checkout, for tests that need the simulator."""

from __future__ import annotations

import os
from functools import cache

import pytest

from svam.simulation.calvin import Checkout, open_checkout

PATH = os.environ.get("CALVIN_ENV")
needs_calvin = pytest.mark.skipif(PATH is None, reason="set CALVIN_ENV to a checkout of mees/calvin_env beside mees/calvin")


@cache
def checkout() -> Checkout:
    """That of the environment variable, whatever its commit."""
    import subprocess

    assert PATH is not None
    commit = subprocess.run(["git", "-C", PATH, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    return open_checkout(PATH, commit.strip())
