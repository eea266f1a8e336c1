"""What the benchmark reads: frames of an episode store, or of video files, as a source that `convert` understands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.contract import ContractError, Episode, EpisodeShape, SourceDescription
from svam.episodes.store import EpisodeStore
from svam.files import FileError
from svam.seeds import generator

RATE_HZ, CAMERA, TASK = 10.0, "front", "benchmark"
SYNTHETIC_ACTIONS = 7


def _smaller(frames: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(k, H, W, 3) to (k, size, size, 3): the centre square, averaged down; never enlarged."""
    from PIL import Image

    height, width = frames.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    frames = frames[:, top : top + side, left : left + side]
    if side <= size:
        return np.ascontiguousarray(frames)
    resized = [Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR) for image in np.ascontiguousarray(frames)]
    return np.stack([np.asarray(image) for image in resized])


@dataclass(frozen=True)
class Recording:
    """Episodes in a folder, as raw arrays: a source whose reading costs next to nothing. `times` > 1 repeats them all."""

    folder: Path
    steps: tuple[int, ...]
    times: int = 1
    notes: Sequence[str] = ()

    def describe(self) -> SourceDescription:
        """One camera, one task."""
        instructions = {TASK: {"train": ["measure"], "held_out": []}}
        return SourceDescription(rate_hz=RATE_HZ, cameras=[CAMERA], instructions=instructions, provenance={})

    def __len__(self) -> int:
        return len(self.steps) * self.times

    def shape(self, index: int) -> EpisodeShape:
        """Lengths of one episode."""
        return EpisodeShape(steps=self.steps[index % len(self.steps)])

    def read(self, index: int) -> Episode:
        """One episode, mapped from the disk."""
        frames, actions = self.arrays(index % len(self.steps))
        return Episode(TASK, "measure", RATE_HZ, {CAMERA: frames}, actions, provenance={"file": f"episode {index}"})

    def arrays(self, episode: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """(n, H, W, 3) uint8 frames and (n, A) float32 actions, mapped from the disk."""
        frames: NDArray[np.uint8] = np.load(self.folder / f"frames_{episode}.npy", mmap_mode="r")
        return frames, np.load(self.folder / f"actions_{episode}.npy")

    @property
    def ends(self) -> NDArray[np.int64]:
        """Row after each episode's last, on one flat axis."""
        return np.cumsum(np.tile(self.steps, self.times)).astype(np.int64)

    def whole(self) -> NDArray[np.uint8]:
        """All frames (N, H, W, 3), in memory."""
        return np.concatenate([self.arrays(episode)[0] for episode in range(len(self.steps))])

    def whole_actions(self) -> NDArray[np.float32]:
        """All actions (N, A)."""
        return np.concatenate([self.arrays(episode)[1] for episode in range(len(self.steps))])


def _keep(folder: Path, episodes: list[int], frames: NDArray[np.uint8], actions: NDArray[np.float32]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"frames_{len(episodes)}.npy", frames)
    np.save(folder / f"actions_{len(episodes)}.npy", actions.astype(np.float32))
    episodes.append(len(frames))


def from_store(path: Path, folder: Path, frames: int, size: int) -> tuple[Recording, dict[str, Any]]:
    """About `frames` frames of the foresight camera of the store at `path`, whole episodes; and what they are, as JSON.

    Raises:
        FileError: there is no store, or it is damaged.
    """
    store = EpisodeStore.open(path)
    kept: list[int] = []
    for episode in range(len(store.episode_ends)):
        if sum(kept) >= frames:
            break
        rows = np.arange(*store.bounds(episode), dtype=np.int64)
        actions = store.vector("actions", rows) if store.has("actions") else _walk(episode, len(rows))
        _keep(folder, kept, _smaller(store.frames(rows), size), actions)
    name = f"{store.provenance.get('format', 'recorded')} episodes, camera {store.cameras[0]}"
    return Recording(folder, tuple(kept)), _described(folder, kept, name, "recorded" if store.has("actions") else "synthetic")


def from_videos(path: Path, folder: Path, frames: int, size: int) -> tuple[Recording, dict[str, Any]]:
    """The same of all mp4 files below `path`, in the order of their names; their actions are a made-up random walk.

    Raises:
        FileError: there is no video, or one cannot be decoded.
    """
    import av

    files = sorted(Path(path).rglob("*.mp4"))
    if not files:
        raise FileError(f"{path}: no mp4 file below it")
    kept: list[int] = []
    codec = ""
    for file in files:
        if sum(kept) >= frames:
            break
        try:
            with av.open(str(file)) as container:
                codec = container.streams.video[0].codec_context.name
                images = [_smaller(_rgb(f)[None], size)[0] for f in container.decode(video=0)]
        except (av.FFmpegError, IndexError) as error:
            raise FileError(f"{file}: cannot be decoded as video ({error})") from None
        if images:
            _keep(folder, kept, np.stack(images), _walk(len(kept), len(images)))
    if not kept:
        raise FileError(f"{path}: its videos hold no frame")
    return Recording(folder, tuple(kept)), _described(folder, kept, f"{path.name}, decoded from {codec}", "synthetic")


def _rgb(frame: Any) -> NDArray[np.uint8]:
    return np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)


def _walk(episode: int, steps: int) -> NDArray[np.float32]:
    values = generator("benchmark actions", episode).normal(size=(steps, SYNTHETIC_ACTIONS))
    return (0.1 * values.cumsum(axis=0)).astype(np.float32)


def _described(folder: Path, kept: list[int], name: str, actions: str) -> dict[str, Any]:
    first = np.load(folder / "frames_0.npy", mmap_mode="r")
    return {
        "name": name, "image_size": list(first.shape[1:3]), "frames": sum(kept), "episodes": len(kept), "actions": actions,
        "raw_megabytes": round(sum(kept) * first[0].nbytes / 1e6, 2),
    }  # fmt: skip


def draw_clips(recording: Recording, clips: int, frames: int, stride: int) -> NDArray[np.int64]:
    """(clips, frames) rows of random clips, each within an episode, none past its end.

    Raises:
        ContractError: no episode is that long.
    """
    ends = recording.ends
    starts = ends - np.tile(recording.steps, recording.times)
    room = np.maximum(ends - starts - (frames - 1) * stride, 0)
    if not room.sum():
        raise ContractError(
            f"benchmark.clip_frames is {frames} at a stride of {stride}: the longest episode has {max(recording.steps)} steps"
        )
    chosen = generator("benchmark clips", frames, stride, clips).integers(0, room.sum(), clips)
    episode = np.searchsorted(np.cumsum(room), chosen, side="right")
    first = starts[episode] + chosen - (np.cumsum(room) - room)[episode]
    return np.asarray(first[:, None] + np.arange(frames) * stride, dtype=np.int64)


def write_samples(recording: Recording, rows: NDArray[np.int64], chunk: int, folder: Path) -> None:
    """Each clip as raw arrays of its own, `clip_<i>.npy` and `actions_<i>.npy` (its action chunk); and `rows.json`."""
    folder.mkdir(parents=True)
    frames, actions, ends = recording.whole(), recording.whole_actions(), recording.ends
    taken = action_chunks(rows, ends, chunk)
    for i in range(len(rows)):
        np.save(folder / f"clip_{i}.npy", frames[rows[i]])
        np.save(folder / f"actions_{i}.npy", actions[taken[i]])
    (folder / "rows.json").write_text(json.dumps(rows.tolist()))


def action_chunks(rows: NDArray[np.int64], ends: NDArray[np.int64], chunk: int) -> NDArray[np.int64]:
    """(clips, chunk) rows of the actions from each clip's first frame on; the episode's last is repeated."""
    last = ends[np.searchsorted(ends, rows[:, 0], side="right")] - 1
    return np.asarray(np.minimum(rows[:, :1] + np.arange(chunk), last[:, None]), dtype=np.int64)
