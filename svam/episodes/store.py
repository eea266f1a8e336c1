"""The reader of the episode store: all episodes of a data set on one flat time axis. README.md beside this file has the layout
(N rows = time steps of all episodes, E episodes, M annotated frames); `StoreAttributes` are the group's attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from svam.contract import STORE_SCHEMA, VECTORS, ContractError, Frozen, SourceDescription, Statistics
from svam.episodes.arrays import read_attributes
from svam.episodes.rows import RowReader
from svam.files import FileError, stated
from svam.seeds import seed_of

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
"""The order is the number stored in `episode_split`."""
SETS = "sets.json"
"""The index of a folder that holds the stores of several sets."""


class StoreAttributes(Frozen):
    """What the store states beside its arrays; `source` is the source's own description."""

    schema_version: int
    source: SourceDescription
    notes: list[str]
    """What the conversion did that a person should know."""
    compression: str
    picture_error: dict[str, Any] | None
    """Of lossy frames: the quality, and by camera the mean absolute error and PSNR against the source."""
    tasks: list[str]
    episode_numbers: list[int]
    episode_names: list[str]
    """By both `convert.episodes` and `convert.drop` may call them: the source's numbers, and names, "" where there are none."""
    episode_instructions: list[str]
    episode_provenance: list[dict[str, Any]]
    statistics: Statistics | None
    arrays_sha256: dict[str, str]
    """Of each array's metadata, which state the sizes of its files."""
    foreseen: Annotated[int, Field(ge=1)] = 1
    """How many of the source's cameras, the first ones, are foresight cameras; stated where there are several."""


class AnnotatedRows(NamedTuple):
    """Dense labels of some frames: `rows` (m,) int64 row numbers, increasing, and their values by index 0..m - 1."""

    rows: NDArray[np.int64]
    reader: RowReader
    places: NDArray[np.int64]

    def values(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """(k, H, W) labels of the frames `rows[indices]`: float32 metres (depth) or uint8 classes (segmentation)."""
        return self.reader.read(self.places[indices])


class EpisodeStore:
    """A validated, read-only view of one store. Holds no open file: it may be pickled and used in any process.

    Attributes:
        rate_hz: steps per second. cameras: names. foreseen: those of the foresight cameras, the first ones. tasks: names.
        instructions: task -> {"train": [...], "held_out": [...]}. attributes: all that the store states.
        arrays: readers of all arrays, by name ("frames/front").
        episode_ends, episode_split, episode_task: (E,) as in the layout. provenance: of the source.
        episode_provenance: one mapping per episode. proprioception_dimensions or None.
        image_size: (H, W) of each foresight camera.

    A picture's number is that of its row plus k N, where k is its camera's place among the foresight cameras.
    """

    def __init__(self, path: Path) -> None:
        """See `svam.episodes.joined.open_store`; of one set alone."""
        self.path = Path(path)
        self.attributes = attributes = self._read_attributes()
        self.rate_hz, self.cameras = attributes.source.rate_hz, attributes.source.cameras
        self.foreseen = self.cameras[: attributes.foreseen]
        self.instructions, self.provenance = attributes.source.instructions, attributes.source.provenance
        self.tasks = attributes.tasks
        self.episode_numbers, self.episode_names = attributes.episode_numbers, attributes.episode_names
        self.episode_instructions, self.episode_provenance = attributes.episode_instructions, attributes.episode_provenance
        self.arrays = {name: RowReader(self.path / name) for name in attributes.arrays_sha256}
        self.episode_ends, self.episode_split = self._whole("episode_ends"), self._whole("episode_split")
        self.episode_task = self._whole("episode_task")
        self._check_episodes()
        self._annotations = self._open_annotations()
        self._check_arrays()
        self.proprioception_dimensions = self.arrays["proprioception"].shape[1] if self.has("proprioception") else None
        height, width = self.arrays[f"frames/{self.cameras[0]}"].shape[1:3]
        self.image_size = (height, width)

    sets: Mapping[str, EpisodeStore] = {}
    """The stores of several sets by name, see `svam.episodes.joined.JoinedStore`; here none."""

    def _read_attributes(self) -> StoreAttributes:
        if (self.path / SETS).is_file():
            names = sorted(folder.name for folder in self.path.iterdir() if folder.is_dir())
            raise FileError(f"{self.path}: holds several sets, each a store: name one, such as {self.path / names[0]}")
        raw = read_attributes(self.path)
        version = raw.get("schema_version")
        if version != STORE_SCHEMA:
            raise FileError(
                f"{self.path}: schema_version is {version!r}, this code reads {STORE_SCHEMA}; convert again: "
                "dvc repro --force --single-item convert"
            )
        return stated(StoreAttributes, raw, self.path / "zarr.json")

    def _whole(self, name: str) -> NDArray[Any]:
        return self.arrays[name].read_range(0, len(self.arrays[name]))

    def _check_episodes(self) -> None:
        ends, episodes = self.episode_ends, len(self.episode_ends)
        steps = np.diff(ends, prepend=0)
        if not episodes or (steps <= 0).any():
            at = int(np.flatnonzero(steps <= 0)[0]) if episodes else 0
            raise ContractError(
                f"{self.path}: episode_ends must increase from above 0"
                + (f", but episode {at} ends at row {ends[at]}" if episodes else ", but there are no episodes")
            )
        for name in (f"episode_{what}" for what in ("split", "task", "numbers", "names", "instructions", "provenance")):
            if len(getattr(self, name)) != episodes:
                raise ContractError(f"{self.path}: {name} has {len(getattr(self, name))} entries, episode_ends has {episodes}")
        for name, limit in (("episode_split", len(SPLITS)), ("episode_task", len(self.tasks))):
            values = getattr(self, name)
            if values.min() < 0 or values.max() >= limit:
                raise ContractError(f"{self.path}: {name} holds {values.min()}..{values.max()}, expected 0..{limit - 1}")
        if not (self.episode_split == SPLITS.index("train")).any():
            raise ContractError(f"{self.path}: episode_split has no training episode")

    def _check_arrays(self) -> None:
        """All files are there, of the size and with as many rows as stated. That dtypes and shapes are those that were written
        says the SHA-256 of each array's metadata."""
        for name, reader in self.arrays.items():
            if not name.startswith(("annotations/", "episode_")) and len(reader) != len(self):
                raise ContractError(f"{self.path}: {name} has {len(reader)} rows, by episode_ends there are {len(self)}")
            reader.check()

    def _open_annotations(self) -> dict[str, AnnotatedRows]:
        found = {}
        for name in sorted({name.split("/")[1] for name in self.arrays if name.startswith("annotations/")}):
            rows, reader = self._whole(f"annotations/{name}/index"), self.arrays[f"annotations/{name}/values"]
            inside = not len(rows) or (rows[0] >= 0 and rows[-1] < len(self) and bool((np.diff(rows) > 0).all()))
            if len(rows) != len(reader) or not inside:
                raise ContractError(
                    f"{self.path}: annotations/{name}/index must hold {len(reader)} increasing rows below {len(self)}"
                )
            found[name] = AnnotatedRows(rows, reader, np.arange(len(rows), dtype=np.int64))
        return found

    @property
    def statistics(self) -> Statistics:
        """Of the training episodes; `ContractError` where the store has no actions."""
        if self.attributes.statistics is None:
            raise ContractError(
                f"{self.path}: its episodes have no actions; it can feed the stages up to distill, but no policy "
                "(leave train_policy, evaluate and report out: dvc repro distill)"
            )
        return self.attributes.statistics

    @property
    def action_dimensions(self) -> int:
        """A; raises `ContractError` where the store has no actions."""
        return self.statistics.convention.dimensions

    def episode_checksums(self) -> list[str]:
        """Hexadecimal checksum of each episode's values, as they were when the store was written."""
        return [bytes(row).hex() for row in self._whole("episode_checksums")]

    def timestamps(self, rows: NDArray[np.int64]) -> NDArray[np.float64] | None:
        """(k,) float64 seconds of rows, or None where the source had none."""
        return self.arrays["timestamps"].read(rows) if "timestamps" in self.arrays else None

    def __len__(self) -> int:
        """N, the number of rows."""
        return int(self.episode_ends[-1])

    def episodes(self, split: Split) -> NDArray[np.int64]:
        """Episode numbers of one side of the split, increasing; `ContractError` where no episode is held out."""
        if not len(episodes := np.flatnonzero(self.episode_split == SPLITS.index(split))):
            raise ContractError(f"{self.path}: no episode is held out, which this needs; convert at least two episodes")
        return episodes

    def bounds(self, episode: int) -> tuple[int, int]:
        """First row of an episode and the row after its last."""
        return int(self.episode_ends[episode - 1]) if episode else 0, int(self.episode_ends[episode])

    def episode_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The episode that each row belongs to."""
        return np.searchsorted(self.episode_ends, rows, side="right").astype(np.int64)

    def rows(self, split: Split) -> NDArray[np.int64]:
        """All rows of one side of the split, increasing."""
        return np.concatenate([np.arange(*self.bounds(int(e)), dtype=np.int64) for e in self.episodes(split)])

    def pictures(self, split: Split) -> NDArray[np.int64]:
        """The numbers of all pictures of one side of the split, one foresight camera's after the other's."""
        return np.concatenate([self.rows(split) + k * len(self) for k in range(len(self.foreseen))])

    def task_of(self, episode: int) -> str:
        """The task's name."""
        return self.tasks[int(self.episode_task[episode])]

    def instruction_of(self, episode: int, seed: int | None = None) -> str:
        """The episode's own instruction; with `seed`, one of its task's training paraphrases, drawn by seed and episode.

        Never a held-out paraphrase. A task without a list of paraphrases has only its episodes' own.
        """
        choices = self.instructions[self.task_of(episode)].get("train", [])
        if seed is None or not choices:
            return self.episode_instructions[episode]
        return choices[seed_of(seed, "instruction", episode) % len(choices)]

    def frames(self, rows: NDArray[np.int64], camera: str | None = None) -> NDArray[np.uint8]:
        """(k, H, W, 3) uint8 RGB of any rows in any order. Without `camera`, `rows` are the numbers of pictures: those below N
        are of the first foresight camera.

        Raises:
            ContractError: the store has no such camera, or a row is out of range.
            FileError: a shard is damaged.
        """
        if camera is None and len(self.foreseen) > 1:
            numbers, own = np.divmod(rows, len(self))
            if len(rows) and not 0 <= numbers.min() <= numbers.max() < len(self.foreseen):
                last = len(self) * len(self.foreseen) - 1
                raise ContractError(f"{self.path}: pictures {rows.min()}..{rows.max()} were asked for, there are 0..{last}")
            frames = np.empty((len(rows), *self.image_size, 3), dtype=np.uint8)
            for k in np.unique(numbers):
                frames[numbers == k] = self.frames(own[numbers == k], self.foreseen[k])
            return frames
        camera = self.cameras[0] if camera is None else camera
        if camera not in self.cameras:
            raise ContractError(f"{self.path}: no camera {camera!r}; there are {', '.join(self.cameras)}")
        return self.arrays[f"frames/{camera}"].read(rows)

    def seen(self, rows: NDArray[np.int64], cameras: Sequence[str] = ()) -> NDArray[np.uint8]:
        """(..., V H, W, 3) uint8: what `cameras`, or all V foresight cameras, saw at rows (...), below one another; raises as
        `frames`."""
        flat = rows.reshape(-1)
        parts = [self.frames(flat, camera) for camera in cameras or self.foreseen]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        return joined.reshape(*rows.shape, *joined.shape[1:])

    def targets(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(k, A) float32 that a policy imitates: the expert's choice where the data states it, else what was executed."""
        return self.vector("expert_actions" if self.has("expert_actions") else "actions", rows)

    def drawn(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """`rows`, or pictures' numbers, as training draws them: here each once; of several sets by their weights."""
        return rows

    def shares(self, split: Split) -> list[tuple[int, int]]:
        """Of each set, one after the other: rows of one side of the split, and how many of their pictures are `drawn`."""
        rows = int(np.diff(self.episode_ends, prepend=0)[self.episode_split == SPLITS.index(split)].sum())
        return [(rows, rows * len(self.foreseen))]

    def acting_episodes(self, split: Split) -> NDArray[np.int64]:
        """`episodes` that a policy learns from: here all of that side."""
        return self.episodes(split)

    def by_statistics(self, rows: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], Statistics]]:
        """Places in `rows` and the statistics by which their vectors are normalised: one pair for each set."""
        return [(np.arange(len(rows)), self.statistics)]

    def has(self, name: str) -> bool:
        """Whether the store has the vector `name`."""
        return name in VECTORS and name in self.arrays

    def vector(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(k, D) float32 rows of `actions`, `expert_actions`, `state` or `proprioception`.

        Raises:
            ContractError: the store has no such vector, or a row is out of range.
            FileError: a shard is damaged.
        """
        if not self.has(name):
            raise ContractError(f"{self.path}: no vector {name!r}; there are {', '.join(filter(self.has, VECTORS))}")
        return self.arrays[name].read(rows).astype(np.float32, copy=False)

    def annotation(self, name: str, split: Split | None = None) -> AnnotatedRows | None:
        """The labels `name` ("depth", "segmentation") of one side of the split (or of both), or None if there are none."""
        annotated = self._annotations.get(name)
        if annotated is None or split is None:
            return annotated
        mine = np.flatnonzero(self.episode_split[self.episode_of(annotated.rows)] == SPLITS.index(split))
        return AnnotatedRows(annotated.rows[mine], annotated.reader, annotated.places[mine])
