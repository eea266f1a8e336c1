"""The plug-in of LeRobot, in LeRobot's own environment, where one is named."""

from __future__ import annotations

import json
import os
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

from svam.serving.client import PolicyClient
from svam.simulation.metaworld import TaskEnvironment
from svam.simulation.rendering import choose_backend
from tests.episodes.test_export import NEEDS_LEROBOT, PYTHON
from tests.serving.conftest import MakeServer, start_command

pytestmark = NEEDS_LEROBOT
POLICY = """
import json
import sys
import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies import make_policy, make_pre_post_processors
from lerobot.utils.import_utils import register_third_party_plugins

class Environment:
    features = {"a": PolicyFeature(type=FeatureType.ACTION, shape=(int(sys.argv[3]),))}
    features_map = {"a": "action"}

register_third_party_plugins()
config = PreTrainedConfig.get_choice_class("svam")(
    url=sys.argv[1], execute=3, turn="vertical", sentences={"Push": "push a"}, connections=2
)
policy = make_policy(config, env_cfg=Environment())
before, after = make_pre_post_processors(config)
sent = np.load(sys.argv[2])
batch = {"observation.image": torch.from_numpy(sent["pictures"]).permute(0, 3, 1, 2).float() / 255, "task": ["Push", "push a"]}
batch["observation.state"] = torch.from_numpy(sent["states"])
policy.reset()
actions = [after(policy.select_action(before(dict(batch)))).numpy().tolist() for _ in range(4)]
print(json.dumps(actions))
"""
PICTURE = """
import sys
import numpy as np
from lerobot.envs.metaworld import MetaworldEnv

environment = MetaworldEnv("drawer-open-v3", obs_type="pixels_agent_pos")
environment.reset(seed=3)
for _ in range(20):
    seen = environment.step(np.array([0.0, 1.0, -1.0, 0.5], np.float32))[0]
np.savez(sys.argv[1], picture=seen["pixels"], state=seen["agent_pos"])
environment.close()
"""


def call(*command: object, folder: Path) -> str:
    """What LeRobot's environment says, without a network."""
    choose_backend()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "HF_LEROBOT_HOME": str(folder / "lerobot")}
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        environment.pop(name, None)
    done = subprocess.run(
        [str(part) for part in command], env=environment, cwd=folder, capture_output=True, text=True, timeout=880, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_policy_asks_the_server(make_server: MakeServer, tmp_path: Path) -> None:
    """Two environments, whose pictures are larger and upside down: the actions are those of the same observations."""
    rng = np.random.default_rng(0)
    small, states = rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8), rng.normal(size=(2, 2)).astype(np.float32)
    np.savez(tmp_path / "sent.npz", pictures=np.kron(small[:, ::-1], np.ones((1, 3, 3, 1), np.uint8)), states=states)
    with make_server() as running:
        said = call(PYTHON, "-c", POLICY, running.url, tmp_path / "sent.npz", 3, folder=tmp_path)
        actions = np.array(json.loads(said.strip().splitlines()[-1]), np.float32)
        with PolicyClient(running.url) as client:
            for row in (0, 1):
                request = {"observation/image": small[row], "observation/state": states[row], "prompt": "push a"}
                seeds = [zlib.crc32(small[row].tobytes()) << 24 | number for number in (0, 1)]
                first, second = (client.actions({**request, "seed": seed}) for seed in seeds)
                assert np.array_equal(actions[:3, row], first[:3]) and np.array_equal(actions[3, row], second[0])
                assert not np.array_equal(first, second)


def test_pictures_of_metaworld_are_turned_as_ours(tmp_path: Path) -> None:
    """The same episode in both: the upright one of four ways to turn LeRobot's picture is nearest to ours, by far."""
    call(PYTHON, "-c", PICTURE, tmp_path / "seen.npz", folder=tmp_path)
    seen = np.load(tmp_path / "seen.npz")
    environment = TaskEnvironment("drawer-open", 480, render="full")
    environment.reset(3)
    for _ in range(20):
        environment.step(np.array([0.0, 1.0, -1.0, 0.5], np.float32))
    own = environment.observe()["corner2"].astype(float)
    state = environment.proprioception()
    environment.close()
    turned = {axes: np.abs(np.flip(seen["picture"], axes) - own).mean() for axes in ((), (0,), (1,), (0, 1))}
    assert turned[()] < 0.3 * min(value for axes, value in turned.items() if axes), turned
    assert seen["state"] == pytest.approx(state, abs=0.01)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lerobot_eval(evaluated: Path, tmp_path: Path) -> None:
    """The whole command, on an untrained S-VAM, which solves nothing."""
    server = start_command(evaluated / "svam", log=subprocess.DEVNULL)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        call(
            Path(PYTHON).parent / "lerobot-eval", "--policy.type=svam", f"--policy.url={url}", "--env.type=metaworld",
            "--env.task=window-close-v3", "--eval.n_episodes=1", "--eval.batch_size=1", f"--output_dir={tmp_path}/out",
            '--policy.sentences={"Push and close a window": "window-close a"}', folder=tmp_path,
        )  # fmt: skip
    finally:
        server.terminate()
        server.wait(20)
    found = json.loads((tmp_path / "out/eval_info.json").read_text())
    assert found["overall"]["n_episodes"] == 1 and found["overall"]["pc_success"] == 0.0
