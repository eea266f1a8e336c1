"""diffusion_policy's replay buffers: a real one and written ones, compared with chunks decoded by numcodecs alone."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr

from svam.contract import Choice
from svam.sources.replay_zarr import Options, ReplayZarrSource
from svam.sources.replay_zarr import open_source as open_with
from tests.sources.common import Array, frames_of, real, refused

REAL = "diffusion_policy_zarr/pusht_keypoint_x356_y356"
CHOICE = Choice(instruction="push the T", rate_hz=10)
TOLD = Options()


def open_source(path: Path, options: Options = TOLD, **choice: Any) -> ReplayZarrSource:
    return open_with(path, options, CHOICE.model_copy(update=choice))


def write_array(
    folder: Path, values: Array, chunks: tuple[int, ...], codec: Any = "blosc", separator: str = ".", order: str = "C"
) -> None:
    """A Zarr v2 array, written without zarr."""
    if codec == "blosc":
        codec = numcodecs.Blosc("zstd", 5, numcodecs.Blosc.BITSHUFFLE)
    folder.mkdir(parents=True, exist_ok=True)
    meta = {
        "zarr_format": 2, "shape": list(values.shape), "chunks": list(chunks), "dtype": values.dtype.str, "fill_value": 0,
        "order": order, "filters": None, "compressor": None if codec is None else codec.get_config(),
        "dimension_separator": separator,
    }  # fmt: skip
    (folder / ".zarray").write_text(json.dumps(meta))
    grid = [range(-(-length // chunk)) for length, chunk in zip(values.shape, chunks, strict=True)]
    for place in np.ndindex(*map(len, grid)):
        chunk = np.zeros(chunks, values.dtype)
        part = values[tuple(slice(k * c, (k + 1) * c) for k, c in zip(place, chunks, strict=True))]
        chunk[tuple(slice(0, length) for length in part.shape)] = part
        data = chunk.tobytes(order=order)  # type: ignore[arg-type]
        file = folder / separator.join(map(str, place))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data if codec is None else codec.encode(data))


def decode_rows(folder: Path, start: int, stop: int) -> Array:
    """Rows of an array that is chunked along them only."""
    meta = json.loads((folder / ".zarray").read_text())
    codec = None if meta["compressor"] is None else numcodecs.get_codec(meta["compressor"])
    first, chunk, rest = start // meta["chunks"][0], meta["chunks"][0], ".0" * (len(meta["shape"]) - 1)
    parts = []
    for k in range(first, -(-stop // chunk)):
        data = (folder / f"{k}{rest}").read_bytes()
        parts.append(np.frombuffer(data if codec is None else codec.decode(data), meta["dtype"]).reshape(meta["chunks"]))
    return np.concatenate(parts)[start - first * chunk : stop - first * chunk]


ENDS = [5, 75, 76, 90]


def arrays_of(n: int = 90) -> dict[str, Array]:
    rng = np.random.default_rng(n)
    return {
        "img": rng.integers(0, 256, (n, 6, 8, 3), dtype=np.uint8), "action": rng.normal(size=(n, 2)).astype(np.float32),
        "state": rng.normal(size=(n, 5)) * 300, "keypoint": rng.normal(size=(n, 3, 2)).astype(np.float32),
        "timestamp": np.arange(n) / 10.0,
    }  # fmt: skip


def write(folder: Path, ends: Any = ENDS, chunk: int = 7, **changes: Any) -> dict[str, Array]:
    arrays = {name: values for name, values in (arrays_of() | changes).items() if values is not None}
    for name, values in arrays.items():
        write_array(folder / "data" / name, values, (min(chunk, len(values)), *values.shape[1:]))
    write_array(folder / "meta/episode_ends", np.asarray(ends), (max(1, len(ends)),), None)
    for part in ("", "data", "meta"):
        (folder / part / ".zgroup").write_text('{"zarr_format": 2}')
    return arrays


def pack(folder: Path, archive: Path) -> None:
    """The same buffer as one zip file."""
    with zipfile.ZipFile(archive, "w") as file:
        for part in sorted(part for part in folder.rglob("*") if part.is_file()):
            file.write(part, part.relative_to(folder))


def test_the_real_buffer() -> None:
    options = TOLD.model_copy(update={"state": ["state", "keypoint"], "proprioception": ["state[0:2]"]})
    source = open_source(real(REAL), options)
    data = real(REAL) / "pusht_keypoint_x356_y356.zarr/data"
    ends = decode_rows(data.parent / "meta/episode_ends", 0, 151)
    assert len(source) == 151 and ends[-1] == 24644
    description = source.describe()
    assert (description.rate_hz, description.cameras) == (10.0, ["img"])
    assert description.instructions == {"push the T": {"train": ["push the T"], "held_out": []}}
    assert "n_contacts" in source.notes[0] and "state ranges from -18.8131 to 507.144; kept as recorded" in source.notes[-1]
    assert [source.shape(k).steps for k in range(151)] == list(np.diff([0, *ends]))
    for index in range(0, 151, 25):
        rows = ([0, *ends][index], ends[index])
        actions, state, keypoint = (decode_rows(data / name, *rows) for name in ("action", "state", "keypoint"))
        episode = source.read(index)
        assert episode.instruction == "push the T" and episode.timestamps is None
        assert episode.actions is not None and (episode.actions == actions).all()
        assert episode.proprioception is not None and (episode.proprioception == state[:, :2]).all()
        expected = np.concatenate([state, keypoint.reshape(-1, 18)], axis=1)
        assert episode.state is not None and (episode.state == expected).all()
        assert (frames_of(episode) == decode_rows(data / "img", *rows)).all()


@pytest.mark.parametrize("chunk", [1, 7, 200])
@pytest.mark.parametrize("zipped", [False, True])
def test_written_buffers(tmp_path: Path, chunk: int, zipped: bool) -> None:
    folder = tmp_path / "x.zarr"
    arrays = write(folder, chunk=chunk)
    path = folder
    if zipped:
        path = tmp_path / "y.zarr.zip"
        pack(folder, path)
    options = TOLD.model_copy(update={"state": ["state", "keypoint"], "timestamp": "timestamp"})
    source = open_source(path, options)
    assert len(source) == 4 and source.describe().cameras == ["img"]
    for index, (start, stop) in enumerate(zip([0, *ENDS], ENDS, strict=False)):
        episode = source.read(index)
        assert source.shape(index).steps == episode.steps == stop - start
        assert (frames_of(episode) == arrays["img"][start:stop]).all()
        assert episode.actions is not None and (episode.actions == arrays["action"][start:stop]).all()
        assert episode.timestamps is not None and (episode.timestamps == arrays["timestamp"][start:stop]).all()
        expected = np.hstack([arrays["state"], arrays["keypoint"].reshape(90, 6)])[start:stop].astype(np.float32)
        assert episode.state is not None and (episode.state == expected).all()


@pytest.mark.parametrize(
    "codec", [None, *(numcodecs.get_codec({"id": name}) for name in ("zlib", "zstd", "lz4", "bz2", "gzip", "lzma"))]
)
def test_other_codecs_orders_and_grids(tmp_path: Path, codec: Any) -> None:
    arrays = write(tmp_path / "x.zarr")
    shutil.rmtree(tmp_path / "x.zarr/data/img")
    write_array(tmp_path / "x.zarr/data/img", arrays["img"], (4, 4, 5, 3), codec, "/", "F")
    assert (frames_of(open_source(tmp_path, TOLD).read(1)) == arrays["img"][5:75]).all()


def test_pictures_of_other_kinds(tmp_path: Path) -> None:
    pictures = arrays_of()["img"]
    write(tmp_path / "x.zarr", img=pictures.astype(np.float32), camera_1=np.ascontiguousarray(np.moveaxis(pictures, -1, 1)))
    source = open_source(tmp_path, TOLD)
    assert source.describe().cameras == ["camera_1", "img"]
    assert any("img is float32; its whole numbers become uint8" in note for note in source.notes)
    for camera in ("camera_1", "img"):
        assert (frames_of(source.read(1), camera) == pictures[5:75]).all()
    write_array(tmp_path / "x.zarr/data/depth", pictures / 255, (7, 6, 8, 3))
    write_array(tmp_path / "x.zarr/data/grey", pictures[..., 0].copy(), (7, 6, 8))
    write_array(tmp_path / "x.zarr/data/rotations", np.tile(np.eye(3, dtype=np.float32), (90, 2, 1, 1)), (7, 2, 3, 3))
    assert (frames_of(open_source(tmp_path, cameras=["grey"]).read(1)) == pictures[5:75, ..., :1]).all()
    left_out = open_source(tmp_path, TOLD)
    assert any("data/grey is uint8 (90, 6, 8); if it is grey, convert.cameras can" in note for note in left_out.notes)
    assert left_out.describe().cameras == ["camera_1", "img"]
    assert any("not read: depth, " in note and ", rotations" in note for note in left_out.notes)
    assert any(note.startswith("left out: ") and note.endswith("in 0..255; is it depth?") for note in left_out.notes)
    only = open_source(tmp_path, Options(action=[]), cameras=["data/img"])
    assert only.describe().cameras == ["img"] and only.read(0).actions is None
    assert any("no actions are read" in note for note in only.notes)
    for bad in (0.5, -1.0, 256.0, np.nan, np.inf):
        wrong = pictures.astype(np.float32)
        wrong[70, 1, 2, 0] = bad
        write_array(tmp_path / "x.zarr/data/img", wrong, (7, 6, 8, 3))
        with refused(rf"data/img is {bad:g} in row 70, expected whole numbers in 0\.\.255"):
            frames_of(source.read(1), "img")


def test_what_must_be_told(tmp_path: Path) -> None:
    write(tmp_path / "x.zarr")
    with refused(r"no instruction; set convert\.missing_instruction"):
        open_source(tmp_path, instruction=None)
    with refused(r"convert\.rate_hz is missing"):
        open_source(tmp_path, rate_hz=None)
    with refused("convert.cameras names 'left', but .* has img"):
        open_source(tmp_path, cameras=["left"])
    with refused(r"data/state is float64 \(90, 5\), expected uint8 pictures"):
        open_source(tmp_path, cameras=["state"])
    for change, message in (
        ({"action": ("actions",)}, "action names 'actions'; data has action"),
        ({"state": ("state[4:6]",)}, r"names 'state\[4:6\]', but data/state is float64 \(90, 5\)"),
        ({"state": ("state[a]",)}, "expected a name, or a name with columns"),
        ({"timestamp": "action"}, "timestamp names 'action', which has 2 columns, expected one"),
    ):
        with refused(message):
            open_source(tmp_path, TOLD.model_copy(update=change)).read(0)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([5, 5, 90], r"meta/episode_ends\[1\] is 5, expected more than 5"),
        ([5, 4, 90], r"meta/episode_ends\[1\] is 4, expected more than 5"),
        ([0, 90], r"meta/episode_ends\[0\] is 0, expected more than 0"),
        ([91], "data/img has 90 rows, but meta/episode_ends reaches to 91 in episode 0"),
        ([], r"meta/episode_ends is float64 \(0,\), expected whole numbers"),
        ([1.5, 90], "meta/episode_ends is float64"),
        ([[1, 2]], r"meta/episode_ends .*, expected|damaged"),
    ],
)
def test_episode_ends_must_increase_within_the_rows(tmp_path: Path, ends: Any, message: str) -> None:
    write(tmp_path / "x.zarr", ends=[90])
    shutil.rmtree(tmp_path / "x.zarr/meta/episode_ends")
    values = np.asarray(ends)
    write_array(tmp_path / "x.zarr/meta/episode_ends", values, tuple(max(1, length) for length in values.shape), None)
    with refused(message):
        assert [open_source(tmp_path, TOLD).shape(index) for index in range(max(1, len(ends)))]


def test_an_array_that_is_too_short_costs_the_last_episode(tmp_path: Path) -> None:
    written = write(tmp_path / "x.zarr", ends=[50, 91], action=arrays_of(60)["action"])
    source = open_source(tmp_path)
    assert source.shape(0).steps == 50 and (source.read(0).actions == written["action"][:50]).all()
    assert any("action ranges from" in note for note in source.notes)
    with refused("data/(img has 90|action has 60) rows, but meta/episode_ends reaches to 91 in episode 1"):
        source.shape(1)


def test_absent_chunks_and_arrays(tmp_path: Path) -> None:
    """Zeros where a header states no fill value, as zarr-python 3 means it; pictures without any chunk were not copied."""
    write(tmp_path / "x.zarr")
    (tmp_path / "x.zarr/data/img/10.0.0.0").unlink()
    assert any("1 chunks of data/img are absent" in note for note in open_source(tmp_path).notes)
    header = tmp_path / "x.zarr/data/img/.zarray"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"fill_value": None}))
    source = open_source(tmp_path)
    assert any("1 chunks of data/img are absent and read as its fill value (zero" in note for note in source.notes)
    assert frames_of(source.read(1))[64].any() and not frames_of(source.read(1))[65:].any()
    for chunk in (tmp_path / "x.zarr/data/img").glob("*.0"):
        chunk.unlink()
    with refused("data/img has none of its 13 chunks: was the whole folder copied.*leave it out by convert.cameras"):
        open_source(tmp_path, cameras=["img"])
    shutil.rmtree(tmp_path / "x.zarr/data/action")
    write_array(header.parent, arrays_of()["img"], (7, 6, 8, 3))
    with refused("action names 'action'; data has img"):
        open_source(tmp_path)
    (tmp_path / "x.zarr/meta/episode_ends/.zarray").unlink()
    with refused("array meta/episode_ends is missing"):
        open_source(tmp_path)


def test_a_buffer_that_is_written_anew_in_place_is_another(tmp_path: Path) -> None:
    write(tmp_path / "x.zarr")
    before = open_source(tmp_path, TOLD).shape(1).stamp
    (chunk, *_) = (file for file in sorted((tmp_path / "x.zarr/data/img").iterdir()) if file.name[0] != ".")
    content = chunk.read_bytes()
    with chunk.open("r+b") as file:
        file.write(content[:-1])
    assert open_source(tmp_path, TOLD).shape(1).stamp != before


def test_a_vector_of_zeros_without_any_chunk(tmp_path: Path) -> None:
    write(tmp_path / "x.zarr")
    for chunk in (tmp_path / "x.zarr/data/state").glob("*.0"):
        chunk.unlink()
    source = open_source(tmp_path, Options(state=["state"]))
    state = source.read(1).state
    assert state is not None and state.shape == (70, 5) and not state.any()
    assert any("all 13 chunks of data/state are absent and read as its fill value" in note for note in source.notes)
    (tmp_path / "x.zarr/meta/episode_ends/0").unlink()
    with refused("meta/episode_ends has none of its chunks: was the whole folder copied"):
        open_source(tmp_path)


def test_a_codec_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a camera that is left out it does not matter."""
    monkeypatch.setitem(sys.modules, "imagecodecs.numcodecs", None)
    written = write(tmp_path / "x.zarr", wrist=arrays_of()["img"])
    header = tmp_path / "x.zarr/data/wrist/.zarray"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"compressor": {"id": "imagecodecs_jpegxl"}}))
    for cameras in ([], ["wrist"]):
        with refused("data/wrist is compressed by 'imagecodecs_jpegxl', which needs imagecodecs"):
            open_source(tmp_path, cameras=cameras)
    source = open_source(tmp_path, cameras=["img"])
    assert (frames_of(source.read(0)) == written["img"][:5]).all()
    assert any("left out: " in note and "needs imagecodecs" in note for note in source.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "|O"}, r"dtype '\|O', expected numbers"),
        ({"filters": [{"id": "pickle"}]}, "compressed by 'pickle', expected one of adler32"),
        ({"compressor": {"id": "pickle"}}, "compressed by 'pickle', expected one of adler32"),
        ({"chunks": [0, 2]}, "expected less than 2 GiB each"),
        ({"chunks": [1 << 40, 2]}, "expected less than 2 GiB each"),
        ({"dimension_separator": "x"}, "truncated, damaged or not Zarr"),
        ({"compressor": {"id": "imagecodecs_nothing"}}, "truncated, damaged|needs imagecodecs"),
    ],
)
def test_headers_are_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path / "x.zarr")
    file = tmp_path / "x.zarr/data/action/.zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with refused(message):
        open_source(tmp_path, TOLD).read(0)


@pytest.mark.parametrize(
    ("zarr_format", "shards", "zipped"),
    [(2, None, False), (3, None, True), (3, (14, 6, 8, 4), False), (3, (14, 6, 8, 4), True)],
)
def test_buffers_that_zarr_writes_today(tmp_path: Path, zarr_format: Any, shards: Any, zipped: bool) -> None:
    """Version 3, shards, alpha; and chunks of zeros, which zarr does not write: they are read as such, with a note."""
    pictures = np.random.default_rng(1).integers(1, 256, (90, 6, 8, 4), dtype=np.uint8)
    pictures[:28] = 0
    actions = np.zeros((90, 2), np.float32)
    actions[20:] = 1.5
    root = zarr.create_group(tmp_path / "x.zarr", zarr_format=zarr_format)
    for name, values, chunks in (("img", pictures, (7, 6, 8, 4)), ("action", actions, (10, 2))):
        array = root.create_array(
            f"data/{name}", shape=values.shape, chunks=chunks, dtype=values.dtype, shards=shards if name == "img" else None
        )
        array[:] = values
    root.create_array("meta/episode_ends", data=np.array(ENDS))
    if zipped:
        pack(tmp_path / "x.zarr", tmp_path / "x.zarr.zip")
        shutil.rmtree(tmp_path / "x.zarr")
    source = open_source(tmp_path)
    for index, (start, stop) in enumerate(zip([0, *ENDS], ENDS, strict=False)):
        episode = source.read(index)
        assert (frames_of(episode) == pictures[start:stop, ..., :3]).all()
        assert episode.actions is not None and (episode.actions == actions[start:stop]).all()
    notes = " ".join(source.notes)
    assert f"{2 if shards else 4} chunks of data/img are absent" in notes and "2 chunks of data/action are absent" in notes
    assert "alpha, is dropped" in notes


def test_columns_and_times(tmp_path: Path) -> None:
    """One column; numbers that are true or false; timestamps that another rate belongs to."""
    closed = np.arange(90) % 3 == 0
    written = write(tmp_path / "x.zarr", closed=closed)
    options = Options(action=["data/state[4]", "closed"], timestamp="timestamp")
    source = open_source(tmp_path, options)
    expected = np.stack([written["state"][:, 4], closed], axis=1).astype(np.float32)
    assert (source.read(1).actions == expected[5:75]).all() and not any("apart" in note for note in source.notes)
    notes = open_source(tmp_path, options, rate_hz=15).notes
    assert any("apart, but the rate is 15 Hz, at which it is stored; if the timestamps are right" in note for note in notes)


def test_an_archive_of_the_folder_itself(tmp_path: Path) -> None:
    write(tmp_path / "in/x.zarr")
    zarr.create_group(tmp_path / "in/x.zarr/meta")  # a header as deep as one of an array is in a buffer
    pack(tmp_path / "in", tmp_path / "y.zarr.zip")
    with refused("meta/episode_ends is missing; it has x.zarr/meta; zip what is in that folder, without the folder"):
        open_source(tmp_path / "y.zarr.zip")


def test_a_damaged_list_of_an_archive(tmp_path: Path) -> None:
    """A chunk whose name is damaged there is not taken for one that was left out."""
    write(tmp_path / "x.zarr")
    pack(tmp_path / "x.zarr", tmp_path / "y.zarr.zip")
    content = (tmp_path / "y.zarr.zip").read_bytes()
    before, name, after = content.rpartition(b"data/img/3.0.0.0")
    (tmp_path / "y.zarr.zip").write_bytes(before + name.replace(b"3", b"X") + after)
    with refused("data/img is truncated, damaged"):
        open_source(tmp_path / "y.zarr.zip", cameras=["img"])


def test_pictures_elsewhere_and_pointers(tmp_path: Path) -> None:
    write(tmp_path / "x.zarr", img=None)
    with refused("no pictures: data has action, keypoint, state, timestamp"):
        open_source(tmp_path)
    (tmp_path / "videos/0").mkdir(parents=True)
    with refused(r"videos/<episode>/<camera>.mp4.*convert.source 'raw'"):
        open_source(tmp_path)
    write(tmp_path / "x.zarr")
    for name in ("data/img/0.0.0.0", "data/img/.zarray"):
        (tmp_path / "x.zarr" / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        with refused(f"{name}: a Git LFS pointer, not the file itself; run git lfs pull"):
            frames_of(open_source(tmp_path, cameras=["img"]).read(0))
