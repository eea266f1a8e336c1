"""Which episodes are chosen, in the same words for every source; all that cannot be read is listed at once."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from svam.contract import EpisodeShape
from svam.episodes.inspection import recording_facts
from svam.episodes.options import ChosenEpisodes, open_named_source, open_recording
from svam.files import FileError
from svam.params import Convert, Params, load_params
from tests import ROOT
from tests.recorded import SETTINGS, Recorded, make_episode
from tests.sources.common import refused
from tests.sources.lerobot_sets import write_v2
from tests.sources.test_source_raw import ONE_TASK, arrays_of, write

TASKS = ["push", "pick", "push", "pick", "push", "lift"]


class Labelled(Recorded):
    """Six episodes called a to f; the even ones succeeded."""

    def shape(self, index: int) -> EpisodeShape:
        shape = super().shape(index)
        return dataclasses.replace(shape, name="abcdef"[index], task=TASKS[index], success=index % 2 == 0)


SOURCE = Labelled([make_episode(task, 2 + seed, seed) for seed, task in enumerate(TASKS)])


COMMITTED = load_params(ROOT / "params.yaml")


def chosen(source: Recorded = SOURCE, **choice: Any) -> ChosenEpisodes:
    return ChosenEpisodes(source, Convert.model_validate({**SETTINGS.model_dump(), **choice}))


@pytest.mark.parametrize("choice, numbers", [
    ({}, [0, 1, 2, 3, 4, 5]),
    ({"episodes": [4, 1, 1]}, [1, 4]),
    ({"episodes": [":2", "4:"]}, [0, 1, 4, 5]),
    ({"episodes": ["b", "2:4"]}, [1, 2, 3]),
    ({"drop": [0, "e"]}, [1, 2, 3, 5]),
    ({"episodes": ["1:5"], "drop": ["2:4"]}, [1, 4]),
    ({"episodes": [" 1:5 "], "drop": ["2", " 3"]}, [1, 4]),
    ({"tasks": ["lift", "pick"]}, [1, 3, 5]),
    ({"success": True}, [0, 2, 4]),
    ({"success": False, "drop": [1]}, [3, 5]),
    ({"episodes": ["1:"], "tasks": ["push"], "success": True}, [2, 4]),
], ids=str)  # fmt: skip
def test_what_is_chosen(choice: dict[str, Any], numbers: list[int]) -> None:
    """Lengths, pictures and sentences are those of the chosen ones, in a worker's copy too."""
    source = copy.deepcopy(chosen(**choice))  # as pickle copies
    assert source.numbers == numbers and len(source) == len(numbers)
    for index, number in enumerate(numbers):
        assert source.shape(index).steps == 2 + number and source.read(index).instruction == SOURCE.episodes[number].instruction
    assert set(source.describe().instructions) == {TASKS[number] for number in numbers}
    assert list(source.notes) == ([] if len(numbers) == 6 else [f"{6 - len(numbers)} of 6 episodes are left out by choice"])


@pytest.mark.parametrize("choice, message", [
    ({"episodes": [6]}, "convert.episodes names 6, which is not there: episodes are 0 to 5 .\"0:6\" for all.$"),
    ({"episodes": [-1]}, "convert.episodes names -1, which is not there"),
    ({"drop": ["4:9"]}, "convert.drop names '4:9', which is not there: episodes are 0 to 5 "),
    ({"episodes": ["3:3"]}, "convert.episodes names '3:3'"),
    ({"drop": ["g"]}, "convert.drop names 'g', which is not there: episodes are 0 to 5 .*, or a, b, c, d, e, ..."),
    ({"tasks": ["puss"]}, "convert.tasks names 'puss'; tasks are 'lift', 'pick', 'push'; did you mean 'push'"),
    ({"drop": [":"]}, "convert.episodes, drop, tasks and success leave none of 6 episodes"),
], ids=str)  # fmt: skip
def test_what_cannot_be_chosen(choice: dict[str, Any], message: str) -> None:
    with refused(message):
        chosen(**choice)


def test_success_that_nothing_states() -> None:
    with refused("convert.success is set, but nothing says whether episode 0 succeeded; set it to null"):
        chosen(Recorded(SOURCE.episodes), success=True)


def raw_params(**choice: Any) -> Params:
    return Params.model_validate({**COMMITTED.model_dump(), "convert": {**SETTINGS.model_dump(), "source": "raw", **choice}})


def test_all_that_cannot_be_read_is_listed_at_once(tmp_path: Path) -> None:
    """Before any picture is read; the sentence says what to write."""
    folder = write(tmp_path / "raw", ONE_TASK, **{f"e{number:03}": arrays_of(number, 2) for number in range(100)})
    bad = [3, *range(10, 20), 50]
    for number in bad:
        (folder / f"e{number:03}.npz").write_bytes(b"PK")
    with refused(
        r"12 of 100 episodes cannot be read: episode 3: .*; episode 13: [^;]*; and 7 more, `python -m svam.episodes inspect "
        "--recording --json PATH` lists all; mend them, or leave them out: "
        r'convert.drop: \[3, "10:20", 50\]$',
        *(f"e{number:03}.npz" for number in bad[:5]),
    ):
        open_named_source(folder, raw_params())
    listed = recording_facts(open_recording(folder, raw_params()), raw_params().convert)["episode_list"]
    assert [entry["number"] for entry in listed if entry["task"].startswith("cannot be read: ")] == bad
    assert len(open_named_source(folder, raw_params(drop=["e003", "10:20", 50]))) == 88
    assert len(open_named_source(folder, raw_params(episodes=["20:50"]))) == 30
    with refused("none of 10 episodes can be read: episode 10: .* lists all$"):
        open_named_source(folder, raw_params(episodes=["10:20"]))


@pytest.mark.parametrize("choice, said", [({}, "19 of 20 episodes cannot"), ({"episodes": ["1:"]}, "none of 19 episodes can")])
def test_all_missing_files_are_listed_by_one_command(tmp_path: Path, choice: dict[str, Any], said: str) -> None:
    """One a line, below the sentence: they are to be fetched."""
    folder = write_v2(tmp_path, (2,) * 20)
    files = sorted(folder.glob("data/*/*.parquet"))[1:]
    for file in files:
        file.unlink()
    with pytest.raises(FileError) as caught:
        open_named_source(folder, raw_params(source="lerobot", **choice))
    sentence, *below = str(caught.value).split("\n")
    assert sentence.startswith(said) and all(str(file) in sentence for file in files[:5]) and len(below) == len(files) - 5
    for number, (file, line) in enumerate(zip(files[5:], below, strict=True), 6):
        assert line.startswith(f"episode {number}: {file}: no such file")


def _hdf5(*keys: str) -> dict[str, Sequence[str]]:
    return {"episode_0.hdf5": keys}


@pytest.mark.parametrize("files, hint", [
    ({"task_info/task_327.json": (), "proprio_stats/327/1/proprio_stats.h5": ()}, "AgiBot World .*, which no source reads"),
    ({"AUTOLab/success/2023-07-07/x/trajectory.h5": ()}, "DROID's raw recordings .*bring it as `raw`"),
    ({"task_0001_user_0016_scene_0001_cfg_0003/cam_1/color.mp4": ()}, "RH20T"),
    ({"run.mcap": ()}, r"a ROS or MCAP recording \(run.mcap\), which no source reads"),
    ({"raw/traj_group0/traj0/images0/im_0.jpg": ()}, "raw BridgeData"),
    ({"a/b.tar.gz": ()}, r"archives in it \(a/b.tar.gz\): unpack them first"),
    (_hdf5("observations/rgb_images/front", "puppet/joint_position"), r"RoboMIND \(episode_0.hdf5\), which no source"),
    (_hdf5("joint_action/vector", "observation/head_camera/rgb"), "RoboTwin"),
    (_hdf5("traj_0/actions"), "ManiSkill"),
    (_hdf5("data/demo_0/actions"), "robomimic's HDF5 .*, which convert.source 'robomimic' reads"),
    (_hdf5("observations/images/front", "action"), "ALOHA's HDF5 .*, which convert.source 'aloha' reads"),
    ({"toy-train.tfrecord-00000-of-00001": ()}, r"an RLDS data set .*, which convert.source 'rlds' reads"),
    ({"set/meta/info.json": ()}, r"a LeRobotDataset \(set/meta/info.json\), which convert.source 'lerobot' reads"),
    ({"demo.hdf5": ["data/demo_0/actions"], "extra.pkl": ()}, "robomimic's HDF5 .*, which convert.source 'robomimic' reads"),
    ({"a.pkl": ()}, r"pickled recordings \(a.pkl\), which no source reads"),
    ({"annotation/train/0.json": (), "videos/0/rgb.mp4": ()}, "which convert.source 'video_folder' reads"),
    ({"notes.txt": ()}, "meta.json: no such file, which a folder of raw recordings has; it has notes.txt$"),
], ids=str)  # fmt: skip
def test_what_another_folder_looks_like(files: dict[str, Sequence[str]], hint: str, tmp_path: Path) -> None:
    lay(files, tmp_path)
    with refused(hint, "meta.json: no such file"):
        open_named_source(tmp_path, raw_params())


@pytest.mark.parametrize("files, hint", [
    ({"task_info/task_327.json": (), "observations/1/videos/head.mp4": ()}, "looks like AgiBot World .*, which no source"),
    ({"meta/info.json": (), "videos/front/0.mp4": ()}, r"looks like a LeRobotDataset \(meta/info.json\), which convert.source"),
    ({"annotation/train/0.json": (), "extra.pkl": (), "meta/info.json": ()}, "0.json: not valid JSON .*column 1 .char 0..$"),
    ({"a/0.mp4": ()}, "0.mp4: no instruction; [^;]*$"),
    ({"videos/0.mp4": (), "metas/0.txt": (), "t5_xxl/0.pickle": ()}, "0.mp4: no instruction; [^;]*$"),
], ids=str)  # fmt: skip
def test_a_folder_of_which_a_video_is_all_that_fits(files: dict[str, Sequence[str]], hint: str, tmp_path: Path) -> None:
    """What opens, as any folder with a video does, may still be of another kind; but not where it has what its source needs."""
    lay(files, tmp_path)
    with refused(f"none of 1 episodes can be read: episode 0: .*{hint}"):
        open_named_source(tmp_path, raw_params(source="video_folder"))


def lay(files: dict[str, Sequence[str]], tmp_path: Path) -> None:
    """Empty files, and HDF5 files with such keys."""
    for name, keys in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
        if keys:
            with h5py.File(tmp_path / name, "w") as file:
                for key in keys:
                    file[key] = np.zeros(1)
