"""Recordings of others, folder by folder, through the `convert` stage: each becomes a store that validates, or the one sentence
that it deserves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from stages.convert import app
from svam.console import console
from svam.episodes.__main__ import app as episodes
from svam.episodes.store import EpisodeStore
from tests import ROOT
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
    store = EpisodeStore.open(tmp_path / "episodes.zarr")
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


def test_no_folder_is_forgotten() -> None:
    named = {Path(folder) for folder in [*CONVERTED, *REFUSED]}
    found = {path.relative_to(REAL) for path in REAL.glob("*/*") if path.is_dir()}
    assert found == named
