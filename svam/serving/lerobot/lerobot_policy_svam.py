"""`--policy.type=svam` of LeRobot: asks a server of `python -m svam.serving` what to do. No weights are loaded here.

LeRobot imports this module by the distribution's name, and finds the class of the configuration, that of the policy and the
function of the processors in it by their names.
"""

from __future__ import annotations

import os
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import AddBatchDimensionProcessorStep, DeviceProcessorStep, RenameObservationsProcessorStep
from lerobot.processor.factory import make_policy_processor_pipelines
from lerobot.utils.constants import OBS_IMAGE, OBS_STATE
from numpy.typing import NDArray
from PIL import Image

from svam.serving.client import PolicyClient
from svam.serving.protocol import ServingError

TURNS = {"none": (), "vertical": (0,), "horizontal": (1,), "rotate_180": (0, 1)}
"""What may be done to a picture -> the axes that are flipped."""
TRAINED_ELSEWHERE = "S-VAM is trained by its own pipeline, not by lerobot-train: dvc repro"


@PreTrainedConfig.register_subclass("svam")
@dataclass
class SvamConfig(PreTrainedConfig):  # type: ignore[misc]
    """url: of the server. key_env: environment variable with its key.

    camera: the key of the picture that is sent; None: the only one there is. turn: what is done to it, none | vertical |
    horizontal | rotate_180 (flipped along these axes). It is resized to what the server states, each pixel the mean of the area
    that it covers, as `convert` does.
    execute: actions of each chunk before the policy is asked again; None: all. sentences: sentences of LeRobot's, and those
    that are sent instead. connections: how many observations of a batch of environments are asked for at a time.
    reply_seconds: the longest wait for a reply.
    """

    device: str | None = "cpu"
    url: str = "ws://127.0.0.1:8000"
    key_env: str | None = None
    camera: str | None = None
    turn: str = "none"
    execute: int | None = None
    sentences: dict[str, str] = field(default_factory=dict)
    connections: int = 1
    reply_seconds: float = 60.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turn not in TURNS:
            raise ValueError(f"--policy.turn is {self.turn!r}, expected one of {', '.join(TURNS)}")

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> None:
        return None

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> Any:
        raise ServingError(TRAINED_ELSEWHERE)

    def get_scheduler_preset(self) -> None:
        return None

    def validate_features(self) -> None:
        """What observations must hold says the server, once it is asked."""


class SvamPolicy(PreTrainedPolicy):  # type: ignore[misc]
    """Chunks of actions from the server, one a time step from the present chunk.

    All environments of a batch are asked together, and execute as many actions each.
    """

    config_class = SvamConfig
    name = "svam"

    def __init__(self, config: SvamConfig, **_: Any) -> None:
        """Connect, and compare what the server states with what LeRobot's environment or data set has.

        Raises:
            ServingError: nobody answers at `config.url`, or its actions or chunks are of another length.
        """
        super().__init__(config)
        key = os.environ.get(config.key_env, "") if config.key_env else None
        if key == "":
            raise ServingError(f"--policy.key_env: the environment variable {config.key_env!r} is not set")
        self._clients = [
            PolicyClient(config.url, key=key, reply_seconds=config.reply_seconds) for _ in range(config.connections)
        ]
        self._threads = ThreadPoolExecutor(config.connections)
        self._stated = self._clients[0].metadata
        (self._height, self._width), *more = self._stated["cameras"].values()
        if more:
            raise ServingError(f"{config.url} looks at {len(more) + 1} cameras, of which LeRobot's plug-in can send one")
        feature, dimensions = config.action_feature, self._stated["action_dimensions"]
        if feature is not None and tuple(feature.shape) != (dimensions,):
            raise ServingError(f"{config.url} gives {dimensions} numbers an action, but LeRobot expects {tuple(feature.shape)}")
        if config.execute is not None and not 1 <= config.execute <= self._stated["chunk"]:
            raise ServingError(f"--policy.execute is {config.execute}, expected 1 to {self._stated['chunk']}, a whole chunk")
        self.reset()

    def reset(self) -> None:
        """Forget the present chunk, as a new episode begins."""
        self._waiting: deque[torch.Tensor] = deque()
        self._calls = 0

    def select_action(self, batch: dict[str, Any], **_: Any) -> torch.Tensor:
        """(B, A) float32: the next action of each environment."""
        if not self._waiting:
            self._waiting.extend(self.predict_action_chunk(batch)[:, : self.config.execute].unbind(dim=1))
        return self._waiting.popleft()

    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> torch.Tensor:
        """(B, K, A) float32 in physical units, asked for in `connections` threads.

        Raises:
            ServingError: no picture, several and none is named, or no proprioception; or see `PolicyClient.infer`.
        """
        requests = [self._request(batch, row) for row in range(len(self._pictures(batch)))]
        self._calls += 1
        chunks = list(self._threads.map(PolicyClient.actions, cycle(self._clients), requests))
        return torch.from_numpy(np.stack(chunks))

    def _pictures(self, batch: dict[str, Any]) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1]."""
        keys = [key for key in batch if key == OBS_IMAGE or key.startswith(f"{OBS_IMAGE}s.")]
        key = self.config.camera or (keys[0] if len(keys) == 1 else None)
        if key not in batch:
            raise ServingError(f"--policy.camera is {self.config.camera}, expected one of {', '.join(keys) or 'no pictures'}")
        pictures: torch.Tensor = batch[key]
        return pictures

    def _request(self, batch: dict[str, Any], row: int) -> dict[str, Any]:
        """The observation of one environment, as svam/serving/README.md has it."""
        sentence = batch["task"][row]
        picture = self._picture(self._pictures(batch)[row])
        request = {"observation/image": picture, "prompt": self.config.sentences.get(sentence, sentence)}
        if self._stated["proprioception"] is not None:
            if OBS_STATE not in batch:
                raise ServingError(f"{self.config.url} needs proprioception, but LeRobot gives no {OBS_STATE}")
            request["observation/state"] = batch[OBS_STATE][row].numpy(force=True).astype(np.float32)
        if self._stated.get("takes_seed") is True:  # else a robot that stands still would be told the same for ever
            request["seed"] = zlib.crc32(picture.tobytes()) << 24 | self._calls % 2**24
        return request

    def _picture(self, picture: torch.Tensor) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 as the policy was trained on, of LeRobot's (3, H, W) in [0, 1]."""
        levels = (picture.float() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy(force=True)
        levels = np.flip(levels, TURNS[self.config.turn])
        height, width = levels.shape[:2]
        if height * self._width != width * self._height:
            raise ServingError(
                f"pictures of {height} x {width} pixels have another aspect than the {self._height} x {self._width} that "
                f"{self.config.url} needs"
            )
        smaller = self._height <= height
        size = (self._width, self._height)
        image = Image.fromarray(np.ascontiguousarray(levels))
        return np.asarray(image.resize(size, Image.Resampling.BOX if smaller else Image.Resampling.BILINEAR))

    def forward(self, batch: dict[str, Any]) -> Any:
        raise ServingError(TRAINED_ELSEWHERE)

    def get_optim_params(self) -> Any:
        raise ServingError(TRAINED_ELSEWHERE)


def make_svam_pre_post_processors(config: SvamConfig, dataset_stats: Any = None) -> Any:
    """Nothing is normalised: pictures go out as they come, and actions come in physical units."""
    before = [
        RenameObservationsProcessorStep(rename_map={}),
        AddBatchDimensionProcessorStep(),
        DeviceProcessorStep(device="cpu"),
    ]
    return make_policy_processor_pipelines(before, [DeviceProcessorStep(device="cpu")])
