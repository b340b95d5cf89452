"""MNIST, from the original files, packed or unpacked."""

import gzip
import math
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_distill.datamodules.base import ImageDataModule, Images, Split
from lit_distill.datamodules.files import data_folder, hold_out

_RAW = Path("MNIST", "raw")
_PARTS = ("train", "t10k")
_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")


class MNISTDataModule(ImageDataModule):
    """Greyscale digits of 28x28 pixels in 10 classes (LeCun et al. 1998).

    Reads torchvision's layout, ``<root>/MNIST/raw/train-images-idx3-ubyte`` and so on. Where only
    the ``.gz`` files exist they are decoded in memory: nothing is written to ``root``. The last
    5,000 training images are the validation split.

    Args:
        root: Folder that holds ``MNIST/raw``; by default ``$LIT_DISTILL_DATA/mnist``.
        download: Download (or unpack) the files to ``root`` if they are not there.
        **options: Options of :class:`ImageDataModule`.
    """

    name = "mnist"
    image_shape = (1, 28, 28)
    num_classes = 10

    def __init__(self, root: str | None = None, download: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.root = root
        self.download = download

    def prepare_data(self) -> None:
        """Download the files if asked to and any is missing."""
        if not self.download:
            return
        root = data_folder(self.root, self.name, create=True)
        files = [root / _RAW / f"{part}-{kind}" for part in _PARTS for kind in _KINDS]
        if not all(file.is_file() or _packed(file).is_file() for file in files):
            from torchvision.datasets import MNIST

            MNIST(root, download=True)

    def load(self, split: Split) -> Images:
        """Read one split."""
        if split == "test":
            return self._read("t10k")
        return hold_out(*self._training_files, split)

    @cached_property
    def _training_files(self) -> tuple[Tensor, Tensor]:
        return self._read("train")  # read once for `train` and `val`, which are views of it

    def _read(self, prefix: str) -> tuple[Tensor, Tensor]:
        folder = data_folder(self.root, self.name) / _RAW
        images = read_idx(folder / f"{prefix}-{_KINDS[0]}", 3)
        labels = read_idx(folder / f"{prefix}-{_KINDS[1]}", 1)
        return images.unsqueeze(1), labels.long()


def read_idx(path: Path, ndim: int) -> Tensor:
    """Read one file in MNIST's idx format.

    Args:
        path: Name of the unpacked file; ``<path>.gz`` is read if that is the one that exists.
        ndim: Number of dimensions that the file must have.

    Returns:
        A uint8 tensor of ``ndim`` dimensions.

    Raises:
        FileNotFoundError: If neither file exists.
        ValueError: If the file is something else, or damaged.
    """
    packed = _packed(path)
    if path.is_file():
        content = path.read_bytes()
    elif packed.is_file():
        try:
            content = gzip.decompress(packed.read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{packed} is damaged ({error}): copy or download it again."
            ) from error
    else:
        raise FileNotFoundError(
            f"Neither {path} nor {packed.name} beside it exists. Set the option root (or "
            "LIT_DISTILL_DATA) to a folder with MNIST's four files under MNIST/raw, or "
            "download: true to fetch them."
        )
    # Two zero bytes, type code 8 (uint8), the number of dimensions, then each as a big-endian int.
    header = 4 + 4 * ndim
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    if content[:4] != bytes([0, 0, 8, ndim]) or len(content) != header + math.prod(shape):
        raise ValueError(
            f"{path} is not a whole MNIST file with {ndim} dimensions: copy or download it again."
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(shape)


def _packed(path: Path) -> Path:
    return path.with_name(path.name + ".gz")
