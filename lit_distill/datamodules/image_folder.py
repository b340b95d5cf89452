"""A person's own images: a folder, or a zip file."""

from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lit_distill.datamodules.base import ImageDataModule, Images, Split
from lit_distill.datamodules.decoding import Broken, read_images
from lit_distill.datamodules.frame import Crop, Frame
from lit_distill.datamodules.image_files import HOW_TO_LABEL, ImageFiles, find_images
from lit_distill.diffusion import Denoiser

_SPLITS = {"train", "val", "valid", "validation", "test"}


class ImageFolderDataModule(ImageDataModule):
    """Your own images, from a folder or a zip file.

    Labels come from ``dataset.json`` (EDM's data set format) or from sub-folders, one a class; see
    :func:`~lit_distill.datamodules.image_files.find_images`. How pictures of other sizes and modes
    become images says :class:`~lit_distill.datamodules.frame.Frame`. Validation and test
    images are taken at even distances from the sorted names, so that each class has its share.

    Args:
        root: The folder or zip file.
        image_size: Height and width in pixels.
        channels: 1 (grey) or 3 (colour).
        crop: ``center``: the square in the middle; ``none``: the whole picture, squeezed into a
            square; ``exact``: pictures must have the size already.
        labels: Whether there must be labels (true), they are passed over (false), or taken if they
            are there (null).
        held_out: Share of the images that is not trained on: one half is ``val``, the other
            ``test``, and each is one image at least.
        broken: What to do about images that cannot be read: ``skip`` leaves them out and warns,
            ``error`` stops. Both count and name them.
        cache: Folder for the decoded images, see
            :func:`~lit_distill.datamodules.decoding.read_images`; null decodes them at every start.
        **options: Options of :class:`ImageDataModule`, such as ``flip``.

    Raises:
        ValueError: If an option is out of its range.
    """

    def __init__(
        self,
        root: str,
        image_size: int,
        channels: int = 3,
        crop: Crop = "center",
        labels: bool | None = None,
        held_out: float = 0.1,
        broken: Broken = "error",
        cache: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 0 < held_out < 1:
            raise ValueError(f"held_out={held_out}: it must be between 0 and 1.")
        self.root = Path(root).expanduser()
        self.name = self.root.absolute().stem
        self.frame = Frame(image_size, channels, crop)
        self.image_shape = self.frame.shape
        self.labels = labels
        self.held_out = held_out
        self.broken = broken
        self.cache = cache

    @property
    def num_classes(self) -> int | None:  # type: ignore[override]  # known once files are listed
        """Number of classes, or None where the images have no labels."""
        return self._files.num_classes

    def load(self, split: Split) -> Images:
        """Read one split."""
        return read_images(
            self._splits[split], self.frame, self.broken, self.cache, f"{self.name}-{split}"
        )

    def check_model(self, denoiser: Denoiser) -> None:
        """Check that a model fits the data.

        Raises:
            ValueError: If its images have another shape, or it knows other classes.
        """
        try:
            super().check_model(denoiser)
        except ValueError as error:
            if denoiser.num_classes is not None and self.num_classes is None:
                raise ValueError(f"{error} {HOW_TO_LABEL}") from error
            raise

    @cached_property
    def _files(self) -> ImageFiles:
        files = find_images(self.root, self.labels)
        if "train" in files.folders and set(files.folders) <= _SPLITS:
            raise ValueError(
                f"{self.root} has the sub-folders {', '.join(files.folders)}, which look like "
                "splits, not classes: set the option root to the one to train on (a part of it is "
                "held out, option held_out), or labels: false."
            )
        labelled = (
            f"{files.num_classes} classes by {files.labels_from}" if files.labels else "no labels"
        )
        rank_zero_info(f"{self.root}: {len(files):,} images, {labelled}.")
        return files

    @cached_property
    def _splits(self) -> dict[Split, ImageFiles]:
        files = self._files
        each = max(1, round(len(files) * self.held_out / 2))
        if len(files) < 2 * each + 1:
            raise ValueError(
                f"{self.root} has {len(files)} images: too few to keep {each} for validation and "
                f"{each} for test (option held_out={self.held_out}) and to train on the rest."
            )
        # Of 2 * each stretches of about equal length, the middle one of each.
        held = [(2 * i + 1) * len(files) // (4 * each) for i in range(2 * each)]
        left = sorted(set(range(len(files))) - set(held))
        return {
            "train": files.part(left),
            "val": files.part(held[::2]),
            "test": files.part(held[1::2]),
        }
