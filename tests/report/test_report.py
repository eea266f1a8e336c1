"""The report on hand-made metrics: what is flat, what the tables say, PNGs with the same bytes, absent parts, broken files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from stages.report import app
from svam.evaluation.scores import rate_of, summary
from svam.files import FileError, read_json, sha256_tree, write_json
from svam.npy import write_arrays
from svam.report import tables, teachers
from svam.report.figures import clips_figure
from svam.report.films import draw_films, enlarge, rollout_film, side_by_side
from svam.report.grid import pca_colours
from svam.report.published import beside_published
from tests.toy import committed, write_toy_params

TASKS = ("reach", "push", "shelf-place")
SENTENCE = 'reach <script>document.title = "taken"</script> & "the red point"'
DISTILLED = {
    "decoupler": 0.6, "repeat_reference": 0.1, "linear_probe": 0.4, "decoded_one_step": 0.5, "other_noise": 0.9,
}  # fmt: skip

SETTING = {
    "episodes_per_task": 4, "max_steps": 500, "scenes": "stock", "cameras": ["corner2"], "image_size": 64, "render": "fast",
    "mujoco": "3.3.2", "gl": "egl",
    "demonstrations": {"episodes": {"reach": 300, "push": 40}, "recorded": [{"source": "scripted expert"}]},
}  # fmt: skip


LIBERO = {
    "rows": {
        name: {"suites": {"libero_goal": rate_of(group)}, "tasks": {"stove": rate_of(group)}, "mean_of_suites": mean}
        for name, group, mean in (("policy", [True, True, False, False], 0.5), ("random", [False] * 4, 0.0))
    },
    "episodes_per_task": 4, "max_steps": {"libero_goal": 300}, "settling_steps": 10, "cameras": ["agentview"], "drawn": 128,
    "render": "full", "mujoco": "3.3.0",
}  # fmt: skip
CHAINS = {"rates": [rate_of([True] * 3 + [False]), rate_of([True] + [False] * 3)], "average_length": 1.0, "subtasks": {}}
CALVIN = {
    "rows": {"expert": CHAINS, "policy": CHAINS}, "chains": 4, "subtasks": 2, "tasks": ["open_drawer"], "official": False,
    "cameras": ["static"], "renderer": "egl", "commit": "797142c588c2", "max_steps": 360, "rate_hz": 30.0,
}  # fmt: skip


def row(*rates: float, episodes: int = 4) -> dict[str, Any]:
    return summary({task: [i < rate * episodes for i in range(episodes)] for task, rate in zip(TASKS, rates, strict=True)})


def write_run(root: Path) -> Path:
    """Every file that the report reads, as the stages leave them."""
    rng = np.random.default_rng(0)
    errors = {"mae": 0.2, "mae_per_dimension": [0.1, 0.3], "mae_per_step": [0.1, 0.2, 0.3]}
    offline = dict.fromkeys(("policy", "mean_action", "hold_last", "mean_of_samples", "best_sample"), errors)
    rows = {
        "policy": row(1.0, 0.5, 0.0), "held_out_instruction": row(0.5, 0.5, 0.0, episodes=2), "random": row(0, 0, 0),
        "expert": row(1, 1, 0.75), "same_goals": row(1.0, 0.5, 0.0, episodes=2),
    }  # fmt: skip
    write_json(root / "results/metrics.json", {
        "protocols": ["metaworld", "offline", "libero"], "libero": LIBERO,
        "metaworld": {"rows": rows, "rate_hz": 80.0, "max_steps": 500, "execute": 8, "setting": SETTING},
        "offline": offline | {"windows": 8, "samples": 2, "notice": "this is not success"},
    })  # fmt: skip
    write_arrays(root / "results/foresight", {
        "frames": rng.integers(0, 256, (3, 4, 16, 16, 3), dtype=np.uint8),
        "foresight_geometric": rng.normal(size=(3, 4, 2, 2, 6)).astype(np.float16),
        "truth_geometric": rng.normal(size=(3, 4, 2, 2, 6)).astype(np.float16),
        "foresight_goal_frame": rng.normal(size=(3, 1, 2, 2, 6)).astype(np.float16),
    })  # fmt: skip
    write_arrays(root / "results/rollouts/reach_0", {
        "frames": rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8), "calls": np.array([0, 3, 6]),
        "foresight_one_step": rng.normal(size=(3, 4, 2, 2, 6)).astype(np.float16),
    })  # fmt: skip
    line = {
        "row": "policy", "task": "reach", "index": 0, "instruction": SENTENCE, "success": True, "steps": 7, "policy_calls": 3,
    }  # fmt: skip
    lines = [line, line | {"row": "expert", "success": False}, line | {"task": "push", "steps": 12, "policy_calls": 4}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / "results/episodes.jsonl").write_text(text, encoding="utf-8")
    weights = {"bytes": 2_500_000, "sha256": "ab" * 32}
    parts = ("autoencoder", "decoupler_geometric", "policy", "teacher_semantic", "text", "video")
    listed = {part: {f"{part}/model.safetensors": weights, f"{part}/config.json": weights} for part in parts}
    write_json(root / "svam/manifest.json", {"parts": listed})
    video = {f"{kind}_{key}": 0.25 for kind in ("generated", "one_step", "repeated") for key in ("mse", "psnr", "ssim")}
    write_json(root / "video/metrics.json", video | {"error_share_of_repeat": 0.123456})
    write_arrays(root / "video/samples", {"clips": rng.integers(0, 256, (3, 2, 4, 16, 16, 3), dtype=np.uint8)})
    for branch, key in (("geometric", "rmse_std"), ("semantic", "mean")):
        dense = {view: {key: 0.7} for view in ("real", "generated", "one_step")}
        scores = {
            name: {"mse": 1 - v, "mse_moved": 1 - v, "cosine_moved": v, "explained": v, "explained_moved": v / 2}
            for name, v in DISTILLED.items()
        }
        metrics = scores | {"moved_share": 0.1, "teacher": {"dense": dense}}
        write_json(root / f"decouplers/{branch}/metrics.json", metrics)
        write_json(root / f"backbones/{branch}/metrics.json", {v: {key: 0.5} for v in ("real", "reconstructed", "blurred")})
    for name in ("autoencoder", "text"):
        write_json(root / f"backbones/{name}/metrics.json", {"psnr": 30.0})
    for part in ("finetune_video", "distill_geometric", "train_policy"):
        curve = root / "live" / part / "plots/metrics/train/loss.tsv"
        curve.parent.mkdir(parents=True)
        curve.write_text("step\tloss\n" + "".join(f"{i}\t{1 / (i + 1)}\n" for i in range(100)), encoding="utf-8")
    return root


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def invoke(run: Path, out: Path, **distill: Any) -> Any:
    report = {"note": "A look, not a result.", "clips": 2, "dpi": 50}
    changes = {"distill": distill, "train_policy": {"context": ["one_step"]}, "report": report}
    write_toy_params(run / "params.yaml", changes)
    options = [f"--{name}={run / name}" for name in ("results", "video", "decouplers", "backbones", "live")]
    options += [f"--{name}={out.parent / name}" for name in ("films", "foresight", "compare")]
    options += [f"--manifest={run / 'svam/manifest.json'}", f"--params={run / 'params.yaml'}"]
    return CliRunner().invoke(app, [str(out), *options])


def gathered(run: Path, *branches: str) -> tables.RunMetrics:
    return tables.gather(run / "results", run / "video", run / "decouplers", run / "backbones", branches)


def test_both_averages_are_named_where_all_groups_were_evaluated(run: Path) -> None:
    """Of one easy task, two hard ones and so on: the mean over tasks and the mean over groups differ. No rows but its own stand
    beside a scripted policy."""
    read = gathered(run, "geometric")
    assert "four groups" not in tables.markdown(read) and "success_mean_of_groups" not in tables.flat_metrics(read)
    successes = {"reach": [True], "sweep": [True], "push": [False], "push-back": [False], "shelf-place": [False]}
    results = {**read.results, "policy": "remote"}
    results["metaworld"] = {**results["metaworld"], "rows": {"policy": summary(successes)}}
    for policy, name in (("policy", "remote policy"), ("expert", "scripted expert")):
        results["metaworld"]["rows"] = {policy: summary(successes)}
        other = replace(read, results=results)
        flat = tables.flat_metrics(other)
        assert (flat["success"], flat["success_mean_of_groups"]) == (0.4, 0.5)
        assert f"as LeRobot averages: {name} 50.0%." in tables.markdown(other)
        row = beside_published(other).split("\n| ")[1:][-9]
        assert row.startswith(f"{name}, this run |") and row.endswith("| 50% |")
    assert (
        "4 episodes a task of at most 500 steps, stock scenes; pictures of corner2, 64 pixels wide, in the style fast, drawn "
        "by MuJoCo 3.3.2 with egl; trained on 40 to 300 demonstrations a task (scripted expert)."
    ) in tables.markdown(read)
    setting = read.results["metaworld"]["setting"]
    assert "; pictures of corner2 in the look D, 64 pixels wide" in tables.setting_text(setting | {"look": "D"})


def test_the_stage_writes_everything_and_the_same_bytes_again(run: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        result = invoke(run, tmp_path / name / "report")
        assert result.exit_code == 0, result.output
    out = tmp_path / "one/report"
    assert sha256_tree(tmp_path / "one") == sha256_tree(tmp_path / "two")
    assert [film.name for film in (tmp_path / "one/films").iterdir()] == ["reach_0.mp4"]
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    figures = {"success", "distillation", "teachers", "curves", "clips", "actions", "foresight_0", "foresight_1"}
    plots = {"success", "distillation", "teachers", "actions", "curves"}
    assert "\n\nA look, not a result.\n\n" in (out / "results.md").read_text(encoding="utf-8")
    pictures = {f"{n}.png" for n in figures} | {"posters/reach_0.png"}
    assert names == {"index.html", "metrics.json", "results.md"} | pictures | {f"plots/{n}.json" for n in plots}
    for name in figures:
        picture = Image.open(out / f"{name}.png")
        assert "Software" not in picture.info and np.asarray(picture).std() > 5
    assert read_json(out / "metrics.json") == {
        "success": 0.5, "success_low": pytest.approx(0.2538), "success_high": pytest.approx(0.7462), "success_reach": 1.0,
        "success_unseen_sentence": pytest.approx(0.3333), "video_error_share": 0.1235, "geometric_cosine": 0.6,
        "geometric_explained": 0.6, "semantic_cosine": 0.6, "semantic_explained": 0.6, "action_error": 0.2,
        "libero_success": 0.5,
    }  # fmt: skip
    lines = read_json(out / "plots/success.json")
    assert [line["success"] for line in lines if line["what"] == "push, S-VAM"] == [0.5]
    curves = read_json(out / "plots/curves.json")
    # Two of a hundred steps a point: (1 + 1/2) / 2, and 1/99 and 1/100 at the end.
    assert curves[0]["train_policy"] == 0.75 and curves[-1]["percent"] == 100.0
    assert curves[-1]["train_policy"] == pytest.approx((1 / 99 + 1 / 100) / 2, abs=1e-6)
    assert curves[-1]["distill_semantic"] is None


def test_markdown_says_what_was_measured(run: Path) -> None:
    page = tables.markdown(gathered(run, "geometric", "semantic"))
    assert "| push | 50% (15% to 85%) |" in page and "| very hard | 0%" in page
    assert "| geometric: linear probe on F | 0.400 | 0.400 | 0.200 | 0.600 |" in page
    assert "| libero goal | 50% (15% to 85%) | 0% (0% to 49%) |" in page and "of settling: goal 300." in page
    assert "12.3% of the error" in page and "this is not success" in page
    assert "semantic: generated frames | mean IoU | 0.700" in page


@pytest.mark.parametrize(("depth", "through", "gripper", "object_", "verdict", "within"), [
    (0.15, 0.164, 0.60, 0.60, "accepted: geometric and semantic.", 3),
    (0.151, 0.15, 0.60, 0.60, "accepted: semantic; not accepted: geometric.", 2),
    (0.15, 0.166, 0.60, 0.60, "accepted: semantic; not accepted: geometric.", 2),
    (0.10, 0.10, 0.59, 0.90, "accepted: geometric; not accepted: semantic.", 2),
    (0.40, 0.40, 0.29, 0.35, "not accepted: geometric and semantic.", 0),
])  # fmt: skip
def test_teachers_are_accepted_or_not(
    run: Path, depth: float, through: float, gripper: float, object_: float, verdict: str, within: int
) -> None:
    """By depth error and IoU of gripper and object on held-out frames, and nearly so through the autoencoder."""
    files = {branch: run / f"backbones/{branch}/metrics.json" for branch in ("geometric", "semantic")}

    def page() -> str:
        return tables.markdown(gathered(run))

    assert "As teachers of a comparison" in page()
    seen = {"gripper": gripper, "object": object_, "mean": 0.9}
    nearly = {"gripper": gripper - 0.06, "object": object_ - 0.06, "mean": 0.9}
    write_json(files["geometric"], {"real": {"rmse_std": depth}, "reconstructed": {"rmse_std": through}})
    write_json(files["semantic"], {"real": seen, "reconstructed": nearly})
    said = page()
    assert f"As teachers of a comparison, {verdict} Held-out frames" in said
    assert f"| semantic: IoU of the gripper | at least 0.6 | {gripper:.3f} | {gripper - 0.06:.3f} |" in said
    assert said.count("| yes |") == within
    for file in files.values():  # self-supervised or published teachers have no labels to be judged by
        write_json(file, {"real": {"rmse": 0.1}, "reconstructed": {"rmse": 0.1}})
    assert "As teachers" not in page()


def test_teachers_are_judged_before_anything_that_follows_them(run: Path, tmp_path: Path) -> None:
    write_json(run / "backbones/geometric/metrics.json", {"real": {"rmse_std": 0.1}, "reconstructed": {"rmse_std": 0.2}})
    command = typer.Typer()
    command.command()(teachers.main)
    done = CliRunner().invoke(command, [str(run / "backbones"), "--page", str(tmp_path / "teachers.md")])
    assert done.exit_code == 0 and "not accepted: geometric" in done.output
    assert (
        "| geometric: depth error / deviation | at most 0.15 | 0.100 | 0.200 | no |" in (tmp_path / "teachers.md").read_text()
    )


def test_what_the_teachers_learn_from_stands_under_each_table_of_success(run: Path) -> None:
    def page(**results: Any) -> str:
        read = gathered(run)
        return tables.markdown(replace(read, results={**read.results, **results}))

    said = "S-VAM's teachers learn from the simulator's {}, which the inputs of VPP and Diffusion Policy do not see.\n"
    assert page(calvin=CALVIN).count(said.format("depth and segmentation")) == 3
    assert page().count("teachers learn") == 2 and "teachers learn" not in page(policy="remote")
    write_json(run / "backbones/semantic/metrics.json", {"real": {"rmse": 0.5}})  # self-supervised
    assert page().count(said.format("depth")) == 2
    write_json(run / "backbones/geometric/metrics.json", {})  # imported weights
    assert "teachers learn" not in page()


def test_the_labels_of_params_are_those_of_teachers_that_are_trained_here() -> None:
    params = committed("prepare_backbones")
    assert tables.learnt_labels(params) == ["depth", "segmentation"]
    params["geometric"]["source"] = "pretrained"
    assert tables.learnt_labels(params) == ["segmentation"]
    params["semantic"]["objective"] = "self_supervised"
    assert tables.learnt_labels(params) == [] and tables.labels_sentence([]) == ""


def test_chains_have_a_rate_for_each_length_and_their_sum(run: Path) -> None:
    write_json(run / "results/metrics.json", read_json(run / "results/metrics.json") | {"calvin": CALVIN})
    read = gathered(run)
    page = tables.markdown(read)
    assert "| S-VAM | 75% (30% to 95%) | 25% (5% to 70%) | 1.00 |\n| scripted expert |" in page
    assert "Not the whole official evaluation" in page and "cameras: 1 (static); EGL renderer; calvin_env at 797142c." in page
    assert tables.flat_metrics(read)["calvin_average_length"] == 1.0


def test_what_a_variant_does_not_have_is_absent(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "decouplers/semantic")
    write_json(run / "backbones/semantic/metrics.json", {})  # imported weights
    results = read_json(run / "results/metrics.json")
    del results["metaworld"], results["libero"]
    write_json(run / "results/metrics.json", results)
    shutil.rmtree(run / "results/rollouts")
    (run / "results/episodes.jsonl").unlink()
    result = invoke(run, tmp_path / "out", branches=["geometric"])
    assert result.exit_code == 0, result.output
    flat = read_json(tmp_path / "out/metrics.json")
    assert set(flat) == {"video_error_share", "geometric_cosine", "geometric_explained", "action_error"}
    assert not (tmp_path / "out/success.png").exists()
    # A branch that the params no longer list may have left its folder behind: it is not reported.
    assert set(tables.flat_metrics(gathered(run))) == {"video_error_share", "action_error"}


@pytest.mark.parametrize("broken", [
    "results/metrics.json", "video/samples/clips.npy", "results/foresight/frames.npy", "results/rollouts/reach_0/calls.npy",
    "results/episodes.jsonl", "svam/manifest.json",
])  # fmt: skip
def test_a_broken_file_is_one_sentence_and_leaves_nothing(run: Path, tmp_path: Path, broken: str) -> None:
    (run / broken).write_bytes(b"{")
    result = invoke(run, tmp_path / "out")
    assert result.exit_code == 1 and broken.split("/")[1] in result.output.replace("\n", "")
    assert not (tmp_path / "out").exists()


def film(file: Path) -> tuple[list[Any], float]:
    """Its pictures, and how many it shows a second."""
    with av.open(str(file)) as opened:
        rate = float(opened.streams.video[0].average_rate)
        return [frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)], rate


def test_films_hold_one_picture_for_each_step(run: Path, tmp_path: Path) -> None:
    draw_films(tmp_path, run / "results", {"metaworld": 80.0})
    shown, rate = film(tmp_path / "reach_0.mp4")
    assert len(shown) == 8 and rate == 20.0
    assert shown[0].shape == (192 + 16, 2 * 192, 3)
    (run / "results/rollouts/reach_0/calls.npy").unlink()
    with pytest.raises(FileError, match=r"reach_0: frames\.npy or calls\.npy is missing; run evaluate again"):
        draw_films(tmp_path, run / "results", {"metaworld": 80.0})


def test_films_of_chains_and_of_libero_have_their_robots_rate(run: Path, tmp_path: Path) -> None:
    results = run / "results"
    rng = np.random.default_rng(0)
    for name in ("calvin_7", "stove_2"):
        frames = rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
        write_arrays(results / f"rollouts/{name}", {"frames": frames, "calls": np.array([0, 3])})
    chain = {"row": "policy", "chain": 7, "subtasks": ["open_drawer", "turn_on_led"], "solved_at": [3], "steps": 4}
    stove = {
        "row": "policy", "suite": "libero_goal", "task": "stove", "initial_state": 2, "success": False, "steps": 4,
    }  # fmt: skip
    for file, line in (("chains", chain), ("libero", stove)):
        lines = [line, line | {"row": "expert", "steps": 9}]
        (results / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    metrics = read_json(results / "metrics.json") | {"calvin": CALVIN, "libero": LIBERO | {"rate_hz": 20.0}}
    write_json(results / "metrics.json", metrics)
    result = invoke(run, tmp_path / "report")
    assert result.exit_code == 0, result.output
    rates = {file.stem: film(file)[1] for file in (tmp_path / "films").iterdir()}
    assert rates == {"reach_0": 20.0, "calvin_7": 7.5, "stove_2": 5.0}
    page = (tmp_path / "report/index.html").read_text(encoding="utf-8")
    assert "CALVIN, chain 7: open_drawer, turn_on_led; 1 of 2 solved after 3 steps, 4 steps in all" in page
    assert "libero_goal, stove, initial state 2; the goal was not reached in 4 steps" in page
    assert "An episode took 10 steps, of at most 500" in page, "of MetaWorld's episodes alone"
    shutil.move(results / "rollouts/stove_2", results / "rollouts/stove_3")
    result = invoke(run, tmp_path / "again")
    assert result.exit_code == 1 and "stove_3: no line of episodes.jsonl, chains.jsonl, libero.jsonl is of this episode" in (
        " ".join(result.output.split())
    )


def test_clips_stand_in_rows_the_truth_above_the_generation() -> None:
    clips = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3, 1, 1, 1).repeat(3, axis=5)
    pictures = clips_figure(clips).axes[0].images
    places = sorted(pictures, key=lambda picture: (picture.get_extent()[3], picture.get_extent()[0]))
    assert [int(picture.get_array()[0, 0, 0]) for picture in places] == list(range(12))


def test_pca_recovers_a_plane() -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(5, 40, 3)) * [3.0, 2.0, 1.0]
    directions = np.linalg.qr(rng.normal(size=(8, 3)))[0].T
    colours = pca_colours(weights @ directions + 7.0).astype(float)
    for channel in range(3):
        assert abs(np.corrcoef(colours[..., channel].ravel(), weights[..., channel].ravel())[0, 1]) > 0.9
    assert pca_colours(np.zeros((2, 3, 2))).shape == (2, 3, 3)


def test_film_plays_the_foresight_between_calls() -> None:
    frames = np.zeros((8, 4, 4, 3), np.uint8)
    # One channel that says which call (0, 1) and which foreseen frame (0..3) is shown.
    foresight = np.broadcast_to(np.arange(8.0).reshape(2, 4, 1, 1, 1), (2, 4, 2, 2, 3)).astype(np.float32)
    film = rollout_film(frames, np.array([0, 4]), {"one_step": foresight}, size=32)
    assert film.shape == (8, 48, 64, 3)
    cells = film[:, 24, 40, 0].astype(int)
    assert (np.diff(cells) != 0).all() and len(set(np.sign(np.diff(cells)))) == 1
    sheet = side_by_side({"a": frames}, 8)
    assert sheet.shape == (8, 24, 8, 3)
    np.testing.assert_array_equal(enlarge(np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3), 4)[0, :, 0, 0], [0, 0, 6, 6])
