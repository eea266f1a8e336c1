"""Several cameras: an observation's pictures lie below one another, and so do the tokens of what is foreseen of each.

The frozen parts see one picture at a time, so cameras are a batch to them. The Uni-Perceiver sees the tokens of all cameras in
its cross-attention within a frame, as VPP's released code joins them; the learned position of a token also says its camera.
"""

from __future__ import annotations

import torch
from torch import Tensor


def apart(joined: Tensor, views: int) -> Tensor:
    """(B, ..., V H, W, C) to (B V, ..., H, W, C): pictures or tokens of V cameras as a batch, an observation's in turn."""
    return joined if views == 1 else torch.unflatten(joined, -3, (views, -1)).movedim(-4, 1).flatten(0, 1)


def together(single: Tensor, views: int) -> Tensor:
    """(B V, ..., H, W, C) to (B, ..., V H, W, C): undoes `apart`."""
    return single if views == 1 else torch.unflatten(single, 0, (-1, views)).movedim(1, -4).flatten(-4, -3)
