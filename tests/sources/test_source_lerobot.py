"""The lerobot source: every frame, action and instruction against an independent read, on real sets and on written ones."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.sources.common import decoded, film, frames_of, real, refused
from tests.sources.lerobot_sets import (
    CAMERA,
    numbers,
    picture,
    pictures,
    source,
    video_feature,
    video_of,
    write_v2,
    write_v3,
)

# Real sets


@pytest.mark.parametrize(
    ("folder", "camera", "size"),
    [("lerobot_v2.1/cr5_grasp_cube", "top", (480, 640)), ("lerobot_v2.0/gr00t_robot_sim_PickNPlace", "ego_view", (256, 256))],
)
def test_real_sets_equal_an_independent_read(folder: str, camera: str, size: tuple[int, int]) -> None:
    """Row t's action goes with the t-th frame of the file, for all rows; also where timestamps begin at 0.05 s."""
    root = real(folder)
    data = source(root)
    lines = [json.loads(line) for line in (root / "meta/episodes.jsonl").read_text().splitlines()]
    assert len(data) == len(lines) == 5 and data.describe().cameras == [camera]
    for e, line in enumerate(lines):
        episode = data.read(e)
        table = pq.read_table(root / f"data/chunk-000/episode_{e:06d}.parquet").to_pydict()
        np.testing.assert_array_equal(episode.actions, np.array(table["action"], dtype=np.float32))
        np.testing.assert_array_equal(episode.proprioception, np.array(table["observation.state"], dtype=np.float32))
        np.testing.assert_array_equal(episode.timestamps, np.array(table["timestamp"], dtype=np.float64))
        assert episode.instruction == line["tasks"][0] and episode.steps == data.shape(e).steps == line["length"]
        frames = decoded(root / f"videos/chunk-000/observation.images.{camera}/episode_{e:06d}.mp4")
        assert frames.shape == (line["length"], *size, 3)
        np.testing.assert_array_equal(frames_of(episode, camera), frames)


def test_gr00t_says_what_it_copes_with() -> None:
    notes = source(real("lerobot_v2.0/gr00t_robot_sim_PickNPlace")).notes
    assert [any(word in note for note in notes) for word in ("observation.images.egoview", "data_path", "begin at 0.05 s")] == [
        True
    ] * 3
    with refused("egoview.*has no video files"):
        source(real("lerobot_v2.0/gr00t_robot_sim_PickNPlace"), cameras=["egoview"])


def test_v3_fixture_of_floats() -> None:
    root = real("lerobot_v3.0/ioai_fixture_v3")
    data = source(root)
    table = pq.read_table(root / "data/chunk-000/file-000.parquet").to_pydict()
    for e in range(2):
        episode = data.read(e)
        assert episode.instruction == "pick cube"
        np.testing.assert_array_equal(episode.actions, np.array(table["action"], np.float32)[3 * e : 3 * e + 3, None])
        frames = decoded(root / f"videos/observation.images.cam/chunk-000/file-{e:03d}.mp4")
        np.testing.assert_array_equal(frames_of(episode, "cam"), frames)


# Written sets: which frame goes with which row


def test_v2_rows_and_frames(tmp_path: Path) -> None:
    data = source(write_v2(tmp_path))
    for e, length in enumerate((5, 7)):
        episode = data.read(e)
        assert numbers(episode) == [16 * e + t for t in range(length)]
        np.testing.assert_array_equal(episode.actions, [[100 * e + t, -t] for t in range(length)])
        np.testing.assert_array_equal(episode.proprioception, 2 * episode.actions)
    assert data.notes == [] and data.describe().instructions == {
        "push the block": {"train": ["push the block"], "held_out": []}
    }


@pytest.mark.parametrize(("gop", "codec"), [(2, "libx264"), (250, "libx264"), (2, "libsvtav1")])
def test_v3_episodes_share_a_video_file(tmp_path: Path, gop: int, codec: str) -> None:
    """Decoding begins at a key frame before the episode, and takes exactly the frames of its span, B-frames or not."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    lengths = (5, 70, 4)
    root = write_v3(tmp_path, lengths, gop, codec)
    data = source(root)
    everything = decoded(root / f"videos/{CAMERA}/chunk-000/file-000.mp4")
    first = 0
    for e, length in enumerate(lengths):
        episode = data.read(e)
        np.testing.assert_array_equal(frames_of(episode), everything[first : first + length])
        assert numbers(episode) == list(range(first, first + length))
        np.testing.assert_array_equal(episode.actions[:, 0], 100 * e + np.arange(length))
        first += length


def test_v3_with_late_timestamps_never_shifts_a_frame(tmp_path: Path) -> None:
    data = source(write_v3(tmp_path, late=0.1))
    assert [numbers(data.read(e)) for e in range(3)] == [list(range(5)), list(range(5, 12)), list(range(12, 16))]
    assert data.read(1).provenance["timestamps_begin_late_s"] == {"top": pytest.approx(0.1)}


def test_a_trimmed_episode_is_found_by_its_timestamps(tmp_path: Path) -> None:
    """Rows were cut away but not frames: timestamps lead to the right frames, also with idle rows cut from the middle."""
    kept = ([0, 1, 3, 4, 5], list(range(2, 9)))
    root = write_v2(tmp_path, change=lambda e, n: {"timestamp": pa.array(np.array(kept[e]) / 10)})
    for e in range(2):
        film(video_of(root, e), pictures(range(12)))
    data = source(root)
    assert tuple(numbers(data.read(e)) for e in range(2)) == kept


@pytest.mark.parametrize(
    ("frames", "stamps", "message"),
    [
        (4, None, "row 4 of the episode is at 0.4 s.*4 frames.*5 rows"),
        (5, [0.0, 0.1, 0.26, 0.3, 0.4], "timestamp of row 2.*set convert.options.frames to 'order'"),
        (9, [0.05, 0.15, 0.25, 0.35, 0.45], "row 0 of the episode"),
        (9, [0.0, 0.05, 0.1, 0.15, 0.2], "0.05 s apart"),
        (9, [0.0, 0.1, 0.14, 0.24, 0.34], "rows 1 and 2 of the episode both fall on the frame at 0.1 s"),
        (5, [0.0, 0.1, 0.1, 0.2, 0.3], "timestamp of row"),
        (5, [0.0, 0.1, np.nan, 0.3, 0.4], "timestamp does not hold one finite number a row"),
    ],
)
def test_a_row_without_its_frame_is_refused(tmp_path: Path, frames: int, stamps: list[float] | None, message: str) -> None:
    root = write_v2(tmp_path, (5,), change=lambda e, n: {"timestamp": pa.array(stamps)} if stamps else {})
    film(video_of(root, 0), pictures(range(frames)))
    with refused(message):
        source(root).read(0)


def test_frames_in_order_on_request(tmp_path: Path) -> None:
    root = write_v2(tmp_path, change=lambda e, n: {"timestamp": pa.array(np.arange(n) * 0.17)})
    episode = source(root, frames="order").read(1)
    assert numbers(episode) == list(range(16, 23)) and episode.timestamps is None
    film(video_of(root, 1), pictures(range(8)))
    with refused("8 frames, but the episode has 7 rows"):
        source(root, frames="order").read(1)


# Written sets: columns, pictures, tasks


def test_pictures_inside_parquet_with_another_size(tmp_path: Path) -> None:
    """Two cameras of different kinds and sizes; PNG is lossless, so the pixels are equal; grey becomes RGB."""
    from PIL import Image

    def png(number: int, mode: str) -> bytes:
        buffer = BytesIO()
        Image.fromarray(picture(number, (16, 24))).convert(mode).save(buffer, "PNG")
        return buffer.getvalue()

    def change(e: int, n: int) -> dict[str, Any]:
        rows = [{"bytes": png(16 * e + t, "L" if e else "RGB"), "path": None} for t in range(n)]
        return {"observation.image": pa.array(rows), "secret": pa.array([pickle.dumps(list)] * n)}

    features = {CAMERA: video_feature(), "observation.image": {"dtype": "image", "shape": [16, 24, 3]}}
    data = source(write_v2(tmp_path, (5, 40), change, features=features), cameras=["image", CAMERA])
    assert data.describe().cameras == ["image", "top"]
    for e, n in enumerate((5, 40)):
        np.testing.assert_array_equal(frames_of(data.read(e), "image"), [picture(16 * e + t, (16, 24)) for t in range(n)])
    with refused("names 'wrist'.*declares top, image"):
        source(tmp_path, cameras=["wrist"])
    with refused(r"column 'secret' holds binary, expected numbers"):
        source(tmp_path, action=["secret"]).read(0)


def test_split_columns_are_joined_in_the_named_order(tmp_path: Path) -> None:
    def change(e: int, n: int) -> dict[str, Any]:
        return {
            "action": None, "observation.state": None,
            "action.arm": pa.array([[[t, t + 1], [t + 2, t + 3]] for t in range(n)], pa.list_(pa.list_(pa.int64()))),
            "action.gripper": pa.array([t % 2 == 0 for t in range(n)]),
            "observation.state.x": pa.array(np.arange(n) / 4), "observation.state.y": pa.array(np.arange(n), pa.int16()),
        }  # fmt: skip

    root = write_v2(tmp_path, change=change)
    with refused(r"options.action: column 'action' is not in .*has action.arm, action.gripper, observation"):
        source(root)
    data = source(root, action=["action.gripper", "action.arm"], proprioception=["observation.state.y", "observation.state.x"])
    episode = data.read(0)
    np.testing.assert_array_equal(episode.actions, [[t % 2 == 0, t, t + 1, t + 2, t + 3] for t in range(5)])
    np.testing.assert_array_equal(episode.proprioception, [[t, t / 4] for t in range(5)])
    assert source(root, action=[], proprioception=[]).read(0).actions is None


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([[0.0, 1.0], [0.0, np.nan], [0.0, 1.0]]), r"actions\[1, 1\] is nan"),
        (pa.array([[0.0, 1.0], [0.0, 1e300], [0.0, 1.0]]), r"actions\[1, 1\] is inf"),
        (pa.array([[0.0, 1.0], [0.0], [0.0, 1.0]]), "lists of 2 and of 1 numbers"),
        (pa.array([[0.0, 1.0], None, [0.0, 1.0]]), "lacks a value at row 1"),
        (pa.array([[], [], []], pa.list_(pa.float32())), "actions has no dimensions"),
    ],
)
def test_broken_actions_are_named(tmp_path: Path, column: Any, message: str) -> None:
    root = write_v2(tmp_path, (3,), change=lambda e, n: {"action": column})
    with refused(f"episode_000000.parquet.*{message}"):
        source(root).read(0)


def test_tasks(tmp_path: Path) -> None:
    """`task_index` decides where the metadata names several tasks; a column of sentences or one option can replace it."""
    root = write_v2(tmp_path, change=lambda e, n: {"task_index": pa.array([e] * n), "said": pa.array([f"say {e}"] * n)})
    lines = [{"episode_index": e, "tasks": ["a", "b", "valid"], "length": n} for e, n in enumerate((5, 7))]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "meta/tasks.jsonl").write_text("\n".join(json.dumps({"task_index": k, "task": t}) for k, t in enumerate("ab")))
    assert [source(root).read(e).instruction for e in range(2)] == ["a", "b"]
    assert source(root, instruction_column="said").read(1).instruction == "say 1"
    assert list(source(root, instruction="go").describe().instructions) == ["go"]
    lines[0]["tasks"] = ["b"]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with refused("task_index says 'a' for episode 0, but the metadata says 'b'"):
        source(root).read(0)
    (root / "meta/tasks.jsonl").unlink()
    with refused("episode 1 has no task; set convert.options.instruction"):
        source(root)


def test_an_episode_with_two_tasks_is_refused(tmp_path: Path) -> None:
    root = write_v2(tmp_path, change=lambda e, n: {"said": pa.array(["left"] * 2 + ["right"] * (n - 2))})
    with refused("changes its task at row 2 from 'left' to 'right'"):
        source(root, instruction_column="said")


@pytest.mark.parametrize(
    ("splits", "held_out", "note"),
    [
        (None, [None] * 3, ""), ({"train": "0:100"}, [None] * 3, ""),
        ({"train": "0:2", "test": "2:3"}, [False, False, True], ""),
        ({"train": "0:2", "val": "2:9"}, [False, False, True], ""), ({"train": "80%"}, [None] * 3, "not 'first:end'"),
    ],
)  # fmt: skip
def test_the_sets_own_split(tmp_path: Path, splits: Any, held_out: list[Any], note: str) -> None:
    data = source(write_v2(tmp_path, (2, 2, 2), info={"splits": splits}))
    assert [data.shape(e).held_out for e in range(3)] == held_out
    assert note in " ".join(data.notes)


def test_depth_is_left_out_and_dots_stay(tmp_path: Path) -> None:
    features = {
        "observation.images.depth": video_feature(info={"video.is_depth_map": True}), CAMERA: video_feature(),
        "observation.images.top.left": {"dtype": "video", "shape": [3, 2, 2], "names": None},
        "action": {"dtype": "float32", "shape": [2], "names": {"motors": ["pan", "lift"]}},
    }  # fmt: skip
    data = source(write_v2(tmp_path, features=features))
    assert data.describe().cameras == ["top"]
    assert "depth" in data.notes[0] and "top.left" in data.notes[1]
    assert data.describe().provenance["dimension_names"]["actions"] == ["pan", "lift"]


def test_part_of_the_episodes(tmp_path: Path) -> None:
    """The rest need not be there."""
    root = write_v2(tmp_path, (2, 3, 2), info={"total_episodes": 9})
    (root / "data/chunk-000/episode_000002.parquet").unlink()
    with refused("episode_000002.parquet: no such file, though the metadata lists episode 2"):
        source(root)
    data = source(root, episodes="1:2")
    assert len(data) == 1 and data.read(0).steps == 3 and "total_episodes is 9, but the episode list has 3" in data.notes[0]
    with refused("numbers are 0 to 2"):
        source(root, episodes="5:9")


# Damage


def _edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """An edit of info.json or of the first line of a JSON-lines file."""

    def edit(root: Path) -> None:
        file = root / "meta" / name
        first, *rest = file.read_text().split("\n")
        value = json.loads(first)
        change(value)
        file.write_text("\n".join([json.dumps(value), *rest]))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: shutil.rmtree(r / "meta"), "info.json: no such file.*no LeRobot data set"),
        (_edit("info.json", lambda i: i.update(codebase_version="v1.6")), "codebase_version is 'v1.6', this reader knows v2.0"),
        (_edit("info.json", lambda i: i.update(fps=0)), "fps is 0, expected a positive number"),
        (_edit("info.json", lambda i: i.update(features={})), "no camera is declared"),
        (_edit("info.json", lambda i: i.update(data_path="../{episode_index}")), "leads out of the data set"),
        (_edit("info.json", lambda i: i.update(data_path="{x}")), "unknown placeholder 'x'"),
        (_edit("episodes.jsonl", lambda i: i.update(episode_index=-1)), "episode_index is -1, expected 0 or more"),
        (_edit("episodes.jsonl", lambda i: i.update(episode_index=1)), "episode_index 1 is there twice"),
        (_edit("episodes.jsonl", lambda i: i.update(length=6)), "episode 0 has 5 rows, but the metadata says 6"),
        (lambda r: (r / "meta/episodes.jsonl").write_text(""), "lists no episodes"),
        (lambda r: (r / "meta/episodes.jsonl").write_bytes(b'{"tasks": ["\xff"]}'), "cannot be read as UTF-8"),
        (lambda r: (r / "meta/info.json").write_text("[" * 100_000), "not valid JSON"),
        (lambda r: video_of(r, 0).unlink(), "no such file, the video of camera 'top' in episode 0"),
        (lambda r: video_of(r, 0).write_bytes(b""), "truncated, damaged or no video"),
        (lambda r: video_of(r, 0).write_bytes(video_of(r, 0).read_bytes().replace(b"avc1", b"xxxx")), "codec that PyAV"),
        (lambda r: shutil.copy(r / "data/chunk-000/episode_000001.parquet", r / "data/chunk-000/episode_000000.parquet"),
         "episode 0 is not in it, it holds episodes 1 to 1"),
    ],
)  # fmt: skip
def test_damage_is_one_sentence(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    root = write_v2(tmp_path / "set")
    damage(root)
    with refused(message):
        source(root).read(0)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    root = write_v2(tmp_path)
    with refused("instruction_column: column 'words' is not in .*episode_000000.parquet"):
        source(root, instruction_column="words")
    with refused("options.state: column 'sim' is not in"):
        source(root, state=["sim"])


def test_overlapping_clips_of_v3_are_refused(tmp_path: Path) -> None:
    file = write_v3(tmp_path) / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    name = f"videos/{CAMERA}/from_timestamp"
    pq.write_table(table.set_column(table.schema.get_field_index(name), name, pa.array([0.0, 0.4, 1.2])), file)
    with refused(r"episode 0 ends at 0.5 s and episode 1 of the same file begins at 0.4 s"):
        source(tmp_path)
