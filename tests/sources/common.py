"""What the tests of all sources share: real data, damage, and the one sentence with which bad data is refused."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import pytest
from hypothesis import strategies as st

from svam.contract import Episode, EpisodeSource, frame_blocks
from svam.errors import SvamError
from tests import ROOT

Array = np.ndarray[Any, Any]
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def real(name: str) -> Path:
    """A folder of real data, or a skip."""
    folder = ROOT.parent / "shared/realdata" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not beside this checkout")
    return folder


def change(file: Path, name: str, value: Any = None) -> None:
    """A dataset of an HDF5 file is replaced, added or deleted."""
    with h5py.File(file, "a") as root:
        if name in root:
            del root[name]
        if value is not None:
            root[name] = value


def frames_of(episode: Episode, camera: str | None = None) -> Array:
    """All frames of a camera (of the first); a reader never hands out more than 64 at once."""
    camera = next(iter(episode.frames)) if camera is None else camera
    blocks = list(frame_blocks(episode.frames[camera]))
    assert isinstance(episode.frames[camera], np.ndarray) or all(len(block) <= 64 for block in blocks)
    return np.concatenate(blocks)


def squares(n: int, size: tuple[int, int] = (48, 64)) -> Array:
    """n pictures of coloured squares, which video codecs keep apart."""
    small = np.random.default_rng(n).integers(0, 256, (n, size[0] // 16, size[1] // 16, 3), dtype=np.uint8)
    return np.kron(small, np.ones((1, 16, 16, 1), np.uint8))


def film(
    file: Path, pictures: int | Iterable[Array], *, codec: str = "libx264", fps: int = 10, times: Iterable[int] | None = None,
    rotate: int | None = None, options: dict[str, str] | None = None, pix_fmt: str = "yuv420p",
) -> Path:  # fmt: skip
    """A video of the pictures (of so many `squares`); `times` in units of a frame."""
    frames = list(squares(pictures) if isinstance(pictures, int) else pictures)
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else pix_fmt
        stream.codec_context.time_base = Fraction(1, fps)
        stream.codec_context.thread_count = 1
        if rotate is not None:
            stream.set_display_rotation(rotate)
        for time, picture in zip(range(len(frames)) if times is None else times, frames, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file


def decoded(file: Path) -> Array:
    """All frames, decoded without the code under test."""
    with av.open(str(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24", threads=1) for frame in container.decode(video=0)])


def spoil(file: Path, field: str) -> None:
    """Put something that is no array in the place of a field of an .npz."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (members | {f"{field}.npy": b"no array"}).items():
            archive.writestr(name, content)


@contextmanager
def refused(message: str, *names: str) -> Iterator[None]:
    """The block must raise one sentence for the user that matches `message` and has all `names` in it."""
    with pytest.raises(SvamError, match=message) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text and all(name in text for name in names), text


def everything(source: EpisodeSource) -> list[dict[str, Any]]:
    """The values of each episode, by name; shapes, sentences and lengths agree with what the source says before reading."""
    description, episodes = source.describe(), []
    assert all(isinstance(note, str) for note in source.notes)
    for index in range(len(source)):
        shape, episode = source.shape(index), source.read(index)
        assert shape.name == getattr(source, "names", {index: shape.name})[index]
        assert shape.steps == episode.steps and list(episode.frames) == list(description.cameras)
        assert episode.instruction in [s for side in description.instructions[episode.task].values() for s in side]
        values: dict[str, Any] = {"instruction": episode.instruction}
        values |= {camera: frames_of(episode, camera) for camera in episode.frames}
        for name in ("actions", "expert_actions", "state", "proprioception", "timestamps"):
            if (vector := getattr(episode, name)) is not None:
                assert np.isfinite(vector).all()
                values[name] = vector
        assert all(len(value) == episode.steps for name, value in values.items() if name != "instruction")
        for name, labels in episode.annotations.items():
            assert shape.annotated[name] == len(labels.index) == len(labels.values)
            values |= {name: labels.values, f"{name}/index": labels.index}
        episodes.append(values)
    return episodes


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` cut short, or with up to four bytes changed; half of the time near its start, where structures are dense."""
    if draw(st.booleans()):
        return data[: draw(st.integers(0, len(data) - 1))]
    result, limit = bytearray(data), min(len(data), draw(st.sampled_from([4096, len(data)])))
    for _ in range(draw(st.integers(1, 4))):
        result[draw(st.integers(0, limit - 1))] ^= draw(st.integers(1, 255))
    return bytes(result)
