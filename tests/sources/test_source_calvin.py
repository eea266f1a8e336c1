"""CALVIN's official layout: every value against an independent read, and one sentence for whatever is wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svam.contract import Choice
from svam.episodes.split import split_episodes
from svam.sources.calvin import Options, open_source
from tests.sources.common import frames_of, refused, spoil
from tests.sources.test_restricted_pickle import npy_of

INDX = [(100, 104), (103, 108), (np.int64(120), np.int64(120))]
TASKS = ["open_drawer", "push_block", "open_drawer"]
SENTENCES, SENTENCE = ["open the drawer", "push the red block left", "pull the handle"], "tidy the table"


def write_step(file: Path, rng: np.random.Generator, dtype: Any = np.float64, **changes: Any) -> None:
    """One step as calvin_env's renderer writes it: relative actions follow from the absolute one and the pose."""
    pose = rng.normal(size=15) * 0.05
    absolute = np.concatenate([pose[:6] + rng.normal(size=6) * 0.02, [rng.choice([-1.0, 1.0])]])
    relative = np.clip((absolute - pose[:7])[:6] / np.repeat([0.02, 0.05], 3), -1, 1)
    members: dict[str, Any] = {
        "actions": absolute.astype(dtype), "rel_actions": np.append(relative, absolute[6]).astype(dtype),
        "robot_obs": pose.astype(dtype), "scene_obs": rng.normal(size=24).astype(dtype),
        "rgb_static": rng.integers(0, 256, (10, 12, 3), dtype=np.uint8),
        "rgb_gripper": rng.integers(0, 256, (5, 6, 3), dtype=np.uint8),
        "rgb_tactile": rng.integers(0, 256, (4, 3, 6), dtype=np.uint8),
        "depth_static": rng.random((10, 12), dtype=np.float32), "depth_gripper": rng.random((5, 6), dtype=np.float32),
    }  # fmt: skip
    members = {name: value for name, value in (members | changes).items() if value is not None}
    np.savez_compressed(file, **members)


def write_folder(
    folder: Path, recordings: list[tuple[int, int]], indx: Any, tasks: Any, sentences: Any, scenes: dict[str, Any] | None,
    **step: Any,
) -> None:  # fmt: skip
    (folder / "lang_annotations").mkdir(parents=True)
    rng = np.random.default_rng(recordings[0][1])
    for first, last in recordings:
        for number in range(first, last + 1):
            write_step(folder / f"episode_{number:07d}.npz", rng, **step)
    np.save(folder / "ep_start_end_ids.npy", np.asarray(recordings, dtype=np.int64))
    if scenes is not None:
        np.save(folder / "scene_info.npy", scenes, allow_pickle=True)  # type: ignore[arg-type]
    language = {"ann": sentences, "task": tasks, "emb": rng.normal(size=(len(sentences), 1, 384)).astype(np.float32)}
    value = {"language": language, "info": {"episodes": [], "indx": indx}}
    np.save(folder / "lang_annotations/auto_lang_ann.npy", value, allow_pickle=True)  # type: ignore[arg-type]


ANNOTATED = {"training": (INDX, TASKS, SENTENCES), "validation": ([(100, 102)], ["open_drawer"], ["open it, please"])}


def write_set(root: Path, validation: bool = True, **step: Any) -> Path:
    scenes = {"calvin_scene_A": [100, 109], "calvin_scene_B": [110, 125]}
    write_folder(root / "training", [(100, 109), (110, 111), (120, 125)], *ANNOTATED["training"], scenes, **step)
    if validation:  # the official validation folders have no scene_info.npy, and numbers that training has too
        write_folder(root / "validation", [(100, 103)], *ANNOTATED["validation"], None, **step)
    return root


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("calvin"))


def stacked(folder: Path, first: int, last: int, name: str) -> np.ndarray:
    """The independent read: plain numpy, one file after the other, both ends included."""
    return np.stack([np.load(folder / f"episode_{step:07d}.npz")[name] for step in range(first, last + 1)])


@pytest.mark.parametrize("actions", ["rel_actions", "actions"])
@pytest.mark.parametrize("segments", ["annotated", "whole"])
def test_everything_equals_an_independent_read(dataset: Path, actions: Any, segments: Any) -> None:
    source = open_source(dataset, Options(actions=actions, segments=segments), Choice(missing_instruction=SENTENCE))
    expected = []
    for folder in (dataset / "training", dataset / "validation"):
        if segments == "annotated":
            rows = zip(*ANNOTATED[folder.name], strict=True)
            expected += [(folder, first, last, task, sentence) for (first, last), task, sentence in rows]
        else:
            bounds = np.load(folder / "ep_start_end_ids.npy").tolist()
            expected += [(folder, first, last, SENTENCE, SENTENCE) for first, last in bounds]
    description = source.describe()
    assert len(source) == len(expected) == 4 and (description.cameras, description.rate_hz) == (["static", "gripper"], 30.0)
    for index, (folder, first, last, task, sentence) in enumerate(expected):
        episode, shape = source.read(index), source.shape(index)
        assert (episode.task, episode.instruction, episode.rate_hz) == (task, sentence, 30.0)
        assert shape.steps == last - first + 1 and shape.held_out is (folder.name == "validation")
        for camera in ("static", "gripper"):
            np.testing.assert_array_equal(frames_of(episode, camera), stacked(folder, first, last, f"rgb_{camera}"))
        for field, name in (("actions", actions), ("proprioception", "robot_obs"), ("state", "scene_obs")):
            np.testing.assert_array_equal(getattr(episode, field), stacked(folder, first, last, name).astype(np.float32))
        assert episode.timestamps is None and not episode.annotations


def test_a_misaligned_set_gets_a_note(tmp_path: Path) -> None:
    root = write_set(tmp_path, validation=False)
    assert len(open_source(root, Options()).notes) == 1
    folder = root / "training"
    for step in range(100, 109):  # every action one file too early
        members = dict(np.load(folder / f"episode_{step:07d}.npz"))
        members["rel_actions"] = np.load(folder / f"episode_{step + 1:07d}.npz")["rel_actions"]
        np.savez(folder / f"episode_{step:07d}.npz", **members)
    assert "check that a frame and the action taken at it are in one file" in open_source(root, Options()).notes[-1]


def test_a_folder_that_was_split(tmp_path: Path) -> None:
    """CALVIN's script moves the steps into the two folders and leaves the list of all recordings above them."""
    root = write_set(tmp_path)
    np.save(root / "ep_start_end_ids.npy", np.array([[100, 109], [110, 111], [120, 125], [200, 203]]))
    source = open_source(root, Options())
    names = [source.shape(index).name for index in range(len(source))]
    assert names == ["training/0", "training/1", "training/2", "validation/0"]


def test_depth_every_nth_frame(dataset: Path) -> None:
    source = open_source(dataset, Options(depth="gripper", depth_every=2))
    for index, (first, last) in enumerate(INDX):
        annotation, expected = (
            source.read(index).annotations["depth"],
            stacked(dataset / "training", first, last, "depth_gripper"),
        )
        np.testing.assert_array_equal(annotation.index, np.arange(0, last - first + 1, 2))
        np.testing.assert_array_equal(annotation.values, expected[::2])
        assert source.shape(index).annotated == {"depth": len(annotation.index)}
    assert "the depth is of the camera 'gripper', but the first one is 'static'" in source.notes


TRAINING = {"folders": ["training"]}


@pytest.mark.parametrize(
    ("options", "held_out"),
    [
        ({}, [False, False, False, True]), (TRAINING, [None] * 3), ({**TRAINING, "scenes": ["A"]}, [None, None]),
        ({**TRAINING, "held_out_scenes": ["calvin_scene_B"]}, [False, False, True]),
        ({"scenes": ["B", "D"], "scene_of": {"validation": "D"}}, [False, True]),
    ],
)  # fmt: skip
def test_splits_and_scenes(dataset: Path, options: dict[str, Any], held_out: list[bool | None]) -> None:
    source = open_source(dataset, Options(**options))
    assert [source.shape(i).held_out for i in range(len(source))] == held_out
    if "scene_of" in options:
        assert source.read(1).provenance["scene"] == "D" and source.describe().provenance["scenes"] == ["B", "D"]


@pytest.mark.parametrize(
    ("options", "match"),
    [  # a number of training's scene_info says nothing about validation, whose steps have the same numbers
        ({"scenes": ["A"]}, r"validation/scene_info.npy: no scene for steps 100 to 102.*scene_of: {validation: D}"),
        ({**TRAINING, "scenes": ["E"]}, "no episode of scene 'E'; there are A, B"),
        ({**TRAINING, "scenes": ["A"], "held_out_scenes": ["B"]}, "held_out_scenes: no episode of scene 'B'; there are A$"),
        ({"scenes": ["A", "B"], "scene_of": {"validation": "D"}}, "3 episodes 0 are held out"),
        ({"scene_of": {"test": "D"}}, "scene_of names 'test'"),
        ({"folders": ["testing"]}, "testing/ep_start_end_ids.npy: no such file.*; convert.options.folders says which"),
    ],
)
def test_wrong_splits_and_scenes_are_named(dataset: Path, options: dict[str, Any], match: str) -> None:
    with refused(match):
        open_source(dataset, Options(**options))


def test_each_scene_is_looked_at_for_its_alignment(tmp_path: Path) -> None:
    """Actions of the step before, in the second scene alone."""
    folder, steps_of = tmp_path / "training", [(100, 104), (110, 114)]
    write_folder(folder, steps_of, steps_of, ["a", "b"], ["a", "b"], {"A": [100, 104], "B": [110, 114]})
    assert open_source(tmp_path, Options()).notes == []
    files = [folder / f"episode_{step:07d}.npz" for step in range(110, 115)]
    steps = [dict(np.load(file)) for file in files]
    for file, step, before in zip(files[1:], steps[1:], steps, strict=False):
        np.savez(file, **step | {name: before[name] for name in ("actions", "rel_actions")})
    assert [note.partition(": ")[0] for note in open_source(tmp_path, Options()).notes] == [str(files[0])]


def test_a_segment_of_no_scene_is_one_bad_episode(tmp_path: Path) -> None:
    write_folder(tmp_path / "training", [(100, 125)], *ANNOTATED["training"], {"A": [100, 104], "B": [120, 125]})
    source = open_source(tmp_path, Options(held_out_scenes=["B"]))
    assert [source.shape(i).held_out for i in (0, 2)] == [False, True]
    with refused("annotation 1 covers steps 103 to 108, but no scene of .*scene_info.npy has all of them"):
        source.shape(1)


def test_segments_that_share_steps_are_on_one_side(dataset: Path) -> None:
    """Steps 103 and 104 are in two segments: without the official split, drawing by segment would train on held-out frames."""
    source = open_source(dataset / "training", Options())
    shapes = [source.shape(i) for i in range(len(source))]
    assert [shape.group for shape in shapes] == ["training 100", "training 100", "training 120"]
    assert [(shape.name, shape.task) for shape in shapes][1] == ("training/1", "push_block")
    assert any("3 episodes are 2 groups without a common frame" in note for note in source.notes)
    for seed in range(5):
        sides = split_episodes([shape.task for shape in shapes], shapes, 0.3, seed)
        steps = [
            {n for (first, last), side in zip(INDX, sides, strict=True) if side == wanted for n in range(first, last + 1)}
            for wanted in (0, 1)
        ]
        assert steps[0].isdisjoint(steps[1]) and all(steps)
    both = open_source(dataset, Options())  # whose validation may be left out: then a split is drawn
    assert [both.shape(i).group for i in range(3)] == [shape.group for shape in shapes]
    assert not any("groups" in note for note in both.notes)


def test_chosen_cameras_rate_and_bad_segments(tmp_path: Path) -> None:
    root = write_set(tmp_path, validation=False)
    source = open_source(root, Options(), Choice(cameras=["rgb_gripper"], rate_hz=15))
    assert source.describe().cameras == ["gripper"] and list(source.read(0).frames) == ["gripper"]
    assert source.read(0).rate_hz == source.describe().rate_hz == 15
    for file in root.glob("training/episode_*.npz"):  # of the camera that is left out nothing is looked at
        spoil(file, "rgb_static")
    assert open_source(root, Options(), Choice(cameras=["gripper"])).read(0).steps == source.read(0).steps
    with refused("episode_0000100.npz: truncated, damaged"):
        open_source(root, Options())
    write_set(tmp_path / "sound", validation=False)
    root = tmp_path / "sound"
    with refused("convert.cameras names 'top', but .* has static, gripper"):
        open_source(root, Options(), Choice(cameras=["top"]))
    (root / "training/episode_0000100.npz").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    source = open_source(root, Options())  # what a step holds is looked up elsewhere
    with refused("episode_0000100.npz: a Git LFS pointer"):
        source.read(0)
    assert source.read(1).steps == 6


def test_instructions_of_held_out_episodes_are_apart(dataset: Path) -> None:
    assert open_source(dataset, Options()).describe().instructions == {
        "open_drawer": {"train": ["open the drawer", "pull the handle"], "held_out": ["open it, please"]},
        "push_block": {"train": ["push the red block left"], "held_out": []},
    }


def test_whole_recordings_say_their_sentence(dataset: Path) -> None:
    with refused("ep_start_end_ids.npy: recording 0: no instruction; set convert.missing_instruction to"):
        open_source(dataset, Options(segments="whole"))
    for choice in (Choice(instruction=SENTENCE), Choice(missing_instruction=SENTENCE)):
        source = open_source(dataset, Options(segments="whole"), choice)
        assert source.read(0).instruction == source.shape(0).task == SENTENCE
    episode = open_source(dataset, Options(), Choice(instruction=SENTENCE)).read(0)
    assert (episode.task, episode.instruction) == ("open_drawer", SENTENCE)


def test_a_changed_step_changes_the_stamp(tmp_path: Path) -> None:
    source, file = open_source(write_set(tmp_path, validation=False), Options()), tmp_path / "training/episode_0000102.npz"
    before = source.shape(0).stamp
    assert source.shape(0).stamp == before
    os.utime(file, (1, 1))
    assert source.shape(0).stamp != before
    file.unlink()
    for look in (source.shape, source.read):
        with refused("episode_0000102.npz: no such file"):
            look(0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rel_actions": np.array([0, 0, 0, 0, 0, 0, 0.0])}, "the gripper, is 0, expected exactly -1 or 1"),
        ({"rel_actions": np.array([0, 1.5, 0, 0, 0, 0, 1.0])}, r"rel_actions\[1\] is 1.5"),
        ({"rel_actions": np.array([0, np.nan, 0, 0, 0, 0, 1.0])}, r"rel_actions\[1\] is nan"),
        ({"rel_actions": np.zeros(6)}, r"'rel_actions' is float64 \(6,\)"),
        ({"rel_actions": None}, "'rel_actions' is missing"),
        ({"scene_obs": np.array([object()] * 24)}, "'scene_obs' holds Python objects"),
        ({"rgb_static": np.zeros((10, 12, 4), dtype=np.uint8)}, "'rgb_static' is uint8"),
    ],
)
@pytest.mark.parametrize("step", [100, 102])
def test_a_wrong_step_is_one_sentence(tmp_path: Path, change: dict[str, Any], match: str, step: int) -> None:
    root = write_set(tmp_path, validation=False)
    write_step(root / f"training/episode_{step:07d}.npz", np.random.default_rng(5), **change)
    with refused(f"episode_{step:07d}.npz.*{match}"):
        frames_of(open_source(root, Options()).read(0), "static")


def test_missing_cameras_and_vectors_are_noted(tmp_path: Path) -> None:
    source = open_source(write_set(tmp_path, validation=False, rgb_gripper=None, scene_obs=None), Options())
    assert source.describe().cameras == ["static"] and source.read(0).state is None
    assert any("'gripper' is left out" in note for note in source.notes) and any("no state" in note for note in source.notes)
    with refused("neither rgb_static nor rgb_gripper"):
        open_source(write_set(tmp_path / "none", validation=False, rgb_gripper=None, rgb_static=None), Options())
    with refused("episode_0000100.npz: no actions, which convert.options.actions names; it has depth_gripper, "):
        open_source(write_set(tmp_path / "relative", validation=False, actions=None), Options(actions="actions"))
    with refused("'depth_static'"):
        open_source(write_set(tmp_path / "flat", validation=False, depth_static=None), Options(depth="static"))


def test_no_annotations_names_the_alternatives(tmp_path: Path) -> None:
    folder = write_set(tmp_path, validation=False) / "training"
    (folder / "lang_annotations").rename(folder / "lang_BERT")
    with refused("lang_annotations/auto_lang_ann.npy: no such file; set .* to one of lang_BERT, or set"):
        open_source(tmp_path, Options())
    assert len(open_source(tmp_path, Options(annotations="lang_BERT"))) == 3
    (folder / "lang_BERT/auto_lang_ann.npy").unlink()
    with refused("no other folder there has it, or set convert.options.segments to 'whole'"):
        open_source(tmp_path, Options())
    assert len(open_source(tmp_path, Options(segments="whole"), Choice(missing_instruction=SENTENCE))) == 3


def lang_ann(indx: Any = INDX, task: str = "open", sentence: Any = "go") -> bytes:
    language = {"ann": [sentence] * 3, "task": [task] * 3}
    return npy_of(np.array({"language": language, "info": {"indx": indx}}, dtype=object))


@pytest.mark.parametrize(
    ("file", "value", "match"),
    [
        ("lang_annotations/auto_lang_ann.npy", value, match)
        for value, match in (
            (lang_ann([(100, 104)]), "1 indx, 3 task and 3 ann"), (lang_ann(3), "is missing or no list"),
            (lang_ann(task=" "), "annotation 0 has no task name"),
            *((lang_ann(sentence=wrong), "a sentence that is no text") for wrong in ("a\ud800b", 3, ["open"])),
        )
    ] + [
        ("ep_start_end_ids.npy", value, match)
        for value, match in (
            (np.zeros((0, 2), dtype=int), "no recordings"), (np.array([[5, 4]]), r"row 0 is \[5, 4\]"),
            (np.array([[3, 4], [-5, 4]]), r"row 1 is \[-5, 4\]"), (np.array([[0.0, 4.0]]), "it is float64"),
            (np.array([1, 2, 3]), r"it is int64 \(3,\)"), (np.array([[1, object()]]), "truncated, damaged"),
        )
    ] + [
        ("scene_info.npy", npy_of(np.array("A", dtype=object)), "holds a str, expected a dict of scenes and their first"),
        ("scene_info.npy", npy_of(np.array({"A": [5, 4]}, dtype=object)), "entry 0 is no scene's name with"),
    ],
)  # fmt: skip
def test_wrong_files_are_one_sentence(tmp_path: Path, file: str, value: Any, match: str) -> None:
    path = write_set(tmp_path, validation=False) / "training" / file
    path.write_bytes(value) if isinstance(value, bytes) else np.save(path, value)
    with refused(f"{file}.*{match}"):
        open_source(tmp_path, Options())


def test_a_segment_outside_of_recordings_is_one_bad_episode(tmp_path: Path) -> None:
    indx = [(100, 104), (108, 110), (120, 121)]
    write_folder(tmp_path / "training", [(100, 109), (110, 111), (120, 125)], indx, TASKS, ["go", "go", ""], None)
    source = open_source(tmp_path, Options())
    with refused("annotation 1 covers steps 108 to 110, but no recording"):
        source.shape(1)
    with refused("annotation 2: no instruction; set convert.missing_instruction"):
        source.shape(2)
    assert source.shape(0).steps == 5
    assert open_source(tmp_path, Options(), Choice(missing_instruction="do")).read(2).instruction == "do"


def test_a_bad_annotation_or_first_step_is_one_bad_episode(tmp_path: Path) -> None:
    root = write_set(tmp_path, validation=False)
    file = root / "training/lang_annotations/auto_lang_ann.npy"
    for indx in ([(-3, 110), *INDX[1:]], [(104, 103), *INDX[1:]], [(100.0, 104), *INDX[1:]], [(1, 10**12), *INDX[1:]]):
        file.write_bytes(lang_ann(indx, sentence=np.str_("go")))
        for options in ({}, {"scenes": ["A"]}, {"depth": "static"}):
            source = open_source(root, Options(**options))
            with refused(r"\['indx'\]\[0\] is no pair|annotation 0 covers steps 1 to"):
                source.shape(0)
            assert source.read(1).steps == 6 and list(source.describe().instructions) == ["open"]
    file.write_bytes(lang_ann(sentence=None))
    assert open_source(root, Options(), Choice(missing_instruction="go")).read(0).instruction == "go"
    write_step(root / "training/episode_0000100.npz", np.random.default_rng(0), rgb_static=np.zeros((10, 14, 3), np.uint8))
    source = open_source(root, Options(), Choice(instruction="go"))
    with refused(r"episode_0000101.npz: field 'rgb_static' is uint8 \(10, 12, 3\), expected uint8 \(10, 14, 3\)"):
        frames_of(source.read(0), "static")
    assert frames_of(source.read(1), "static").shape == (6, 10, 12, 3)
