"""Videos through PyAV: the number of frames without decoding, and frames block by block, with damage as one sentence.

Frames come out as 8-bit RGB, as FFmpeg's scaler converts them, in the order of their presentation times. mp4 and webm carry no
checksums: a damage that the decoder notices is an error; a flipped bit that gives another valid picture cannot be noticed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.contract import FrameBlocks
from svam.files import FileError
from svam.sources._picture_arrays import frames_per_block

FORMATS = {".mp4": "mp4", ".mov": "mov", ".m4v": "mov", ".webm": "matroska", ".mkv": "matroska", ".avi": "avi"}
"""Suffix -> container. It is given to FFmpeg by name: a playlist called `x.mp4` must not make it open other files."""
LARGEST_FRAME = 1 << 26
"""Pixels of a frame; a damaged header can claim any size."""
_IDENTITY = (65536, 0, 0, 65536)


@dataclass(frozen=True)
class VideoFacts:
    """frames: how many a decoder will show. rate: mean frames per second, None where the container does not say."""

    frames: int
    height: int
    width: int
    rate: float | None


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
                raise FileError(f"{file}: has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise FileError(f"{file}: is of a codec that this build of FFmpeg does not decode")
            stream.codec_context.thread_count = 1  # conversion already runs one worker a core
            yield container, stream
    except FileError:
        raise
    except (av.FFmpegError, OSError, ValueError, EOFError, MemoryError, OverflowError, RuntimeError) as error:
        message = f"{file}: truncated, damaged or no video that FFmpeg reads ({type(error).__name__})"
        raise FileError(message) from None


def probe(file: Path) -> VideoFacts:
    """What is known of a video without decoding it. An mp4's index is enough; of others every packet is read.

    Raises:
        FileError: it is missing, damaged, empty or no video.
    """
    with _opened(file) as (container, stream):
        codec = stream.codec_context
        height, width = int(codec.height), int(codec.width)
        if not 0 < height * width <= LARGEST_FRAME:
            raise FileError(f"{file}: frames of {width} x {height} pixels, expected 1 to {LARGEST_FRAME}")
        frames = _shown(container, stream)
        if not frames:
            raise FileError(f"{file}: has no frames")
        rate = stream.average_rate
        return VideoFacts(frames, height, width, float(rate) if rate else None)


def _shown(container: Any, stream: Any) -> int:
    """How many frames a decoder will show: an edit list hides some, VP8 has packets that only later frames refer to."""
    name = stream.codec_context.name
    if container.format.name in ("mp4", "mov") and stream.frames and len(stream.index_entries) == stream.frames:
        return sum(not entry.is_discard for entry in stream.index_entries)
    shown = 0
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            shown += not name.endswith(("vp8", "libvpx")) or bool(bytes(packet)[0] & 16)
    return shown


def video_blocks(file: Path, facts: VideoFacts, frames: int | None = None, rate_hz: float | None = None) -> FrameBlocks:
    """The first `frames` (None: all) of a video; nothing is decoded before the blocks are asked for.

    The whole video is decoded even then, so that its number of frames is verified. With `rate_hz` the frames must
    also be that far apart in time.

    Raises (while reading):
        FileError: damaged; another number or size of frames than `facts`; rotated by metadata; not at `rate_hz` throughout.
    """
    wanted = facts.frames if frames is None else frames
    return FrameBlocks((wanted, facts.height, facts.width, 3), partial(_decode, file, facts, wanted, rate_hz))


def _decode(file: Path, facts: VideoFacts, wanted: int, rate_hz: float | None) -> Iterator[NDArray[np.uint8]]:
    shape = (facts.height, facts.width, 3)
    step = frames_per_block(facts.height * facts.width * 3)
    with _opened(file) as (container, stream):
        block: list[NDArray[np.uint8]] = []
        count, start, before = 0, 0.0, 0.0
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise FileError(f"{file}: frame {count} is damaged")
            if (frame.height, frame.width) != shape[:2]:
                found = f"{frame.width} x {frame.height}"
                raise FileError(f"{file}: frame {count} is {found} pixels, expected {facts.width} x {facts.height}")
            if count == 0:
                _upright(file, frame)
            if count >= facts.frames:
                raise FileError(f"{file}: has more than the {facts.frames} frames that its header lists")
            if rate_hz is not None:
                if frame.time is None:
                    raise FileError(f"{file}: frame {count} has no time; name the rate in convert.options.rate_hz")
                now = float(frame.time)
                start = now if count == 0 else start
                _evenly_spaced(file, count, now - start, now - before, float(frame.time_base), rate_hz)
                before = now
            if count < wanted:
                block.append(frame.to_ndarray(format="rgb24"))
                if len(block) == step:
                    yield np.stack(block)
                    block = []
            count += 1
        if block:
            yield np.stack(block)
        if count != facts.frames:
            raise FileError(f"{file}: {count} frames could be decoded, but its header lists {facts.frames}")


def _evenly_spaced(file: Path, number: int, since_start: float, gap: float, tick: float, rate_hz: float) -> None:
    """Gaps may differ from the period by a tenth, or by what the container's clock rounds (webm counts milliseconds)."""
    period = 1.0 / rate_hz
    far_gap = number > 0 and abs(gap - period) > max(0.1 * period, 1.5 * tick)
    if far_gap or abs(since_start - number * period) > max(0.5 * period, 1.5 * tick):
        raise FileError(
            f"{file}: frame {number} comes {since_start:.3f} s after the first, expected {number * period:.3f} s at "
            f"{rate_hz:g} frames/s (a variable frame rate, or another one than the other videos); write it at a constant "
            "rate, or give convert.options.rate_hz if each frame is one time step whatever its time"
        )


def _upright(file: Path, frame: Any) -> None:
    """Refuse a picture that a player would rotate or mirror: it was not recorded as it is stored."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return
    values = struct.unpack("=9i", bytes(matrix)[:36])
    if (values[0], values[1], values[3], values[4]) != _IDENTITY:
        raise FileError(
            f"{file}: its metadata ask a player to rotate or mirror the picture (by {frame.rotation} degrees); store it "
            "upright, e.g. ffmpeg -i in.mp4 -crf 10 out.mp4 does"
        )
