"""Where captions come from, and the images that they tell of."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lit_distill.datamodules.digits import DigitsDataModule
from lit_distill.datamodules.frame import open_picture
from lit_distill.datamodules.image_files import ENDINGS, stamp

_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_PHRASES = ("a handwritten {}", "the digit {}", "a picture of a {}", "{}")


class CaptionedImages:
    """Captions for training, and images where there are any.

    Images are resized so that they cover the frame, and cut at its centre.

    Attributes:
        name: Short name of the data.
        captions: One for each image.
        has_images: Whether there are images; captions alone do for methods that need no data.
    """

    name: str
    captions: list[str]
    has_images: bool = True

    def identity(self) -> str:
        """A text that is another one for other data."""
        raise NotImplementedError

    def files(self, indices: range) -> Iterator[tuple[str, bytes]]:
        """Image files: where each is from, for a message, and what it contains."""
        raise NotImplementedError

    def images(self, indices: range, shape: tuple[int, ...]) -> Tensor:
        """Read images.

        Args:
            indices: Which ones; in their order, sources need not read anything twice.
            shape: ``(C, H, W)``, with 1 or 3 channels.

        Returns:
            ``(N, C, H, W)`` uint8.

        Raises:
            ValueError: If a file cannot be read as an image.
        """
        return torch.stack([_pixels(where, file, shape) for where, file in self.files(indices)])


def _pixels(where: str, content: bytes, shape: tuple[int, ...]) -> Tensor:
    """An image ``(C, H, W)`` uint8 of a file."""
    channels, height, width = shape
    try:
        picture = open_picture(content, channels, 2 * max(height, width))
    except Exception as error:  # of any class: what matters is which file it was
        raise ValueError(f"{where} cannot be read as an image ({error}).") from error
    picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture).reshape(height, width, channels)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


class CaptionedFolder(CaptionedImages):
    """A folder with a ``metadata.jsonl``: on each line ``{"file_name": "x.png", "text": "a cat"}``.

    Args:
        folder: The folder; images may lie in folders within.
        images: Whether there are images; without, lines need a ``text`` only.

    Raises:
        FileNotFoundError: If there is no such folder or no ``metadata.jsonl`` in it.
        ValueError: If a line is no such object, names an image that is not there, or an image has
            no caption.
    """

    def __init__(self, folder: str, images: bool = True) -> None:
        self.folder, self.has_images = Path(folder).expanduser(), images
        self.name = self.folder.name
        metadata = self.folder / "metadata.jsonl"
        if not metadata.is_file():
            raise FileNotFoundError(
                f"There is no {metadata}: each of its lines names an image and its caption, as in "
                '{"file_name": "0001.png", "text": "a cat"}.'
            )
        self.captions: list[str] = []
        self._files: list[str] = []
        # Not splitlines(), which also cuts at characters that a text in JSON may contain (U+2028).
        for number, line in enumerate(metadata.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                self._add(line, f"{metadata}, line {number}")
        if not self.captions:
            raise ValueError(f"{metadata} holds no captions.")
        if images:
            self._check()

    def _add(self, line: str, where: str) -> None:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is no JSON ({error}).") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise ValueError(f'{where} has no caption: give it a "text".')
        self.captions.append(entry["text"])
        if self.has_images:
            file = entry.get("file_name")
            if not isinstance(file, str):
                raise ValueError(
                    f'{where} has a caption but names no image: give it a "file_name", or set '
                    "images: false for a method that needs captions only."
                )
            if not (self.folder / file).is_file():
                raise ValueError(f"{where} names the image {file}, which is not there.")
            self._files.append(file)

    def _check(self) -> None:
        """Refuse images without a caption: a file was forgotten, or the wrong one was given."""
        there = {
            p.relative_to(self.folder).as_posix()
            for p in self.folder.rglob("*")
            if p.suffix.lower() in ENDINGS
        }
        if silent := sorted(there - {Path(file).as_posix() for file in self._files}):
            raise ValueError(
                f"{len(silent)} images in {self.folder} have no caption in metadata.jsonl, the "
                f"first is {silent[0]}: add lines for them, or move them elsewhere."
            )

    def identity(self) -> str:
        """All lines, and size and time of the last change of each image."""
        files = [(file, stamp(self.folder / file)) for file in self._files]
        return json.dumps([self.captions, files])

    def files(self, indices: range) -> Iterator[tuple[str, bytes]]:
        """The files of the lines ``indices``."""
        for i in indices:
            file = self.folder / self._files[i]
            yield str(file), file.read_bytes()


class CaptionedDigits(CaptionedImages):
    """scikit-learn's training digits with captions such as "a handwritten seven".

    Image ``i`` has the ``i % 4``-th of four ways to say it. A pixel becomes a square where images
    are asked for that are larger than 8x8.
    """

    name = "captions"

    def __init__(self) -> None:
        _, labels = DigitsDataModule().images("train")
        assert labels is not None
        self.captions = [caption_of(int(label), i) for i, label in enumerate(labels)]

    def identity(self) -> str:
        """All captions."""
        return json.dumps(self.captions)

    def images(self, indices: range, shape: tuple[int, ...]) -> Tensor:
        """Images ``(N, *shape)`` uint8.

        Raises:
            ValueError: If the shape is not that of digits made larger by a whole factor.
        """
        scale = max(1, shape[-1] // 8)
        digits = DigitsDataModule(scale=scale)
        if tuple(shape[1:]) != digits.image_shape[1:]:
            raise ValueError(f"The digits cannot be made {shape[1]}x{shape[2]}: give 8 n x 8 n.")
        images = digits.images("train")[0][indices.start : indices.stop]
        return images.expand(-1, shape[0], -1, -1)


def caption_of(digit: int, variant: int = 0) -> str:
    """A caption for a digit, in the ``variant % 4``-th of four ways."""
    return _PHRASES[variant % len(_PHRASES)].format(_WORDS[digit])
