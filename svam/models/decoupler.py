"""The decouplers: one-step features and the current frame's reference -> the teacher's features of the future.

Source: S-VAM section 3.3, "self-distilled decouplers". One class; the geometric and the semantic decoupler are two
configurations of it. Axes: B batch, T frames, h w feature grid, S = h*w, C_F channels of F, C_i channels of the teacher.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from svam.checkpoint import load_state, restore, save_module
from svam.contract import ContractError, Frozen
from svam.files import stated
from svam.models.attention import Block, Dropouts
from svam.sections import Count


class DecouplerConfig(Frozen):
    """Sizes, and what the inputs are. The released sizes are width 1024, 4 blocks, 8 heads, dropout 0.1.

    anchor: how the reference joins F: `concat` on channels (paper), or `add` of its 1x1 convolution (released code).
    reference: what the teacher saw for the reference in training, and must see in use: the current `frame` itself, or its
    `reconstruction` by the autoencoder. input_norm: what makes numbers of about 1 of F: the `statistics` of each channel, or a
    `layer` norm, behind a reference that is added (released code). positions: whether tokens know where and when they are
    (released code: not).
    """

    feature_channels: Count
    teacher_channels: Count
    frames: Count
    grid: tuple[Count, Count]
    reference: Literal["frame", "reconstruction"]
    anchor: Literal["concat", "add"]
    width: Count
    blocks: Count
    heads: Count
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    input_norm: Literal["statistics", "layer"] = "statistics"
    positions: bool = True


class FactorisedBlock(nn.Module):
    """Spatial attention over h*w within each frame, then temporal attention over T at each position, each with its MLP."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        dropouts = Dropouts(residual=dropout, mlp=dropout)
        self.spatial = Block(width, heads, dropouts)
        self.temporal = Block(width, heads, dropouts)

    def forward(self, x_BTSD: Tensor) -> Tensor:
        """The tokens after this block, (B, T, S, D)."""
        batch, frames, positions, width = x_BTSD.shape
        x: Tensor = self.spatial(x_BTSD.flatten(0, 1)).view_as(x_BTSD)
        x = self.temporal(x.transpose(1, 2).flatten(0, 1)).view(batch, positions, frames, width)
        return x.transpose(1, 2)


class Decoupler(nn.Module):
    """F (B, T, h, w, C_F) and the current frame's teacher features (B, h, w, C_i) -> teacher features (B, T, h, w, C_i)
    (S-VAM section 3.3).

    Per-channel means and deviations of F and of the teacher's features are buffers: inputs and outputs are in the units of
    the video model and of the teacher, and only the inside is normalised (F by a layer norm, if so configured). Reference and
    targets live in the teacher's one feature space, so they share its statistics.

    The output projection reads the last block's tokens beside the normalised reference (`project` and `repeat`). It starts
    at (0 | identity), so that training starts from "repeat the reference" instead of having to learn it; nothing holds the
    weights there, and with `repeat` at 0 the function is the paper's.
    """

    feature_mean: Tensor
    feature_std: Tensor
    teacher_mean: Tensor
    teacher_std: Tensor

    def __init__(self, config: DecouplerConfig) -> None:
        super().__init__()
        c = self.config = config
        for name, channels in (("feature", c.feature_channels), ("teacher", c.teacher_channels)):
            self.register_buffer(f"{name}_mean", torch.zeros(channels))
            self.register_buffer(f"{name}_std", torch.ones(channels))
        self.input_norm = nn.LayerNorm(c.feature_channels) if c.input_norm == "layer" else nn.Identity()
        # A linear map of a concatenation is the sum of two linear maps; the reference's is then computed once, not T times.
        self.embed = nn.Linear(c.feature_channels, c.width)
        self.anchor = nn.Linear(c.teacher_channels, c.width if c.anchor == "concat" else c.feature_channels)
        if c.positions:
            self.spatial_position = nn.Parameter(0.02 * torch.randn(c.grid[0] * c.grid[1], c.width))
            self.temporal_position = nn.Parameter(0.02 * torch.randn(c.frames, 1, c.width))
        self.blocks = nn.ModuleList(FactorisedBlock(c.width, c.heads, c.dropout) for _ in range(c.blocks))
        self.norm = nn.LayerNorm(c.width)
        self.project = nn.Linear(c.width, c.teacher_channels)
        self.repeat = nn.Linear(c.teacher_channels, c.teacher_channels, bias=False)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        nn.init.eye_(self.repeat.weight)

    @torch.no_grad()
    def set_statistics(self, feature: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> None:
        """Store (mean, standard deviation) per channel, from training windows. A constant channel gets deviation 1."""
        for name, (mean, std) in (("feature", feature), ("teacher", teacher)):
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_std").copy_(torch.where(std < 1e-6, torch.ones_like(std), std))

    def normalise(self, teacher_features: Tensor) -> Tensor:
        """(..., C_i) in the teacher's units to zero mean and unit deviation per channel, float32."""
        return (teacher_features.float() - self.teacher_mean) / self.teacher_std

    def normalised(self, features: Tensor, reference: Tensor) -> Tensor:
        """The prediction (B, T, h, w, C_i) in normalised units, which the loss compares with `normalise(targets)`.

        Raises:
            ContractError: a shape that this decoupler was not built for.
        """
        c = self.config
        b, (h, w) = len(features), c.grid
        if tuple(features.shape[1:]) != (c.frames, h, w, c.feature_channels):
            raise ContractError(
                f"one-step features have shape {tuple(features.shape)}, the decoupler expects "
                f"(B, {c.frames}, {h}, {w}, {c.feature_channels})"
            )
        if tuple(reference.shape) != (b, h, w, c.teacher_channels):
            raise ContractError(
                f"reference has shape {tuple(reference.shape)}, the decoupler expects ({b}, {h}, {w}, {c.teacher_channels})"
            )
        f = features.float()
        if c.input_norm == "statistics":
            f = (f - self.feature_mean) / self.feature_std
        y = self.normalise(reference).unsqueeze(1)
        added = c.anchor == "add"
        x = self.embed(self.input_norm(f + self.anchor(y) if added else f))
        x = (x if added else x + self.anchor(y)).view(b, c.frames, h * w, c.width)
        if c.positions:
            x = x + self.spatial_position + self.temporal_position
        for block in self.blocks:
            x = block(x)
        prediction = self.project(self.norm(x)).view(b, c.frames, h, w, c.teacher_channels)
        return prediction.float() + self.repeat(y).float()  # type: ignore[no-any-return]

    def forward(self, features: Tensor, reference: Tensor) -> Tensor:
        """Predicted teacher features (B, T, h, w, C_i), float32, in the teacher's units; arguments and errors as `normalised`.

        features: one-step features F (B, T, h, w, C_F), any float dtype. reference: teacher features of the current
        frame (B, h, w, C_i).
        """
        return self.normalised(features, reference) * self.teacher_std + self.teacher_mean

    def loss(self, features: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error to the teacher's features `targets` (B, T, h, w, C_i), per normalised channel (S-VAM eq. 5)."""
        return functional.mse_loss(self.normalised(features, reference), self.normalise(targets))

    def save(self, directory: Path) -> None:
        """Write `model.safetensors` (weights and statistics) and `config.json` into `directory`."""
        save_module(Path(directory), self, self.config.model_dump(mode="json"))

    @classmethod
    def load(cls, directory: Path) -> Decoupler:
        """Read what `save` wrote.

        Raises:
            FileError: a file is missing, truncated, of another schema, or does not fit the others.
        """
        directory = Path(directory)
        state, config = load_state(directory)
        decoupler = cls(stated(DecouplerConfig, config, directory / "config.json"))
        restore(decoupler, state, directory / "model.safetensors")
        return decoupler.eval()
