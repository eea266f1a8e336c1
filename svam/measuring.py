"""Sections of `params.yaml` that say what is measured and drawn of what was trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from svam.section import Count, Name, Positive, Section


class Foresight(Section):
    """What foresight holds, on held-out windows.

    clips: episodes and clips drawn. probe_frames: annotated frames of each side of the split for the depth probe, at most.
    resamples: of the episodes, for intervals. batch: frames computed at a time.
    """

    clips: Count = 3
    dpi: Annotated[int, Field(ge=50, le=300)] = 100
    probe_frames: Count = 800
    resamples: Annotated[int, Field(ge=1000)] = 10000
    batch: Count = 64


class Report(Section):
    """Figures."""

    clips: Count
    dpi: Annotated[int, Field(ge=50, le=300)]


class Benchmark(Section):
    """What is measured on demand. `window_shapes`: name -> (T, h, w, C) of a teacher's window. `parts` are those that can be
    stages of DVC: `repro` measures DVC itself, which has something to do while it runs a stage."""

    parts: list[
        Literal[
            "store", "teacher_cache", "memory", "conversion", "encode", "features", "evaluation", "rendering", "loader", "times"
        ]
    ] = []
    videos: str | None = None
    frames: Count = 2048
    conversion_frames: Count = 60000
    image_sizes: Annotated[list[Count], Field(min_length=1)] = [128]
    clip_frames: Count = 16
    strides: Annotated[list[Count], Field(min_length=1)] = [1, 4]
    action_chunk: Count = 8
    clips: Count = 32
    window_shapes: dict[Name, Annotated[list[Count], Field(min_length=4, max_length=4)]]
    window_megabytes: Positive = 256.0
    workers: Annotated[list[Count], Field(min_length=1)] = [1, 2]
    policy_steps: Count = 8
    evaluation_episodes: Count = 10
    rendered_task: Name = "drawer-open"
    rendered_sizes: Annotated[list[Annotated[int, Field(ge=16, le=512)]], Field(min_length=1)] = [64, 128]
    rendered_frames: Count = 24
    repeats: Count = 5
