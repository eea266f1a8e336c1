"""How fast a store is made of videos, against decoding them; and how fast clips are read from one, against raw arrays."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from svam.benchmark.timing import Inputs, in_turn, ratio_of
from svam.contract import Choice, ContractError, frame_blocks
from svam.episodes.convert import convert
from svam.episodes.store import EpisodeStore
from svam.errors import ParamsError
from svam.files import FileError
from svam.params import Params
from svam.seeds import generator
from svam.sources._video import probe
from svam.sources.video_folder import Options, VideoFolderSource


def repeated(videos: Path, folder: Path, frames: int) -> VideoFolderSource:
    """The mp4 files below `videos` that are as large as the first, linked in the new `folder` again and again until they have
    `frames` frames. Their texts are not read: each frame is a step of an episode without actions.

    Raises:
        FileError: there is none, or one cannot be read.
    """
    files = sorted(videos.rglob("*.mp4"))
    if not files:
        raise FileError(f"{videos}: no mp4 file with a frame below it")
    folder.mkdir()
    first = probe(files[0])
    for number, file in enumerate(cycle(files)):
        facts = probe(file)
        if (facts.height, facts.width) == (first.height, first.width):
            (folder / f"{number:06}.mp4").symlink_to(file.resolve())
            frames -= facts.frames
        if frames <= 0:
            break
    return VideoFolderSource(folder, Options(), Choice(instruction="measure", rate_hz=10.0))


def _decode(source: VideoFolderSource, number: int) -> tuple[int, ...]:
    """(n, H, W, 3) of a video, all decoded to RGB arrays."""
    (frames,) = source.read(number).frames.values()
    for _ in frame_blocks(frames):
        pass
    return frames.shape


def conversion(inputs: Inputs, params: Params) -> dict[str, Any]:
    """Videos to a store, in their own size and in `benchmark.image_sizes`, against decoding them to RGB arrays by as many
    workers; a ratio of 1 would be a conversion that costs nothing but the decoding. Starting the workers counts in both."""
    if params.benchmark.videos is None:
        raise ParamsError("benchmark.videos is null, expected a folder of mp4 files for conversion to read")
    folder, workers = inputs.scratch / "videos", params.machine.workers
    videos = repeated(Path(params.benchmark.videos), folder, params.benchmark.conversion_frames)
    shapes: list[tuple[int, ...]] = []

    def decode(_: int) -> float:
        start = time.perf_counter()
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            shapes[:] = pool.map(partial(_decode, videos), range(len(videos)))
        return time.perf_counter() - start

    def made(size: int | None, _: int) -> float:
        changes = {"cameras": [], "image_size": size and [size, size], "crop": "centre", "binary_dimensions": []}
        start = time.perf_counter()
        convert(videos, inputs.scratch / "store", params.convert.model_copy(update=changes), params.seed, workers)
        return time.perf_counter() - start

    works: dict[str, Callable[[int], float]] = {"decode": decode, "convert": partial(made, None)}
    works |= {f"convert_{size}": partial(made, size) for size in params.benchmark.image_sizes}
    seconds = in_turn(works, params.benchmark.repeats, warm=False)
    frames = sum(shape[0] for shape in shapes)
    return {
        "videos": {"size": list(shapes[0][1:3]), "frames": frames, "megabytes": _megabytes(folder)},
        "workers": workers, "last_store_megabytes": _megabytes(inputs.scratch / "store"), "seconds": seconds,
        "frames_per_second": {name: round(frames / float(np.median(times)), 1) for name, times in seconds.items()},
        "ratios": {name: ratio_of(seconds, "decode", name) for name in seconds if name != "decode"},
    }  # fmt: skip


def _megabytes(folder: Path) -> float:
    return round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6, 1)


def clips(inputs: Inputs, params: Params) -> dict[str, Any]:
    """Random clips of consecutive frames from the episode store, against the same from one raw `.npy` that is mapped."""
    settings, store = params.benchmark, EpisodeStore(inputs.episodes)
    length, file = settings.clip_frames, inputs.scratch / "frames.npy"
    if len(store) < length:
        raise ContractError(f"benchmark.clip_frames is {length}, but {inputs.episodes} has {len(store)} rows")
    used = min(len(store), max(settings.frames, length))
    np.save(file, store.frames(np.arange(used, dtype=np.int64)))
    raw = np.load(file, mmap_mode="r")

    def read(repeat: int, from_store: bool) -> float:
        starts = generator("benchmark clips", repeat).integers(0, used - length + 1, settings.clips)
        start = time.perf_counter()
        for first in starts.tolist():
            if from_store:
                store.frames(np.arange(first, first + length, dtype=np.int64))
            else:
                np.array(raw[first : first + length])
        return time.perf_counter() - start

    seconds = in_turn({"store": partial(read, from_store=True), "npy": partial(read, from_store=False)}, settings.repeats)
    return {
        "image_size": list(store.image_size), "clips": settings.clips, "raw_megabytes": round(file.stat().st_size / 1e6, 1),
        "milliseconds": {name: round(1e3 * float(np.median(s)) / settings.clips, 4) for name, s in seconds.items()},
        "seconds": seconds, "ratio": ratio_of(seconds, "store", "npy"),
    }  # fmt: skip
