"""Patch tokens on another grid."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def to_grid(tokens: Tensor, grid: int) -> Tensor:
    """(B, g, g', C) float tokens resized bilinearly (antialiased) to (B, grid, grid, C); untouched where that is its grid."""
    if tokens.shape[1:3] == (grid, grid):
        return tokens
    resized = functional.interpolate(tokens.permute(0, 3, 1, 2), (grid, grid), mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1)
