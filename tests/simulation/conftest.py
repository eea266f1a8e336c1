"""What the tests of the simulator share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from svam.simulation.metaworld import TaskEnvironment


@pytest.fixture
def make() -> Iterator[Callable[..., TaskEnvironment]]:
    """Builds environments, which are closed after the test."""
    environments: list[TaskEnvironment] = []

    def build(task: str, image_size: int = 64, **options: object) -> TaskEnvironment:
        environments.append(TaskEnvironment(task, image_size, **options))  # type: ignore[arg-type]
        return environments[-1]

    yield build
    for environment in environments:
        environment.close()
