"""Pictures that a person can read: rows of small images with captions."""

import os
from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

_INCHES = 0.55  # edge of one image
_CAPTION = 1.7  # width of the column of captions, inches
_LETTER = 0.075  # width of a letter of the title, inches


def tile(images: Tensor, columns: int) -> Tensor:
    """Lay images out in rows, one pixel apart.

    Args:
        images: (N, C, H, W) uint8.
        columns: Images in a row.

    Returns:
        (C, R (H + 1) - 1, columns (W + 1) - 1) uint8; the gaps and missing images are white.
    """
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    grid = images.new_full((rows * columns, channels, height + 1, width + 1), 255)
    grid[:count, :, :-1, :-1] = images
    grid = grid.view(rows, columns, channels, height + 1, width + 1).permute(2, 0, 3, 1, 4)
    return grid.reshape(channels, rows * (height + 1), columns * (width + 1))[:, :-1, :-1]


def draw_rows(rows: Mapping[str, Tensor], path: Path, columns: int, title: str = "") -> None:
    """Write a PNG with one block of images for each caption; pixels are enlarged as squares.

    Args:
        rows: Captions and their images (N, C, H, W) uint8 with 1 or 3 channels.
        path: The file; its folder is made, and it is replaced as a whole.
        columns: Images in a row.
        title: Stands above the picture, in as many lines as it takes.
    """
    heights = [-(-len(images) // columns) * _INCHES for images in rows.values()]
    width = _CAPTION + columns * _INCHES
    lines = wrap(title, int(width / _LETTER))
    top = 0.2 + 0.2 * len(lines) if lines else 0.0
    figure = Figure(figsize=(width, sum(heights) + top))
    total = sum(heights) + top
    left = _CAPTION / width
    lower = sum(heights) / total
    figure.text(0.5, 1 - top / total / 2, "\n".join(lines), ha="center", va="center")
    for (caption, images), inches in zip(rows.items(), heights, strict=True):
        height = inches / total
        lower -= height
        axes = figure.add_axes((left, lower + 0.02 * height, 1 - left, 0.96 * height))
        axes.imshow(_pixels(tile(images, columns)), interpolation="nearest", vmin=0, vmax=255)
        axes.set_axis_off()
        figure.text(left - 0.01, lower + height / 2, caption, ha="right", va="center", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, format="png", dpi=150, facecolor="white")
    os.replace(temporary, path)


def _pixels(image: Tensor) -> np.ndarray:
    """(C, H, W) to (H, W, 3), which matplotlib shows without a colour map."""
    return image.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()
