"""CALVIN's chains: scores by hand, and, where a checkout is named, the protocol in the simulator itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from svam.contract import ContractError, Observation
from svam.episodes.convert import convert
from svam.episodes.joined import open_store
from svam.errors import ParamsError
from svam.evaluation import calvin
from svam.evaluation.recorded import sentence_at
from svam.evaluation.remote import Remote
from svam.evaluation.rollout import Outcome, PlannedEpisode, noise_seed
from svam.evaluation.scores import rate_of
from svam.files import sha256_tree
from svam.models.svam import SVAM
from svam.npy import read_arrays
from svam.params import Params
from svam.resume import NO_RESUME, Resume
from svam.simulation.calvin import CalvinEnvironment
from svam.simulation.calvin_chains import Chain
from tests.calvin import checkout, needs_calvin
from tests.evaluation.test_policies import settings
from tests.recorded import SETTINGS, Recorded, make_episode
from tests.serving.peers import encoded, minimal_server
from tests.tiny import make_svam, save_all_parts
from tests.tiny_foresight import SIZE
from tests.toy import write_toy_params

SCENE: dict[str, str | int] = {
    "led": 0, "lightbulb": 0, "slider": "right", "drawer": "closed", "red_block": "table", "blue_block": "slider_left",
    "pink_block": "slider_right", "grasped": 0,
}  # fmt: skip
CHAINS = [
    (7, Chain(SCENE, ("turn_on_led", "move_slider_left"))),
    (8, Chain(SCENE | {"drawer": "open"}, ("close_drawer", "turn_on_led"))),
    (9, Chain(SCENE, ("move_slider_left", "open_drawer"))),
    (12, Chain(SCENE, ("turn_on_led", "open_drawer"))),
]


def outcome(names: str, solved: int) -> Outcome:
    plan = PlannedEpisode("policy", "calvin", 0, 0, chain=tuple((name, f"do {name}") for name in names))
    return Outcome(plan, (), solved == len(names), 9, reached=tuple(range(solved)))


def test_rates_add_up_to_the_average_length() -> None:
    scores = calvin.chain_scores([outcome("abc", 3), outcome("abd", 1), outcome("bca", 0), outcome("cab", 1)])
    assert [rate["successes"] for rate in scores["rates"]] == [3, 1, 1]
    assert scores["average_length"] == pytest.approx(5 / 4)
    assert scores["rates"][0] == rate_of([True, True, True, False])
    # a: twice solved, and tried in vain after c; b: once; d was never tried.
    counts = {name: (rate["successes"], rate["episodes"]) for name, rate in scores["subtasks"].items()}
    assert counts == {"a": (2, 3), "b": (1, 3), "c": (2, 2)}


@pytest.mark.slow
def test_chains_are_chosen_from_the_official_list(tmp_path: Path) -> None:
    tasks = ["turn_on_led", "turn_off_led", "open_drawer", "close_drawer", "move_slider_left"]
    section = calvin_params(tmp_path, tasks=tasks, subtasks=2, chains=5).evaluate.calvin
    chosen = calvin.chosen_chains(section)
    assert len(chosen) == 5 and all(set(chain.subtasks) <= set(tasks) and len(chain.subtasks) == 2 for _, chain in chosen)
    numbers = [number for number, _ in chosen]
    assert numbers == sorted(set(numbers)) and numbers != list(range(5))
    everything = calvin.chosen_chains(section.model_copy(update={"tasks": [], "chains": 1000, "subtasks": 5}))
    assert [everything[number][1].subtasks[:2] for number in numbers] == [chain.subtasks for _, chain in chosen]
    with pytest.raises(ParamsError, match=r"chains is 1000, but \d+ of the 1000 official chains begin with 2 subtasks"):
        calvin.chosen_chains(section.model_copy(update={"chains": 1000}))


def test_a_policy_of_other_data_is_refused(evaluated: Path) -> None:
    store, svam = open_store(evaluated / "episodes.zarr"), SVAM.load(evaluated / "svam")
    with pytest.raises(ContractError, match="rate is 80 Hz, but the calvin protocol needs 30 Hz"):
        calvin.check_model(svam, store)


def calvin_params(folder: Path, **changes: Any) -> Params:
    section = {"commit": "1234567", "chains": 4, "subtasks": 2, "max_steps": 150, **changes}
    evaluate = {"protocols": ["metaworld"], "execute": 4, "batch": 3, "videos": 1, "calvin": section}
    return write_toy_params(folder / "params.yaml", {"train_policy": {"chunk": 4}, "evaluate": evaluate})


def play(folder: Path, policy: Any, workers: int, resume: Resume = NO_RESUME, kind: str = "svam") -> dict[str, list[Outcome]]:
    params = calvin_params(folder).evaluate.model_copy(update={"policy": kind})
    return calvin.run(
        CHAINS, checkout(), policy, params, cameras=("static",), image_size=(SIZE, SIZE), proprioception=True, seed=0,
        workers=workers, resume=resume,
    )  # fmt: skip


def facts(outcomes: dict[str, list[Outcome]]) -> dict[str, Any]:
    """To compare; of recorded chains also what was recorded."""

    def fact(outcome: Outcome) -> tuple[Any, ...]:
        recorded = {} if outcome.recorded is None else {name: v.tobytes() for name, v in vars(outcome.recorded).items()}
        return (*dataclasses.astuple(dataclasses.replace(outcome, recorded=None)), recorded)

    return {row: [fact(outcome) for outcome in group] for row, group in outcomes.items()}


class Replayed:
    """Does what the expert did, and remembers what it was called for; after `calls` of them it breaks down."""

    def __init__(self, calls: int = 10**9) -> None:
        self.calls, self.seen = calls, dict[int, Observation]()
        plans = calvin.plan_chains("policy", CHAINS, checkout())
        environment = CalvinEnvironment(
            folder=checkout().folder, cameras=(), states=[chain.initial_state for _, chain in CHAINS]
        )
        self.actions: dict[int, NDArray[np.float32]] = {}
        self.sentences: dict[int, str] = {}
        for plan in plans:
            environment.reset(plan.seed)
            actions: list[NDArray[np.float32]] = []
            sentences = []
            for goal, sentence in plan.goals:
                environment.begin(goal)
                solved = False
                while not solved:
                    actions.append(environment.expert_action())
                    sentences.append(sentence)
                    solved = environment.step(actions[-1])
            last = np.stack([*actions, *[actions[-1]] * 3])
            for step, sentence in enumerate(sentences):
                key = noise_seed(0, plan, step)
                self.actions[key], self.sentences[key] = last[step : step + 4], sentence
        environment.close()

    def act(self, observations: list[Observation], noise_seeds: list[int]) -> NDArray[np.float32]:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        for observation, key in zip(observations, noise_seeds, strict=True):
            assert observation.instruction == self.sentences[key]
            self.seen[key] = observation
        return np.stack([self.actions[key] for key in noise_seeds])


@needs_calvin
def test_a_chain_goes_as_its_actions_say_with_any_number_of_workers_and_kills(tmp_path: Path) -> None:
    policy = Replayed()
    once = play(tmp_path, policy, workers=1)
    expert = {o.plan.index: o.reached for o in once["expert"]}
    assert {o.plan.index: o.reached for o in once["policy"]} == expert and set(expert) == {7, 8, 9, 12}
    assert all(o.success and len(o.reached) == 2 for o in once["policy"])
    assert not any(o.success for o in once["random"]), "chance"
    first = once["policy"][0]
    assert first.reached[0] in first.calls and first.calls[0] == 0, "a subtask begins with a call"
    picture = policy.seen[noise_seed(0, first.plan, 0)]
    assert picture.frames["static"].shape == (SIZE, SIZE, 3) and picture.proprioception is not None
    assert picture.proprioception.shape == (15,)
    assert [o.recorded is not None for o in once["policy"]] == [True, False, False, False] and first.recorded is not None
    assert first.recorded.frames.shape == (first.steps + 1, SIZE, SIZE, 3)
    for call in first.calls:
        seen = policy.seen[noise_seed(0, first.plan, call)]
        assert (first.recorded.frames[call] == seen.frames["static"]).all()
        assert sentence_at(first, call) == seen.instruction
    assert facts(play(tmp_path, Replayed(), workers=3)) == facts(once)
    assert play(tmp_path, None, workers=2, kind="random") == {"random": once["random"]}

    resume = Resume(tmp_path / "state")
    (tmp_path / "state").mkdir()
    broken, calls = Replayed(calls=sum(len(o.calls) for o in once["policy"]) * 2 // 3), len(policy.seen)
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path, broken, workers=1, resume=resume)
    finished = len(list((tmp_path / "state").glob("policy_*.json")))
    assert 0 < finished < 4
    rest = Replayed()
    assert facts(play(tmp_path, rest, workers=2, resume=resume)) == facts(once)
    assert len(rest.seen) < calls
    again = Replayed(calls=0)
    assert facts(play(tmp_path, again, workers=1, resume=resume)) == facts(once), "nothing is left to do"


@needs_calvin
def test_an_expert_without_a_script_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "CHAINS", [(0, Chain(SCENE, ("open_drawer", "stack_block")))])
    with pytest.raises(ParamsError, match="no script for stack_block"):
        play(tmp_path, None, workers=1, kind="expert")


@needs_calvin
def test_a_server_sees_both_cameras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calvin, "open_checkout", lambda path, commit: checkout())
    monkeypatch.setattr(calvin, "chosen_chains", lambda section: CHAINS[:1])
    params, seen = calvin_params(tmp_path, max_steps=8), []

    def reply(request: Any, number: int) -> bytes:
        seen.append(request)
        return encoded({"actions": np.zeros((4, 7), np.float32)})

    with minimal_server(reply) as url, Remote(settings(url), 4) as remote:
        store: Any = None  # what a server was trained on is not known here
        metrics = calvin.write_calvin(tmp_path, store, remote, params, NO_RESUME)
    assert [request["prompt"] for request in seen] == [checkout().sentences["turn_on_led"]] * 2
    assert seen[0]["observation/image"].shape == (200, 200, 3) and seen[0]["observation/wrist_image"].shape == (84, 84, 3)
    assert seen[0]["observation/state"].shape == (15,) and metrics["cameras"] == ["static", "gripper"]
    assert metrics["rows"]["policy"]["average_length"] == 0.0 and metrics["weights_sha256"] is None
    assert read_arrays(tmp_path / "rollouts/calvin_7")["frames"].shape == (9, 200, 200, 3), "the gripper's are of another size"


@needs_calvin
@pytest.mark.slow
def test_a_trained_policy_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)

    def recorded(number: int) -> Any:
        made = make_episode("open_drawer", 12, number, SIZE)
        actions = rng.uniform(-1, 1, (12, 7)).astype(np.float32)
        actions[:, 6] = np.sign(actions[:, 6])
        return dataclasses.replace(
            made, instruction="open it", frames={"static": made.frames["front"]}, actions=actions, expert_actions=None,
            proprioception=rng.normal(size=(12, 15)).astype(np.float32), rate_hz=30.0,
        )  # fmt: skip

    class Demonstrations(Recorded):
        def describe(self) -> Any:
            return super().describe().model_copy(update={"rate_hz": 30.0, "cameras": ["static"]})

    convert(Demonstrations([recorded(number) for number in range(4)]), tmp_path / "episodes.zarr", SETTINGS, 0)
    store = open_store(tmp_path / "episodes.zarr")
    svam = make_svam(store, save_all_parts(tmp_path / "parts", store), proprioception=True)
    with pytest.raises(ContractError, match="tokens, the text encoder has 8"):
        calvin.check_model(svam, store, checkout().sentences.values())
    chosen = dict.fromkeys((name for _, chain in CHAINS for name in chain.subtasks), "open it")
    short = dataclasses.replace(checkout(), sentences={**checkout().sentences, **chosen})  # of others the policy is not asked
    monkeypatch.setattr(calvin, "open_checkout", lambda path, commit: short)
    monkeypatch.setattr(calvin, "chosen_chains", lambda section: CHAINS)  # drawing the official ones takes a while
    written = []
    for workers in (1, 3):
        params = calvin_params(tmp_path, max_steps=10)
        params = params.model_copy(update={"machine": params.machine.model_copy(update={"workers": workers})})
        (tmp_path / str(workers)).mkdir()
        metrics = calvin.write_calvin(tmp_path / str(workers), store, svam, params, NO_RESUME)
        lines = (tmp_path / str(workers) / "chains.jsonl").read_text(encoding="utf-8")
        written.append((metrics, lines, sha256_tree(tmp_path / str(workers))))
    assert written[0] == written[1]
    metrics, lines, _ = written[0]
    rollout = read_arrays(tmp_path / "1/rollouts/calvin_7")
    assert len(rollout["frames"]) == 11 and len(rollout["calls"]) == len(rollout["foresight_one_step"]) == 3
    assert metrics["cameras"] == ["static"] and metrics["renderer"] == "cpu" and metrics["commit"] == checkout().commit
    assert not metrics["official"] and set(metrics["rows"]) == {"policy", "random", "expert"}
    assert [json.loads(line)["chain"] for line in lines.splitlines()] == [7, 8, 9, 12] * 3
