"""Latents made once: what training reads is what `act` sees; kills; foreign ones; memory that does not grow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from svam.episodes.joined import open_store
from svam.episodes.store import EpisodeStore
from svam.episodes.windows import clip_rows
from svam.files import FileError, sha256_tree
from svam.models.autoencoder import Autoencoder
from svam.resume import Resume
from svam.training.batch_order import EndlessOrder
from svam.training.encode import encode_frames
from svam.training.latents import LatentClips, open_latents
from tests.killing import kill

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The latents of `parts`."""
    out = tmp_path_factory.mktemp("encoded") / "latents"
    encode(parts, out, Resume(None))
    return out


def encode(parts: Path, out: Path, resume: Resume) -> None:
    """What the stage does, in five batches."""
    store, autoencoder = open_store(parts / "episodes.zarr"), Autoencoder.load(parts / "backbones/autoencoder")
    with resume.directory(out) as folder:
        encode_frames(folder, store, autoencoder, sha256_tree(parts / "backbones/autoencoder"), 16, CPU, resume)


def opened(parts: Path, latents: Path) -> tuple[EpisodeStore, Autoencoder, NDArray[np.float16]]:
    store, autoencoder = open_store(parts / "episodes.zarr"), Autoencoder.load(parts / "backbones/autoencoder")
    return store, autoencoder, open_latents(latents, store, autoencoder, parts / "backbones/autoencoder")


def test_training_reads_the_bits_that_act_computes(parts: Path, made: Path) -> None:
    store, autoencoder, latents = opened(parts, made)
    frames = torch.from_numpy(store.frames(np.arange(len(store))))
    stored = torch.from_numpy(latents.copy())
    for together in (1, 3, 16):  # of one frame, as of a robot's, torch would choose another kernel
        seen = torch.cat([autoencoder.encode(part) for part in frames.split(together)])
        assert torch.equal(autoencoder.condition_of(seen), autoencoder.condition_of(stored.float()))


def test_decoding_in_parts_is_decoding(parts: Path) -> None:
    autoencoder = Autoencoder.load(parts / "backbones/autoencoder")
    latents = torch.randn(12, 4, 4, 4)
    whole, sizes = autoencoder.decode(latents, 3), []
    decode = autoencoder.decode_pixels
    autoencoder.batch = 7  # two clips of three frames

    def counting(part: torch.Tensor, frames: int) -> torch.Tensor:
        sizes.append(len(part))
        return decode(part, frames)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoencoder, "decode_pixels", counting)
        torch.testing.assert_close(autoencoder.decode(latents, 3), whole)
    assert sizes == [6, 6]


def test_a_killed_run_goes_on_to_the_same_bytes(parts: Path, made: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    kill(3, encode, parts, tmp_path / "latents", Resume(state, 0))
    assert not (tmp_path / "latents").exists()
    with pytest.MonkeyPatch.context() as patch:
        seen: list[int] = []
        frames = EpisodeStore.frames
        patch.setattr(EpisodeStore, "frames", lambda self, rows: seen.extend(rows.tolist()) or frames(self, rows))
        encode(parts, tmp_path / "latents", Resume(state, 0))
    assert seen[0] == 48, "three batches of sixteen were there"
    assert sha256_tree(tmp_path / "latents") == sha256_tree(made)


def test_latents_of_other_data_are_refused(parts: Path, tmp_path: Path) -> None:
    camera = open_store(parts / "episodes.zarr").cameras[0]

    def refused(sentence: str, rows: int = 72, **attributes: Any) -> None:
        (tmp_path / "attributes.json").write_text(json.dumps(attributes))
        np.save(tmp_path / f"{camera}.npy", np.zeros((rows, 4, 4, 4), np.float16))
        with pytest.raises(FileError, match=sentence):
            opened(parts, tmp_path)

    with pytest.raises(FileError, match=r"nowhere: no attributes.json in it; run the stage encode"):
        opened(parts, tmp_path / "nowhere")
    refused(r"made by another autoencoder than .*; run the stage encode again", autoencoder_sha256="0")
    refused(r"float16 \(71, 4, 4, 4\), but .* has latents float16 \(72, 4, 4, 4\); run the stage encode again", rows=71)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_clips_are_rows_of_their_side(parts: Path, made: Path, split: Any) -> None:
    store, _, latents = opened(parts, made)
    clips, rows = LatentClips(store, split, latents, 3, 2), store.rows(split)
    assert len(clips) == len(rows)
    places = np.arange(len(clips))
    assert np.array_equal(clips.episode_of(places), store.episode_of(rows))
    expected = [clip_rows(int(row), *store.bounds(int(store.episode_of(np.array([row]))[0])), 3, 2) for row in rows]
    assert np.array_equal(clips.clip_rows(places), expected)
    assert np.array_equal(clips.clips(places[3:5]).numpy(), latents[np.stack(expected[3:5])])


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """A hundred hours at 30 Hz in latents of SVD's size, 88 GB (a file with holes): what drawing clips allocates."""
    import tracemalloc

    rows, hours = 108_000, 100
    file = tmp_path / "camera.npy"
    np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=(rows * hours, 4, 32, 32))
    store = EpisodeStore.__new__(EpisodeStore)
    store.episode_ends = np.arange(1, hours + 1) * rows
    store.episode_split = np.zeros(hours, dtype=np.uint8)
    store.foreseen = ["camera"]
    tracemalloc.start()
    clips = LatentClips(store, "train", np.load(file, mmap_mode="r"), 16, 2)
    order = EndlessOrder(len(clips), 4, "order")
    for number in range(20):
        assert clips.clips(order.batch(number)).shape == (4, 16, 4, 32, 32)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(clips) == rows * hours and peak < 4 << 20
