"""What every image data set offers to training, evaluation and the writing of pairs."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lit_distill.datamodules.batches import (
    Batch,
    BatchOrder,
    FixedLoader,
    TrainLoader,
    even_share,
)
from lit_distill.diffusion import Denoiser, seeded_noise

Split = Literal["train", "val", "test"]
Images = tuple[Tensor, Tensor | None]
"""Images ``(N, C, H, W)`` uint8 and their labels ``(N,)`` int64, or None."""


class ImageDataModule(LightningDataModule):
    """Images in memory, or in a file mapped into it, as whole batches in [-1, 1].

    A subclass sets ``name``, ``image_shape`` and ``num_classes`` and implements :meth:`load`.
    Batches are ``{"image": (B, C, H, W) float32 in [-1, 1], "label": (B,) int64}``, without
    ``label`` where the data have none. The batches of ``predict`` are unit noise for the writing
    of pairs; there, what is computed together does not depend on the number of processes.

    Args:
        batch_size: Images a batch and process.
        seed: Seed of the training order.
        flip: Train on the mirrored images too, as twice the data.
        workers: Threads that make the next training batches while one is trained on, as a GPU may
            need; 0 makes each when it is due.
        predict_samples: Number of noise samples that ``predict`` goes through.
        predict_batch_size: Noise samples a batch; a batch becomes one shard of pairs.
        predict_seed: Noise ``i`` is drawn with seed ``predict_seed + i``.

    Attributes:
        name: Short name of the data set, as in ``runs/<name>/``.
        image_shape: ``(C, H, W)``.
        num_classes: Number of classes, or None where the data have no labels.
        skip_predict: Numbers of the predict batches that are done already.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int | None

    def __init__(
        self,
        batch_size: int = 128,
        seed: int = 0,
        flip: bool = False,
        predict_samples: int = 10_000,
        predict_batch_size: int = 256,
        predict_seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__()
        for option, value in [
            ("batch_size", batch_size),
            ("predict_samples", predict_samples),
            ("predict_batch_size", predict_batch_size),
        ]:
            if value < 1:
                raise ValueError(f"{option}={value}: it must be at least 1.")
        if workers < 0:
            raise ValueError(f"workers={workers}: it must be at least 0.")
        self.batch_size = batch_size
        self.seed = seed
        self.flip = flip
        self.workers = workers
        self.predict_samples = predict_samples
        self.predict_batch_size = predict_batch_size
        self.predict_seed = predict_seed
        self.skip_predict: set[int] = set()
        # A resumed writing of pairs may have fewer shards left than processes.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._images: dict[str, Images] = {}

    def load(self, split: Split) -> Images:
        """Read one split: images ``(N, C, H, W)`` uint8 and labels ``(N,)`` int64 or None."""
        raise NotImplementedError

    def images(self, split: Split) -> Images:
        """One split, read at the first call.

        Args:
            split: ``train``, ``val`` or ``test``.

        Returns:
            Images ``(N, C, H, W)`` uint8 and labels ``(N,)`` int64, or None without labels.

        Raises:
            ValueError: If there is no such split, or it does not hold what the class says.
        """
        if split not in get_args(Split):
            raise ValueError(f"{split!r} is no split of the data: train, val and test are.")
        if split not in self._images:
            images, labels = self.load(split)
            self._check(split, images, labels)
            self._images[split] = images, labels
        return self._images[split]

    def setup(self, stage: str | None = None) -> None:
        """Read what a stage needs, so that missing data are reported before any work is done."""
        needed: dict[str | None, tuple[Split, ...]] = {
            "fit": ("train", "val"),
            "validate": ("val",),
            "test": ("test",),
        }
        for split in needed.get(stage, ()):  # noise, for `predict`, needs no data
            self.images(split)

    def train_dataloader(self) -> TrainLoader | FixedLoader:
        """Shuffled batches of the training split; a resumed run goes on with the next one."""
        gather, count = self._training_items()
        if getattr(self.trainer, "overfit_batches", 0) > 0:  # the same few batches in every epoch
            return FixedLoader(gather, even_share(count, self.batch_size, *self._place()))
        order = BatchOrder(count, self.batch_size, self.seed, *self._place())
        return TrainLoader(gather, order, self._trained_on, self.workers)

    def val_dataloader(self) -> FixedLoader:
        """The validation split in order, each image once over all processes."""
        return self._in_order("val")

    def test_dataloader(self) -> FixedLoader:
        """The test split in order, each image once over all processes."""
        return self._in_order("test")

    def predict_dataloader(self) -> FixedLoader:
        """Noise ``{"index", "noise", "label"?}`` in batches of consecutive indices.

        The processes share the batches that are not in ``skip_predict``.
        """
        items = torch.arange(self.predict_samples).split(self.predict_batch_size)
        left = [item for number, item in enumerate(items) if number not in self.skip_predict]
        if not left:  # nothing to do is no mistake, as Lightning takes it for
            warnings.filterwarnings("ignore", "Total length of `FixedLoader` across ranks is zero")
        rank, world_size = self._place()
        return FixedLoader(self._noise, left[rank::world_size])

    def check_teacher(self, denoiser: Denoiser) -> None:
        """Check that a teacher fits the data, and that it made them where one did."""
        self.check_model(denoiser)

    def check_model(self, denoiser: Denoiser) -> None:
        """Check that a model fits the data.

        Args:
            denoiser: A teacher or a student; what it leaves open (None) fits.

        Raises:
            ValueError: If its images have another shape, or it knows other classes.
        """
        advice = (
            "Give a teacher that was trained on such data (option teacher), or the data it was "
            "trained on (option data)."
        )
        shape = denoiser.image_shape
        if shape is not None and tuple(shape) != self.image_shape:
            raise ValueError(
                f"The teacher makes images of shape {tuple(shape)}, but those of the data set "
                f"{self.name!r} have shape {self.image_shape} (channels, height, width). {advice}"
            )
        classes = denoiser.num_classes
        if classes is not None and classes != self.num_classes:
            have = "no labels" if self.num_classes is None else f"{self.num_classes} classes"
            raise ValueError(
                f"The teacher knows {classes} classes, but the data set {self.name!r} has {have}. "
                f"{advice}"
            )

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.name}, images {self.image_shape})"

    def _place(self) -> tuple[int, int]:
        """Number of this process and number of processes."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _trained_on(self) -> int:
        """Number of batches that were trained on, in the run that a checkpoint goes on with too."""
        if self.trainer is None:
            return 0
        # `processed` counts at once after the step, so it is right in a checkpoint of any hook.
        total = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return total.processed  # type: ignore[attr-defined]  # annotated as its base class

    def _training_items(self) -> tuple[Callable[[Tensor], Batch], int]:
        """What makes a batch of training items, and how many items there are."""
        count = len(self.images("train")[0]) * (2 if self.flip else 1)
        return partial(self._gather, "train"), count

    def _in_order(self, split: Split) -> FixedLoader:
        items = even_share(len(self.images(split)[0]), self.batch_size, *self._place())
        return FixedLoader(partial(self._gather, split), items)

    def _gather(self, split: Split, indices: Tensor) -> Batch:
        """Items as a batch; indices from N on mean the mirrored images."""
        images, labels = self.images(split)
        source = indices % len(images)
        chosen = images.index_select(0, source)  # whole rows: 3 times as fast as images[source]
        if self.flip and split == "train":
            mirrored = indices >= len(images)
            chosen[mirrored] = chosen[mirrored].flip(-1)
        batch = {"image": to_signed(chosen)}
        if labels is not None:
            batch["label"] = labels[source]
        return batch

    def _noise(self, indices: Tensor) -> Batch:
        seeds = [self.predict_seed + int(i) for i in indices]
        batch = {"index": indices, "noise": seeded_noise(self.image_shape, seeds)}
        if self.num_classes is not None:
            batch["label"] = indices % self.num_classes
        return batch

    def _check(self, split: str, images: Tensor, labels: Tensor | None) -> None:
        if images.dtype != torch.uint8 or images.shape[1:] != self.image_shape or not len(images):
            raise ValueError(
                f"The {split} images of {self.name!r} are {images.dtype} of shape "
                f"{tuple(images.shape)}; uint8 of shape (N, *{self.image_shape}) is needed."
            )
        if (labels is None) != (self.num_classes is None):
            raise ValueError(f"The {split} labels of {self.name!r} do not fit num_classes.")
        if labels is None or self.num_classes is None:
            return
        if len(labels) != len(images) or not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise ValueError(
                f"The {split} labels of {self.name!r} are not one class below {self.num_classes} "
                f"for each of its {len(images)} images."
            )


def to_signed(images: Tensor) -> Tensor:
    """Map uint8 images 0..255 to float32 in [-1, 1]: ``v / 127.5 - 1``."""
    return images.float().div_(127.5).sub_(1)
