"""The lerobot source, v3: which frames and rows of files that episodes share are an episode's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.sources.common import film, frames_of, refused
from tests.sources.lerobot_sets import CAMERA, number_of, numbers, pictures, source, video_feature, write_info, write_v3


@pytest.mark.parametrize(
    ("starts", "spare", "options", "first", "message"),
    [
        ([0.0, 0.5, 1.2], 0, {}, [0, 5, 12], ""),
        ([0.0, 0.54, 1.28], 0, {}, [0, 5, 12], "from_timestamp of episode 2 is 0.8 frames off; the lengths decide"),
        ([0.0, 0.4, 1.2], 0, {}, [0, 5, 12], "from_timestamp of episode 1 is 1 frames off"),
        ([2.1, 2.6, 3.3], 0, {}, [0, 5, 12], "21 frames off"),
        ([0.0, 0.0, 0.0], 0, {}, [0, 5, 12], "from_timestamp of episode 2 is 12 frames off"),
        ([0.0, 0.5, 0.5], 0, {}, [0, 5, 12], "from_timestamp of episode 2 is 7 frames off"),
        ([0.0, 0.5, 0.0], 0, {}, None, "16 frames.*16 rows.*episode 0 ends at 0.5 s and episode 2 begins at 0 s"),
        ([0.0, 0.5, 1.2], 9, {}, [0, 5, 12], "25 frames, .* 3 episodes in it have 16 rows; from_timestamp decides"),
        ([0.0, 0.7, 1.6], 4, {}, [0, 7, 16], "20 frames, .*16 rows; from_timestamp decides"),
        ([0.0, 0.5, 1.2], 3, {}, None, "19 frames, .*16 rows.*last one ends with frame 16.*'order'"),
        ([0.0, 0.5, 1.2], 6, {}, None, "22 frames, .*16 rows.*last one ends with frame 16"),
        ([0.0, 0.5, 1.2], 3, {"frames": "order"}, [0, 5, 12], "19 frames.*16 rows; from_timestamp decides"),
        ([0.0, 0.4, 1.2], 1, {}, None, "17 frames.*episode 0 ends at 0.5 s and episode 1 begins at 0.4 s.*'order'"),
        ([0.0, 0.5, 1.2], -1, {}, None, "15 frames, and the 3 episodes in it have 16 rows.*'order'"),
    ],
)  # fmt: skip
def test_where_an_episode_begins(
    tmp_path: Path, starts: list[float], spare: int, options: dict[str, Any], first: list[int] | None, message: str
) -> None:
    """By the lengths where they add up to the frames; else by from_timestamp, if nothing speaks against it."""
    file = write_v3(tmp_path) / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    for part, values in (("from", starts), ("to", [start + n / 10 for start, n in zip(starts, (5, 7, 4), strict=True)])):
        name = f"videos/{CAMERA}/{part}_timestamp"
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    pq.write_table(table, file)
    film(tmp_path / f"videos/{CAMERA}/chunk-000/file-000.mp4", pictures(range(16 + spare)))
    data = source(tmp_path, **options)
    if first is None:
        for e in range(3):
            with refused(message):
                data.shape(e)
        return
    for e, n in enumerate((5, 7, 4)):
        data.shape(e)
        assert numbers(data.read(e)) == list(range(first[e], first[e] + n))
    assert len(data.notes) == bool(message) and re.search(message, " ".join(data.notes))


def write_clips(
    root: Path, camera: str, place: Sequence[int | None], starts: Sequence[float | None], lengths: Sequence[int] = (5, 7, 4)
) -> None:
    """Says in meta/episodes in which file of a camera each episode lies, from when on, and with how many frames."""
    file = root / "meta/episodes/chunk-000/file-000.parquet"
    ends = [None if start is None else start + n / 10 for start, n in zip(starts, lengths, strict=True)]
    clips = {"chunk_index": [0] * 3, "file_index": list(place), "from_timestamp": list(starts), "to_timestamp": ends}
    columns = pq.read_table(file).to_pydict() | {f"videos/{camera}/{name}": values for name, values in clips.items()}
    pq.write_table(pa.table(columns), file)


def test_rows_and_videos_that_lie_in_other_orders(tmp_path: Path) -> None:
    """One parquet file for three of videos (github.com/starVLA/starVLA/issues/285), cameras whose offsets differ (90), and
    episodes out of order among the rows (github.com/huggingface/lerobot/issues/1875)."""
    side = "observation.images.side"
    root = write_v3(tmp_path)
    write_info(root, "v3.0", {CAMERA: video_feature(), side: video_feature()}, total_episodes=3)
    write_clips(root, CAMERA, [0, 1, 2], [0, 0, 0])
    write_clips(root, side, [0, 0, 0], [0.4, 0.9, 0])
    for e, n in enumerate((5, 7, 4)):
        film(root / f"videos/{CAMERA}/chunk-000/file-00{e}.mp4", pictures(range(16 * e, 16 * e + n)))
    film(root / f"videos/{side}/chunk-000/file-000.mp4", pictures([*range(32, 36), *range(5), *range(16, 23)]))
    data = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(data)
    for order in ([*range(16)], [*range(12, 16), *range(12)]):
        pq.write_table(table.take(order), data)
        for e, n in enumerate((5, 7, 4)):
            episode = source(root).read(e)
            assert numbers(episode) == [*map(number_of, frames_of(episode, "side"))] == list(range(16 * e, 16 * e + n))
            np.testing.assert_array_equal(episode.actions[:, 0], 100 * e + np.arange(n))
    pq.write_table(table.take([0, 5, *range(1, 5), *range(6, 16)]), data)
    for e in range(2):
        with refused(f"rows of other episodes lie among those of episode {e}"):
            source(root).shape(e)
    assert source(root).shape(2).steps == 4


def test_a_clip_that_lacks_a_frame_is_given_none_of_the_next(tmp_path: Path) -> None:
    """Its episode is refused, by timestamps and in order; the others are read. So is one for which nothing names a clip."""
    root = write_v3(tmp_path)
    film(root / f"videos/{CAMERA}/chunk-000/file-000.mp4", pictures([*range(11), *range(12, 16)]))
    write_clips(root, CAMERA, [0, 0, 0], [0, 0.5, 1.1], (5, 6, 4))
    for options in ({}, {"frames": "order"}):
        data = source(root, **options)
        with refused("the episode has 7 rows"):
            data.shape(1)
        assert [numbers(data.read(e)) for e in (0, 2)] == [[*range(5)], [*range(12, 16)]]
    write_clips(root, CAMERA, [0, None, 0], [0, None, 1.1])
    with refused(f"meta/episodes names no video of {CAMERA} for episode 1"):
        source(root).shape(1)
    assert numbers(source(root).read(2)) == [*range(12, 16)]
    file = root / "meta/episodes/chunk-000/file-000.parquet"
    write_clips(root, CAMERA, [0, 0, 0], [0, 0.5, 1.1], (5, 6, 4))
    unsaid = {"data/file_index": [0.0, np.nan, 0.0], "length": [5.0, np.nan, 4.0]}
    pq.write_table(pa.table(pq.read_table(file).to_pydict() | unsaid), file)
    data = source(root)
    with refused("the episode has 7 rows"):
        data.shape(1)
    assert "file-None.parquet of episode 1, but its rows lie in data/chunk-000/file-000.parquet" in " ".join(data.notes)
    assert numbers(data.read(2)) == [*range(12, 16)]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("length", 0, "length is 0; expected at least 1"),
        (f"videos/{CAMERA}/from_timestamp", np.inf, "from_timestamp is inf; expected a finite number"),
        ("data/file_index", -1, "file_index is -1; expected at least 0"),
    ],
)
@pytest.mark.parametrize("which", [[0], [1], [2], [0, 1, 2]])
def test_a_wrong_line_of_metadata_is_one_bad_episode(
    tmp_path: Path, column: str, value: float, message: str, which: list[int]
) -> None:
    root = write_v3(tmp_path, (5, 7, 6))
    file = root / "meta/episodes/chunk-000/file-000.parquet"
    said = pq.read_table(file).to_pydict()
    for e in which:
        said[column][e] = value
    pq.write_table(pa.table(said), file)
    if len(which) == 3:
        with refused(message, "file-000.parquet"):
            source(root)
        return
    data = source(root)
    first = np.cumsum([0, 5, 7, 6])
    assert data.names == ["0", "1", "2"] and list(data.describe().instructions) == ["push the block"]
    for e in range(3):
        if e not in which:
            assert data.shape(e).steps == data.read(e).steps and numbers(data.read(e)) == [*range(first[e], first[e + 1])]
    for look in (data.shape, data.read):
        with refused(message, "file-000.parquet"):
            look(which[0])


def test_numbers_that_are_not_those_of_episode_index(tmp_path: Path) -> None:
    root = write_v3(tmp_path, (5, 7, 4))
    file = root / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(file).take([0, 2]), file)
    data = source(root)
    assert data.names == ["0", "2"] and numbers(data.read(1)) == [*range(12, 16)]
    assert "the last episode has episode_index 2; in convert.episodes and drop it is 1, or by name '2'" in " ".join(data.notes)


def test_rows_of_joined_sets_that_kept_their_numbers(tmp_path: Path) -> None:
    """Each is in the file, but another than the metadata means; where the list alone was shortened, none is doubtful."""
    root = write_v3(tmp_path, (5, 5, 5))
    data, file = root / "data/chunk-000/file-000.parquet", root / "meta/episodes/chunk-000/file-000.parquet"
    table, listed = pq.read_table(data), pq.read_table(file)
    pq.write_table(table.slice(0, 10), data.with_name("file-001.parquet"))
    place = listed.schema.get_field_index("data/file_index")
    pq.write_table(listed.set_column(place, "data/file_index", pa.array([0, 1, 1])), file)
    joined = source(root)
    for e in (1, 2):
        with refused("file-001.parquet: it holds episodes 0 to 1, and by the metadata 1 to 2, so that each may be"):
            joined.shape(e)
    assert joined.shape(0).steps == 5


def test_a_list_that_errs_about_the_file_of_rows(tmp_path: Path) -> None:
    """LeRobot's first upgrades to v3 and merges wrote such; the rows' own numbers decide, if the whole set's are there once."""
    root = write_v3(tmp_path, (5, 5, 5))
    data, file = root / "data/chunk-000/file-000.parquet", root / "meta/episodes/chunk-000/file-000.parquet"
    table, listed = pq.read_table(data), pq.read_table(file)
    place = listed.schema.get_field_index("data/file_index")
    pq.write_table(table.slice(0, 10), data)
    pq.write_table(table.slice(10), data.with_name("file-001.parquet"))
    for said, e, note in (
        ([0, 0, 0], 2, "file-000.parquet of episode 2, but its rows lie in data/chunk-000/file-001.parquet; the rows decide"),
        ([0, 4, 1], 1, "file-004.parquet of episode 1, but its rows lie in data/chunk-000/file-000.parquet; the rows decide"),
        ([1, 1, 2], 0, "file-001.parquet of episode 0, but its rows lie in data/chunk-000/file-000.parquet, and 2 more alike"),
    ):
        pq.write_table(listed.set_column(place, "data/file_index", pa.array(said)), file)
        set_ = source(root)
        assert [set_.read(k).actions[0, 0] for k in range(3)] == [0, 100, 200] and numbers(set_.read(e))[0] == 5 * e
        assert len(set_.notes) == 1 and note in set_.notes[0]
    data.unlink()  # then the numbers that are left may be those of several sets
    with refused("file-001.parquet: it holds episodes 2 to 2, and by the metadata 0 to 1, so that each may be another"):
        source(root).shape(0)


def test_rows_that_were_cut_and_kept_their_times(tmp_path: Path) -> None:
    """A clip has as many frames as rows are left, but timestamps lead to other frames of the video: both ways out work."""
    root = write_v3(tmp_path)
    data = root / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(data).slice(2), data)
    file = root / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pa.table(pq.read_table(file).to_pydict() | {"length": [3, 7, 4]}), file)
    write_clips(root, CAMERA, [0, 0, 0], [0, 0.5, 1.2], (3, 7, 4))
    with refused("3 frames from 0 to 0.3 s, .* begin at 0.2 s and lead to others .*'order', or, .* correct to_timestamp"):
        source(root).shape(0)
    assert numbers(source(root).read(1)) == [*range(5, 12)]
    assert numbers(source(root, frames="order").read(0)) == [0, 1, 2]
    write_clips(root, CAMERA, [0, 0, 0], [0, 0.5, 1.2], (5, 7, 4))
    assert numbers(source(root).read(0)) == [2, 3, 4]


def test_cameras_of_other_rates(tmp_path: Path) -> None:
    """Timestamps find the frames of a faster one, with a note of both numbers; a slower one is named with the way out."""
    side = "observation.images.side"
    root = write_v3(tmp_path)
    write_info(root, "v3.0", {CAMERA: video_feature(), side: video_feature()}, total_episodes=3)
    write_clips(root, side, [0, 0, 0], [0, 0.5, 1.2])
    video = film(root / f"videos/{side}/chunk-000/file-000.mp4", pictures(n // 2 for n in range(32)), fps=20)
    for options, note in (({}, "the timestamps say"), ({"frames": "order"}, "row t takes frame t")):
        data = source(root, **options)
        data.shape(0)
        assert re.search(f"10 frames from 0 s on, but episode 0 has 5 rows; {note}", data.notes[-1])
    assert [[*map(number_of, frames_of(source(root).read(e), "side"))] for e in (0, 2)] == [[*range(5)], [*range(12, 16)]]
    film(video, pictures(range(8)), fps=5)
    with refused("over half a frame away.*; to leave this camera out, set convert.cameras: .top.$"):
        source(root).shape(0)
