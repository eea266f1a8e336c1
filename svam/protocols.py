"""The section `evaluate` of the params: a section for each protocol, and one for a policy that another program serves."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from svam.sections import Count, Distinct, Name, Positive, Section

LiberoSuite = Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"]


class EvaluateMetaworld(Section):
    """The protocol `metaworld`: `episodes` of each task, in a look of `svam.simulation.looks`."""

    tasks: Annotated[list[Name], Distinct]
    episodes: Count
    held_out_instruction_episodes: Annotated[int, Field(ge=0)]
    max_steps: Annotated[int, Field(ge=10, le=500)]
    look: Name


class EvaluateOffline(Section):
    """The protocol `offline`: `samples` action chunks for each of `windows` held-out observations."""

    windows: Count
    samples: Count


class EvaluateCalvin(Section):
    """The protocol `calvin`: chains of subtasks in the user's checkout of the simulator.

    path, commit: of a git checkout of calvin_env. chains: of the official ones, the first that begin with as many `subtasks` of
    `tasks` (empty: any). max_steps: of a subtask.
    """

    path: str | None
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{7,40}$")]
    renderer: Literal["cpu", "egl"]
    chains: Annotated[int, Field(ge=1, le=1000)]
    subtasks: Annotated[int, Field(ge=1, le=5)]
    tasks: Annotated[list[Name], Distinct]
    max_steps: Count


class EvaluateLibero(Section):
    """The protocol `libero`: `episodes` official initial states of each task; pictures `drawn` pixels wide, then resized."""

    suites: Annotated[list[LiberoSuite], Field(min_length=1), Distinct]
    tasks: Annotated[list[str], Distinct]
    episodes: Annotated[int, Field(ge=1, le=50)]
    max_steps: Count | None
    drawn: Annotated[int, Field(ge=32, le=1024)]
    render: Literal["fast", "full"]
    flip: Literal["none", "vertical", "rotate_180"]


class RemotePolicy(Section):
    """A policy server that speaks openpi's websocket protocol: `svam.evaluation.remote`."""

    url: Annotated[str, Field(pattern=r"^wss?://\S+$")] | None
    key_env: str | None
    weights: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    image_size: Annotated[int, Field(ge=16, le=1024)] | None
    cameras: Annotated[list[str], Field(min_length=1), Distinct]
    reply_seconds: Positive
    connections: Count


class Evaluate(Section):
    """What is measured of which policy: a section for each protocol, and one for a policy that another program serves."""

    protocols: Annotated[list[Literal["metaworld", "calvin", "libero", "offline"]], Field(min_length=1), Distinct]
    policy: Literal["svam", "remote", "expert", "random"]
    execute: Count
    batch: Count
    videos: Annotated[int, Field(ge=0)]
    record_actions: bool
    metaworld: EvaluateMetaworld
    calvin: EvaluateCalvin
    libero: EvaluateLibero
    offline: EvaluateOffline
    remote: RemotePolicy

    @model_validator(mode="after")
    def _policy_can_be_asked(self) -> Self:
        if self.policy == "remote" and self.remote.url is None:
            raise ValueError("policy is 'remote' but remote.url is null: name a server, such as ws://127.0.0.1:8000")
        if self.policy != "svam" and "offline" in self.protocols:
            raise ValueError(
                f"policy is {self.policy!r}, but the protocol 'offline' compares what S-VAM foresees: leave it out of protocols"
            )
        return self
