"""Requests to actions, several in one batch of fixed size."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svam.errors import SvamError
from svam.models.svam import SVAM
from svam.models.timing import timed, timed_components
from svam.serving.protocol import ServingError
from svam.serving.request import Request

log = logging.getLogger("svam.serving")


@dataclass(frozen=True)
class Answer:
    """actions: (K, A) float32, as `SVAM.act` gives them. timing: milliseconds by component, of the whole batch; `batch`, how
    many requests were in it."""

    actions: NDArray[np.float32]
    timing: dict[str, float]


class Inference:
    """The policy with its batch: every computation has `batch` rows, and rows that nobody asked for repeat another. So a row's
    bits do not depend on how many requests came together; `warm_up` makes sure that they do not depend on its place either.

    Not for several threads at once.
    """

    def __init__(self, svam: SVAM, batch: int) -> None:
        self.svam, self.batch = svam, batch

    def __call__(self, requests: Sequence[Request]) -> list[Answer | SvamError]:
        """For each of at most `batch` requests its answer, or why there is none; a bad request spoils no other's."""
        refusals = [self._refusal(request) for request in requests]
        fitting = [request for request, refusal in zip(requests, refusals, strict=True) if refusal is None]
        answers = iter(self._together(fitting) if fitting else [])
        return [next(answers) if refusal is None else refusal for refusal in refusals]

    def warm_up(self) -> None:
        """Compute twice, so that the first client waits for no cache. Where a row's last bits depend on its place in the
        batch (a matter of the processor's libraries), requests are computed one at a time from now on, and the log says so."""
        one, other = (Request(self.svam.example(number), number) for number in (0, 1))
        everywhere = [answer.actions for answer in self._computed([one] * self.batch)]
        beside_others = self._computed([*[other] * (self.batch - 1), one])[-1].actions
        if any((actions != everywhere[0]).any() for actions in [*everywhere, beside_others]):
            log.warning(
                "on this machine the rows of a batch of %d do not agree to the last bit: requests are computed one at a time",
                self.batch,
            )
            self.batch = 1

    def _refusal(self, request: Request) -> SvamError | None:
        """Why the text encoder does not take the sentence, or None. (The tokenizer belongs to this thread, so `read_request`
        cannot ask it.)"""
        try:
            self.svam.foresight.text.ids([request.observation.instruction])
        except SvamError as error:
            return error
        return None

    def _together(self, requests: Sequence[Request]) -> Sequence[Answer | SvamError]:
        """All in one batch; where that fails (a NaN, for example), each in one of its own."""
        try:
            return self._computed(requests)
        except Exception as error:
            if len(requests) > 1:
                return [answer for request in requests for answer in self._together([request])]
            if isinstance(error, SvamError):
                return [error]
            log.exception("the policy failed on a request")
            return [ServingError("the policy failed on this observation; the server's log says why")]

    def _computed(self, requests: Sequence[Request]) -> list[Answer]:
        filled = [*requests, *[requests[-1]] * (self.batch - len(requests))]
        seeds = [request.seed for request in filled]
        spent: dict[str, float] = {}
        with timed_components(self.svam.foresight, spent), timed(spent, "infer"):
            inputs = self.svam.encode([request.observation for request in filled], seeds)
            with timed(spent, "policy"):
                actions = self.svam.sample(inputs, seeds)
        timing = {f"{name}_ms": round(1000.0 * seconds, 3) for name, seconds in spent.items()} | {"batch": len(requests)}
        executable = self.svam.executable(actions[: len(requests)], [request.observation for request in requests])
        return [Answer(row, timing) for row in executable]
