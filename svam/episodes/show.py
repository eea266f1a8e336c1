"""One episode to look at: a contact sheet (PNG) and a film (mp4) of its cameras and curves. Equal episodes, equal bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.console import track
from svam.contract import ContractError
from svam.episodes.curves import Curves, draw_curves
from svam.episodes.store import SPLITS, EpisodeStore
from svam.files import whole_file
from svam.films import write_film

Picture = NDArray[np.uint8]
_INK, _PALE = "#222222", "#777777"
_COLUMNS, _CELL, _GAP, _MARGIN, _LABEL = 8, 192, 6, 14, 18
"""Of the contact sheet: pictures in a line, their width, the space between, around, and for a frame's number (pixels)."""
_FILM_WIDTHS = (640, 1280)
"""Least and most width of a film (pixels)."""
_MANY_DIMENSIONS, _WIDE = 14, 1040
"""More curves than this make a film at least so wide, so that they stand in several columns."""
_BLOCK = 32
"""Frames held in memory of each camera."""
_FASTEST = 30.0


@dataclass(frozen=True)
class Shown:
    """The episode and what is said about it."""

    store: EpisodeStore
    episode: int
    cameras: list[str]

    @property
    def steps(self) -> int:
        start, end = self.store.bounds(self.episode)
        return end - start

    def frames(self, camera: str, steps: NDArray[np.int64]) -> Picture:
        """(k, H, W, 3) of steps of the episode."""
        return self.store.frames(steps + self.store.bounds(self.episode)[0], camera)

    def seconds(self) -> NDArray[np.float64]:
        """(n,) since the first frame."""
        start, end = self.store.bounds(self.episode)
        stamps = self.store.timestamps(np.arange(start, end, dtype=np.int64))
        return np.arange(end - start) / self.store.rate_hz if stamps is None else stamps - stamps[0]

    def title(self) -> str:
        """The instruction, in quotation marks."""
        return f"“{self.store.episode_instructions[self.episode]}”"

    def facts(self) -> str:
        """One line about the episode."""
        store, seconds = self.store, self.seconds()
        split = SPLITS[int(store.episode_split[self.episode])].replace("_", " ")
        task, instruction = store.task_of(self.episode), store.episode_instructions[self.episode]
        file = store.episode_provenance[self.episode].get("file")
        parts = [
            f"episode {self.episode} of {len(store.episode_ends)}", *([f"task {task}"] if task != instruction else []), split,
            f"{self.steps} frames at {store.rate_hz:g} Hz, {seconds[-1]:.1f} s",
            *([str(file)] if file else []), str(store.path),
        ]  # fmt: skip
        return "   ·   ".join(parts)

    def vector(self) -> str | None:
        """What the curves show: the actions, or where there are none the proprioception or state; None without any."""
        return next((name for name in ("actions", "proprioception", "state") if self.store.has(name)), None)

    def curves(self, width: int, marks: NDArray[np.int64]) -> Curves | None:
        """Of `vector`, and in grey what the demonstrator wanted where that differs from what was executed."""
        rows, name = np.arange(*self.store.bounds(self.episode), dtype=np.int64), self.vector()
        if name is None:
            return None
        values, behind, caption = self.store.vector(name, rows), None, f"{name} by step"
        if name == "actions" and self.store.has("expert_actions"):
            wanted = self.store.vector("expert_actions", rows)
            if not np.array_equal(wanted, values):
                behind, caption = wanted, f"{caption}, in grey what the demonstrator wanted"
        return draw_curves(name[0], values, behind, width, marks, caption)


@cache
def _font(size: int, bold: bool = False) -> Any:
    """DejaVu Sans, which comes with matplotlib and knows many alphabets."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(
        Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size
    )


def _lines(text: str, font: Any, width: int, most: int) -> list[str]:
    """Break a text at spaces, or within a long word, so that each line is at most `width` pixels wide."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        while font.getlength(word) > width and len(word) > 1:
            fits = next(k for k in range(len(word) - 1, 0, -1) if k == 1 or font.getlength(word[:k]) <= width)
            lines[-1], word = word[:fits], word[fits:]
            lines.append("")
        lines[-1] = word
    return lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1][:-1]}…"]


def _header(shown: Shown, width: int, note: str = "") -> Picture:
    """(h, width, 3): the instruction, and below it the facts."""
    from PIL import Image, ImageDraw

    room = width - 2 * _MARGIN
    big, small = _font(20, bold=True), _font(12)
    parts = [(line, big, 27, _INK) for line in _lines(shown.title(), big, room, 4)]
    parts += [(line.removesuffix(" ·"), small, 18, _PALE) for line in _lines(shown.facts() + note, small, room, 4)]
    image = Image.new("RGB", (width, _MARGIN + sum(part[2] for part in parts) + 6), "white")
    draw, y = ImageDraw.Draw(image), _MARGIN
    for line, font, height, colour in parts:
        draw.text((_MARGIN, y), line, fill=colour, font=font)
        y += height
    return np.asarray(image)


def _size_within(frames: Picture, most_height: int, most_width: int) -> tuple[int, int]:
    """Size on the page of (k, H, W, 3) pictures: as large as fits; tiny ones in whole multiples, so that pixels stay so."""
    height, width = frames.shape[1:3]
    scale = min(most_height / height, most_width / width)
    scale = float(int(scale)) if scale >= 3 else scale
    return max(1, round(height * scale)), max(1, round(width * scale))


def _resized(frame: Picture, size: tuple[int, int]) -> Picture:
    """(H, W, 3) to `size`, by repeating pixels where it is a multiple."""
    from PIL import Image

    if size == frame.shape[:2]:
        return frame
    multiple = size[0] % frame.shape[0] == 0 and size[1] % frame.shape[1] == 0
    larger = Image.Resampling.NEAREST if multiple else Image.Resampling.BICUBIC
    how = larger if size[0] > frame.shape[0] else Image.Resampling.BOX
    return np.asarray(Image.fromarray(frame).resize((size[1], size[0]), how))


def _stacked(parts: Sequence[Picture], width: int) -> Picture:
    """One above the other, each in the middle of `width`, on white; both sides even, as H.264 needs them."""
    height = sum(part.shape[0] for part in parts)
    page = np.full((height + height % 2, width + width % 2, 3), 255, dtype=np.uint8)
    y = 0
    for part in parts:
        x = (width - part.shape[1]) // 2
        page[y : y + part.shape[0], x : x + part.shape[1]] = part
        y += part.shape[0]
    return page


def contact_sheet(shown: Shown) -> Picture:
    """(h, w, 3): frames evenly spaced in time with number and time, cameras below one another; and the curves."""
    from PIL import Image, ImageDraw

    lines = {1: 3, 2: 2}.get(len(shown.cameras), 1)
    count = min(shown.steps, _COLUMNS * lines)
    steps = np.unique(np.linspace(0, shown.steps - 1, count).round().astype(np.int64))
    seconds, gutter = shown.seconds(), 24
    width = 2 * _MARGIN + gutter + _COLUMNS * (_CELL + _GAP) - _GAP
    parts = [_header(shown, width)]
    pictures = {camera: shown.frames(camera, steps) for camera in shown.cameras}
    # With one width for all cells, each camera has one height.
    sizes = {camera: _size_within(frames, 4 * _CELL, _CELL) for camera, frames in pictures.items()}
    for first in range(0, len(steps), _COLUMNS):
        mine = range(first, min(first + _COLUMNS, len(steps)))
        image = Image.new("RGB", (width, _LABEL + sum(size[0] + _GAP for size in sizes.values()) + _GAP), "white")
        draw, y = ImageDraw.Draw(image), _LABEL
        for k in mine:
            text = f"{steps[k]}"
            x = _MARGIN + gutter + (k - first) * (_CELL + _GAP)
            draw.text((x, 0), text, fill=_INK, font=_font(12, bold=True))
            draw.text(
                (x + _font(12, bold=True).getlength(text) + 8, 1), f"{seconds[steps[k]]:.2f} s", fill=_PALE, font=_font(11)
            )
        for camera, size in sizes.items():
            image.paste(_upright(camera, size[0], gutter - 6), (_MARGIN, y))
            for k in mine:
                x = _MARGIN + gutter + (k - first) * (_CELL + _GAP)
                image.paste(Image.fromarray(_resized(pictures[camera][k], size)), (x, y))
            y += size[0] + _GAP
        parts.append(np.asarray(image))
    if (curves := shown.curves(width, steps)) is not None:
        parts.append(curves.picture)
    return _stacked(parts, width)


def _upright(text: str, height: int, width: int) -> Any:
    """A PIL image (height x width) with the text running upwards; the end of a long name is what tells cameras apart."""
    from PIL import Image, ImageDraw

    font = _font(11)
    while font.getlength(text) > height - 4 and len(text) > 2:
        text = f"…{text.lstrip('…')[1:]}"
    image = Image.new("RGB", (height, width), "white")
    ImageDraw.Draw(image).text((height - font.getlength(text), 1), text, fill=_PALE, font=font)
    return image.rotate(90, expand=True)


def film(shown: Shown, fps: float) -> Iterator[Picture]:
    """Pages (h, w, 3) of the film, one a step: all cameras, the step and its time, and the curves with a cursor."""
    from PIL import Image, ImageDraw

    cameras = len(shown.cameras)
    columns = cameras if cameras <= 3 else -(-cameras // 2) if cameras <= 6 else 4
    tall = {1: 480, 2: 400, 3: 400}.get(cameras, 280)
    one = np.zeros(1, dtype=np.int64)
    sizes = {
        camera: _size_within(shown.frames(camera, one), tall, (_FILM_WIDTHS[1] - _MARGIN) // columns - _GAP)
        for camera in shown.cameras
    }
    groups = [shown.cameras[i : i + columns] for i in range(0, cameras, columns)]
    widest = max(sum(sizes[camera][1] + _GAP for camera in group) for group in groups)
    name = shown.vector()
    many = name is not None and shown.store.vector(name, one).shape[1] > _MANY_DIMENSIONS
    width = max(_WIDE if many else _FILM_WIDTHS[0], widest + _MARGIN)
    speed = fps / shown.store.rate_hz
    header = _header(shown, width, "" if abs(speed - 1) < 0.005 else f"   ·   at {speed:.2g} times its speed")
    curves = shown.curves(width, np.zeros(0, dtype=np.int64))
    seconds = shown.seconds()
    for first in range(0, shown.steps, _BLOCK):
        steps = np.arange(first, min(first + _BLOCK, shown.steps), dtype=np.int64)
        blocks = {camera: shown.frames(camera, steps) for camera in shown.cameras}
        for k, step in enumerate(steps.tolist()):
            line = Image.new("RGB", (width, 24), "white")
            draw = ImageDraw.Draw(line)
            draw.text((_MARGIN, 3), f"frame {step}", fill=_INK, font=_font(13, bold=True))
            draw.text((_MARGIN + 110, 4), f"of {shown.steps}    {seconds[step]:.2f} s", fill=_PALE, font=_font(12))
            parts = [header, np.asarray(line)]
            parts += [_beside({camera: _resized(blocks[camera][k], sizes[camera]) for camera in group}) for group in groups]
            if curves is not None:
                parts.append(curves.at(step))
            yield _stacked(parts, width)


def _beside(pictures: dict[str, Picture]) -> Picture:
    """Side by side with their names below."""
    height = max(picture.shape[0] for picture in pictures.values())
    page = np.full((height + 22, sum(p.shape[1] + _GAP for p in pictures.values()) - _GAP, 3), 255, dtype=np.uint8)
    x = 0
    for name, picture in pictures.items():
        page[: picture.shape[0], x : x + picture.shape[1]] = picture
        page[height:, x : x + picture.shape[1]] = _caption(name, picture.shape[1])
        x += picture.shape[1] + _GAP
    return page


@cache
def _caption(text: str, width: int) -> Picture:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, 22), "white")
    ImageDraw.Draw(image).text((0, 3), text, fill=_PALE, font=_font(11))
    return np.asarray(image)


def show_episode(path: Path, episode: int, out: Path, cameras: Sequence[str], fps: float | None) -> list[Path]:
    """Write `episode_<number>.png` and `.mp4` of one episode into the folder `out`; returns their names.

    `cameras` empty means all. `fps` None means the data's rate, at most 30, so that fast data can be followed.

    Raises:
        ContractError: there is no such episode or camera. FileError: the store does not open, or its frames are damaged.
    """
    from PIL import Image

    store = EpisodeStore.open(path)
    if not 0 <= episode < len(store.episode_ends):
        raise ContractError(f"{path}: no episode {episode}; there are 0..{len(store.episode_ends) - 1}")
    for camera in cameras:
        if camera not in store.cameras:
            raise ContractError(f"{path}: no camera {camera!r}; there are {', '.join(store.cameras)}")
    shown = Shown(store, episode, list(dict.fromkeys(cameras)) or store.cameras)
    rate = min(store.rate_hz, _FASTEST) if fps is None else fps
    sheet, video = out / f"episode_{episode:04d}.png", out / f"episode_{episode:04d}.mp4"
    with whole_file(sheet) as temporary:
        Image.fromarray(contact_sheet(shown)).save(temporary)
    write_film(video, track(film(shown, rate), "film", shown.steps), rate)
    return [sheet, video]
