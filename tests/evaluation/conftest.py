"""What the tests of the closed loop share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _workers(forked_workers: None) -> None:
    pass
