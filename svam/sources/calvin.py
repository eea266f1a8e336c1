"""CALVIN in its official layout: one .npz file a time step, 30 a second, with language annotations.

    <path>/training/ and <path>/validation/ (either is enough; <path> may also be one of them)
        episode_0000000.npz ...   rel_actions and actions (7), robot_obs (15), scene_obs (24), float32 or float64;
                                  rgb_static (200, 200, 3), rgb_gripper (84, 84, 3) uint8; depth_static, depth_gripper in metres
        ep_start_end_ids.npy      (recordings, 2) integers: first and last step of each recording, both included
        scene_info.npy            {"calvin_scene_A": [first, last], ...}, both included
        lang_annotations/auto_lang_ann.npy
                                  {"language": {"ann": sentences, "task": names}, "info": {"indx": [(first, last), ...]}}

The last two hold Python objects and are read by `_restricted_pickle`, which runs nothing. An episode is an annotated segment
(its last step included; segments may overlap) or a whole recording. Cameras are `static` and `gripper`, proprioception
is robot_obs, state is scene_obs; all vectors are cast to float32.

Alignment: step t's file holds the frame, robot_obs and scene_obs at t and the action taken there, which is the hand's pose at
t + 1: `actions` absolutely (metres, Euler angles, gripper -1 or 1), `rel_actions` less the pose in the same file's robot_obs,
over 0.02 m and 0.05 rad and clipped to [-1, 1] (calvin_env/datarenderer.py). If the first steps contradict this, a note tells.

Splits: with training and validation both read, validation is held out; `held_out_scenes` holds out more. Otherwise segments
that share steps are on one side of the split (`EpisodeShape.group`), so that no held-out frame is trained on. A folder's scenes
come from its own scene_info.npy. The official validation folders mostly have none, and the numbers in training's mean other
steps there, so their scene (D) is stated by `scene_of`; early downloads of D/training wrongly name scene A.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from svam.contract import (
    EVERYTHING,
    Annotation,
    Choice,
    Episode,
    EpisodeShape,
    FrameBlocks,
    Frozen,
    SourceDescription,
)
from svam.errors import ParamsError
from svam.files import FileError, stamp
from svam.sources._calvin_files import (
    LISTED,
    alignment_gap,
    as_float32,
    read_annotations,
    read_frames,
    read_recordings,
    read_scenes,
    read_step,
    scene_name,
    step_file,
)
from svam.sources._choice import checked, chosen_cameras, chosen_instruction, contents
from svam.sources._npz import Header, headers

RATE_HZ = 30.0
NEUTRAL_INSTRUCTION = "play with the objects on the table"
_SPLITS = ("training", "validation")
_CAMERAS = {"static": "rgb_static", "gripper": "rgb_gripper"}
_ACTIONS = 7
_ALIGNED = 0.01
_LARGEST_DEPTH = 2**31


class Options(Frozen):
    """What `convert.options` may say.

    segments: `annotated` (each annotation is an episode) or `whole` (each recording is one).
        Recordings have no sentence: `convert.missing_instruction`, or else `NEUTRAL_INSTRUCTION`, with a note.
    actions: `rel_actions` (relative) or `actions` (absolute). In both, dimension 6 is binary.
    folders: which folders to read; empty means training and validation, as far as they are there.
    annotations: the folder in each of them that holds auto_lang_ann.npy.
    scenes: read only episodes of these, e.g. [A, B, C]; empty means all. held_out_scenes: hold these out.
    scene_of: folder -> scene, for folders whose scene_info.npy is missing or wrong, e.g. {validation: D}.
    depth: label every `depth_every`-th frame with this camera's depth; it should be the first camera that is converted.
    """

    segments: Literal["annotated", "whole"] = "annotated"
    actions: Literal["rel_actions", "actions"] = "rel_actions"
    folders: list[str] = Field([])
    annotations: str = "lang_annotations"
    scenes: list[str] = Field([])
    held_out_scenes: list[str] = Field([])
    scene_of: dict[str, str] = Field({})
    depth: Literal["none", "static", "gripper"] = "none"
    depth_every: int = Field(default=8, ge=1)


@dataclass(frozen=True)
class _Segment:
    """Steps first..last (both included) of a folder; `number` counts the annotations, or the recordings, of the folder.
    `instruction`: "" where there is none. `group`: of segments that share steps. `fault`: why it cannot be read."""

    folder: str
    number: int
    first: int
    last: int
    task: str
    instruction: str
    scene: str | None = None
    held_out: bool | None = None
    group: str = ""
    fault: str = ""

    @property
    def steps(self) -> int:
        return self.last - self.first + 1


class CalvinSource:
    """Episodes folder by folder, in the order of the annotations or of the recordings."""

    def __init__(self, path: Path, options: Options, choice: Choice) -> None:
        """See `open_source`."""
        self.path, self._options, self._choice, self.notes = Path(path), options, choice, list[str]()
        self._folders = self._find_folders()
        self._stamps = {name: stamp(self.path / name / options.annotations / "auto_lang_ann.npy") for name in self._folders}
        segments = [segment for name in self._folders for segment in self._segments_of(name)]
        self._segments = self._grouped(self._choose(segments))
        self._inspect_first_step()
        if options.segments == "whole" and choice.instruction is None and choice.missing_instruction is None:
            self.notes.append(f"whole recordings carry no language: their instruction is {NEUTRAL_INSTRUCTION!r}")

    def _find_folders(self) -> list[str]:
        if not self.path.is_dir():
            raise FileError(f"{self.path}: no such directory")
        if (self.path / "ep_start_end_ids.npy").is_file():  # one of the two itself
            self.path = self.path.resolve()
            present, self.path = [self.path.name], self.path.parent
        else:
            present = [name for name in _SPLITS if (self.path / name).is_dir()]
        if wrong := [name for name in self._options.folders if not (self.path / name).is_dir()]:
            raise FileError(f"{self.path / wrong[0]}: no such directory, though convert.options.folders lists {wrong[0]!r}")
        folders = list(dict.fromkeys(self._options.folders)) or present
        if not folders:
            raise FileError(
                f"{self.path}: no CALVIN data set: neither a training nor a validation folder with "
                f"episode_0000000.npz, ... and ep_start_end_ids.npy; it has {contents(self.path)}"
            )
        if unknown := sorted(set(self._options.scene_of) - set(folders)):
            raise ParamsError(
                f"convert.options.scene_of names {unknown[0]!r}, expected a folder that is read: {', '.join(folders)}"
            )
        return folders

    def _segments_of(self, name: str) -> list[_Segment]:
        """All segments of a folder, with their scenes where these are known."""
        folder, options = self.path / name, self._options
        recordings = read_recordings(folder)
        if options.segments == "annotated":
            found = read_annotations(folder, options.annotations)
        else:
            sentence = self._choice.missing_instruction or NEUTRAL_INSTRUCTION
            found = [(first, last, sentence, sentence) for first, last in recordings.tolist()]
            if (shared := np.flatnonzero(recordings[1:, 0] <= recordings[:-1, 1])).size:
                pair = f"{recordings[shared[0]].tolist()} and {recordings[shared[0] + 1].tolist()}"
                self.notes.append(f"{folder / 'ep_start_end_ids.npy'}: {len(shared)} recordings share steps, first {pair}")
        place = np.searchsorted(recordings[:, 0], [first for first, *_ in found], side="right") - 1
        outside = [at < 0 or last > recordings[at, 1] for at, (_, last, *_) in zip(place, found, strict=True)]
        scenes = read_scenes(folder)
        stated = options.scene_of.get(name)
        fixed = None if stated is None else scene_name(stated)
        return [
            _Segment(
                name, number, first, last, task, self._choice.instruction or sentence or self._choice.missing_instruction or "",
                fixed or self._scene_at(scenes, first, last), fault="" if not outside[number] else (
                    f"{folder / options.annotations / 'auto_lang_ann.npy'}: annotation {number} covers steps {first} to "
                    f"{last}, but no recording of {folder / 'ep_start_end_ids.npy'} has all of them"
                ),
            )
            for number, (first, last, task, sentence) in enumerate(found)
        ]  # fmt: skip

    @staticmethod
    def _scene_at(scenes: Sequence[tuple[str, int, int]], first: int, last: int) -> str | None:
        return next((scene for scene, start, end in scenes if start <= first and last <= end), None)

    def _choose(self, segments: list[_Segment]) -> list[_Segment]:
        """The segments of the wanted scenes, marked as held out or not where there is a split."""
        options = self._options
        scenes = [scene_name(scene) for scene in options.scenes]
        held_out = [scene_name(scene) for scene in options.held_out_scenes]
        official = set(_SPLITS) <= set(self._folders)
        if scenes or held_out:
            for segment in segments:
                if segment.scene is None:
                    file = self.path / segment.folder / "scene_info.npy"
                    raise FileError(
                        f"{file}: no scene for steps {segment.first} to {segment.last}, which convert.options asks for; "
                        f"state it, e.g. scene_of: {{{segment.folder}: D}}, or leave the folder out of folders"
                    )
            known = sorted({str(segment.scene) for segment in segments})
            if unknown := [scene for scene in (*scenes, *held_out) if scene not in known]:
                raise ParamsError(f"convert.options: no episode of scene {unknown[0]!r}; there are {', '.join(known)}")
            if outside := [scene for scene in held_out if scenes and scene not in scenes]:
                raise ParamsError(f"convert.options.held_out_scenes has {outside[0]!r}, which is not among scenes {scenes}")
        chosen = [segment for segment in segments if not scenes or segment.scene in scenes]
        if not (official or held_out):
            return chosen
        marks = [(official and s.folder == "validation") or s.scene in held_out for s in chosen]
        if len(set(marks)) < 2:
            raise ParamsError(
                f"convert.options: of {len(chosen)} episodes {sum(marks)} are held out, expected some of both kinds; "
                "choose other folders, scenes or held_out_scenes"
            )
        self.notes.append(f"held out as the data set's own split: {sum(marks)} of {len(chosen)} episodes")
        return [replace(segment, held_out=mark) for segment, mark in zip(chosen, marks, strict=True)]

    def _grouped(self, segments: list[_Segment]) -> list[_Segment]:
        """The segments with one group for those that share steps, directly or through others; as they are where none do."""
        order = sorted(range(len(segments)), key=lambda i: (segments[i].folder, segments[i].first))
        groups, folder, end = [""] * len(segments), "", -1
        for before, i in zip([0, *order], order, strict=False):
            segment = segments[i]
            shares = segment.folder == folder and segment.first <= end
            groups[i] = groups[before] if shares else f"{segment.folder} {segment.first}"
            folder, end = segment.folder, max(end, segment.last) if segment.folder == folder else segment.last
        if len(set(groups)) == len(segments) or any(segment.held_out is not None for segment in segments):
            return segments
        self.notes.append(
            f"{self.path}: segments share frames: {len(segments)} episodes are {len(set(groups))} groups without a common "
            "frame, each of which is trained on or held out as a whole"
        )
        return [replace(segment, group=group) for segment, group in zip(segments, groups, strict=True)]

    def _first_step(self) -> tuple[_Segment, dict[str, Header]]:
        """The first segment whose first step can be read, and what that holds."""
        faults = []
        for segment in self._segments:
            try:
                return segment, headers(step_file(self.path / segment.folder, segment.first), LISTED)
            except FileError as error:
                faults.append(error)
        raise faults[0]

    def _inspect_first_step(self) -> None:
        """What a step holds, of the first one; all others must be alike."""
        first, found = self._first_step()
        file = step_file(self.path / first.folder, first.first)
        self._vectors: dict[str, tuple[int, ...]] = {self._options.actions: (_ACTIONS,)}
        for name, meaning in (("robot_obs", "proprioception"), ("scene_obs", "state")):
            if name not in found:
                self.notes.append(f"{file}: no {name}, so the episodes have no {meaning}")
            elif len(found[name].shape) != 1 or found[name].shape == (0,):
                raise FileError(
                    f"{file}: field {name!r} is {found[name].dtype} {found[name].shape}, expected one axis of numbers"
                )
            else:
                self._vectors[name] = found[name].shape
        there = [camera for camera, name in _CAMERAS.items() if name in found]
        if not there:
            raise FileError(f"{file}: neither rgb_static nor rgb_gripper; it has {', '.join(sorted(found)) or 'nothing'}")
        self._cameras: dict[str, tuple[int, int, int]] = {}
        for camera in chosen_cameras(self._choice, there, file, "rgb_"):
            name, shape = _CAMERAS[camera], found[_CAMERAS[camera]].shape
            if found[name].dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
                raise FileError(f"{file}: field {name!r} is {found[name].dtype} {shape}, expected uint8 (H, W, 3)")
            self._cameras[camera] = (shape[0], shape[1], shape[2])
        self.notes += [
            f"{file}: no rgb_{camera}, so the camera {camera!r} is left out" for camera in _CAMERAS if camera not in there
        ]
        self._depth: dict[str, tuple[int, ...]] = {}
        if self._options.depth != "none":
            name = f"depth_{self._options.depth}"
            if name not in found or len(found[name].shape) != 2:
                raise FileError(f"{file}: no field {name!r} (H, W), which convert.options.depth asks for")
            self._depth = {name: found[name].shape}
            frames = -(-max(segment.steps for segment in self._segments) // self._options.depth_every)
            if (size := frames * 4 * int(np.prod(found[name].shape))) > _LARGEST_DEPTH:
                raise ParamsError(
                    f"convert.options.depth_every is {self._options.depth_every}: the longest episode would have "
                    f"{size / 2**30:.1f} GiB of depth in memory, at most {_LARGEST_DEPTH // 2**30} GiB is expected; label fewer"
                )
        if self._options.actions == "rel_actions":
            with suppress(FileError):  # which `shape` says
                self._check_alignment(first, file)

    def _check_alignment(self, first: _Segment, file: Path) -> None:
        """Note it where the first steps' relative actions are not those of the same step's pose and absolute action."""
        gap = alignment_gap(self.path / first.folder, first.first, first.last)
        if gap > _ALIGNED:
            self.notes.append(
                f"{file}: rel_actions differ by up to {gap:.2f} from what the same steps' actions and robot_obs give; check "
                "that a frame and the action taken at it are in one file"
            )

    def describe(self) -> SourceDescription:
        """Rate, cameras, and each task's sentences: those that only held-out episodes use are the held-out ones."""
        train: dict[str, set[str]] = {}
        held_out: dict[str, set[str]] = {}
        for segment in self._segments:
            (held_out if segment.held_out else train).setdefault(segment.task, set()).add(segment.instruction)
        instructions = {}
        for task in dict.fromkeys(segment.task for segment in self._segments):
            seen, unseen = train.get(task, set()), held_out.get(task, set())
            seen, unseen = seen - {""}, unseen - {""}
            instructions[task] = {"train": sorted(seen or unseen), "held_out": sorted(unseen - seen) if seen else []}
        return SourceDescription(
            rate_hz=self._choice.rate_hz or RATE_HZ, cameras=list(self._cameras), instructions=instructions,
            provenance={
                "source": "calvin", "actions": self._options.actions, "segments": self._options.segments,
                "episodes": {name: sum(s.folder == name for s in self._segments) for name in self._folders},
                "scenes": sorted({s.scene for s in self._segments if s.scene is not None}),
            },
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._segments)

    def _sentence(self, segment: _Segment) -> str:
        """Of a segment that can be read."""
        if segment.fault:
            raise FileError(segment.fault)
        file = self.path / segment.folder / self._options.annotations / "auto_lang_ann.npy"
        return chosen_instruction(self._choice, segment.instruction, f"{file}: annotation {segment.number}")

    def shape(self, index: int) -> EpisodeShape:
        """Lengths, split, and where it lies; the stamp covers every step's file and the annotations.

        Raises:
            FileError: a step's file is missing, or it has no sentence.
        """
        segment = self._segments[index]
        self._sentence(segment)
        digest = hashlib.sha256(self._stamps[segment.folder].encode())
        for step in range(segment.first, segment.last + 1):
            file = step_file(self.path / segment.folder, step)
            if (found := stamp(file)) == "absent":
                raise FileError(f"{file}: no such file{LISTED}")
            digest.update(found.encode())
        annotated = {"depth": -(-segment.steps // self._options.depth_every)} if self._depth else {}
        name = f"{segment.folder}/{segment.number}"
        return EpisodeShape(
            segment.steps, annotated, segment.held_out, digest.hexdigest(), name, segment.task, group=segment.group
        )

    def read(self, index: int) -> Episode:
        """One episode; its frames are read block by block when they are asked for.

        Raises:
            FileError: a step's file is missing, damaged, or differs from the first one in fields, dtypes or shapes; or the
                gripper's action is neither -1 nor 1; or a relative action is outside [-1, 1].
            ContractError: the episode breaks the contract.
        """
        segment, every = self._segments[index], self._options.depth_every
        folder = self.path / segment.folder
        vectors = {name: np.empty((segment.steps, *shape), np.float32) for name, shape in self._vectors.items()}
        depth = [np.empty((-(-segment.steps // every), *shape), np.float32) for shape in self._depth.values()]
        for t in range(segment.steps):
            file = step_file(folder, segment.first + t)
            labelled = self._depth if t % every == 0 else {}
            for name, values in read_step(file, self._vectors | labelled, ("float32", "float64")).items():
                (depth[0][t // every] if name in labelled else vectors[name][t])[...] = as_float32(file, name, values)
            self._check_action(file, vectors[self._options.actions][t])
        index_of_depth = np.arange(0, segment.steps, every, dtype=np.int64)
        episode = Episode(
            task=segment.task, instruction=self._sentence(segment), rate_hz=self._choice.rate_hz or RATE_HZ,
            frames={
                camera: FrameBlocks(
                    (segment.steps, *shape),
                    partial(read_frames, folder, segment.first, _CAMERAS[camera], (segment.steps, *shape)),
                )
                for camera, shape in self._cameras.items()
            },
            actions=vectors[self._options.actions], state=vectors.get("scene_obs"), proprioception=vectors.get("robot_obs"),
            annotations={"depth": Annotation(depth[0], index_of_depth)} if depth else {},
            provenance={
                "file": f"{segment.folder}/{step_file(folder, segment.first).name}", "first_step": segment.first,
                "last_step": segment.last, "number": segment.number, "scene": segment.scene,
            },
        )  # fmt: skip
        return checked(episode, self.path)

    def _check_action(self, file: Path, action: NDArray[np.float32]) -> None:
        name = self._options.actions
        if action[-1] not in (-1.0, 1.0):
            raise FileError(f"{file}: {name}[{_ACTIONS - 1}], the gripper, is {action[-1]:g}, expected exactly -1 or 1")
        if name == "rel_actions" and (outside := np.abs(action) > 1.0).any():
            d = int(np.argmax(outside))
            raise FileError(f"{file}: rel_actions[{d}] is {action[d]:g}, expected a relative action within [-1, 1]")


def open_source(path: Path, options: Options, choice: Choice = EVERYTHING) -> CalvinSource:
    """Open a CALVIN data set, or one of its folders.

    Raises:
        FileError: a file is missing, damaged or of another layout.
        ParamsError: the options name scenes or folders that are not there, or leave one side of the split empty.
    """
    return CalvinSource(path, options, choice)
