"""What every source does, whatever its format: one table of small sets, one test for each promise."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from svam.contract import Choice, EpisodeSource, frame_blocks
from svam.errors import SvamError
from tests import ROOT
from tests.recorded import write_raw
from tests.sources import test_source_aloha as aloha
from tests.sources import test_source_calvin as calvin
from tests.sources import test_source_raw as raw
from tests.sources import test_source_replay_zarr as replay_zarr
from tests.sources import test_source_rlds as rlds
from tests.sources import test_source_robomimic as robomimic
from tests.sources import test_source_video_folder as video_folder
from tests.sources import tfds_writer
from tests.sources.common import LFS_POINTER, damaged, everything, film, frames_of, refused, squares
from tests.sources.lerobot_sets import write_v3


@dataclass
class Set:
    """A small set of a source. `fuzzed` are patterns of the files to damage; those of `exact` carry checksums, so that what is
    still read of them is what was written. `library` is one that the reader needs beyond the project's own."""

    source: str
    write: Callable[[Path], object]
    options: dict[str, Any]
    fuzzed: Sequence[str] = ("**/*",)
    exact: Sequence[str] = ()
    library: str = ""
    rate_hz: float | None = None
    instruction: str | None = None
    cameras: Sequence[str] = ()

    def opened(self, path: Path) -> EpisodeSource:
        module = import_module(f"svam.sources.{self.source}")
        choice = Choice(rate_hz=self.rate_hz, instruction=self.instruction, cameras=list(self.cameras))
        source: EpisodeSource = module.open_source(path, module.Options(**self.options), choice)
        return source


def _aloha(storage: str) -> Set:
    def write(folder: Path) -> None:
        aloha.record(folder / "episode_0.hdf5", 3, storage=storage, cameras=("cam_high",), language_raw=aloha.SENTENCE)

    return Set("aloha", write, {}, library="h5py")


def _robomimic(compression: str | None) -> Set:
    def write(folder: Path) -> None:
        robomimic.robomimic(folder / "demo.hdf5", {"demo_0": 2}, compression=compression)

    return Set("robomimic", write, {}, library="h5py", instruction=robomimic.SENTENCE)


def _replay(zipped: bool) -> Set:
    def write(folder: Path) -> None:
        small = {name: values[:9] for name, values in replay_zarr.arrays_of().items()}
        replay_zarr.write(folder / "x.zarr", [4, 9], 5, **{**small, "state": None, "keypoint": None, "timestamp": None})
        if zipped:
            replay_zarr.pack(folder / "x.zarr", folder / "x.zarr.zip")
            shutil.rmtree(folder / "x.zarr")

    return Set("replay_zarr", write, {}, exact=["*.zip"], rate_hz=10, instruction="push the T")


def _video(suffix: str, codec: str) -> Set:
    def write(folder: Path) -> None:
        film(folder / f"x{suffix}", 5, codec=codec)
        video_folder.annotate(folder / "x.json", texts=["go"], action=[[0.25, 1]] * 4, state=[[1e-3]] * 5)

    return Set("video_folder", write, {})


PREFIXES = {
    "aloha": "observations/images/", "calvin": "rgb_", "lerobot": "observation.images.", "raw": "frames_",
    "replay_zarr": "data/", "rlds": "steps/observation/", "robomimic": "obs/",
}  # fmt: skip
CHECKED = ("episode_0000100.npz", "ep_start_end_ids.npy", "scene_info.npy", "lang_annotations/auto_lang_ann.npy")
SETS = {
    "metaworld": Set("metaworld", lambda folder: write_raw(folder, ["reach"], episodes=2), {}, exact=["*.[sp]*"]),
    "raw": Set("raw", lambda folder: raw.write(folder, raw.ONE_TASK, a=raw.arrays_of(0, 5)), {}, exact=["*.npz"]),
    "video_folder mp4": _video(".mp4", "libx264"),
    "video_folder webm": _video(".webm", "libvpx-vp9"),
    "robomimic": _robomimic(None),
    "robomimic gzip": _robomimic("gzip"),
    "libero": Set("robomimic", lambda folder: robomimic.libero(folder / "x.hdf5", "x", {"demo_0": 2}), {}, library="h5py"),
    "aloha raw": _aloha("raw"),
    "aloha padded": _aloha("padded"),
    "aloha variable": _aloha("variable"),
    "replay_zarr": _replay(zipped=False),
    "replay_zarr zip": _replay(zipped=True),
    "calvin": Set(
        "calvin", lambda folder: calvin.write_set(folder, validation=False), {"depth": "static"},
        [f"training/{name}" for name in CHECKED], ["*.npz"],
    ),
    "lerobot": Set("lerobot", lambda folder: write_v3(folder, (3, 4)), {}, library="pyarrow"),
    "rlds": Set("rlds", lambda folder: rlds.toy(folder, rlds.episode(0, 2), rlds.episode(1, 2)), {}, exact=["*"], rate_hz=5),
}  # fmt: skip


@pytest.fixture(scope="module", params=SETS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Set, Path, list[dict[str, Any]]]:
    """A set, its folder, and all its values."""
    kind, folder = SETS[request.param], tmp_path_factory.mktemp("set") / "set"
    folder.mkdir()
    kind.write(folder)
    return kind, folder, everything(kind.opened(folder))


Case = tuple[Set, Path, list[dict[str, Any]]]


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """Whatever is there is as it was; a camera or vector may be left out, which a note says."""
    return len(found) == len(expected) and all(
        np.array_equal(value, before[name])
        for after, before in zip(found, expected, strict=True)
        for name, value in after.items()
    )


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_gives_whole_episodes_or_one_sentence(case: Case, data: st.DataObject) -> None:
    """Formats without checksums cannot tell a flipped number or pixel from a recorded one: there other values may come out, but
    no other error and no other length."""
    kind, folder, expected = case
    files = sorted({file for pattern in kind.fuzzed for file in folder.glob(pattern) if file.is_file()})
    file = data.draw(st.sampled_from(files))
    original = file.read_bytes()
    file.write_bytes(data.draw(damaged(original)))
    try:
        found = everything(kind.opened(folder))
    except SvamError as error:
        assert "\n" not in str(error)
    else:
        assert not any(file.match(pattern) for pattern in kind.exact) or same(found, expected)
    finally:
        file.write_bytes(original)


def test_the_rate_can_be_replaced(case: Case) -> None:
    kind, folder, expected = case
    source = replace(kind, rate_hz=7).opened(folder)
    assert source.describe().rate_hz == source.read(0).rate_hz == 7 and same(everything(source), expected)


def test_cameras_are_chosen_in_order_with_or_without_a_prefix(case: Case) -> None:
    kind, folder, expected = case
    cameras = kind.opened(folder).describe().cameras
    for prefix in ("", PREFIXES.get(kind.source, "")):
        source = replace(kind, cameras=[prefix + camera for camera in reversed(cameras)]).opened(folder)
        assert list(source.describe().cameras) == cameras[::-1] and same(everything(source), expected)
    with refused("convert.cameras", *cameras):
        replace(kind, cameras=["nowhere"]).opened(folder).describe()


def test_a_pointer_of_git_lfs_is_called_so(case: Case) -> None:
    """In whichever file it is, but for those that hold nothing (zarr's groups)."""
    kind, folder, _ = case
    for file in sorted(
        {file for pattern in kind.fuzzed for file in folder.glob(pattern) if file.is_file()} - {*folder.rglob(".zgroup")}
    ):
        original = file.read_bytes()
        file.write_text(LFS_POINTER)
        try:
            with refused("a Git LFS pointer, not the file itself", file.name):
                everything(kind.opened(folder))
        finally:
            file.write_bytes(original)


@pytest.mark.parametrize("name", ["metaworld", "raw", "video_folder mp4", "lerobot"])
def test_tasks_are_the_sets_own_whatever_sentence_replaces_theirs(name: str, tmp_path: Path) -> None:
    """`convert.tasks` chooses by them."""
    kind = SETS[name]
    kind.write(tmp_path)
    own, source = kind.opened(tmp_path), replace(kind, instruction="say so").opened(tmp_path)
    tasks = [own.shape(index).task for index in range(len(own))]
    assert [source.shape(index).task for index in range(len(source))] == tasks
    assert [(e.task, e.instruction) for e in map(source.read, range(len(source)))] == [(task, "say so") for task in tasks]
    instructions = source.describe().instructions
    assert set(tasks) <= set(instructions) and all(said["train"] == ["say so"] for said in instructions.values())


def test_it_goes_to_a_worker(case: Case) -> None:
    """It holds no open file and no frames; the copy reads the same. A reader that stops early leaves nothing open."""
    kind, folder, expected = case
    source = kind.opened(folder)
    blocks = iter(frame_blocks(source.read(0).frames[source.describe().cameras[0]]))
    next(blocks)
    getattr(blocks, "close", lambda: None)()
    assert len(pickle.dumps(source)) < 20_000
    assert same(everything(copy.deepcopy(source)), expected)


def test_a_folder_that_is_not_there_or_empty(case: Case, tmp_path: Path) -> None:
    kind = case[0]
    with refused("no such (file or )?directory", "nowhere"):
        len(kind.opened(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").touch()
    with refused("no |found none|expected", "empty", "notes.md"):
        len(kind.opened(tmp_path / "empty"))


def test_a_missing_library_is_named_and_not_needed_by_others(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, folder, _ = case
    if not kind.library:
        for library in ("pyarrow", "h5py"):
            monkeypatch.setitem(sys.modules, library, None)
        assert len(kind.opened(folder)) > 0
        return
    monkeypatch.setitem(sys.modules, kind.library, None)
    with refused(rf'convert.source is .*, which needs {kind.library}: pip install -e "\.\['):
        kind.opened(folder)


def test_checksums_of_records_do_not_make_them_right(tmp_path: Path) -> None:
    """RLDS records whose contents are damaged and whose checksum is not: the parser itself must cope."""
    good = tfds_writer.example(rlds.episode(0, 2))
    rlds.toy(tmp_path, good)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(content=damaged(good))
    def check(content: bytes) -> None:
        (tmp_path / "toy-train.tfrecord-00000-of-00001").write_bytes(tfds_writer.framed([content]))
        try:
            everything(rlds.opened(tmp_path))
        except SvamError as error:
            assert "\n" not in str(error)

    check()


def test_the_recipe_for_other_formats_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script of the page, run as a person would."""
    page = (ROOT / "svam/sources/README.md").read_text(encoding="utf-8")
    recordings = [
        {
            "pictures": squares(n, (32, 16)), "actions": np.ones((n, 7)) * n, "joints": np.zeros((n, 2), np.float32),
            "sentence": f"count to {n}",
        }
        for n in (2, 3)
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0], {"recordings": recordings})
    for recording, values in zip(recordings, everything(Set("raw", str, {}).opened(tmp_path / "my_set")), strict=True):
        assert values["instruction"] == recording["sentence"] and np.array_equal(values["front"], recording["pictures"])
        assert np.array_equal(values["actions"], recording["actions"]) and values["proprioception"].shape[1] == 2


def test_pictures_that_are_called_depth_are_doubted_unless_they_are_chosen(tmp_path: Path) -> None:
    """RLDS has a test of its own."""
    robomimic.isaac(tmp_path / "robomimic/x.hdf5", demo_0={"top_Depth": squares(3)})
    aloha.record(tmp_path / "aloha/episode_0.hdf5", 3, cameras=("cam_depth",))
    replay_zarr.write(tmp_path / "replay_zarr/x.zarr", [3], depth=squares(3), img=None)
    for name, camera in (("robomimic", "obs/top_Depth"), ("aloha", "observations/images/cam_depth"), ("replay_zarr", "depth")):
        module, notes = import_module(f"svam.sources.{name}"), []
        for cameras in ([], [camera]):
            choice = Choice(cameras=cameras, rate_hz=10, instruction="go")
            notes.append(" ".join(module.open_source(tmp_path / name, module.Options(), choice).notes))
        said = f"{camera} is read as colours; is it depth? to leave it out, name the other cameras in convert.cameras"
        assert said in notes[0] and "is it depth" not in notes[1]


def test_a_turn_that_tensorflow_ignores_is_noted(tmp_path: Path) -> None:
    """RLDS, of the first picture, whatever the others say; the other sources turn pictures as their EXIF asks."""
    turn, file, upright = Image.Exif(), io.BytesIO(), [tfds_writer.png(frame) for frame in rlds.pixels(0, 4)]
    turn[0x0112] = 6
    Image.fromarray(rlds.pixels(0, 4)[0]).save(file, "PNG", exif=turn)
    turned = file.getvalue()
    source = rlds.toy(tmp_path, rlds.episode(0, observation__image=[turned, *upright[1:]]))
    asked = "record 0: the EXIF of pictures of image asks to turn them; they are stored unturned, as TensorFlow reads them"
    assert source.notes[0].endswith(asked) and np.array_equal(frames_of(source.read(0)), rlds.pixels(0, 4))
    assert rlds.toy(tmp_path, rlds.episode(0, observation__image=[upright[0], *[turned] * 3])).notes == []
