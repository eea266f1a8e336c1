"""Recordings of others, folder by folder, through the `convert` stage: each becomes a store that validates, or the one sentence
that it deserves. Small sets with one fault each are read exactly, or refused with the way out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from stages.convert import app
from svam.console import console
from svam.contract import EpisodeSource
from svam.episodes.__main__ import app as episodes
from svam.episodes.options import open_named_source
from svam.episodes.store import EpisodeStore
from svam.params import Params, load_params
from tests import ROOT
from tests.sources.common import Array, everything, refused
from tests.toy import write_toy_params

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
    write_toy_params(ROOT / "params.yaml", tmp_path / "params.yaml", params)
    console.width = 4000
    return CliRunner().invoke(app, [str(folder), str(tmp_path / "episodes.zarr"), "--params", str(tmp_path / "params.yaml")])


@pytest.mark.parametrize("folder", CONVERTED)
def test_it_converts(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes, count, steps = CONVERTED[folder]
    result = converted(REAL / folder, changes, tmp_path)
    assert result.exit_code == 0, result.output
    store = EpisodeStore.open(tmp_path / "episodes.zarr")
    assert (len(store.episode_ends), len(store)) == (count, steps)
    assert all(store.episode_instructions)
    checked = CliRunner().invoke(episodes, ["validate", str(tmp_path / "episodes.zarr")])
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


def test_no_folder_is_forgotten() -> None:
    named = {Path(folder) for folder in [*CONVERTED, *REFUSED]}
    found = {path.relative_to(REAL) for path in REAL.glob("*/*") if path.is_dir()}
    assert found == named


FAILING = ROOT.parent / "shared/failing"
DEPTH = r"'observation.images.depth': a picture in mode I;16.*is it depth\?; leave the camera out: convert.cameras: \[front\]$"
LENIENT = {"source": "robomimic", "missing_instruction": "go"}
READ: list[tuple[str, dict[str, Any], list[int], str]] = [
    ("cameras_have_no_files/data_image_but_mp4", {}, [0, 1, 2], "of dtype 'image', but its pictures lie in videos"),
    ("cameras_have_no_files/data_uint8_lists", {}, [0, 1, 2], ""),
    ("convert_cameras_not_applied/data_lerobot", {"cameras": ["front"]}, [0, 1, 2], ""),
    ("convert_cameras_not_applied/data_lerobot", {"cameras": ["observation.images.front"]}, [0, 1, 2], ""),
    (
        "convert_cameras_not_applied/data_aloha_depth",
        {"source": "aloha", "missing_instruction": "go", "cameras": ["cam_high", "cam_left_wrist"], "rate_hz": 50},
        [0, 1, 2], "",
    ),
    ("depth_without_flag/data_png16", {"cameras": ["front"]}, [0, 1, 2], ""),
    ("depth_without_flag/data_tiff", {"cameras": ["front"]}, [0, 1, 2], ""),
    ("instruction_means_three_things/data", {"missing_instruction": "go"}, [0, 1, 2], ""),
    ("isaac_lab_hdf5/data", LENIENT, [0, 1, 2], ""),
    ("one_bad_episode/data_short_video", {"drop": [1]}, [0, 2], "1 of 3 episodes are left out by choice"),
    ("one_bad_episode/data_deleted_files", {"drop": [1]}, [0, 2, 3], "1 of 4 episodes are left out by choice"),
    ("order_hides_the_rate/data", {"options": {"frames": "order"}}, [0, 1, 2], "timestamps are 0.0666667 s apart.* fps 30"),
    ("order_hides_the_rate/data", {"options": {"frames": "order"}, "rate_hz": 15}, [0, 1, 2], ""),
    ("path_template_placeholder/data_v21", {}, [0, 1, 2], "LeRobot's own 'data/chunk-.*' is taken instead"),
    ("path_template_placeholder/data_v30", {}, [0, 1, 2], "LeRobot's own 'data/chunk-.*' is taken instead"),
    ("rgb_flip_guess/data", LENIENT, [0, 1, 2], "pictures are read as stored"),
    ("single_episode/data", {"episodes": ["0:1"]}, [0], "2 of 3 episodes are left out by choice"),
    ("v3_boundaries_drift/data", {}, list(range(20)), "160 frames, and the 20 episodes in it have 160 rows"),
]  # fmt: skip
"""Folder, `convert`, numbers of the episodes, and a part of a note, "" where there is none."""
SAID: list[tuple[str, dict[str, Any], str]] = [
    (
        "cameras_have_no_files/data_video_instead_of_videos",
        {},
        "videos/.*/file-000.mp4 is not there.* holds .* video$",
    ),
    ("cameras_have_no_files/data_v21_over_v30", {}, "chunk-000 holds file-000.parquet; .* are of a v3 set"),
    ("depth_without_flag/data_png16", {}, DEPTH),
    ("depth_without_flag/data_tiff", {}, DEPTH),
    ("instruction_means_three_things/data", {}, r"no instruction; set convert.missing_instruction.*convert.drop: \[0\]$"),
    ("lfs_pointers/data", {}, "episode_000002.mp4: a Git LFS pointer, .*run git lfs pull"),
    ("one_bad_episode/data_short_video", {}, r"nearest of the 8 frames.*9 rows.*convert.drop: \[1\]$"),
    ("one_bad_episode/data_deleted_files", {}, r"episode_000001.mp4 .*no such file, .*convert.drop: \[1\]$"),
]


def opened(folder: str, changes: dict[str, Any]) -> EpisodeSource:
    params = load_params(ROOT / "params.yaml")
    convert = {**params.convert.model_dump(), "source": "lerobot", "options": {}, **changes}
    return open_named_source(FAILING / folder, Params.model_validate({**params.model_dump(), "convert": convert}))


def numbers(pictures: Array) -> list[int]:
    """The number that each picture shows: twelve bars, bit 0 on the left, white for 1."""
    width = pictures.shape[2] // 12
    bars = pictures[:, pictures.shape[1] // 2, width // 2 :: width].mean(2) > 128
    return (bars * 2 ** np.arange(12)).sum(1).tolist()


@pytest.mark.parametrize(("folder", "changes", "episodes", "note"), READ, ids=str)
def test_it_is_read_exactly(folder: str, changes: dict[str, Any], episodes: list[int], note: str) -> None:
    """Row t of episode k shows 64 k + t."""
    source = opened(folder, changes)
    shown = [numbers(values[source.describe().cameras[0]]) for values in everything(source)]
    assert shown == [[64 * k + t for t in range(source.shape(at).steps)] for at, k in enumerate(episodes)]
    assert re.search(note, "\n".join(source.notes)) if note else not source.notes


def test_a_longer_video_is_noted() -> None:
    """Which of its frames belong to the rows cannot be known."""
    assert "13 frames, but episode 1 has 9 rows" in opened("longer_video_unnoted/data", {}).notes[0]


@pytest.mark.parametrize(("folder", "changes", "sentence"), SAID, ids=str)
def test_it_says_the_way_out(folder: str, changes: dict[str, Any], sentence: str) -> None:
    with refused(sentence):
        everything(opened(folder, changes))


def test_no_fault_is_forgotten() -> None:
    named = {folder.split("/")[0] for folder, *_ in [*READ, *SAID]} | {"longer_video_unnoted"}
    assert {path.name for path in FAILING.iterdir() if path.is_dir()} == named
