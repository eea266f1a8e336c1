"""`python -m svam.publish`: the trained S-VAM of this project as a folder in the layout of a model hub, and to a hub.

The folder is what `SVAM.load` reads, with a card (`README.md`) beside it: what it is, how it is used, its results with their
protocol and intervals, and every file's SHA-256; and `params.yaml`, of which it was made. DVC is asked whether all of these
belong together: a card must not show another model's results.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from svam.checkpoint import load_config
from svam.console import console, one_line_errors
from svam.errors import MachineError
from svam.files import FileError, read_json, sha256, stated, whole_directory
from svam.models.manifest import MANIFEST, verify_manifest
from svam.models.svam import PolicyRecord
from svam.report.tables import markdown_table

MODEL, RESULTS, REPORT, PARAMS = Path("data/svam"), Path("data/results"), Path("data/report"), Path("params.yaml")
PAPER = "https://arxiv.org/abs/2603.16195"
CARD = """
# {name}: an S-VAM

A shortcut video-action model (Yan et al., [arXiv 2603.16195]({paper})): one denoising step of a video diffusion model, read by
decouplers that were distilled from the model's own multi-step generations, conditions a diffusion policy. Independent
implementation.

{facts}

## Use
```python
from pathlib import Path

from huggingface_hub import snapshot_download
from svam.models.svam import SVAM

svam = SVAM.load(Path(snapshot_download("{repository}")))  # every part's SHA-256 is checked
```

`params.yaml` is what it was trained with.

{results}

## Files
SHA-256 of `{manifest_name}`, which a server states as `weights_sha256`: `{manifest}`.

{files}
"""


def check_together(paths: list[Path]) -> None:
    """Ask DVC whether the results that are here were measured with the weights and the params that are here.

    Raises:
        FileError: they were not, or here is no project of which DVC knows that.
    """
    done = subprocess.run(["dvc", "status", "--json", "evaluate", "report"], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it did not say why"])[-1]
        raise FileError(f"DVC does not know whose results these are ({said}); run this in the project's folder")
    changed = {
        name
        for entries in json.loads(done.stdout).values() for entry in entries if isinstance(entry, dict)
        for kind in entry.values() for name, what in kind.items() if what != "not in cache"
    }  # fmt: skip
    if differ := sorted({str(path) for path in paths} & changed):
        raise FileError(f"{', '.join(differ)}: not what the last evaluation used or wrote; first: dvc repro report")


def card(model: Path, report: Path, name: str, repository: str, license_: str | None) -> str:
    """`README.md` with the fields by which hubs find a model.

    Raises:
        FileError: a file of the model or the report is missing or damaged.
    """
    from huggingface_hub import EvalResult, ModelCardData

    record = stated(PolicyRecord, load_config(model / "policy"), model / "policy/config.json")
    config, manifest = record.svam, read_json(model / MANIFEST)
    flat, text = read_json(report / "metrics.json"), (report / "results.md").read_text(encoding="utf-8")
    facts = {
        "camera": f"`{'` and `'.join(config.cameras)}`, {config.image_size[0]} x {config.image_size[1]} pixels, upright RGB",
        "proprioception": f"{config.proprioception} numbers" if config.proprioception else "none",
        "actions": f"{config.chunk} a chunk of {record.statistics.convention.dimensions} numbers at {config.rate_hz:g} Hz",
        "context": ", ".join(config.context),
    }
    files = [
        [f"`{file}`", f"{entry['bytes']:,}", f"`{entry['sha256']}`"]
        for part in manifest["parts"].values() for file, entry in part.items()
    ]  # fmt: skip
    measured = None
    if "success" in flat:
        low, high = (round(100 * flat[key], 1) for key in ("success_low", "success_high"))
        measured = [EvalResult(
            task_type="robotics", dataset_type="metaworld", dataset_name="MetaWorld", metric_type="success_rate",
            metric_value=round(100 * flat["success"], 1),
            metric_name=f"success in closed loop, mean of tasks, per cent (95 % interval {low} to {high})",
        )]  # fmt: skip
    data = ModelCardData(
        license=license_, library_name="svam", pipeline_tag="robotics", tags=["robotics", "video-action-model", "svam"],
        model_name=name, eval_results=measured,
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n" + CARD.format(
        name=name, repository=repository, paper=PAPER, manifest_name=MANIFEST, manifest=sha256(model / MANIFEST),
        facts=markdown_table(["", "what it needs and gives"], [[key, value] for key, value in facts.items()]),
        results=text.strip().replace("\n# ", "\n## ").removeprefix("# Results").strip(),
        files=markdown_table(["file", "bytes", "SHA-256"], files),
    )  # fmt: skip


def upload(folder: Path, repository: str, private: bool) -> str:
    """Send a folder to a hub, as the user that its own client is logged in as; returns the address.

    Raises:
        MachineError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="S-VAM and its card"))
    except Exception as error:  # also of its HTTP library, which is another in each of its versions
        said = " ".join(str(error).split())[:200] or type(error).__name__
        later = f"{folder} is whole: send it later by `hf upload {repository} {folder}`"
        raise MachineError(f"{repository}: the hub did not take it ({said}); {later}") from None


@one_line_errors
def main(
    out: Annotated[Path, typer.Argument(help="Folder to write, which must not be there.")],
    model: Annotated[Path, typer.Option(help="S-VAM folder of this project.")] = MODEL,
    results: Annotated[Path, typer.Option(help="What the evaluate stage wrote.")] = RESULTS,
    report: Annotated[Path, typer.Option(help="What the report stage wrote.")] = REPORT,
    repository: Annotated[
        str | None, typer.Option("--to", help="OWNER/NAME on the hub to send it to; without it: none.")
    ] = None,
    license_: Annotated[str | None, typer.Option("--license", help="Of the weights, by the hub's word: apache-2.0.")] = None,
    private: Annotated[bool, typer.Option("--private", help="For those alone whom you let in.")] = False,
) -> None:
    """Write the S-VAM of this project, its card and its params to OUT."""
    if out.exists():
        raise FileError(f"{out}: is there already; name a folder that is not")
    verify_manifest(model)
    check_together([model, model / MANIFEST, results, report, PARAMS])
    with whole_directory(out) as folder:
        shutil.copytree(model, folder, dirs_exist_ok=True)
        shutil.copy(PARAMS, folder / PARAMS)
        text = card(model, report, out.name, repository or f"OWNER/{out.name}", license_)
        (folder / "README.md").write_text(text, encoding="utf-8")
    console.print(f"{out}: card, weights and params", highlight=False, soft_wrap=True)
    if repository is not None:
        console.print(upload(out, repository, private), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
