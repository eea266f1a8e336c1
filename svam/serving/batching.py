"""Requests of several clients, one batch at a time, in one thread beside the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter

from svam.errors import SvamError
from svam.serving.inference import Answer
from svam.serving.protocol import ServingError
from svam.serving.request import Request

Compute = Callable[[Sequence[Request]], list[Answer | SvamError]]


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A request in the queue, and where its answer goes."""

    request: Request
    answer: asyncio.Future[Answer]
    asked: float


class Batcher:
    """The queue in front of the policy.

    A batch begins as soon as the policy is free and every connected client has asked (or `size` of them), and at the latest
    `gather` seconds after the first: clients that ask in step share each batch instead of falling into two halves that wait
    for one another. A client alone never waits, and with `size` 1 nobody does.

    compute: the policy, called with at most `size` requests, in `thread`, which has one. queue: most requests that may wait.
    clients: how many are connected.
    """

    def __init__(
        self, compute: Compute, thread: Executor, size: int, queue: int, gather: float, clients: Callable[[], int]
    ) -> None:  # fmt: skip
        self._compute, self._thread, self._clients = compute, thread, clients
        self._size, self._queue, self._gather = size, queue, gather
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()

    async def ask(self, request: Request) -> tuple[Answer, float]:
        """The answer, and the seconds that it took from here. When this is cancelled, the request leaves the queue.

        Raises:
            ServingError: the queue is full, or the policy failed.
            SvamError: what is wrong with the request.
        """
        if len(self._waiting) >= self._queue:
            raise ServingError(f"the server is busy: {self._queue} requests wait already; ask again later")
        waiting = _Waiting(request, asyncio.get_running_loop().create_future(), perf_counter())
        self._waiting.append(waiting)
        self._arrived.set()
        try:
            answer = await waiting.answer
        finally:
            with suppress(ValueError):  # not there once it is computed
                self._waiting.remove(waiting)
        return answer, perf_counter() - waiting.asked

    async def run(self) -> None:
        """Compute what is asked, until this is cancelled; a batch that is being computed goes on in its thread."""
        loop = asyncio.get_running_loop()
        while True:
            await self._gathered()
            part = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
            if not part:  # who asked has gone
                continue
            answers = await loop.run_in_executor(self._thread, self._compute, [waiting.request for waiting in part])
            for waiting, answer in zip(part, answers, strict=True):
                if waiting.answer.done():
                    continue
                if isinstance(answer, Answer):
                    waiting.answer.set_result(answer)
                else:
                    waiting.answer.set_exception(answer)

    async def _gathered(self) -> None:
        """Wait for the first request, and then a little for those of the other clients."""
        await self._until(1)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._gather):
                await self._until(min(self._size, self._clients()))

    async def _until(self, count: int) -> None:
        while len(self._waiting) < count:
            self._arrived.clear()
            await self._arrived.wait()
