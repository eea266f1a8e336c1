"""Attention over short sequences, as the U-Net and the decouplers have them: grids of patches, clips of frames, sentences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over (N, heads, L, d), the same shape back.

    Grids and clips are short, and on a CPU the fused kernel is several times slower there than the two matrix products
    written out (bf16, L = 64: 86 against 19 ms forward and backward).
    """
    if q.is_cuda:
        return functional.scaled_dot_product_attention(q, k, v)
    weights = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)).softmax(dim=-1)
    return torch.matmul(weights, v)


def _split(x_NLD: Tensor, heads: int) -> Tensor:
    n, length, width = x_NLD.shape
    return x_NLD.view(n, length, heads, width // heads).transpose(1, 2)


class ShortAttention:
    """What diffusers' attention layers of a spatio-temporal U-Net compute, by `attend`: a processor for `set_attn_processor`.

    A clip's one sentence reaches its layers repeated for every frame or position, but unmaterialised (stride 0) where the
    batch is one clip, as a robot has it; its keys and values are then computed once: 64 times less work at 8 x 8 positions.
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
        q, k, v = (_split(x, attn.heads) for x in (query, attn.to_k(context), attn.to_v(context)))
        joined = attend(q, k, v).transpose(1, 2).reshape(n, length, -1)
        for layer in attn.to_out:  # a linear layer and dropout
            joined = layer(joined)
        return joined
