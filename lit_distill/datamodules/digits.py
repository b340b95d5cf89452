"""The 1,797 handwritten digits that scikit-learn carries: real data without a download."""

from functools import cache
from typing import Any

import numpy as np
import torch

from lit_distill.datamodules.base import ImageDataModule, Images, Split

_BLOCKS = {"train": slice(0, 1100), "val": slice(1100, 1397), "test": slice(1397, 1797)}


class DigitsDataModule(ImageDataModule):
    """Greyscale digits of 8x8 pixels in 10 classes (Alpaydin and Kaynak, UCI, 1998).

    Split by blocks, 1,100 / 297 / 400, because digits of one writer follow each other. The 17 grey
    levels 0..16 become ``round(v * 255 / 16)``.

    Args:
        scale: Width and height of the square that a pixel becomes.
        options: Those of :class:`ImageDataModule`.

    Raises:
        ValueError: If the scale is below 1.
    """

    name = "digits"
    image_shape = (1, 8, 8)
    num_classes = 10

    def __init__(self, scale: int = 1, **options: Any) -> None:
        if scale < 1:
            raise ValueError(f"scale={scale}: a pixel becomes a square of at least 1.")
        super().__init__(**options)
        self.scale = scale
        if scale > 1:
            self.image_shape = (1, 8 * scale, 8 * scale)

    def load(self, split: Split) -> Images:
        """Read one block of the digits."""
        images, digits = _all()
        pixels = np.round(images[_BLOCKS[split]] * (255 / 16)).astype(np.uint8)
        labels = torch.from_numpy(digits[_BLOCKS[split]].astype(np.int64))
        squares = np.kron(pixels, np.ones((1, self.scale, self.scale), np.uint8))
        return torch.from_numpy(squares).unsqueeze(1), labels


@cache
def _all() -> tuple[np.ndarray, np.ndarray]:
    """Images and digits of scikit-learn's table, a text file that takes its time."""
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    table = load_digits()
    return table.images, table.target
