"""Points in the plane, as images of one pixel and two channels: what a method does can be seen."""

import math

import torch

from lit_distill.datamodules.base import ImageDataModule, Images, Split

_RADIUS, _SPREAD, _MODES = 0.7, 0.06, 8
_SIZES = {"train": 8_000, "val": 2_000, "test": 4_000}
_SEEDS = {"train": 0, "val": 1, "test": 2}


class PlaneDataModule(ImageDataModule):
    """Eight Gaussians of deviation 0.06 on a circle of radius 0.7, as (2, 1, 1) "images".

    Coordinates are stored as pixels are, in 256 steps from -1 to 1. 8,000 points to train on,
    2,000 to validate and 4,000 to test, drawn with fixed seeds; no labels. Options: see
    :class:`ImageDataModule`.
    """

    name = "plane"
    image_shape = (2, 1, 1)
    num_classes = None

    def load(self, split: Split) -> Images:
        """Draw one split."""
        generator = torch.Generator().manual_seed(_SEEDS[split])
        mode = torch.randint(_MODES, (_SIZES[split],), generator=generator)
        angle = 2 * math.pi * mode / _MODES
        centre = _RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
        points = centre + _SPREAD * torch.randn(len(mode), 2, generator=generator)
        pixels = ((points.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return pixels.view(-1, 2, 1, 1), None
