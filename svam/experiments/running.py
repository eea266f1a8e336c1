"""The loop of `make compare`: one `dvc exp run` after another.

The experiments run in a copy of the last commit, `.cache/experiments/project`, with a git repository of its own that borrows
the objects of this one, and with this project's DVC cache. The other ways are not sound when they are killed: `dvc exp run`
leaves the experiment's params in the workspace; with `--temp` or `--queue` it borrows the workspace for some seconds, in which
it stashes changes and detaches HEAD; and in a `git worktree` it shares the references that DVC keeps while it works with any
other `dvc exp run`. Here a killed run leaves a copy, which the next one resets, with the states from which stages go on.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from svam.console import console
from svam.device import prepare_torch, processor
from svam.errors import MachineError
from svam.experiments.foreseen import foreseen_of
from svam.experiments.plan import Run
from svam.experiments.records import EpisodeOutcome, Record, StageCost, read_records, write_records
from svam.files import FileError, read_json, read_yaml, sha256_of_json, write_json

SCRATCH = Path(".cache/experiments")
PROJECT = SCRATCH / "project"
DECISIVE = ("svam", "stages", ".dvc", "dvc.yaml", "dvc.lock", "params.yaml", ":!svam/experiments", ":!*.md")
"""What of the project an experiment is made of, as git names files."""


def output_of(*command: str, error: str | None = None) -> str:
    """What a command prints. A FileError, which begins with `error`, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FileError(": ".join([error or f"`{shlex.join(command)}` failed", *done.stderr.strip().splitlines()[-1:]]))
    return done.stdout.strip()


def last_commit(folder: Path = Path()) -> str:
    error = "here is no git repository with a commit, which DVC needs"
    return output_of("git", "-C", str(folder), "rev-parse", "--verify", "HEAD", error=error)


def unfinished_runs(runs: Sequence[Run], folder: Path) -> list[Run]:
    """The runs but for those that DVC shows as experiments of the last commit, with the planned params, and that have a record
    in `folder`. After another commit none of them is: DVC then decides, and restores from its run cache what is the same."""
    head, recorded = last_commit(), {record.name: record.revision for record in read_records(folder)[1]}
    shown = json.loads(output_of("dvc", "exp", "show", "--json"))
    experiments = [e for baseline in shown if baseline["rev"] == head for e in baseline["experiments"] or ()]
    params: dict[str, Any] = {
        revision["name"]: revision["data"]["params"]["params.yaml"]["data"]
        for experiment in experiments
        for revision in experiment["revs"] or ()
        if revision["data"] is not None and recorded.get(revision["name"]) == revision["rev"]
    }
    return [run for run in runs if params.get(run.name) != run.params]


def run_all(runs: Sequence[Run], folder: Path) -> None:
    """Run experiments one after another, and add their records to those of `folder`.

    Raises:
        FileError: git does not know who commits, something that decides numbers is not committed, the study is finished, or
            another loop is at work.
        MachineError: `dvc` failed; what was finished stays recorded.
    """
    if read_records(folder)[0] is not None:
        raise FileError(f"{folder} holds a finished study; give the collection in plan.yaml another name")
    unknown = "DVC commits experiments in your name: first run `git config user.name NAME` and `git config user.email ADDRESS`"
    committer = {key: output_of("git", "config", key, error=unknown) for key in ("user.name", "user.email")}
    changed = output_of("git", "status", "--porcelain", "--untracked-files=all", "--", *DECISIVE)
    if changed:
        names = ", ".join(line.split(maxsplit=1)[1] for line in changed.splitlines()[:5])
        raise FileError(f"experiments are made of the last commit, from which these files differ: {names}; commit them first")
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with (SCRATCH / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileError(f"{SCRATCH}: another loop, or what it started, is at work; wait for it or end it") from None
        prepare(committer)
        for number, run in enumerate(runs, start=1):
            console.rule(f"{number} of {len(runs)}: {run.name}")
            run_one(run, folder, lock.fileno())
        shutil.rmtree(PROJECT)


def prepare(committer: dict[str, str]) -> None:
    """Make or reset the copy of the last commit. What git ignores stays: outputs, and states from which stages go on."""
    git, dvc = ("git", "-C", str(PROJECT)), ("dvc", "--cd", str(PROJECT))
    for leftover in (PROJECT / ".git", PROJECT / ".dvc/tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    output_of("git", "init", "--quiet", str(PROJECT))
    objects = output_of("git", "rev-parse", "--path-format=absolute", "--git-path", "objects")
    (PROJECT / ".git/objects/info/alternates").write_text(f"{objects}\n", encoding="utf-8")
    for key, value in committer.items():
        output_of(*git, "config", key, value)
    output_of(*git, "reset", "--quiet", "--hard", last_commit())
    output_of(*git, "clean", "--quiet", "--force", "-d")
    if Path(".dvc/config.local").is_file():
        shutil.copy(".dvc/config.local", PROJECT / ".dvc")
    output_of(*dvc, "cache", "dir", "--local", str(Path(output_of("dvc", "cache", "dir")).resolve()))
    inputs = output_of(*git, "ls-files", "*.dvc").splitlines()
    if inputs:
        output_of(*dvc, "checkout", "--quiet", *inputs)


def run_one(run: Run, folder: Path, lock: int) -> None:
    """One experiment, from its command to its record. DVC holds the lock too: whoever kills the loop may leave DVC at work."""
    note = SCRATCH / "begun.json"
    begun = read_json(note) if note.is_file() else {}
    if not isinstance(begun, dict) or begun.get("run") != run.name:
        begun = {"run": run.name, "time": time.time(), "states": []}
    begun["states"] = sorted({*begun["states"], *saved_states()})
    write_json(note, begun)
    console.print(shlex.join(run.command), soft_wrap=True, markup=False)
    process = subprocess.Popen(run.command, cwd=PROJECT, pass_fds=[lock])
    try:
        process.wait()
    finally:
        process.wait()  # Ctrl-C reaches DVC too, which needs a while to stop in good order
    if process.returncode:
        raise MachineError(f"{run.name} did not finish, see above; the same command goes on with it")
    head = last_commit(PROJECT)  # not of the folder here, in which somebody may commit meanwhile
    reference = f"refs/exps/{head[:2]}/{head[2:]}/{run.name}"
    output_of("git", "fetch", "--quiet", str(PROJECT), f"+{reference}:{reference}")
    records = read_records(folder)[1]
    resumed = {state.parts[-2] for state in map(Path, begun["states"]) if not state.exists()}
    record = record_of(run, output_of("git", "rev-parse", reference), records, begun["time"], resumed)
    write_records(folder, [*(other for other in records if other.name != run.name), record])
    note.unlink()
    console.print(f"{run.name}: success in {sum(e.success for e in record.episodes)} of {len(record.episodes)} episodes")


def saved_states() -> set[str]:
    """Of stages that were killed, the folders from which they go on (`svam.resume`). A stage that ends deletes its own."""
    return {str(record.parent) for record in (PROJECT / ".ckpt").glob("*/*/*.json")}


def digests_of(entry: Mapping[str, Any]) -> dict[str, str]:
    """`code` and `params` of a `StageCost`, by the stage's entry in `dvc.lock`."""
    code = next((dep["md5"] for dep in entry.get("deps", ()) if dep["path"].startswith("data/code/")), "")
    return {"code": code, "params": sha256_of_json(entry["params"]) if "params" in entry else ""}


def record_of(run: Run, revision: str, records: Sequence[Record], began: float, resumed: Collection[str]) -> Record:
    """What the experiment that has just been run came to.

    Args:
        records: of earlier experiments, which may have measured stages that this one shares. began: a time of `time.time`.
        resumed: the stages that went on from what was saved when they were killed, so that they measured a part of their time.
    """
    lock = read_yaml(PROJECT / "dvc.lock")["stages"]
    work = {stage: {out["path"]: str(out["md5"]) for out in entry["outs"]} for stage, entry in lock.items()}
    model = work["train_policy"]["data/svam"]
    lines = (PROJECT / "data/results/episodes.jsonl").read_text(encoding="utf-8").splitlines()
    values = [value for value in map(json.loads, lines) if value["row"] == "policy"]
    episodes = [EpisodeOutcome(**{key: value[key] for key in EpisodeOutcome.model_fields}) for value in values]
    digests = {stage: digests_of(entry) for stage, entry in lock.items()}
    params = run.params
    models = PROJECT / "data/models"
    decouplers = {branch: read_json(models / f"decouplers/{branch}/metrics.json") for branch in params["distill"]["branches"]}
    foreseen = foreseen_of(read_json(models / "video/metrics.json"), decouplers)
    same = next((r for r in records if (r.name, r.policy, r.episodes) == (run.name, model, episodes)), None)
    if same is not None:  # restored from DVC's cache: there is nothing new to measure
        kept = {name: stage.model_copy(update=digests.get(name, {})) for name, stage in same.stages.items()}
        return same.model_copy(update={"revision": revision, "stages": kept, "foreseen": foreseen})

    # Here, so that a plan is printed without waiting for torch.
    from svam.episodes.joined import open_store
    from svam.evaluation.latency import measure_latency
    from svam.models.svam import SVAM
    from svam.report.tables import acceptance_table, accepted, learnt_labels

    unused = [] if params["distill"]["branches"] else ["generate", "cache_teacher", "distill"]
    unused += ["encode", "finetune_video"] if params["train_policy"]["context"] == ["observation"] else []
    stages = {}
    for name in [name for name in lock if not name.startswith(tuple(unused))]:
        same_work, account = "".join(work[name].values()), PROJECT / f".cache/times/{name}.json"
        seconds = [r.stages[name].seconds for r in records if name in r.stages and r.stages[name].work == same_work]
        if name not in resumed and account.is_file() and account.stat().st_mtime >= began:
            seconds.append(round(float(read_json(account)["seconds"]), 2))
        measured = next((s for s in reversed(seconds) if s is not None), None)
        stages[name] = StageCost(work=same_work, seconds=measured, **digests[name])
    store = open_store(PROJECT / "data/episodes.zarr")
    tasks = [store.task_of(int(episode)) for episode in store.acting_episodes("train")]
    svam = SVAM.load(PROJECT / "data/svam", prepare_torch(params["machine"]["device"], params["threads"], params["seed"]))
    training, evaluation = params["train_policy"]["training"], params["evaluate"]
    folders = {branch: PROJECT / "data/backbones" / branch for branch in ("geometric", "semantic")}
    teachers = {branch: read_json(folder / "metrics.json") for branch, folder in folders.items()}
    return Record(
        name=run.name, variant=run.variant, size=run.size, seed=run.seed, regime=run.regime, pipeline=run.pipeline,
        primary=run.primary, arguments=list(run.arguments), revision=revision,
        machine=f"{os.cpu_count()} x {processor()}", parameters=sum(p.numel() for p in svam.network.parameters()), policy=model,
        budget={
            "policy_steps": training["steps"], "batch": training["batch"], "learning_rate": training["learning_rate"],
            "episodes_per_task": run.size, "demonstrations": sum(min(run.size, tasks.count(task)) for task in set(tasks)),
            "data": work["convert"]["data/episodes.zarr"], "max_steps": evaluation["metaworld"]["max_steps"],
            "execute": evaluation["execute"],
        },
        latency=round(measure_latency(svam, 1)["total"], 3), stages=stages, episodes=episodes,
        labels=tuple(learnt_labels(params["prepare_backbones"])), teachers=accepted(acceptance_table(teachers)),
        foreseen=foreseen,
    )  # fmt: skip
