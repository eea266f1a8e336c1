"""The lerobot source: every frame, action and instruction against an independent read, on real sets and on written ones."""

from __future__ import annotations

import json
import pickle
import re
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
    edit,
    number_of,
    numbers,
    picture,
    pictures,
    source,
    video_feature,
    video_of,
    write_info,
    write_v2,
    write_v3,
)

ORDER = "set convert.options.frames to 'order'"

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
    for e, line in ((0, lines[0]), (4, lines[4])):
        episode = data.read(e)
        table = pq.read_table(root / f"data/chunk-000/episode_{e:06d}.parquet").to_pydict()
        np.testing.assert_array_equal(episode.actions, np.array(table["action"], dtype=np.float32))
        np.testing.assert_array_equal(episode.proprioception, np.array(table["observation.state"], dtype=np.float32))
        np.testing.assert_array_equal(episode.timestamps, np.array(table["timestamp"], dtype=np.float64))
        assert episode.instruction == line["tasks"][0] and episode.steps == data.shape(e).steps == line["length"]
        frames = decoded(root / f"videos/chunk-000/observation.images.{camera}/episode_{e:06d}.mp4")
        assert frames.shape == (line["length"], *size, 3)
        np.testing.assert_array_equal(frames_of(episode, camera), frames)


# Written sets: which frame goes with which row


def test_v2_rows_and_frames(tmp_path: Path) -> None:
    data = source(write_v2(tmp_path))
    for e, length in enumerate((5, 7)):
        episode = data.read(e)
        assert numbers(episode) == [16 * e + t for t in range(length)]
        np.testing.assert_array_equal(episode.actions, [[100 * e + t, -t] for t in range(length)])
        np.testing.assert_array_equal(episode.proprioception, 2 * episode.actions)
    assert data.notes == [] and list(data.describe().instructions) == ["push the block"]


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
    """Rows were cut away but not frames: timestamps lead to the right frames, also with idle rows cut from the middle; a note
    gives both numbers."""
    kept = ([0, 1, 3, 4, 5], list(range(2, 9)))
    root = write_v2(tmp_path, change=lambda e, n: {"timestamp": pa.array(np.array(kept[e]) / 10)})
    for e in range(2):
        film(video_of(root, e), pictures(range(12)))
    data = source(root)
    assert tuple(numbers(data.read(e)) for e in range(2)) == kept
    assert "episode_000000.mp4: 12 frames, but episode 0 has 5 rows, and 1 more alike; the timestamps say" in data.notes[0]


@pytest.mark.parametrize(
    ("frames", "stamps", "message"),
    [
        (4, None, "row 4 of the episode is at 0.4 s.*4 frames.*5 rows"),
        (5, [0.0, 0.1, 0.26, 0.3, 0.4], f"timestamp of row 2.*{ORDER}"),
        (9, [0.05, 0.15, 0.25, 0.35, 0.45], "row 0 of the episode"),
        (9, [0.0, 0.05, 0.1, 0.15, 0.2], f"0.05 s apart.*fps 10; set convert.rate_hz to 20.*{ORDER}"),
        (9, [0.0, 0.1, 0.14, 0.24, 0.34], "rows 1 and 2 of the episode both fall on the frame at 0.1 s"),
        (5, [0.0, 0.1, 0.1, 0.2, 0.3], f"timestamps of episode 0 do not increase;.*{ORDER}"),
        (5, [0.0, 0.1, np.nan, 0.3, 0.4], f"timestamp does not hold one finite number a row.*{ORDER}"),
        (5, [0, 100, 200, 300, 400], f"100 s apart.*{ORDER}"),
        (5, np.float32(1.7e9 + np.arange(5) / 10), f"0 s apart.*{ORDER}"),
        (5, np.arange(5).astype("datetime64[ns]"), rf"holds timestamp\[ns\].*{ORDER}"),
    ],
)
def test_a_row_without_its_frame_is_refused_before_anything_is_read(
    tmp_path: Path, frames: int, stamps: Any, message: str
) -> None:
    root = write_v2(tmp_path, (5,), change=lambda e, n: {} if stamps is None else {"timestamp": pa.array(stamps)})
    film(video_of(root, 0), pictures(range(frames)))
    with refused(message):
        source(root).shape(0)


def test_a_video_at_another_rate_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    root = write_v2(tmp_path)
    film(video_of(root, 1), pictures(range(16, 23)), fps=30)
    with refused(f"frame 1 comes 0.0333333 s after its first, but the timestamp of row 1 0.1 s.*{ORDER}"):
        source(root).shape(1)
    assert source(root, frames="order").shape(1).steps == source(root, rate_hz=10).shape(1).steps == 7


def test_frames_in_order_and_the_rate(tmp_path: Path) -> None:
    """`order` says that the rate may be wrong; `convert.rate_hz` replaces it, then with the timestamps."""
    root = write_v2(tmp_path, change=lambda e, n: {"timestamp": pa.array(np.arange(n) * 0.2)})
    data = source(root, frames="order")
    episode, _ = data.read(1), data.shape(0)
    assert numbers(episode) == list(range(16, 23)) and episode.timestamps is None
    assert "0.2 s apart in episode 1" in data.notes[0] and "stored at 10 Hz, which convert.rate_hz replaces" in data.notes[0]
    stated = source(root, rate_hz=5)
    episode = stated.read(1)
    assert numbers(episode) == list(range(16, 23)) and episode.rate_hz == stated.describe().rate_hz == 5 and stated.notes == []
    np.testing.assert_array_equal(episode.timestamps, np.arange(7) * 0.2)
    film(video_of(root, 1), pictures(range(8)))
    with refused("8 frames, but the episode has 7 rows"):
        source(root, frames="order").read(1)


@pytest.mark.parametrize("frames", ["timestamps", "order"])
def test_a_rate_that_is_a_little_wrong_is_noted(tmp_path: Path, frames: str) -> None:
    """Recorded at 8 Hz, said to be 10; and 9.8 Hz, which clocks account for."""
    stamps = (np.arange(7) / np.float32(8), np.arange(7) / 9.8)
    root = write_v2(tmp_path, (7, 7), change=lambda e, n: {"timestamp": pa.array(stamps[e].astype(np.float32))})
    for e in range(2):
        film(video_of(root, e), pictures(range(7)), fps=8 if e == 0 else 10)
    data = source(root, frames=frames)
    assert [data.shape(e).steps for e in range(2)] == [7, 7]
    (note,) = data.notes
    assert "0.125 s apart in episode 0, but" in note and "says fps 10; it is stored at 10 Hz, which convert" in note


@pytest.mark.parametrize(
    ("stamps", "note"),
    [
        (
            (np.arange(7) * 200).astype("datetime64[ms]"),
            "timestamps are 0.2 s apart in episode 0, but .* says fps 10; it is stored",
        ),
        (pa.array(np.arange(7), pa.int32()).cast(pa.time32("s")), "timestamps are 1 s apart in episode 0, but .* says fps 10"),
        ((np.arange(7) * 100).astype("datetime64[ms]"), ""),
        (np.full(7, np.nan), "timestamp does not hold one finite number a row; nothing compares it with the rate, 10 Hz$"),
    ],
)
def test_times_that_are_not_used_still_tell_of_a_wrong_rate(tmp_path: Path, stamps: Any, note: str) -> None:
    data = source(write_v2(tmp_path, (7,), change=lambda e, n: {"timestamp": pa.array(stamps)}), frames="order")
    assert numbers(data.read(0)) == list(range(7)) and data.read(0).timestamps is None
    assert len(data.notes) == bool(note) and re.search(note, " ".join(data.notes))


# Written sets: columns, pictures


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
    with refused("convert.cameras names 'wrist', but .*info.json has top, image"):
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
    with refused("instruction_column: column 'words' is not in .*episode_000000.parquet"):
        source(root, action=[], proprioception=[], instruction_column="words")
    data = source(root, action=["action.gripper", "action.arm"], proprioception=["observation.state.y", "observation.state.x"])
    episode = data.read(0)
    np.testing.assert_array_equal(episode.actions, [[t % 2 == 0, t, t + 1, t + 2, t + 3] for t in range(5)])
    np.testing.assert_array_equal(episode.proprioception, [[t, t / 4] for t in range(5)])
    assert source(root, action=[], proprioception=[]).read(0).actions is None
    features = {"action.arm": {"shape": [2, 2]}, "action.gripper": {"shape": [1], "names": ["grip"]}}
    write_info(root, "v2.1", {CAMERA: video_feature(), **features})
    for columns, names in ((["action.gripper"], ["grip"]), (["action.arm", "action.gripper"], [])):
        assert source(root, action=columns, proprioception=[]).describe().provenance["dimension_names"]["actions"] == names


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([[0.0, 1.0], [0.0, np.nan], [0.0, 1.0]]), r"actions\[1, 1\] is nan"),
        (pa.array([[0.0, 1.0], [0.0, 1e300], [0.0, 1.0]]), r"actions\[1, 1\] is inf"),
        (pa.array([[0.0, 1.0], [0.0], [0.0, 1.0]]), "lists of 1 and of 2 numbers"),
        (pa.array([[0.0, 1.0], None, [0.0, 1.0]]), "lacks a value at row 1"),
        (pa.array([[], [], []], pa.list_(pa.float32())), "actions has no dimensions"),
    ],
)
def test_broken_actions_are_named(tmp_path: Path, column: Any, message: str) -> None:
    root = write_v2(tmp_path, (3,), change=lambda e, n: {"action": column})
    with refused(f"episode_000000.parquet.*{message}"):
        source(root).read(0)


def test_depth_is_left_out_and_dots_stay(tmp_path: Path) -> None:
    features = {
        "observation.images.depth": video_feature(info={"video.is_depth_map": True}),
        CAMERA: video_feature(dtype="VIDEO", info={"video.is_depth_map": "False"}),
        "observation.images.top.left": {"dtype": "video", "shape": [3, 2, 2], "names": None},
        "action": {"dtype": "float32", "shape": [2], "names": {"motors": ["pan", "lift"]}},
    }  # fmt: skip
    data = source(write_v2(tmp_path, features=features, info={"codebase_version": "2.1"}))
    assert data.describe().cameras == ["top"]
    assert "depth" in data.notes[0] and "top.left" in data.notes[1]
    assert data.describe().provenance["dimension_names"]["actions"] == ["pan", "lift"]


def test_missing_files_are_all_named_and_the_rest_is_read(tmp_path: Path) -> None:
    root = write_v2(tmp_path, (2, 3, 2), info={"total_episodes": 9})
    (root / "data/chunk-000/episode_000000.parquet").unlink()
    for e in (0, 2):
        video_of(root, e).unlink()
    data = source(root)
    missing = "episode_000000.parquet, .*episode_000000.mp4 .the video of camera 'top'.: no such file"
    with refused(f"{missing}.*lists episode 0; data/chunk-000 holds episode_000001.parquet"):
        data.shape(0)
    with refused("episode_000002.mp4 .*: no such file"):
        data.shape(2)
    assert data.names == ["0", "1", "2"] and data.shape(1).name == "1" and data.read(1).steps == 3
    assert list(data.describe().instructions) == ["push the block"]
    assert "total_episodes is 9, but the episode list has 3" in data.notes[0]


# Written sets: where pictures lie, and what they are


def test_a_camera_that_is_left_out_is_never_looked_for(tmp_path: Path) -> None:
    features = {CAMERA: video_feature(), "observation.images.side": video_feature()}
    root = write_v2(tmp_path, features=features)
    shutil.copytree(video_of(root, 0).parent, video_of(root, 0).parent.with_name("observation.images.side"))
    (video_of(root, 1).parent.with_name("observation.images.side") / "episode_000001.mp4").unlink()
    with refused("observation.images.side/episode_000001.mp4"):
        source(root).shape(1)
    for name in ("top", CAMERA):
        data = source(root, cameras=[name])
        assert data.shape(1).steps == 7 and list(data.read(1).frames) == ["top"] and data.notes == []


def test_pictures_are_read_from_where_they_lie(tmp_path: Path) -> None:
    """Whatever `dtype` says: lists of numbers, channels first or last, with transparency, flat or not; paths; videos."""
    from PIL import Image

    shapes = {
        "chw": [3, 16, 24], "rgba": [16, 24, 4], "flat": [16, 24, 3], "grey": [16, 24, 1], "floats": [16, 24, 3],
        "paths": [16, 24, 3],
    }  # fmt: skip

    def stored(n: int) -> dict[str, Any]:
        rgb = np.stack([picture(t, (16, 24)) for t in range(n)])
        arrays = {
            "chw": rgb.transpose(0, 3, 1, 2), "rgba": np.concatenate([rgb, rgb[..., :1]], axis=-1),
            "flat": rgb.reshape(n, -1), "grey": rgb[..., :1], "floats": rgb / 1.0,
            "paths": np.array([f"images/{t}.png" for t in range(n)]),
        }  # fmt: skip
        (tmp_path / "images").mkdir()
        for path, pixels in zip(arrays["paths"], rgb, strict=True):
            Image.fromarray(pixels).save(tmp_path / path)
        return {f"observation.images.{name}": pa.array(values.tolist()) for name, values in arrays.items()}

    features: dict[str, Any] = {CAMERA: {"dtype": "image", "shape": [32, 48, 3]}}
    features |= {
        f"observation.images.{k}": {"dtype": "video" if k == "chw" else "uint8", "shape": v} for k, v in shapes.items()
    }
    data = source(write_v2(tmp_path, (5,), lambda e, n: stored(n), features=features))
    episode = data.read(0)
    assert list(episode.frames) == ["top", *shapes] and numbers(episode) == list(range(5))
    for name in shapes:
        np.testing.assert_array_equal(frames_of(episode, name), [picture(t, (16, 24)) for t in range(5)])
    (tmp_path / "images/0.png").unlink()
    with refused("'images/0.png', which is not in the data set; to leave this camera out, set convert.cameras: .top, chw,"):
        data.shape(0)
    assert len(data.notes) == 3 and "dtype 'image', but its pictures lie in videos" in data.notes[0]
    assert "images.flat' are flat lists, taken as (16, 24, 3), the feature's shape in meta/info.json" in data.notes[2]
    assert "chw' is of dtype 'video', but its pictures lie in a column" in data.notes[1]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "gray16be"])
def test_depth_without_a_flag_is_named_with_the_way_out(tmp_path: Path, kind: str) -> None:
    from PIL import Image

    def change(e: int, n: int) -> dict[str, Any]:
        if kind == "gray16be":
            far = video_of(tmp_path, e).parent.with_name("observation.images.far")
            film(far / f"episode_{e:06d}.mp4", pictures(range(n)), codec="png", pix_fmt=kind)
            return {}
        Image.fromarray(np.zeros((8, 8), np.uint16)).save(buffer := BytesIO(), kind)
        return {"observation.images.far": pa.array([{"bytes": buffer.getvalue()}] * n)}

    dtype = "video" if kind == "gray16be" else "image"
    root = write_v2(tmp_path, change=change, features={CAMERA: video_feature(), "observation.images.far": {"dtype": dtype}})
    with refused("is it depth.; to leave this camera out, set convert.cameras: .top."):
        source(root)
    assert source(root, cameras=["top"]).read(0).steps == 5


def test_pictures_of_16_bits_and_a_film_that_begins_late_are_noted(tmp_path: Path) -> None:
    """The upper bytes are kept; row t takes frame t."""
    deep = film(tmp_path / "deep.mp4", pictures(range(5)), codec="png", pix_fmt="rgb48be")
    with av.open(str(deep)) as container:
        stored = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    features = {CAMERA: video_feature(), "observation.images.deep": {"dtype": "image", "shape": [32, 48, 3]}}
    change = lambda e, n: {"observation.images.deep": pa.array([{"bytes": data} for data in stored])}  # noqa: E731
    root = write_v2(tmp_path, (5,), change, features=features)
    film(video_of(root, 0), pictures(range(5)), times=range(5, 10))
    data = source(root)
    data.shape(0)
    assert numbers(data.read(0)) == list(range(5)) == [number_of(frame) for frame in frames_of(data.read(0), "deep")]
    assert "its first frame is shown at 0.5 s, but row 0 is at 0 s; row t takes frame t" in data.notes[0]
    assert "images.deep' have 16 bits a channel, of which the upper 8 are kept" in data.notes[1] and len(data.notes) == 2


def test_lists_in_lists_are_of_the_shape_that_is_stated(tmp_path: Path) -> None:
    features = {CAMERA: video_feature(), "action": {"dtype": "float32", "shape": [2, 3]}}
    values = np.arange(30.0).reshape(5, 2, 3)
    change = lambda e, n: {"action": pa.array((values if e else values.reshape(5, 3, 2)).tolist())}  # noqa: E731
    data = source(write_v2(tmp_path, (5, 5), change, features=features))
    assert (data.read(1).actions == values.reshape(5, 6)).all()
    with refused(r"column 'action' holds lists of \[3, 2\], but meta/info.json says \[2, 3\]"):
        data.read(0)


def test_turned_pictures(tmp_path: Path) -> None:
    """As players and viewers turn them, by a display matrix or EXIF, with a note."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    Image.fromarray(picture(3, (16, 24))).save(buffer := BytesIO(), "PNG", exif=exif)
    features = {CAMERA: video_feature(), "observation.images.still": {"dtype": "image", "shape": [16, 24, 3]}}
    change = lambda e, n: {"observation.images.still": pa.array([{"bytes": buffer.getvalue()}] * n)}  # noqa: E731
    root = write_v2(tmp_path, (5,), change, features=features)
    film(video_of(root, 0), pictures(range(5)), rotate=90)
    data = source(root)
    data.shape(0)
    episode = data.read(0)
    np.testing.assert_array_equal(frames_of(episode), np.rot90(decoded(video_of(root, 0)), 1, axes=(1, 2)))
    np.testing.assert_array_equal(frames_of(episode, "still")[0], np.rot90(picture(3, (16, 24)), -1))
    assert "turned by 270 degrees clockwise" in data.notes[0] and "turned as their EXIF asks" in data.notes[1]


def test_a_column_that_a_later_file_lacks_is_named_before_anything_is_read(tmp_path: Path) -> None:
    root = write_v2(tmp_path, change=lambda e, n: {"observation.state": None} if e else {})
    data = source(root)
    assert data.shape(0).steps == 5
    with refused("episode_000001.parquet: column 'observation.state' is missing"):
        data.shape(1)
    assert source(root, proprioception=[]).shape(1).steps == 7


def test_a_camera_of_bytes_that_is_called_depth_is_doubted(tmp_path: Path) -> None:
    depth = "observation.images.Depth"
    stored = pa.array([np.zeros((16, 24, 3), np.uint8).tolist()] * 5)
    root = write_v2(tmp_path, (5,), lambda e, n: {depth: stored}, features={CAMERA: video_feature(), depth: {"dtype": "image"}})
    doubt = f"{depth} is read as colours; is it depth? to leave it out, name the other cameras in convert.cameras"
    assert source(root).notes == [doubt] and source(root, cameras=["Depth"]).notes == []


# What a set says of itself, and damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: shutil.rmtree(r / "meta"), "info.json: no such file, which a LeRobot data set"),
        (edit("info.json", lambda i: i.update(codebase_version="v1.6")),
         "codebase_version: 'v1.6' is not read, expected 'v2.0', 'v2.1' or 'v3.0'; LeRobot's own scripts convert_dataset"),
        (edit("info.json", lambda i: i.update(codebase_version=3)), "version is 3; expected 'v2.0', 'v2.1' or 'v3.0'"),
        (edit("info.json", lambda i: i.update(fps=0)), "fps is 0; expected more than 0"),
        (edit("info.json", lambda i: i["features"][CAMERA].update(info={"is_depth_map": True})),
         "cannot be converted; .*the camera 'observation.images.top' holds depth .is_depth_map.; it is left out$"),
        (edit("info.json", lambda i: i["features"][CAMERA].update(dtype="film")), "is of dtype 'film'.*it is left out$"),
        (edit("info.json", lambda i: i.update(features={})), "declares no feature of dtype 'video', 'image', or 'uint8'"),
        (edit("info.json", lambda i: i.update(codebase_version="v3.0")),
         "meta/episodes: no parquet file in it.*meta/episodes.jsonl and meta/tasks.jsonl are of a v2 set"),
        (lambda r: (r / "videos").rename(r / "video"), "episode_000000.mp4 is not there, the folder holds data, meta, video"),
        (lambda r: ((r / "meta/episodes").mkdir(), (r / "videos").rename(r / "video")), "meta/episodes is of a v3 set"),
        (edit("info.json", lambda i: i.update(data_path="../{episode_index}")), "leads out of the data set"),
        (edit("episodes.jsonl", lambda i: i.update(episode_index=-1)), "episode_index is -1; expected at least 0"),
        (edit("episodes.jsonl", lambda i: i.update(episode_index=1)), "episode_index 1 is there twice"),
        (edit("episodes.jsonl", lambda i: i.update(length=6)), "episode 0 has 5 rows, but the metadata says 6"),
        (lambda r: (r / "meta/episodes.jsonl").write_text(""), "lists no episodes"),
        (lambda r: (r / "meta/episodes.jsonl").write_bytes(b'{"tasks": ["\xff"]}'), "cannot be read as UTF-8"),
        (lambda r: (r / "meta/info.json").write_text("[" * 100_000), "not valid JSON"),
        (lambda r: [file.write_text("version https://git-lfs.github.com/spec/v1") for file in r.rglob("episode_*.*")],
         "a Git LFS pointer"),
        (lambda r: video_of(r, 0).write_text("version https://git-lfs.github.com/spec/v1"), "mp4: a Git LFS pointer"),
        (lambda r: video_of(r, 0).write_bytes(b""), "truncated, damaged or no video"),
        (lambda r: video_of(r, 0).write_bytes(video_of(r, 0).read_bytes().replace(b"avc1", b"xxxx")), "codec that PyAV"),
        (lambda r: shutil.copy(r / "data/chunk-000/episode_000001.parquet", r / "data/chunk-000/episode_000000.parquet"),
         "episode 0 is not in it, it holds episodes 1 to 1; if the file's name is right, write that number into its rows"),
    ],
)  # fmt: skip
def test_damage_is_one_sentence(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    root = write_v2(tmp_path / "set")
    damage(root)
    with refused(message):
        source(root).read(0)


@pytest.mark.parametrize(
    ("write", "template"),
    [
        (write_v2, "videos/{chunk_index:03d}/{key}.mp4"), (write_v3, "videos/{episode_chunk:03d}/{key}.mp4"),
        (write_v2, "videos/chunk-{chunk_index:03d}/{video_key}/episode_{episode_index:06d}.mp4"),
        (write_v2, "videos/chunk-{episode_index:03d}/{video_key}/episode_{episode_index:06d}.mp4"),
    ],
    ids=["unknown names, v2", "unknown names, v3", "a name of v3 in v2", "right for the first episode alone"],
)  # fmt: skip
def test_a_template_that_leads_to_no_file(tmp_path: Path, write: Callable[[Path], Path], template: str) -> None:
    """LeRobot's own layout is taken, with a note; a byte order mark is read over."""
    root = write(tmp_path)
    edit("info.json", lambda i: i.update(video_path=template))(root)
    file = root / "meta/info.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    data = source(root)
    assert [numbers(data.read(e))[0] for e in range(2)] == [0, 16 if write is write_v2 else 5]
    assert len(data.notes) == 1 and "video_path" in data.notes[0]


def test_a_template_that_leads_to_one_file_for_several(tmp_path: Path) -> None:
    """LeRobot's own layout is taken where it is there; else the template is refused. Python's way to write a width is read."""
    root = write_v2(tmp_path)
    one = film(root / f"videos/{CAMERA}/all.mp4", pictures(range(12)))
    edit("info.json", lambda i: i.update(video_path="videos/{video_key}/all.mp4"))(root)
    data = source(root)
    assert numbers(data.read(1)) == list(range(16, 23)) and "LeRobot's own" in data.notes[0]
    shutil.rmtree(root / "videos/chunk-000")
    with refused(f"video_path 'videos/{{video_key}}/all.mp4' leads to one file for several episodes or cameras, {one}"):
        source(root)
    side = {CAMERA: video_feature(), "observation.images.side": video_feature()}
    edit("info.json", lambda i: i.update(video_path="videos/{episode_index:04}.mp4", features=side))(root)
    for e, n in enumerate((5, 7)):
        film(root / f"videos/{e:04d}.mp4", pictures(range(16 * e, 16 * e + n)))
    with refused("leads to one file for several.*0000.mp4.*or name one camera in convert.cameras"):
        source(root)
    assert numbers(source(root, cameras=["top"]).read(1)) == list(range(16, 23))
