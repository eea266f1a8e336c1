"""The part that needs a GPU, at toy size on a CPU: every row is measured, and the page says what was."""

from __future__ import annotations

import subprocess
import sys
import time
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.benchmark import app
from svam.benchmark import gpu, training
from svam.benchmark.__main__ import BEGIN, END, main
from svam.benchmark.timing import Inputs
from svam.errors import MachineError, ParamsError
from svam.files import read_json, write_json
from svam.models.generator import VideoGenerator
from svam.models.video import Generation
from svam.params import Machine, Params, load_params
from svam.presets.overlay import with_overlay
from tests import ROOT
from tests.toy import invoke, write_toy_params

PAGE = ROOT / "svam/benchmark/README.md"
PUBLISHED = {
    "machine.checkpointing": True, "finetune_video.training.ema": 0.0, "generate.guidance_last": 3.0,
    "generate.feature_time_ids": [4.0, 127.0, 0.0],
}  # fmt: skip
FEW = {"collect.tasks": ["reach"], "collect.episodes": 2, "collect.episodes_of": None}


def measured(folder: Path, kept: Any = None, *only: str, written: list[Any] | None = None) -> dict[str, Any]:
    """What is measured, and each state of the file in `written`."""
    write_toy_params(folder / "params.yaml")
    (folder / "scratch").mkdir(exist_ok=True)

    def write(found: dict[str, Any]) -> None:
        write_json(folder / "gpu.json", found)
        (written if written is not None else []).append(deepcopy(found))

    cpu = torch.device("cpu")
    return gpu.measure(folder / "params.yaml", PUBLISHED, FEW, cpu, folder / "scratch", write, kept, only)


def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In the place of the parts: what each is called, when it is called; all take no time."""
    called = list[str]()

    def part(name: str, values: dict[str, Any]) -> None:
        monkeypatch.setattr(gpu, name, lambda *_, **__: called.append(name) or values)  # type: ignore[func-returns-value]

    part("rates", {"matrix_flops": 4e14, "copy_bytes": 4.3e12})
    part("counted", dict.fromkeys(("act", "one_step", "generation", "finetuning", "small_finetuning", "policy"), int(1e12)))
    part("untrained", {})
    part("before", {"generation_ms": 1000.0})
    part("acting", {"act_ms": 30.0})
    part("control", {"act_ms": 20.0, "one_step_ms": 10.0, "peak_gb": 6.0, "actions_per_second": 400.0})
    part("finetuning", {"per_second": 20.0, "peak_gb": 40.0})
    part("policy", {"per_second": 4e3, "eager": 1e3, "ratio": 4.0})
    part("demonstrations", {"seconds": 140.2})
    part("channels_last", {"one_step_ms": 9.0})
    return called


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
    written = list[Any]()
    found = measured(tmp_path, written=written)
    missing = set() if find_spec("peft") else {"adapters"}
    assert set(found["failed"]) == missing and {row.part for row in gpu.ROWS.values()} <= set(found["parts"]) | missing
    assert set(found["rows"]) == {key for key, row in gpu.ROWS.items() if row.part not in missing}
    # As the rows say.
    assert machines == [(False, True, True), (False, True, False), (True, False, False), (True, False, False)]
    assert generated and not any(generated)  # one pass a step
    assert set(found["seconds"]) == set(found["parts"]) | missing and found["seconds"]["finetuning"] > 0
    control, rows, parts = found["parts"]["control"], found["rows"], found["parts"]
    assert rows["rate"] == pytest.approx(8e3 / rows["act"])
    assert rows["generations"] == pytest.approx(parts["before"]["generation_ms"] / rows["act"])
    assert {"act_ms", "one_step_ms"} < set(parts["before"]) and parts["captured"]["act_ms"] > 0
    flops, seconds = parts["flops"], {name: rows[name] / 1e3 for name in ("act", "one_step")}
    assert flops["generation"] > flops["act"] > flops["one_step"] > 0
    seconds["generation"] = parts["before"]["generation_ms"] / 1e3
    seconds |= {name: 1.0 / parts[name]["per_second"] for name in ("finetuning", "small_finetuning", "policy")}
    assert set(found["shares"]) == set(seconds) == set(flops)
    for name, share in found["shares"].items():
        assert share == pytest.approx(flops[name] / seconds[name] / parts["rates"]["matrix_flops"]) and share > 0
    assert set(control["cosines"]) == {"geometric", "semantic", "one_step"}
    assert all(cosine == pytest.approx(1.0, abs=1e-5) for cosine in control["cosines"].values())  # a CPU keeps its bits
    assert control["difference_of_range"] == 0.0
    assert rows["policy"] == pytest.approx(parts["policy"]["per_second"] / parts["policy"]["eager"])
    assert rows["finetuning"] > 0 and rows["small_finetuning"] > 0 and parts["channels_last"]["one_step_ms"] > 0
    assert rows["demonstrations"] == pytest.approx(sum(parts["demonstrations"]["by_stage"].values()))
    assert (tmp_path / "scratch/episodes.zarr").is_dir()
    assert read_json(tmp_path / "gpu.json") == found == written[-1]
    page = gpu.table(found)
    assert "measured, none" in page and page.count("not run yet") == len(missing)


def test_a_row_that_fails_does_not_take_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what all shares rest on, nor what JSON cannot hold."""
    stand_ins(monkeypatch)

    def fails(*_: object) -> dict[str, Any]:
        raise MachineError("no\nway")

    def breaks(*_: object) -> dict[str, Any]:
        raise KeyError("of a compiler")

    for name, broken in {"counted": breaks, "rates": fails, "control": fails, "policy": breaks}.items():
        monkeypatch.setattr(gpu, name, broken)
    monkeypatch.setattr(gpu, "channels_last", lambda *_: {"one_step_ms": float("nan")})
    found = measured(tmp_path)
    assert found["failed"].pop("channels_last").startswith("ValueError: Out of range float values are not JSON compliant")
    of_compiler = "KeyError: 'of a compiler'"
    assert found["failed"] == {"rates": "no way", "flops": of_compiler, "control": "no way", "policy": of_compiler}
    assert set(found["rows"]) == {
        "finetuning", "finetuning_memory", "adapters_memory", "small_finetuning", "demonstrations",
    } and found["shares"] == {}  # fmt: skip
    page = gpu.table(found)
    assert page.count("not run yet") == 7 and "| 140 s |" in page


def test_what_a_killed_command_measured_is_kept_and_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called, written = stand_ins(monkeypatch), list[Any]()

    def killed(*_: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "policy", killed)
        with pytest.raises(KeyboardInterrupt):
            measured(tmp_path, written=written)
    kept = read_json(tmp_path / "gpu.json")
    assert kept == written[-1] and set(kept["parts"]) == {
        "rates", "before", "captured", "control", "lean_finetuning", "adapters",
    }  # fmt: skip
    assert kept["failed"] == {"policy": "not finished: the command ended within it"} | dict.fromkeys(
        ("finetuning", "small_finetuning", "flops", "demonstrations", "channels_last"), "not reached: the command ended before"
    )
    assert kept["rows"]["act"] == 20.0 and kept["rows"]["generations"] == 50.0 and "demonstrations" not in kept["rows"]
    called.clear()
    found = measured(tmp_path, kept)
    assert (
        called == ["policy", "finetuning", "finetuning", "counted", "demonstrations", "channels_last"] and not found["failed"]
    )
    assert set(found["rows"]) == set(gpu.ROWS) and found["parts"]["control"] == kept["parts"]["control"]
    assert found["shares"]["act"] == pytest.approx(1e12 / 4e14 / 20e-3)
    called.clear()
    assert measured(tmp_path, found) == found and not called
    assert measured(tmp_path, found, "policy", "rates")["parts"] == found["parts"] and called == ["rates", "policy"]
    called.clear()
    measured(tmp_path, {**found, "card": "another", "of": "0"})
    assert "control" in called
    with pytest.raises(ParamsError, match=r"^--only rate: the part gpu measures rates, before, captured, control, "):
        measured(tmp_path, None, "rate")


def test_time_that_is_over_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is ended when the command's time is over, also where it takes the error for its own; no other is begun late."""
    called, ended = stand_ins(monkeypatch), list[MachineError]()

    def hangs(*_: object) -> None:
        while len(ended) < 2:
            try:
                time.sleep(100)
            except MachineError as error:
                ended.append(error)
        raise ended[-1]

    monkeypatch.setattr(gpu, "LIMIT", 0.0)
    monkeypatch.setattr(gpu, "AGAIN", 0.3)
    monkeypatch.setattr(gpu, "control", hangs)
    monkeypatch.setattr(gpu, "forget", lambda _: monkeypatch.setattr(gpu, "BUDGET", -1.0))
    found = measured(tmp_path, None, "control", "policy")
    assert found["failed"] == {
        "control": "not finished: all parts together have 0 s; the same command measures it",
        "policy": "not begun: the parts before took more than -1 s; the same command measures it",
    } and len(ended) == 2 and not called  # fmt: skip


def test_a_stage_that_hangs_is_ended_with_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LIMIT", 0.0)
    found = measured(tmp_path, None, "demonstrations")
    assert found["failed"]["demonstrations"].startswith("not finished: ") and not (tmp_path / "scratch/raw").exists()


def test_fifty_demonstrations_of_fifty_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = list[Any]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "prepare_torch", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(gpu, "measure", lambda *arguments: given.extend(arguments))
    write_json(tmp_path / "out.json", {"of": "this"})
    inputs = Inputs(tmp_path, tmp_path, tmp_path, tmp_path / "out.json", print, ["policy"])
    gpu.gpu(inputs, load_params(ROOT / "params.yaml"))
    assert given[4:] == [tmp_path, print, {"of": "this"}, ["policy"]]
    recorded = with_overlay(given[2], ROOT / "params.yaml", "")[0].collect
    assert {recorded.episodes_for(task) for task in recorded.tasks} == {50} and len(recorded.tasks) == 50
    assert recorded.image_size == 128


def test_the_page_holds_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, page = ROOT / "data/benchmark/gpu.json", PAGE.read_text(encoding="utf-8")
    assert page.partition(BEGIN)[2].partition(END)[0].strip() == gpu.table(read_json(kept) if kept.is_file() else {})
    (tmp_path / "page.md").write_text(f"Words.\n{BEGIN}\n{END}\nMore.\n")
    measured = {
        "part": "gpu", "card": "a card", "rows": {"act": 24.04, "finetuning": 18.5, "finetuning_memory": 36.04},
        "parts": {
            "rates": {"matrix_flops": 7.88e14, "copy_bytes": 4.3e12}, "flops": {"act": 6e12, "generation": 3e14},
            "finetuning": {"per_second": 18.5, "peak_gb": 70.1}, "lean_finetuning": {"per_second": 9.04, "peak_gb": 36.04},
        },
        "shares": {"act": 0.317},
    }  # fmt: skip
    write_json(tmp_path / "gpu.json", measured)
    main(tmp_path / "gpu.json", tmp_path / "page.md")
    written = (tmp_path / "page.md").read_text()
    assert "measured, a card | TFLOP | share of the matrix rate |" in written and "| 24 ms | 6 | 32% |" in written
    assert "| 18.5 clips/s, at 70.1 GB |" in written and "| 36 GB, at 9.04 clips/s |" in written
    assert "| not run yet | 300 |  |" in written and written.endswith("More.\n")
    assert "rates, of bfloat16 matrix products and of copies (read and written): 788 TFLOP/s and 4.30 TB/s.\n" in written
    write_json(tmp_path / "gpu.json", {"part": "store"})
    with pytest.raises(SystemExit):
        main(tmp_path / "gpu.json", tmp_path / "page.md")
    assert "expected what `python -m stages.benchmark gpu" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_sentence(tmp_path: Path) -> None:
    """And needs no library of another part: a bare machine with a card has few."""
    absent = ("dvclive", "dvc", "metaworld", "mujoco", "gymnasium", "websockets", "msgpack", "matplotlib")
    command = f"import sys; sys.modules.update(dict.fromkeys({absent})); from stages.benchmark import app; app()"
    done = subprocess.run(
        [sys.executable, "-c", command, "gpu", str(tmp_path / "out.json"), "--scratch", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and not (tmp_path / "out.json").exists()
    assert done.stderr.startswith("error: the part gpu needs a CUDA GPU, and torch ") and len(done.stderr.splitlines()) == 1
    with_only = invoke(app, "store", tmp_path / "out.json", "--only", "control", "--params", ROOT / "params.yaml")
    assert with_only.exit_code == 1
