"""Other ways to keep recorded clips and to read them, each as its own project does it, and the floors no reader can beat.

Every reader gives the frames (T, H, W, 3) uint8 and the action chunk (K, A) float32 of a sample, in memory of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from svam.benchmark.recordings import CAMERA, RATE_HZ, Recording, action_chunks
from svam.episodes import keyed
from svam.episodes.chunks import ZSTD_LEVEL
from svam.episodes.lz4_blocks import decompress_to
from svam.episodes.memory import page_aligned
from svam.episodes.rows import RowReader
from svam.episodes.store import EpisodeStore

Clip = tuple[NDArray[np.uint8], NDArray[np.float32]]
Read = Callable[[int], Clip]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


@dataclass(frozen=True)
class Samples:
    """The clips to read: their rows and those of their action chunks, from `write_samples`."""

    folder: Path
    ends: tuple[int, ...]
    chunk: int

    def rows(self) -> NDArray[np.int64]:
        """(clips, T)."""
        return np.asarray(json.loads((self.folder / "rows.json").read_text()), dtype=np.int64)

    def action_rows(self) -> NDArray[np.int64]:
        """(clips, K)."""
        return action_chunks(self.rows(), np.asarray(self.ends), self.chunk)


@dataclass(frozen=True)
class StoreClips:
    """Our store, through `EpisodeStore`."""

    path: Path
    samples: Samples
    name: str = "store"

    def open(self) -> Read:
        """Through one open store."""
        store, rows, actions = EpisodeStore.open(self.path), self.samples.rows(), self.samples.action_rows()
        return lambda i: (store.frames(rows[i]), store.vector("actions", actions[i]))

    def files(self, sample: int) -> list[Path]:
        """All of it: a shard holds many clips."""
        return [file for part in ("frames", "actions") for file in (self.path / part).rglob("*") if file.is_file()]


def _zarr_clip(frames: Any, actions: Any, rows: NDArray[np.int64], action_rows: NDArray[np.int64]) -> Clip:
    """By slices, which zarr reads faster than lists of rows; the repeats of a chunk past its episode's end are appended."""
    step = int(rows[1] - rows[0]) if len(rows) > 1 else 1
    found = actions[int(action_rows[0]) : int(action_rows[-1]) + 1]
    if len(found) < len(action_rows):
        found = np.concatenate([found, np.repeat(found[-1:], len(action_rows) - len(found), axis=0)])
    return frames[int(rows[0]) : int(rows[-1]) + 1 : step], found


@dataclass(frozen=True)
class ZarrClips:
    """Our store of whole chunks, through plain zarr, opened once."""

    path: Path
    samples: Samples
    name: str = "zarr_on_store"

    def open(self) -> Read:
        """Through one open group."""
        import zarr

        group, rows, actions = zarr.open_group(self.path, mode="r"), self.samples.rows(), self.samples.action_rows()
        frames, vector = group[f"frames/{CAMERA}"], group["actions"]
        return lambda i: _zarr_clip(frames, vector, rows[i], actions[i])

    def files(self, sample: int) -> list[Path]:
        """As of `StoreClips`."""
        return StoreClips(self.path, self.samples).files(sample)


@dataclass(frozen=True)
class ReplayBuffer:
    """diffusion_policy's replay buffer on disk: Zarr v2, a frame a chunk, its `disk` compressor (Blosc, zstd 5)."""

    path: Path
    samples: Samples
    name: str = "zarr_v2_blosc"

    def write(self, recording: Recording) -> None:
        """`data/img`, `data/action`, `meta/episode_ends`."""
        import zarr
        from numcodecs import Blosc

        codec = Blosc("zstd", clevel=5, shuffle=Blosc.BITSHUFFLE)
        frames, actions = recording.whole(), recording.whole_actions()
        group = zarr.open_group(self.path, mode="w", zarr_format=2)
        for name, values, chunk in (
            ("data/img", frames, 1), ("data/action", actions, 256), ("meta/episode_ends", recording.ends, 256)
        ):  # fmt: skip
            chunks = (min(chunk, len(values)), *values.shape[1:])
            array = group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=chunks, compressors=codec)
            array[:] = values

    def open(self) -> Read:
        """Through one open group."""
        import zarr

        group, rows, actions = zarr.open_group(self.path, mode="r"), self.samples.rows(), self.samples.action_rows()
        frames, vector = group["data/img"], group["data/action"]
        return lambda i: _zarr_clip(frames, vector, rows[i], actions[i])

    def files(self, sample: int) -> list[Path]:
        """The chunk of each frame."""
        rows = self.samples.rows()[sample]
        return [self.path / "data" / "img" / f"{row}.0.0.0" for row in rows] + list((self.path / "data/action").glob("[0-9]*"))


@dataclass(frozen=True)
class VideoFiles:
    """A mp4 file per episode, as LeRobot writes and reads them with PyAV: open, seek to the key frame before, decode on, and
    take the frames nearest to the asked times. Its actions lie in memory, which is more than its tables do.
    """

    path: Path
    samples: Samples
    codec: Literal["libx264", "libsvtav1"]
    key_frame_every: int = 2
    crf: int = 30

    @property
    def name(self) -> str:
        """By codec."""
        return {"libx264": "mp4_h264", "libsvtav1": "mp4_av1"}[self.codec]

    def write(self, recording: Recording) -> None:
        """One file per episode, with LeRobot's settings (yuv420p, crf 30, a key frame every 2 frames)."""
        import av

        os.environ.setdefault("SVT_LOG", "1")  # errors only: its encoder prints a page for each file
        self.path.mkdir(parents=True)
        for episode in range(len(recording.steps)):
            frames = recording.arrays(episode)[0]
            with av.open(str(self.path / f"episode_{episode:06d}.mp4"), "w") as container:
                stream = container.add_stream(self.codec, rate=Fraction(RATE_HZ))
                stream.height, stream.width = frames.shape[1:3]
                stream.pix_fmt = "yuv420p"
                stream.options = {"crf": str(self.crf), "g": str(self.key_frame_every)}
                for image in frames:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
                container.mux(stream.encode())
        np.save(self.path / "actions.npy", recording.whole_actions())

    def _place(self, rows: NDArray[np.int64]) -> tuple[Path, NDArray[np.int64]]:
        ends = np.asarray(self.samples.ends)
        episode = int(np.searchsorted(ends, rows[0], side="right"))
        return self.path / f"episode_{episode:06d}.mp4", rows - (int(ends[episode - 1]) if episode else 0)

    def open(self) -> Read:
        """A file is opened for each clip."""
        rows, chunks, actions = self.samples.rows(), self.samples.action_rows(), np.load(self.path / "actions.npy")
        return lambda i: (self._decode(*self._place(rows[i])), actions[chunks[i]])

    def _decode(self, file: Path, wanted: NDArray[np.int64]) -> NDArray[np.uint8]:
        import av

        times = wanted / RATE_HZ
        images, stamps = [], []
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            assert stream.time_base is not None
            container.seek(int(times[0] / stream.time_base), backward=True, any_frame=False, stream=stream)
            for frame in container.decode(stream):
                assert frame.time is not None
                images.append(frame.to_ndarray(format="rgb24"))
                stamps.append(frame.time)
                if frame.time >= times[-1] - 1e-4:
                    break
        nearest = np.abs(np.asarray(stamps)[None] - times[:, None]).argmin(axis=1)
        return np.stack([images[i] for i in nearest])

    def files(self, sample: int) -> list[Path]:
        """Its episode's."""
        return [self._place(self.samples.rows()[sample])[0]]


@dataclass(frozen=True)
class RawFiles:
    """A raw array file per sample, written in advance: the clip and its actions, ready to be loaded whole."""

    samples: Samples
    name: str = "npy_per_sample"

    def open(self) -> Read:
        """`numpy.load`."""
        folder = self.samples.folder
        return lambda i: (np.load(folder / f"clip_{i}.npy"), np.load(folder / f"actions_{i}.npy"))

    def files(self, sample: int) -> list[Path]:
        """Its two."""
        return [self.samples.folder / f"clip_{sample}.npy", self.samples.folder / f"actions_{sample}.npy"]


@dataclass(frozen=True)
class Decompression:
    """A floor: decompressing, from memory to memory, what a sample touches: as our store holds it, or, with `zstd`, the same
    chunks compressed by Zstd at its default level.
    """

    path: Path
    samples: Samples
    zstd: bool = False
    of: str = ""

    @property
    def name(self) -> str:
        """Of the codec."""
        return ("floor_zstd" if self.zstd else "floor_decompress") + self.of

    def open(self) -> Read:
        """The compressed chunks in memory, and room for one that is used again and again."""
        from numcodecs.blosc import decompress
        from numcodecs.zstd import Zstd

        reader, rows = RowReader(self.path / "frames" / CAMERA), self.samples.rows()
        if reader.compressor == keyed.CODEC and not self.zstd:
            return _decode_keyed(reader, rows)
        length, codec = reader.chunk_rows, Zstd(level=ZSTD_LEVEL, checksum=True)
        encoded = {n: reader.encoded(n) for n in np.unique(rows // length).tolist()}
        if self.zstd:
            rows_of = {n: np.minimum(np.arange(n * length, (n + 1) * length), len(reader) - 1) for n in encoded}
            encoded = {n: bytes(codec.encode(reader.read(rows_of[n]))) for n in encoded}
        of_zstd = self.zstd or reader.compressor == "zstd"
        if not of_zstd:
            encoded = {n: data[:-4] for n, data in encoded.items()}  # without the CRC-32C
        touched = [[encoded[chunk] for chunk in np.unique(clip // length).tolist()] for clip in rows]
        room, nothing = page_aligned((length, *reader.shape[1:]), np.uint8), np.zeros((0, 0), dtype=np.float32)

        def read(sample: int) -> Clip:
            for data in touched[sample]:
                if of_zstd:
                    codec.decode(data, out=room)
                else:
                    decompress(data, room)
            return room, nothing

        return read

    def files(self, sample: int) -> list[Path]:
        """None: nothing is read."""
        return []


def _decode_keyed(reader: RowReader, rows: NDArray[np.int64]) -> Read:
    """Decompress the frames of each clip and their keys, compressed in memory, and nothing else."""
    edges, length = keyed.band_edges(reader.row_bytes), reader.row_bytes
    parts = [reader.parts(clip) for clip in rows]
    room = page_aligned((max(sum(len(part.frames) for _, part in clip) for clip in parts) * length,), np.uint8)
    held: list[NDArray[Any]] = [room]
    clips = []
    for clip in parts:
        jobs: list[tuple[int, int, int, int, int, int]] = []  # as `decompress_to` takes them
        target = room.ctypes.data
        for chunk, part in clip:
            held.append(np.empty(part.read_bytes, np.uint8))
            source, start = held[-1].ctypes.data, 0
            for first, end in part.runs:
                chunk.fetch(first, end, held[-1].data[start : start + end - first])
                start += end - first
            decoded: dict[tuple[int, ...], int] = {(): 0}
            for frame, keys, _, at, sizes in part.frames:
                if keys not in decoded:  # two keys side by side
                    held.append(reader.read(np.array(keys) + chunk.number * reader.chunk_rows))
                    decoded[keys] = held[-1].ctypes.data
                for (first, end), size in zip(edges, sizes, strict=True):
                    dictionary = decoded[keys] + first, (end - first) * len(keys)
                    jobs.append((source + at, target + first, size - 4, end - first, *dictionary))
                    at += size
                decoded[(frame,)] = target
                target += length
        clips.append(jobs)
    nothing = np.zeros((0, 0, 0, 0), dtype=np.uint8), np.zeros((0, 0), dtype=np.float32)

    def read(sample: int, held: list[NDArray[Any]] = held) -> Clip:  # `held` owns what the addresses lead to
        for job in clips[sample]:
            decompress_to(*job)
        return nothing

    return read


@dataclass(frozen=True)
class Reading:
    """A floor: reading what a sample touches from disk, as it is stored. With a cold cache the disk sets it."""

    path: Path
    samples: Samples
    name: str = "floor_read"

    def open(self) -> Read:
        """Through the store's open shards."""
        reader, rows = RowReader(self.path / "frames" / CAMERA), self.samples.rows()
        nothing = np.zeros((0, 0, 0, 0), dtype=np.uint8), np.zeros((0, 0), dtype=np.float32)
        if reader.compressor == keyed.CODEC:
            parts = [reader.parts(clip) for clip in rows]
            room = page_aligned((max(part.read_bytes for clip in parts for _, part in clip),), np.uint8)

            def read_runs(sample: int) -> Clip:
                for chunk, part in parts[sample]:
                    for start, end in part.runs:
                        chunk.fetch(start, end, room.data[: end - start])
                return nothing

            return read_runs
        touched = [np.unique(clip // reader.chunk_rows).tolist() for clip in rows]

        def read(sample: int) -> Clip:
            for chunk in touched[sample]:
                reader.encoded(chunk)
            return nothing

        return read

    def files(self, sample: int) -> list[Path]:
        """All shards of the frames."""
        return [file for file in (self.path / "frames").rglob("*") if file.is_file()]


@dataclass(frozen=True)
class Copying:
    """A floor: copying a sample from memory to memory."""

    samples: Samples
    name: str = "floor_memcpy"

    def open(self) -> Read:
        """All samples in memory."""
        read, count = RawFiles(self.samples).open(), len(self.samples.rows())
        held = [read(i) for i in range(count)]
        return lambda i: (held[i][0].copy(), held[i][1].copy())

    def files(self, sample: int) -> list[Path]:
        """None: nothing is read."""
        return []
