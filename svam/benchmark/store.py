"""How fast the episode store and the teacher cache are read, in what memory, and how fast a store is made."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.benchmark import recordings
from svam.benchmark.inputs import Inputs, fresh_folder
from svam.benchmark.peers import (
    Copying,
    Decompression,
    RawFiles,
    Reading,
    ReplayBuffer,
    Samples,
    StoreClips,
    VideoFiles,
    ZarrClips,
    size_of,
)
from svam.benchmark.recordings import Recording
from svam.benchmark.timing import Reader, measure, peak_bytes, summary
from svam.console import console
from svam.episodes.convert import convert
from svam.episodes.rows import RowReader
from svam.episodes.store import EpisodeStore
from svam.params import Params

Data = tuple[Recording, dict[str, Any]]


def _recordings(inputs: Inputs, params: Params, folder: Path, sizes: list[int]) -> Iterator[Data]:
    """The data of every kind and size, sizes above the data's own once."""
    seen = set()
    for kind, path, take in (
        ("store", inputs.episodes, recordings.from_store), ("videos", inputs.videos, recordings.from_videos)
    ):  # fmt: skip
        for size in sizes if path is not None else []:
            assert path is not None
            recording, described = take(path, folder / f"{kind}_{size}", params.benchmark.frames, size)
            if (key := (kind, *described["image_size"])) not in seen:
                seen.add(key)
                yield recording, described


def _store(recording: Recording, path: Path, params: Params, workers: int = 1, **changes: Any) -> Path:
    """The store that the pipeline's conversion writes from a recording, as large and cut as it is, but for `changes`."""
    plain = params.convert.model_copy(
        update={"cameras": [], "image_size": None, "crop": "none", "binary_dimensions": [], "held_out": 0.1} | changes
    )
    convert(recording, path, plain, params.seed, workers=workers)
    return path


def clips(inputs: Inputs, params: Params) -> dict[str, Any]:
    """Random clips with their action chunks, from our store, kept as `convert` says (`store`) and by the other ways to compress
    frames, from its peers and the floors.
    """
    settings, results = params.benchmark, []
    with fresh_folder(inputs.scratch / "clips") as folder:
        for recording, described in _recordings(inputs, params, folder, settings.image_sizes):
            place = folder / "formats"
            store = _store(recording, place / "store", params)
            others = {
                name: _store(recording, place / name, params, compression=name, chunk_frames="auto")
                for name in ("keyed", "lz4") if name != params.convert.compression
            }  # fmt: skip
            portable = others.get("lz4", store)
            written = False
            for stride in settings.strides:
                rows = recordings.draw_clips(recording, settings.clips, settings.clip_frames, stride)
                samples = Samples(place / f"samples_{stride}", tuple(recording.ends.tolist()), settings.action_chunk)
                recordings.write_samples(recording, rows, settings.action_chunk, samples.folder)
                peers: list[ReplayBuffer | VideoFiles] = [
                    ReplayBuffer(place / "replay", samples), VideoFiles(place / "h264", samples, "libx264"),
                    VideoFiles(place / "av1", samples, "libsvtav1"),
                ]  # fmt: skip
                for peer in [] if written else peers:
                    peer.write(recording)
                written = True
                floors = {"": store} | {f"_{name}": path for name, path in others.items()}
                readers: list[Reader] = [
                    StoreClips(store, samples), *(StoreClips(path, samples, f"store_{name}") for name, path in others.items()),
                    ZarrClips(portable, samples), *peers, RawFiles(samples),
                    *(Decompression(path, samples, of=of) for of, path in floors.items()),
                    Decompression(portable, samples, zstd=True),
                    *(Reading(path, samples, f"floor_read{of}") for of, path in floors.items()), Copying(samples),
                ]  # fmt: skip
                described |= {
                    "megabytes": _sizes(readers, settings.clip_frames, recording),
                    "chunk_frames": RowReader(store / "frames" / recordings.CAMERA).chunk_rows,
                }
                compared = {"data": described, "stride": stride, "difference": _differences(readers, samples)}
                for found in _timed(readers, settings.clips, params, "store"):
                    results.append(compared | found)
            shutil.rmtree(place)
    return {"clip_frames": settings.clip_frames, "results": results}


def _sizes(readers: list[Reader], frames: int, recording: Recording) -> dict[str, float]:
    """Bytes on disk; of files per sample, those of samples that do not overlap (one at each step is `frames` times as much)."""
    sizes = {reader.name: size_of(reader.path) / 1e6 for reader in readers if hasattr(reader, "path")}
    one = next(reader for reader in readers if isinstance(reader, RawFiles)).files(0)
    sizes["npy_per_sample"] = sum(size_of(file) for file in one) * (sum(recording.steps) / frames) / 1e6
    return {name: round(size, 3) for name, size in sizes.items() if not name.startswith(("floor", "zarr_on"))}


def _differences(readers: list[Reader], samples: Samples) -> dict[str, float]:
    """Mean absolute difference from the recorded frames, in grey levels, of the first samples; 0 is exact."""
    truth = RawFiles(samples).open()
    found = {}
    for reader in readers:
        if not reader.name.startswith("floor"):
            read = reader.open()
            pairs = [(read(i)[0], truth(i)[0]) for i in range(min(4, len(samples.rows())))]
            found[reader.name] = round(float(np.mean([np.abs(a.astype(np.int16) - b).mean() for a, b in pairs])), 4)
    return found


def _timed(readers: list[Reader], samples: int, params: Params, ours: str) -> Iterator[dict[str, Any]]:
    """One and two workers, warm and cold."""
    for workers in params.benchmark.workers:
        for cold in (False, True):
            seconds = measure(readers, samples, params.benchmark.repeats, workers, cold)
            found = summary(seconds, ours)
            cache = "cold" if cold else "warm"
            console.print(f"{workers} workers, {cache}: times as long {found['times_as_long']}", highlight=False)
            yield {"workers": workers, "cache": cache} | found


def _apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _read_clips(path: Path, rows: NDArray[np.int64]) -> tuple[int, int]:
    """Peak memory before and after reading clips."""
    before = peak_bytes()
    store = EpisodeStore.open(path)
    for clip in rows:
        store.frames(clip)
        store.vector("actions", clip)
    return before, peak_bytes()


def _convert(recording: Recording, path: Path, params: Params) -> tuple[int, int]:
    """Peak memory before and after a conversion."""
    before = peak_bytes()
    _store(recording, path, params)
    return before, peak_bytes()


def memory(inputs: Inputs, params: Params) -> dict[str, Any]:
    """Peak resident memory of converting a recording and of one ten times as long, and of reading as many clips of both."""
    settings, results = params.benchmark, []
    with fresh_folder(inputs.scratch / "memory") as folder:
        for recording, described in _recordings(inputs, params, folder, settings.image_sizes[:1]):
            found: dict[str, list[tuple[int, int]]] = {"convert": [], "read": []}
            for times in (1, 10):
                long = Recording(recording.folder, recording.steps, times)
                rows = recordings.draw_clips(long, 8 * settings.clips, settings.clip_frames, settings.strides[0])
                found["convert"].append(_apart(_convert, long, folder / f"store_{times}", params))
                found["read"].append(_apart(_read_clips, folder / f"store_{times}", rows))
                shutil.rmtree(folder / f"store_{times}")
            for what, ((_, once), (_, ten)) in found.items():
                megabytes = [round(value / 2**20, 1) for value in (once, ten)]
                results.append({"data": described, "what": what, "mebibytes": megabytes, "ratio": round(ten / once, 3)})
    return {"times_as_long": 10, "results": results}


def conversion(inputs: Inputs, params: Params) -> dict[str, Any]:
    """Frames per second of the conversion with two workers and with one, in turn, of the recording over and over again, so that
    starting the workers does not count.
    """
    settings, results = params.benchmark, []
    with fresh_folder(inputs.scratch / "conversion") as folder:
        for recording, described in _recordings(inputs, params, folder, settings.image_sizes[:1]):
            times = -(-settings.conversion_frames // sum(recording.steps))
            long, rates = Recording(recording.folder, recording.steps, times), dict[int, list[float]]({1: [], 2: []})
            for _ in range(settings.repeats):
                for workers, found in rates.items():
                    start = time.perf_counter()
                    _store(long, folder / "store", params, workers)
                    found.append(int(long.ends[-1]) / (time.perf_counter() - start))
                    shutil.rmtree(folder / "store")
            ratio = np.asarray(rates[2]) / np.asarray(rates[1])
            per_second = {str(workers): round(float(np.median(found)), 1) for workers, found in rates.items()}
            results.append(
                {"data": described, "times": times, "frames_per_second": per_second, "ratio": round(float(np.median(ratio)), 3)}
            )
    return {"results": results}
