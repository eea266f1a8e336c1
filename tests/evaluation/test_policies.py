"""Any policy in the closed loop: one that a server has, scripted ones, and those that do nothing or something wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.evaluate import app
from svam.episodes.joined import open_store
from svam.errors import ParamsError, SvamError
from svam.evaluation.policies import evaluated_policy
from svam.evaluation.remote import Remote
from svam.evaluation.rollout import Outcome, PolicyRollouts, Workers, run_scripted
from svam.files import read_json, sha256
from svam.models.svam import SVAM
from svam.npy import read_arrays
from svam.protocols import RemotePolicy
from svam.resume import NO_RESUME, Resume
from svam.seeds import generator
from tests.evaluation.test_evaluate import write_params
from tests.evaluation.test_rollout import Line, plans, same
from tests.serving.conftest import start_command
from tests.serving.peers import PATIENCE, encoded, minimal_server
from tests.tiny import TASKS, observations
from tests.toy import committed, invoke

Answer = bytes | str | None


def settings(url: str, **changes: Any) -> RemotePolicy:
    return RemotePolicy.model_validate(committed("evaluate.remote", **{"url": url, "reply_seconds": PATIENCE} | changes))


def chunk(values: Any, steps: int = 4) -> bytes:
    return encoded({"actions": np.full((steps, 1), values, np.float32)})


def seek(request: Any, _: int = 0) -> bytes:
    """Towards the goal that `Line` draws, by what the picture alone says."""
    place, goal = request["observation/image"][0, :2, 0].astype(float)
    return chunk(np.clip((goal - place) / 30, -1, 1))  # there after three steps


def roll(url: str, resume: Resume = NO_RESUME, count: int = 6, **changes: Any) -> list[Outcome]:
    with Remote(settings(url, **changes), 3) as remote, Workers(Line, 1) as pool:
        rollouts = PolicyRollouts(remote, pool, seed=0, batch=4, execute=3, max_steps=20, proprioception=True, resume=resume)
        return rollouts.run(plans(count))


def test_a_server_is_asked_once_for_each_observation() -> None:
    seen: list[Any] = []

    def reply(request: Any, number: int) -> Answer:
        seen.append(request)
        return seek(request)

    for metadata, connections in (({"takes_seed": True}, 1), ({}, 3)):
        seen.clear()
        with minimal_server(reply, encoded(metadata)) as url:
            outcomes = roll(url, connections=connections)
        assert len(seen) == sum(len(outcome.calls) for outcome in outcomes) and all(outcome.success for outcome in outcomes)
        keys = {"observation/image", "observation/state", "prompt"} | ({"seed"} if metadata else set())
        assert all(set(request) == keys and request["prompt"] == "go a" for request in seen)
        assert not metadata or len({request["seed"] for request in seen}) == len(seen)


FAULTS: list[tuple[Answer | Callable[[], Answer], str]] = [
    (chunk(np.nan), "replied with nan as action 0, dimension 0"),
    (encoded({"actions": np.zeros(4, np.float32)}), r"replied with actions of float32 \(4,\), expected numbers \(K, A\)"),
    (chunk(0.0, steps=2), "replied with 2 actions, but evaluate.execute is 3; set it to at most that"),
    (encoded({"actions": np.zeros((4, 7), np.float32)}), r"actions of \[\(3, 1\), \(3, 7\)\] in one round"),
    ("Traceback\n  ...\nValueError: no such camera\n", "refused the observation: ValueError: no such camera"),
    (None, r"cannot be reached \(3 attempts\)"),
]


@pytest.mark.parametrize(("fault", "said"), FAULTS, ids=[said[:30] for _, said in FAULTS])
def test_a_policy_that_fails_is_one_sentence_and_finished_episodes_stay(fault: Answer, said: str, tmp_path: Path) -> None:
    counts: list[int] = []

    def healthy(request: Any, number: int) -> Answer:
        counts.append(number)
        return seek(request)

    with minimal_server(healthy) as url:
        straight, needed = roll(url), len(counts)
        # One bad reply is enough, but a lost connection is made again.
        failing = (lambda number: number >= needed - 3) if fault is None else (lambda number: number == needed - 3)
        breaking = minimal_server(lambda request, number: fault if failing(number) else seek(request))
        with breaking as broken, pytest.raises(SvamError, match=said) as caught:
            roll(broken, Resume(tmp_path))
        assert "\n" not in str(caught.value) and 0 < len(list(tmp_path.glob("*.json"))) < len(straight)
        counts.clear()
        assert same(roll(url, Resume(tmp_path)), straight) and len(counts) < needed


def test_a_policy_that_sleeps_is_given_up() -> None:
    awake = threading.Event()

    def sleep(request: Any, number: int) -> Answer:
        awake.wait(PATIENCE)
        return seek(request)

    with minimal_server(sleep) as url:
        with pytest.raises(SvamError, match="did not reply within 0.5 s"):
            roll(url, count=1, reply_seconds=0.5)
        awake.set()


def test_what_is_served_must_be_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with minimal_server(seek, encoded({"weights_sha256": "a" * 64})) as url:
        with pytest.raises(ParamsError, match=f"evaluate.remote.weights is {'b' * 64}, but {url} states {'a' * 64}"):
            Remote(settings(url, weights="b" * 64), 3)
        monkeypatch.delenv("SVAM_TEST_KEY", raising=False)
        with pytest.raises(ParamsError, match="the environment variable 'SVAM_TEST_KEY' is not set"):
            Remote(settings(url, key_env="SVAM_TEST_KEY"), 3)
        with Remote(settings(url, weights="a" * 64), 3) as remote:
            assert remote.weights == "a" * 64


def test_a_random_walk_succeeds_where_a_walk_by_hand_does() -> None:
    with Workers(Line, 2) as pool:
        walked = run_scripted(plans(300), "random", pool, dimensions=1, max_steps=60, seed=0)
    expected = []
    for plan in plans(300):
        world, random = Line(plan.task), generator(0, "random policy", plan.task, plan.index)
        world.reset(plan.seed)
        expected.append(any(world.step(random.uniform(-1.0, 1.0, 1).astype(np.float32)) for _ in range(60)))
    assert [outcome.success for outcome in walked] == expected and 30 < sum(expected) < 270


def test_the_policy_is_made_ready_for_control(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ready(svam: SVAM, *settings: object) -> object:
        assert isinstance(svam, SVAM)
        return settings

    monkeypatch.setattr("svam.evaluation.policies.for_control", ready)
    params = write_params(tmp_path / "params.yaml", batch=5)
    for compiled in (True, False):
        machine = params.machine.model_copy(update={"compile": compiled})
        with evaluated_policy(params.model_copy(update={"machine": machine}), evaluated / "svam") as (policy, named):
            made: object = policy
            assert made == (torch.device(named), 5, compiled)


def evaluate(evaluated: Path, out: Path, *options: object, **changes: Any) -> Any:
    """The stage, in MetaWorld; the text that it prints where it fails."""
    out.parent.mkdir(exist_ok=True)
    write_params(out.parent / "params.yaml", protocols=["metaworld"], **changes)
    store = evaluated / "episodes.zarr"
    return invoke(app, out, "--episodes", store, "--params", out.parent / "params.yaml", *options)


@contextmanager
def served(model: Path) -> Iterator[str]:
    """The address of `python -m svam.serving`."""
    process = start_command(model)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "episodes.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.usefixtures("warm_python")
def test_a_served_policy_fills_the_row_that_it_fills_in_process(evaluated: Path, tmp_path: Path) -> None:
    """To the bit, where both compute batches of one: a reply is a function of picture, sentence and the seed that is sent."""
    model, near, far = evaluated / "svam", tmp_path / "near/results", tmp_path / "far/results"
    weights = sha256(model / "manifest.json")
    result = evaluate(evaluated, near, "--model", model, batch=1)
    assert result.exit_code == 0, result.output
    with served(model) as url:
        result = evaluate(evaluated, far, policy="remote", batch=3, remote={"url": url, "weights": weights, "connections": 2})
        assert result.exit_code == 0 and "latency" not in result.output, result.output
        svam, seen = SVAM.load(model), observations(open_store(evaluated / "episodes.zarr"), 2)
        with Remote(settings(url), 4) as remote:
            same_seed, other = (remote.act(seen[:1], [seed])[0] for seed in (5, 6))
        np.testing.assert_array_equal(same_seed, svam.act(seen[:1], [5])[0])
        assert (other != same_seed).any()
    assert lines(near) == lines(far)
    for rollout in (near / "rollouts").iterdir():
        one, other = read_arrays(rollout), read_arrays(far / "rollouts" / rollout.name)
        assert set(other) == {"frames", "calls"} and all(np.array_equal(other[name], one[name]) for name in other)
    metrics = read_json(far / "metrics.json")
    assert metrics["policy"] == "remote" and metrics["metaworld"]["setting"]["weights_sha256"] == weights
    assert metrics["metaworld"]["rows"] == read_json(near / "metrics.json")["metaworld"]["rows"]

    out = tmp_path / "gone/results"
    result = evaluate(evaluated, out, policy="remote", remote={"url": url})
    assert result.exit_code == 1 and "cannot be reached (3 attempts)" in result.output and not out.exists()


def test_a_policy_that_does_nothing_solves_nothing(evaluated: Path, tmp_path: Path) -> None:
    for dimensions, code in ((4, 0), (7, 1)):
        out = tmp_path / str(dimensions) / "results"
        zeros = encoded({"actions": np.zeros((5, dimensions), np.float32)})
        with minimal_server(lambda request, number, zeros=zeros: zeros) as url:  # type: ignore[misc]
            result = evaluate(evaluated, out, policy="remote", remote={"url": url, "image_size": 24}, batch=1)
        assert result.exit_code == code, result.output
        if code:
            assert "expected 4 finite numbers" in result.output and not out.exists()
            continue
        found = [line for line in lines(out) if line["row"] == "policy"]
        assert len(found) == 4 and all(not line["success"] and line["steps"] == 10 for line in found)
        assert read_arrays(out / f"rollouts/{TASKS[0]}_0")["frames"].shape == (11, 24, 24, 3)


@pytest.mark.parametrize("policy", ["expert", "random"])
def test_a_scripted_policy_needs_no_model_and_no_demonstrations(policy: str, evaluated: Path, tmp_path: Path) -> None:
    tasks = {"tasks": ["drawer-close", "reach"], "max_steps": 150}
    result = evaluate(evaluated, tmp_path / "results", policy=policy, metaworld=tasks)
    assert result.exit_code == 0, result.output
    found = lines(tmp_path / "results")
    assert {(line["row"], line["task"]) for line in found} == {(policy, task) for task in tasks["tasks"]}  # type: ignore[attr-defined]
    metrics = read_json(tmp_path / "results/metrics.json")["metaworld"]
    assert set(metrics["rows"]) == {policy} and "cameras" not in metrics["setting"]
    assert metrics["rows"][policy]["tasks"]["drawer-close"]["success"] == (policy == "expert")
    assert not (tmp_path / "results/rollouts").exists()
