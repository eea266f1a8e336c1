"""The convolutional encoder of the observed frame that is trained with the policy (context entry `observation`).

It is what Diffusion Policy (Chi et al. 2023) conditions on: random crops while training, GroupNorm instead of BatchNorm
so that the averaged weights need no other statistics. It returns a grid of tokens rather than one vector, so that the
same aggregators work on it.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from svam.device import sent
from svam.errors import ParamsError
from svam.models.views import apart, together
from svam.shares import share

CROP = 0.9
"""Side of the crop as a share of the frame's side."""
DOWNSAMPLINGS = 3


class _Block(nn.Module):
    """Strided convolution and one residual convolution, each with GroupNorm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        groups = math.gcd(8, outputs)
        self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GroupNorm(groups, outputs), nn.SiLU())
        self.residual = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1), nn.GroupNorm(groups, outputs), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / 2, W / 2), rounded up."""
        down: Tensor = self.down(x)
        total: Tensor = down + self.residual(down)
        return total


class ObservationEncoder(nn.Module):
    """Frames to a grid of tokens, one for every 8 x 8 pixels of the crop, of three quarters of `width` channels.

    The share is chosen for fair comparisons: at the default sizes a policy that sees this encoder's tokens alone has as many
    trained parameters, to within a tenth, as one that sees foresight.
    """

    def __init__(self, image_size: tuple[int, int], width: int, views: int = 1) -> None:
        """`image_size`: (H, W) pixels. `width`: that of the policy, a multiple of 16. `views`: cameras V, see
        `svam.models.views`. `shape` is the tokens' (1, V h, w, C)."""
        super().__init__()
        self.image_size, self.views = image_size, views
        self.crop = (round(image_size[0] * CROP), round(image_size[1] * CROP))
        channels = [3, *(3 * width // 4 // 2 ** (DOWNSAMPLINGS - 1 - i) for i in range(DOWNSAMPLINGS))]
        self.blocks = nn.Sequential(*(_Block(a, b) for a, b in pairwise(channels)))
        rows, columns = (math.ceil(side / 2**DOWNSAMPLINGS) for side in self.crop)
        self.shape = (1, views * rows, columns, channels[-1])

    def forward(self, frames_BHWC: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, V H, W, 3) uint8 to (B, 1, V h, w, C) float: of each frame a random crop while training, else the centre.

        generator: on the CPU; draws crops for the whole batch, of which several processes take their rows. None: the centre.

        Raises:
            ParamsError: the frames are not of the size that the encoder was built for.
        """
        frames_BHWC = apart(frames_BHWC, self.views)
        if tuple(frames_BHWC.shape[1:3]) != self.image_size:
            raise ParamsError(f"observation: frames are {tuple(frames_BHWC.shape[1:3])} pixels, expected {self.image_size}")
        margin = (self.image_size[0] - self.crop[0], self.image_size[1] - self.crop[1])
        batch, device = len(frames_BHWC), frames_BHWC.device

        def places(most: int) -> Tensor:
            if not self.training or generator is None:
                return torch.full((batch, 1), most // 2, device=device)
            return sent(share(lambda rows: torch.randint(0, most + 1, (rows, 1), generator=generator), batch), device)

        top, left = map(places, margin)
        rows = top + torch.arange(self.crop[0], device=device)
        columns = left + torch.arange(self.crop[1], device=device)
        image = torch.arange(batch, device=device)[:, None, None]
        cropped = frames_BHWC[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        tokens: Tensor = self.blocks(cropped.float() / 127.5 - 1.0)
        return together(tokens.permute(0, 2, 3, 1).unsqueeze(1), self.views)
