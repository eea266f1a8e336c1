"""What is kept of a recorded episode, of which `report` draws a film."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.evaluation.policies import Evaluated
from svam.evaluation.rollout import Outcome, noise_seed
from svam.models.svam import SVAM
from svam.npy import write_arrays
from svam.params import Params


def write_rollout(
    folder: Path, outcome: Outcome, policy: Evaluated, params: Params, more: Mapping[str, NDArray[np.float32]] | None = None
) -> None:
    """Write a recorded episode, and nothing of another, to `folder/rollouts/<task>_<index>/*.npy`.

    frames (steps + 1, V H, W, 3) uint8, of V cameras below one another; calls (C,) int64, the steps at which the policy was
    called; for each context entry what it foresaw then, foresight_<entry> (C, T, V h, w, channels) float16; and `more`.
    """
    if (recorded := outcome.recorded) is None:
        return
    arrays: dict[str, NDArray[Any]] = {"frames": recorded.frames}
    arrays |= {"calls": np.asarray(outcome.calls, dtype=np.int64), **(more or {})}
    if isinstance(policy, SVAM):
        foresight = foresight_at_calls(policy, outcome, params.seed, params.evaluate.batch)
        arrays |= {f"foresight_{entry}": values for entry, values in foresight.items()}
    write_arrays(folder / "rollouts" / f"{outcome.plan.task}_{outcome.plan.index}", arrays)


def foresight_at_calls(model: SVAM, outcome: Outcome, seed: int, batch: int) -> dict[str, NDArray[np.float16]]:
    """What the policy foresaw in a recorded episode, encoded again: context entry -> (calls, T, V h, w, C), from the same
    frames, sentences and noise. Proprioception is no part of the foresight."""
    if outcome.recorded is None or not model.config.frozen_entries:
        return {}
    parts: dict[str, list[NDArray[np.float16]]] = {}
    for start in range(0, len(outcome.calls), batch):
        calls = outcome.calls[start : start + batch]
        padded = [*calls, *[calls[-1]] * (batch - len(calls))]
        seeds = [noise_seed(seed, outcome.plan, call) for call in padded]
        sentences = [sentence_at(outcome, call) for call in padded]
        encoded = model.encode_frames(outcome.recorded.frames[padded], sentences, model.config.frozen_entries, seeds)
        for entry, values in encoded.entries.items():
            parts.setdefault(entry, []).append(values[: len(calls)].cpu().numpy())
    return {entry: np.concatenate(arrays) for entry, arrays in parts.items()}


def sentence_at(outcome: Outcome, call: int) -> str:
    """What the policy read when it was called after `call` steps: the sentence of the first goal not reached by then."""
    return outcome.plan.goals[sum(steps <= call for steps in outcome.reached)][1]
