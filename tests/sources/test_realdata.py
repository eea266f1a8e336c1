"""Recordings of others, folder by folder, through the `convert` stage: each becomes a store that validates, or the one sentence
that it deserves."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from stages.convert import app
from svam.console import console
from svam.contract import Episode, EpisodeSource
from svam.episodes.__main__ import app as episodes
from svam.episodes.joined import open_store
from svam.episodes.options import open_named_source
from svam.errors import SvamError
from tests import ROOT
from tests.episodes.test_options import raw_params
from tests.sources.common import frames_of
from tests.toy import invoke, write_toy_params

REAL = ROOT.parent / "shared/realdata"
pytestmark = pytest.mark.skipif(
    not REAL.is_dir(), reason=f"{REAL} is not here: recordings of others are no part of the project"
)

CONVERTED: dict[str, tuple[dict[str, Any], int, int]] = {
    "lerobot_v2.1/cr5_grasp_cube": ({"source": "lerobot"}, 5, 530),
    "lerobot_v2.0/gr00t_robot_sim_PickNPlace": ({"source": "lerobot"}, 5, 2096),
    "lerobot_v3.0/ioai_fixture_v3": ({"source": "lerobot"}, 2, 6),
    "rlds_tfds/octo_debug_bridge_dataset": ({"source": "rlds", "rate_hz": 5}, 25, 250),
    "diffusion_policy_zarr/pusht_keypoint_x356_y356": (
        {"source": "replay_zarr", "instruction": "push the T", "rate_hz": 10}, 151, 24644,
    ),
    "video_text_folders/bridge": ({"source": "video_folder"}, 2, 62),
    "video_text_folders/rt1": ({"source": "video_folder"}, 2, 81),
    "video_text_folders/xhand": ({"source": "video_folder"}, 2, 163),
}  # fmt: skip
"""Folder -> `convert`, episodes, steps."""
FOUND = {"lerobot_v3.0/ioai_fixture_v3": "episodes 0 and 1 have the same frames"}
"""Folder -> what `validate` rightly finds: this fixture's pictures are all of one colour."""
NO_PICTURES = ({"source": "robomimic"}, "has states but no pictures")
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "lerobot_v2.1/screwdriver_panel_novideo": ({"source": "lerobot"}, "a data set without pictures cannot be converted"),
    "calvin_npz/calvin_text_annotations": ({"source": "calvin"}, "no CALVIN data set"),
    **{f"robomimic_hdf5/robosuite_raw_{name}": NO_PICTURES for name in ("door", "lift", "stack")},
}
"""Folder -> `convert`, and a part of the sentence."""


def converted(folder: Path, changes: dict[str, Any], tmp_path: Path) -> Result:
    """The stage's result with such values of `convert`."""
    convert = {"image_size": 32, "crop": "centre", "chunk_frames": 16, **changes}
    params = {"collect": {"tasks": [], "episodes_of": {}}, "convert": convert}
    write_toy_params(tmp_path / "params.yaml", params)
    console.width = 4000
    return invoke(app, folder, tmp_path / "episodes.zarr", "--params", tmp_path / "params.yaml")


@pytest.mark.parametrize("folder", CONVERTED)
def test_it_converts(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes, count, steps = CONVERTED[folder]
    result = converted(REAL / folder, changes, tmp_path)
    assert result.exit_code == 0, result.output
    store = open_store(tmp_path / "episodes.zarr")
    assert (len(store.episode_ends), len(store)) == (count, steps)
    assert all(store.episode_instructions)
    checked = invoke(episodes, "validate", tmp_path / "episodes.zarr")
    faults = [line for line in checked.output.splitlines() if "✗" in line]
    assert len(faults) == (folder in FOUND) and all(FOUND[folder] in fault for fault in faults), checked.output
    assert checked.exit_code == len(faults)


@pytest.mark.parametrize("folder", REFUSED)
def test_it_says_why_not(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes, sentence = REFUSED[folder]
    result = converted(REAL / folder, changes, tmp_path)
    lines = [line for line in result.output.splitlines() if line.startswith("error")]
    assert result.exit_code == 1 and len(lines) == 1 and sentence in lines[0], result.output
    assert not (tmp_path / "episodes.zarr").exists()


def opened(folder: Path, **choice: Any) -> EpisodeSource:
    """What `convert` would read; `columns` of some vectors."""
    columns = {name: [] for name in ("actions", "expert_actions", "state", "proprioception")} | choice.pop("columns", {})
    return open_named_source(folder, raw_params(columns=columns, **choice))


LEROBOT, ALOHA = {"source": "lerobot"}, {"source": "aloha", "instruction": "go"}
FAULTY: list[tuple[str, dict[str, Any], str]] = [
    ("cameras_have_no_files/data_image_but_mp4", LEROBOT, "its pictures lie in videos, and are read from there"),
    ("cameras_have_no_files/data_uint8_lists", LEROBOT, ""),
    ("cameras_have_no_files/data_v21_over_v30", LEROBOT, "no such file.* are of a v3 set: is codebase_version right"),
    ("cameras_have_no_files/data_video_instead_of_videos", LEROBOT, "no video files: .* the folder holds data, meta, video"),
    ("convert_cameras_not_applied/data_aloha_depth", ALOHA | {"cameras": ["cam_high", "cam_left_wrist"]}, ""),
    ("convert_cameras_not_applied/data_lerobot", LEROBOT | {"cameras": ["front"]}, ""),
    ("depth_without_flag/data_png16", LEROBOT, r"is it depth.*convert.cameras.*\[front\]"),
    ("depth_without_flag/data_tiff", LEROBOT | {"cameras": ["front"]}, ""),
    ("instruction_means_three_things/data", LEROBOT, "episode 0: no instruction; set convert.missing_instruction"),
    ("instruction_means_three_things/data", LEROBOT | {"missing_instruction": "go"}, ""),
    ("isaac_lab_hdf5/data", {"source": "robomimic", "instruction": "go"}, ""),
    ("lfs_pointers/data", LEROBOT, "none of 3 .*a Git LFS pointer, not the file itself; run git lfs pull"),
    ("longer_video_unnoted/data", LEROBOT, "13 frames, but episode 1 has 9 rows"),
    ("one_bad_episode/data_deleted_files", LEROBOT, r"1 of 4 episodes cannot be read.*convert.drop: \[1\]"),
    ("one_bad_episode/data_short_video", LEROBOT | {"drop": [1]}, "1 of 3 episodes are left out by choice"),
    ("order_hides_the_rate/data", LEROBOT, "timestamps are 0.0666667 s apart.*set convert.rate_hz to 15"),
    ("order_hides_the_rate/data", LEROBOT | {"options": {"frames": "order"}}, "stored at 30 Hz, which convert.rate_hz"),
    ("path_template_placeholder/data_v21", LEROBOT, "does not lead to all files; LeRobot's own .* is taken instead"),
    ("path_template_placeholder/data_v30", LEROBOT, "does not lead to all files; LeRobot's own .* is taken instead"),
    ("rgb_flip_guess/data", {"source": "robomimic", "instruction": "go"}, "set convert.options.flip: vertical if they are"),
    ("single_episode/data", LEROBOT | {"episodes": ["0:1"]}, "2 of 3 episodes are left out by choice"),
    ("v3_boundaries_drift/data", LEROBOT, "160 frames, and the 20 episodes in it have 160 rows, .*; the lengths decide"),
]
"""Folder of inputs made after public reports, `convert`, and the note or the refusal that it deserves; "": nothing is said."""


def faulty(folder: str) -> Path:
    """One of these folders, or a skip."""
    path = REAL.parent / "failing" / folder
    if not path.is_dir():
        pytest.skip(f"{path} is not beside this checkout")
    return path


@pytest.mark.parametrize(("folder", "choice", "said"), FAULTY)
def test_inputs_of_public_reports(folder: str, choice: dict[str, Any], said: str) -> None:
    path = faulty(folder)
    try:
        source = opened(path, **choice)
        episodes = [source.read(index) for index in range(len(source))]
    except SvamError as error:
        told = [str(error)]
    else:
        assert episodes and all(len(frames_of(e, camera)) == e.steps for e in episodes for camera in e.frames)
        told = [note for note in source.notes if "Hz are assumed" not in note]
    assert len(told) == bool(said) + ("path_template" in folder) and (not said or re.search(said, " ".join(told))), told


def test_no_frame_of_a_file_whose_boundaries_drift_is_another_episodes() -> None:
    """Each picture shows 64 times its episode's number plus its row, as twelve bars, the lowest bit first."""
    source = opened(faulty("v3_boundaries_drift/data"), source="lerobot")
    for number in range(20):
        frames = frames_of(source.read(number))
        bars = frames.reshape(8, frames.shape[1], 12, -1, 3).mean(axis=(1, 3, 4)) > 125
        assert (bars @ (1 << np.arange(12))).tolist() == [64 * number + row for row in range(8)]


def vectors(episode: Episode) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Actions and proprioception."""
    assert episode.actions is not None and episode.proprioception is not None
    return episode.actions, episode.proprioception


@pytest.mark.parametrize("folder", ["bridge", "rt1"])
def test_differences_of_recorded_poses_are_the_actions_that_others_made_of_them(folder: str) -> None:
    """IRASim computed the actions of these sets from the states: the way to the next pose, in the tool's frame."""
    path = REAL / "video_text_folders" / folder
    way = {"columns": [0, 6], "proprioception": [0, 6], "kind": "euler_xyz", "frame": "tool"}
    recorded, _ = vectors(opened(path, source="video_folder").read(0))
    poses = {"source": "video_folder", "columns": {"actions": ["proprioception"]}, "shift": 1}
    made, _ = vectors(opened(path, **poses, differences=[way]).read(0))
    assert len(made) == len(recorded) - 1 and np.abs(recorded[:, :3]).max() > 0.01
    np.testing.assert_allclose(made[:, :6], recorded[:-1, :6], atol=2e-6)


PUSHT: dict[str, Any] = {
    "source": "replay_zarr", "instruction": "push the T", "rate_hz": 10, "episodes": ["0:2"],
    "options": {"proprioception": ["state"]},
}  # fmt: skip


def test_rates_columns_and_limits_of_a_recording() -> None:
    path = REAL / "diffusion_policy_zarr/pusht_keypoint_x356_y356"
    whole = opened(path, **PUSHT).read(1)
    actions, state = vectors(whole)
    source = opened(
        path, **PUSHT, resample_hz=5, shift=1, columns={"proprioception": ["proprioception[4]", "actions"]},
        limits=[{"columns": [0, 2], "low": 100, "high": 300}],
    )  # fmt: skip
    half = source.read(1)
    n = (len(actions) + 1) // 2 - 1
    made, proprioception = vectors(half)
    assert half.steps == source.shape(1).steps == n and (made == np.clip(actions[2::2], 100, 300)[:n]).all()
    assert (proprioception == np.concatenate([state[:, 4:], actions], axis=1)[::2][:n]).all()
    camera = next(iter(half.frames))
    assert (frames_of(half, camera) == frames_of(whole, camera)[::2][:n]).all()
    third, _ = vectors(opened(path, **PUSHT, resample_hz=15).read(1))
    np.testing.assert_allclose(third[1], actions[0] + (actions[1] - actions[0]) * 2 / 3, rtol=1e-6)


def test_angles_of_a_recording() -> None:
    path, angles = REAL / "video_text_folders/rt1", [{"columns": [0, 3], "low": -np.pi, "high": np.pi}]
    _, state = vectors(opened(path, source="video_folder").read(0))
    choice = {"source": "video_folder", "columns": {"actions": ["proprioception[3:6]"]}}
    turned, _ = vectors(opened(path, **choice, unwrap=angles).read(0))
    np.testing.assert_allclose(turned, np.unwrap(state[:, 3:6].astype(np.float64), axis=0), rtol=1e-6)


def test_a_gripper_of_zeros_and_ones() -> None:
    path, choice = REAL / "rlds_tfds/octo_debug_bridge_dataset", {"source": "rlds", "rate_hz": 5}
    actions, _ = vectors(opened(path, **choice).read(0))
    made, _ = vectors(opened(path, **choice, binary_dimensions=[6], binary_values=[0, 1]).read(0))
    assert (made[:, 6] == actions[:, 6] * 2 - 1).all() and (made[:, :6] == actions[:, :6]).all()


def test_parts_that_a_file_describes(tmp_path: Path) -> None:
    """Real lerobot episodes, with sentences from a csv beside them."""
    path, choice = tmp_path / "cr5", {"source": "lerobot", "episodes": [3]}
    shutil.copytree(REAL / "lerobot_v2.1/cr5_grasp_cube", path)
    whole = opened(path, **choice).read(0)
    lines = ["episode,text,start,end", "3,reach it,0,40", "3,lift it,40,70", "3,raise it,40,70", ""]
    (path / "said.csv").write_text("\n".join(lines))
    source = opened(path, **choice, captions="said.csv")
    assert [source.shape(n).task for n in range(len(source))] == ["reach it", "lift it"]
    assert source.describe().instructions["lift it"]["train"] == ["lift it", "raise it"]
    part, camera = source.read(1), next(iter(whole.frames))
    assert all((one == other[40:70]).all() for one, other in zip(vectors(part), vectors(whole), strict=True))
    assert part.instruction == "lift it" and (frames_of(part, camera) == frames_of(whole, camera)[40:70]).all()


def test_no_folder_is_forgotten() -> None:
    named = {Path(folder) for folder in [*CONVERTED, *REFUSED]}
    found = {path.relative_to(REAL) for path in REAL.glob("*/*") if path.is_dir()}
    assert found == named
    failing = REAL.parent / "failing"
    if failing.is_dir():
        assert {path.relative_to(failing).as_posix() for path in failing.glob("*/data*")} == {folder for folder, *_ in FAULTY}
