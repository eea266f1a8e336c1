"""What a log file gets of a progress bar."""

from __future__ import annotations

import pytest

from svam.console import console, progress_bar


def test_a_line_tells_the_pace_once_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svam.console.SECONDS_PER_LINE", 0.0)
    bar, clock = progress_bar(), [0.0]
    bar.get_time = lambda: clock[0]
    with console.capture() as capture, bar:
        task = bar.add_task("films", total=4, note="")
        for _ in range(3):
            clock[0] += 40.0
            bar.advance(task)
    lines = capture.get().splitlines()[:3]
    assert lines == ["films 1/4 -", "films 2/4 40.0 s each, 80 s left", "films 3/4 40.0 s each, 40 s left"]
