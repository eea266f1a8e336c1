"""The numbers of a run: gathered from every stage's metrics.json, as one flat file, as tables and as Markdown."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svam.evaluation.scores import TIERS
from svam.files import FileError, read_json

ROW_NAMES = {
    "policy": "S-VAM",
    "held_out_instruction": "unseen sentence",
    "same_goals": "seen sentence, same goals",
    "random": "random actions",
    "expert": "scripted expert",
}
"""Rows of the success table, in order, and how they are called."""
PREDICTORS = {
    "decoupler": "decoupler",
    "repeat_reference": "repeat the reference",
    "linear_probe": "linear probe on F",
    "decoded_one_step": "teacher on the decoded one-step prediction",
    "other_noise": "another noise seed's generation (ceiling)",
}
"""Predictors of teacher features, in order, and how they are called."""
VIEWS = ("real", "reconstructed", "blurred", "generated", "one_step")
"""How frames reach a teacher; the last two are frames that the video model made."""
ACCEPTED = {
    "rmse_std": ("depth error / deviation", "at most", 0.15),
    "gripper": ("IoU of the gripper", "at least", 0.6),
    "object": ("IoU of the object", "at least", 0.6),
}
"""What a teacher's metrics are called, and the bound within which they must lie for a comparison that rests on it."""
NEARLY = 0.1
"""By which share of the bound reconstructed frames may be worse."""
PARTS = ("finetune_video", "distill_geometric", "distill_semantic", "train_policy")
"""Trained parts that stream their loss, as their folders of curves are called."""
LABELS = {"depth": "depth error / deviation", "segmentation": "mean IoU"}
"""Labels of the simulator that a teacher may learn from, as its objective is called -> how its error is measured."""
ERRORS = {"policy": "S-VAM", "mean_action": "mean action", "hold_last": "hold the last action"}
"""Predictors of actions, in order, and how they are called."""


@dataclass(frozen=True)
class RunMetrics:
    """The metrics of one run. `decouplers`: branch -> metrics, only of branches that the params list."""

    results: Mapping[str, Any]
    video: Mapping[str, Any]
    decouplers: Mapping[str, Mapping[str, Any]]
    backbones: Mapping[str, Mapping[str, Any]]

    @property
    def success(self) -> Mapping[str, Any]:
        """Row -> `scores.summary` of the metaworld protocol; empty if it was not run."""
        rows: Mapping[str, Any] = self.results.get("metaworld", {}).get("rows", {})
        return rows

    @property
    def rates_hz(self) -> Mapping[str, float]:
        """Protocol -> steps a second of its robot, of those that a film can be of."""
        protocols = {name: found for name, found in self.results.items() if isinstance(found, dict)}
        return {name: found["rate_hz"] for name, found in protocols.items() if "rate_hz" in found}

    @property
    def evaluated(self) -> str:
        """The row of what was evaluated: a scripted policy has no other."""
        return "policy" if "policy" in self.success else next(iter(self.success))

    def row_name(self, row: str) -> str:
        """What the row is called; the policy may be another program's."""
        return "remote policy" if row == "policy" and self.results.get("policy") == "remote" else ROW_NAMES[row]


def labels_sentence(labels: Iterable[str]) -> str:
    """What has to be said under a table of success in which S-VAM stands beside VPP or Diffusion Policy, here or in published
    tables; "" where teachers learn from none of `LABELS`."""
    found = set(labels)
    learnt = " and ".join(label for label in LABELS if label in found)
    inputs = "which the inputs of VPP and Diffusion Policy do not see"
    return f"S-VAM's teachers learn from the simulator's {learnt}, {inputs}." if learnt else ""


def learnt_labels(prepare_backbones: Mapping[str, Any]) -> list[str]:
    """`LABELS` that the teachers of this section of the params learn from; pretrained and self-supervised ones from none."""
    teachers = [prepare_backbones[branch] for branch in ("geometric", "semantic")]
    objectives = [teacher["objective"] for teacher in teachers if teacher["source"] == "in_domain"]
    return [label for label in LABELS if label in objectives]


def measured_labels(teachers: Iterable[Mapping[str, Any]]) -> list[str]:
    """The same by the lines of `teacher_table`: what a teacher is measured by on real frames is what it learnt from."""
    measures = {line["measure"] for line in teachers if line["view"] == "real"}
    return [label for label, measure in LABELS.items() if measure in measures]


def gather(results: Path, video: Path, decouplers: Path, backbones: Path, branches: Sequence[str]) -> RunMetrics:
    """Read metrics.json of every stage. Imported weights have none to show, and theirs is empty.

    Raises:
        FileError: a stage's metrics.json is missing or broken.
    """

    def read(folder: Path) -> Mapping[str, Any]:
        metrics = read_json(folder / "metrics.json")
        if not isinstance(metrics, dict):
            raise FileError(f"{folder / 'metrics.json'}: expected a mapping")
        return metrics

    return RunMetrics(
        results=read(results),
        video=read(video),
        decouplers={branch: read(decouplers / branch) for branch in branches},
        backbones={name: read(backbones / name) for name in ("autoencoder", "text", "geometric", "semantic")},
    )


def flat_metrics(run: RunMetrics) -> dict[str, float]:
    """About ten numbers for `dvc exp show`; what was not measured is absent.

    success: mean any-step success over tasks, success_low and success_high its 95 % interval; success_mean_of_groups: where
    all four groups of difficulty were evaluated, LeRobot's average; success_reach: of the task that is visually hardest;
    success_unseen_sentence; calvin_average_length: subtasks in a row; libero_success: mean of suites. video_error_share:
    generated clips' squared error over that of repeating the first frame. <branch>_cosine: centred, on patches that moved;
    <branch>_explained: share of the error of repeating the reference. action_error: mean absolute, on held-out episodes, in
    physical units.
    """
    flat: dict[str, float] = {}
    rows = run.success
    if rows:
        evaluated = rows[run.evaluated]
        macro = evaluated["macro"]
        flat |= {"success": macro["success"], "success_low": macro["low"], "success_high": macro["high"]}
        if has_four_groups(evaluated):
            flat["success_mean_of_groups"] = evaluated["mean_of_tiers"]["success"]
        if "reach" in evaluated["tasks"]:
            flat["success_reach"] = evaluated["tasks"]["reach"]["success"]
        if "held_out_instruction" in rows:
            flat["success_unseen_sentence"] = rows["held_out_instruction"]["macro"]["success"]
    if "calvin" in run.results:
        chains = run.results["calvin"]["rows"]
        flat["calvin_average_length"] = chains.get("policy", next(iter(chains.values())))["average_length"]
    flat["video_error_share"] = run.video["error_share_of_repeat"]
    for branch, metrics in run.decouplers.items():
        flat[f"{branch}_cosine"] = metrics["decoupler"]["cosine_moved"]
        flat[f"{branch}_explained"] = metrics["decoupler"]["explained"]
    if "offline" in run.results:
        flat["action_error"] = run.results["offline"]["policy"]["mae"]
    if "libero" in run.results:
        flat["libero_success"] = next(iter(run.results["libero"]["rows"].values()))["mean_of_suites"]
    return {name: round(float(value), 4) for name, value in flat.items()}


def libero_section(run: RunMetrics) -> str:
    """The `libero` protocol as Markdown: rates by suite and by task; "" if it was not run."""
    libero = run.results.get("libero")
    if libero is None:
        return ""
    rows = libero["rows"]
    lines = [["**mean of suites**", *(f"{scores['mean_of_suites']:.1%}" for scores in rows.values())]]
    for kind in ("suites", "tasks"):
        for name in next(iter(rows.values()))[kind]:
            lines.append([name.replace("_", " "), *(percentage(scores[kind][name]) for scores in rows.values())])
    limits = ", ".join(f"{suite.removeprefix('libero_')} {steps}" for suite, steps in libero["max_steps"].items())
    text = (
        f"{libero['episodes_per_task']} episodes a task from the official initial states, in their order; at most so many "
        f"steps after {libero['settling_steps']} of settling: {limits}. Success at any step; 95 % Wilson intervals."
    )
    if libero["cameras"]:
        text += (
            f" Cameras: {', '.join(libero['cameras'])}, drawn at {libero['drawn']} pixels in the style {libero['render']} by "
            f"MuJoCo {libero['mujoco']}."
        )
    return f"{text}\n\n{markdown_table(['', *(run.row_name(row) for row in rows)], lines)}"


def has_four_groups(summary: Mapping[str, Any]) -> bool:
    """Whether the mean of groups in a `scores.summary` is LeRobot's average, and not one of fewer."""
    return bool(summary["mean_of_tiers"]) and summary["mean_of_tiers"]["tiers"] == len(TIERS)


def setting_text(setting: Mapping[str, Any]) -> str:
    """In which setting the closed loop was run, which another table must share to be compared with."""
    text = f"{setting['episodes_per_task']} episodes a task of at most {setting['max_steps']} steps, {setting['scenes']} scenes"
    if "cameras" in setting:
        look = f" in the look {setting['look']}" if "look" in setting else ""
        text += (
            f"; pictures of {' and '.join(setting['cameras'])}{look}, {setting['image_size']} pixels wide, in the style "
            f"{setting['render']}, drawn by MuJoCo {setting['mujoco']} with {setting['gl']}"
        )
    if "demonstrations" in setting:
        counts = sorted(set(setting["demonstrations"]["episodes"].values()))
        by = sorted({entry.get("source", "unknown") for entry in setting["demonstrations"]["recorded"]})
        text += f"; trained on {' to '.join(map(str, [*counts[:1], *counts[1:][-1:]]))} demonstrations a task ({', '.join(by)})"
    return text + "."


def chain_section(run: RunMetrics) -> str:
    """The `calvin` protocol as Markdown: a rate for each number of subtasks in a row, and their sum; "" if it was not run."""
    calvin = run.results.get("calvin")
    if calvin is None:
        return ""
    lines = [
        [run.row_name(row), *(percentage(rate) for rate in scores["rates"]), f"{scores['average_length']:.2f}"]
        for row, scores in sorted(calvin["rows"].items(), key=lambda item: list(ROW_NAMES).index(item[0]))
    ]
    subtasks = range(1, calvin["subtasks"] + 1)
    chosen = f" of {', '.join(calvin['tasks'])}" if calvin["tasks"] else ""
    whole = "The official evaluation" if calvin["official"] else "Not the whole official evaluation"
    text = (
        f"Share of {calvin['chains']} chains of which so many subtasks in a row were solved, with 95 % Wilson intervals over "
        f"chains; the average length is their sum. {whole}: chains of {calvin['subtasks']} subtasks{chosen}, "
        f"{calvin['max_steps']} steps a subtask; cameras: {len(calvin['cameras'])} ({', '.join(calvin['cameras']) or 'none'}); "
        f"{calvin['renderer'].upper()} renderer; calvin_env at {calvin['commit'][:7]}."
    )
    return f"{text}\n\n{markdown_table(['', *map(str, subtasks), 'average length'], lines)}"


def percentage(rate: Mapping[str, float]) -> str:
    """A rate with its interval."""
    return f"{rate['success']:.0%} ({rate['low']:.0%} to {rate['high']:.0%})"


def success_table(run: RunMetrics) -> list[dict[str, Any]]:
    """One line for each row, and task or average: {group, name, row, success, low, high, episodes}."""
    lines = []
    for row in ROW_NAMES:
        if row not in run.success:
            continue
        summary = run.success[row]
        groups = [("task", task, value) for task, value in summary["tasks"].items()]
        groups += [("tier", tier.replace("_", " "), value) for tier, value in summary["tiers"].items()]
        groups.append(("average", "all episodes (micro)", summary["micro"]))
        groups.append(("average", "mean of tasks (macro)", summary["macro"]))
        for group, name, value in groups:
            lines.append({
                "group": group, "name": name, "row": row, "success": value["success"], "low": value["low"],
                "high": value["high"], "episodes": value.get("episodes", summary["micro"]["episodes"]),
            })  # fmt: skip
    return lines


def distillation_table(run: RunMetrics) -> list[dict[str, Any]]:
    """One line for each branch and predictor: {branch, predictor, cosine_moved, explained, explained_moved, mse}."""
    keys = ("cosine_moved", "explained", "explained_moved", "mse")
    return [
        {"branch": branch, "predictor": name, **{key: metrics[name][key] for key in keys}}
        for branch, metrics in run.decouplers.items()
        for name in PREDICTORS
        if name in metrics
    ]


def teacher_table(run: RunMetrics) -> list[dict[str, Any]]:
    """One line for each teacher and view of a frame: {branch, view, measure, value}. The measure is the depth error in units
    of the depth's deviation, the mean intersection over union, or the error of self-supervised reconstruction."""
    lines = []
    for branch in ("geometric", "semantic"):
        views = dict(run.backbones[branch])
        dense = run.decouplers.get(branch, {}).get("teacher", {}).get("dense", {})
        views |= {view: dense[view] for view in ("generated", "one_step") if view in dense}
        for view in VIEWS:
            for key, measure in (("rmse_std", LABELS["depth"]), ("mean", LABELS["segmentation"]), ("rmse", "pixel error")):
                if key in views.get(view, {}):
                    lines.append({"branch": branch, "view": view, "measure": measure, "value": views[view][key]})
    return lines


def acceptance_table(teachers: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line for each teacher and bound of `ACCEPTED` that its labels let be measured: {branch, measure, real, reconstructed,
    bound, accepted}. Both views are of held-out frames. teachers: branch -> metrics."""
    lines = []
    for branch in ("geometric", "semantic"):
        real, reconstructed = (teachers[branch].get(view, {}) for view in ("real", "reconstructed"))
        for key, (measure, side, bound) in ACCEPTED.items():
            if key in real and key in reconstructed:
                sign = 1 if side == "at most" else -1
                excess = [sign * (value - bound) for value in (real[key], reconstructed[key])]
                lines.append({
                    "branch": branch, "measure": measure, "real": real[key], "reconstructed": reconstructed[key],
                    "bound": f"{side} {bound:g}", "accepted": excess[0] <= 0.0 and excess[1] <= NEARLY * bound,
                })  # fmt: skip
    return lines


def accepted(lines: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Branch -> whether a comparison may rest on its teacher, of those that `acceptance_table` could judge."""
    branches = dict.fromkeys(line["branch"] for line in lines)
    return {branch: all(line["accepted"] for line in lines if line["branch"] == branch) for branch in branches}


def acceptance_sentence(judged: Mapping[str, bool]) -> str:
    """What `accepted` says, "accepted: geometric; not accepted: semantic"."""
    verdicts = {
        "accepted": [b for b, good in judged.items() if good],
        "not accepted": [b for b, good in judged.items() if not good],
    }
    return "; ".join(f"{verdict}: {' and '.join(branches)}" for verdict, branches in verdicts.items() if branches)


def acceptance_text(teachers: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether a comparison may rest on the teachers, as Markdown; "" where no label was there to tell."""
    lines = acceptance_table(teachers)
    if not lines:
        return ""
    cells = [
        [f"{line['branch']}: {line['measure']}", line["bound"], f"{line['real']:.3f}", f"{line['reconstructed']:.3f}",
         "yes" if line["accepted"] else "no"]
        for line in lines
    ]  # fmt: skip
    text = (
        f"As teachers of a comparison, {acceptance_sentence(accepted(lines))}. Held-out frames must be within the bound, the "
        f"same ones through the autoencoder within it or worse by at most {NEARLY:.0%} of it."
    )
    return f"{text}\n\n{markdown_table(['', 'bound', 'held-out frames', 'reconstructed', 'within'], cells)}"


def action_table(run: RunMetrics) -> list[dict[str, Any]]:
    """One line for each step of the chunk: {step, policy, mean_action, hold_last}, mean absolute errors in physical units."""
    offline = run.results.get("offline")
    if offline is None:
        return []
    columns = {name: offline[name]["mae_per_step"] for name in ERRORS}
    return [{"step": k, **{name: values[k] for name, values in columns.items()}} for k in range(len(columns["policy"]))]


def read_curve(file: Path) -> tuple[list[int], list[float]]:
    """Steps and values of one of DVCLive's .tsv files.

    Raises:
        FileError: it is no such file.
    """
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            lines = [(int(line.pop("step")), float(*line.values())) for line in csv.DictReader(opened, delimiter="\t")]
        steps, values = zip(*lines, strict=True)
        return list(steps), list(values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{file}: not one of DVCLive's curves ({error})") from None


def curves_of(live: Path, branches: Sequence[str]) -> dict[str, tuple[list[int], list[float]]]:
    """Part -> steps and training loss, of every trained part that this run has and that streamed its loss."""
    parts = [part for part in PARTS if not part.startswith("distill_") or part.removeprefix("distill_") in branches]
    files = {part: live / part / "plots" / "metrics" / "train" / "loss.tsv" for part in parts}
    return {part: read_curve(file) for part, file in files.items() if file.exists()}


def curve_table(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], points: int = 50) -> list[dict[str, Any]]:
    """Losses on one axis: {percent, <part>: mean loss of that piece of its training}; None for parts that did not train.
    Parts train for different numbers of steps, hence percent."""
    lines = []
    for i in range(points):
        line: dict[str, Any] = {"percent": 100.0 * (i + 1) / points, **dict.fromkeys(PARTS)}
        for part, (_, values) in curves.items():
            first = i * len(values) // points
            piece = values[first : max(first + 1, (i + 1) * len(values) // points)]
            line[part] = sum(piece) / len(piece)
        lines.append(line)
    return lines


def plot_tables(
    run: RunMetrics, curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]
) -> dict[str, list[dict[str, Any]]]:
    """Name -> lines of numbers, six digits after the point, for the titled plots of `dvc.yaml`; `what` names a bar."""
    tables: dict[str, list[dict[str, Any]]] = rounded({
        "success": [{"what": f"{t['name']}, {run.row_name(t['row'])}", **t} for t in success_table(run)],
        "distillation": [{"what": f"{t['branch']}, {PREDICTORS[t['predictor']]}", **t} for t in distillation_table(run)],
        "teachers": [{"what": f"{t['branch']}, {t['view']} frames", **t} for t in teacher_table(run)],
        "actions": action_table(run),
        "curves": curve_table(curves),
    })  # fmt: skip
    return tables


def rounded(value: Any) -> Any:
    """JSON values with six digits after the point."""
    if isinstance(value, Mapping):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 6) if isinstance(value, float) else value


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column left-aligned."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def markdown(run: RunMetrics, note: str = "") -> str:
    """All results as one Markdown page, under a `note` where there is one."""
    parts = ["# Results", *([note] if note else [])]
    labels = labels_sentence(measured_labels(teacher_table(run))) if run.results.get("policy", "svam") == "svam" else ""
    said = [labels] if labels else []
    rows = [row for row in ROW_NAMES if row in run.success]
    if rows:
        cells = {(line["name"], line["row"]): line for line in success_table(run)}
        names = list(dict.fromkeys(name for name, _ in cells))
        lines = [[name, *(percentage(cells[name, row]) if (name, row) in cells else "" for row in rows)] for name in names]
        grid = markdown_table(["", *(run.row_name(row) for row in rows)], lines)
        count = run.success[run.evaluated]["micro"]["episodes"]
        text = (
            f"{count} episodes on goals that no demonstration has; success at any step; 95 % Wilson intervals. "
            "No goal is dropped, also not where the expert fails. " + setting_text(run.results["metaworld"]["setting"])
        )
        means = [
            f"{run.row_name(row)} {run.success[row]['mean_of_tiers']['success']:.1%}"
            for row in rows
            if has_four_groups(run.success[row])
        ]
        if means:
            text += (
                " The mean of tasks is the average of the published tables; the mean over the four groups of difficulty, as "
                f"LeRobot averages: {', '.join(means)}."
            )
        parts += ["## Success in closed loop", text, grid, *said]
    if chains := chain_section(run):
        parts += ["## CALVIN: subtasks in a row", chains, *said]
    if libero := libero_section(run):
        parts += ["## LIBERO", libero, *said]
    if run.decouplers:
        lines = [
            [f"{line['branch']}: {PREDICTORS[line['predictor']]}"]
            + [f"{line[key]:.3f}" for key in ("cosine_moved", "explained", "explained_moved", "mse")]
            for line in distillation_table(run)
        ]
        header = ["", "centred cosine, moved patches", "explained share", "explained share, moved patches", "MSE"]
        parts += ["## Foresight on held-out episodes", markdown_table(header, lines)]
    video = run.video
    lines = [
        [name, *(f"{video[f'{key}_{column}']:.4f}" for column in ("mse", "psnr", "ssim"))]
        for key, name in (("generated", "generated"), ("one_step", "one step"), ("repeated", "repeat the first frame"))
        if f"{key}_mse" in video
    ]
    share = f"Generated clips keep {video['error_share_of_repeat']:.1%} of the error of repeating the first frame."
    parts += ["## Generated clips against the reconstructed truth", share, markdown_table(["", "MSE", "PSNR", "SSIM"], lines)]
    teachers = [
        [f"{line['branch']}: {line['view'].replace('_', '-')} frames", line["measure"], f"{line['value']:.3f}"]
        for line in teacher_table(run)
    ]
    if teachers:
        acceptance = acceptance_text(run.backbones)
        parts += ["## Teachers", markdown_table(["", "measure", "value"], teachers), *([acceptance] if acceptance else [])]
    offline = run.results.get("offline")
    if offline is not None:
        dimensions = range(len(offline["policy"]["mae_per_dimension"]))
        names_of = {**ERRORS, "mean_of_samples": "S-VAM, mean of samples", "best_sample": "S-VAM, best sample"}
        lines = [
            [name, f"{offline[key]['mae']:.4f}", *(f"{value:.4f}" for value in offline[key]["mae_per_dimension"])]
            for key, name in names_of.items()
        ]
        text = f"{offline['windows']} windows, {offline['samples']} samples each: {offline['notice']}."
        if "sets" in offline:
            each = ", ".join(f"{name} {one['policy']['mae']:.4f}" for name, one in offline["sets"].items())
            text += f" Of several sets, each in its own units: {each}. The table is the first one's."
        header = ["mean absolute error", "all", *(f"dimension {d}" for d in dimensions)]
        parts += ["## Offline, on held-out episodes", text, markdown_table(header, lines)]
    return "\n\n".join(parts) + "\n"
