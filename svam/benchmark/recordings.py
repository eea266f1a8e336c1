"""Video files as a source that `convert` understands, for the benchmark: each is an episode with a made-up action."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svam.contract import Episode, EpisodeShape, FrameBlocks, SourceDescription
from svam.files import FileError

CAMERA, TASK, RATE_HZ = "front", "benchmark", 10.0
_BLOCK = 32


def decoded(file: Path) -> Iterator[NDArray[np.uint8]]:
    """All frames of a video as (k, H, W, 3) uint8 blocks, by one thread.

    Raises:
        FileError: it cannot be decoded.
    """
    import av

    block: list[NDArray[np.uint8]] = []
    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            stream.thread_count = 1
            for frame in container.decode(stream):
                block.append(np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8))
                if len(block) == _BLOCK:
                    yield np.stack(block)
                    block = []
    except (av.FFmpegError, IndexError) as error:
        raise FileError(f"{file}: cannot be decoded as video ({error})") from None
    if block:
        yield np.stack(block)


@dataclass(frozen=True)
class Videos:
    """Videos (n, H, W, 3) of one size, over and over again for as many frames as are asked for."""

    files: tuple[Path, ...]
    lengths: tuple[int, ...]
    size: tuple[int, int]
    notes: Sequence[str] = ()

    @classmethod
    def below(cls, path: Path, frames: int) -> Videos:
        """All mp4 files below `path` as large as the first, repeated until they have `frames` frames.

        Raises:
            FileError: there is none, or one cannot be decoded.
        """
        found = [(file, [block.shape for block in decoded(file)]) for file in sorted(Path(path).rglob("*.mp4"))]
        if not found or not found[0][1]:
            raise FileError(f"{path}: no mp4 file with a frame below it")
        size = found[0][1][0][1:3]
        used = [(file, sum(shape[0] for shape in shapes)) for file, shapes in found if shapes and shapes[0][1:3] == size]
        times = -(-frames // sum(length for _, length in used))
        return cls(tuple(file for file, _ in used) * times, tuple(length for _, length in used) * times, size)

    @property
    def frames(self) -> int:
        """Of all episodes."""
        return sum(self.lengths)

    def first(self, count: int) -> Videos:
        """The first episodes alone."""
        return replace(self, files=self.files[:count], lengths=self.lengths[:count])

    def describe(self) -> SourceDescription:
        """One camera, one task."""
        instructions = {TASK: {"train": ["measure"], "held_out": []}}
        return SourceDescription(rate_hz=RATE_HZ, cameras=[CAMERA], instructions=instructions, provenance={})

    def __len__(self) -> int:
        return len(self.files)

    def shape(self, index: int) -> EpisodeShape:
        """Length of one video."""
        return EpisodeShape(self.lengths[index])

    def read(self, index: int) -> Episode:
        """One video, decoded as its blocks are asked for."""
        file, n = self.files[index], self.lengths[index]
        frames = FrameBlocks((n, *self.size, 3), lambda: decoded(file))
        return Episode(TASK, "measure", RATE_HZ, {CAMERA: frames}, np.zeros((n, 1), np.float32), provenance={"file": file.name})
