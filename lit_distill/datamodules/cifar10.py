"""CIFAR-10, from torchvision's files or from zip files of images."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lit_distill.datamodules.base import ImageDataModule, Images, Split
from lit_distill.datamodules.decoding import read_images
from lit_distill.datamodules.files import data_folder, hold_out
from lit_distill.datamodules.frame import Frame
from lit_distill.datamodules.image_files import LISTING, find_images

_BATCHES = "cifar-10-batches-py"


class CIFAR10DataModule(ImageDataModule):
    """Colour photographs of 32x32 pixels in 10 classes (Krizhevsky 2009).

    Reads torchvision's layout, ``<root>/cifar-10-batches-py``, or the data set format of EDM:
    ``<root>/cifar10-32x32-train.zip`` and ``-test.zip``. The last 5,000 training images are the
    validation split.

    Args:
        root: Folder of the files; by default ``$LIT_DISTILL_DATA/cifar10``.
        download: Download torchvision's files to ``root`` if no data are there.
        cache: Folder for the decoded images of the zip files, see
            :func:`~lit_distill.datamodules.decoding.read_images`; None decodes them at every start.
        **options: Options of :class:`ImageDataModule`.
    """

    name = "cifar10"
    image_shape = (3, 32, 32)
    num_classes = 10

    def __init__(
        self,
        root: str | None = None,
        download: bool = False,
        cache: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.root = root
        self.download = download
        self.cache = cache

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
    def _training_files(self) -> Images:
        return self._read(train=True)  # read once for `train` and `val`, which are views of it

    def _read(self, train: bool) -> Images:
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
        files = find_images(path)
        if files.labels_from != LISTING:
            raise ValueError(
                f"{path} contains no {LISTING}, or the {LISTING} in it does not list the images "
                "with their classes: it is not CIFAR-10 in EDM's data set format."
            )
        name = f"{self.name}-{'train' if train else 'test'}"
        return read_images(files, Frame(32, crop="exact"), cache=self.cache, name=name)


def _zip(root: Path, train: bool) -> Path:
    return root / f"cifar10-32x32-{'train' if train else 'test'}.zip"


def _read_batches(root: Path, train: bool) -> Images:
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
