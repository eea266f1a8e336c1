"""`python -m svam.episodes`: what it prints is what is there, what is wrong is found and named, and pictures are pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from svam.console import console
from svam.contract import Episode
from svam.episodes.__main__ import app
from svam.episodes.convert import convert
from svam.episodes.joined import open_store
from svam.episodes.validation import Check, validate
from svam.files import sha256_tree
from tests.episodes.stores import SOURCE, Array, edit, replace, shards, timed
from tests.recorded import SETTINGS, Recorded
from tests.sources.test_source_raw import ONE_TASK, arrays_of, write
from tests.toy import invoke, write_toy_params


def checks_of(path: Path) -> dict[str, Check]:
    return {check.name: check for check in validate(path)}


def faults_of(path: Path) -> dict[str, str]:
    return {name: check.text() for name, check in checks_of(path).items() if check.faults}


def warnings_of(path: Path) -> dict[str, str]:
    return {name: check.text() for name, check in checks_of(path).items() if check.warnings}


def call(*arguments: object) -> Result:
    console.width = 4000
    return invoke(app, *arguments)


def test_inspect_says_what_is_there(kept: Path) -> None:
    found = json.loads(call("inspect", kept, "--json").stdout)
    store = open_store(kept)
    assert (found["episodes"], found["rows"], found["rate_hz"], found["schema_version"]) == (9, len(store), 20.0, 3)
    assert found["hours"] == len(store) / 20 / 3600 and found["timestamps"]
    assert found["episode_list"][4] == {"number": 4, "name": "", "rows": 21, "task": "pull", "split": "train"}
    assert found["cameras"] == {"front": [8, 8], "wrist": [8, 8]}
    assert sum(side["episodes"] for side in found["split"].values()) == 9
    assert found["split"]["train"]["rows"] == len(store.rows("train"))
    by_task = {entry["task"]: entry for entry in found["tasks"]}
    assert by_task["push"]["episodes"] == 4 and by_task["pull"]["said"]["pull please, number 8"] == 1
    assert by_task["push"]["instructions"]["held_out"] == ["push c"]
    actions = np.concatenate([store.vector("actions", np.arange(*store.bounds(int(e)))) for e in store.episodes("train")])
    assert found["vectors"]["actions"]["stored"] and not found["vectors"]["expert_actions"]["stored"]
    np.testing.assert_allclose(found["vectors"]["actions"]["q01"], np.quantile(actions.astype(float), 0.01, axis=0))
    assert found["convention"]["normalisation"] == "minmax"
    labelled = store.annotation("depth")
    assert labelled is not None and found["annotations"]["depth"] == {"frames": len(labelled.rows), "size": [8, 8]}
    files = [file for file in kept.rglob("*") if file.is_file()]
    assert (found["files"], found["bytes"]) == (len(files), sum(file.stat().st_size for file in files))
    front = found["arrays"]["frames/front"]
    assert front["uncompressed_bytes"] == len(store) * 192 and (front["chunk_rows"], front["shard_rows"]) == (4, 16)


def test_inspect_prints_tables(kept: Path) -> None:
    text = call("inspect", kept, "--tasks", 1).stdout
    for part in (
        "189 at 20 Hz", "front 8 x 8, wrist 8 x 8", "pull please, number 4", "and 1 more", "computed now", "frames/wrist",
        "normalised by minmax", "times smaller", "schema version 3", "1 paraphrases held out", "source",
    ):  # fmt: skip
        assert part in text, part


def test_inspect_lists_a_recording(tmp_path: Path) -> None:
    """Before it is converted, episodes that cannot be read included."""
    folder = write(
        tmp_path / "raw", {**ONE_TASK, "cameras": ["front"]}, **{name: arrays_of(2, n) for n, name in enumerate("abc", 4)}
    )
    (folder / "b.npz").write_bytes(b"PK")
    write_toy_params(tmp_path / "params.yaml", {"convert": {"source": "raw", "options": {}}})
    text = call("inspect", "--recording", folder, "--params", tmp_path / "params.yaml", "--episodes", 2).stdout
    assert "raw: 3 episodes at 12.5 Hz, cameras front\nnote: " in text and "and 1 more: --episodes N" in text
    assert re.search(r"^0 +a +pick +4$", text, re.M) and re.search(r"^1 +b +cannot be read: .*b\.npz", text, re.M)
    found = json.loads(call("inspect", "--recording", folder, "--params", tmp_path / "params.yaml", "--json").stdout)
    assert found["episode_list"][2] == {"number": 2, "name": "c", "task": "pick", "rows": 6} and found["rate_hz"] == 12.5


def test_a_whole_store_is_valid(kept: Path) -> None:
    checks = checks_of(kept)
    assert not any(check.faults or check.warnings for check in checks.values()), checks
    assert {"files", "frames/front", "frames/wrist", "actions", "timestamps", "statistics", "checksums", "duplicates"} <= set(
        checks
    )
    result = call("validate", kept, "--strict")
    assert result.exit_code == 0 and "0 faults, 0 warnings" in result.stdout
    assert result.stdout.count("✓") == len(checks)


def test_a_damaged_chunk_is_named_and_the_rest_still_read(path: Path) -> None:
    file = shards(path, "frames/wrist")[1]  # rows 16..31, four chunks
    data = bytearray(file.read_bytes())
    data[10] ^= 255
    file.write_bytes(data)
    replace(path, "actions", lambda values: np.where(np.arange(len(values))[:, None] == 120, np.float32(0.123), values))
    found = faults_of(path)
    assert re.match(r"rows 16\.\.19 \(episode 1\) cannot be read: .*/c/1/0/0/0: ", found["frames/wrist"])
    assert {"frames/wrist", "checksums"} <= set(found) <= {"frames/wrist", "checksums", "statistics"}  # if 6 is a training one
    assert "episode 6" in found["checksums"] and "episode 1 " not in found["checksums"]


def test_changed_values_are_found(path: Path) -> None:
    store = open_store(path)
    row = store.bounds(int(store.episodes("train")[1]))[0] + 3
    replace(path, "proprioception", lambda values: values + (np.arange(len(values))[:, None] == row) * np.float32(0.5))
    found = faults_of(path)
    assert set(found) == {"checksums", "statistics"} and "proprioception: mean[0] is" in found["statistics"]
    assert f"episode {store.episodes('train')[1]} (push/" in found["checksums"]


def put(place: int | tuple[int, ...], value: float) -> Callable[[Array], Array]:
    def change(values: Array) -> Array:
        values[place] = value
        return values

    return change


@pytest.mark.parametrize("array, change, said", [
    ("actions", put((40, 1), np.nan), r"episode 3, row 40 \(its step 4\): actions\[1\] is nan, expected a finite number"),
    ("expert_actions", put((40, 0), np.inf), r"episode 3, row 40 .*: expert_actions\[0\] is inf, expected a finite number"),
    ("annotations/segmentation/values", put((5, 0, 0), 9), r"pixel \(0, 0\): 9, expected classes 0\.\.6"),
    ("annotations/depth/values", put((5, 7, 2), -1.0), r"pixel \(7, 2\): -1\.0, expected metres"),
    ("timestamps", put(30, 0.0), r"episode 2, row 30 \(its step 9\): 0 s, expected a finite number above"),
])  # fmt: skip
def test_values_that_cannot_be_are_named(path: Path, array: str, change: Callable[[Array], Array], said: str) -> None:
    replace(path, array, change)
    found = faults_of(path)
    assert re.search(said, found.pop(array)) and "is not as it was converted" in found.pop("checksums")
    assert set(found) == ({"statistics"} if array == "actions" else set())


def test_gaps_in_time_and_another_rate(tmp_path: Path) -> None:
    source = SOURCE.changed(2, **timed(SOURCE.episodes[2], gap=7)).changed(4, **timed(SOURCE.episodes[4], rate=10.0))
    convert(source, tmp_path / "gap.zarr", SETTINGS, seed=0)
    found = warnings_of(tmp_path / "gap.zarr")["timestamps"]
    assert "episode 2 has 1 gaps, the longest 0.45 s (9.0 steps) before row 28" in found
    result = call("validate", tmp_path / "gap.zarr")
    assert result.exit_code == 0 and "! timestamps" in result.stdout
    assert call("validate", tmp_path / "gap.zarr", "--strict").exit_code == 1
    convert(SOURCE.changed(4, **timed(SOURCE.episodes[4], rate=15.0)), tmp_path / "rate.zarr", SETTINGS, seed=0)
    assert warnings_of(tmp_path / "rate.zarr") == {"timestamps": "episode 4 runs at 15 Hz, the store says 20 Hz"}


def test_episodes_that_are_there_twice(tmp_path: Path) -> None:
    episodes = list(SOURCE.episodes)
    other = vars(episodes[5]) | {"instruction": "pull it, will you"}
    source = Recorded([*episodes, episodes[1], Episode(**other)])
    convert(source, tmp_path / "s.zarr", SETTINGS, seed=0)
    check = checks_of(tmp_path / "s.zarr")["duplicates"]
    text = "; ".join(check.faults + check.warnings)
    split = open_store(tmp_path / "s.zarr").episode_split
    assert f"episodes 1 and 9 are the same{', and one of them is held out' if split[1] != split[9] else ''}" in text
    assert (
        "episodes 5 and 10 have the same frames with the instructions 'pull please, number 5' and 'pull it, will you'" in text
    )
    assert len(check.faults) == 1 + (split[5] != split[10])


def test_what_a_person_should_look_at(tmp_path: Path) -> None:
    black = SOURCE.episodes[1].frames["front"].copy()
    black[4:7] = 0
    still = np.repeat(SOURCE.episodes[3].frames["wrist"][:1], SOURCE.episodes[3].steps, axis=0)
    source = SOURCE.changed(1, frames=dict(SOURCE.episodes[1].frames) | {"front": black})
    source = source.changed(3, frames=dict(SOURCE.episodes[3].frames) | {"wrist": still})
    for number, episode in enumerate(source.episodes):
        actions = episode.actions.copy()
        actions[:, 1] = 0.25
        proprioception = np.asarray(episode.proprioception).copy()
        if number == 8:
            proprioception[5, 1] = 1e4
        source = source.changed(number, actions=actions, proprioception=proprioception)
    convert(source, tmp_path / "s.zarr", SETTINGS, seed=0)
    found = warnings_of(tmp_path / "s.zarr")
    assert found.pop("frames/front") == "3 of 12 frames of episode 1 are one colour, the first at row 13"
    assert found.pop("frames/wrist") == "all 18 frames of episode 3 are the same"
    assert found.pop("actions") == "dimensions that never change: 1"
    assert re.match(r"outliers in dimension 1, which lies from \S+ to 10000, 98 % of the ", found.pop("proprioception"))
    assert not found


def test_wrong_statistics_instructions_and_strange_files(path: Path) -> None:
    (path / "note.txt").write_text("hello")

    def change(attributes: dict[str, Any]) -> None:
        attributes["statistics"]["actions"]["q99"][2] += 0.01
        attributes["statistics"]["actions"]["count"] += 1
        attributes["episode_instructions"][3] = " "
        attributes["episode_instructions"][0] = "push c"

    edit(path, change)
    checks = checks_of(path)
    assert "note.txt is no file of the store" in checks["files"].warnings[0]
    assert "actions: q99[2] is" in checks["statistics"].text() and "training rows stated" in checks["statistics"].text()
    assert checks["instructions"].faults == ["episode 3: the instruction is empty"]
    assert checks["instructions"].warnings == ["episode 0: its instruction 'push c' is one of those held out"]


def test_a_store_that_does_not_open_has_one_fault(path: Path, tmp_path: Path) -> None:
    (path / "frames" / "zarr.json").write_text("[]")
    wrong = "frames/zarr.json: not the metadata of a Zarr v3 group"
    for store, said in ((path, wrong), (tmp_path / "no", "no such directory")):
        result = call("validate", store)
        assert result.exit_code == 1 and f"✗ store  {store}" in result.stdout and said in result.stdout
        assert "1 faults, 0 warnings" in result.stdout and said in call("inspect", store).stderr


def test_show_draws_a_sheet_and_a_film(kept: Path, tmp_path: Path) -> None:
    import av
    from PIL import Image

    for folder in ("a", "b"):
        assert call("show", kept, "--episode", 3, "--out", tmp_path / folder).exit_code == 0
    assert sha256_tree(tmp_path / "a") == sha256_tree(tmp_path / "b")
    made = (tmp_path / "a" / "episode_0003.mp4").read_bytes()  # what the encoder writes into it of how it was made
    assert b" mbtree=0 " in made and b" threads=1 " in made, "else one film in ten is another one"
    with Image.open(tmp_path / "a" / "episode_0003.png") as sheet:
        assert sheet.width > 1500 and sheet.height > 600
        # The first frame of the first camera, 24 times as large, below the header: its colours are there.
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 20) or []}
    frame = SOURCE.episodes[3].frames["front"]
    assert {tuple(pixel) for pixel in np.asarray(frame)[0].reshape(-1, 3).tolist()} <= colours
    with av.open(str(tmp_path / "a" / "episode_0003.mp4")) as film:
        pages = [page.to_ndarray(format="rgb24") for page in film.decode(video=0)]
        assert film.streams.video[0].average_rate == 20.0
    assert len(pages) == SOURCE.episodes[3].steps
    assert all(page.shape == pages[0].shape and page.shape[0] % 2 == 0 for page in pages)
    assert np.abs(pages[0].astype(int) - pages[9]).mean() > 1


@pytest.mark.parametrize("arguments, message", [
    (("--episode", 9), r"no episode 9; there are 0..8"), (("--episode", -1), r"no episode -1; there are 0..8"),
])  # fmt: skip
def test_show_says_what_is_there_instead(kept: Path, tmp_path: Path, arguments: tuple[object, ...], message: str) -> None:
    result = call("show", kept, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 1 and f"error: {kept}: {message}" in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fields", [
    {"frames": {"front": np.full((1, 480, 640, 3), 7, np.uint8), "wrist": np.full((1, 31, 47, 3), 9, np.uint8)}},
    {"frames": {name: np.zeros((1, 700, 96, 3), np.uint8) for name in ("front", "wrist")},
     "instruction": "a word of " + "extraordinary" * 30 + " length; 打开抽屉 [bold]"},
])  # fmt: skip
def test_show_takes_any_size_and_one_frame(tmp_path: Path, fields: dict[str, Any]) -> None:
    import av

    bare = dict.fromkeys(("actions", "expert_actions", "proprioception", "timestamps"))
    source = Recorded([
        Episode(**(vars(episode) | bare | {"annotations": {}} | fields)) for episode in (SOURCE.episodes[0], SOURCE.episodes[1])
    ])  # fmt: skip
    convert(source, tmp_path / "s.zarr", SETTINGS, seed=0)
    assert call("show", tmp_path / "s.zarr", "--episode", 1, "--out", tmp_path).exit_code == 0
    with av.open(str(tmp_path / "episode_0001.mp4")) as film:
        assert len(list(film.decode(video=0))) == 1 and film.streams.video[0].width <= 1280
    text = call("inspect", tmp_path / "s.zarr").stdout
    assert "none: good for the video model" in text and "vectors      none" in text
    assert call("validate", tmp_path / "s.zarr").exit_code == 1  # the same episode twice


def test_the_manifest_lists_names_and_sizes(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "b" / "deep").mkdir(parents=True)
    (data / "b" / "deep" / "x.npz").write_bytes(b"12345")
    (data / "a.json").write_bytes(b"")
    (data / "loop").symlink_to(data)
    (data / "link.npz").symlink_to(data / "b" / "deep" / "x.npz")
    for name in ("one.json", "two.json"):
        assert call("manifest", data, tmp_path / name).exit_code == 0
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    found = json.loads((tmp_path / "one.json").read_text())
    assert found == {
        "schema_version": 1, "count": 3, "bytes": 10, "files": {"a.json": 0, "b/deep/x.npz": 5, "link.npz": 5},
    }  # fmt: skip
    (other := tmp_path / "other").mkdir()
    (other / "y").write_bytes(b"1")
    assert call("manifest", data, other, tmp_path / "both.json").exit_code == 0
    both = json.loads((tmp_path / "both.json").read_text())
    assert both["bytes"] == 11 and {f"{data}/a.json", f"{data}/b/deep/x.npz", f"{other}/y"} < set(both["files"])
    for folder, out, message in (
        (data, data / "m.json", "lies below"), (tmp_path / "no", tmp_path / "m.json", "no: No such file or directory"),
    ):  # fmt: skip
        result = call("manifest", folder, out)
        assert result.exit_code == 1 and message in result.stderr
    (data / "broken").symlink_to(data / "nowhere")
    result = call("manifest", data, tmp_path / "m.json")
    assert result.exit_code == 1 and "broken: No such file" in result.stderr
