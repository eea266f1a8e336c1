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
over 0.02 m and 0.05 rad and clipped to [-1, 1] (calvin_env/datarenderer.py). A note tells where a scene's first steps differ.

Splits: with training and validation both read, validation is held out; `held_out_scenes` holds out more. Otherwise segments
that share steps are on one side of the split (`EpisodeShape.group`), so that no held-out frame is trained on. A folder's scenes
come from its own scene_info.npy. The official validation folders mostly have none, and the numbers in training's mean other
steps there, so their scene (D) is stated by `scene_of`; early downloads of D/training wrongly name scene A.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from svam.contract import EVERYTHING, Annotation, Choice, Episode, EpisodeShape, FrameBlocks, Frozen, SourceDescription
from svam.errors import ParamsError
from svam.files import FileError, stamp
from svam.sources import _calvin_files as files
from svam.sources._choice import checked, chosen_cameras, chosen_instruction, contents, existing_folder
from svam.sources._npz import headers

RATE_HZ = 30.0
_SPLITS = ("training", "validation")
_CAMERAS = {"static": "rgb_static", "gripper": "rgb_gripper"}
_ACTIONS = 7
_ALIGNED = 0.01
_LARGEST_DEPTH = 2**31
_Scene = Annotated[str, AfterValidator(lambda name: name.removeprefix("calvin_scene_"))]


class Options(Frozen):
    """What `convert.options` may say.

    segments: `annotated` (each annotation is an episode) or `whole` (each recording is one).
        Recordings have no sentence: `convert.missing_instruction` says one, which is their task too.
    actions: `rel_actions` (relative) or `actions` (absolute). In both, dimension 6 is binary.
    folders: which folders to read; empty means training and validation, as far as they are there.
    annotations: the folder in each of them that holds auto_lang_ann.npy.
    scenes: read only episodes of these, e.g. [A, B, C]; empty means all. held_out_scenes: hold these out.
    scene_of: folder -> scene, for folders whose scene_info.npy is missing or wrong, e.g. {validation: D}.
    depth: label every `depth_every`-th frame with this camera's depth; it should be the first camera that is converted.
    """

    segments: Literal["annotated", "whole"] = "annotated"
    actions: Literal["rel_actions", "actions"] = "rel_actions"
    folders: list[str] = []
    annotations: str = "lang_annotations"
    scenes: list[_Scene] = []
    held_out_scenes: list[_Scene] = []
    scene_of: dict[str, _Scene] = {}
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

    def __init__(self, path: Path, options: Options, choice: Choice = EVERYTHING) -> None:
        """Open a CALVIN data set, or one of its folders.

        Raises:
            FileError: a file is missing, damaged or of another layout.
            ParamsError: the options name scenes or folders that are not there, or leave one side of the split empty.
        """
        self.path, self._options, self._choice, self.notes = existing_folder(path), options, choice, list[str]()
        self.rate_hz = choice.rate_hz or RATE_HZ
        asked = set(choice.cameras)
        self._unread = [name for camera, name in _CAMERAS.items() if asked and asked.isdisjoint((camera, name))]
        self._folders = self._find_folders()
        self._segments = self._grouped(self._choose([one for name in self._folders for one in self._segments_of(name)]))
        self._inspect_first_step()

    def _find_folders(self) -> list[str]:
        present = [name for name in _SPLITS if (self.path / name).is_dir()]
        if not present and (self.path / "ep_start_end_ids.npy").is_file():  # one of the two itself; a split leaves it above
            self.path = self.path.resolve()
            present, self.path = [self.path.name], self.path.parent
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

    def _annotations(self, name: str) -> Path:
        return self.path / name / self._options.annotations / "auto_lang_ann.npy"

    def _segments_of(self, name: str) -> list[_Segment]:
        """All segments of a folder, with their scenes where these are known."""
        folder, annotations = self.path / name, self._annotations(name)
        recordings, scenes = files.read_recordings(folder), files.read_scenes(folder)
        if self._options.segments == "annotated":
            entries, of = files.read_annotations(annotations), f"{annotations}: annotation"
        else:
            entries = [(first, last, "", "", "") for first, last in recordings.tolist()]
            of = f"{folder / 'ep_start_end_ids.npy'}: recording"
        segments = []
        for number, (first, last, task, sentence, fault) in enumerate(entries):
            scene = next((scene for scene, start, end in scenes if start <= first and last <= end), None)
            scene = self._options.scene_of.get(name, scene)
            instruction, where = "", f"{of} {number}"
            try:
                instruction = chosen_instruction(self._choice, sentence, where)
            except FileError as error:
                fault = fault or str(error)
            recorded = ((recordings[:, 0] <= first) & (last <= recordings[:, 1])).any()
            if not recorded or (scenes and scene is None and (self._options.scenes or self._options.held_out_scenes)):
                what, file = ("scene", "scene_info.npy") if recorded else ("recording", "ep_start_end_ids.npy")
                fault = fault or f"{where} covers steps {first} to {last}, but no {what} of {folder / file} has all of them"
            segments.append(_Segment(name, number, first, last, task or instruction, instruction, scene, fault=fault))
        return segments

    def _choose(self, segments: list[_Segment]) -> list[_Segment]:
        """The segments of the chosen scenes, marked as held out or not where there is a split."""
        scenes, held_out = self._options.scenes, self._options.held_out_scenes
        unknown = next((segment for segment in segments if segment.scene is None and not segment.fault), None)
        if unknown and (scenes or held_out):
            raise FileError(
                f"{self.path / unknown.folder / 'scene_info.npy'}: no scene for steps {unknown.first} to {unknown.last}, which "
                f"convert.options asks for; state it, e.g. scene_of: {{{unknown.folder}: D}}, or leave that folder out"
            )
        chosen = [segment for segment in segments if not scenes or segment.scene in scenes or segment.fault]
        for option, names, among in (("scenes", scenes, segments), ("held_out_scenes", held_out, chosen)):
            there = sorted({str(segment.scene) for segment in among if not segment.fault})
            if missing := [name for name in names if name not in there]:
                raise ParamsError(f"convert.options.{option}: no episode of scene {missing[0]!r}; there are {', '.join(there)}")
        official = set(_SPLITS) <= set(self._folders)
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
        groups: dict[_Segment, str] = {}
        folder, group, end = "", "", -1
        for segment in sorted((s for s in segments if not s.fault), key=lambda segment: (segment.folder, segment.first)):
            if segment.folder != folder or segment.first > end:
                folder, group, end = segment.folder, f"{segment.folder} {segment.first}", -1
            groups[segment], end = group, max(end, segment.last)
        count = len(set(groups.values()))
        if count == len(groups):
            return segments
        if all(segment.held_out is None for segment in segments):  # else only where a choice leaves none that are held out
            self.notes.append(
                f"{self.path}: segments share frames: {len(groups)} episodes are {count} groups without a common frame, each "
                "of which is trained on or held out as a whole"
            )
        return [replace(segment, group=groups.get(segment, "")) for segment in segments]

    def _inspect_first_step(self) -> None:
        """What a step holds, of the first segment whose first step is sound."""
        faults: list[FileError] = []
        for index in range(len(self)):
            try:
                self._inspect(self._readable(index))
                return
            except FileError as error:
                faults.append(error)
        raise faults[0]

    def _inspect(self, first: _Segment) -> None:
        """What the first step of a segment holds; `FileError` where that is nothing to convert."""
        options, file = self._options, files.step_file(self.path / first.folder, first.first)
        there = headers(file, files.LISTED, self._unread)
        if options.actions not in there:
            has = ", ".join(sorted(there))
            raise FileError(f"{file}: no {options.actions}, which convert.options.actions names; it has {has}")
        named = {"robot_obs": "proprioception", "scene_obs": "state"}
        self._vectors = {options.actions: (_ACTIONS,), **{name: there[name].shape for name in named if name in there}}
        cameras = [camera for camera, name in _CAMERAS.items() if name in there]
        if not cameras:
            raise FileError(f"{file}: neither rgb_static nor rgb_gripper; it has {', '.join(sorted(there)) or 'nothing'}")
        self._cameras: dict[str, tuple[int, int, int]] = {}
        for camera in chosen_cameras(self._choice, cameras, file, "rgb_"):
            pictures = there[_CAMERAS[camera]]
            if pictures.dtype != np.uint8 or len(pictures.shape) != 3 or pictures.shape[2] != 3:
                stored = f"{pictures.dtype} {pictures.shape}"
                raise FileError(f"{file}: field {_CAMERAS[camera]!r} is {stored}, expected uint8 (H, W, 3)")
            self._cameras[camera] = (pictures.shape[0], pictures.shape[1], 3)
        self._depth: dict[str, tuple[int, ...]] = {}
        if options.depth != "none":
            name = f"depth_{options.depth}"
            if name not in there or len(there[name].shape) != 2:
                raise FileError(f"{file}: no field {name!r} (H, W), which convert.options.depth asks for")
            self._depth = {name: there[name].shape}
            labelled = range(0, max(s.steps for s in self._segments if not s.fault), options.depth_every)
            if (size := len(labelled) * 4 * math.prod(there[name].shape)) > _LARGEST_DEPTH:
                raise ParamsError(
                    f"convert.options.depth_every is {options.depth_every}: the longest episode would have "
                    f"{size / 2**30:.1f} GiB of depth in memory, at most {_LARGEST_DEPTH // 2**30} GiB is expected; label fewer"
                )
            if (foreseen := next(iter(self._cameras))) != options.depth:
                self.notes.append(f"the depth is of the camera {options.depth!r}, but the first one is {foreseen!r}")
        self.notes += [f"{file}: no {name}, so the episodes have no {named[name]}" for name in named if name not in there]
        self.notes += [f"{file}: no rgb_{name}, so the camera {name!r} is left out" for name in _CAMERAS if name not in cameras]
        of_scenes = {(one.folder, one.scene): one for one in reversed(self._segments) if not one.fault}
        for one in reversed(of_scenes.values()) if options.actions == "rel_actions" else ():
            with suppress(FileError):  # which `shape` says
                if (gap := files.alignment_gap(self.path / one.folder, one.first, one.last)) > _ALIGNED:
                    where = files.step_file(self.path / one.folder, one.first)
                    self.notes.append(
                        f"{where}: rel_actions differ by up to {gap:.2f} from what the same steps' actions and robot_obs give; "
                        "check that a frame and the action taken at it are in one file"
                    )

    def describe(self) -> SourceDescription:
        """Rate, cameras, and each task's sentences: those that only held-out episodes use are the held-out ones."""
        sentences: dict[str, tuple[set[str], set[str]]] = {}
        for segment in (segment for segment in self._segments if not segment.fault):
            of_split = sentences.setdefault(segment.task, (set(), set()))[bool(segment.held_out)]
            of_split.update({segment.instruction} - {""})
        instructions = {
            task: {"train": sorted(seen or unseen), "held_out": sorted(unseen - seen) if seen else []}
            for task, (seen, unseen) in sentences.items()
        }
        return SourceDescription(
            rate_hz=self.rate_hz, cameras=list(self._cameras), instructions=instructions,
            provenance={
                "source": "calvin", "actions": self._options.actions, "segments": self._options.segments,
                "episodes": {name: sum(s.folder == name for s in self._segments) for name in self._folders},
                "scenes": sorted({s.scene for s in self._segments if s.scene is not None}),
            },
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._segments)

    def _readable(self, index: int) -> _Segment:
        segment = self._segments[index]
        if segment.fault:
            raise FileError(segment.fault)
        return segment

    def shape(self, index: int) -> EpisodeShape:
        """Lengths, split, and where it lies; the stamp covers every step's file and the annotations. `FileError` where a step's
        file or the sentence is missing."""
        segment = self._readable(index)
        digest = hashlib.sha256(stamp(self._annotations(segment.folder)).encode())
        for step in range(segment.first, segment.last + 1):
            file = files.step_file(self.path / segment.folder, step)
            if (found := stamp(file)) == "absent":
                raise FileError(f"{file}: no such file{files.LISTED}")
            digest.update(found.encode())
        annotated = {"depth": len(range(0, segment.steps, self._options.depth_every))} if self._depth else {}
        name = f"{segment.folder}/{segment.number}"
        return EpisodeShape(
            segment.steps, annotated, segment.held_out, digest.hexdigest(), name, segment.task, group=segment.group
        )

    def read(self, index: int) -> Episode:
        """One episode. `FileError` also where a step differs from the episode's first one in fields, dtypes or shapes, the
        gripper is neither -1 nor 1, or a relative action is outside [-1, 1]."""
        segment, every = self._readable(index), self._options.depth_every
        folder, n = self.path / segment.folder, segment.steps
        labelled = np.arange(0, n, every, dtype=np.int64)
        there = headers(files.step_file(folder, segment.first), files.LISTED, self._unread)
        own = {camera: there[name].shape for camera, name in _CAMERAS.items() if name in there}
        sizes = {
            camera: (own[camera][0], own[camera][1], 3) if own.get(camera, ())[2:] == (3,) else size
            for camera, size in self._cameras.items()
        }
        vectors = {name: np.empty((n, *shape), np.float32) for name, shape in self._vectors.items()}
        depth = {name: np.empty((len(labelled), *shape), np.float32) for name, shape in self._depth.items()}
        for t in range(n):
            file = files.step_file(folder, segment.first + t)
            step = files.read_step(file, self._vectors | (self._depth if t % every == 0 else {}))
            with np.errstate(over="ignore"):  # an infinity is refused by the contract's check
                for name, values in step.items():
                    (depth[name][t // every] if name in depth else vectors[name][t])[...] = values
            self._check_action(file, vectors[self._options.actions][t])
        frames = {
            camera: FrameBlocks(shape, partial(files.read_frames, folder, segment.first, _CAMERAS[camera], shape))
            for camera, shape in ((camera, (n, *size)) for camera, size in sizes.items())
        }
        episode = Episode(
            task=segment.task, instruction=segment.instruction, rate_hz=self.rate_hz, frames=frames,
            actions=vectors[self._options.actions], state=vectors.get("scene_obs"), proprioception=vectors.get("robot_obs"),
            annotations={"depth": Annotation(depth[f"depth_{self._options.depth}"], labelled)} if depth else {},
            provenance={
                "file": f"{segment.folder}/{files.step_file(folder, segment.first).name}", "first_step": segment.first,
                "last_step": segment.last, "number": segment.number, "scene": segment.scene,
            },
        )  # fmt: skip
        return checked(episode, self.path)

    def _check_action(self, file: Path, action: NDArray[np.float32]) -> None:
        name = self._options.actions
        if action[-1] not in (-1.0, 1.0):
            raise FileError(f"{file}: {name}[{_ACTIONS - 1}], the gripper, is {action[-1]:g}, expected exactly -1 or 1")
        if name == "rel_actions" and (outside := ~(np.abs(action) <= 1.0)).any():
            d = int(np.argmax(outside))
            raise FileError(f"{file}: rel_actions[{d}] is {action[d]:g}, expected a relative action within [-1, 1]")


open_source = CalvinSource
