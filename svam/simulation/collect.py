"""Demonstrations of all tasks, by several processes, to one directory whose bytes do not depend on how many.

Layout, for each task a folder `<task>/` with `meta.json` and for each episode of n steps:

- `episode_0000.<camera>.png`: the frames from left to right, (H, n * W, 3) uint8;
- `episode_0000.safetensors`: state (n, 39), proprioception (n, 4), actions (n, 4) and expert_actions (n, 4) float32, as
  executed and as the expert chose them; depth (m, H, W) float32 metres and segmentation (m, H, W) uint8 of the first camera at
  frames annotation_index (m,) int64; goal (3,) and draw (d,) float32; success (n,) bool, after the step.

`meta.json` states the SHA-256 of these files; `scenes`, `styles` and `looks`, and an episode's `style` and `look`, where they
are not MetaWorld's own: `stock`, `direct` and `stock`. Episodes of looks that are `unlabelled` are video: without actions and
expert_actions, and without state and proprioception, whose differences nearly are the actions.

Finished episodes are kept in a scratch folder, by what decides them. So a new task, or more episodes of one, is collected
alone, and a killed run costs no more than the episodes that it was at.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file

from svam.console import console, progress_bar
from svam.contract import VECTORS
from svam.device import become_worker
from svam.episodes.instructions import instructions_of
from svam.errors import MachineError
from svam.files import FileError, read_json, sha256, sha256_of_json, whole_directory, whole_file, write_json
from svam.params import Collect
from svam.resume import held
from svam.simulation.experts import demonstrate
from svam.simulation.looks import STOCK
from svam.simulation.metaworld import RATE_HZ, TaskEnvironment, check_task
from svam.simulation.rendering import choose_backend
from svam.simulation.scenes import check_scenes

RAW_SCHEMA = 2
"""Version of this layout, written into `meta.json`."""
LIBRARIES = ("metaworld", "mujoco", "numpy", "pillow", "safetensors")
"""Their versions may change an episode's bytes."""

_environments: dict[tuple[str, str], TaskEnvironment] = {}
"""Of this worker process: those of the task that it is at, one for each look."""


def write_episode(folder: Path, index: int, arrays: Mapping[str, NDArray[Any]]) -> list[str]:
    """Write the files of one episode, see above, and return their names; `arrays` has its frames as `frames_<camera>`."""
    rest, files = {}, []
    for name, values in arrays.items():
        if not name.startswith("frames_"):
            rest[name] = np.ascontiguousarray(values)
            continue
        steps, height, width, _ = values.shape
        files.append(f"{episode_name(index)}.{name.removeprefix('frames_')}.png")
        with whole_file(folder / files[-1]) as temporary:
            Image.fromarray(values.swapaxes(0, 1).reshape(height, steps * width, 3)).save(temporary)
    files.append(f"{episode_name(index)}.safetensors")
    with whole_file(folder / files[-1]) as temporary:
        save_file(rest, temporary)
    return files


def episode_name(index: int) -> str:
    """The stem of the files of episode `index` of a task."""
    return f"episode_{index:04d}"


def _collect_episode(task: str, index: int, params: Collect, seed: int, folder: Path) -> dict[str, Any]:
    """In a worker: write episode `index` to the scratch `folder`, its record last, and return the record."""
    look = params.looks[index % len(params.looks)]
    for other in [key for key in _environments if key[0] != task]:
        _environments.pop(other).close()
    if (task, look) not in _environments:
        _environments[task, look] = TaskEnvironment(task, params.image_size, params.cameras, params.render, params.scenes, look)
    demonstration = demonstrate(_environments[task, look], seed, index, params)
    left_out = VECTORS if look in params.unlabelled else ()
    arrays = {name: values for name, values in demonstration.arrays.items() if name not in left_out}
    entry = {
        "attempt": demonstration.attempt,
        "noisy": demonstration.noisy,
        "steps": len(demonstration.arrays["actions"]),
        # All digits: some tasks draw one number within 10 cm, where equal roundings of other seeds are not rare.
        "draw": [float(x) for x in demonstration.arrays["draw"]],
    }
    if params.styles != ["direct"]:
        entry["style"] = demonstration.style
    if params.looks != [STOCK]:
        entry["look"] = look
    files = write_episode(folder, index, arrays)
    record = {"entry": entry, "sha256": {file: sha256(folder / file) for file in files}}
    write_json(folder / f"{episode_name(index)}.json", record)
    return record


def collect(folder: Path, params: Collect, seed: int, workers: int, scratch: Path, code: object) -> None:
    """Collect all demonstrations of `params.tasks` into `folder`, which is replaced as a whole at the end.

    Args:
        scratch: where finished episodes are kept. code: what identifies the code that makes them, as JSON.

    Raises:
        ParamsError: unknown task or camera, a task without a shared scene, or an expert that keeps failing.
        MachineError: no GL library draws here, or a worker process died.
        FileError: another process collects the same episodes.
    """
    check_scenes(params.scenes, params.tasks)
    backend = choose_backend() if params.tasks else ""
    for task in params.tasks:
        check_task(task)
    stock = {"looks", "unlabelled"} if params.looks == [STOCK] else set()
    deciding = {
        "params": params.model_dump(mode="json", exclude={"tasks", "episodes", "episodes_of", *stock}),
        "seed": seed,
        "code": code,
        "libraries": {name: version(name) for name in LIBRARIES},
        "gl": backend,
    }
    key = sha256_of_json(deciding)[:32]
    with ExitStack() as stack:
        folders = {task: scratch / task / key for task in params.tasks}
        for own in folders.values():
            stack.enter_context(held(own))
            stack.callback(_remove_if_empty, own)
        records = {task: _finished(folders[task], params.episodes_for(task)) for task in params.tasks}
        _collect_missing(folders, records, params, seed, workers, backend)
        with whole_directory(folder) as partial:
            for task in params.tasks:
                (partial / task).mkdir()
                in_order = [records[task][index] for index in range(params.episodes_for(task))]
                for file in (file for record in in_order for file in record["sha256"]):
                    shutil.copyfile(folders[task] / file, partial / task / file)
                write_json(partial / task / "meta.json", _meta(task, params, seed, backend, in_order))


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _meta(task: str, params: Collect, seed: int, backend: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    provenance = {
        "source": "metaworld scripted expert", "metaworld": version("metaworld"), "mujoco": version("mujoco"),
        "render": params.render, "gl": backend, "seed": seed, "noise_scale": params.noise_scale,
        "episodes": [record["entry"] for record in records],
    }  # fmt: skip
    if params.scenes != "stock":
        provenance["scenes"] = params.scenes
    if params.styles != ["direct"]:
        provenance["styles"] = params.styles
    if params.looks != [STOCK]:
        provenance |= {"looks": params.looks, "unlabelled": params.unlabelled}
    return {
        "schema_version": RAW_SCHEMA, "task": task, "rate_hz": RATE_HZ, "cameras": params.cameras,
        "image_size": params.image_size, "instructions": instructions_of(task), "provenance": provenance,
        "sha256": {file: digest for record in records for file, digest in record["sha256"].items()},
    }  # fmt: skip


def _collect_missing(
    folders: Mapping[str, Path], records: Mapping[str, dict[int, dict[str, Any]]], params: Collect, seed: int, workers: int,
    backend: str,
) -> None:  # fmt: skip
    """Collect the episodes that `records` (task -> index -> record) lacks into the scratch folders, and add their records."""
    missing = [(task, i) for task in folders for i in range(params.episodes_for(task)) if i not in records[task]]
    total = sum(params.episodes_for(task) for task in folders)
    if len(missing) < total:
        console.print(f"collect: {total - len(missing)} of {total} episodes were collected before")
    if not missing:
        return
    with progress_bar() as bar:
        shown = bar.add_task("collect", total=len(missing), note="")
        pool = ProcessPoolExecutor(min(workers, len(missing)), mp_context=get_context("spawn"), initializer=become_worker)
        try:
            waiting = {
                pool.submit(_collect_episode, task, index, params, seed, folders[task]): (task, index)
                for task, index in missing
            }
            for done in as_completed(waiting):
                task, index = waiting[done]
                records[task][index] = done.result()
                bar.update(shown, advance=1, note=task)
        except BrokenProcessPool:
            raise MachineError(
                f"a worker process died while collecting: out of memory, or a crash in the OpenGL library ({backend}); run the "
                "same command again, perhaps with fewer machine.workers or another MUJOCO_GL: finished episodes are kept"
            ) from None
        except KeyboardInterrupt as stop:
            stop.add_note("interrupted; run the same command again: finished episodes are kept")
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _finished(folder: Path, count: int) -> dict[int, dict[str, Any]]:
    """Number -> record of those of a task's first `count` episodes that are whole in its scratch `folder`."""
    records = {}
    for index in range(count):
        with suppress(FileError, OSError, KeyError, TypeError, AttributeError):  # what is damaged is collected again
            record = read_json(folder / f"{episode_name(index)}.json")
            if all(sha256(folder / file) == digest for file, digest in record["sha256"].items()) and "entry" in record:
                records[index] = record
    return records
