"""Videos through PyAV: the number of frames without decoding them all, and frames block by block. Whatever is missing, damaged
or no video is a `FileError`, also while blocks are read.

Frames come out as 8-bit RGB, as FFmpeg's scaler converts them, in the order of their presentation times, turned as a player
turns them where the file asks for a rotation by a quarter or a half turn. mp4 and webm carry no checksums: a damage that the
decoder notices is an error; a flipped bit that gives another valid picture cannot be noticed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.contract import FrameBlocks
from svam.files import FileError, refuse_lfs_pointer, stamp
from svam.sources._pictures import LARGEST_PICTURE, LEAVE_OUT, NoColourError, in_blocks

FORMATS = {".mp4": "mp4", ".mov": "mov", ".m4v": "mov", ".webm": "matroska", ".mkv": "matroska", ".avi": "avi"}
"""Suffix -> container. It is given to FFmpeg by name: a playlist called `x.mp4` must not make it open other files."""
_TURNS = {(1, 0, 0, 1): 0, (0, -1, 1, 0): 1, (-1, 0, 0, -1): 2, (0, 1, -1, 0): 3}
"""Display matrix -> quarter turns against the clock."""
_NO_TURN = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
"""The display matrix of an mp4 that is shown as it is stored."""
_FULL_COLOUR = {f"yuv{j}{layout}p": f"yuv{j}444p" for j in ("", "j") for layout in (420, 422)}
"""Pixel formats with one colour for two or four pixels -> the same with one for each."""
_ANEW = "if a player shows it, write it anew, e.g. ffmpeg -i in.mp4 -crf 10 out.mp4"
"""What to do about a video cut between key frames, or in an old container."""
_HDR = (16, 18)
"""FFmpeg's numbers of the transfer functions PQ and HLG."""
_NO_COLOUR = ("gray9", "gray1", "grayf", "ya16")


@dataclass(frozen=True)
class VideoFacts:
    """frames: how many a decoder will show. height, width: of a picture as it is handed out, after `turn` quarter turns against
    the clock. rate: mean frames per second, None where the container does not say. pixels: their format, by FFmpeg's name.
    start: when the first frame is shown, in seconds. told: what a person should know of the pictures, or ""."""

    frames: int
    height: int
    width: int
    rate: float | None
    turn: int = 0
    pixels: str = ""
    start: float = 0.0
    told: str = ""


def notes_of(told: Mapping[Path, str]) -> list[str]:
    """A note for each different thing that is told of videos."""
    alike: dict[str, list[Path]] = {}
    for file, what in sorted(told.items()):
        alike.setdefault(what, []).append(file)
    return [
        f"{files[0]}{f', and {len(files) - 1} more alike' * (len(files) > 1)}: {what}" for what, files in alike.items() if what
    ]


def told_at(facts: VideoFacts, rate_hz: float) -> str:
    """What is told of a video, and where its frames are not `rate_hz` a second, to 4 %, both rates."""
    if facts.rate is None or abs(facts.rate / rate_hz - 1) <= 0.04:
        return facts.told
    apart = f"plays at {facts.rate:g} frames/s, but the rate is {rate_hz:g} Hz, at which it is stored"
    return "; ".join(filter(None, (facts.told, apart)))


@dataclass(frozen=True)
class FrameTimes:
    """pts: (n,) int64 presentation times of the frames, increasing, in units of `base` seconds; None where a packet has none.
    keys: (k, 2) int64, of the packets from which decoding may begin the presentation and the decoding time."""

    pts: NDArray[np.int64] | None
    base: float
    keys: NDArray[np.int64]


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Any, Any]]:
    """Container and first video stream."""
    import av

    if file.suffix.lower() not in FORMATS:
        raise FileError(f"{file}: expected a video named {', '.join(FORMATS)}")
    if not file.is_file():
        raise FileError(f"{file}: no such file")
    try:
        with av.open(f"file:{file}", format=FORMATS[file.suffix.lower()], metadata_errors="replace") as container:
            if not container.streams.video:
                raise FileError(f"{file}: has no video stream, or is truncated")
            stream = container.streams.video[0]
            if stream.codec_context is None or not stream.time_base:
                raise FileError(f"{file}: truncated, damaged, or of a codec that PyAV {av.__version__} does not decode")
            # One thread: conversion already runs one worker a core. Errors in the bit stream end the reading, because the
            # decoder would otherwise paint over them.
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            stream.codec_context.options = {"err_detect": "explode"}
            yield container, stream
    except FileError:
        raise
    except (av.FFmpegError, OSError, ValueError, LookupError, TypeError, EOFError, MemoryError, OverflowError,
            RuntimeError) as error:  # fmt: skip
        refuse_lfs_pointer(file)
        kind = FORMATS[file.suffix.lower()]
        raise FileError(
            f"{file}: truncated, damaged or no video that FFmpeg reads as {kind} ({type(error).__name__}); {_ANEW}"
        ) from None


def probe(file: Path) -> VideoFacts:
    """What is known of a video from its header (mp4; of others every packet is read, and one frame decoded). `FileError` also
    where it is empty or to be shown mirrored, `NoColourError` where it holds no 8-bit colours."""
    return _probed(file, stamp(file))


@lru_cache(maxsize=4096)
def _probed(file: Path, _: str) -> VideoFacts:
    from av.stream import Disposition

    with _opened(file) as (container, stream):
        shown = [one for one in container.streams.video if not one.disposition & Disposition.attached_pic]
        if len(shown) > 1:  # such as of two lenses, or colours and depth
            way_out = "write the one to read into a file of its own, e.g. ffmpeg -i in.mkv -map 0:v:0 -c copy out.mkv"
            raise FileError(f"{file}: has {len(shown)} video streams, expected one; {way_out}")
        codec = stream.codec_context
        height, width = int(codec.height), int(codec.width)
        if not 0 < height * width <= LARGEST_PICTURE:
            raise FileError(f"{file}: frames of {width} x {height} pixels, expected 1 to {LARGEST_PICTURE}")
        if (codec.pix_fmt or "").startswith(_NO_COLOUR):
            found = f"{file}: pictures are {codec.pix_fmt}"
            raise NoColourError(f"{found}, expected 8-bit colour or grey; is it depth? {LEAVE_OUT}")
        in_index = container.format.name in ("mp4", "mov") and len(stream.index_entries) == stream.frames
        frames = sum(not entry.is_discard for entry in stream.index_entries) if in_index else 0
        rate, start = stream.average_rate, float((stream.start_time or 0) * stream.time_base)
        first = None if frames and _upright(file) else next(container.decode(stream), None)
        turn = 0 if first is None else _turn(file, first)
        told = [f"pictures are turned by {(360 - 90 * turn) % 360} degrees clockwise, as its metadata ask"] * bool(turn)
        if (pixel := codec.sample_aspect_ratio) not in (None, 0, 1):
            told.append(f"pixels are {pixel.numerator}:{pixel.denominator}, not square, and pictures are not stretched")
        told += ["colours are HDR, and are not mapped to the usual range"] * (codec.color_trc in _HDR)
        told += ["pictures are interlaced, and stay so"] * (codec.field_order > 1)
    if not frames:
        times = frame_times(file)
        frames = len(times.keys if times.pts is None else times.pts)
        rate = _rate(times, rate)
    if not frames:
        raise FileError(f"{file}: has no frames")
    size = (width, height) if turn % 2 else (height, width)
    return VideoFacts(frames, *size, float(rate) if rate else None, turn, codec.pix_fmt or "", start, "; ".join(told))


def _rate(times: FrameTimes, told: float | None) -> float | None:
    """Frames per second: as told, or a whole number, if the times agree to what the clock rounds; else their mean. Matroska
    need not tell, and FFmpeg then guesses from the first times, which are in milliseconds: 30.3 for 30. A clock that counts
    frames, as that of avi, is not asked: its gaps are frames that are not there."""
    span = float(times.pts[-1] - times.pts[0]) * times.base if times.pts is not None and len(times.pts) else 0.0
    if times.pts is None or span <= 0.0 or times.base * (told or 0.0) > 0.2:
        return told
    gaps = len(times.pts) - 1
    fits = [rate for rate in (told, round(gaps / span)) if rate and abs(gaps / rate - span) <= 1.5 * times.base]
    return fits[0] if fits else gaps / span


def _upright(file: Path) -> bool:
    """Whether the header of an mp4 asks for no turning at all; where it does, a frame says what FFmpeg makes of it."""
    with file.open("rb") as boxes:
        while len(head := boxes.read(16)) == 16:
            size, name, large = struct.unpack(">I4sQ", head)
            size = large if size == 1 else size
            if not 8 <= size < 2**62:
                break
            if name == b"moov" and 16 <= size <= 2**26:
                header = head[8:] + boxes.read(size - 16)
                return header.count(_NO_TURN) == header.count(b"mvhd") + header.count(b"tkhd") > 1
            boxes.seek(size - 16, 1)
    return False


def _turn(file: Path, frame: Any) -> int:
    """Quarter turns against the clock with which a player shows the frame."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0
    values = struct.unpack("=9i", bytes(matrix)[:36])
    a, b, c, d = (round(values[k] / 65536, 3) for k in (0, 1, 3, 4))
    if (a, b, c, d) not in _TURNS:
        raise FileError(
            f"{file}: its metadata ask a player to mirror, scale or turn the picture by other than quarter turns; store it "
            "upright, e.g. ffmpeg -i in.mp4 -crf 10 out.mp4 does"
        )
    return _TURNS[a, b, c, d]


def frame_times(file: Path) -> FrameTimes:
    """When each frame is shown; every packet is read, none decoded."""
    return _frame_times(file, stamp(file))


@lru_cache(maxsize=16)
def _frame_times(file: Path, _: str) -> FrameTimes:
    with _opened(file) as (container, stream):
        vp8 = stream.codec_context.name.endswith(("vp8", "libvpx"))
        # An edit list hides some frames, and VP8 has packets that only later frames refer to.
        shown = [
            packet for packet in container.demux(stream)
            if packet.size and not packet.is_discard and (not vp8 or bytes(packet)[0] & 16)
        ]  # fmt: skip
        pts = [packet.pts for packet in shown]
        keys = [(packet.pts, packet.dts) for packet in shown if packet.is_keyframe and None not in (packet.pts, packet.dts)]
        base = float(stream.time_base)
    known = None if None in pts else np.sort(np.asarray(pts, dtype=np.int64))
    return FrameTimes(known, base, np.asarray(keys, dtype=np.int64).reshape(-1, 2))


def video_blocks(file: Path, facts: VideoFacts, frames: int | None = None, rate_hz: float | None = None) -> FrameBlocks:
    """The first `frames` (None: all) of a video; nothing is decoded before the blocks are asked for. Their number and size must
    be those of `facts`; with `rate_hz` they must also be that far apart in time."""
    times = frame_times(file)
    if times.pts is not None and len(times.pts) != facts.frames:
        raise FileError(f"{file}: {len(times.pts)} frames, but its index lists {facts.frames}")
    if rate_hz is not None:
        if times.pts is None:
            raise FileError(f"{file}: does not say the times of its frames; name the rate in convert.rate_hz")
        _evenly_spaced(file, (times.pts - times.pts[0]) * times.base, times.base, rate_hz)
    count = facts.frames if frames is None else frames
    return frames_at(file, facts, None if times.pts is None else times.pts[:count], count)


def frames_at(file: Path, facts: VideoFacts, pts: NDArray[np.int64] | None, count: int) -> FrameBlocks:
    """The `count` frames with the presentation times `pts` (increasing, of `frame_times`); None: the first of the file."""

    def blocks(size: tuple[int, int] | None) -> Iterator[NDArray[np.uint8]]:
        return in_blocks(_decoded(file, facts, pts, count, size), str(file))

    def smaller(height: int, width: int) -> FrameBlocks:
        return FrameBlocks((count, height, width, 3), partial(blocks, (height, width)))

    shape = (count, facts.height, facts.width, 3)
    return FrameBlocks(shape, partial(blocks, None), smaller if facts.pixels in _FULL_COLOUR else None)


def _decoded(
    file: Path, facts: VideoFacts, pts: NDArray[np.int64] | None, count: int, smaller: tuple[int, int] | None
) -> Iterator[NDArray[np.uint8]]:
    """(H, W, 3) frames; or of the size `smaller`, the means of luminance and colours as the video keeps them, which then become
    RGB: a tenth of the work of averaging RGB, and nearer to what was filmed, since FFmpeg's fast way from 4:2:0 to RGB darkens
    by up to a level, and averages of clipped colours are not those of the colours."""
    from av.video.reformatter import VideoReformatter

    # One scaler for all frames, without threads of its own: they take as long to start as a frame takes to convert.
    scaler, averaging = VideoReformatter(), VideoReformatter()
    size = (facts.width, facts.height) if facts.turn % 2 else (facts.height, facts.width)
    start = None if pts is None else _key_before(file, int(pts[0]))
    with _opened(file) as (container, stream):
        if start is not None:
            container.seek(start, stream=stream)
        done = 0
        for frame in container.decode(stream):
            if frame.is_corrupt or (pts is not None and frame.pts is None):
                raise FileError(f"{file}: a frame after {done} of {count} is damaged")
            if pts is not None and frame.pts < pts[done]:
                continue
            if pts is not None and frame.pts > pts[done]:
                raise FileError(f"{file}: the frame at {float(pts[done] * stream.time_base):g} s cannot be decoded; {_ANEW}")
            if (frame.height, frame.width) != size:
                found = f"{frame.width} x {frame.height}"
                raise FileError(f"{file}: frame {done} is {found} pixels, expected {size[1]} x {size[0]}")
            if done == 0 and _turn(file, frame) != facts.turn:
                raise FileError(f"{file}: its first frame asks for another turn than its header; store it upright")
            if smaller is not None:
                height, width = smaller[::-1] if facts.turn % 2 else smaller
                full = _FULL_COLOUR.get(frame.format.name, "yuv444p")
                frame = averaging.reformat(frame, width, height, full, interpolation="AREA", threads=1)
            picture: NDArray[Any] = scaler.reformat(frame, format="rgb24", threads=1).to_ndarray()
            yield np.rot90(picture, facts.turn) if facts.turn else picture
            done += 1
            if done == count:
                return
    raise FileError(f"{file}: {done} of {count} frames could be decoded")


def _key_before(file: Path, pts: int) -> int | None:
    """Where to seek to so that decoding reaches the frame at `pts`; None: the beginning."""
    keys = frame_times(file).keys
    before = np.flatnonzero(keys[:, 0] <= pts)
    return int(keys[before[-1], 1]) if len(before) and before[-1] and FORMATS[file.suffix.lower()] in ("mp4", "mov") else None


def _evenly_spaced(file: Path, seconds: NDArray[np.float64], tick: float, rate_hz: float) -> None:
    """Gaps may differ from the period by a tenth, or by what the container's clock rounds, less than a tick (webm counts
    milliseconds)."""
    period = 1.0 / rate_hz
    gaps = np.diff(seconds, prepend=-period)
    late = np.abs(seconds - np.arange(len(seconds)) * period) > max(0.5 * period, 1.5 * tick)
    wrong = np.flatnonzero(late | (np.abs(gaps - period) > max(0.1 * period, 0.999 * tick)))
    if len(wrong):
        number = int(wrong[0])
        raise FileError(
            f"{file}: frame {number} comes {seconds[number]:.3f} s after the first and {gaps[number]:.3f} s after the one "
            f"before, expected {number * period:.3f} s and {period:.3f} s at {rate_hz:g} frames/s (a variable frame rate, or "
            "another one than the other videos); write it at a constant rate, or give convert.rate_hz if each frame is one "
            "time step whatever its time"
        )
