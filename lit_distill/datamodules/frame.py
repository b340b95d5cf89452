"""From an image file to the pixels of a data set: crop, size, depth."""

import io
import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageOps

Crop = Literal["center", "none", "exact"]


@dataclass(frozen=True)
class Frame:
    """What is taken of a picture, and at which size and depth.

    Pictures are turned as their EXIF data say. Of 16 bits the upper 8 are kept, transparency is
    laid over white, several frames count as the first. Grey becomes colour by repetition, colour
    becomes grey by ITU-R 601 luma, everything else as Pillow converts it. Resizing is Lanczos's.

    Args:
        size: Height and width in pixels.
        channels: 1 (grey) or 3 (RGB).
        crop: ``center``: the square in the middle; ``none``: the whole picture, squeezed into a
            square; ``exact``: the whole picture, which must have the size already.
        side: With ``center``: side of the square over the shorter side of the picture.

    Raises:
        ValueError: If there are no such images.
    """

    size: int
    channels: int = 3
    crop: Crop = "center"
    side: float = 1.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"image_size={self.size}: it must be at least 1.")
        if self.channels not in (1, 3):
            raise ValueError(f"channels={self.channels}: it must be 1 (grey) or 3 (colour).")
        if self.crop not in get_args(Crop):
            raise ValueError(f"crop={self.crop!r}: it must be one of {', '.join(get_args(Crop))}.")

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of an image."""
        return self.channels, self.size, self.size

    def pixels(self, content: bytes) -> np.ndarray:
        """Decode a picture.

        Args:
            content: What the file contains.

        Returns:
            ``(C, H, W)`` uint8.

        Raises:
            Exception: If it cannot be decoded; Pillow's readers raise errors of many classes.
        """
        side = None if self.crop == "exact" else math.ceil(2 * self.size / self.side)
        picture = self._resized(open_picture(content, self.channels, side))
        pixels = np.asarray(picture).reshape(self.size, self.size, self.channels)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _resized(self, picture: Image.Image) -> Image.Image:
        width, height = picture.size
        if self.crop == "exact" and picture.size != (self.size, self.size):
            raise ValueError(
                f"has shape {(height, width, self.channels)} (height, width, channels), not "
                f"{(self.size, self.size, self.channels)}: this is another data set"
            )
        box = (0.0, 0.0, float(width), float(height))
        if self.crop == "center":
            side = self.side * min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            if side == self.size:  # whole pixels are cut out, not computed
                left, top = math.floor(left), math.floor(top)
            box = (left, top, left + side, top + side)
        return picture.resize((self.size, self.size), Image.Resampling.LANCZOS, box)


def open_picture(content: bytes, channels: int, enough: int | None = None) -> Image.Image:
    """Decode a picture as :class:`Frame` says, at its own size.

    Args:
        content: What the file contains.
        channels: 1 (grey) or 3 (RGB).
        enough: Sides that suffice: a JPEG that is larger is decoded at a half, a quarter, ...

    Raises:
        Exception: If it cannot be decoded; Pillow's readers raise errors of many classes.
    """
    with Image.open(io.BytesIO(content)) as file:
        if enough is not None:
            file.draft(None, (enough, enough))
        picture = _to_8_bits(ImageOps.exif_transpose(file))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("L" if channels == 1 else "RGB")


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """Keep the upper 8 of 16 bits, as Pillow does by itself where there are several channels."""
    if picture.mode == "F":
        raise ValueError("its pixels are floating point numbers, of a range that nobody knows")
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels have more than 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))
