"""LeRobot data sets for tests: real ones, where they are, and written ones whose frames carry their number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from svam.contract import Choice, Episode
from svam.sources.lerobot import LerobotSource, Options, open_source
from tests.sources.common import film, frames_of

CAMERA = "observation.images.top"
V2 = {
    "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
}
V3 = {
    "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}


def picture(number: int, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """A picture that tells its number: bright bars where the bits of `number` are set."""
    bars = np.array([40 + 170 * (number >> bit & 1) for bit in range(8)], dtype=np.uint8)
    return np.repeat(np.broadcast_to(np.repeat(bars, size[1] // 8), (size[0], size[1] // 8 * 8))[..., None], 3, axis=2)


def pictures(numbers: Iterable[int]) -> list[np.ndarray]:
    return [picture(number) for number in numbers]


def number_of(frame: np.ndarray) -> int:
    """The inverse of `picture`, also after lossy coding."""
    columns = frame[..., 1].mean(axis=0).reshape(8, -1).mean(axis=1)
    return sum(1 << bit for bit, value in enumerate(columns) if value > 125)


def video_feature(**more: Any) -> dict[str, Any]:
    """A video feature of info.json."""
    return {"dtype": "video", "shape": [32, 48, 3], "names": ["height", "width", "channels"], **more}


def write_info(root: Path, version: str, features: dict[str, Any], **more: Any) -> None:
    """`meta/info.json`; a value of None leaves a key out."""
    (root / "meta").mkdir(parents=True, exist_ok=True)
    info = {"codebase_version": version, "robot_type": "arm", "fps": 10, "chunks_size": 1000, "features": features}
    info |= {**(V3 if version == "v3.0" else V2), **more}
    (root / "meta" / "info.json").write_text(json.dumps({k: v for k, v in info.items() if v is not None}))


def columns_of(episode: int, length: int, **more: Any) -> dict[str, Any]:
    """The parquet columns of an episode; action[t] = [100 episode + t, -t]."""
    t = np.arange(length)
    numbers = np.stack([100.0 * episode + t, -t], axis=1).astype(np.float32)
    columns = {
        "action": pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), 2),
        "observation.state": pa.array((numbers * 2).tolist(), pa.list_(pa.float32())),
        "timestamp": pa.array(t / np.float32(10), pa.float32()),
        "frame_index": pa.array(t), "episode_index": pa.array(np.full(length, episode)), "task_index": pa.array(t * 0),
    }  # fmt: skip
    return {name: value for name, value in {**columns, **more}.items() if value is not None}


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """An edit of info.json or of the first line of a JSON-lines file."""

    def changed(root: Path) -> None:
        file = root / "meta" / name
        first, *rest = file.read_text().split("\n")
        value = json.loads(first)
        change(value)
        file.write_text("\n".join([json.dumps(value), *rest]))

    return changed


def video_of(root: Path, episode: int) -> Path:
    """Where `write_v2` puts an episode's video."""
    return root / f"videos/chunk-000/{CAMERA}/episode_{episode:06d}.mp4"


def write_v2(
    root: Path,
    lengths: Sequence[int] = (5, 7),
    change: Callable[[int, int], dict[str, Any]] | None = None,
    info: dict[str, Any] | None = None,
    features: dict[str, Any] | None = None,
) -> Path:
    """A v2.1 set: frame t of episode e shows the number 16 e + t. change(episode, length): columns to replace."""
    write_info(root, "v2.1", features if features is not None else {CAMERA: video_feature()}, **(info or {}))
    with (root / "meta/episodes.jsonl").open("w") as file:
        for e, length in enumerate(lengths):
            file.write(json.dumps({"episode_index": e, "tasks": ["push the block"], "length": length}) + "\n")
    (root / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "push the block"}\n')
    for e, length in enumerate(lengths):
        path = root / f"data/chunk-000/episode_{e:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns_of(e, length, **(change(e, length) if change else {}))), path)
        film(video_of(root, e), pictures(16 * e + t for t in range(length)))
    return root


def write_v3(root: Path, lengths: Sequence[int] = (5, 7, 4), gop: int = 2, codec: str = "libx264", late: float = 0.0) -> Path:
    """A v3.0 set in one data file of several row groups and one video file; frame r of the file shows the number r."""
    write_info(root, "v3.0", {CAMERA: video_feature()}, total_episodes=len(lengths))
    tables = []
    for e, n in enumerate(lengths):
        times = pa.array(late + np.arange(n) / np.float32(10), pa.float32())
        tables.append(pa.table(columns_of(e, n, timestamp=times)))
    for place in ("data/chunk-000", "meta/episodes/chunk-000"):
        (root / place).mkdir(parents=True)
    pq.write_table(pa.concat_tables(tables), root / "data/chunk-000/file-000.parquet", row_group_size=4)
    video = root / f"videos/{CAMERA}/chunk-000/file-000.mp4"
    film(video, pictures(range(sum(lengths))), codec=codec, options={"g": str(gop)})
    ends = np.cumsum(lengths)
    zero = [0] * len(lengths)
    pq.write_table(
        pa.table({
            "episode_index": list(range(len(lengths))), "length": list(lengths), "tasks": [["push the block"]] * len(lengths),
            "data/chunk_index": zero, "data/file_index": zero,
            "dataset_from_index": ends - lengths, "dataset_to_index": ends,
            f"videos/{CAMERA}/chunk_index": zero, f"videos/{CAMERA}/file_index": zero,
            f"videos/{CAMERA}/from_timestamp": (ends - lengths) / 10, f"videos/{CAMERA}/to_timestamp": ends / 10,
        }),
        root / "meta/episodes/chunk-000/file-000.parquet",
    )  # fmt: skip
    tasks = {"task_index": [0], "__index_level_0__": ["push the block"]}
    pq.write_table(pa.table(tasks), root / "meta/tasks.parquet")
    return root


def numbers(episode: Episode) -> list[int]:
    """The numbers that an episode's frames show."""
    return [number_of(frame) for frame in frames_of(episode)]


def source(root: Path, **options: Any) -> LerobotSource:
    """Opened with what `convert` chooses and with `convert.options`."""
    chosen = {name: options.pop(name) for name in Choice.model_fields if name in options}
    return open_source(root, Options(**options), Choice(**chosen))
