"""From a message to an observation: which names a request may use, and what each must hold. README.md has them as a table."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svam.contract import ContractError, Observation
from svam.errors import did_you_mean
from svam.models.svam import SVAM
from svam.serving.protocol import unpack

SENTENCE = 1000
"""Most characters of a prompt."""
STATE = ("observation/state", "state")
KEYS = ("prompt", "seed", "images", "observation/image", *STATE)


@dataclass(frozen=True)
class Request:
    """One observation to act on, and the seed of its sampling noise."""

    observation: Observation
    seed: int


def read_request(message: bytes | str, svam: SVAM) -> Request:
    """The request in a message, checked against what the policy `svam` was trained on.

    The noise is keyed by the request's `seed`; without one by the picture, the state and the sentence themselves. So a reply
    depends on its request alone, and not on who asked before or beside it: a request that is sent again after a lost
    connection gets the same chunk. A client that wants other noise for the same observation sends a seed.

    Raises:
        ProtocolError: the message is not of the format.
        ContractError: a key is missing, unknown, or holds something else than the policy was trained on; names it.
    """
    request = unpack(message) if isinstance(message, bytes) else message
    if not isinstance(request, dict) or not all(isinstance(key, str) for key in request):
        found = "a text frame" if isinstance(request, str) else type(request).__name__
        raise ContractError(f"observation: found {found}, expected a msgpack map with text keys, such as 'prompt'")
    for key, value in request.items():
        known = key in KEYS or key in svam.cameras or key.startswith("observation/")
        # Further arrays are other cameras and sensors, which a client may send to any server; another key is a slip.
        if not known and not isinstance(value, np.ndarray | np.generic):
            raise ContractError(f"observation: unknown key {key[:80]!r}{did_you_mean(key[:80], [*KEYS, *svam.cameras])}")
    prompt = request.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip() or len(prompt) > SENTENCE:
        found = f"a text of {len(prompt)} characters" if isinstance(prompt, str) else type(prompt).__name__
        raise ContractError(f"observation: 'prompt' is {found}, expected a sentence of at most {SENTENCE} characters")
    state = _state(request) if svam.needs_proprioception else None
    frames = {camera: _picture(request, camera, len(svam.cameras) == 1) for camera in svam.cameras}
    observation = Observation(frames, prompt, state)
    svam.check(observation)
    return Request(observation, _seed(request.get("seed"), observation))


def _picture(request: Mapping[str, Any], camera: str, alone: bool) -> NDArray[np.uint8]:
    """The picture of `camera`: under its name, or, where it is `alone`, as the one picture."""
    images = request.get("images")
    places = [(camera, request), (f"observation/{camera}", request), (camera, images if isinstance(images, dict) else {})]
    places += [("observation/image", request)] if alone else []
    for key, holder in places:
        if key in holder:
            if not isinstance(holder[key], np.ndarray):
                raise ContractError(f"observation: '{key}' is {type(holder[key]).__name__}, expected an array (H, W, 3) uint8")
            picture: NDArray[np.uint8] = holder[key]
            return picture
    raise ContractError(
        f"observation: no picture of camera '{camera}', on which the policy was trained; send it as '{camera}' or "
        f"'observation/{'image' if alone else camera}' (found {str(sorted(request))[:200]})"
    )


def _state(request: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """Proprioception as float32; what it must be like is `SVAM.check`'s."""
    for key in STATE:
        if key in request:
            value = request[key]
            if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
                found = f"{value.dtype} array" if isinstance(value, np.ndarray) else type(value).__name__
                raise ContractError(f"observation: '{key}' is {found}, expected an array of numbers")
            with np.errstate(over="ignore"):  # a number above float32's range becomes infinity, which is refused
                return value.astype(np.float32)
    return None


def _seed(given: Any, observation: Observation) -> int:
    """The given seed, or one of the observation's content: 63 bits either way."""
    if given is not None:
        value = given.item() if isinstance(given, np.integer) else given
        if type(value) is not int or not 0 <= value < 2**63:
            raise ContractError(f"observation: 'seed' is {str(given)[:40]}, expected a whole number from 0 to 2^63 - 1")
        return value
    state = observation.proprioception
    digest = hashlib.sha256(observation.instruction.encode())
    for picture in observation.frames.values():
        digest.update(picture.tobytes())
    digest.update(b"" if state is None else state.tobytes())
    return int.from_bytes(digest.digest()[:8], "little") >> 1
