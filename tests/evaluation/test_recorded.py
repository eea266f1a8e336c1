"""What is kept of a recorded episode: what the policy foresaw is read with the sentence that it read then."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from svam.evaluation.recorded import foresight_at_calls, write_rollout
from svam.evaluation.rollout import Outcome, PlannedEpisode, Recorded, noise_seed
from svam.models.svam import SVAM
from svam.npy import read_arrays
from tests.tiny_foresight import SIZE
from tests.toy import write_toy_params

SENTENCES = ("reach a", "push a")


def chain(record: bool = True) -> Outcome:
    """Two goals in five steps, of which the first was reached after two: the policy was called anew for the second."""
    plan = PlannedEpisode("policy", "calvin", 7, 0, chain=(("one", SENTENCES[0]), ("two", SENTENCES[1])))
    frames = np.random.default_rng(0).integers(0, 256, (6, SIZE, SIZE, 3), dtype=np.uint8)
    recorded = Recorded(frames, np.zeros((6, 15), np.float32), np.zeros((5, 7), np.float32)) if record else None
    return Outcome(plan, (), False, 5, (0, 2, 4), recorded, (2,))


def test_each_call_has_its_goals_sentence(evaluated: Path) -> None:
    model, outcome = SVAM.load(evaluated / "svam"), chain()
    assert outcome.recorded is not None
    foreseen = foresight_at_calls(model, outcome, seed=3, batch=2)["one_step"]
    assert len(foreseen) == 3

    def encoded(call: int, sentence: str) -> np.ndarray:
        seeds, frames = [noise_seed(3, outcome.plan, call)] * 2, outcome.recorded.frames[[call, call]]
        return model.encode_frames(frames, [sentence] * 2, ["one_step"], seeds).entries["one_step"][0].cpu().numpy()

    for i, (call, first) in enumerate(((0, True), (2, False), (4, False))):
        right, wrong = SENTENCES if first else SENTENCES[::-1]
        np.testing.assert_allclose(foreseen[i], encoded(call, right), atol=0.01)
        assert np.abs(foreseen[i] - encoded(call, right)).max() < np.abs(foreseen[i] - encoded(call, wrong)).max() / 10


def test_only_recorded_episodes_are_written(tmp_path: Path) -> None:
    params = write_toy_params(tmp_path / "params.yaml")
    write_rollout(tmp_path, chain(record=False), None, params)
    assert not (tmp_path / "rollouts").exists()
    write_rollout(tmp_path, chain(), None, params, {"actions": np.ones((5, 7), np.float32)})
    arrays = read_arrays(tmp_path / "rollouts/calvin_7")
    assert set(arrays) == {"frames", "calls", "actions"} and arrays["calls"].tolist() == [0, 2, 4]
