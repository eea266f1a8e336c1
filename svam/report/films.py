"""Films of rollouts: the camera beside what the policy foresaw."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from svam.files import FileError
from svam.films import write_film
from svam.npy import read_arrays
from svam.report.grid import pca_colours

TITLE_HEIGHT = 16
"""Pixels above each panel."""
SLOWED = 4.0
"""Films of rollouts play this many times slower than the robot moves."""


def enlarge(frames: NDArray[np.uint8], size: int, views: int = 1) -> NDArray[np.uint8]:
    """(n, h, w, 3) uint8 to (n, views * size, size, 3), nearest neighbour: every feature cell or pixel stays visible."""
    rows = np.arange(views * size) * frames.shape[1] // (views * size)
    columns = np.arange(size) * frames.shape[2] // size
    return np.ascontiguousarray(frames[:, rows][:, :, columns])


def side_by_side(panels: Mapping[str, NDArray[np.uint8]], size: int) -> NDArray[np.uint8]:
    """Panels title -> (n, h, w, 3) uint8, all of one length n, to (n, size + TITLE_HEIGHT, panels * size, 3) uint8; several
    times as high where several cameras' pictures lie below one another."""
    views = max(1, *(round(frames.shape[1] / frames.shape[2]) for frames in panels.values()))
    title = Image.new("RGB", (size * len(panels), TITLE_HEIGHT), "white")
    draw = ImageDraw.Draw(title)
    for i, name in enumerate(panels):
        draw.text((i * size + 4, 2), name, fill="black", font=ImageFont.load_default(size=11))
    pictures = np.concatenate([enlarge(frames, size, views) for frames in panels.values()], axis=2)
    strip = np.broadcast_to(np.asarray(title), (len(pictures), *np.asarray(title).shape))
    return np.concatenate([strip, pictures], axis=1)


def rollout_film(
    frames: NDArray[np.uint8], calls: NDArray[np.int64], foresight: Mapping[str, NDArray[np.floating]], size: int = 192
) -> NDArray[np.uint8]:
    """The camera beside what was foreseen, one picture for each simulation step.

    Args:
        frames: (n, H, W, 3) uint8, one after each step, the first before any.
        calls: the steps at which the policy was called, increasing from 0.
        foresight: context entry -> (calls, T, h, w, C) features, encoded at those steps.

    Returns:
        (n, size + TITLE_HEIGHT, (1 + entries) * size, 3) uint8. Between two calls a panel plays its T foreseen frames from
        the first to the last, that is the whole horizon in the time of one executed chunk. Components are computed over the
        entry's whole sequence.
    """
    step = np.arange(len(frames))
    call = np.searchsorted(calls, step, side="right") - 1
    since = step - calls[call]
    # Every chunk but the last was executed whole; the last may have ended in success.
    spans = np.diff(calls)
    chunk = int(spans.max()) if len(spans) else max(1, len(frames) - 1)
    panels = {"camera": frames}
    for name, features in foresight.items():
        colours = pca_colours(features)
        t = np.minimum(since * features.shape[1] // chunk, features.shape[1] - 1)
        panels[f"{name.replace('_', '-')} foresight (PCA)"] = colours[call, t]
    return side_by_side(panels, size)


@dataclass(frozen=True)
class Played:
    """An episode that the policy ran: of which protocol, what it was and how it ended, and its line in the results."""

    protocol: str
    caption: str
    line: Mapping[str, Any]


def policy_episodes(results: Path) -> dict[str, Played]:
    """Episodes of the policy's own row, by what a recorded one is called; empty where no closed loop was run.

    Raises:
        FileError: a file of episodes is damaged.
    """
    episodes = {}
    for protocol, (name, describe) in EPISODES.items():
        file = results / name
        try:
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
            for line in (line for line in lines if line["row"] == "policy"):
                called, caption = describe(line)
                episodes[called] = Played(protocol, caption, line)
        except (ValueError, KeyError, TypeError) as error:
            raise FileError(f"{file}: not a line for each episode that evaluate wrote ({error}); run evaluate again") from None
    return episodes


def _ending(line: Mapping[str, Any]) -> str:
    return f"the goal was {'reached after' if line['success'] else 'not reached in'} {line['steps']} steps"


def _metaworld(line: Mapping[str, Any]) -> tuple[str, str]:
    said = f"{line['task']}, goal {line['index']}: \u201c{line['instruction']}\u201d; {_ending(line)}"
    return f"{line['task']}_{line['index']}", said


def _calvin(line: Mapping[str, Any]) -> tuple[str, str]:
    subtasks, solved = line["subtasks"], line["solved_at"]
    said = f"CALVIN, chain {line['chain']}: {', '.join(subtasks)}; {len(solved)} of {len(subtasks)} solved"
    after = f" after {' and '.join(map(str, solved))} steps" if solved else ""
    return f"calvin_{line['chain']}", f"{said}{after}, {line['steps']} steps in all"


def _libero(line: Mapping[str, Any]) -> tuple[str, str]:
    said = f"{line['suite']}, {line['task'].replace('_', ' ')}, initial state {line['initial_state']}; {_ending(line)}"
    return f"{line['task']}_{line['initial_state']}", said


EPISODES: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], tuple[str, str]]]] = {
    "metaworld": ("episodes.jsonl", _metaworld),
    "calvin": ("chains.jsonl", _calvin),
    "libero": ("libero.jsonl", _libero),
}
"""Protocol -> its file in the results, and what of a line are the recorded episode's name and a film's caption."""


def draw_films(folder: Path, results: Path, rates_hz: Mapping[str, float]) -> dict[str, NDArray[np.uint8]]:
    """A film `<name>.mp4` of every recorded rollout of `results`, `SLOWED` times slower than the robot moves. Returns the
    middle picture (h, w, 3) uint8 of each, by its name.

    Args:
        rates_hz: the robot's steps a second, by protocol.

    Raises:
        FileError: an array is missing or damaged, or the episode is in no protocol's file.
    """
    pictures = {}
    episodes = policy_episodes(results)
    for rollout in sorted(results.glob("rollouts/*")):
        arrays = read_arrays(rollout)
        if not {"frames", "calls"} <= set(arrays):
            raise FileError(f"{rollout}: frames.npy or calls.npy is missing; run evaluate again")
        if rollout.name not in episodes:
            files = ", ".join(name for name, _ in EPISODES.values())
            raise FileError(f"{rollout}: no line of {files} is of this episode; run evaluate again")
        foresight = {
            name.removeprefix("foresight_"): values for name, values in arrays.items() if name.startswith("foresight_")
        }
        film = rollout_film(arrays["frames"], arrays["calls"], foresight)
        write_film(folder / f"{rollout.name}.mp4", film, rates_hz[episodes[rollout.name].protocol] / SLOWED)
        pictures[rollout.name] = film[len(film) // 2]
    return pictures
