"""The foresight stage's numbers as one figure: the gap with its intervals, depth by source, attention by frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure

from svam.analysis.depth_probe import SOURCES
from svam.analysis.gap import MEASURES

FINDINGS = {"better": "#1f77b4", "worse": "#d6604d", "not distinguishable": "#999999"}


def measures_figure(metrics: Mapping[str, Any]) -> Any:
    """`metrics`: those of the stage, with `gap`, and `depth` and `attention` where they were measured."""
    panels = [name for name in ("gap", "depth", "attention") if name in metrics]
    widths = {"gap": 5.0, "depth": 4.0, "attention": 3.2}
    figure = Figure(figsize=(sum(widths[name] for name in panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=[widths[name] for name in panels])[0]
    draw: dict[str, Callable[[Any, Any], None]] = {"gap": _draw_gap, "depth": _draw_depth, "attention": _draw_attention}
    for name, axis in zip(panels, axes, strict=True):
        draw[name](axis, metrics[name])
        axis.tick_params(labelsize=7)
    return figure


def _draw_gap(axis: Any, result: Mapping[str, Any]) -> None:
    """Multi-step minus one step, every measure turned so that the right is better."""
    for place, (name, line) in enumerate(result["difference"].items()):
        sign = 1.0 if MEASURES[name].better == "higher" else -1.0
        low, high = sorted((sign * line["low"], sign * line["high"]))
        axis.plot([low, high], [place, place], color=FINDINGS[line["finding"]], linewidth=2.0)
        axis.plot(sign * line["value"], place, "o", color=FINDINGS[line["finding"]], markersize=4)
    axis.axvline(0.0, color="black", linewidth=0.5)
    axis.set_yticks(range(len(result["difference"])), list(result["difference"]))
    axis.invert_yaxis()
    axis.set_title("Multi-step against one step: right of 0 is better", fontsize=8)


def _draw_depth(axis: Any, result: Mapping[str, Any]) -> None:
    """Root mean squared error by source, where something moved if anything did."""
    shown = [name for name in SOURCES if name in result["sources"]]
    key = "moved_rmse_m" if all("moved_rmse_m" in result["sources"][name] for name in shown) else "rmse_m"
    colours = ["#1f77b4" if name == "geometric" else "#bbbbbb" for name in shown]
    axis.barh([SOURCES[name] for name in shown], [result["sources"][name][key] for name in shown], color=colours)
    axis.invert_yaxis()
    axis.set_title(f"Depth of the future, error in m{' where it moved' if key != 'rmse_m' else ''}", fontsize=8)


def _draw_attention(axis: Any, lines: list[Mapping[str, float]]) -> None:
    """Attention on patches that moved, beside their share."""
    frames = [line["frame"] for line in lines]
    axis.plot(frames, [line["on_moved"] for line in lines], color="#1f77b4", marker="o", markersize=3, label="attention")
    axis.plot(frames, [line["moved"] for line in lines], color="#bbbbbb", marker="o", markersize=3, label="patches (uniform)")
    axis.set_ylim(0.0, 1.0)
    axis.set_xlabel("frames ahead", fontsize=7)
    axis.legend(fontsize=7)
    axis.set_title("Share on patches that moved", fontsize=8)
