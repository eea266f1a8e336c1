"""The RLDS source: every value equals an independent read, and what cannot be read is refused with one sentence."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svam.contract import Choice, Segment
from svam.sources.rlds import Options, RldsSource, open_source
from tests.sources import tfds_writer as tfds
from tests.sources.common import LFS_POINTER, frames_of, real, refused
from tests.sources.tfds_writer import TEXT, image, png, tensor

DEPTH, OF_ALL = "steps/observation/depth", "episode_metadata/sentence"
REAL = "rlds_tfds/octo_debug_bridge_dataset"
FEATURES = {
    "steps/observation/image": image(6, 8, 3),
    "steps/observation/state": tensor(2),
    "steps/action": tensor(3),
    "steps/is_last": tensor(dtype="bool"),
    "steps/language_instruction": TEXT,
}


def pixels(seed: int, n: int, height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def episode(seed: int = 0, n: int = 4, **changes: Any) -> dict[str, Any]:
    """Values of one episode of `FEATURES`; a change to None leaves a feature out, "__" in its name is "/"."""
    random = np.random.default_rng(seed)
    values = {
        "steps/observation/image": [png(frame) for frame in pixels(seed, n)],
        "steps/observation/state": random.normal(size=(n, 2)).astype(np.float32),
        "steps/action": random.normal(size=(n, 3)).astype(np.float32),
        "steps/is_last": np.zeros(n, dtype=np.int64),
        "steps/language_instruction": [f"push block {seed}"] * n,
    }
    values |= {f"steps/{name.replace('__', '/')}": value for name, value in changes.items()}
    return {name: value for name, value in values.items() if value is not None}


def opened(path: Path, **options: Any) -> RldsSource:
    """With values of `Choice` and of `Options`."""
    choice = {name: options.pop(name) for name in Choice.model_fields if name in options}
    return open_source(path, Options(**options), Choice(**{"rate_hz": 5.0, **choice}))


def look(source: RldsSource) -> None:
    """At all episodes, which refuses those that cannot be read."""
    for index in range(len(source)):
        source.shape(index)


def toy(path: Path, *episodes: Any, features: dict[str, Any] = FEATURES, options: dict[str, Any] | None = None) -> RldsSource:
    """A set of one shard in a split `train`, opened."""
    tfds.write_set(path, features, {"train": [episodes or [episode()]]})
    return opened(path, **(options or {}))


# Real data.


def test_real_data_equals_an_independent_read() -> None:
    """What a reader of its own found in the records, once: digests of all actions, states and sentences."""
    source = opened(real(REAL))
    episodes = [source.read(n) for n in range(len(source))]
    for index, e in enumerate(episodes):
        shape = source.shape(index)
        assert shape.steps == e.steps == 10 and shape.held_out is None and e.state is None and shape.task == e.task
        assert e.task == e.instruction and e.rate_hz == 5.0 and e.actions.shape == e.proprioception.shape == (10, 7)
        assert list(e.frames) == ["image_0", "image_1", "image_2", "image_3"] == source.describe().cameras
        assert index % 8 or all(len(frames_of(e, camera)) == 10 for camera in e.frames)
    assert len(episodes) == 25
    actions, states, words = (
        hashlib.sha256(b"".join(parts)).hexdigest()[:16]
        for parts in zip(*((e.actions, e.proprioception, e.instruction.encode()) for e in episodes), strict=True)
    )
    assert (actions, states, words) == ("ce41a99ac769d53d", "b8ec6009c6aaf691", "33d3f8c71bd52816")
    description = source.describe()
    assert description.provenance["name"] == "bridge_dataset" and description.provenance["version"] == "1.0.0"
    assert source.notes[0] == "split 'val' (25 episodes) is not read; convert.options.splits says which are"
    assert len(source.notes) == 2 and "record 0: pictures of image_3 are of one colour, as sets fill up a" in source.notes[1]


# Layouts, encodings, options.


def test_values_of_a_synthetic_set(tmp_path: Path) -> None:
    episodes = [episode(0), episode(1, n=1), episode(2, n=70)]
    tfds.write_set(tmp_path / "toy" / "1.0.0", FEATURES, {"train": [episodes[:2], episodes[2:]]})
    source = opened(tmp_path)
    assert [source.shape(n).steps for n in range(len(source))] == [4, 1, 70]
    assert source.shape(0).stamp != source.shape(1).stamp
    for seed, (n, values) in enumerate(zip((4, 1, 70), episodes, strict=True)):
        e = source.read(seed)
        assert np.array_equal(frames_of(e), pixels(seed, n)) and np.array_equal(frames_of(e), pixels(seed, n))
        assert np.array_equal(e.actions, values["steps/action"])
        assert np.array_equal(e.proprioception, values["steps/observation/state"])
        assert e.instruction == f"push block {seed}"
    assert [len(block) for block in source.read(2).frames["image"].blocks()] == [64, 6]  # type: ignore[union-attr]
    assert source.read(2).provenance == {"file": "toy-train.tfrecord-00001-of-00002#0", "split": "train", "recorded_steps": 70}
    assert not source.notes


def test_joined_actions_encodings_and_kinds(tmp_path: Path) -> None:
    n, random = 5, np.random.default_rng(3)
    world, turn, state = random.normal(size=(n, 3)), random.normal(size=(n, 2, 2)), random.normal(size=(n, 4))
    step = np.array([-1, 0, 1, -(2**40), 2**33], dtype=np.int64)
    state, raw = state.astype(np.float32), pixels(7, n)

    def first_channels(frame: Any) -> bytes:
        return np.moveaxis(np.dstack([frame, frame[..., 0]]), 2, 0).tobytes()

    both: dict[str, tuple[Any, Any]] = {
        "steps/action/world_vector": (tensor(3, dtype="float64"), world.astype(np.float32)),
        "steps/action/rotation_delta": (tensor(2, 2, dtype="float64", encoding="bytes"), [row.tobytes() for row in turn]),
        "steps/action/open_gripper": (tensor(dtype="bool"), np.array([0, 1, 0, 1, 1])),
        "steps/action/number": (tensor(dtype="int64"), step),
        "steps/observation/natural_language_instruction": (tensor(dtype="string"), ["schieb den Würfel"] * n),
        "steps/observation/packed": (tensor(4, encoding="zlib"), [zlib.compress(row.tobytes()) for row in state]),
        "steps/observation/front/rgb": (
            tensor(6, 8, 3, dtype="uint8", encoding="zlib"),
            [zlib.compress(p.tobytes()) for p in raw],
        ),
        "steps/observation/side": (image(-1, -1, 3), [png(frame) for frame in pixels(8, n, 4, 2)]),
        DEPTH: (image(6, 8, 1, dtype="uint16"), None),
        "steps/observation/clip": ({"video": {"shape": {"dimensions": ["2", "6", "8", "3"]}, "dtype": "uint8"}}, None),
        "steps/observation/window": ({"sequence": {"feature": image(6, 8, 3), "length": "2"}}, None),
        "steps/observation/ticks": (tensor(dtype="uint64"), step),  # TFDS stores their bits as int64
        "steps/observation/whole": (tensor(6, 8, 3, dtype="uint8"), pixels(9, n)),
        "steps/observation/first": (tensor(4, 6, 8, dtype="uint8", encoding="bytes"), [first_channels(frame) for frame in raw]),
        "episode_metadata/file_path": (TEXT, ["/somewhere"]),
    }
    features = {name: leaf for name, (leaf, _) in both.items()}
    values = {name: value for name, (_, value) in both.items() if value is not None}
    names = ["action/rotation_delta", "action/open_gripper", "action/number", "action/world_vector"]
    for packed in (True, False):
        source = toy(
            tmp_path / str(packed), tfds.example(values, packed), features=features,
            options={"action": names, "proprioception": ["observation/packed"], "state": [names[1], "observation/ticks"]},
        )  # fmt: skip
        e = source.read(0)
        expected = np.concatenate([turn.reshape(n, 4), np.array([[0], [1], [0], [1], [1]]), step[:, None], world], axis=1)
        assert e.actions is not None and np.array_equal(e.actions, expected.astype(np.float32))
        ticks = step.view(np.uint64)[:, None].astype(np.float32)
        assert np.array_equal(e.proprioception, state) and np.array_equal(e.state, np.hstack([expected[:, 4:5], ticks]))
        assert e.instruction == "schieb den Würfel"
        assert np.array_equal(frames_of(e, "front_rgb"), raw) and np.array_equal(frames_of(e, "side"), pixels(8, n, 4, 2))
        assert np.array_equal(frames_of(e, "whole"), pixels(9, n)) and np.array_equal(frames_of(e, "first"), raw)
        assert source.describe().cameras == ["first", "front_rgb", "side", "whole"]
        kinds = {"clip": "several images", "depth": "image uint16 (6, 8, 1)", "window": "several images"}
        left_out = "is no 8-bit RGB picture of known size under steps/observation: left out"
        assert source.notes == [f"steps/observation/{name} ({kind}) {left_out}" for name, kind in kinds.items()]
    with refused(r"no numeric feature 'action'.*action/world_vector \(3\), action/rotation_delta \(4\)"):
        opened(tmp_path / "True")
    video = opened(tmp_path / "True", action=[])
    assert video.read(0).actions is None and video.read(0).proprioception is None
    assert any("no proprioception: none of observation/state" in note for note in video.notes)
    with refused("convert.options.action names 'action/speed', which is not there"):
        opened(tmp_path / "True", action=["action/speed"])


def test_the_step_marked_last_has_no_action(tmp_path: Path) -> None:
    last = np.array([0, 0, 0, 1])
    source = toy(tmp_path / "a", episode(0, is_last=last), episode(1))
    assert [source.shape(n).steps for n in range(2)] == [3, 4]
    e = source.read(0)
    assert e.actions is not None and np.array_equal(e.actions, episode(0)["steps/action"][:3])
    assert np.array_equal(frames_of(e), pixels(0, 4)[:3])
    assert "the last step of 1 episodes is left out: is_last marks it" in source.notes[0]
    kept = opened(tmp_path / "a", last_step="keep")
    assert kept.read(0).steps == kept.shape(0).steps == 4 and not kept.notes
    middle = toy(tmp_path / "b", episode(0, is_last=np.array([0, 1, 0, 1])))
    with refused("record 0: is_last marks step 1 of 4, expected the last"):
        look(middle)
    alone = toy(tmp_path / "c", episode(0, n=1, is_last=np.array([1])), episode(1, n=0), episode(2))
    assert len(alone) == 1 and "2 episodes without a usable step are left out" in alone.notes[0]


def test_instructions(tmp_path: Path) -> None:
    toy(tmp_path / "a", episode(0), episode(1, language_instruction=[""] * 4), episode(2))
    with refused("record 1: no instruction; set convert.missing_instruction"):
        look(opened(tmp_path / "a"))
    for choice, tasks in (
        ({"missing_instruction": "do it"}, ["push block 0", "do it", "push block 2"]),
        ({"instruction": "do that"}, ["push block 0", "do that", "push block 2"]),
        ({"without_instruction": "leave_out"}, ["push block 0", "push block 2"]),
    ):
        source, said = opened(tmp_path / "a", **choice), choice.get("instruction")
        assert [source.read(n).instruction for n in range(len(source))] == [said or task for task in tasks]
        assert [source.shape(n).task for n in range(len(source))] == [source.read(n).task for n in range(len(source))] == tasks
        instructions = source.describe().instructions
        assert instructions == {task: {"train": [said or task], "held_out": []} for task in tasks}
    assert "1 episodes without an instruction" in source.notes[0]
    changing = toy(tmp_path / "b", episode(0, language_instruction=["", "a", "b", "b"]))
    with refused("the instruction changes from 'a' to 'b'"):
        look(changing)
    assert opened(tmp_path / "b", changing_instruction="first").read(0).instruction == "a"
    replaced = opened(tmp_path / "b", instruction="c", segments=True)
    assert (replaced.shape(0).task, replaced.shape(0).segments, replaced.read(0).instruction) == ("a", (), "c")
    assert toy(tmp_path / "d", episode(0, language_instruction=["a ", "a", "", " a"])).read(0).instruction == "a"
    parts = opened(tmp_path / "b", segments=True).shape(0).segments
    assert parts == (Segment(0, 2, ("a",)), Segment(2, 4, ("b",)))
    assert opened(tmp_path / "a", segments=True, missing_instruction="do it").shape(0).segments == ()
    with refused("step 2 is not UTF-8"):
        look(toy(tmp_path / "c", episode(0, language_instruction=[b"a", b"a", b"\xff", b"a"])))
    assert opened(tmp_path / "c", instruction="c").read(0).task == "c"
    with refused("instruction_key is 'words', which is no text.*one of: language_instruction"):
        opened(tmp_path / "a", instruction_key="words")


def test_other_sentences_and_success(tmp_path: Path) -> None:
    """DROID's second and third sentence stand for an empty first one, or are further sentences of the episode."""
    others = {f"steps/language_instruction_{n}": TEXT for n in (2, 3)}
    metadata = {"episode_metadata/success": tensor(dtype="bool")}
    episodes = [
        episode(n, language_instruction=[first] * 4, language_instruction_2=[""] * 4, language_instruction_3=["third"] * 4)
        | {"episode_metadata/success": np.array([n])}
        for n, first in enumerate(["", "first"])
    ]
    source = toy(tmp_path, *episodes, features={**FEATURES, **others, **metadata})
    assert [(source.read(n).instruction, source.shape(n).success) for n in (0, 1)] == [("third", False), ("first", True)]
    said = enumerate((1.0, 0.0, -1.0, 0.3, np.nan))
    marks = [{**episode(n), "episode_metadata/success": np.array([mark])} for n, mark in said]
    marked = toy(tmp_path / "marks", *marks, features=FEATURES | {"episode_metadata/success": tensor()})
    assert [marked.shape(n).success for n in range(5)] == [True, False, None, None, None]
    unsaid = toy(tmp_path / "unsaid", episode(), features=FEATURES | metadata)  # as TFDS writes an optional value that is None
    assert unsaid.shape(0).success is None
    assert source.shape(1).name == "toy-train.tfrecord-00000-of-00001#1"
    assert source.describe().instructions["first"]["train"] == ["first"]
    assert opened(tmp_path, paraphrases=True, instruction="c").describe().instructions["first"]["train"] == ["c"]
    instructions = opened(tmp_path, paraphrases=True).describe().instructions
    assert [instructions[task]["train"] for task in ("third", "first")] == [["third"], ["first", "third"]]


def test_a_camera_that_is_left_out_is_never_looked_for(tmp_path: Path) -> None:
    features = {"steps/observation/wrist/rgb": image(6, 8, 3), **FEATURES}
    source = toy(tmp_path, episode(0, n=2), features=features)  # the wrist's pictures are missing
    with refused("feature 'steps/observation/wrist/rgb' is missing"):
        look(source)
    for name in ("image", "observation/image", "steps/observation/image"):
        e = opened(tmp_path, cameras=[name]).read(0)
        assert list(e.frames) == ["image"] and np.array_equal(frames_of(e), pixels(0, 2))
    assert opened(tmp_path, cameras=["wrist/rgb", "image"]).describe().cameras == ["wrist_rgb", "image"]
    with refused("convert.cameras names 'front', but .*features.json has image, wrist_rgb"):
        opened(tmp_path, cameras=["front"])
    tfds.write_json_files(tmp_path, {**features, "steps/observation/wrist_rgb": image(6, 8, 3)}, {"train": [1]})
    assert opened(tmp_path, cameras=["image"]).read(0).steps == 2
    with refused("wrist/rgb and steps/observation/wrist_rgb both give the camera 'wrist_rgb'; to leave it out, name the other"):
        opened(tmp_path)


def test_instructions_elsewhere(tmp_path: Path) -> None:
    plain = {name: leaf for name, leaf in FEATURES.items() if name != "steps/language_instruction"}
    values = episode(0, language_instruction=None)
    with refused("no instruction under a known name; set convert.instruction"):
        toy(tmp_path / "a", values, features=plain)
    assert opened(tmp_path / "a", instruction="do it").read(0).instruction == "do it"
    codes = np.zeros((4, 12), dtype=np.int64)
    codes[:, :4] = list(b"wave")
    for name, leaf, value in (("steps/observation/instruction", tensor(12, dtype="int32"), codes), (OF_ALL, TEXT, ["wave\0"])):
        options = {"instruction_key": OF_ALL} if name == OF_ALL else {}
        source = toy(tmp_path / str(len(options)), values | {name: value}, features=plain | {name: leaf}, options=options)
        assert source.read(0).instruction == "wave" and list(source.describe().instructions) == ["wave"]


def test_splits_and_repeated_episodes(tmp_path: Path) -> None:
    shuffled = dict(reversed(episode(1).items()))  # the same values; the order of a map is arbitrary
    other = episode(1, action=episode(1)["steps/action"] + 1)
    tfds.write_set(tmp_path, FEATURES, {"train": [[episode(0), episode(1)]], "val": [[shuffled, episode(3), other]]})
    source = opened(tmp_path, held_out_splits=["val"])
    assert [source.shape(n).held_out for n in range(len(source))] == [False, False, True, True]
    assert [source.read(n).instruction for n in range(4)] == [f"push block {n}" for n in (0, 1, 3, 1)]
    assert len(source.notes) == 1 and source.notes[0].startswith("1 repeated episodes are left out (1 in 'val'), the first is")
    assert "val.tfrecord-00000-of-00001: record 0, which repeats" in source.notes[0]
    with refused("'test'; .* has the splits train, val"):
        opened(tmp_path, splits=["test"])


def test_versions(tmp_path: Path) -> None:
    for version in ("toy/1.0.0", "toy/2.0.0"):
        tfds.write_set(tmp_path / version, FEATURES, {"train": [[episode(int(version[4]))]]})
    for folder, version, expected in (("", "2.0.0", 2), ("toy/1.0.0", "", 1), ("toy/1.0.0", "1.0.0", 1)):
        assert opened(tmp_path / folder, version=version).read(0).instruction == f"push block {expected}"
    with refused(r"2 data sets \(toy/1.0.0, toy/2.0.0\); say which by convert.options.version"):
        opened(tmp_path)
    with refused("version is '3.0.0', which fits 0"):
        opened(tmp_path, version="3.0.0")
    with refused("nowhere: no such directory"):
        opened(tmp_path / "nowhere", version="1.0.0")
    with refused("features.json: it is a file, expected the folder of a data set"):
        opened(tmp_path / "toy/1.0.0/features.json")


def test_partial_download(tmp_path: Path) -> None:
    tfds.write_set(tmp_path, FEATURES, {"train": [[episode(0)], [episode(1)], [episode(2)]]})
    shards = [tmp_path / f"toy-train.tfrecord-0000{n}-of-00003" for n in range(3)]
    shards[0].unlink()
    shards[2].write_text(LFS_POINTER)
    listed = rf"2 of 3 shards are missing \({shards[0].name}, {shards[2].name}\)"
    with refused(f"00000-of-00003: no such file, though dataset_info.json lists it; {listed}"):
        opened(tmp_path)
    partial = opened(tmp_path, missing_shards="leave_out")
    assert partial.read(0).instruction == "push block 1" and "2 of 3 shards are missing" in partial.notes[0]
    shards[1].write_text(LFS_POINTER)
    with refused("00000-of-00003: no such file.*; 3 of 3 shards are missing .*; .* has dataset_info.json, features.json, toy"):
        opened(tmp_path, missing_shards="leave_out")
    shards[0].write_text(LFS_POINTER)
    with refused("00000-of-00003: a Git LFS pointer, not the file itself; run git lfs pull"):
        opened(tmp_path)


def test_a_set_in_the_dark_is_refused(tmp_path: Path) -> None:
    plain = {name: leaf for name, leaf in FEATURES.items() if "image" not in name}
    with refused(r"no RGB image under steps/observation \(it has steps/observation/state, steps/action, "):
        toy(tmp_path, features=plain)
    for leaf in (tensor(6, 8, 3), tensor(-1, -1, 3, dtype="uint8", encoding="zlib"), tensor(6, 8, 1, dtype="uint16")):
        other = "steps/observation/other"
        with refused(r"no RGB image under .*\(steps/observation/other \(tensor .*\) is no 8-bit RGB picture of known size"):
            toy(tmp_path, features={**plain, other: leaf})
        tfds.write_json_files(tmp_path, {**FEATURES, other: leaf}, {"train": [1]})
        assert opened(tmp_path)._chosen.notes[0].startswith(f"{other} (tensor ")


def test_the_rate_must_be_stated(tmp_path: Path) -> None:
    toy(tmp_path)
    with refused("convert.rate_hz is null, but RLDS does not record .*: set it, for example to 5 for bridge"):
        open_source(tmp_path, Options())


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": None}, "feature 'steps/action' is missing"),
        ({"action": np.zeros((3, 3))}, "steps/action has 3 rows, expected 4 as steps/is_last"),
        ({"action": ["a"] * 4}, "steps/action: a list of bytes, expected float32 or int64"),
        ({"action": np.full((4, 3), np.nan)}, "actions.* is nan, expected a finite number"),
        ({"language_instruction": ["a"] * 3}, "steps/language_instruction has 3 rows, expected 4 as steps/is_last has"),
        ({"observation__image": [png(pixels(0, 1)[0])] * 3}, "observation/image has 3 rows, expected 4 as steps/is_last has"),
        ({"observation__image": [png(pixels(0, 1)[0])[:60]] * 4}, "no readable JPEG or PNG picture of 60 bytes"),
        ({"observation__image": [png(pixels(0, 1, 5, 8)[0])] * 4}, "step 0: a picture of 5 x 8, expected 6 x 8"),
        ({"observation__image": [png(np.zeros((6, 8), np.uint16))] * 4}, "in mode I;16"),
        ({"action": b"\x0a\xff\x01"}, "no valid tf.train.Example"),
        ({"action": tfds.feature(np.zeros(12)) + tfds.feature(np.zeros(12))}, "2 lists in one feature"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with refused(message, "record 1"):
        source = toy(tmp_path, episode(0), episode(1, **change))
        look(source)
        frames_of(source.read(1))


def test_grey_and_transparent_pictures_become_rgb(tmp_path: Path) -> None:
    rgb = pixels(0, 1)[0]
    for picture, expected in ((rgb[..., 0], rgb[..., [0, 0, 0]]), (np.dstack([rgb, rgb[..., 0]]), rgb)):
        for channels in (3, 4):
            features = {**FEATURES, "steps/observation/image": image(6, 8, channels)}
            source = toy(tmp_path, episode(0, n=1, observation__image=[png(picture)]), features=features)
            assert np.array_equal(frames_of(source.read(0))[0], expected)


def test_a_camera_called_depth_is_doubted(tmp_path: Path) -> None:
    pictures = {"observation__depth": [png(frame) for frame in pixels(1, 4)]}
    source = toy(tmp_path, episode(0, **pictures), features={**FEATURES, DEPTH: image(6, 8, 3)})
    assert len(source.notes) == 1
    assert source.notes[0].startswith(f"{DEPTH} is read as colours; is it depth? to leave it out, name the other cameras")
    assert opened(tmp_path, cameras=["depth"]).notes == [] and opened(tmp_path, cameras=["image"]).notes == []


def test_grey_pictures_are_read_where_they_are_named(tmp_path: Path) -> None:
    """They may be depth as well."""
    grey, whole = pixels(1, 4)[..., :1], "steps/observation/whole"
    features = {**FEATURES, "steps/observation/hand/grey": image(6, 8, 1), whole: tensor(6, 8, 1, dtype="uint8")}
    pictures = {"observation__hand__grey": [png(frame[..., 0]) for frame in grey], "observation__whole": grey}
    source = toy(tmp_path, episode(0, **pictures), features=features)
    assert source.describe().cameras == ["image"] and source.notes[0].endswith("left out; convert.cameras may name it")
    for name in ("hand_grey", "hand/grey", "observation/hand/grey", "whole", whole):
        e = opened(tmp_path, cameras=[name, "image"]).read(0)
        assert np.array_equal(frames_of(e), np.repeat(grey, 3, axis=-1)) and list(e.frames)[1] == "image"


PAYLOADS = [tfds.example(episode(seed)) for seed in (0, 1)]
GOOD = tfds.framed(PAYLOADS)
LENGTHS = [struct.pack("<Q", length) for length in (2**63, 2**31, 10**9)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (GOOD[:-1], "truncated: the file ends within record 1"),
        (GOOD[: len(PAYLOADS[0]) + 20], "truncated: the file ends within record 1"),
        (tfds.framed(PAYLOADS[:1]), "1 records, but dataset_info.json says 2"),
        (b"", "0 records, but dataset_info.json says 2"),
        (gzip.compress(GOOD), "compressed with gzip"),
        (b"\x01" + GOOD[1:], "checksum of the length of record 0 is wrong"),
        (GOOD[:-40] + b"\x00" + GOOD[-39:], "damaged"),
        *((length + tfds.masked(length) + GOOD[12:], "truncated") for length in LENGTHS),
    ],
)
def test_damaged_record_files(tmp_path: Path, data: bytes, message: str) -> None:
    toy(tmp_path, *PAYLOADS)
    (tmp_path / "toy-train.tfrecord-00000-of-00001").write_bytes(data)
    with refused(message):
        look(source := opened(tmp_path))
        source.read(1)


def test_a_damaged_shard_costs_its_own_records(tmp_path: Path) -> None:
    tfds.write_set(tmp_path, FEATURES, {"train": [[episode(0), episode(1), episode(2)], [episode(3)]]})
    first = tmp_path / "toy-train.tfrecord-00000-of-00002"
    first.write_bytes(first.read_bytes()[: len(PAYLOADS[0]) + 30])
    source = opened(tmp_path)
    assert [source.shape(index).name for index in (0, 3)] == [f"{first.name}#0", "toy-train.tfrecord-00001-of-00002#0"]
    assert [source.read(index).instruction for index in (0, 3)] == ["push block 0", "push block 3"]
    for index in (1, 2):
        with refused("00000-of-00002: truncated: the file ends within record 1"):
            source.shape(index)


def test_a_damaged_record_is_not_left_out_as_an_empty_one(tmp_path: Path) -> None:
    toy(tmp_path, episode(0), episode(1, language_instruction=["x"] * 4))
    file = tmp_path / "toy-train.tfrecord-00000-of-00001"
    file.write_bytes(file.read_bytes().replace(b"\x0a\x01x", b"\x0a\x01 "))  # all blank, and the checksum is the old one
    with refused("record 1: damaged: the checksum of its data is wrong"):
        look(opened(tmp_path, without_instruction="leave_out"))


def test_a_damaged_record_among_episodes_of_equal_size_is_one_bad_episode(tmp_path: Path) -> None:
    pictures = [png(frame) for frame in pixels(0, 4)]
    toy(tmp_path, episode(0), episode(1, observation__image=pictures), episode(2, observation__image=pictures))
    file = tmp_path / "toy-train.tfrecord-00000-of-00001"
    content = bytearray(file.read_bytes())
    content[content.index(episode(1)["steps/action"].tobytes())] ^= 1
    file.write_bytes(content)
    source = opened(tmp_path)
    assert len(source) == 3 and source.shape(0).steps == source.shape(2).steps == 4
    with refused("record 1: damaged: the checksum of its data is wrong"):
        source.shape(1)


def test_a_set_that_changes_after_the_scan_is_noticed(tmp_path: Path) -> None:
    source = toy(tmp_path, episode(0))
    assert len(source) == 1
    toy(tmp_path, episode(0, language_instruction=["push a rock!"] * 4))
    with refused("differs from when the shards were scanned"):
        source.read(0)


SPLIT = {"name": "train", "shardLengths": [1], "filepathTemplate": "../{SPLIT}"}


def test_a_template_with_an_unknown_placeholder(tmp_path: Path) -> None:
    toy(tmp_path)
    file = tmp_path / "dataset_info.json"
    for unknown in ("PART", "SHARD_INDEX:05d", "split-name"):
        template = f"{{SPLIT}}-{{{unknown}}}.tfrecord"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"splits": [{**SPLIT, "filepathTemplate": template}]}))
        source = opened(tmp_path)
        assert source.read(0).instruction == "push block 0"
        assert f"filepathTemplate of split 'train' has {{{unknown}}}, which TFDS does not know" in source.notes[0]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("dataset_info.json", {"fileFormat": "array_record"}, "fileFormat is 'array_record'.* again without file_format"),
        ("dataset_info.json", {"name": 3}, "name is 3; expected a text"),
        ("dataset_info.json", {"splits": [{"name": "train"}]}, "key 'splits.0.shardLengths' is missing"),
        ("dataset_info.json", {"splits": [{**SPLIT, "shardLengths": ["-1"]}]}, "Lengths.0 is '-1'; expected at least 0"),
        ("dataset_info.json", {"splits": [SPLIT]}, "gives '../train', expected another file in this folder"),
        ("features.json", {"featuresDict": {"features": {}}}, "no features under 'steps'"),
        ("features.json", {"featuresDict": {"features": {"a": tensor(*"x")}}}, "dimensions.0 is 'x'; expected a whole number"),
        ("features.json", {"featuresDict": None}, "no featuresDict.features, so in the form of early TFDS versions"),
        ("features.json", "[" * 100_000, "not valid JSON .maximum recursion"),
        ("features.json", '{"sequence":{"feature":' * 300 + "{}" + "}}" * 300, "sequence.feature.*[Rr]ecursion"),
    ],
)
def test_wrong_descriptions_are_named(tmp_path: Path, file: str, change: Any, message: str) -> None:
    toy(tmp_path)
    content = change if isinstance(change, str) else json.dumps(json.loads((tmp_path / file).read_text()) | change)
    (tmp_path / file).write_text(content)
    with refused(message, file):
        opened(tmp_path)
