"""Contact sheets of clips, as PNG with the same bytes every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from svam.files import whole_file


def save_clip_sheet(path: Path, clips: NDArray[np.uint8], zoom: int = 2, gap: int = 2) -> None:
    """Write clips (n, rows, T, H, W, 3) uint8 as one sheet: time runs right; rows of one clip stand together.

    Each clip typically has two rows: the truth above, the generation below.
    """
    count, rows, frames, height, width, _ = clips.shape
    cell_h, cell_w = height * zoom + gap, width * zoom + gap
    sheet = np.full((count * (rows * cell_h + 3 * gap), frames * cell_w, 3), 255, dtype=np.uint8)
    for c in range(count):
        for r in range(rows):
            top = c * (rows * cell_h + 3 * gap) + r * cell_h
            for t in range(frames):
                large = clips[c, r, t].repeat(zoom, axis=0).repeat(zoom, axis=1)
                sheet[top : top + height * zoom, t * cell_w : t * cell_w + width * zoom] = large
    with whole_file(path) as temporary:
        Image.fromarray(sheet).save(temporary)
