"""Videos with instructions in text files: mp4/webm + JSON, with or without actions.

Two layouts are read; the first is taken where the folder `annotation` (option `annotations`) is there:

1. As IRASim, Cosmos and Video Prediction Policy write it: `annotation/<split>/<id>.json`, each an episode:
   `{"texts": ["put ..."], "videos": [{"video_path": "videos/<split>/<id>/rgb.mp4"}], "action": [[...], ...], "state": ...}`,
   paths from the top folder; one entry of `videos` per camera. A camera's name is its file's if that is
   plain letters (`rgb`) and not the episode's, else its place among their sorted paths (`camera_0`).
2. A plain folder of videos, each with `<same name>.json` (keys as above, without `videos`) or `<same name>.txt` (one sentence
   a line) beside it, or with both, if the first has no sentence; the camera is called `video`.

Folders `train` and `val` (or alike), of the annotations or at the top of a plain folder, are the set's own split.

Instruction: the first sentence, which is also the task; the others are further training sentences of that task. A key
`success`, true or false, says whether the demonstration reached its goal.

Alignment: a JSON has one state per frame (T), and T or T - 1 actions. With T, action t belongs to frame t. With T - 1, action
t leads from frame t to frame t + 1 (in Bridge and RT-1 files it is the change of the state), and the last frame has none: that
frame is left out, as no action was recorded for it; nothing is made up. Without actions all frames are kept, and the data can
train the video model only. Numbers (float64 in JSON) become float32; the state is what the robot measures: proprioception.

Rate: that of the first video, which all frames of all videos must keep (within a tenth of a frame's time); or
`convert.rate_hz`, and then each frame is one time step whatever its time says.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.contract import EVERYTHING, Choice, Episode, EpisodeShape, Frozen, SourceDescription
from svam.files import FileError, read_json, refuse_lfs_pointer, stamp
from svam.sources._choice import TRAINING, checked, chosen_cameras, contents, existing_folder, lies_there, own_task
from svam.sources._pictures import depth_doubts
from svam.sources._video import FORMATS, VideoFacts, notes_of, probe, told_at, video_blocks

_TOLD = (".json", ".txt", ".JSON", ".TXT")
_TEXTS = ("texts", "text", "instructions", "instruction", "language_instruction", "caption")
_ACTIONS = ("action", "actions")
_STATES = ("state", "states")
_KNOWN = {*_TEXTS, *_ACTIONS, *_STATES, "task", "episode_id", "videos", "video_length", "latent_videos", "success"}
_HELD_OUT = {"val", "valid", "validation", "test", "eval"}
_NO_ACTIONS = "have no actions: they can train the video model, no policy"
_SHORTER = "have one action less than frames: none was recorded for the last frame, which is left out"
_LATENTS = "hold latent_videos, which are not read: they are another model's features"


class Options(Frozen):
    """All optional.

    annotations: the folder of layout 1. splits: which sub-folders, of it or of a plain folder, to read; empty means all.
    text, action: the JSON's keys; left out, the usual names are looked for. proprioception: keys that are joined in this order,
    e.g. [state, continuous_gripper_state]; empty looks for the usual names.
    """

    annotations: str = "annotation"
    splits: tuple[str, ...] = ()
    text: str | None = None
    action: str | None = None
    proprioception: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Record:
    """What the text file of an episode says: `videos` is by camera."""

    file: Path
    content: dict[str, Any]
    texts: list[str]
    videos: dict[str, Path]


def _read(file: Path) -> dict[str, Any]:
    """What a JSON file says, or a text file as {"texts": lines}; nothing of a video that has neither beside it."""
    if file.suffix.lower() in FORMATS:
        return {}
    if file.suffix.lower() == ".txt":
        refuse_lfs_pointer(file)  # which is text too
        try:
            if "\0" in (text := file.read_text(encoding="utf-8-sig")):
                raise ValueError("it has zero bytes, as UTF-16 has")
            return {"texts": text.splitlines()}
        except (OSError, ValueError) as error:
            raise FileError(f"{file}: not UTF-8 text ({error})") from None
    content = read_json(file)
    if not isinstance(content, dict):
        raise FileError(f"{file}: is a JSON {type(content).__name__}, expected an object with the keys of one episode")
    return content


def _camera_names(videos: list[str], episode: str) -> list[str]:
    """By file name, unless names are the episode's, hold numbers (which may be its) or are alike; then by place among them all,
    sorted, as lists differ in order."""
    by_place = {video: f"camera_{place}" for place, video in enumerate(sorted(videos))}
    stems = {video: PurePosixPath(video).stem for video in videos}
    plain = {video: stem for video, stem in stems.items() if re.fullmatch("[A-Za-z_-]+", stem) and stem != episode}
    names = [plain.get(video, by_place[video]) for video in videos]
    return names if len(set(names)) == len(names) else [by_place[video] for video in videos]


class VideoFolderSource:
    """One episode per text file, in the order of the files' paths."""

    def __init__(self, path: Path, options: Options, choice: Choice = EVERYTHING) -> None:
        """Open a folder; `FileError` where it, its videos or text files are missing."""
        self.path, self.options, self.choice = existing_folder(path), options, choice
        self._told: dict[Path, str] = {}
        self._shorter: set[Path] = set()
        annotations = self.path / options.annotations
        self._annotated = annotations.is_dir()
        self._top = annotations if self._annotated else self.path
        suffixes = (".json",) if self._annotated else tuple(FORMATS)
        found = (file for file in self._top.rglob("*") if file.suffix.lower() in suffixes and not file.is_dir())
        files = sorted(file for file in found if "/." not in f"/{file.relative_to(self._top).as_posix()}")
        if not files:
            what = f"*.json below {options.annotations}" if self._annotated else f"videos ({', '.join(FORMATS)})"
            raise FileError(f"{self.path}: no {what}; it has {contents(self.path)}")
        for split in options.splits:
            if split not in map(self._split, files):
                what = f"no {split}/*{suffixes[0]}, which convert.options.splits lists"
                raise FileError(f"{self._top}: {what}; it has {contents(self._top)}")
        self._files = [file for file in files if not options.splits or self._split(file) in options.splits]
        self._by_name: dict[Path, Path] = {}
        named = [self._by_name.setdefault(file.with_suffix(""), file) for file in self._files]
        self.names = [
            (file.with_suffix("") if file == first else file).relative_to(self._top).as_posix()
            for file, first in zip(self._files, named, strict=True)
        ]
        kinds = {self._split(file).lower() for file in self._files}
        self._has_split = kinds <= TRAINING | _HELD_OUT and bool(kinds & TRAINING) and bool(kinds & _HELD_OUT)

    def __len__(self) -> int:
        return len(self._files)

    def _split(self, file: Path) -> str:
        """The sub-folder of the annotations, or of a plain folder, in which a file lies."""
        return file.relative_to(self._top).parts[0] if file.parent != self._top else ""

    def _record(self, index: int) -> _Record:
        listed = file = self._files[index]
        if (first := self._by_name[file.with_suffix("")]) != file:
            raise FileError(f"{file}: {first.name} has the same name, and so the same text; rename one, or leave this one out")
        told = [text for suffix in _TOLD if not self._annotated and (text := file.with_suffix(suffix)).is_file()]
        file = next(iter(told), file)
        content = _read(file)
        if told[1:] and not any(content.get(key) for key in (self.options.text or "", *_TEXTS)):
            content |= _read(told[-1])
        texts = [self.choice.instruction or ""]
        with suppress(FileError) if self.choice.instruction else nullcontext():  # what is replaced need not be sound
            texts = self._texts(file, content)
        return _Record(file, content, texts, self._videos(file, content) if self._annotated else {"video": listed})

    def _records(self) -> Iterator[_Record]:
        """Those that can be read; `shape` says what is wrong with the others."""
        for index in range(len(self)):
            with suppress(FileError):
                yield self._record(index)

    def _first(self) -> _Record:
        """The first that can be read; else the refusal of the first."""
        return next(self._records(), None) or self._record(0)

    def _texts(self, file: Path, content: dict[str, Any]) -> list[str]:
        """An episode's own sentences, each once; the first is its task."""
        key = self._key(file, content, self.options.text, _TEXTS, "text") if file.suffix.lower() == ".json" else "texts"
        value = content.get(key or "")
        texts = [text for text in (value if isinstance(value, list) else [value]) if text is not None]
        if not all(isinstance(text, str) for text in texts):
            raise FileError(f"{file}: {key} is {str(value)[:80]!r}, expected a sentence or a list of sentences")
        told = [text for text in texts if text.strip()] or [None]
        return list(dict.fromkeys(own_task(self.choice, text, str(file)) for text in told))

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

    def _videos(self, file: Path, content: dict[str, Any]) -> dict[str, Path]:
        entries = content.get("videos")
        listed = entries if isinstance(entries, list) else []
        paths: list[Any] = [entry.get("video_path") if isinstance(entry, dict) else entry for entry in listed]
        if not paths or not all(isinstance(path, str) and path for path in paths):
            raise FileError(f"{file}: videos is {str(entries)[:80]!r}, expected a list of objects with a video_path each")
        for path in paths:
            pure = PurePosixPath(path)
            if pure.is_absolute() or ".." in pure.parts or "\0" in path:
                raise FileError(f"{file}: video_path is {path!r}, expected the path of a video below the top folder")
        return {name: self.path / path for name, path in zip(_camera_names(paths, file.stem), paths, strict=True)}

    @cached_property
    def _survey(self) -> tuple[dict[str, dict[str, list[str]]], list[str]]:
        """Instructions and notes; reads every text file once, no frame."""
        instructions: dict[str, dict[str, list[str]]] = {}
        used: Counter[Path] = Counter()
        counts: Counter[str] = Counter()
        for record in self._records():
            sentences = instructions.setdefault(record.texts[0], {"train": [], "held_out": []})["train"]
            said = [self.choice.instruction] if self.choice.instruction else record.texts
            sentences.extend(text for text in said if text not in sentences)
            used.update(record.videos.values())
            counts[_NO_ACTIONS] += all(record.content.get(key) is None for key in (self.options.action or "", *_ACTIONS))
            counts[_LATENTS] += "latent_videos" in record.content
        notes = [f"{self.path}: {count} of {len(self)} episodes {what}" for what, count in counts.items() if count]
        splits = sorted(set(map(self._split, self._files)))
        if not self._has_split and len(splits) > 1 and (self._annotated or not _HELD_OUT.isdisjoint(map(str.lower, splits))):
            notes.append(f"{self.path}: the folders {splits} say no split; one is drawn")
        if self._annotated:
            notes += self._unused(used)
            named = {self.options.text, self.options.action, *self.options.proprioception}
            first = self._first()
            videos = [] if self.choice.cameras else first.videos.values()
            notes += depth_doubts(video.relative_to(self.path).as_posix() for video in videos)
            if unread := sorted(set(first.content) - _KNOWN - named):
                notes.append(f"{first.file}: keys that are not read: {', '.join(unread)}")
        else:
            called = Counter(file.name for file in self._files)
            if alike := sorted((f for f in self._files if called[f.name] > 1), key=lambda file: file.name):
                such = " and ".join(file.relative_to(self.path).as_posix() for file in alike[:2])
                notes.append(
                    f"{self.path}: {len(alike)} videos are called as one in another folder, such as {such}; each is an episode "
                    "by itself; convert.episodes and convert.drop choose"
                )
        return instructions, notes

    def _unused(self, used: Counter[Path]) -> list[str]:
        """Videos that are referred to more than once, and files beside them that nothing refers to."""
        beside = sorted(file for folder in {video.parent for video in used} if folder.is_dir() for file in folder.iterdir())
        notes = []
        if twice := [video.relative_to(self.path).as_posix() for video, times in used.items() if times > 1]:
            notes.append(f"{self.path}: {len(twice)} videos are named more than once in the JSON files, such as {twice[0]}")
        if spare := [file for file in beside if file.suffix.lower() in FORMATS and file not in used]:
            such = spare[0].relative_to(self.path).as_posix()
            notes.append(f"{self.path}: {len(spare)} videos that no JSON refers to are left out, such as {such}")
        if arrays := [file for file in beside if file.suffix.lower() in (".npy", ".npz")]:
            said = f"{len(arrays)} arrays beside the videos are not read, such as {arrays[0].relative_to(self.path).as_posix()}"
            notes.append(f"{self.path}: {said}: the numbers come from the JSON")
        return notes

    @property
    def notes(self) -> Sequence[str]:
        """What is left out and what cannot be done with it; of the episodes that `shape` has looked at which are shorter than
        their videos, and what is told of videos."""
        shorter = [f"{self.path}: {len(self._shorter)} of {len(self)} episodes {_SHORTER}"] if self._shorter else []
        return [*shorter, *self._survey[1], *notes_of(self._told)]

    @cached_property
    def _cameras(self) -> list[str]:
        return chosen_cameras(self.choice, list(self._first().videos), self.path)

    @cached_property
    def _rate(self) -> float:
        if self.choice.rate_hz is not None:
            return self.choice.rate_hz
        camera = self._cameras[0]
        for record in self._records():
            with suppress(FileError, KeyError):  # which `shape` says
                if rate := probe(record.videos[camera]).rate:
                    return round(rate, 6)
        video = self._first().videos[camera]
        probe(video)  # which says what is wrong with it
        raise FileError(f"{video}: does not say its frame rate; give convert.rate_hz")

    def describe(self) -> SourceDescription:
        """Rate of the first video, cameras of the first episode, all sentences; reads every text file, no frame."""
        return SourceDescription(
            rate_hz=self._rate, cameras=self._cameras, instructions=self._survey[0], provenance={"source": "video_folder"}
        )

    @staticmethod
    def _vector(record: _Record, key: str) -> NDArray[np.float32]:
        """(rows, dimensions) of a key; a plain list of numbers is one column."""
        value = record.content[key]
        try:
            values = np.array(value)
        except (ValueError, OverflowError, RecursionError, TypeError):
            values = np.array(None)
        if values.dtype.kind not in "if" or values.ndim not in (1, 2) or values.size == 0:
            raise FileError(f"{record.file}: {key} is no table of numbers: expected a list of rows of equal length")
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which check() names
            rows: NDArray[np.float32] = values.astype(np.float32).reshape(len(values), -1)
        return rows

    def _numbers(self, record: _Record, frames: int) -> tuple[int, NDArray[np.float32] | None, NDArray[np.float32] | None]:
        """Time steps n, actions (n, A) or None, state (n, S) or None."""
        state: list[NDArray[np.float32]] = []
        for named in self.options.proprioception or (None,):
            if (key := self._key(record.file, record.content, named, _STATES, "proprioception")) is not None:
                state.append(self._vector(record, key))
                if len(state[-1]) != frames:
                    raise FileError(f"{record.file}: {key} has {len(state[-1])} rows, but the video has {frames} frames")
        length = record.content.get("video_length")
        if length not in (None, frames, str(frames)):
            raise FileError(f"{record.file}: video_length is {str(length)[:20]}, but the video has {frames} frames")
        joined = np.concatenate(state, axis=1) if state else None
        action = self._key(record.file, record.content, self.options.action, _ACTIONS, "action")
        if action is None:
            return frames, None, joined
        actions = self._vector(record, action)
        steps = len(actions)
        if steps not in (frames, frames - 1):
            raise FileError(f"{record.file}: {action} has {steps} rows, expected {frames} or {frames - 1} for {frames} frames")
        return steps, actions, None if joined is None else joined[:steps]

    def _probe(self, record: _Record) -> dict[str, VideoFacts]:
        """Camera -> what its video says of itself, of the chosen cameras alone."""
        chosen = {camera: record.videos[camera] for camera in self._cameras if camera in record.videos}
        if list(chosen) != self._cameras or (not self.choice.cameras and len(record.videos) != len(chosen)):
            expected = f"expected {self._cameras} as in {self._first().file}"
            raise FileError(f"{record.file}: cameras {list(record.videos)}, {expected}")
        if missing := [video for video in chosen.values() if not video.is_file()]:
            lies = lies_there(self.path, missing[0])
            raise FileError(f"{', '.join(map(str, missing))}: no such file, which {record.file} names; {lies}")
        facts = {camera: probe(video) for camera, video in chosen.items()}
        first = next(iter(facts.values()))
        for camera, other in facts.items():
            if other.frames != first.frames:
                raise FileError(f"{record.file}: {camera} has {other.frames} frames, {next(iter(facts))} has {first.frames}")
        return facts

    def shape(self, index: int) -> EpisodeShape:
        """Lengths, from the text file and the videos' headers; lengths and rates must agree."""
        record = self._record(index)
        facts = self._probe(record)
        steps, _, _ = self._numbers(record, next(iter(facts.values())).frames)
        if steps < next(iter(facts.values())).frames:
            self._shorter.add(record.file)
        for camera, known in facts.items():
            if self.choice.rate_hz is None and abs((known.rate or 0.0) / self._rate - 1) > 0.02:
                video_blocks(record.videos[camera], known, steps, self._rate)  # says at which frame
            self._told[record.videos[camera]] = told_at(known, self._rate)
        held_out = self._split(self._files[index]).lower() in _HELD_OUT if self._has_split else None
        files = [record.file, *(record.videos[camera] for camera in facts)]
        success = record.content.get("success")
        return EpisodeShape(
            steps, {}, held_out, " ".join(stamp(file) for file in files), self.names[index], record.texts[0],
            bool(success) if success in (0, 1) else None,
        )  # fmt: skip

    def read(self, index: int) -> Episode:
        """One episode."""
        record = self._record(index)
        facts = self._probe(record)
        steps, actions, state = self._numbers(record, next(iter(facts.values())).frames)
        rate = None if self.choice.rate_hz is not None else self._rate
        frames = {camera: video_blocks(record.videos[camera], known, steps, rate) for camera, known in facts.items()}
        episode = Episode(
            task=record.texts[0], instruction=self.choice.instruction or record.texts[0], rate_hz=self._rate, frames=frames,
            actions=actions, proprioception=state, provenance={"file": record.file.relative_to(self.path).as_posix()},
        )  # fmt: skip
        return checked(episode, record.file)


open_source = VideoFolderSource
