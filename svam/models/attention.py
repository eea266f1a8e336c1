"""The one attention and the one MLP: of the decouplers, the Uni-Perceiver, the action transformer and the U-Net."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from svam.errors import ParamsError


def fused(device: torch.device) -> bool:
    """Whether attention runs as torch's fused kernel on this device.

    Sequences are short here (grids of patches, frames of a clip, sentences, chunks of actions). On a CPU the fused kernel is
    then several times slower than the two matrix products written out (bf16, L = 64: 86 against 19 ms forward and backward).
    """
    return device.type != "cpu"


def attention_weights(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T), (N, heads, L, S), of queries (N, heads, L, d) and keys (N, heads, S, d); default scale d^-1/2."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.matmul(q * scale, k.transpose(-1, -2)).softmax(dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, dropout: float = 0.0) -> Tensor:
    """softmax(scale q k^T) v, (N, heads, L, d), of queries (N, heads, L, d), keys and values (N, heads, S, d); `dropout`: the
    share of the weights that is dropped."""
    if fused(q.device):
        return functional.scaled_dot_product_attention(q, k, v, scale=scale, dropout_p=dropout)
    weights = attention_weights(q, k, scale)
    return torch.matmul(functional.dropout(weights, dropout) if dropout else weights, v)


def split_heads(x_NLD: Tensor, heads: int) -> Tensor:
    """(N, L, heads * d) to (N, heads, L, d)."""
    n, length, width = x_NLD.shape
    return x_NLD.view(n, length, heads, width // heads).transpose(1, 2)


def join_heads(x_NHLd: Tensor) -> Tensor:
    """(N, heads, L, d) to (N, L, heads * d)."""
    return x_NHLd.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself or to another one."""

    def __init__(self, width: int, heads: int, head_width: int | None = None, dropout: float = 0.0) -> None:
        """Args: channels of the tokens; heads, and the channels of each (None: their share of `width`); the share of attention
        weights that is dropped in training. Raises `ParamsError` if the heads do not divide the width that they share."""
        super().__init__()
        if head_width is None and width % heads:
            raise ParamsError(f"attention: width ({width}) must be a multiple of heads ({heads})")
        self.heads, self.dropout = heads, dropout
        inner = heads * (head_width or width // heads)
        self.qkv = nn.Linear(width, 3 * inner)
        self.out = nn.Linear(inner, width)

    def forward(self, x_NLD: Tensor, context_NSD: Tensor | None = None) -> Tensor:
        """What (N, L, D) tokens read from the context's (N, S, D), or from one another where there is none: (N, L, D)."""
        if context_NSD is None:
            q, k, v = self.qkv(x_NLD).chunk(3, dim=-1)
        else:
            weight, bias, inner = self.qkv.weight, self.qkv.bias, self.out.in_features
            q = functional.linear(x_NLD, weight[:inner], bias[:inner])
            k, v = functional.linear(context_NSD, weight[inner:], bias[inner:]).chunk(2, dim=-1)
        q, k, v = (split_heads(x, self.heads) for x in (q, k, v))
        read: Tensor = self.out(join_heads(attend(q, k, v, dropout=self.dropout if self.training else 0.0)))
        return read


def mlp(width: int) -> nn.Sequential:
    """Two layers, four times the width between them."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Dropouts(NamedTuple):
    """What a transformer layer drops in training: shares of attention weights, of what attention adds, of what the MLP adds."""

    attention: float = 0.0
    residual: float = 0.0
    mlp: float = 0.0


class Block(nn.Module):
    """A pre-norm transformer layer over (N, L, D): self-attention, then the MLP, each added to its input after dropout."""

    def __init__(self, width: int, heads: int, dropouts: Dropouts = Dropouts(), head_width: int | None = None) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, head_width, dropouts.attention)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = mlp(width)
        self.residual_dropout, self.mlp_dropout = nn.Dropout(dropouts.residual), nn.Dropout(dropouts.mlp)

    def forward(self, x_NLD: Tensor) -> Tensor:
        """The tokens after this layer, (N, L, D)."""
        x_NLD = x_NLD + self.residual_dropout(self.attention(self.attention_norm(x_NLD)))
        mixed: Tensor = x_NLD + self.mlp_dropout(self.mlp(self.mlp_norm(x_NLD)))
        return mixed


class UNetAttention:
    """The attention layers of diffusers' spatio-temporal U-Net, computed by `attend`: a processor for `set_attn_processor`.

    The layers get the sentence repeated for every frame or position of a clip. For a batch of one clip, as on a robot, that is
    a view of stride 0, and keys and values are computed once instead: 64 times less work at 8 x 8 positions.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """(N, L, D) hidden states attend to (N, S, E) encoder states, or to themselves: (N, L, D).

        Raises:
            ValueError: an attention mask, which these U-Nets do not use.
        """
        if attention_mask is not None:
            raise ValueError("the attention of a spatio-temporal U-Net has no mask")
        n, length, _width = hidden_states.shape
        query, context = attn.to_q(hidden_states), hidden_states
        if encoder_hidden_states is not None:
            context = encoder_hidden_states
            if context.stride(0) == 0:
                query, context = query.reshape(1, n * length, -1), context[:1]
        q, k, v = (split_heads(x, attn.heads) for x in (query, attn.to_k(context), attn.to_v(context)))
        read = join_heads(attend(q, k, v)).reshape(n, length, -1)
        for layer in attn.to_out:  # a linear layer and dropout
            read = layer(read)
        return read
