"""LIBERO, for tests that need it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from svam.simulation.libero import INSTALL

INSTALLED = find_spec("libero") is not None
needs_libero = pytest.mark.skipif(not INSTALLED, reason=f"LIBERO is not installed: {INSTALL}")
