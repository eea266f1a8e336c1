"""Films whose bytes are the same every time."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svam.files import whole_file


def write_film(path: Path, frames: Iterable[NDArray[np.uint8]], rate_hz: float) -> None:
    """Write frames (H, W, 3) uint8 RGB, H and W even, as H.264 in mp4 at `rate_hz` frames a second.

    One encoder thread and no time of creation: equal frames are equal bytes (with more threads they are not).
    """
    import av

    with whole_file(path) as temporary, av.open(str(temporary), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(rate_hz).limit_denominator(1000))
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"crf": "20", "preset": "veryfast", "threads": "1"}
        for number, frame in enumerate(frames):
            if number == 0:
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
