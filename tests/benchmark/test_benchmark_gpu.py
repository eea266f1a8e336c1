"""The part that needs a GPU, at toy size on a CPU: every row is measured, and the page says what was."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from svam.benchmark import gpu, training
from svam.benchmark.__main__ import BEGIN, END, main
from svam.benchmark.timing import Inputs
from svam.errors import MachineError
from svam.files import read_json, write_json
from svam.models.generator import VideoGenerator
from svam.models.video import Generation
from svam.params import Machine, Params, load_params
from svam.presets.overlay import with_overlay
from tests import ROOT
from tests.benchmark.common import refused
from tests.toy import write_toy_params

PAGE = ROOT / "svam/benchmark/README.md"
PUBLISHED = {
    "machine.checkpointing": True, "finetune_video.training.ema": 0.0, "generate.guidance_last": 3.0,
    "generate.feature_time_ids": [4.0, 127.0, 0.0],
}  # fmt: skip
FEW = {"collect.tasks": ["reach"], "collect.episodes": 2, "collect.episodes_of": None}


def measured(folder: Path) -> dict[str, Any]:
    write_toy_params(folder / "params.yaml")
    (folder / "scratch").mkdir()
    return gpu.measure(folder / "params.yaml", PUBLISHED, FEW, torch.device("cpu"), folder / "scratch")


@pytest.mark.usefixtures("warm_python")
def test_every_row_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CALLS", 1)
    monkeypatch.setattr(training, "WARM_UP", 1)
    monkeypatch.setattr(training, "STEPS", 2)
    machines, generated = list[tuple[bool, bool, bool]](), list[bool]()
    finetuning, generate = training.finetuning, VideoGenerator.generate

    def trains(params: Params, device: torch.device, machine: Machine, *rest: Any) -> dict[str, float]:
        averages = machine.average == "host" and params.finetune_video.training.ema > 0.0
        machines.append((machine.compile, machine.checkpointing, averages))
        return finetuning(params, device, machine, *rest)

    def generates(model: VideoGenerator, *given: torch.Tensor) -> Generation:
        generated.append(model.sampler.guided or model.sampler.feature_time_ids is not None)
        return generate(model, *given)

    monkeypatch.setattr(gpu, "finetuning", trains)
    monkeypatch.setattr(VideoGenerator, "generate", generates)
    found = measured(tmp_path)
    missing = set() if find_spec("peft") else {"adapters"}
    assert set(found["failed"]) == missing and {row.part for row in gpu.ROWS.values()} == set(found["parts"]) | missing
    # As the rows say.
    assert machines == [(False, True, True), (False, True, False), (True, False, False), (True, False, False)]
    assert generated and not any(generated)  # one pass a step
    assert set(found["seconds"]) == set(found["parts"]) | missing and found["seconds"]["finetuning"] > 0
    control, rows = found["parts"]["control"], found["rows"]
    assert rows["rate"] == pytest.approx(8e3 / rows["act"])
    assert rows["generations"] == pytest.approx(control["before_ms"]["generation"] / rows["act"])
    assert control["flops"]["act"] > control["flops"]["one_step"] > 0
    for name, share in control["share_of_matrix_rate"].items():
        assert share == pytest.approx(1e3 * control["flops"][name] / rows[name] / found["matrix_flops"])
    assert set(control["cosines"]) == {"geometric", "semantic", "one_step"}
    assert all(cosine == pytest.approx(1.0, abs=1e-5) for cosine in control["cosines"].values())  # a CPU keeps its bits
    assert control["difference_of_range"] == 0.0
    for name in ("finetuning", "small_finetuning", "policy"):
        part = found["parts"][name]
        assert part["flops"] > 0
        assert part["share_of_matrix_rate"] == pytest.approx(part["per_second"] * part["flops"] / found["matrix_flops"])
    assert rows["policy"] == pytest.approx(found["parts"]["policy"]["per_second"] / found["parts"]["policy"]["eager"])
    assert rows["finetuning"] > 0 and rows["small_finetuning"] > 0
    assert rows["demonstrations"] == pytest.approx(sum(found["parts"]["demonstrations"]["by_stage"].values()))
    assert (tmp_path / "scratch/episodes.zarr").is_dir()
    page = gpu.table(found)
    assert "measured, none" in page and page.count("not run yet") == len(missing)


def test_a_row_that_fails_does_not_take_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> dict[str, Any]:
        raise MachineError("no\nway")

    for name in ("control", "finetuning"):
        monkeypatch.setattr(gpu, name, fails)
    monkeypatch.setattr(gpu, "demonstrations", lambda *_: {"seconds": 140.2})

    def breaks(*_: object) -> dict[str, Any]:
        raise KeyError("of a compiler")

    monkeypatch.setattr(gpu, "policy", breaks)
    found = measured(tmp_path)
    assert set(found["failed"].values()) == {"no way", "KeyError: 'of a compiler'"}
    assert found["rows"] == {"demonstrations": 140.2}
    page = gpu.table(found)
    assert page.count("not run yet") == len(gpu.ROWS) - 1 and "| 140 s |" in page


def test_time_that_is_over_and_a_stage_that_hangs_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PATIENCE", 0.01)
    with pytest.raises(MachineError, match=r"^the stage collect took more than 0\.01 s$"):
        gpu.demonstrations(ROOT / "params.yaml", FEW, tmp_path)
    monkeypatch.setattr(gpu, "BUDGET", -1.0)
    found = measured(tmp_path)
    assert not found["rows"] and set(found["failed"].values()) == {"not begun: the parts before took more than -1 s"}


def test_fifty_demonstrations_of_fifty_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = list[Any]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "prepare_torch", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(gpu, "measure", lambda *arguments: given.extend(arguments))
    gpu.gpu(Inputs(tmp_path, tmp_path, tmp_path), load_params(ROOT / "params.yaml"))
    recorded = with_overlay(given[2], ROOT / "params.yaml", "")[0].collect
    assert {recorded.episodes_for(task) for task in recorded.tasks} == {50} and len(recorded.tasks) == 50
    assert recorded.image_size == 128


def test_the_page_holds_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, page = ROOT / "data/benchmark/gpu.json", PAGE.read_text(encoding="utf-8")
    assert page.partition(BEGIN)[2].partition(END)[0].strip() == gpu.table(read_json(kept) if kept.is_file() else {})
    (tmp_path / "page.md").write_text(f"Words.\n{BEGIN}\n{END}\nMore.\n")
    write_json(tmp_path / "gpu.json", {"part": "gpu", "card": "a card", "rows": {"act": 24.04}})
    main(tmp_path / "gpu.json", tmp_path / "page.md")
    written = (tmp_path / "page.md").read_text()
    assert "measured, a card" in written and "| 24 ms |" in written and written.endswith("More.\n")
    write_json(tmp_path / "gpu.json", {"part": "store"})
    with pytest.raises(SystemExit):
        main(tmp_path / "gpu.json", tmp_path / "page.md")
    assert "expected what `python -m stages.benchmark gpu" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "the part gpu needs a CUDA GPU, and torch" in refused("gpu", tmp_path, {}, capfd)
