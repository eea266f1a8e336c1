"""Context tokens (B, T, h, w, C) to a few tokens for the policy: the Uni-Perceiver (paper section 3.4) or plain pooling.

N learned queries per frame look at that frame's h*w tokens (cross-attention), then each query exchanges with its own
copies in the other frames (self-attention along time), then an FFN: FFN(SelfAttn(CrossAttn(Q, C))), `depth` times.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svam.errors import ParamsError

Aggregator = Literal["uni_perceiver", "mean_pool"]


class FrameCrossAttention(nn.Module):
    """Multi-head attention of N queries per frame to the tokens of the same frame.

    It is ordinary attention, q W_q (x W_k)^T, in another order of multiplication: with N much smaller than h*w it is
    several times cheaper to carry the queries into the space of x, (q W_q W_k^T) x^T, and to project after the
    weighted mean, than to compute keys and values of every token.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_key = nn.Linear(width, width, bias=False)
        self.to_value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, queries_MND: Tensor, tokens_MSD: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (M, N, D) and tokens (M, S, D), M = B*T frames; returns the update (M, N, D) and weights (M, N, heads, S)."""
        m, n, width = queries_MND.shape
        depth = width // self.heads
        query = self.to_query(self.norm(queries_MND)).view(m, n, self.heads, depth)
        key_weight = self.to_key.weight.view(self.heads, depth, width)
        value_weight = self.to_value.weight.view(self.heads, depth, width)
        carried = torch.einsum("mnhd,hdc->mnhc", query, key_weight).reshape(m, n * self.heads, width)
        # Tokens stay on the left: the gradient of the big operand then needs no transposed copies.
        scores_MSQ = torch.bmm(tokens_MSD, carried.transpose(1, 2) * depth**-0.5)
        weights_MSQ = scores_MSQ.softmax(dim=1).to(tokens_MSD.dtype)
        mean = torch.bmm(weights_MSQ.transpose(1, 2), tokens_MSD).view(m, n, self.heads, width)
        values = torch.einsum("mnhc,hdc->mnhd", mean, value_weight).reshape(m, n, width)
        return self.out(values), weights_MSQ.transpose(1, 2).reshape(m, n, self.heads, -1)


class SelfAttention(nn.Module):
    """Pre-norm multi-head self-attention over the second axis of (M, S, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x_MSD: Tensor) -> Tensor:
        """The update (M, S, D) to be added to `x_MSD`."""
        m, s, width = x_MSD.shape
        qkv = self.to_qkv(self.norm(x_MSD)).view(m, s, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        # Written out: on a CPU the fused kernel is several times slower on so few frames.
        weights = torch.matmul(qkv[0] * (width // self.heads) ** -0.5, qkv[1].transpose(-1, -2)).softmax(dim=-1)
        mixed = torch.matmul(weights.to(qkv.dtype), qkv[2])
        return torch.as_tensor(self.out(mixed.transpose(1, 2).reshape(m, s, width)))


def feed_forward(width: int) -> nn.Sequential:
    """Pre-norm MLP of four times the width."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class TokenEmbedding(nn.Module):
    """Channels to `width`, plus a learned position on the grid and a learned time, then one LayerNorm.

    The positions matter: where a token is, is half of what the policy wants to know, and attention alone forgets it.
    """

    def __init__(self, channels: int, shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        frames, rows, columns = shape
        self.shape, self.channels = shape, channels
        self.project = nn.Linear(channels, width)
        self.position = nn.Parameter(torch.randn(rows * columns, width) * 0.5)
        self.time = nn.Parameter(torch.randn(frames, 1, width) * 0.02)
        self.norm = nn.LayerNorm(width)

    def forward(self, context_BTHWC: Tensor) -> Tensor:
        """(B, T, h, w, C) to (B, T, h*w, width).

        Raises:
            ValueError: T, h, w or C differ from what the module was built for.
        """
        if tuple(context_BTHWC.shape[1:]) != (*self.shape, self.channels):
            raise ParamsError(
                f"context: found (T, h, w, C) = {tuple(context_BTHWC.shape[1:])}, expected {(*self.shape, self.channels)}"
            )
        projected = self.project(context_BTHWC.flatten(2, 3))
        embedded = projected + (self.position + self.time).to(projected.dtype)
        # Autocast would make float32 of it; this is the one large tensor of the policy, and the norm itself sums in float32.
        with torch.autocast(embedded.device.type, enabled=False):
            weight, bias = (p.to(embedded.dtype) for p in (self.norm.weight, self.norm.bias))
            return F.layer_norm(embedded, self.norm.normalized_shape, weight, bias, self.norm.eps)


class UniPerceiver(nn.Module):
    """N queries per frame; the released sizes are 14 queries, width 384, depth 6, 8 heads (method.md, part 5)."""

    def __init__(self, channels: int, shape: tuple[int, int, int], queries: int, width: int, depth: int, heads: int) -> None:
        """`shape` is (T, h, w)."""
        super().__init__()
        self.embed = TokenEmbedding(channels, shape, width)
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.5)
        self.query_time = nn.Parameter(torch.randn(shape[0], 1, width) * 0.5)
        self.cross = nn.ModuleList(FrameCrossAttention(width, heads) for _ in range(depth))
        self.along_time = nn.ModuleList(SelfAttention(width, heads) for _ in range(depth))
        self.feed_forward = nn.ModuleList(feed_forward(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.tokens = shape[0] * queries

    def forward(self, context_BTHWC: Tensor) -> Tensor:
        """(B, T, h, w, C) to (B, T*N, width)."""
        return self.attend(context_BTHWC)[0]

    def attend(self, context_BTHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, T*N, width), and the last cross-attention's head-averaged weights (B, T, N, h, w), each summing to 1."""
        batch, frames, rows, columns = context_BTHWC.shape[:4]
        tokens = self.embed(context_BTHWC).flatten(0, 1)
        n, width = self.queries.shape
        x = (self.queries + self.query_time).expand(batch, -1, -1, -1).reshape(batch * frames, n, width)
        weights = tokens.new_zeros(())
        for cross, along_time, mlp in zip(self.cross, self.along_time, self.feed_forward, strict=True):
            update, weights = cross(x, tokens)
            x = x + update
            if frames > 1:
                by_query = x.view(batch, frames, n, width).transpose(1, 2).reshape(batch * n, frames, width)
                by_query = by_query + along_time(by_query)
                x = by_query.view(batch, n, frames, width).transpose(1, 2).reshape(batch * frames, n, width)
            x = x + mlp(x)
        attention = weights.float().mean(dim=2).view(batch, frames, n, rows, columns)
        return self.norm(x).view(batch, frames * n, width), attention


class MeanPool(nn.Module):
    """The ablation without Uni-Perceiver: a linear layer and the mean over each frame's grid, one token per frame."""

    def __init__(self, channels: int, shape: tuple[int, int, int], width: int) -> None:
        """`shape` is (T, h, w)."""
        super().__init__()
        self.embed = TokenEmbedding(channels, shape, width)
        self.tokens = shape[0]

    def forward(self, context_BTHWC: Tensor) -> Tensor:
        """(B, T, h, w, C) to (B, T, width)."""
        return torch.as_tensor(self.embed(context_BTHWC).mean(dim=2))


def build_aggregator(
    aggregator: Aggregator, channels: int, shape: tuple[int, int, int], queries: int, width: int, depth: int, heads: int
) -> UniPerceiver | MeanPool:
    """The module that `train_policy.aggregator` names, for context of (T, h, w) = `shape` and C = `channels`."""
    if aggregator == "mean_pool":
        return MeanPool(channels, shape, width)
    return UniPerceiver(channels, shape, queries, width, depth, heads)
