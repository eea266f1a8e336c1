"""Films whose bytes are the same every time."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.files import whole_file


class Film:
    """An H.264 film in mp4, written picture by picture, that is whole once it is closed.

    One encoder thread, no time of creation and no macroblock tree: equal pictures are equal bytes. With more threads they are
    not, nor with x264's macroblock tree: 119 times the same 21 pictures of 960 x 722 became 23 different films.

    rate_hz: pictures a second. crf: x264's constant rate factor, 0 (large) to 51 (poor). pixel_format: of what is encoded, as
    FFmpeg calls it. settings: more of the encoder's. pictures, bytes: written so far, and how large they became.
    """

    def __init__(
        self, path: Path, rate_hz: float, crf: int = 20, pixel_format: str = "yuv420p", settings: dict[str, str] | None = None
    ) -> None:
        import av

        self._container = av.open(str(path), "w", options={"fflags": "+bitexact"})
        self._stream = self._container.add_stream("libx264", rate=Fraction(rate_hz).limit_denominator(10_000))
        self._stream.pix_fmt = pixel_format
        self._stream.codec_context.thread_count = 1
        fixed = {"crf": str(crf), "preset": "veryfast", "threads": "1", "mbtree": "0"}
        self._options: dict[str, object] = {**fixed, **(settings or {})}
        self.pictures = self.bytes = 0

    def write(self, picture: NDArray[np.uint8]) -> None:
        """Append a picture (H, W, 3) uint8 RGB, of the first one's size; H and W even where the pixel format halves them."""
        import av

        if not self.pictures:
            self._stream.height, self._stream.width = picture.shape[:2]
            self._stream.options = self._options
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        self._mux(frame)
        self.pictures += 1

    def close(self) -> None:
        """Write what the encoder still holds, and the end of the file."""
        with self._container:
            if self.pictures:
                self._mux(None)

    def _mux(self, frame: Any) -> None:
        for packet in self._stream.encode(frame):
            self.bytes += packet.size
            self._container.mux(packet)


def write_film(path: Path, frames: Iterable[NDArray[np.uint8]], rate_hz: float) -> None:
    """Write frames (H, W, 3) uint8 RGB, H and W even, as a `Film` of `rate_hz` frames a second."""
    with whole_file(path) as temporary, closing(Film(temporary, rate_hz)) as film:
        for frame in frames:
            film.write(frame)
