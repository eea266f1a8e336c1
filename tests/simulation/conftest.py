"""What the tests of the simulator share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

import pytest

from svam.simulation import collect as collection
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


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What `collect` gives to worker processes is done at once in this one; task and number of each episode."""
    begun: list[tuple[str, int]] = []

    class AtOnce(Executor):
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def shutdown(self, *_: Any, **__: Any) -> None:
            while collection._environments:
                collection._environments.popitem()[1].close()

        def submit(self, function: Callable[..., Any], task: str, index: int, *rest: Any) -> Future[Any]:  # type: ignore[override]
            begun.append((task, index))
            done: Future[Any] = Future()
            done.set_result(function(task, index, *rest))
            return done

    monkeypatch.setattr(collection, "ProcessPoolExecutor", AtOnce)
    return begun
