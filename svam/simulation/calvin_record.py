"""`python -m svam.simulation.calvin_record OUT`: demonstrations of CALVIN's scripted experts, in the official layout.

A recording starts in a scene like an official chain's, but with blocks, slider, drawer and hand somewhat elsewhere, and solves
subtasks one after the other; each is an annotated segment. `svam.sources.calvin` reads the result, and describes the layout.

    OUT/training/ and OUT/validation/
        episode_0000000.npz ...   a step: rgb_static, rgb_gripper, rel_actions as executed, actions, robot_obs, scene_obs
        ep_start_end_ids.npy, scene_info.npy, statistics.yaml, lang_annotations/auto_lang_ann.npy

Recording r begins at step 1000 r, so that several processes can write and the bytes do not depend on how many. `actions` is the
pose that rel_actions ask for from the present one. There is no `emb`, which needs a language model, and no depth.
"""

from __future__ import annotations

import atexit
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from ruamel.yaml import YAML

from svam.console import console, one_line_errors, track
from svam.device import become_worker
from svam.errors import ParamsError, did_you_mean
from svam.files import whole_directory
from svam.seeds import generator
from svam.simulation.calvin import CAMERAS, CalvinEnvironment, Checkout, Renderer, initial_state, open_checkout
from svam.simulation.calvin_chains import initial_scenes, solvable
from svam.simulation.calvin_experts import EXPERT_TASKS, METRES, RADIANS, Expert
from svam.simulation.experts import disturbances

COMMIT = "797142c588c21e76717268b7b430958dbd13bf48"
STEPS = 1000
"""Numbers of steps that a recording may use."""
MAX_STEPS, TAIL = 120, 4
"""Of a subtask, and recorded after it is solved."""
_SCALE = np.repeat([METRES, RADIANS], 3)
_BLOCKS = slice(6, None)

_environments: list[CalvinEnvironment] = []
"""Of this worker process: at most one."""


@dataclass(frozen=True)
class Plan:
    """What all recordings have in common: subtasks to choose from and their sentences, how many a recording has, the share of
    recordings whose actions are disturbed, and the standard deviation of that in units of actions."""

    checkout: Checkout
    tasks: tuple[str, ...]
    sentences: Mapping[str, list[str]]
    subtasks: int
    seed: int
    noisy_share: float
    noise_scale: float
    renderer: Renderer


@dataclass(frozen=True)
class Segment:
    """Steps first..last (both included) that solve a task."""

    first: int
    last: int
    task: str
    sentence: str


def _begin(env: CalvinEnvironment, random: np.random.Generator, plan: Plan) -> dict[str, int | str]:
    """Start in a scene in which there is something to do, and return it."""
    scenes = [scene for scene in initial_scenes() if solvable(scene, plan.tasks)]
    scene = scenes[int(random.integers(len(scenes)))]
    robot, start = initial_state(scene)
    start[:2] *= random.uniform(0.85, 1.0, 2)  # an open slider or drawer is not always quite open
    blocks = start[_BLOCKS].reshape(3, 6)
    on_table = blocks[:, 1] < 0
    blocks[on_table, :2] += random.uniform(-0.02, 0.02, (3, 2))[on_table]
    env.reset_to(robot, start)
    hand = random.uniform((-0.15, -0.3, 0.52), (0.3, -0.15, 0.65))
    for _ in range(int(random.integers(25))):
        action = np.append(np.clip((hand - env.robot_obs()[:3]) / METRES, -0.75, 0.75), (0.0, 0.0, 0.0, random.choice((-1, 1))))
        env.step(action.astype(np.float32))
    return scene


def _write_step(file: Path, env: CalvinEnvironment, action: NDArray[np.float32]) -> None:
    """A step as it is before `action`."""
    pose, relative = env.robot_obs(), action.astype(np.float64)
    asked = np.append(pose[:6] + relative[:6] * _SCALE, relative[6])
    arrays: dict[str, Any] = {f"rgb_{camera}": frame for camera, frame in env.observe().items()}
    np.savez_compressed(file, actions=asked, rel_actions=relative, robot_obs=pose, scene_obs=env.scene_obs(), **arrays)


def _record(plan: Plan, folder: Path, number: int) -> list[Segment]:
    """In a worker: write the steps of recording `number` to `folder`."""
    if not _environments:
        _environments.append(CalvinEnvironment(folder=plan.checkout.folder, renderer=plan.renderer, cameras=tuple(CAMERAS)))
        atexit.register(_environments[0].close)
    env, random = _environments[0], generator(plan.seed, "calvin-record", folder.name, number)
    scene, step, segments = _begin(env, random, plan), number * STEPS, list[Segment]()
    noisy = random.random() < plan.noisy_share
    while len(segments) < plan.subtasks and (choice := solvable(scene, plan.tasks)):
        task = sorted(choice)[int(random.integers(len(choice)))]
        sentence = plan.sentences[task][int(random.integers(len(plan.sentences[task])))]
        noise = disturbances(random, MAX_STEPS, plan.noise_scale if noisy else 0.0)[:, :3]
        env.begin(task)
        expert, first, left = Expert(env, task), step, MAX_STEPS
        while left:
            action = expert.action()
            action[:3] = np.clip(action[:3] + noise[left - 1], -1.0, 1.0)
            _write_step(folder / f"episode_{step:07d}.npz", env, action)
            step, left = step + 1, left - 1
            if env.step(action) and left > TAIL:
                left, scene = TAIL, choice[task]
                segments.append(Segment(first, step + TAIL - 1, task, sentence))
        if not segments or segments[-1].first != first:  # the expert failed: the scene is not what the next subtask expects
            for failed in range(first, step):
                (folder / f"episode_{failed:07d}.npz").unlink()
            break
    return segments


def _write_tables(folder: Path, recordings: list[list[Segment]]) -> None:
    """What a folder has beside its steps."""
    segments = [segment for recording in recordings for segment in recording]
    bounds = [(recording[0].first, recording[-1].last) for recording in recordings if recording]
    if not segments:
        raise ParamsError(f"{folder.name}: the experts solved nothing; record more episodes, or other tasks")
    np.save(folder / "ep_start_end_ids.npy", np.array(bounds, np.int64))
    language = {"ann": [segment.sentence for segment in segments], "task": [segment.task for segment in segments]}
    info = {"episodes": [], "indx": [(segment.first, segment.last) for segment in segments]}
    (folder / "lang_annotations").mkdir()
    # The layout demands Python objects, which numpy pickles; these are plain text, numbers, lists and tuples.
    objects: Any = {"language": language, "info": info}
    np.save(folder / "lang_annotations" / "auto_lang_ann.npy", objects)
    objects = {"calvin_scene_D": [bounds[0][0], bounds[-1][1]]}
    np.save(folder / "scene_info.npy", objects)
    vectors: dict[str, list[NDArray[np.float64]]] = {"robot_obs": [], "scene_obs": [], "rel_actions": []}
    for file in sorted(folder.glob("episode_*.npz")):
        with np.load(file) as arrays:
            for name, rows in vectors.items():
                rows.append(arrays[name])
    stacked = {name: np.stack(rows) for name, rows in vectors.items()}
    normalise = "calvin_agent.utils.transforms.NormalizeVector"
    statistics: dict[str, Any] = {
        name: [{"_target_": normalise, "mean": stacked[name].mean(0).tolist(), "std": stacked[name].std(0).tolist()}]
        for name in ("robot_obs", "scene_obs")
    }
    actions = stacked["rel_actions"]
    statistics |= {"act_min_bound": actions.min(0).tolist(), "act_max_bound": actions.max(0).tolist()}
    YAML(typ="safe", pure=True).dump(statistics, folder / "statistics.yaml")


def record(out: Path, plan: Plan, episodes: dict[str, int], workers: int) -> list[Segment]:
    """Record so many episodes of each split into `out`, which is replaced as a whole; returns all segments."""
    everything = []
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=become_worker)
    with whole_directory(out) as partial_out, pool:
        for split, count in episodes.items():
            folder = partial_out / split
            folder.mkdir()
            made = pool.map(partial(_record, plan, folder), range(count))
            recordings = list(track(made, f"record {split}", count))
            _write_tables(folder, recordings)
            everything += [segment for recording in recordings for segment in recording]
    return everything


def _read_sentences(file: Path | None, checkout: Checkout, tasks: list[str]) -> dict[str, list[str]]:
    """Task -> sentences, of the file or else those of the evaluation."""
    if file is None:
        return {task: [checkout.sentences[task]] for task in tasks}
    read = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    for task in tasks:
        found = read.get(task) if isinstance(read, dict) else None
        if not (isinstance(found, list) and found and all(isinstance(sentence, str) for sentence in found)):
            raise ParamsError(f"{file}: {task} is {found!r}, expected a list of sentences; add it, or leave out --sentences")
    return {task: read[task] for task in tasks}


@one_line_errors
def main(
    out: Annotated[Path, typer.Argument(help="Folder to write, replaced as a whole.")],
    checkout: Annotated[str, typer.Option(help="As evaluate.calvin.path.")],
    commit: Annotated[str, typer.Option(help="As evaluate.calvin.commit.")] = COMMIT,
    tasks: Annotated[str, typer.Option(help="Separated by commas; empty: all that scripts solve.")] = "",
    episodes: Annotated[int, typer.Option(min=1, help="Recordings for training.")] = 100,
    validation: Annotated[int, typer.Option(min=1, help="Recordings for validation.")] = 10,
    subtasks: Annotated[int, typer.Option(min=1, max=STEPS // (MAX_STEPS + TAIL), help="Of a recording, at most.")] = 4,
    sentences: Annotated[Path | None, typer.Option(help="YAML, a list for each task; without it, the evaluation's.")] = None,
    seed: int = 1,
    noisy_share: Annotated[float, typer.Option(min=0, max=1, help="Of recordings, whose actions are disturbed.")] = 0.3,
    noise_scale: Annotated[float, typer.Option(min=0, help="Of that, in units of actions.")] = 0.5,
    renderer: Annotated[Renderer, typer.Option(help="The one of evaluate.calvin.renderer.")] = "cpu",
    workers: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Record demonstrations of CALVIN's scripted experts in the official layout."""
    names = list(filter(None, tasks.split(","))) or list(EXPERT_TASKS)
    if unknown := [name for name in names if name not in EXPERT_TASKS]:
        raise ParamsError(f"--tasks names {unknown[0]!r}, which no script solves{did_you_mean(unknown[0], EXPERT_TASKS)}")
    opened = open_checkout(checkout, commit)
    plan = Plan(
        opened, tuple(names), _read_sentences(sentences, opened, names), subtasks, seed, noisy_share, noise_scale, renderer
    )
    segments = record(out, plan, {"training": episodes, "validation": validation}, workers)
    counts = Counter(segment.task for segment in segments)
    lengths = [segment.last - segment.first + 1 for segment in segments]
    console.print(f"{out}: {len(segments)} segments of {np.median(lengths):.0f} steps (median)", highlight=False)
    console.print(", ".join(f"{name} {counts[name]}" for name in names), highlight=False)


if __name__ == "__main__":
    typer.run(main)
