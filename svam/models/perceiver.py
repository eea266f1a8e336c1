"""Context tokens (B, T, h, w, C) to a few tokens for the policy: the Uni-Perceiver (S-VAM section 3.4) or plain pooling.

N learned queries per frame look at that frame's h*w tokens (cross-attention), then each query exchanges with its own
copies in the other frames (self-attention along time), then an FFN: FFN(SelfAttn(CrossAttn(Q, C))), `depth` times.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svam.errors import ParamsError
from svam.models.attention import Block, attend, attention_weights
from svam.params import Perceiver

Shape = tuple[int, int, int, int]
"""(T, h, w, C) of a context."""


class FrameCrossAttention(nn.Module):
    """Multi-head attention of N queries per frame to the tokens of the same frame.

    It is ordinary attention, q W_q (x W_k)^T, in another order of multiplication: with N much smaller than h*w it is
    several times cheaper to carry the queries into the space of x, (q W_q W_k^T) x^T, and to project after the
    weighted mean, than to compute keys and values of every token.
    """

    def __init__(self, width: int, heads: int, head_width: int | None = None) -> None:
        super().__init__()
        head_width = head_width or width // heads
        inner = heads * head_width
        self.heads, self.scale = heads, head_width**-0.5
        self.norm = nn.LayerNorm(width)
        self.to_query = nn.Linear(width, inner, bias=False)
        self.to_key = nn.Linear(width, inner, bias=False)
        self.to_value = nn.Linear(width, inner, bias=False)
        self.out = nn.Linear(inner, width)

    def _carried(self, queries_MND: Tensor) -> Tensor:
        """Each head's query in the space of the tokens, (M, 1, N * heads, D)."""
        frames, count, width = queries_MND.shape
        query = self.to_query(self.norm(queries_MND)).view(frames, count, self.heads, -1)
        key_weight = self.to_key.weight.view(self.heads, -1, width)
        return torch.einsum("mnhd,hdc->mnhc", query, key_weight).reshape(frames, 1, count * self.heads, width)

    def forward(self, queries_MND: Tensor, tokens_MSD: Tensor) -> Tensor:
        """What the queries (M, N, D) read from the tokens (M, S, D), M = B*T frames: (M, N, D)."""
        frames, count, width = queries_MND.shape
        tokens = tokens_MSD[:, None]
        mean = attend(self._carried(queries_MND), tokens, tokens, self.scale).reshape(frames, count, self.heads, width)
        value_weight = self.to_value.weight.view(self.heads, -1, width)
        read: Tensor = self.out(torch.einsum("mnhc,hdc->mnhd", mean, value_weight).flatten(2))
        return read

    def weights(self, queries_MND: Tensor, tokens_MSD: Tensor) -> Tensor:
        """The softmax of `forward`, (M, N, heads, S)."""
        frames, count, _ = queries_MND.shape
        weights = attention_weights(self._carried(queries_MND), tokens_MSD[:, None], self.scale)
        return weights.view(frames, count, self.heads, -1)


class TokenEmbedding(nn.Module):
    """Channels to `width`, plus a learned position on the grid and a learned time, then one LayerNorm.

    The positions matter: where a token is, is half of what the policy wants to know, and attention alone forgets it.
    """

    def __init__(self, shape: Shape, width: int, hidden: int | None = None) -> None:
        """`hidden`: channels between two layers; None: one linear layer."""
        super().__init__()
        self.shape = shape
        frames, rows, columns, channels = shape
        layers = [nn.Linear(a, b) for a, b in pairwise([channels, *([hidden] if hidden else []), width])]
        self.project = layers[0] if hidden is None else nn.Sequential(layers[0], nn.GELU(), layers[1])
        self.position = nn.Parameter(torch.randn(rows * columns, width) * 0.5)
        self.time = nn.Parameter(torch.randn(frames, 1, width) * 0.02)
        self.norm = nn.LayerNorm(width)

    def forward(self, context_BTHWC: Tensor) -> Tensor:
        """(B, T, h, w, C) to (B, T, h*w, width).

        Raises:
            ParamsError: T, h, w or C differ from what the module was built for.
        """
        if tuple(context_BTHWC.shape[1:]) != self.shape:
            raise ParamsError(f"context: found (T, h, w, C) = {tuple(context_BTHWC.shape[1:])}, expected {self.shape}")
        projected = self.project(context_BTHWC.flatten(2, 3))
        embedded = projected + (self.position + self.time).to(projected.dtype)
        # Autocast would make float32 of it; this is the one large tensor of the policy, and the norm itself sums in float32.
        with torch.autocast(embedded.device.type, enabled=False):
            weight, bias = (p.to(embedded.dtype) for p in (self.norm.weight, self.norm.bias))
            return F.layer_norm(embedded, self.norm.normalized_shape, weight, bias, self.norm.eps)


class UniPerceiver(nn.Module):
    """The Uni-Perceiver, N queries per frame (S-VAM section 3.4), the same in each plus a vector of its time, or free ones.

    Released sizes: 14 free queries a frame, width 384, depth 6, 8 heads of 64, 768 channels in the embedding.
    """

    def __init__(self, sizes: Perceiver, shape: Shape) -> None:
        super().__init__()
        width, heads = sizes.width, sizes.heads
        self.embed = TokenEmbedding(shape, width, sizes.embedding)
        free = (shape[0],) if sizes.free_queries else ()
        self.queries = nn.Parameter(torch.randn(*free, sizes.queries, width) * 0.5)
        self.query_time = None if free else nn.Parameter(torch.randn(shape[0], 1, width) * 0.5)
        self.cross = nn.ModuleList(FrameCrossAttention(width, heads, sizes.head_width) for _ in range(sizes.depth))
        self.along_time = nn.ModuleList(Block(width, heads, head_width=sizes.head_width) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, context_BTHWC: Tensor) -> Tensor:
        """(B, T, h, w, C) to (B, T*N, width)."""
        tokens: Tensor = self.norm(self._run(context_BTHWC)[0]).flatten(1, 2)
        return tokens

    @torch.no_grad()
    def attention(self, context_BTHWC: Tensor) -> Tensor:
        """The last cross-attention's head-averaged weights (B, T, N, h, w), each map summing to 1."""
        batch, frames, rows, columns = context_BTHWC.shape[:4]
        _, queries_MND, tokens_MSD = self._run(context_BTHWC)
        weights: Tensor = self.cross[-1].weights(queries_MND, tokens_MSD).float().mean(dim=2)  # type: ignore[operator]
        return weights.view(batch, frames, -1, rows, columns)

    def _run(self, context_BTHWC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The last layer's output (B, T, N, D), and what its cross-attention saw: queries (M, N, D) and tokens (M, S, D)."""
        batch, frames, (count, width) = *context_BTHWC.shape[:2], self.queries.shape[-2:]
        tokens_MSD = self.embed(context_BTHWC).flatten(0, 1)
        if self.query_time is None:
            x = self.queries.repeat(batch, 1, 1, 1)  # torch's counter of FLOPs does not take a view of a parameter
        else:
            x = (self.queries + self.query_time).expand(batch, -1, -1, -1)
        for cross, along_time in zip(self.cross, self.along_time, strict=True):
            queries_MND = x.flatten(0, 1)
            x = x + cross(queries_MND, tokens_MSD).view_as(x)
            x = along_time(x.transpose(1, 2).flatten(0, 1)).view(batch, count, frames, width).transpose(1, 2)
        return x, queries_MND, tokens_MSD


class MeanPool(nn.Module):
    """The ablation without Uni-Perceiver: a linear layer and the mean over each frame's grid, one token per frame."""

    def __init__(self, sizes: Perceiver, shape: Shape) -> None:
        super().__init__()
        self.embed = TokenEmbedding(shape, sizes.width, sizes.embedding)

    def forward(self, context_BTHWC: Tensor) -> Tensor:
        """(B, T, h, w, C) to (B, T, width)."""
        tokens: Tensor = self.embed(context_BTHWC).mean(dim=2)
        return tokens


AGGREGATORS: dict[str, type[UniPerceiver] | type[MeanPool]] = {"uni_perceiver": UniPerceiver, "mean_pool": MeanPool}
"""By the names of `train_policy.aggregator`; each is built from its sizes and the shape of its context."""
