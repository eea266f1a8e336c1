"""How fast a store is made of videos, against decoding them; and how fast clips are read from one, against raw arrays."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from svam.benchmark.inputs import Inputs, fresh_folder
from svam.benchmark.recordings import Videos, decoded
from svam.benchmark.timing import in_turn, ratio_of, rounded
from svam.contract import ContractError
from svam.episodes.convert import convert
from svam.episodes.store import EpisodeStore
from svam.errors import ParamsError
from svam.files import FileError
from svam.params import Params
from svam.seeds import generator


def _decode(file: Path) -> int:
    """Frames of a video, all decoded to RGB arrays."""
    return sum(len(block) for block in decoded(file))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def conversion(inputs: Inputs, params: Params) -> dict[str, Any]:
    """Videos to a store, in their own size and in `benchmark.image_sizes`, against decoding them to RGB arrays by as many
    workers; a ratio of 1 would be a conversion that costs nothing but the decoding. Starting the workers counts in both.
    """
    if inputs.videos is None:
        raise ParamsError("conversion converts videos: name a folder of mp4 files by benchmark.videos or --videos")
    videos, workers = Videos.below(inputs.videos, params.benchmark.conversion_frames), params.machine.workers
    with fresh_folder(inputs.scratch / "conversion") as folder:

        def decode(_: int) -> float:
            def work() -> None:
                with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
                    if sum(pool.map(_decode, videos.files)) != videos.frames:
                        raise FileError(f"{inputs.videos}: changed while it was read")

            return _seconds(work)

        def made(size: int | None, _: int) -> float:
            changes = {"cameras": [], "image_size": size and [size, size], "crop": "centre", "binary_dimensions": []}
            settings = params.convert.model_copy(update=changes)
            return _seconds(lambda: convert(videos, folder / "store", settings, params.seed, workers))

        works: dict[str, Callable[[int], float]] = {"decode": decode, "convert": partial(made, None)}
        works |= {f"convert_{size}": partial(made, size) for size in params.benchmark.image_sizes}
        seconds = in_turn(works, params.benchmark.repeats, warm=False)
        size = sum(file.stat().st_size for file in (folder / "store").rglob("*") if file.is_file())
        shutil.rmtree(folder / "store")
    return {
        "videos": {"size": list(videos.size), "frames": videos.frames, "megabytes": _megabytes(videos)},
        "workers": workers, "last_store_megabytes": round(size / 1e6, 1), "seconds": rounded(seconds),
        "frames_per_second": {name: round(videos.frames / float(np.median(times)), 1) for name, times in seconds.items()},
        "ratios": {name: ratio_of(seconds, "decode", name) for name in seconds if name != "decode"},
    }  # fmt: skip


def _megabytes(videos: Videos) -> float:
    return round(sum(file.stat().st_size for file in videos.files) / 1e6, 1)


def clips(inputs: Inputs, params: Params) -> dict[str, Any]:
    """Random clips of consecutive frames from the episode store, against the same from one raw `.npy` that is mapped."""
    settings, store = params.benchmark, EpisodeStore.open(inputs.episodes)
    length = settings.clip_frames
    if len(store) < length:
        raise ContractError(f"benchmark.clip_frames is {length}, but {inputs.episodes} has {len(store)} rows")
    with fresh_folder(inputs.scratch / "clips") as folder:
        used = min(len(store), max(settings.frames, length))
        np.save(folder / "frames.npy", store.frames(np.arange(used, dtype=np.int64)))
        raw = np.load(folder / "frames.npy", mmap_mode="r")

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
        size = (folder / "frames.npy").stat().st_size
    return {
        "image_size": list(store.image_size), "clips": settings.clips, "raw_megabytes": round(size / 1e6, 1),
        "milliseconds": {name: round(1e3 * float(np.median(s)) / settings.clips, 4) for name, s in seconds.items()},
        "seconds": rounded(seconds), "ratio": ratio_of(seconds, "store", "npy"),
    }  # fmt: skip
