"""Depth Anything 3's backbone (Lin et al. 2025, arXiv 2511.10647, section 3) on the frames of a clip as views of one scene.

A DINOv2 whose later blocks attend in turn within each view and across all views. Read from the released layout, in which it
is part of a larger model: `config.json` with `config.net`, and `model.safetensors`. Source: the released code,
https://github.com/ByteDance-Seed/Depth-Anything-3, whose outputs these equal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svam.checkpoint import load_tensors, restore, save_tensors
from svam.files import FileError, write_json
from svam.models.layouts import NETS, depth_anything_3_net
from svam.models.published import freeze

Stage = Literal["first", "second", "third", "last"]
"""The four depths that the published dense head reads, by name. S-VAM's released code distils from the first."""
PREFIX = "model.backbone.pretrained."
OTHER_PARTS = ("model.head.", "model.cam_enc.", "model.cam_dec.", "model.gs_head.", "model.gs_adapter.")
"""Weights of the published model that the backbone does not use."""
CHOSEN_FROM = 3
"""Views from which on the reference view is chosen by content; of fewer it is the first."""
HEAD = 64
"""Channels of an attention head, as in every DINOv2."""


@dataclass(frozen=True)
class DepthAnything3Config:
    """As `config.net` has it, but for the sizes, which are those of the weights.

    out_layers: blocks that are read, from 0. alt_start, qknorm_start, rope_start: first block that attends across views (every
    odd one from here on does), that normalises queries and keys, that rotates them; -1: none. cat_token: tokens are joined with
    those of the last block within a view. width, positions: channels, and side of the learned positions in patches.
    gated: the MLPs are SwiGLUs (the giant model).
    """

    out_layers: tuple[int, ...]
    alt_start: int
    qknorm_start: int
    rope_start: int
    cat_token: bool
    width: int
    positions: int = 37
    patch_size: int = 14
    gated: bool = False

    @property
    def hidden_size(self) -> int:
        """Channels of a token that is given out; 2048 for the large model."""
        return self.width * (2 if self.cat_token else 1)


class _Attention(nn.Module):
    def __init__(self, width: int, normalised: bool) -> None:
        super().__init__()
        self.heads = width // HEAD
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(HEAD) if normalised else nn.Identity()
        self.k_norm = nn.LayerNorm(HEAD) if normalised else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, HEAD)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = _rotated(q, *rotation), _rotated(k, *rotation)
        seen: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return seen


class _MLP(nn.Module):
    def __init__(self, width: int, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        if gated:
            hidden = -(-int(4 * width * 2 / 3) // 8) * 8
            self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)
        else:
            self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, value = self.w12(x).chunk(2, dim=-1)
            return self.w3(F.silu(gate) * value)  # type: ignore[no-any-return]
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, width: int, normalised: bool, gated: bool) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), _Attention(width, normalised)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), _MLP(width, gated)
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.ones(width)}) for _ in range(2))

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.ls1["gamma"] * self.attn(self.norm1(x), rotation)
        mixed: Tensor = self.ls2["gamma"] * self.mlp(self.norm2(x))
        return x + mixed


class DepthAnything3(nn.Module):
    """(B, T, 3, S, S) normalised pixels of T views -> tokens (B, T * g * g, channels) of the last of `config.out_layers`, view
    by view; blocks after it do not exist."""

    def __init__(self, config: DepthAnything3Config) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, c.width, c.patch_size, c.patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + c.positions**2, c.width))
        if c.alt_start != -1:
            self.camera_token = nn.Parameter(torch.zeros(1, 2, c.width))
        self.blocks = nn.ModuleList(
            _Block(c.width, -1 < c.qknorm_start <= number, c.gated) for number in range(c.out_layers[-1] + 1)
        )
        self.norm = nn.LayerNorm(c.width)

    @classmethod
    def load(cls, folder: Path, stage: Stage = "last") -> DepthAnything3:
        """Read the backbone of what was published or what `save` wrote, up to the block of `stage`. Frozen, float32.

        Raises:
            FileError: missing or broken files, another layout, a stage that is not there, or weights that do not fit.
        """
        net, file = depth_anything_3_net(folder), folder / "model.safetensors"
        if stage != "last" and len(net["out_layers"]) != len(get_args(Stage)):
            raise FileError(f"{folder}/config.json: out_layers is {list(net['out_layers'])}: no stage {stage!r} of four")
        tensors = load_tensors(file)
        foreign = sorted(name for name in tensors if not name.startswith((PREFIX, *OTHER_PARTS)))
        state = {name.removeprefix(PREFIX): values.float() for name, values in tensors.items() if name.startswith(PREFIX)}
        if foreign or not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= state.keys():
            first = f", first {foreign[0]}" if foreign else ""
            raise FileError(
                f"{file}: not the layout of Depth Anything 3: {len(foreign)} weights outside of it{first}, and {len(state)} of "
                f"{PREFIX}*; the nested model holds two networks: take the single ones (DA3-SMALL to DA3-GIANT)"
            )
        model = cls(
            DepthAnything3Config(
                **net, width=state["cls_token"].shape[-1], positions=round((state["pos_embed"].shape[1] - 1) ** 0.5),
                patch_size=state["patch_embed.proj.weight"].shape[-1], gated="blocks.0.mlp.w3.weight" in state,
            )
        )  # fmt: skip
        restore(model, state, file)
        return freeze(model.until(stage))

    def until(self, stage: Stage) -> DepthAnything3:
        """This model without the blocks after `stage`, of its four; as it is for "last"."""
        if stage != "last":
            layers = self.config.out_layers[: get_args(Stage).index(stage) + 1]
            self.config = replace(self.config, out_layers=layers)
            del self.blocks[layers[-1] + 1 :]
        return self

    def save(self, folder: Path) -> None:
        """Write what `load` reads into an existing folder: the layout of the published model, with this part alone."""
        net = {name: getattr(self.config, name) for name in NETS["da3-large"]}
        write_json(folder / "config.json", {"config": {"net": net | {"out_layers": list(self.config.out_layers)}}})
        save_tensors(folder / "model.safetensors", {PREFIX + name: values for name, values in self.state_dict().items()})

    def forward(self, views: Tensor) -> Tensor:
        c, (batch, count) = self.config, views.shape[:2]
        x = self.patch_embed["proj"](views.flatten(0, 1))
        side = x.shape[-1]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1) + self._positions(side)
        within, across = _rotation(side, False, x), _rotation(side, True, x)
        local, reference = x, torch.zeros(batch, dtype=torch.long, device=x.device)
        for number, block in enumerate(self.blocks):
            rotates = -1 < c.rope_start <= number
            if number == c.alt_start - 1 and count >= CHOSEN_FROM:
                reference = reference_view(torch.unflatten(x[:, 0], 0, (batch, count)))
            if number == c.alt_start:
                other = torch.arange(count, device=x.device) != reference[:, None]
                x = torch.cat([self.camera_token[0, other.flatten().long(), None], x[:, 1:]], dim=1)
            if -1 < c.alt_start <= number and number % 2:
                rotation = tuple(part.repeat(count, 1, 1) for part in across)
                joined = block(torch.unflatten(x, 0, (batch, count)).flatten(1, 2), rotation if rotates else None)
                x = torch.unflatten(joined, 1, (count, -1)).flatten(0, 1)
            else:
                x = local = block(x, within if rotates else None)
        tokens = torch.cat([local, self.norm(x)], dim=-1) if c.cat_token else self.norm(x)
        return torch.unflatten(tokens[:, 1:], 0, (batch, count)).flatten(1, 2)

    def _positions(self, side: int) -> Tensor:
        """Learned positions on another grid. The odd scale factor is DINOv2's own, which the weights were trained with."""
        learned = self.config.positions
        if side == learned:
            return self.pos_embed
        grid = torch.unflatten(self.pos_embed[:, 1:], 1, (learned, learned)).permute(0, 3, 1, 2)
        resized = F.interpolate(grid, scale_factor=((side + 0.1) / learned,) * 2, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


def reference_view(tokens: Tensor) -> Tensor:
    """(B,) the view that is most ordinary by its class token (B, T, C): nearest to the middle of the views' ranges of likeness
    to the others, of length, and of variance over channels, summed (the released code's "saddle_balanced")."""
    length = tokens.norm(dim=-1)
    unit = tokens / length[..., None]
    alike = (unit @ unit.mT - torch.eye(tokens.shape[1], device=tokens.device)).sum(dim=-1) / (tokens.shape[1] - 1)
    off = torch.zeros_like(length)
    for measure in (alike, length, unit.var(dim=-1)):
        low, high = measure.amin(dim=1, keepdim=True), measure.amax(dim=1, keepdim=True)
        off = off + ((measure - low) / (high - low + 1e-8) - 0.5).abs()
    return off.argmin(dim=1)


def _rotation(side: int, shared: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (1 + side * side, 2 axes, HEAD / 4) by which queries and keys turn (rotary embedding, base 100): rows and
    columns count from 1 and the class token is at 0; `shared`: all patches are at 1, as across views."""
    places = torch.arange(1, side + 1, device=like.device)
    grid = places.new_ones(side**2, 2) if shared else torch.cartesian_prod(places, places)
    places = torch.cat([grid.new_zeros(1, 2), grid]).to(like.dtype)
    angles = places[..., None] / 100.0 ** (torch.arange(0, HEAD // 2, 2, device=like.device) / (HEAD // 2))
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, heads, N, HEAD), of which the first half turns by rows and the second by columns."""
    a, b = torch.unflatten(x, -1, (2, 2, -1)).unbind(dim=-2)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-2).flatten(-3)
