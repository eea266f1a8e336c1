"""The typed contract between data, models, simulation and serving: axes, dtypes, ranges, units. Types and checks only; the
arithmetic between physical units and the policy's is `svam.normalisation`.

Axis names: B batch, T frames of a clip, H W pixels, h w feature grid, C channels, N queries, K actions in a chunk,
A action dimensions, P proprioception dimensions, n time steps of one episode, m annotated frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from svam.conversion import Difference, Interval
from svam.errors import SvamError

if TYPE_CHECKING:
    import torch

STORE_SCHEMA = 3
"""Version of the episode store's layout; written into every store and checked when it is opened."""
CHECKPOINT_SCHEMA = 3
"""Version of the checkpoint layout; written into every `config.json` and checked when it is loaded."""

SEGMENTATION_CLASSES = ("background", "table", "arm", "gripper", "object", "fixture", "goal")
"""Names of the segmentation labels 0..6 (`annotations/segmentation`, uint8)."""
VECTORS = ("actions", "expert_actions", "state", "proprioception")
"""The float32 vectors of an episode, one row per time step; all are optional, but a policy needs actions."""


class ContractError(SvamError, ValueError):
    """Data that does not keep the contract; the message names the field, what was found and what was expected."""


class Frozen(BaseModel):
    """Base of the contract's own records: immutable and strict about their keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class VectorStatistics(Frozen):
    """Per-dimension statistics of a vector over the training episodes, in physical units. Each list has one entry
    per dimension; `q01` and `q99` are the 1 % and 99 % quantiles."""

    mean: list[float]
    std: list[float]
    min: list[float]
    max: list[float]
    q01: list[float]
    q99: list[float]
    count: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _one_length(self) -> VectorStatistics:
        lengths = {name: len(getattr(self, name)) for name in ("mean", "std", "min", "max", "q01", "q99")}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"statistics of different lengths: {lengths}")
        return self


def _nothing(value: Any) -> bool:
    return not value


class ActionConvention(Frozen):
    """What the numbers of an action mean, and how they are normalised for learning.

    binary_values: of the binary dimensions in the data set; here they are -1 and 1. The others are what the conversion made of
    the data set's actions, and `SVAM.act` undoes, see `svam.actions`. They are written only where there are such.
    """

    dimensions: Annotated[int, Field(ge=1)]
    binary_dimensions: list[int] = Field(default=[])
    normalisation: Literal["minmax", "quantile", "meanstd"]
    binary_values: list[float] | None = Field(default=None, exclude_if=_nothing)
    unwrap: list[Interval] = Field(default=[], exclude_if=_nothing)
    differences: list[Difference] = Field(default=[], exclude_if=_nothing)
    limits: list[Interval] = Field(default=[], exclude_if=_nothing)

    @model_validator(mode="after")
    def _binary_dimensions_exist(self) -> ActionConvention:
        outside = [d for d in self.binary_dimensions if not 0 <= d < self.dimensions]
        if outside:
            raise ValueError(f"binary_dimensions {outside} are outside 0..{self.dimensions - 1}")
        return self

    @property
    def changed(self) -> bool:
        """Whether actions here have other numbers than in the data set, to which `svam.actions.undone` leads back."""
        return bool(self.binary_values or self.unwrap or self.differences)


class Statistics(Frozen):
    """Normalisation statistics of a data set. Computed from training episodes only, carried in the policy's checkpoint."""

    convention: ActionConvention
    actions: VectorStatistics
    proprioception: VectorStatistics | None = None


@dataclass(frozen=True)
class Annotation:
    """Dense labels of some frames: `values` (m, H, W), `index` (m,) int64 frame numbers within the episode, increasing."""

    values: NDArray[Any]
    index: NDArray[np.int64]


@dataclass(frozen=True)
class FrameBlocks:
    """Frames of one camera that are read block by block, so that a long recording never lies in memory whole.

    shape: (n, H, W, 3). blocks: each call yields the frames from the first on, as (k, H, W, 3) uint8 blocks of any k; a
    reader may stop early. smaller: of (height, width), whole parts of H and W, the frames with pixels that are the means of so
    large areas, where a reader makes those with less work than whole ones; None where it does not.
    """

    shape: tuple[int, int, int, int]
    blocks: Callable[[], Iterator[NDArray[np.uint8]]]
    smaller: Callable[[int, int], FrameBlocks] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def dtype(self) -> np.dtype[np.uint8]:
        return np.dtype(np.uint8)

    @property
    def ndim(self) -> int:
        return len(self.shape)


Frames = NDArray[np.uint8] | FrameBlocks


def frame_blocks(frames: Frames) -> Iterator[NDArray[np.uint8]]:
    """The frames as blocks: an array is one block. Blocks that add up to another shape than stated raise `ContractError`."""
    if not isinstance(frames, FrameBlocks):
        yield frames
        return
    count = 0
    for block in frames.blocks():
        if block.dtype != np.uint8 or block.shape[1:] != frames.shape[1:]:
            raise ContractError(f"frame {count} is {block.dtype} {block.shape[1:]}, expected uint8 {frames.shape[1:]}")
        count += len(block)
        if count > len(frames):
            break
        yield block
    if count != len(frames):
        raise ContractError(f"{'more than ' * (count > len(frames))}{min(count, len(frames))} frames, expected {len(frames)}")


@dataclass(frozen=True)
class Episode:
    """One recorded episode, in physical units, whatever format it came from.

    frames: camera name -> (n, H, W, 3) uint8 RGB, an array or `FrameBlocks`; those to foresee come first.
    actions: (n, A) float32, what was executed from the state that frame t shows, or None where none were recorded;
        expert_actions: (n, A), what the demonstrator wanted, or None.
    state, proprioception: (n, S), (n, P) float32 or None.
    timestamps: (n,) float64 seconds, increasing, or None where the format has none.
    annotations: "depth" (metres, float32) and/or "segmentation" (uint8, `SEGMENTATION_CLASSES`), in the first camera's
        proportions.
    provenance: JSON values; `file` names the episode's file in messages.
    """

    task: str
    instruction: str
    rate_hz: float
    frames: Mapping[str, Frames]
    actions: NDArray[np.float32] | None
    expert_actions: NDArray[np.float32] | None = None
    state: NDArray[np.float32] | None = None
    proprioception: NDArray[np.float32] | None = None
    timestamps: NDArray[np.float64] | None = None
    annotations: Mapping[str, Annotation] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """n."""
        return len(next(iter(self.frames.values())))

    def check(self) -> None:
        """Raise `ContractError` unless lengths, dtypes, ranges and finiteness are as stated above."""
        where = f"episode {self.provenance.get('file', '')} of task {self.task!r}".replace("  ", " ")
        if not self.frames:
            raise ContractError(f"{where}: no camera")
        if not self.instruction.strip():
            raise ContractError(f"{where}: the instruction is empty, expected a sentence")
        n = self.steps
        if n == 0:
            raise ContractError(f"{where}: no time steps")
        for camera, images in self.frames.items():
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) != n:
                raise ContractError(
                    f"{where}: frames[{camera!r}] is {images.dtype} {images.shape}, expected uint8 ({n}, H, W, 3)"
                )
            if min(images.shape[1:3]) == 0:
                raise ContractError(f"{where}: frames[{camera!r}] is {images.shape}, which has no pixels")
        for name in VECTORS:
            values = getattr(self, name)
            if values is None:
                continue
            if values.dtype != np.float32 or values.ndim != 2 or len(values) != n:
                raise ContractError(f"{where}: {name} is {values.dtype} {values.shape}, expected float32 ({n}, dimensions)")
            if not np.isfinite(values).all():
                row, column = np.argwhere(~np.isfinite(values))[0]
                raise ContractError(f"{where}: {name}[{row}, {column}] is {values[row, column]}, expected a finite number")
            if values.shape[1] == 0:
                raise ContractError(f"{where}: {name} has no dimensions; leave it out instead")
        if self.expert_actions is not None and (self.actions is None or self.expert_actions.shape != self.actions.shape):
            shape = None if self.actions is None else self.actions.shape
            raise ContractError(f"{where}: expert_actions {self.expert_actions.shape} and actions {shape} differ")
        if (t := self.timestamps) is not None:
            if t.dtype != np.float64 or t.shape != (n,):
                raise ContractError(f"{where}: timestamps are {t.dtype} {t.shape}, expected float64 ({n},)")
            if not np.isfinite(t).all() or (np.diff(t) <= 0).any():
                at = int(np.flatnonzero(~np.isfinite(t) | (np.diff(t, prepend=-np.inf) <= 0))[0])
                raise ContractError(f"{where}: timestamps[{at}] is {t[at]:g}, expected a finite number above the one before")
        for name, annotation in self.annotations.items():
            self._check_annotation(f"{where}: annotations[{name!r}]", name, annotation, next(iter(self.frames.values())).shape)
        if self.rate_hz <= 0:
            raise ContractError(f"{where}: rate_hz is {self.rate_hz}, expected a positive number")

    @staticmethod
    def _check_annotation(where: str, name: str, annotation: Annotation, frames: Sequence[int]) -> None:
        (n, height, width, _), index, values = frames, annotation.index, annotation.values
        dtype = {"depth": np.float32, "segmentation": np.uint8}.get(name)
        if dtype is None:
            raise ContractError(f"{where}: unknown, expected 'depth' or 'segmentation'")
        if index.dtype != np.int64 or index.ndim != 1 or values.dtype != dtype or values.ndim != 3 or len(values) != len(index):
            raise ContractError(
                f"{where}: values are {values.dtype} {values.shape} and index is {index.dtype} {index.shape}, "
                f"expected {np.dtype(dtype)} (m, H, W) and int64 (m,)"
            )
        if len(index) and (index[0] < 0 or index[-1] >= n or (np.diff(index) <= 0).any()):
            raise ContractError(f"{where}: index must increase within 0..{n - 1}")
        if abs(values.shape[1] * width / height - values.shape[2]) > 1:
            raise ContractError(
                f"{where}: labels of {values.shape[2]} x {values.shape[1]} cannot cover pictures of {width} x {height} alone; "
                "store labels of all that a picture shows, in its proportions"
            )
        if name == "depth" and not (np.isfinite(values).all() and (values >= 0).all()):
            raise ContractError(f"{where}: a depth is negative or not finite, expected metres")
        if name == "segmentation" and len(values) and values.max() >= len(SEGMENTATION_CLASSES):
            raise ContractError(f"{where}: class {values.max()}, expected 0..{len(SEGMENTATION_CLASSES) - 1}")


class Choice(Frozen):
    """What `convert` chooses of a data set, in the same words for every source.

    episodes, drop, tasks, success and all that changes rows or vectors are applied by `svam.episodes.options`, through
    `EpisodeSource.shape`. A source applies the others: it never looks for a camera that is left out.

    cameras: names to read, those to foresee first; empty: all. Both forms of a name are accepted (with and without
        the format's prefix; see `svam.sources._choice.chosen_cameras`).
    rate_hz: steps a second in place of what the data set says. instruction: the sentence of all episodes, in place of theirs.
    missing_instruction: the sentence of episodes that have none. segments: `EpisodeShape.segments` may be stated, where a
        source would else refuse an episode whose sentence changes.
    """

    cameras: list[str] = []
    rate_hz: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    instruction: Annotated[str, Field(pattern=r"\S")] | None = None
    missing_instruction: Annotated[str, Field(pattern=r"\S")] | None = None
    segments: bool = False


EVERYTHING = Choice()
"""All cameras, and what the data set says."""


@dataclass(frozen=True)
class Segment:
    """Rows first..end - 1 of an episode, and what they show, in one or more sentences; the first is the task's name too."""

    first: int
    end: int
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class EpisodeShape:
    """What is known of an episode before its frames are decoded.

    steps: n. annotated: annotation name -> number of labelled frames. held_out: the data set's own split, None where it has
    none (then one is drawn). stamp: changes when the episode's file does, e.g. `svam.files.stamp`; in no output.
    name: by which `convert.episodes` and `convert.drop` may name it, beside its number: its file's, without the ending, or the
    format's own number for it; "" where there is none. task: as in `Episode`. success: whether the demonstration reached its
    goal, None where the format does not say. group: the same for episodes that share frames, which must be on one side of the
    split; "" where none do. segments: of an episode whose sentence changes, which becomes one episode for each.
    """

    steps: int
    annotated: Mapping[str, int] = field(default_factory=dict)
    held_out: bool | None = None
    stamp: str = ""
    name: str = ""
    task: str = ""
    success: bool | None = None
    group: str = ""
    segments: tuple[Segment, ...] = ()


class EpisodeSource(Protocol):
    """A reader of one data set format. It is sent to worker processes, so it holds no open file.

    `svam.sources.<name>` defines `Options`, a pydantic model of what `convert.options` may say, and
    `open_source(path: Path, options: Options, choice: Choice = EVERYTHING) -> EpisodeSource`. Libraries beyond the project's
    own are imported in functions. A source may have `names`, one for each episode: by these those that `shape` refuses can be
    left out, beside their numbers.
    """

    @property
    def notes(self) -> Sequence[str]:
        """Sentences a person should see before the conversion, for example what is left out."""
        ...

    def describe(self) -> SourceDescription:
        """What all episodes have in common, without reading their frames."""
        ...

    def __len__(self) -> int: ...

    def shape(self, index: int) -> EpisodeShape:
        """Lengths of one episode, cheaply: no picture is decoded, but every file that the episode needs is looked at.

        Raises:
            FileError, ContractError: it cannot be read; all that `shape` refuses are listed together, before any is read.
        """
        ...

    def read(self, index: int) -> Episode:
        """One episode, checked, with all cameras of `describe`. Its frames may be decoded only when they are asked for.

        Raises:
            FileError: a file is missing or damaged, lacks a field, or changed since the source was opened.
            ContractError: the episode breaks the contract.
        """
        ...


class SourceDescription(Frozen):
    """The facts a source states once: its rate, cameras, instructions and where it came from.

    instructions: task -> {"train": [...], "held_out": [...]}; held_out may be empty.
    """

    rate_hz: Annotated[float, Field(gt=0)]
    cameras: Annotated[list[str], Field(min_length=1)]
    instructions: dict[str, dict[str, list[str]]]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Observation:
    """What the robot sees now: camera name -> (H, W, 3) uint8 RGB, a sentence, and optionally (P,) float32 proprioception."""

    frames: Mapping[str, NDArray[np.uint8]]
    instruction: str
    proprioception: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Foresight:
    """What `encode` returns: context entry -> (B, T, h, w, C) float tensor, and text (B, L, D) float32 tokens.

    Entries are those of `train_policy.context` that are frozen: geometric, semantic, one_step, generated, goal_frame
    (T = 1), observation (T = 1), recorded.
    """

    entries: Mapping[str, torch.Tensor]
    text: torch.Tensor
