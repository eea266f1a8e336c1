"""Videos with instructions in text files: mp4/webm + JSON, with or without actions.

Two layouts are read; the first is taken where the folder `annotation` (option `annotations`) is there:

1. As IRASim, Cosmos and Video Prediction Policy write it: `annotation/<split>/<id>.json`, each an episode:
   `{"texts": ["put ..."], "videos": [{"video_path": "videos/<split>/<id>/rgb.mp4"}], "action": [[...], ...], "state": ...}`,
   paths from the top folder; one entry of `videos` per camera. A camera's name is its file's if that is
   plain letters (`rgb`), else its place in the list (`camera_0`).
2. A plain folder of videos, each with `<same name>.json` (keys as above, without `videos`) or `<same name>.txt` (one sentence
   a line) beside it; the camera is called `video`.

Instruction: the first sentence, which is also the task; the others are further training sentences of that task.

Alignment: a JSON has one state per frame (T), and T or T - 1 actions. With T, action t belongs to frame t. With T - 1, action
t leads from frame t to frame t + 1 (in Bridge and RT-1 files it is the change of the state), and the last frame has none: that
frame is left out, as no action was recorded for it; nothing is made up. Without actions all frames are kept, and the data can
train the video model only. Numbers (float64 in JSON) become float32; the state is what the robot measures: proprioception.

Rate: that of the first video, which all frames of all videos must keep (within a tenth of a frame's time); or `rate_hz`, and
then each frame is one time step whatever its time says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from svam.contract import EVERYTHING, Choice, ContractError, Episode, EpisodeShape, Frozen, SourceDescription
from svam.files import FileError, stamp
from svam.sources._video import FORMATS, VideoFacts, probe, video_blocks

_TEXTS = ("texts", "text", "instructions", "instruction", "language_instruction", "caption")
_ACTIONS = ("action", "actions")
_STATES = ("state", "states")
_KNOWN = {*_TEXTS, *_ACTIONS, *_STATES, "task", "episode_id", "videos", "video_length", "latent_videos"}
_TRAINING = {"train", "training"}
_HELD_OUT = {"val", "valid", "validation", "test", "eval"}


class Options(Frozen):
    """All optional.

    rate_hz: time steps per second, instead of what the videos say. instruction: for episodes without a sentence of their own.
    annotations: the folder of layout 1. splits: which of its sub-folders to read; empty means all.
    text, action: the JSON's keys; left out, the usual names are looked for. proprioception: keys that are joined in this order,
    e.g. [state, continuous_gripper_state]; empty looks for the usual names.
    """

    rate_hz: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    instruction: Annotated[str, Field(pattern=r"\S")] | None = None
    annotations: str = "annotation"
    splits: tuple[str, ...] = ()
    text: str | None = None
    action: str | None = None
    proprioception: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Record:
    """What the text file of an episode says: `videos` is camera -> path from the top folder."""

    file: Path
    content: dict[str, Any]
    texts: list[str]
    videos: dict[str, str]


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileError(f"{file}: no such file") from None
    except UnicodeDecodeError as error:
        raise FileError(f"{file}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise FileError(f"{file}: cannot be read ({error.strerror})") from None


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(file))
    except FileError:
        raise
    except (ValueError, RecursionError) as error:  # beyond JSONDecodeError: a number with thousands of digits
        raise FileError(f"{file}: not valid JSON ({str(error).split(';')[0]})") from None
    if not isinstance(content, dict):
        raise FileError(f"{file}: is a JSON {type(content).__name__}, expected an object with the keys of one episode")
    return content


def _camera_names(videos: list[str]) -> list[str]:
    """By file name, unless names hold numbers (which may be the episode's) or are alike; then by place."""
    stems = [PurePosixPath(video).stem for video in videos]
    names = [stem if re.fullmatch("[A-Za-z_-]+", stem) else f"camera_{place}" for place, stem in enumerate(stems)]
    return names if len(set(names)) == len(names) else [f"camera_{place}" for place in range(len(videos))]


class VideoFolderSource:
    """One episode per text file, in the order of the files' paths."""

    def __init__(self, path: Path, options: Options) -> None:
        """See `open_source`."""
        self.path, self.options = Path(path), options
        if not self.path.is_dir():
            raise FileError(f"{self.path}: no such directory")
        top = self.path / options.annotations
        self._annotated = top.is_dir()
        if self._annotated:
            found = sorted(file.relative_to(top) for file in top.rglob("*.json") if not file.name.startswith("."))
            self._splits = [file.parts[0] if len(file.parts) > 1 else "" for file in found]
            for split in options.splits:
                if split not in self._splits:
                    raise FileError(f"{top}: no {split}/*.json, which convert.options.splits lists")
            chosen = [k for k, split in enumerate(self._splits) if not options.splits or split in options.splits]
            self._splits = [self._splits[k] for k in chosen]
            self._files = [top / found[k] for k in chosen]
        else:
            if options.splits:
                raise FileError(f"{top}: no such directory, so there are no splits, but convert.options.splits lists some")
            videos = (file for file in self.path.rglob("*") if file.suffix.lower() in FORMATS and file.is_file())
            self._files = sorted(file for file in videos if not file.name.startswith("."))
            self._splits = [""] * len(self._files)
        if not self._files:
            what = f"*.json below {options.annotations}" if self._annotated else f"videos ({', '.join(FORMATS)})"
            raise FileError(f"{self.path}: no {what}")
        kinds = set(self._splits)
        self._has_split = kinds <= _TRAINING | _HELD_OUT and bool(kinds & _TRAINING) and bool(kinds & _HELD_OUT)

    def __len__(self) -> int:
        return len(self._files)

    def _record(self, index: int) -> _Record:
        file = self._files[index]
        if self._annotated:
            content = _read_object(file)
            return _Record(file, content, self._texts(file, content), self._videos(file, content))
        videos = {"video": file.relative_to(self.path).as_posix()}
        beside, text = file.with_suffix(".json"), file.with_suffix(".txt")
        if beside.is_file():
            content = _read_object(beside)
            return _Record(beside, content, self._texts(beside, content), videos)
        texts = [line.strip() for line in _read_text(text).splitlines() if line.strip()] if text.is_file() else []
        return _Record(text if text.is_file() else file, {}, self._checked(file, texts), videos)

    def _checked(self, file: Path, texts: list[str]) -> list[str]:
        texts = texts or ([self.options.instruction] if self.options.instruction else [])
        if not texts:
            raise FileError(f"{file}: no instruction for it, in a text file or in convert.options.instruction")
        for text in texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:  # JSON can spell half a character
                raise FileError(f"{file}: the instruction {text!r} is not Unicode text") from None
        return list(dict.fromkeys(texts))

    def _texts(self, file: Path, content: dict[str, Any]) -> list[str]:
        key = self._key(file, content, self.options.text, _TEXTS, "text")
        value = [] if key is None else content[key]
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise FileError(f"{file}: {key} is {str(value)[:80]!r}, expected a sentence or a list of sentences")
        return self._checked(file, [text.strip() for text in texts if text.strip()])

    @staticmethod
    def _key(file: Path, content: dict[str, Any], named: str | None, usual: Sequence[str], option: str) -> str | None:
        """The key to read: the named one, which must be there, or the only usual one, or None."""
        if named is not None:
            if named not in content:
                raise FileError(f"{file}: key {named!r}, which convert.options.{option} names, is missing")
            return named
        present = [key for key in usual if content.get(key) is not None]
        if len(present) > 1:
            raise FileError(f"{file}: has both {' and '.join(present)}; name one of them in convert.options.{option}")
        return present[0] if present else None

    @staticmethod
    def _videos(file: Path, content: dict[str, Any]) -> dict[str, str]:
        entries = content.get("videos")
        listed = entries if isinstance(entries, list) else []
        named = [entry.get("video_path") if isinstance(entry, dict) else None for entry in listed]
        paths = [path for path in named if isinstance(path, str) and path]
        if not paths or len(paths) != len(named):
            raise FileError(f"{file}: videos is {str(entries)[:80]!r}, expected a list of objects with a video_path each")
        for path in paths:
            pure = PurePosixPath(path)
            if pure.is_absolute() or ".." in pure.parts or "\0" in path or pure.suffix.lower() not in FORMATS:
                raise FileError(f"{file}: video_path is {path!r}, expected the path of a video below the top folder")
        return dict(zip(_camera_names(paths), paths, strict=True))

    @cached_property
    def _survey(self) -> tuple[dict[str, dict[str, list[str]]], list[str]]:
        """Instructions and notes; reads every text file once, no frame."""
        instructions: dict[str, dict[str, list[str]]] = {}
        used: set[str] = set()
        latents = shorter = without = 0
        for index in range(len(self)):
            record = self._record(index)
            sentences = instructions.setdefault(record.texts[0], {"train": [], "held_out": []})["train"]
            sentences.extend(text for text in record.texts if text not in sentences)
            used |= set(record.videos.values())
            latents += "latent_videos" in record.content
            action, state = self._action_key(record), next((k for k in _STATES if k in record.content), None)
            without += action is None
            if action is not None and state is not None:
                lengths = [len(v) if isinstance(v := record.content[k], list) else 0 for k in (action, state)]
                shorter += lengths[0] == lengths[1] - 1
        notes = []
        if without:
            notes.append(
                f"{self.path}: {without} of {len(self)} episodes have no actions: they can train the video model, no policy"
            )
        if shorter:
            notes.append(
                f"{self.path}: {shorter} of {len(self)} episodes have one action less than states: no action was recorded "
                "for the last frame, so that frame is left out"
            )
        if latents:
            notes.append(f"{self.path}: latent_videos in {latents} files are not read: they are another model's features")
        if self._annotated:
            notes += self._unused(used)
            if not self._has_split and len(set(self._splits)) > 1:
                notes.append(f"{self.path}: the folders {sorted(set(self._splits))} say no split; one is drawn")
            if unread := sorted(set(self._record(0).content) - _KNOWN - self._named_keys()):
                notes.append(f"{self._files[0]}: keys that are not read: {', '.join(unread)}")
        return instructions, notes

    def _named_keys(self) -> set[str]:
        o = self.options
        return {key for key in (o.text, o.action, *o.proprioception) if key is not None}

    def _unused(self, used: set[str]) -> list[str]:
        """Files beside the videos that nothing refers to."""
        folders = sorted({PurePosixPath(video).parent for video in used})
        beside = [
            file for folder in folders if (self.path / folder).is_dir() for file in sorted((self.path / folder).iterdir())
        ]
        notes = []
        videos = [file for file in beside if file.suffix.lower() in FORMATS]
        spare = [name for file in videos if (name := file.relative_to(self.path).as_posix()) not in used]
        if spare:
            notes.append(f"{self.path}: {len(spare)} videos that no JSON refers to are left out, such as {spare[0]}")
        if arrays := [file.relative_to(self.path).as_posix() for file in beside if file.suffix in (".npy", ".npz")]:
            notes.append(
                f"{self.path}: {len(arrays)} arrays beside the videos are not read, such as {arrays[0]}: "
                "the numbers come from the JSON"
            )
        return notes

    @property
    def notes(self) -> Sequence[str]:
        """What is left out, and what cannot be done with it."""
        return self._survey[1]

    @cached_property
    def _cameras(self) -> list[str]:
        return list(self._record(0).videos)

    @cached_property
    def _rate(self) -> float:
        if self.options.rate_hz is not None:
            return self.options.rate_hz
        video = self.path / next(iter(self._record(0).videos.values()))
        rate = probe(video).rate
        if rate is None:
            raise FileError(f"{video}: does not say its frame rate; give convert.options.rate_hz")
        return round(rate, 6)

    def describe(self) -> SourceDescription:
        """Rate of the first video, cameras of the first episode, all sentences; reads every text file, no frame."""
        return SourceDescription(
            rate_hz=self._rate, cameras=self._cameras, instructions=self._survey[0], provenance={"source": "video_folder"}
        )

    def _action_key(self, record: _Record) -> str | None:
        return self._key(record.file, record.content, self.options.action, _ACTIONS, "action")

    def _state_keys(self, record: _Record) -> list[str]:
        named = self.options.proprioception
        found = [self._key(record.file, record.content, key, _STATES, "proprioception") for key in named or (None,)]
        return [key for key in found if key is not None]

    @staticmethod
    def _vector(record: _Record, key: str) -> NDArray[np.float64]:
        """(rows, dimensions) of a key; a plain list of numbers is one column."""
        value = record.content[key]
        try:
            values = np.array(value)
        except (ValueError, OverflowError, RecursionError, TypeError):
            values = np.array(None)
        if values.dtype.kind not in "if" or values.ndim not in (1, 2) or values.size == 0:
            raise FileError(f"{record.file}: {key} is no table of numbers: expected a list of rows of equal length")
        rows: NDArray[np.float64] = values.astype(np.float64).reshape(len(values), -1)
        return rows

    def _numbers(self, record: _Record, frames: int) -> tuple[int, NDArray[np.float64] | None, NDArray[np.float64] | None]:
        """Time steps n, actions (n, A) or None, state (n, S) or None."""
        state = [(key, self._vector(record, key)) for key in self._state_keys(record)]
        for name, values in state:
            if len(values) != frames:
                raise FileError(f"{record.file}: {name} has {len(values)} rows, but the video has {frames} frames")
        length = record.content.get("video_length")
        if length is not None and length != frames:
            raise FileError(f"{record.file}: video_length is {str(length)[:20]}, but the video has {frames} frames")
        joined = np.concatenate([values for _, values in state], axis=1) if state else None
        action = self._action_key(record)
        if action is None:
            return frames, None, joined
        actions = self._vector(record, action)
        steps = len(actions)
        if steps not in (frames, frames - 1):
            raise FileError(f"{record.file}: {action} has {steps} rows, expected {frames} or {frames - 1} for {frames} frames")
        return steps, actions, None if joined is None else joined[:steps]

    def _probe(self, record: _Record) -> dict[str, VideoFacts]:
        if list(record.videos) != self._cameras:
            raise FileError(f"{record.file}: cameras {list(record.videos)}, expected {self._cameras} as in {self._files[0]}")
        facts = {camera: probe(self.path / video) for camera, video in record.videos.items()}
        first = next(iter(facts.values()))
        for camera, other in facts.items():
            if other.frames != first.frames:
                raise FileError(f"{record.file}: {camera} has {other.frames} frames, {next(iter(facts))} has {first.frames}")
        return facts

    def shape(self, index: int) -> EpisodeShape:
        """Lengths, from the text file and the videos' headers.

        Raises:
            FileError: a file is missing or damaged, or lengths differ.
        """
        record = self._record(index)
        frames = next(iter(self._probe(record).values())).frames
        steps, _, _ = self._numbers(record, frames)
        held_out = self._splits[index] in _HELD_OUT if self._has_split else None
        files = [record.file, *(self.path / video for video in record.videos.values())]
        return EpisodeShape(steps, {}, held_out, " ".join(stamp(file) for file in files))

    def read(self, index: int) -> Episode:
        """One episode; its frames are decoded when they are asked for.

        Raises:
            FileError: a file is missing or damaged, or lengths differ.
            ContractError: the episode breaks the contract.
        """
        record = self._record(index)
        facts = self._probe(record)
        steps, actions, state = self._numbers(record, next(iter(facts.values())).frames)
        checked_rate = None if self.options.rate_hz is not None else self._rate
        frames = {
            camera: video_blocks(self.path / record.videos[camera], known, steps, checked_rate)
            for camera, known in facts.items()
        }
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which check() names
            actions32 = None if actions is None else actions.astype(np.float32)
            state32 = None if state is None else state.astype(np.float32)
        episode = Episode(
            task=record.texts[0], instruction=record.texts[0], rate_hz=self._rate, frames=frames, actions=actions32,
            proprioception=state32, provenance={"file": record.file.relative_to(self.path).as_posix()},
        )  # fmt: skip
        try:
            episode.check()
        except ContractError as error:
            raise ContractError(f"{record.file}: {error}") from None
        return episode


def open_source(path: Path, options: Options, choice: Choice = EVERYTHING) -> VideoFolderSource:
    """Open a folder of videos with text files; see the module.

    Raises:
        FileError: the folder, its videos or text files are missing.
    """
    return VideoFolderSource(path, options)
