"""Videos with instructions: real folders and written ones, compared with what PyAV and json read by themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import pytest

from svam.contract import Choice, Episode, frame_blocks
from svam.episodes.frames import prepared, resize_frames
from svam.sources._video import probe, video_blocks
from svam.sources.video_folder import Options, open_source
from tests.recorded import SETTINGS
from tests.sources.common import LFS_POINTER, Array, decoded, film, frames_of, real, refused, squares


def annotate(file: Path, **content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


VPP = ["one action less", "hold latent_videos", "arrays beside", "keys"]


@pytest.mark.parametrize(
    ("folder", "rate", "cameras", "action", "state", "lost", "notes"),
    [
        ("bridge", 3.0, {"rgb": "rgb"}, "action", "state", 1, VPP),
        ("rt1", 3.0, {"rgb": "rgb"}, "action", "state", 1, VPP),
        ("xhand", 10.0, {"camera_0": "0", "camera_1": "1"}, "actions", "states", 0, [VPP[1], "2 videos that no JSON"]),
    ],
)
def test_real_folders(
    folder: str, rate: float, cameras: dict[str, str], action: str, state: str, lost: int, notes: list[str]
) -> None:
    root = real(f"video_text_folders/{folder}")
    source = open_source(root, Options())
    files = sorted((root / "annotation").rglob("*.json"))
    description = source.describe()
    assert all(source.shape(index).steps for index in range(len(source)))
    assert (description.rate_hz, description.cameras, len(source)) == (rate, list(cameras), len(files))
    assert all(expected in note for note, expected in zip(source.notes, notes, strict=True))
    for index, file in enumerate(files):
        content = json.loads(file.read_text())
        shape, episode = source.shape(index), source.read(index)
        n = len(content[state]) - lost
        assert shape.steps == episode.steps == n == len(content[action]) and shape.held_out is None
        assert episode.instruction == content["texts"][0]
        assert description.instructions[episode.task]["train"] == content["texts"]
        assert episode.actions is not None and (episode.actions == np.float32(content[action])).all()
        assert episode.proprioception is not None and (episode.proprioception == np.float32(content[state])[:n]).all()
        for camera, stem in cameras.items():
            expected = decoded(root / "videos/val" / file.stem / f"{stem}.mp4")
            assert len(expected) == len(content[state]) and (frames_of(episode, camera) == expected[:n]).all()


def layout(folder: Path, n: int = 6, **changes: Any) -> Path:
    """An episode in each of two splits; `changes` go into the first JSON, where None removes a key."""
    for split, name in (("train", "1"), ("val", "2")):
        for view in ("front", "side"):
            film(folder / f"videos/{split}/{name}/{view}.mp4", n)
        content = {
            "texts": [f"do {name}", f"please do {name}"], "action": [[0.1, 0.2]] * n, "state": [[k] for k in range(n)],
            "videos": [{"video_path": f"videos/{split}/{name}/{view}.mp4"} for view in ("front", "side")],
        } | (changes if name == "1" else {})  # fmt: skip
        annotate(folder / f"annotation/{split}/{name}.json", **{k: v for k, v in content.items() if v is not None})
    return folder


def test_splits_cameras_and_paraphrases(tmp_path: Path) -> None:
    source = open_source(layout(tmp_path / "d"), Options())
    assert source.describe().cameras == ["front", "side"] and list(source.notes) == []
    assert source.describe().instructions["do 1"] == {"train": ["do 1", "please do 1"], "held_out": []}
    assert [source.shape(k).held_out for k in (0, 1)] == [False, True]
    chosen = open_source(tmp_path / "d", Options(splits=("val",)))
    assert len(chosen) == 1 and chosen.read(0).instruction == "do 2" and chosen.shape(0).held_out is None
    with refused(r"no test/\*\.json, which convert\.options\.splits lists; it has train, val$"):
        open_source(tmp_path / "d", Options(splits=("test",)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": []}, r"1\.json: no instruction; set convert\.missing_instruction"),
        ({"texts": [None, " "]}, r"1\.json: no instruction; set convert\.missing_instruction"),
        ({"texts": 5}, "texts is '5', expected a sentence or a list"),
        ({"texts": ["\ud800"]}, "is not Unicode text"),
        ({"text": "other"}, r"has both texts and text; name one of them in convert\.options\.text"),
        ({"actions": [[1]]}, r"has both action and actions; name one of them in convert\.options\.action"),
        ({"action": [[1.0]] * 4}, "action has 4 rows, expected 6 or 5 for 6 frames"),
        ({"action": [[1.0], [1.0, 2.0]]}, "action is no table of numbers"),
        ({"action": []}, "action is no table of numbers"),
        ({"action": [[float("nan")]] * 6}, r"actions\[0, 0\] is nan"),
        ({"state": [[1.0]] * 5}, "state has 5 rows, but the video has 6 frames"),
        ({"video_length": 7}, "video_length is 7, but the video has 6 frames"),
        ({"videos": None}, "videos is 'None', expected a list of objects with a video_path each"),
        ({"videos": [{"video_path": "/etc/passwd"}]}, "expected the path of a video below the top folder"),
        (
            {"videos": [{"video_path": f"videos/{v}.mp4"} for v in ("front", "side")]},
            r"front\.mp4, .*side\.mp4: no such file, which .*1\.json names; videos holds train, val",
        ),
    ],
)
def test_a_wrong_json_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    source = open_source(layout(tmp_path / "d", **change), Options())
    with refused(message, str(tmp_path)):
        source.shape(0)
        source.read(0)
    assert source.read(1).instruction == "do 2" and "do 2" in source.describe().instructions
    if change.keys() & {"texts", "text"}:
        assert open_source(tmp_path / "d", Options(), Choice(instruction="go")).read(0).instruction == "go"


def test_what_differs_from_one_json_to_the_next(tmp_path: Path) -> None:
    """Videos in another order are the same cameras; one action less leaves out the last frame, with a note; 1 is success."""
    videos = [{"video_path": f"videos/train/1/{view}.mp4"} for view in ("side", "front")]
    changes = {"action": [[1.0]] * 5, "state": None, "success": 1, "video_length": "6"}
    root = layout(tmp_path / "d", videos=videos, **changes)
    film(root / "videos/train/1/front.mp4", 6, codec="mpeg4")
    source = open_source(root, Options())
    shapes = [source.shape(k) for k in (0, 1)]
    assert [(shape.steps, shape.success) for shape in shapes] == [(5, True), (6, None)]
    assert "1 of 2 episodes have one action less than frames" in source.notes[0]
    assert source.describe().cameras == list(source.read(1).frames) == ["side", "front"]
    assert (frames_of(source.read(0), "front") == decoded(root / "videos/train/1/front.mp4")[:5]).all()
    assert [shape.held_out for shape in shapes] == [False, True]
    (root / "annotation/train").rename(root / "annotation/Train")
    annotate(root / "annotation/Train/3.json", text="x", videos=["videos/val/2/front.mp4", "videos/val/2/side.mp4"])
    source = open_source(root, Options())
    assert [source.shape(k).held_out for k in (0, 1, 2)] == [False, False, True]
    assert "2 videos are named more than once in the JSON files, such as videos/val/2/front.mp4" in " ".join(source.notes)
    named = open_source(layout(tmp_path / "e", text=None, texts=["x"]), Options(text="text"), Choice(missing_instruction="go"))
    with refused("key 'text', which convert.options.text names, is missing"):
        named.shape(0)


def test_names_of_cameras_do_not_hang_on_the_order_of_lists(tmp_path: Path) -> None:
    """Names with numbers, listed in two orders; and films that have the names of their episodes."""
    for name, cameras in (("a", "01"), ("b", "10")):
        for camera in cameras:
            film(tmp_path / f"many/{name}/cam{camera}.mp4", squares(4 + int(camera))[:4])
        annotate(tmp_path / f"many/annotation/{name}.json", text="x", videos=[f"{name}/cam{camera}.mp4" for camera in cameras])
        film(tmp_path / f"one/{name}.mp4", 4)
        annotate(tmp_path / f"one/annotation/{name}.json", text="x", videos=[f"{name}.mp4"])
    many, one = (open_source(tmp_path / kind, Options()) for kind in ("many", "one"))
    for index, name in enumerate("ab"):
        for camera in "01":
            pictures = frames_of(many.read(index), f"camera_{camera}")
            assert (pictures == decoded(tmp_path / f"many/{name}/cam{camera}.mp4")).all()
    assert [list(one.read(index).frames) for index in (0, 1)] == [["camera_0"]] * 2


def test_a_camera_that_is_called_depth_is_doubted(tmp_path: Path) -> None:
    root = layout(tmp_path / "d")
    for split, name in (("train", "1"), ("val", "2")):
        (root / f"videos/{split}/{name}/side.mp4").rename(root / f"videos/{split}/{name}/depth_01.mp4")
        videos = [f"videos/{split}/{name}/{view}.mp4" for view in ("front", "depth_01")]
        annotate(root / f"annotation/{split}/{name}.json", text="x", videos=videos)
    doubt = "videos/train/1/depth_01.mp4 is read as colours; is it depth? to leave it out, name the other cameras in convert."
    assert f"{doubt}cameras" in open_source(root, Options()).notes
    assert not any("depth" in note for note in open_source(root, Options(), Choice(cameras=["camera_0", "front"])).notes)


def test_a_camera_of_another_kind_of_file_may_be_left_out(tmp_path: Path) -> None:
    videos = [{"video_path": path} for path in ("videos/train/1/front.mp4", "videos/train/1/side.gif")]
    root = layout(tmp_path / "d", videos=videos)
    (root / "videos/train/1/side.mp4").rename(root / "videos/train/1/side.gif")
    with refused(r"side\.gif: expected a video named \.mp4, \.mov"):
        open_source(root, Options()).shape(0)
    assert open_source(root, Options(), Choice(cameras=["front"])).read(0).steps == 6


def test_cameras_must_be_the_same_and_equally_long(tmp_path: Path) -> None:
    layout(tmp_path / "d")
    film(tmp_path / "d/videos/train/1/side.mp4", 5)
    with refused("side has 5 frames, front has 6"):
        open_source(tmp_path / "d", Options()).shape(0)
    annotate(tmp_path / "d/annotation/val/2.json", text="x", videos=[{"video_path": "videos/val/2/front.mp4"}])
    with refused(r"2\.json: cameras \['front'\], expected \['front', 'side'\] as in .*1\.json"):
        open_source(tmp_path / "d", Options()).read(1)
    chosen = open_source(tmp_path / "d", Options(), Choice(cameras=["front"]))
    assert [chosen.shape(k).steps for k in (0, 1)] == [6, 6] and list(chosen.read(1).frames) == ["front"]
    with refused("convert.cameras names 'top', but .* has front, side"):
        open_source(tmp_path / "d", Options(), Choice(cameras=["top"])).describe()


def test_a_plain_folder(tmp_path: Path) -> None:
    film(tmp_path / "d/a.mp4", 7)
    told = {"instruction": "wipe", "actions": [0.5] * 7, "states": [[1, 2]] * 7, "gripper": list(range(7)), "success": True}
    annotate(tmp_path / "d/a.json", **told)
    film(tmp_path / "d/sub/b.webm", 70, codec="libvpx-vp9", fps=10)
    (tmp_path / "d/sub/b.TXT").write_text("schütte\n\npour it\n", encoding="utf-8")
    film(tmp_path / "d/sub/c.mp4", 1)
    source = open_source(tmp_path / "d", Options(), Choice(missing_instruction="anything"))
    assert "2 of 3 episodes have no actions" in source.notes[0] and source.describe().cameras == ["video"]
    assert [source.shape(k).name for k in range(3)] == source.names == ["a", "sub/b", "sub/c"]
    assert [source.shape(k).success for k in range(3)] == [True, None, None]
    replaced = open_source(tmp_path / "d", Options(), Choice(instruction="go"))
    assert [replaced.shape(k).task for k in range(3)] == ["wipe", "schütte", "go"] and replaced.read(1).instruction == "go"
    a, b, c = (source.read(k) for k in range(3))
    assert [e.instruction for e in (a, b, c)] == ["wipe", "schütte", "anything"]
    assert source.describe().instructions["schütte"]["train"] == ["schütte", "pour it"]
    assert a.actions is not None and a.actions.shape == (7, 1) and b.actions is None and c.steps == 1
    for episode, file in ((a, "a.mp4"), (b, "sub/b.webm"), (c, "sub/c.mp4")):
        assert (frames_of(episode, "video") == decoded(tmp_path / "d" / file)).all()
    joined = open_source(tmp_path / "d", Options(proprioception=("states", "gripper"), action="gripper")).read(0)
    assert joined.proprioception[3].tolist() == [1, 2, 3] and joined.actions[3].tolist() == [3]
    with refused(r"c\.mp4: no instruction; set"):
        open_source(tmp_path / "d", Options()).shape(2)
    with refused(r"key 'speed', which convert\.options\.action names, is missing"):
        open_source(tmp_path / "d", Options(action="speed")).read(0)
    (tmp_path / "d/sub/b.TXT").rename(tmp_path / "d/sub/b.txt")
    with refused(r"no videos \(.*\); it has b.txt$"):
        (tmp_path / "e").mkdir()
        shutil.copy(tmp_path / "d/sub/b.txt", tmp_path / "e")
        open_source(tmp_path / "e", Options())
    (tmp_path / "d/sub/b.txt").write_text(LFS_POINTER)
    with refused(r"b\.txt: a Git LFS pointer"):
        open_source(tmp_path / "d", Options()).read(1)
    for written in (b"\xff\xfe", "pour it".encode("utf-16-le")):
        (tmp_path / "d/sub/b.txt").write_bytes(written)
        with refused(r"b\.txt: not UTF-8 text"):
            open_source(tmp_path / "d", Options()).read(1)
    film(tmp_path / "d/.trash/a.mp4", 7)
    annotate(tmp_path / "d/a.json", actions=[0.5] * 7)
    (tmp_path / "d/a.txt").write_text("scrub", encoding="utf-8")
    both = open_source(tmp_path / "d", Options())
    assert both.names == ["a", "sub/b", "sub/c"] and both.read(0).actions is not None
    assert both.shape(0).task == both.read(0).instruction == "scrub"
    film(tmp_path / "d/depth/a.mp4", 7)
    alike = "2 videos are called as one in another folder, such as a.mp4 and depth/a.mp4; each is an episode by itself"
    assert any(alike in note for note in open_source(tmp_path / "d", Options()).notes)


def test_the_split_of_a_plain_folder(tmp_path: Path) -> None:
    """Folders at the top, as of annotations; where one of several says no split, a note."""
    for name in ("Train/1", "train/more/2", "val/3"):
        film(tmp_path / f"{name}.mp4", 2)
    source = open_source(tmp_path, Options(), Choice(instruction="go"))
    assert source.names == ["Train/1", "train/more/2", "val/3"] and not any("no split" in note for note in source.notes)
    assert [source.shape(k).held_out for k in range(3)] == [False, False, True]
    assert open_source(tmp_path, Options(splits=("val",)), Choice(instruction="go")).names == ["val/3"]
    with refused("no test/.*, which convert.options.splits lists; it has Train, train, val"):
        open_source(tmp_path, Options(splits=("test",)))
    film(tmp_path / "0.mp4", 2)
    source = open_source(tmp_path, Options(), Choice(instruction="go"))
    assert source.shape(3).held_out is None
    assert f"{tmp_path}: the folders ['', 'Train', 'train', 'val'] say no split; one is drawn" in source.notes


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("x.mp4", "libsvtav1", {}), ("x.webm", "libsvtav1", {}), ("x.mkv", "libx264", {}), ("x.avi", "mjpeg", {}),
        ("x.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "b": "20k"}),
        ("x.webm", "libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16"}), ("x.mp4", "mpeg4", {"bf": "2"}),
    ],
)  # fmt: skip
def test_codecs(tmp_path: Path, name: str, codec: str, options: dict[str, str]) -> None:
    file = film(tmp_path / name, 66, codec=codec, options=options)
    facts = probe(file)
    assert (facts.frames, facts.height, facts.width, facts.rate) == (66, 48, 64, 10.0)
    blocks = list(frame_blocks(video_blocks(file, facts, None, 10.0)))
    assert [len(block) for block in blocks] == [64, 2] and (np.concatenate(blocks) == decoded(file)).all()


def resized(file: Path, size: list[int], crop: Literal["none", "centre"] = "none") -> tuple[Array, Array]:
    """What a store gets of a video, and what it would get of whole pictures."""
    blocks, params = video_blocks(file, probe(file)), SETTINGS.model_copy(update={"image_size": size, "crop": crop})
    episode = Episode(task="a", instruction="a", rate_hz=10.0, frames={"front": blocks}, actions=None)
    found = np.concatenate([block.copy() for block in frame_blocks(prepared(episode, ["front"], params).frames["front"])])
    return found, resize_frames(np.concatenate([block.copy() for block in frame_blocks(blocks)]), params)


def shades(height: int, width: int) -> Array:
    """(3, height, width, 3) uint8: slow changes of colour with a sharp corner, none of it too bright or dark for a video."""
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    picture = np.stack([40 + 150 * x, 60 + 120 * y, 200 - 75 * (x + y)], axis=-1)
    picture[height // 2 :, : width // 4] = (60, 150, 90)
    return np.stack([picture, picture[::-1], picture[:, ::-1]]).round().astype(np.uint8)


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "options"),
    [
        ("libx264", "yuv420p", {}), ("libx264", "yuvj420p", {}), ("libx264", "yuv422p", {}), ("libsvtav1", "yuv420p", {}),
        ("mjpeg", "yuvj420p", {}), ("libx264", "yuv420p", {"colorspace": "1"}), ("libx264", "yuv420p", {"colorspace": "9"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("height", "width", "part", "rotate"), [(96, 104, 4, None), (72, 98, 2, 90), (64, 128, 16, None)])
def test_pictures_are_made_smaller_in_the_colours_of_the_video(
    tmp_path: Path, codec: str, pix_fmt: str, options: dict[str, str], height: int, width: int, part: int, rotate: int | None
) -> None:
    """They are nearer to the means of what was filmed than those of whole pictures."""
    pictures = shades(height, width)
    name = "x.mkv" if codec == "mjpeg" else "x.mp4"
    file = film(tmp_path / name, pictures, codec=codec, rotate=rotate, options=options, pix_fmt=pix_fmt)
    truth = pictures.reshape(3, height // part, part, width // part, part, 3).mean((2, 4))
    if rotate:
        truth = np.rot90(truth, axes=(1, 2))
    found, whole = resized(file, list(truth.shape[1:3]))
    assert found.shape == truth.shape and not np.array_equal(found, whole)
    assert np.abs(found - truth).mean() < np.abs(whole - truth).mean() and np.abs(found.astype(int) - whole).max() <= 16


@pytest.mark.parametrize(
    ("pix_fmt", "size"),
    [("bgra", [16, 16]), ("yuv444p", [16, 16]), ("yuv420p10le", [16, 16]), ("gray", [16, 16]), ("yuv420p", [24, 20])],
)
def test_pictures_in_other_formats_or_no_whole_parts_are_means_of_whole_ones(
    tmp_path: Path, pix_fmt: str, size: list[int]
) -> None:
    file = film(tmp_path / "x.mkv", shades(64, 96), codec="ffv1", pix_fmt=pix_fmt)
    assert np.array_equal(*resized(file, size)) and np.array_equal(*resized(file, size, "centre"))
    assert np.array_equal(*resized(file, [64, 96]))


def test_rates_and_rotation(tmp_path: Path) -> None:
    film(tmp_path / "d/a.mp4", 8)
    film(tmp_path / "d/b.mp4", 8, fps=12)
    film(tmp_path / "d/c.mp4", 8, times=[0, 1, 2, 5, 6, 7, 8, 9])
    film(tmp_path / "d/e.mp4", 8, rotate=90)
    told = Choice(instruction="go")
    film(tmp_path / "avi/x.avi", 8, codec="mjpeg", times=[0, 1, 2, 3, 4, 6, 7, 8])  # whose clock counts frames
    with refused("x.avi: frame 5 comes 0.600 s after the first and 0.200 s after the one before, expected 0.500 s"):
        open_source(tmp_path / "avi", Options(), told).read(0)
    source = open_source(tmp_path / "d", Options(), told)
    assert len(frames_of(source.read(0), "video")) == 8
    apart = "frame 1 comes 0.083 s after the first and 0.083 s after the one before, expected 0.100 s and 0.100 s at 10 frames"
    for index, message in ((1, apart), (2, "variable frame rate.*convert.rate_hz")):
        with refused(message):
            source.shape(index)
    source.shape(3)
    turned = frames_of(source.read(3), "video")
    assert "e.mp4: pictures are turned by 270 degrees clockwise, as its metadata ask" in source.notes[-1]
    assert turned.shape == (8, 64, 48, 3)
    assert (turned == np.rot90(decoded(tmp_path / "d/e.mp4"), 1, axes=(1, 2))).all()
    stated = open_source(tmp_path / "d", Options(), told.model_copy(update={"rate_hz": 5.0}))
    assert stated.describe().rate_hz == 5.0
    for index, file in enumerate(("a", "b", "c")):
        episode = stated.read(index)
        assert episode.rate_hz == 5.0 and (frames_of(episode, "video") == decoded(tmp_path / f"d/{file}.mp4")).all()
        stated.shape(index)
    rates = "frames/s, but the rate is 5 Hz, at which it is stored"
    assert (
        f"{tmp_path}/d/a.mp4: plays at 10 {rates}" in stated.notes
        and f"{tmp_path}/d/b.mp4: plays at 12 {rates}" in stated.notes
    )
    assert not any("plays at" in note for note in source.notes)


def test_a_rate_that_matroska_does_not_say(tmp_path: Path) -> None:
    """As browsers and live recorders write it: times in milliseconds alone, of which FFmpeg makes 30.3 frames a second."""
    for frames, fps, rate in ((90, 30, 30.0), (10, 30, 30.0), (90, 60, 60.0)):
        file = film(tmp_path / f"{frames}_{fps}/x.mkv", frames, fps=fps)
        content = file.read_bytes()
        at = content.index(b"\x23\xe3\x83")  # DefaultDuration, of 4 bytes of name and length; in its place nothing
        length = 2 + (content[at + 3] & 0x7F)
        file.write_bytes(content[:at] + bytes([0xEC, 0x80 | length]) + bytes(length) + content[at + 2 + length :])
        assert av.open(str(file)).streams.video[0].average_rate != rate  # FFmpeg's guess
        source = open_source(file.parent, Options(), Choice(instruction="go"))
        assert source.describe().rate_hz == rate and len(frames_of(source.read(0), "video")) == frames


def test_which_of_two_streams_is_meant_is_not_guessed(tmp_path: Path) -> None:
    one = film(tmp_path / "one.mp4", 5)
    with av.open(str(one)) as taken, av.open(str(tmp_path / "two.mkv"), "w") as container:
        streams = [container.add_stream_from_template(taken.streams.video[0]) for _ in range(2)]
        for packet in taken.demux(video=0):
            for stream in streams if packet.dts is not None else ():
                packet.stream = stream
                container.mux(packet)
    assert probe(one).frames == 5
    with refused("two.mkv: has 2 video streams, expected one; write the one to read into a file of its own, e.g. ffmpeg"):
        probe(tmp_path / "two.mkv")


def test_headers_are_enough_for_the_shape(tmp_path: Path) -> None:
    """No picture is decoded before it is read."""
    file = film(tmp_path / "x.mp4", 5)
    content = file.read_bytes()
    start = content.index(b"mdat") + 4
    file.write_bytes(content[:start] + bytes(500) + content[start + 500 :])
    source = open_source(tmp_path, Options(), Choice(instruction="go"))
    assert source.shape(0).steps == 5
    with refused(r"x\.mp4: .*(damaged|decoded)"):
        frames_of(source.read(0), "video")


def test_what_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("go")
    file = film(tmp_path / "x.mp4", 5)
    short = file.read_bytes()[:-10]
    for content in (b"", b"hello", b"#EXTM3U\n#EXTINF:10,\n/etc/passwd\n", short[:1000], short[: len(short) // 2]):
        file.write_bytes(content)
        source = open_source(tmp_path, Options())
        for look in (source.describe, lambda source=source: source.shape(0)):
            with refused(r"x\.mp4: truncated, damaged or no video"):
                look()
    file.write_text("version https://git-lfs.github.com/spec/v1")
    with refused(r"x\.mp4: a Git LFS pointer"):
        open_source(tmp_path, Options()).shape(0)
    film(file, 2, codec="png", pix_fmt="gray16be")
    with refused(r"x\.mp4: pictures are gray16be, .*is it depth\? to leave it out, name the other cameras in"):
        open_source(tmp_path, Options()).shape(0)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux([*stream.encode(sound), *stream.encode(None)])
    with refused("no video stream"):
        open_source(tmp_path, Options()).shape(0)


def test_two_videos_of_one_name_do_not_share_a_text(tmp_path: Path) -> None:
    film(tmp_path / "a.mp4", 4)
    film(tmp_path / "a.webm", 4, codec="libvpx-vp9")
    (tmp_path / "a.txt").write_text("push")
    source = open_source(tmp_path, Options())
    assert source.names == ["a", "a.webm"] and source.shape(0).steps == 4
    with refused("a.webm: a.mp4 has the same name, and so the same text; rename one, or leave this one out"):
        source.shape(1)


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_what_a_player_would_change_is_told(tmp_path: Path, kind: str) -> None:
    """Pixels that are not square, HDR and interlacing; pictures stay as they are stored."""
    for name in "ab":
        film(tmp_path / f"{name}.{kind}", 4, options={"x264-params": "transfer=arib-std-b67:sar=4/3:tff=1"})
    film(tmp_path / f"c.{kind}", 4)
    source = open_source(tmp_path, Options(), Choice(instruction="go"))
    assert [source.shape(index).steps for index in range(3)] == [4, 4, 4]
    assert (frames_of(source.read(0)) == decoded(tmp_path / f"a.{kind}")).all()
    assert source.notes[-1] == (
        f"{tmp_path}/a.{kind}, and 1 more alike: pixels are 4:3, not square, and pictures are not stretched; "
        "colours are HDR, and are not mapped to the usual range; pictures are interlaced, and stay so"
    )
