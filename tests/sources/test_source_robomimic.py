"""The robomimic/LIBERO source against files written here in the published layouts, each read again with plain h5py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from svam.contract import Choice
from svam.episodes.options import open_named_source
from svam.sources.robomimic import Options, RobomimicSource, open_source
from tests.episodes.test_options import raw_params
from tests.sources.common import change, frames_of, refused

SENTENCE = "lift the cube"


def write(
    file: Path, lengths: dict[str, int], attributes: dict[str, Any], cameras: list[str], vectors: dict[str, int],
    seed: int = 0, compression: str | None = None,
) -> None:  # fmt: skip
    """Demonstrations of random pictures and random vectors of such widths."""
    rng = np.random.default_rng(seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as root:
        data = root.create_group("data")
        data.attrs.update(attributes)
        for name, steps in lengths.items():
            demo = data.create_group(name)
            demo.attrs["num_samples"] = steps
            for key, width in ({"actions": 7} | vectors).items():
                demo[key] = rng.normal(size=(steps, width))
            for camera in cameras:
                stored = rng.integers(0, 256, (steps, 12, 14, 3), dtype=np.uint8)
                demo.create_dataset(camera, data=stored, compression=compression)


def robomimic(
    file: Path, lengths: dict[str, int], seed: int = 0, rate: float | None = 20, compression: str | None = None
) -> None:
    """As robomimic's dataset_states_to_obs.py writes it."""
    kwargs = {} if rate is None else {"control_freq": rate}
    attributes = {"total": sum(lengths.values()), "env_args": json.dumps({"env_name": "Lift", "env_kwargs": kwargs})}
    cameras = [f"{group}/{name}_image" for group in ("obs", "next_obs") for name in ("agentview", "robot0_eye_in_hand")]
    widths = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "object": 10}
    vectors = {"states": 32} | {f"{group}/{key}": width for group in ("obs", "next_obs") for key, width in widths.items()}
    write(file, lengths, attributes, cameras, vectors, seed, compression)


def libero(file: Path, sentence: Any, lengths: dict[str, int], seed: int = 0, states: int = 92, opengl: bool = True) -> None:
    """As LIBERO's create_dataset.py writes it."""
    attributes = {
        "env_args": json.dumps({"env_name": "X", "env_kwargs": {"control_freq": 20}}),
        "problem_info": json.dumps({"problem_name": "p", "domain_name": "d", "language_instruction": sentence}),
    } | ({"macros_image_convention": "opengl"} if opengl else {})
    widths = {"ee_states": 6, "gripper_states": 2, "joint_states": 7, "ee_pos": 3, "ee_ori": 3}
    vectors = {"states": states, "robot_states": 9} | {f"obs/{key}": width for key, width in widths.items()}
    write(file, lengths, attributes, ["obs/agentview_rgb", "obs/eye_in_hand_rgb"], vectors, seed)


def open_said(path: Path, choice: dict[str, Any] | None = None, **options: Any) -> RobomimicSource:
    return open_source(path, Options(**options), Choice(**{"instruction": SENTENCE} | (choice or {})))


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_robomimic_every_value_and_alignment(tmp_path: Path, compression: str | None) -> None:
    robomimic(tmp_path / "image.hdf5", {"demo_0": 3, "demo_10": 4, "demo_2": 70}, compression=compression)
    source = open_said(tmp_path / "image.hdf5")
    assert source.notes == []
    description = source.describe()
    assert description.rate_hz == 20 and description.cameras == ["agentview", "robot0_eye_in_hand"]
    assert description.instructions == {SENTENCE: {"train": [SENTENCE], "held_out": []}}
    assert [(source.shape(i).steps, source.shape(i).held_out) for i in range(len(source))] == [(3, None), (70, None), (4, None)]
    with h5py.File(tmp_path / "image.hdf5") as root:
        for i, name in enumerate(("demo_0", "demo_2", "demo_10")):
            episode, demo = source.read(i), root[f"data/{name}"]
            assert episode.provenance == {"file": "image.hdf5", "demo": name} and episode.instruction == SENTENCE
            # Row t of every array, not a neighbour: all rows are random, so a shift cannot go unseen.
            assert np.array_equal(episode.actions, demo["actions"][:].astype(np.float32))
            assert np.array_equal(episode.state, demo["states"][:].astype(np.float32))
            keys = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
            joined = np.concatenate([demo[f"obs/{key}"][:] for key in keys], axis=1)
            assert np.array_equal(episode.proprioception, joined.astype(np.float32))
            for camera in description.cameras:
                assert np.array_equal(frames_of(episode, camera), demo[f"obs/{camera}_image"][:])


def test_libero_two_tasks(tmp_path: Path) -> None:
    libero(tmp_path / "a" / "KITCHEN_SCENE1_open_the_drawer_demo.hdf5", "open the drawer", {"demo_1": 4, "demo_0": 3})
    libero(tmp_path / "b" / "push_the_plate_demo.hdf5", ["push", "the", "plate"], {"demo_0": 5}, seed=1, states=47)
    source = open_source(tmp_path, Options())
    assert source.describe().cameras == ["agentview", "eye_in_hand"]
    assert list(source.describe().instructions) == ["open the drawer", "push the plate"]
    notes = " ".join(source.notes)
    assert "states, the simulator's own, is left out" in notes and "upside down" in notes and "'after'" in notes
    drawer = "a/KITCHEN_SCENE1_open_the_drawer_demo"
    for i, (file, name) in enumerate(((drawer, "demo_0"), (drawer, "demo_1"), ("b/push_the_plate_demo", "demo_0"))):
        episode = source.read(i)
        assert episode.state is None and episode.task == ("push the plate" if i == 2 else "open the drawer")
        with h5py.File(tmp_path / f"{file}.hdf5") as root:
            demo = root[f"data/{name}"]
            assert np.array_equal(episode.actions, demo["actions"][:].astype(np.float32))
            assert np.array_equal(
                episode.proprioception, np.hstack([demo["obs/ee_states"][:], demo["obs/gripper_states"][:]]).astype(np.float32)
            )
            for camera in ("agentview", "eye_in_hand"):
                assert np.array_equal(frames_of(episode, camera), np.stack([np.flipud(p) for p in demo[f"obs/{camera}_rgb"]]))


@pytest.mark.parametrize("opengl", [True, False])
def test_flip(tmp_path: Path, opengl: bool) -> None:
    libero(tmp_path / "x.hdf5", "x", {"demo_0": 3}, opengl=opengl)
    with h5py.File(tmp_path / "x.hdf5") as root:
        stored = root["data/demo_0/obs/agentview_rgb"][:]
    for flip, turned in (("auto", stored[:, ::-1]), ("none", stored), ("rotate_180", np.rot90(stored, 2, axes=(1, 2)))):
        assert np.array_equal(frames_of(open_source(tmp_path, Options(flip=flip)).read(0), "agentview"), turned)
    change(tmp_path / "x.hdf5", "data/demo_0/obs/top_rgb", stored)  # a camera that LIBERO does not have, chosen or not
    for cameras in ([], ["agentview"]):
        source = open_said(tmp_path, {"cameras": cameras})
        assert np.array_equal(frames_of(source.read(0), "agentview"), stored[:, ::-1] if opengl else stored)


def test_observations_after_the_action(tmp_path: Path) -> None:
    """The picture stored beside action t shows its result: it goes with action t + 1, and the last picture with none."""
    libero(tmp_path / "x.hdf5", "x", {"demo_0": 67})
    source = open_source(tmp_path, Options(observations="after", flip="none"))
    episode = source.read(0)
    assert source.shape(0).steps == episode.steps == 66
    with h5py.File(tmp_path / "x.hdf5") as root:
        demo = root["data/demo_0"]
        assert np.array_equal(frames_of(episode, "agentview"), demo["obs/agentview_rgb"][:-1])
        assert np.array_equal(episode.actions, demo["actions"][1:].astype(np.float32))
        assert np.array_equal(episode.state, demo["states"][1:].astype(np.float32))
        assert np.array_equal(episode.proprioception[:, :6], demo["obs/ee_states"][:-1].astype(np.float32))


def test_masks(tmp_path: Path) -> None:
    robomimic(tmp_path / "image.hdf5", {f"demo_{i}": 2 for i in range(5)})
    with h5py.File(tmp_path / "image.hdf5", "a") as root:
        root["mask/train"] = np.array([b"demo_0", b"demo_3"])
        root["mask/valid"] = ["demo_1", "demo_2", "demo_77"]
        root["mask/few"] = np.array([b"demo_3", b"demo_2"])
    source = open_said(tmp_path)
    assert [source.shape(i).held_out for i in range(5)] == [False, True, True, False, None]
    assert "demo_77" in source.notes[0] and "1 demonstrations are in no mask of the split" in source.notes[1]
    few = open_said(tmp_path, filter_key="few")
    assert [(few.shape(i).name, few.shape(i).held_out) for i in range(len(few))] == [
        ("image/demo_2", True), ("image/demo_3", False),
    ]  # fmt: skip
    with refused("no mask/many, .* it has few, train, valid"):
        open_said(tmp_path, filter_key="many")
    with h5py.File(tmp_path / "image.hdf5", "a") as root:
        root["mask/valid"][0] = "demo_3"
        root["mask/few"][0] = "demo_8"
    both = open_said(tmp_path, filter_key="few")
    assert "1 are in mask/train and one that holds out: held out, such as demo_3" in both.notes[0]
    assert "2 demonstrations that are not there, such as 'demo_77'" in both.notes[1]
    assert [both.shape(i).held_out for i in range(len(both))] == [True]
    with h5py.File(tmp_path / "image.hdf5", "a") as root:
        root.move("mask/valid", "mask/test")
        del root["mask/train"]
        root["mask/train"], root["data/demo_0"].attrs["num_samples"] = [0, 3], 1
    source = open_said(tmp_path)
    assert [source.shape(i).held_out for i in range(5)] == [None, None, True, True, None] and source.shape(0).steps == 2
    assert "mask/train holds no names of demonstrations, and is not used" in source.notes[0]
    assert any("num_samples of demonstrations is not the number of their actions; all" in note for note in source.notes)


def test_where_the_instruction_comes_from(tmp_path: Path) -> None:
    robomimic(tmp_path / "KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5", {"demo_0": 2, "demo_1": 2})
    with refused("data/demo_0: no instruction; set convert.missing_instruction"):
        open_source(tmp_path, Options())
    assert open_source(tmp_path, Options(instruction_from_file_name=True)).read(0).instruction == "turn on the stove"
    with h5py.File(tmp_path / "KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5", "a") as root:
        for name, sentence in (("demo_0", "open it"), ("demo_1", "close it")):
            root[f"data/{name}"].attrs["ep_meta"] = json.dumps({"lang": sentence})
    source = open_source(tmp_path, Options())
    assert [source.read(i).instruction for i in range(2)] == ["open it", "close it"]
    named = Options(instructions={"KITCHEN_SCENE3_turn_on_the_stove_demo": "b"})
    assert open_source(tmp_path, named).read(0).instruction == "b"
    with refused(r"names 'z', which is not there"):
        open_source(tmp_path, Options(instructions={"z": "y"}))
    libero(tmp_path / "x.hdf5", 5, {"demo_0": 2})
    with refused("language_instruction .* is 5, expected a sentence"):
        open_source(tmp_path / "x.hdf5", Options())
    for wrong, message in ((np.bytes_(b'{"language_instruction": "\xff"}'), "not valid UTF-8"), ("{", "is not valid JSON")):
        with h5py.File(tmp_path / "x.hdf5", "a") as root:
            root["data"].attrs["problem_info"] = wrong
        with refused(f"problem_info' of data.* {message}"):
            open_source(tmp_path / "x.hdf5", Options())


def test_rates(tmp_path: Path) -> None:
    """Of robomimic's and of Isaac Lab's files, and what else the latter's attributes and groups say."""
    robomimic(tmp_path / "a.hdf5", {"demo_0": 2}, rate=None)
    source = open_said(tmp_path)
    assert source.describe().rate_hz == 20 and "20 Hz are assumed" in source.notes[0]
    robomimic(tmp_path / "b.hdf5", {"demo_0": 2}, rate=30)
    with refused("b.hdf5: data/demo_0: control_freq is 30.0, but None in most episodes; set convert.rate_hz"):
        open_said(tmp_path).shape(1)
    assert open_said(tmp_path, {"rate_hz": 15}).read(1).rate_hz == 15
    with h5py.File(tmp_path / "a.hdf5", "a") as root:  # as Isaac Lab writes it
        for sim, rate in (({"dt": 1 / 120, "decimation": 6}, 20), ({"dt": 0.005, "decimation": 4}, 50), ({"dt": None}, None)):
            root["data"].attrs["env_args"] = json.dumps({"env_name": "Isaac", "type": 2, "sim_args": sim})
            root.flush()
            source = open_said(tmp_path / "a.hdf5")
            assumed = "20 Hz are assumed" in " ".join(source.notes)
            assert source.describe().rate_hz == (rate or 20) and assumed == (rate is None)
        root["data"].attrs.update({"fps": 15, "obs/sample_phase": "post_step"})
    source = open_said(tmp_path / "a.hdf5")
    assert source.describe().rate_hz == 15 and "observations 'after' pairs it with the picture before" in source.notes[0]
    assert open_said(tmp_path / "a.hdf5", observations="after").notes == []
    change(tmp_path / "a.hdf5", "data/demo_0/actions")
    change(tmp_path / "a.hdf5", "data/demo_0/actions/pose", np.zeros((2, 7)))
    with refused("demo_0/actions is a group of pose, expected one dataset"):
        open_said(tmp_path / "a.hdf5")
    robomimic(tmp_path / "c" / "c.hdf5", {"demo_0": 2}, rate=-1)
    with refused("control_freq .* is -1"):
        open_said(tmp_path / "c")


def test_proprioception_by_name(tmp_path: Path) -> None:
    robomimic(tmp_path / "a.hdf5", {"demo_0": 2})
    episode = open_said(tmp_path, proprioception=["object", "robot0_eef_pos"]).read(0)
    assert episode.proprioception is not None and episode.proprioception.shape == (2, 13)
    with refused("no 'joints', which convert.options.proprioception names"):
        open_said(tmp_path, proprioception=["joints"])
    change(tmp_path / "a.hdf5", "data/demo_0/obs/robot0_eef_pos")
    source = open_said(tmp_path)
    assert source.read(0).proprioception is None and "no proprioception" in source.notes[0]


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("data", None, "no group data"),
        ("data/demo_0/actions", None, "data/demo_0/actions is missing"),
        ("data/demo_0/actions", np.zeros((4, 7)), "agentview_image has 3 steps, but the actions have 4"),
        ("data/demo_0/states", np.zeros((2, 32)), "states has 2 steps, but the actions have 3"),
        ("data/demo_0/obs/robot0_eef_pos", np.zeros((4, 3)), "robot0_eef_pos has 4 steps, but the actions have 3"),
        ("data/demo_0/obs/agentview_image", np.zeros((4, 8, 8, 3), np.uint8), "has 4 steps, but the actions have 3"),
        ("data/demo_0/obs/agentview_image", np.zeros((3, 8, 8), "u2"), "expected uint8 pictures .steps, height, width, 3."),
        ("data/demo_0/obs/agentview_image", np.full((3, 8, 8, 3), 0.5), "is 0.5 in row 0, .*255; is it depth. to leave it"),
        ("data/demo_0/obs/depth_image", np.ones((3, 8, 8, 1), np.float32), "_image is float32 .*; to leave it out, name"),
        ("data/demo_0/obs", None, "has states but no pictures"),
    ],
)
def test_one_sentence_for_each_fault(tmp_path: Path, name: str, value: Any, sentence: str) -> None:
    robomimic(tmp_path / "image.hdf5", {"demo_0": 3})
    change(tmp_path / "image.hdf5", name, value)
    with refused(sentence, "image.hdf5"):
        open_said(tmp_path).read(0)


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    robomimic(tmp_path / "a.hdf5", {"demo_0": 3})
    robomimic(tmp_path / "a_failed.hdf5", {"demo_0": 3})
    assert "1 of 2 files are named *_failed" in " ".join(open_said(tmp_path).notes)
    assert open_said(tmp_path / "a_failed.hdf5").notes == []
    (tmp_path / "a_failed.hdf5").unlink()
    libero(tmp_path / "b.hdf5", "x", {"demo_0": 3})
    with refused("b.hdf5: data/demo_0: no camera 'robot0_eye_in_hand', which other episodes have; it has agentview, eye"):
        open_said(tmp_path).shape(1)
    with refused("b.hdf5: data/demo_0: proprioception is ee_states, gripper_states, but robot0_eef_pos"):
        open_said(tmp_path, {"cameras": ["agentview"]}).shape(1)


def test_values_kept_in_another_file_are_refused(tmp_path: Path) -> None:
    robomimic(tmp_path / "a.hdf5", {"demo_0": 3})
    (tmp_path / "secret").write_bytes(bytes(range(256)))
    with h5py.File(tmp_path / "a.hdf5", "a") as root:
        del root["data/demo_0/actions"]
        external = [(str(tmp_path / "secret"), 0, 3 * 7 * 8)]
        root["data/demo_0"].create_dataset("actions", (3, 7), np.float64, external=external)
    with refused("keeps its values in other files"):
        open_said(tmp_path).read(0)
    robomimic(tmp_path / "a.hdf5", {"demo_0": 3})
    with h5py.File(tmp_path / "b.hdf5", "w") as root:
        root["data/demo_0"] = h5py.ExternalLink("a.hdf5", "data/demo_0")
    with refused("b.hdf5: data/demo_0/actions keeps its values in other files; copy .*h5copy"):
        open_said(tmp_path / "b.hdf5")


def isaac(file: Path, **demos: dict[str, Any]) -> None:
    """As Isaac Lab's recorder writes it: cameras of any name, and whether the demonstration succeeded."""
    robomimic(file, dict.fromkeys(demos, 3))
    for name, changes in demos.items():
        for key, value in {"agentview_image": None, "robot0_eye_in_hand_image": None, **changes}.items():
            if key != "success":
                change(file, f"data/{name}/obs/{key}", value)
                continue
            with h5py.File(file, "a") as root:
                root[f"data/{name}"].attrs[key] = value


def test_cameras_of_any_name(tmp_path: Path) -> None:
    """Read as they are stored: nothing says that they are upside down; alpha is dropped, channels are put last."""
    stored = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 4), dtype=np.uint8)
    seen = {"table_cam": stored[..., :3], "wrist_cam": stored, "top_rgb": np.moveaxis(stored[..., :3], -1, 1)}
    isaac(
        tmp_path / "x.hdf5",
        demo_0={**seen, "success": [1.0]},
        demo_1={**seen, "success": np.False_},
        demo_2={**seen, "success": np.nan},
    )
    source = open_said(tmp_path)
    assert source.describe().cameras == ["table_cam", "top", "wrist_cam"]
    for camera in source.describe().cameras:
        assert np.array_equal(frames_of(source.read(1), camera), stored[..., :3])
    assert [source.shape(i).success for i in range(3)] == [True, False, None]
    assert [source.shape(i).name for i in range(3)] == ["x/demo_0", "x/demo_1", "x/demo_2"]
    assert any("set convert.options.flip: vertical" in note for note in source.notes)
    for name in ("top", "top_rgb", "obs/top_rgb"):
        assert open_said(tmp_path, {"cameras": [name]}).describe().cameras == ["top"]
    with refused("has no camera of convert.cameras; it has object, .*table_cam, top_rgb, wrist_cam"):
        open_said(tmp_path, {"cameras": ["left"]})
    isaac(tmp_path / "none" / "x.hdf5", demo_0={"seen": np.zeros((3, 6, 8), np.float32)})
    with refused(r"has states but no pictures.*seen float32 \(3, 6, 8\); render them first"):
        open_said(tmp_path / "none")
    change(tmp_path / "none" / "x.hdf5", "data/demo_0/states")
    with refused("has observations but no pictures.*; bring the set as `raw`"):
        open_said(tmp_path / "none")


def test_cameras_beside_the_other_observations(tmp_path: Path) -> None:
    """As Isaac Lab Arena's recorder writes them; one that `obs` has, too, is that of `obs`."""
    stored = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)
    isaac(tmp_path / "x.hdf5", demo_0={"table_cam": stored})
    for name, pictures in {"table_cam": stored + 1, "pov_rgb": stored + 2, "depth": np.ones((3, 6, 8, 1), np.float32)}.items():
        change(tmp_path / "x.hdf5", f"data/demo_0/camera_obs/{name}", pictures)
    source = open_said(tmp_path)
    assert source.describe().cameras == ["pov", "table_cam"] and "camera_obs/depth float32" in " ".join(source.notes)
    assert np.array_equal(frames_of(source.read(0), "pov"), stored + 2)
    assert np.array_equal(frames_of(source.read(0), "table_cam"), stored)
    for name in ("pov", "pov_rgb", "camera_obs/pov_rgb"):
        assert open_said(tmp_path, {"cameras": [name]}).describe().cameras == ["pov"]


def test_grey_pictures(tmp_path: Path) -> None:
    """Of cameras by name, or where they are asked for: other bytes of one channel may be labels."""
    grey = np.random.default_rng(0).integers(0, 256, (3, 6, 8), dtype=np.uint8)
    isaac(tmp_path / "x.hdf5", demo_0={"top_image": grey[..., None], "left": grey, "right": grey[:, None]})
    source = open_said(tmp_path)
    assert source.describe().cameras == ["top"] and "obs/left uint8 (6, 8)" in " ".join(source.notes)
    source = open_said(tmp_path, {"cameras": ["top", "left", "right"]})
    assert "obs/left is grey: repeated" in " ".join(source.notes)
    for camera in ("top", "left", "right"):
        assert np.array_equal(frames_of(source.read(0), camera), np.repeat(grey[..., None], 3, axis=-1))


@pytest.mark.parametrize("kind", [np.uint16, np.int64, np.float32])
def test_cameras_whose_numbers_are_no_bytes(tmp_path: Path, kind: Any) -> None:
    """Read where they are asked for, else left out with a note, as depth of any name is."""
    stored = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)
    isaac(tmp_path / "x.hdf5", demo_0={"top": stored.astype(kind), "to_plane": np.zeros((3, 6, 8, 1), np.float32)})
    with refused(r"no pictures.*top \w+ \(3, 6, 8, 3\); convert.cameras can name one that is grey, or of another type"):
        open_said(tmp_path)
    assert np.array_equal(frames_of(open_said(tmp_path, {"cameras": ["top"]}).read(0)), stored)
    isaac(tmp_path / "y" / "y.hdf5", demo_0={"top": stored.astype(kind), "to_plane": np.zeros((3, 6, 8)), "wrist": stored})
    source = open_said(tmp_path / "y")
    notes = " ".join(source.notes)
    assert source.describe().cameras == ["wrist"] and "obs/top" in notes and "obs/to_plane float64 (6, 8)" in notes


def test_a_bad_demonstration_can_be_left_out(tmp_path: Path) -> None:
    robomimic(tmp_path / "a.hdf5", {"demo_0": 3, "demo_1": 3, "demo_2": 3})
    change(tmp_path / "a.hdf5", "data/demo_1/obs/agentview_image")
    (tmp_path / "b.hdf5").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    source = open_said(tmp_path)
    assert len(source) == 4 and source.read(2).steps == 3
    with refused("demo_1: no camera 'agentview', which other episodes have"):
        source.shape(1)
    with refused("b.hdf5: a Git LFS pointer"):
        source.shape(3)
    assert open_said(tmp_path, {"cameras": ["robot0_eye_in_hand_image"]}).read(1).steps == 3
    assert source.names == ["a/demo_0", "a/demo_1", "a/demo_2", "b"]
    change(tmp_path / "a.hdf5", "data/demo_2/actions", np.zeros((3, 6)))
    with refused(r"demo_2: actions is \(n, 6\), but \(n, 7\) in most episodes"):
        open_said(tmp_path, {"cameras": ["robot0_eye_in_hand"]}).shape(2)


def test_what_is_not_chosen_may_be_anything(tmp_path: Path) -> None:
    """Whether pictures are upside down does not depend on what `convert.cameras` leaves out being sound."""
    libero(tmp_path / "x.hdf5", "x", {"demo_0": 3}, opengl=False)
    with h5py.File(tmp_path / "x.hdf5", "a") as root, h5py.File(tmp_path / "other.h5", "w") as other:
        observations, other["seen"] = root["data/demo_0/obs"], np.zeros((3, 6, 8, 3), np.uint8)
        stored = observations["agentview_rgb"][:]
        observations["extra_cam"] = h5py.ExternalLink("other.h5", "seen")
        observations["nothing"], observations["cam@2"] = h5py.Empty(np.uint8), stored
    with refused("extra_cam keeps its values in other files"):
        open_said(tmp_path / "x.hdf5")
    for cameras, seen in ((["agentview"], stored), (["cam@2"], stored)):
        source = open_said(tmp_path / "x.hdf5", {"cameras": cameras})
        assert np.array_equal(frames_of(source.read(0), cameras[0]), seen)


def test_tasks_are_the_files_own_where_their_sentence_is_replaced(tmp_path: Path) -> None:
    libero(tmp_path / "a.hdf5", "open the drawer", {"demo_0": 3})
    libero(tmp_path / "b.hdf5", "push the plate", {"demo_0": 4})
    params = raw_params(source="robomimic", instruction=SENTENCE, tasks=["push the plate"], options={"flip": "none"})
    source = open_named_source(tmp_path, params)
    assert [source.shape(i).steps for i in range(len(source))] == [4]
    assert source.describe().instructions == {"push the plate": {"train": [SENTENCE], "held_out": []}}
    assert (source.read(0).task, source.read(0).instruction) == ("push the plate", SENTENCE)
    libero(tmp_path / "b.hdf5", 5, {"demo_0": 4})  # no text: what is replaced need not be sound
    assert open_said(tmp_path / "b.hdf5").read(0).task == SENTENCE


def test_folders_that_look_like_a_split_are_noted(tmp_path: Path) -> None:
    for folder in ("Train", "val"):
        robomimic(tmp_path / folder / "a.hdf5", {"demo_0": 2})
    note = "the folders Train, val are read as one and say no split; one is drawn"
    assert note in " ".join(open_said(tmp_path).notes)
    with h5py.File(tmp_path / "val/a.hdf5", "a") as root:
        root["mask/valid"] = ["demo_0"]
    assert note not in " ".join(open_said(tmp_path).notes) and open_said(tmp_path / "val").notes == []
