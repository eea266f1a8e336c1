"""Our renderer beside gymnasium's: the same scene from the same place, and figures that agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmark.common import check_ratio, measured, refused


def test_every_renderer_draws_the_same_episodes(tmp_path: Path) -> None:
    benchmark = {"rendered_task": "window-close", "rendered_sizes": [32], "rendered_frames": 2, "repeats": 1}
    found = measured("rendering", tmp_path, {"benchmark": benchmark})
    (result,) = found["results"]
    assert result["image_size"] == 32 and found["camera"] == "corner2" and found["task"] == "window-close"
    assert result["difference_in_state"] == {"fast": 0.0, "full": 0.0}
    assert result["difference_in_grey_levels"]["full"] < 1.0  # the same look, but for how edges are smoothed
    assert 0.0 < result["difference_in_grey_levels"]["fast"] < 30.0  # no shadows
    for style in ("fast", "full"):
        check_ratio(result["ratios"][style], result["seconds"], "gymnasium", style)
    rates = {style: 2 / seconds[0] for style, seconds in result["seconds"].items()}
    assert result["frames_per_second"] == pytest.approx(rates, rel=0.01)


def test_an_unknown_task_is_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = refused("rendering", tmp_path, {"benchmark": {"rendered_task": "window-clothes"}}, capfd)
    assert said.startswith("unknown MetaWorld task 'window-clothes': did you mean window-close")
