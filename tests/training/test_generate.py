"""Windows and their generations: F and V^ share the noise, the two sides of the split stay apart, the bytes repeat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from svam.episodes.store import EpisodeStore
from svam.files import sha256_tree
from svam.models.foresight import ForesightModel, FrozenParts
from svam.models.text import TextEncoder
from svam.models.video import SamplerConfig
from svam.params import FinetuneVideo
from svam.resume import Resume
from svam.training import finetune_video
from svam.training.distill_data import GeneratedWindows
from svam.training.finetune_video import TextTable, _psnr, evaluate_video
from svam.training.generate import choose_windows, generate_windows
from svam.training.latents import LatentClips
from tests.tiny import GENERATE
from tests.tiny_foresight import GRID, OPTIMISER, encoded
from tests.toy import committed

SECTION = GENERATE.model_copy(update={"windows": 5, "held_out_windows": 3, "up_blocks": 2})


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> ForesightModel:
    sampler = SamplerConfig(up_blocks=2, grid=GRID, steps=2, guidance=1.0, bf16=False)
    return ForesightModel.load_parts(FrozenParts(), sampler, folders)


def test_windows_keep_to_their_side_of_the_split(store: EpisodeStore, model: ForesightModel) -> None:
    windows = choose_windows(store, SECTION, model.video_model.config, seed=0)
    assert windows.held_out.tolist() == [False] * 5 + [True] * 3
    held = set(store.rows("held_out").tolist())
    for rows, held_out, sentence in zip(windows.rows, windows.held_out, windows.instructions, strict=True):
        assert {int(r) in held for r in rows} == {bool(held_out)}
        episode = set(store.episode_of(rows).tolist())
        assert len(episode) == 1
        assert sentence in store.instructions[store.task_of(episode.pop())]["train"]
    assert len(set(windows.rows[:5, 0].tolist())) == 5


def test_too_many_windows_are_all_there_are(store: EpisodeStore, model: ForesightModel) -> None:
    section = SECTION.model_copy(update={"windows": 10**6})
    windows = choose_windows(store, section, model.video_model.config, seed=0)
    assert (~windows.held_out).sum() == len(store.rows("train"))


def test_what_is_cached_is_what_the_policy_will_see(
    store: EpisodeStore, model: ForesightModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the bytes of a run that was never interrupted are those of one that kept its state, and those announced."""
    windows = choose_windows(store, SECTION, model.video_model.config, seed=0)
    latents = encoded(store, model.frame_autoencoder)
    (tmp_path / "state").mkdir()
    for name, resume in (("a", Resume(None)), ("b", Resume(tmp_path / "state", 0))):
        with resume.directory(tmp_path / name) as folder:
            generate_windows(folder, latents, model, windows, SECTION, 0, "abc", resume)
    assert sha256_tree(tmp_path / "a") == sha256_tree(tmp_path / "b")
    made = GeneratedWindows(tmp_path / "a")
    frames = torch.from_numpy(store.frames(windows.rows[:4, 0]))
    seen = model.encode(frames, windows.instructions[:4], ["one_step"], range(4)).entries["one_step"]
    assert made.features is not None
    np.testing.assert_allclose(made.features[:4], seen.numpy(), rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(made.reconstruction[:4], model.reconstruct(frames).numpy(), atol=1)
    assert np.array_equal(made.latents, latents[windows.rows[:, 0]])
    names = ("frames", "one_step_frames", "other_noise_frames", "reconstruction", "rows")
    assert {n: made.array(n).shape for n in names} == {
        "frames": (8, 3, 16, 16, 3), "one_step_frames": (3, 3, 16, 16, 3), "other_noise_frames": (3, 3, 16, 16, 3),
        "reconstruction": (8, 16, 16, 3), "rows": (8, 3),
    }  # fmt: skip
    assert (made.other_noise_frames != made.frames[5:]).any()
    assert made.attributes["sampler"]["steps"] == 2
    written = sum(made.array(n).nbytes for n in (*names[:4], "latents", "features"))
    assert f"generate: writes {written / 1e9:.3f} GB" in capsys.readouterr().err


def test_an_absent_part_is_named(model: ForesightModel) -> None:
    with pytest.raises(ValueError, match="without its geometric teacher"):
        model.encode(torch.zeros(1, 16, 16, 3, dtype=torch.uint8), ["push it"], ["observation"], [0])


def test_held_out_video_metrics_exclude_the_observed_frame(store: EpisodeStore, model: ForesightModel) -> None:
    changes = {"training": OPTIMISER.model_dump(), "evaluation_clips": 4, "evaluation_steps": 2, "frames": 3}
    section = FinetuneVideo.model_validate(committed("finetune_video") | changes)
    autoencoder, video, cpu = model.frame_autoencoder, model.video_model, torch.device("cpu")
    table = TextTable.build(store, model.text)
    clips = LatentClips(store, "held_out", encoded(store, autoencoder), 3, video.config.stride)
    metrics, pictures = evaluate_video(video, section, clips, autoencoder, table, 0, cpu)
    assert pictures.shape == (4, 2, 3, 16, 16, 3)
    truth = pictures[:, 0].astype(np.float64) / 255
    # "repeat the first frame" is recomputed by hand from the decoded truth, frames 1..T-1 only
    expected = ((truth[:, 1:] - truth[:, :1]) ** 2).mean()
    assert metrics["repeated_mse"] == pytest.approx(expected, rel=0.02)
    assert metrics["error_share_of_repeat"] == pytest.approx(metrics["generated_mse"] / metrics["repeated_mse"])
    assert {"loss_sigma_first", "loss_sigma_0.2_1", "generated_psnr", "generated_ssim"} <= set(metrics)


def test_many_sentences_are_embedded_in_parts(store: EpisodeStore, model: ForesightModel) -> None:
    """As many sentences as a data set with one for each episode has: memory is bounded by the part."""
    sizes: list[int] = []

    class Watched(TextEncoder):
        def embed(self, instructions: list[str]) -> torch.Tensor:
            sizes.append(len(instructions))
            return super().embed(instructions)

    text = Watched(model.text.model, model.text.tokenizer, model.text.tokens)
    whole = TextTable.build(store, text).tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_video, "EMBEDDED_TOGETHER", 2)
        parts_of_two = TextTable.build(store, text).tokens
    assert sizes[0] == len(whole) and max(sizes[1:]) == 2
    torch.testing.assert_close(parts_of_two, whole)


def test_equal_pictures_have_a_finite_psnr() -> None:
    truth = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    near = truth + torch.tensor([0.1, 0.01])[:, None, None, None]
    assert float(_psnr(near, truth)) == pytest.approx((20.0 + 40.0) / 2, abs=1e-3)
    near[1] = truth[1]
    assert float(_psnr(near, truth)) == pytest.approx((20.0 + 100.0) / 2, abs=1e-3)
