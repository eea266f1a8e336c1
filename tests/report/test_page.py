"""The page of a run: what it says, that sentences of data stay text, and how a real browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from svam.files import read_yaml
from svam.params import Params, load_params
from svam.report.defaults import ELSEWHERE, FILE, changed_params, defaults_text
from svam.report.page import FOLDER, divided, rendered
from svam.report.published import PUBLISHED, TASKS
from tests import ROOT
from tests.report.test_report import SENTENCE, invoke, write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = (Path(__file__).parent / "probe.js").read_text(encoding="utf-8")
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><body style="margin: 0">
<iframe src="probed.html" style="width: {width}px; height: 900px; border: 0"></iframe>
<script>
onload = () => document.body.append(document.querySelector("iframe").contentDocument.querySelector("#findings"));
</script>
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like `data`: report and films as the stage writes them, and what other stages and commands leave beside."""
    root = tmp_path_factory.mktemp("data")
    result = invoke(write_run(root / "run"), root / "report")
    assert result.exit_code == 0, result.output
    (root / "foresight").mkdir()
    for name in ("measures", "depth", "attention", "sequence_0"):
        Image.new("RGB", (300, 200), "teal").save(root / f"foresight/{name}.png")
    (root / "compare").mkdir()
    (root / "compare/index.html").write_text(rendered("Comparisons", "None.", []), encoding="utf-8")
    return root


class Seen(HTMLParser):
    """The text of a page, its elements, and the addresses that it names."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.text, self.elements, self.addresses = "", list[str](), set[str]()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.addresses |= {value for key, value in attrs if key in ("src", "href", "data", "poster") and value}

    def handle_endtag(self, tag: str) -> None:
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_figure_and_film_is_on_the_page_and_every_address_leads_to_a_file(data: Path) -> None:
    report = data / "report"
    seen = Seen(report / "index.html")
    files = {address for address in seen.addresses if not address.startswith(("#", "https://arxiv.org/"))}
    missing = {address for address in files if not (report / address).is_file()}
    assert missing == {"../foresight/foresight.md"}  # the folder above has pictures alone
    drawn = {file.relative_to(report).as_posix() for file in report.rglob("*.png")}
    assert drawn | {"../films/reach_0.mp4", "../foresight/attention.png", "../compare/index.html"} <= files


def test_the_page_says_what_was_measured_beside_what_was_published(data: Path) -> None:
    text = " ".join(Seen(data / "report/index.html").text.split())
    assert "A look, not a result." in text and "S-VAM 50% (25% to 75%)" in text
    # One of 28 easy tasks, none of 11 medium ones, and of hard and very hard ones two.
    row = re.search(r"S-VAM, this run (.*?) random actions, this run", text)
    assert row and row[1] == "100% (51% to 100%), 1 of 28 tasks 25% (7% to 59%), 2 of 11 tasks 50% (25% to 75%), 3 of 50 tasks"
    assert "VPP, published 81.8% 49.3% 52.6% 68.2% 61.2%" in text
    assert "policy 6 24 2.5 abababababababab" in text
    assert "An episode took 10 steps, of at most 500, and 3.5 calls of the policy on average" in text
    assert "distill.width 32 96" in text and "benchmark" not in text.split("param here default")[1].split("Published")[0]


def test_a_sentence_of_the_data_is_text(data: Path) -> None:
    seen = Seen(data / "report/index.html")
    assert SENTENCE in seen.text
    assert "script" not in seen.elements
    hostile = rendered(SENTENCE, f"{SENTENCE} ![x](https://example.org/x.png) [y](javascript:alert)", [])
    assert "<script" not in hostile and "<img" not in hostile and 'href="javascript' not in hostile
    assert divided(f"# {SENTENCE}\n\nhead\n\n## {SENTENCE}\n\n{SENTENCE}")[2][SENTENCE].startswith("<p>reach &lt;script&gt;")


def test_published_means_are_over_tasks() -> None:
    """Of 28, 11 and 11 tasks, to half a point (for some methods the table's own figures agree no better); chains give their
    mean length."""
    assert [len(tasks) for tasks in TASKS.values()] == [28, 11, 11, 50]
    for easy, middle, hard, mean in PUBLISHED["metaworld"]["rows"].values():
        assert mean == pytest.approx((28 * easy + 11 * middle + 11 * hard) / 50, abs=0.6)
    for *rates, length in PUBLISHED["calvin"]["rows"].values():
        assert length == pytest.approx(sum(rates) / 100, abs=0.0051)
    *parts, total = PUBLISHED["latency"]["rows"]["S-VAM"]
    assert total == pytest.approx(sum(parts))


def test_the_defaults_are_those_of_the_project() -> None:
    """After a change of params.yaml that is meant for everybody: `python -m svam.report.defaults`."""
    params = load_params(ROOT / "params.yaml")
    assert changed_params(params) == []
    assert FILE.read_text(encoding="utf-8") == defaults_text(params)
    other = params.model_copy(update={"seed": 5, "convert": params.convert.model_copy(update={"instruction": SENTENCE})})
    assert changed_params(other) == [("seed", "5", "1"), ("convert.instruction", json.dumps(SENTENCE), "null")]


def test_the_stage_depends_on_all_that_the_page_shows() -> None:
    report: Mapping[str, Any] = read_yaml(ROOT / "dvc.yaml")["stages"]["report"]
    assert report["params"] == [name for name in Params.model_fields if name not in ELSEWHERE]
    not_code = {f"svam/report/{file.name}" for file in FOLDER.iterdir() if file.suffix in (".html", ".css")}
    assert not_code == {dep for dep in report["deps"] if dep.startswith("svam/")}


def look(page: Path, width: int, scheme: str) -> dict[str, Any]:
    """What a browser finds on a copy of the page that reports about itself, in a frame of that many pixels (a window cannot be
    as narrow as a phone)."""
    if BROWSER is None:
        pytest.skip("no browser is installed: apt-get install chromium")
    probed = page.with_name("probed.html")
    html = page.read_text(encoding="utf-8")
    probed.write_text(html.replace("<head>", f"<head><script>{PROBE}</script>", 1), encoding="utf-8")
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(width=width), encoding="utf-8")
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
            f"--user-data-dir={page.parents[1] / 'profile'}", "--window-size=1400,900", "--hide-scrollbars",
            "--allow-file-access-from-files", f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
            "--dump-dom", frame.as_uri(),
        ],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    probed.unlink()
    frame.unlink()
    found = re.search(r'<pre id="findings">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    findings: dict[str, Any] = json.loads(unescape(found[1]))
    findings["console"] = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return findings


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1280, "light")])
def test_a_browser_shows_the_page(data: Path, width: int, scheme: str) -> None:
    found = look(data / "report/index.html", width, scheme)
    assert found["console"] == [] and found["faults"] == []
    assert found["width"] == width and found["overflow"] == 0
    assert found["title"] == "S-VAM: results of a run"
    pictures = Seen(data / "report/index.html").elements
    assert found["pictures"] == [True] * pictures.count("img") and found["objects"] == [True] * pictures.count("object")
    assert found["films"] == [[2 * 192, 192 + 16]]
    paper, ink = found["paper"], found["ink"]
    assert (paper < 64 and ink > 192) if scheme == "dark" else (paper > 192 and ink < 64)


def test_a_browser_shows_that_a_picture_was_not_drawn(data: Path, tmp_path: Path) -> None:
    """A run without the stage `foresight`, and a clone without the films."""
    shutil.copytree(data / "report", tmp_path / "report")
    found = look(tmp_path / "report/index.html", 390, "light")
    assert found["objects"] == [False] * 4 and found["films"] == [None] and found["overflow"] == 0
    assert found["pictures"] and all(found["pictures"])
