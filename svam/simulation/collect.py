"""All demonstrations of one task, by several processes, to one directory whose bytes do not depend on how many.

Layout: `meta.json` and `episode_0000.npz`, ... with the arrays
frames_<camera> (n, H, W, 3) uint8; state (n, 39), proprioception (n, 4), actions (n, 4) and expert_actions (n, 4) float32, as
executed and as the expert wanted; depth (m, H, W) float32 metres and segmentation (m, H, W) uint8 of the first camera at frames
annotation_index (m,) int64; goal (3,) and draw (d,) float32; success (n,) bool, after the step.
`meta.json` states `scenes` and `styles`, and an episode's `style`, where they are not MetaWorld's own: `stock` and `direct`.
"""

from __future__ import annotations

import functools
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from shutil import copyfile
from typing import Any, Literal

import numpy as np

from svam.console import progress_bar
from svam.device import become_worker
from svam.episodes.instructions import instructions_of
from svam.errors import MachineError
from svam.files import whole_directory, write_json
from svam.params import Collect
from svam.resume import NOTHING_KEPT, Resume
from svam.simulation.experts import demonstrate
from svam.simulation.metaworld import RATE_HZ, TaskEnvironment, check_task
from svam.simulation.rendering import choose_backend
from svam.simulation.scenes import check_scenes

RAW_SCHEMA = 1
"""Version of this layout, written into `meta.json`."""


@cache
def _environment(
    task: str, image_size: int, cameras: tuple[str, ...], render: Literal["fast", "full"], scenes: Literal["stock", "shared"]
) -> TaskEnvironment:
    """This worker process's one environment, built at its first episode and reset for each."""
    return TaskEnvironment(task, image_size, cameras, render, scenes)


def _collect_one(task: str, seed: int, index: int, params: Collect, folder: Path) -> dict[str, Any]:
    """Write episode `index` and return its entry of `meta.json`."""
    environment = _environment(task, params.image_size, tuple(params.cameras), params.render, params.scenes)
    made = demonstrate(
        environment, seed, index, noisy_share=params.noisy_share, noise_scale=params.noise_scale,
        annotate_every=params.annotate_every, tail=params.tail, max_steps=params.max_steps, attempts=params.attempts,
        styles=params.styles,
    )  # fmt: skip
    arrays: dict[str, Any] = dict(made.arrays)
    np.savez_compressed(folder / _file_name(index), **arrays)
    return {
        "attempt": made.attempt, "noisy": made.noisy, "steps": len(made.arrays["actions"]),
        "draw": [round(float(x), 6) for x in made.arrays["draw"]],
        **({} if params.styles == ["direct"] else {"style": made.style}),  # the default collection's bytes are older
    }  # fmt: skip


def _file_name(index: int) -> str:
    return f"episode_{index:04d}.npz"


def collect(task: str, folder: Path, params: Collect, seed: int, workers: int, resume: Resume = NOTHING_KEPT) -> None:
    """Collect `params.episodes_for(task)` demonstrations of `task` into `folder`, which is replaced as a whole at the end.

    `resume` keeps every finished demonstration, so that a killed run costs no more than those that it was at.

    Raises:
        ValueError: unknown task or camera, a task without a shared scene, or an expert that keeps failing.
        MachineError: no GL library draws here, or a worker process died.
    """
    backend = choose_backend()
    check_task(task)
    check_scenes(params.scenes, [task])
    episodes = params.episodes_for(task)
    with whole_directory(Path(folder)) as partial, progress_bar() as bar:
        entries = _kept_episodes(episodes, partial, resume)
        shown = bar.add_task(f"collect {task}", total=episodes, completed=len(entries), note="")
        pool = ProcessPoolExecutor(min(workers, episodes), mp_context=get_context("spawn"), initializer=become_worker)
        try:
            missing = [index for index in range(episodes) if index not in entries]
            waiting = {pool.submit(_collect_one, task, seed, index, params, partial): index for index in missing}
            for done in as_completed(waiting):
                index = waiting[done]
                entries[index] = done.result()
                resume.keep(f"episode_{index}", entries[index], functools.partial(copyfile, partial / _file_name(index)))
                frames = sum(entry["steps"] for entry in entries.values())
                bar.update(shown, advance=1, note=f"{frames} frames")
        except BrokenProcessPool:
            raise MachineError(
                f"a worker process died while collecting {task!r}: out of memory, or a crash in the OpenGL library ({backend})"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        provenance = {
            "source": "metaworld scripted expert", "metaworld": version("metaworld"), "mujoco": version("mujoco"),
            "render": params.render, "gl": backend, "seed": seed, "noise_scale": params.noise_scale,
            **({} if params.scenes == "stock" else {"scenes": params.scenes}),
            **({} if params.styles == ["direct"] else {"styles": params.styles}),
            "episodes": [entries[index] for index in range(episodes)],
        }  # fmt: skip
        write_json(partial / "meta.json", {
            "schema_version": RAW_SCHEMA, "task": task, "rate_hz": RATE_HZ, "cameras": list(params.cameras),
            "image_size": params.image_size, "instructions": instructions_of(task), "provenance": provenance,
        })  # fmt: skip


def _kept_episodes(episodes: int, folder: Path, resume: Resume) -> dict[int, dict[str, Any]]:
    """Copy the demonstrations that an earlier run has finished to `folder`; their numbers and entries of `meta.json`."""
    entries: dict[int, dict[str, Any]] = {}
    for index in range(episodes):
        found = resume.kept(f"episode_{index}")
        if found is not None and found.file is not None:
            copyfile(found.file, folder / _file_name(index))
            entries[index] = found.value
    return entries
