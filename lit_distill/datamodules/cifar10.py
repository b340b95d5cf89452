"""CIFAR-10, from torchvision's files or from zip files of images."""

import io
import json
import zipfile
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from lit_distill.datamodules.base import ImageDataModule, Images, Split
from lit_distill.datamodules.files import data_folder, hold_out

_BATCHES = "cifar-10-batches-py"


class CIFAR10DataModule(ImageDataModule):
    """Colour photographs of 32x32 pixels in 10 classes (Krizhevsky 2009).

    Reads torchvision's layout, ``<root>/cifar-10-batches-py``, or the data set format of EDM:
    ``<root>/cifar10-32x32-train.zip`` and ``-test.zip``. The last 5,000 training images are the
    validation split.

    Args:
        root: Folder of the files; by default ``$LIT_DISTILL_DATA/cifar10``.
        download: Download torchvision's files to ``root`` if no data are there.
        **options: Options of :class:`ImageDataModule`.
    """

    name = "cifar10"
    image_shape = (3, 32, 32)
    num_classes = 10

    def __init__(self, root: str | None = None, download: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.root = root
        self.download = download

    def prepare_data(self) -> None:
        """Download the files if asked to and none are there."""
        if not self.download:
            return
        root = data_folder(self.root, self.name, create=True)
        if not (root / _BATCHES).is_dir() and not _zip(root, train=True).is_file():
            from torchvision.datasets import CIFAR10

            CIFAR10(root, download=True)

    def load(self, split: Split) -> Images:
        """Read one split."""
        if split == "test":
            return self._read(train=False)
        return hold_out(*self._training_files, split)

    @cached_property
    def _training_files(self) -> tuple[Tensor, Tensor]:
        return self._read(train=True)  # read once for `train` and `val`, which are views of it

    def _read(self, train: bool) -> tuple[Tensor, Tensor]:
        root = data_folder(self.root, self.name)
        if (root / _BATCHES).is_dir():
            return _read_batches(root, train)
        path = _zip(root, train)
        if not path.is_file():
            raise FileNotFoundError(
                f"{root} holds neither the folder {_BATCHES} nor {path.name}. Set the option root "
                "(or LIT_DISTILL_DATA) to the folder with one of them, or download: true to fetch "
                "the data."
            )
        return read_zip(path, self.image_shape)


def _zip(root: Path, train: bool) -> Path:
    return root / f"cifar10-32x32-{'train' if train else 'test'}.zip"


def _read_batches(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Read torchvision's files; torchvision checks their checksums before it unpickles them."""
    from torchvision.datasets import CIFAR10

    try:
        data = CIFAR10(root, train=train)
    except RuntimeError as error:
        raise ValueError(
            f"The files in {root / _BATCHES} are not CIFAR-10's, or not all of them ({error}): "
            "copy or download them again."
        ) from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(data.targets)


def read_zip(path: Path, image_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Read a zip file in EDM's data set format: images, and ``dataset.json`` with their labels.

    Args:
        path: The zip file; it may hold images in any lossless format that Pillow reads.
        image_shape: ``(C, H, W)`` that every image must have, C = 3.

    Returns:
        Images ``(N, C, H, W)`` uint8 in the order of their names, and labels ``(N,)`` int64.

    Raises:
        ValueError: If the file is damaged, has no labels, or holds other images.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            labels = _labels(archive, path)
            names = sorted(labels)
            progress = tqdm(
                names,
                f"Reading {path.name}",
                unit="image",
                leave=False,
                mininterval=1,
                disable=len(names) < 10_000 or getattr(rank_zero_only, "rank", 0) > 0,
            )
            pixels = np.empty((len(names), *image_shape[1:], image_shape[0]), dtype=np.uint8)
            for row, name in zip(pixels, progress, strict=True):
                image = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
                if image.shape != row.shape:
                    raise ValueError(
                        f"{name} in {path} has shape {image.shape} (height, width, channels), "
                        f"not {row.shape}: this is another data set."
                    )
                row[:] = image
    except (zipfile.BadZipFile, KeyError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}): copy or download it again.") from error
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([labels[name] for name in names])


def _labels(archive: zipfile.ZipFile, path: Path) -> dict[str, int]:
    """Class of each image, from ``dataset.json``."""
    if "dataset.json" not in archive.namelist():
        raise ValueError(
            f"{path} contains no dataset.json, which names each image's class: it is not a data "
            "set in EDM's format."
        )
    try:
        return {
            name: int(label) for name, label in json.loads(archive.read("dataset.json"))["labels"]
        }
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"dataset.json in {path} does not list the images with their classes, "
            '{"labels": [[name, class], ...]}, as CIFAR-10 in EDM\'s format needs.'
        ) from error
