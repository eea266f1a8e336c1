"""Which figures a run gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from svam.files import FileError
from svam.params import Report
from svam.report import figures
from svam.report.tables import Measured, teacher_table


def draw_all(
    folder: Path, measured: Measured, curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], results: Path, video: Path,
    params: Report,
) -> None:  # fmt: skip
    """Write every figure that the run has numbers for as PNG into `folder`.

    Raises:
        FileError: a picture or array of an earlier stage is missing or damaged.
    """
    drawn: dict[str, Any] = {}
    if measured.success:
        drawn["success"] = figures.success_figure(measured)
    if measured.decouplers:
        drawn["distillation"] = figures.distillation_figure(measured)
    if teacher_table(measured):
        drawn["teachers"] = figures.teacher_figure(measured)
    if curves:
        drawn["curves"] = figures.curve_figure(curves)
    title = "Held-out clips: the truth through the autoencoder, and below it the generation"
    drawn["clips"] = figures.picture_figure(video / "samples.png", title)
    if "offline" in measured.results:
        drawn["actions"] = figures.action_figure(measured.results["offline"])
        arrays = load_arrays(results / "foresight.npz")
        for clip in range(min(params.clips, len(arrays.get("frames", ())))):
            drawn[f"foresight_{clip}"] = figures.foresight_figure(arrays, clip)
    for name, figure in drawn.items():
        figures.save(figure, folder / f"{name}.png", params.dpi)


def load_arrays(file: Path) -> dict[str, Any]:
    """All arrays of a .npz file.

    Raises:
        FileError: it is missing or damaged.
    """
    try:
        with np.load(file) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
        raise FileError(f"{file}: missing or damaged ({error})") from None
