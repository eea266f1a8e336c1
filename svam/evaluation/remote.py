"""A policy that another program serves: openpi's websocket protocol, one observation a message."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import cycle
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from svam.contract import Observation
from svam.errors import ParamsError
from svam.protocols import RemotePolicy
from svam.serving.client import PolicyClient
from svam.serving.protocol import ServingError


class Remote:
    """Asks the server of `params` for each observation of a batch. Rows that repeat another's observation, as a batch that is
    not full has them, are asked once.

    A message holds the pictures (H, W, 3) uint8 under the keys `params.cameras`, `observation/state` (d,) float32, `prompt`,
    and, where the server's metadata state `takes_seed`, the `seed` of the sampling noise. execute: actions needed of a chunk;
    longer ones are cut.

    Raises:
        ParamsError: the variable `key_env` is not set, or the server states other weights than `params.weights`.
        ServingError: nobody answers there, or not as such a server does.
    """

    needs_proprioception = True

    def __init__(self, params: RemotePolicy, execute: int) -> None:
        key = os.environ.get(params.key_env, "") if params.key_env else None
        if key == "":
            raise ParamsError(f"evaluate.remote.key_env: the environment variable {params.key_env!r} is not set")
        self.url, self.keys, self.execute = str(params.url), params.cameras, execute
        with ExitStack() as stack:
            self._clients = [
                stack.enter_context(PolicyClient(self.url, key=key, reply_seconds=params.reply_seconds))
                for _ in range(params.connections)
            ]
            stack.enter_context(pool := ThreadPoolExecutor(params.connections))
            self.metadata = self._clients[0].metadata
            self.weights = self.metadata.get("weights_sha256")
            if params.weights not in (None, self.weights):
                raise ParamsError(
                    f"evaluate.remote.weights is {params.weights}, but {self.url} states {self.weights}: start the server of "
                    "those weights, or set the param to these or to null"
                )
            self._pool, self._open = pool, stack.pop_all()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def act(self, observations: list[Observation], noise_seeds: list[int]) -> NDArray[np.float32]:
        """(B, execute, A) float32.

        Raises:
            ServingError: a request was refused, not answered in time, lost, or answered by no actions or too few.
        """
        # Noise belongs to an episode and a step, and two episodes of the same noise differ in their sentence.
        rows = list(zip((observation.instruction for observation in observations), noise_seeds, strict=True))
        asked = dict(zip(rows, observations, strict=True))
        seeds = (seed for _, seed in asked)
        chunks = dict(zip(asked, self._pool.map(self._chunk, cycle(self._clients), asked.values(), seeds), strict=True))
        if len(shapes := {chunk.shape for chunk in chunks.values()}) > 1:
            raise ServingError(f"{self.url} replied with actions of {sorted(shapes)} in one round, expected one number of them")
        return np.stack([chunks[row] for row in rows])

    def _chunk(self, client: PolicyClient, observation: Observation, seed: int) -> NDArray[np.float32]:
        request = {**dict(zip(self.keys, observation.frames.values(), strict=False)), "prompt": observation.instruction}
        if observation.proprioception is not None:
            request["observation/state"] = observation.proprioception
        if self.metadata.get("takes_seed") is True:
            request["seed"] = seed
        chunk = client.actions(request)
        if len(chunk) < self.execute:
            raise ServingError(
                f"{self.url} replied with {len(chunk)} actions, but evaluate.execute is {self.execute}; set it to at most that"
            )
        return chunk[: self.execute]
