"""The trained policy made ready to control a robot: on a GPU its passes are CUDA graphs of compiled kernels, in bfloat16.

Launched one by one from Python, thousands of kernels wait for the host: published sizes then take 131.6 ms an observation on
an H200, whose matrix units need a tenth of that. On a CPU nothing of this pays without changing bits: there weights that
autocast would round to bfloat16 are rounded beforehand, once, and results keep their bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from svam.errors import MachineError
from svam.models.svam import SVAM, Inputs
from svam.precision import computes_bfloat16, round_weights

WARM_UP = 3
"""Calls before a capture, which compile, choose algorithms and reserve their memory."""


class Graph:
    """A function of tensors on a GPU, recorded once as a CUDA graph and then played: one launch instead of thousands.

    Every call takes tensors of the shapes and dtypes of the `examples`, which are copied to where the graph reads.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], examples: Sequence[Tensor]) -> None:
        self._inputs = [example.clone() for example in examples]
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # On the stream of the warm-up: what libraries and compiled code keep for each stream is there, and nothing is compiled.
        with torch.cuda.graph(self._graph, stream=aside):
            self._outputs = list(function(*self._inputs))

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """What the function returns, in memory of its own."""
        for place, given in zip(self._inputs, inputs, strict=True):
            place.copy_(given)
        self._graph.replay()
        return [output.clone() for output in self._outputs]


def for_control(svam: SVAM, device: torch.device, batch: int = 1, compiled: bool = True) -> SVAM:
    """Move a policy that is still on the CPU to `device`, and on a GPU make `act`, `encode` and `sample` of `batch`
    observations fast; other numbers of them are computed launch by launch. In place; it can no longer be trained or saved.

    Weights of matrix products become bfloat16 on the way, so that the card never holds them in float32 (`to_bfloat16`), unless
    `train_policy.encode_bf16` was false or the GPU does not compute in it. Against the float32 path, features keep a cosine
    above 0.999 and actions differ by less than 1 % of their range (`tests/models/test_control.py`).

    compiled: by `torch.compile`, which takes a minute or two, needs a C compiler, and is remembered on the disk by torch.

    Raises:
        MachineError: the passes cannot be compiled or recorded here.
    """
    if device.type != "cuda" or "recorded" in svam.config.context:  # which nobody has who acts
        svam.foresight.frozen_on(device, compiled)
        return svam.to(device)
    drop_unused(svam)
    if svam.config.sampler.bf16 and computes_bfloat16(device):
        to_bfloat16(svam)
    svam.to(device)
    try:
        with torch.no_grad(), compiled_passes(svam) if compiled else nullcontext():
            record(svam, batch)
    except RuntimeError as error:
        said = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise MachineError(
            f"the policy cannot be made ready on {torch.cuda.get_device_name()}: {said[0].strip()}; a smaller batch needs less "
            "memory, and a server with --no-compile no compiler"
        ) from error
    return svam


def drop_unused(svam: SVAM) -> None:
    """Where the policy needs no generation, drop the up blocks after those that one step reads, which never run."""
    if svam.foresight.video is not None and not {"generated", "goal_frame"} & set(svam.config.context):
        del svam.foresight.video.unet.up_blocks[svam.config.sampler.up_blocks :]


def to_bfloat16(svam: SVAM) -> None:
    """Store in bfloat16, in place, the weights of all layers that run in it under autocast, which finds them as it would make
    them at every call: of video model, decouplers, teachers, and the policy but for its action sampler. That one is small, and
    its steps add up; it stays float32, as do the autoencoder and the text encoder."""
    foresight, network = svam.foresight, svam.network
    diffusion = network.diffusion
    modules: list[nn.Module | None] = [
        foresight.video, foresight.teachers, foresight.decouplers, network.observation, network.aggregators,
        diffusion.from_context, diffusion.from_text, diffusion.from_proprioception, diffusion.encoder,
    ]  # fmt: skip
    for module in modules:
        if module is not None:
            round_weights(module)
    for teacher in foresight.teachers.values():
        teacher.bf16 = True  # type: ignore[assignment]
    network.bf16 = True
    network.requires_grad_(False)


@contextmanager
def compiled_passes(svam: SVAM) -> Iterator[None]:
    """Within the block the large passes run compiled, for the shapes that they meet. The autoencoder's encoder and the
    teachers, which are small beside the video model, do not."""
    foresight, network = svam.foresight, svam.network
    passes: list[tuple[Any, str]] = [(module, "forward") for module in (*foresight.decouplers.values(), *network.aggregators)]
    passes += [(network.diffusion, "encode_context"), (network.diffusion, "raw")]
    passes += [(foresight.video, "raw")] if foresight.video is not None else []
    for owner, name in passes:
        setattr(owner, name, torch.compile(getattr(owner, name), dynamic=False))
    try:
        yield
    finally:
        for owner, name in passes:
            delattr(owner, name)


def record(svam: SVAM, batch: int) -> None:
    """Put graphs in the place of what `act` computes for `batch` observations: one from pictures to foresight, and one from
    foresight to actions, all steps of the sampler in it. Other batches, and other entries, find the function that was there."""
    _record_denoise(svam, _record_foresee(svam, batch))


def _record_foresee(svam: SVAM, batch: int) -> Inputs:
    """`ForesightModel.foresee`; what an example's inputs are like."""
    foresight, own = svam.foresight, svam.config.frozen_entries
    inputs = svam.encode([svam.example()] * batch)
    if not own:
        return inputs
    eager = foresight.foresee
    noise = foresight.video_model.initial_noise([0] * batch * foresight.views) if foresight.video is not None else None
    height, width = svam.config.image_size
    frames = torch.zeros(batch, foresight.views * height, width, 3, dtype=torch.uint8, device=svam.device)
    text = foresight.embed_text([svam.example().instruction] * batch)  # the policy's own may be pooled
    tensors = [frames, text, *([] if noise is None else [noise])]
    graph = Graph(lambda frames, text, noise=None: list(eager(frames, text, noise, own).values()), tensors)

    def foresee(frames_BHWC: Tensor, text: Tensor, noise: Tensor | None, entries: Sequence[str]) -> dict[str, Tensor]:
        if len(frames_BHWC) != batch or list(entries) != own:
            return eager(frames_BHWC, text, noise, entries)
        return dict(zip(own, graph(frames_BHWC, text, *([] if noise is None else [noise])), strict=True))

    foresight.foresee = foresee  # type: ignore[method-assign]
    return inputs


def _record_denoise(svam: SVAM, inputs: Inputs) -> None:
    """`PolicyNetwork.denoise`, for inputs like `inputs`."""
    network, eager = svam.network, svam.network.denoise
    names = [name for name in ("text", "frames", "proprioception") if getattr(inputs, name) is not None]
    entries, batch = list(inputs.entries), len(inputs.text)

    def tensors(inputs: Inputs, noise: Tensor) -> list[Tensor]:
        return [*(inputs.entries[entry] for entry in entries), *(getattr(inputs, name) for name in names), noise]

    def denoised(*values: Tensor) -> list[Tensor]:
        rest = dict(zip(names, values[len(entries) : -1], strict=True))
        return [eager(replace(inputs, entries=dict(zip(entries, values, strict=False)), **rest), values[-1])]

    shape = (batch, svam.config.chunk, svam.config.action_dimensions or svam.statistics.convention.dimensions)
    graph = Graph(denoised, tensors(inputs, torch.zeros(shape, device=svam.device)))

    def denoise(inputs: Inputs, noise_BKA: Tensor) -> Tensor:
        return graph(*tensors(inputs, noise_BKA))[0] if len(noise_BKA) == batch else eager(inputs, noise_BKA)

    network.denoise = denoise  # type: ignore[method-assign]
