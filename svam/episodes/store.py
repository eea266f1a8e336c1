"""The episode store: all episodes of a data set on one flat time axis, and its reader.

Layout of `episodes.zarr` (N rows = time steps of all episodes, E episodes, M annotated frames):

    frames/<camera>                    (N, H, W, 3) uint8     RGB
    actions                            (N, A)  float32        executed, physical units; absent where none were recorded
    expert_actions, state, proprioception  (N, ...) float32   optional; all vectors may be kept as float16
    timestamps                         (N,)    float64        seconds, increasing within an episode; optional
    episode_ends                       (E,) int64             row after each episode's last; increasing, the last is N
    episode_split                      (E,) uint8             0 train, 1 held out
    episode_task                       (E,) int64             index into `tasks`
    episode_checksums                  (E, 32) uint8          of each episode's values (`svam.episodes.checksums`)
    annotations/<name>/{values, index} (M, H, W), (M,) int64  depth (float32 metres) or segmentation (uint8); rows, increasing
    attributes                         `StoreAttributes`

All arrays are sharded Zarr v3, with codecs that every reader has, unless `convert.compression` says otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from svam.contract import STORE_SCHEMA, VECTORS, ContractError, Frozen, SourceDescription, Statistics
from svam.episodes.arrays import read_attributes
from svam.episodes.rows import RowReader
from svam.files import FileError
from svam.seeds import seed_of

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
"""The order is the number stored in `episode_split`."""


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
        rate_hz: steps per second. cameras: names, the first is the foresight camera. tasks: names.
        instructions: task -> {"train": [...], "held_out": [...]}. attributes: all that the store states.
        episode_ends, episode_split, episode_task: (E,) as in the layout above. provenance: of the source.
        episode_provenance: one mapping per episode. proprioception_dimensions or None.
        image_size: (H, W) of the foresight camera.
    """

    def __init__(self, path: Path) -> None:
        """See `open`."""
        self.path = Path(path)
        self.attributes = attributes = self._read_attributes()
        self.rate_hz, self.cameras = attributes.source.rate_hz, attributes.source.cameras
        self.instructions, self.provenance = attributes.source.instructions, attributes.source.provenance
        self.tasks = attributes.tasks
        self.episode_numbers, self.episode_names = attributes.episode_numbers, attributes.episode_names
        self.episode_instructions, self.episode_provenance = attributes.episode_instructions, attributes.episode_provenance
        self._frames = {camera: RowReader(self.path / "frames" / camera) for camera in self.cameras}
        present = [name for name in VECTORS if (self.path / name).exists() or (name == "actions" and attributes.statistics)]
        self._vectors = {name: RowReader(self.path / name) for name in present}
        self.episode_ends = self._whole("episode_ends", np.int64)
        self.episode_split = self._whole("episode_split", np.uint8)
        self.episode_task = self._whole("episode_task", np.int64)
        self._checksums = RowReader(self.path / "episode_checksums")
        self._timestamps = RowReader(self.path / "timestamps") if (self.path / "timestamps").exists() else None
        self._check_episodes()
        self._annotations = self._open_annotations()
        self._check_arrays()
        self.proprioception_dimensions = self._vectors["proprioception"].shape[1] if "proprioception" in self._vectors else None
        height, width = self._frames[self.cameras[0]].shape[1:3]
        self.image_size = (height, width)

    @classmethod
    def open(cls, path: Path) -> EpisodeStore:
        """Open and validate the store at `path`, without decompressing a frame.

        Raises:
            FileError: it is missing, of another schema version, or a file in it is missing, truncated or damaged.
            ContractError: lengths, dtypes or numbers contradict one another.
        """
        return cls(path)

    def _read_attributes(self) -> StoreAttributes:
        raw = read_attributes(self.path)
        version = raw.get("schema_version")
        if version != STORE_SCHEMA:
            raise FileError(
                f"{self.path}: schema_version is {version!r}, this code reads {STORE_SCHEMA}; convert again: "
                "dvc repro --force --single-item convert"
            )
        try:
            return StoreAttributes.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise FileError(f"{self.path / 'zarr.json'}: attribute {key}: {first['msg']}") from None

    def _whole(self, name: str, dtype: type[np.generic]) -> NDArray[Any]:
        reader = RowReader(self.path / name)
        if reader.dtype != dtype or len(reader.shape) != 1:
            raise ContractError(
                f"{self.path}: {name} is {reader.dtype} {reader.shape}, expected {np.dtype(dtype)} with one entry per episode"
            )
        return reader.read_range(0, len(reader))

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
        if self._checksums.shape != (episodes, 32) or self._checksums.dtype != np.uint8:
            found = f"{self._checksums.dtype} {self._checksums.shape}"
            raise ContractError(f"{self.path}: episode_checksums is {found}, expected uint8 ({episodes}, 32)")
        for name, limit in (("episode_split", len(SPLITS)), ("episode_task", len(self.tasks))):
            values = getattr(self, name)
            if values.min() < 0 or values.max() >= limit:
                raise ContractError(f"{self.path}: {name} holds {values.min()}..{values.max()}, expected 0..{limit - 1}")
        if not (self.episode_split == SPLITS.index("train")).any():
            raise ContractError(f"{self.path}: episode_split has no training episode")
        unknown = sorted(set(self.tasks) - set(self.instructions))
        if unknown:
            raise ContractError(f"{self.path}: instructions of task {unknown[0]!r} are missing")

    def _check_arrays(self) -> None:
        rows = len(self)
        for name, reader in self._readers().items():
            if name.startswith("frames/"):
                fits = len(reader.shape) == 4 and reader.shape[-1] == 3 and reader.dtype == np.uint8 and len(reader) == rows
                expected = f"uint8 ({rows}, H, W, 3)"
            elif name.startswith("annotations/"):
                fits, expected = len(reader.shape) == 3, "(M, H, W)"
            elif name == "timestamps":
                fits, expected = reader.shape == (rows,) and reader.dtype == np.float64, f"float64 ({rows},)"
            else:
                fits = len(reader.shape) == 2 and reader.dtype in (np.float32, np.float16) and len(reader) == rows
                expected = f"float32 or float16 ({rows}, dimensions)"
            if not fits:
                raise ContractError(f"{self.path}: {name} is {reader.dtype} {reader.shape}, expected {expected}")
            reader.check()
        if (statistics := self.attributes.statistics) is None:
            if "actions" in self._vectors:
                raise ContractError(f"{self.path}: there are actions, but no statistics of them")
            return
        for name, stated, vector in (
            ("actions", statistics.convention.dimensions, "actions"),
            ("statistics of actions", len(statistics.actions.mean), "actions"),
            ("statistics of proprioception", len(s.mean) if (s := statistics.proprioception) else 0, "proprioception"),
        ):
            found = self._vectors[vector].shape[1] if vector in self._vectors else 0
            if stated != found:
                raise ContractError(f"{self.path}: {name}: {stated} dimensions stated, {vector} has {found}")

    def _readers(self) -> dict[str, RowReader]:
        return {
            **{f"frames/{camera}": reader for camera, reader in self._frames.items()},
            **self._vectors,
            **({"timestamps": self._timestamps} if self._timestamps is not None else {}),
            **{f"annotations/{name}/values": annotated.reader for name, annotated in self._annotations.items()},
        }

    def _open_annotations(self) -> dict[str, AnnotatedRows]:
        folder = self.path / "annotations"
        found = {}
        for name in sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []:
            rows = self._whole(f"annotations/{name}/index", np.int64)
            reader = RowReader(folder / name / "values")
            inside = not len(rows) or (rows[0] >= 0 and rows[-1] < len(self) and bool((np.diff(rows) > 0).all()))
            if len(rows) != len(reader) or not inside:
                raise ContractError(
                    f"{self.path}: annotations/{name}/index must hold {len(reader)} increasing rows below {len(self)}"
                )
            found[name] = AnnotatedRows(rows, reader, np.arange(len(rows), dtype=np.int64))
        return found

    @property
    def statistics(self) -> Statistics:
        """Of the training episodes.

        Raises:
            ContractError: the store has no actions.
        """
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
        return [bytes(row).hex() for row in self._checksums.read_range(0, len(self._checksums))]

    def timestamps(self, rows: NDArray[np.int64]) -> NDArray[np.float64] | None:
        """(k,) float64 seconds of rows, or None where the source had none."""
        return None if self._timestamps is None else self._timestamps.read(rows)

    def __len__(self) -> int:
        """N, the number of rows."""
        return int(self.episode_ends[-1])

    def episodes(self, split: Split) -> NDArray[np.int64]:
        """Episode numbers of one side of the split, increasing.

        Raises:
            ContractError: no episode is held out.
        """
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
        """(k, H, W, 3) uint8 RGB of any rows in any order; `camera` defaults to the foresight camera.

        Raises:
            ContractError: the store has no such camera, or a row is out of range.
            FileError: a shard is damaged.
        """
        camera = self.cameras[0] if camera is None else camera
        if camera not in self._frames:
            raise ContractError(f"{self.path}: no camera {camera!r}; there are {', '.join(self.cameras)}")
        return self._frames[camera].read(rows)

    def has(self, name: str) -> bool:
        """Whether the store has the vector `name`."""
        return name in self._vectors

    def vector(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(k, D) float32 rows of `actions`, `expert_actions`, `state` or `proprioception`.

        Raises:
            ContractError: the store has no such vector, or a row is out of range.
            FileError: a shard is damaged.
        """
        if name not in self._vectors:
            raise ContractError(f"{self.path}: no vector {name!r}; there are {', '.join(self._vectors)}")
        return self._vectors[name].read(rows).astype(np.float32, copy=False)

    def annotation(self, name: str, split: Split | None = None) -> AnnotatedRows | None:
        """The labels `name` ("depth", "segmentation") of one side of the split (or of both), or None if there are none."""
        annotated = self._annotations.get(name)
        if annotated is None or split is None:
            return annotated
        mine = np.flatnonzero(self.episode_split[self.episode_of(annotated.rows)] == SPLITS.index(split))
        return AnnotatedRows(annotated.rows[mine], annotated.reader, annotated.places[mine])
