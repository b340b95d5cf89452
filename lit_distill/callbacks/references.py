"""What samples are compared with: real images and a teacher's, seen once by the extractor."""

from pathlib import Path

from lightning.pytorch import Trainer
from torch import Tensor

from lit_distill.callbacks.sampling import Draw, draw_images, teacher_images
from lit_distill.datamodules import ImageDataModule
from lit_distill.datamodules.base import Split
from lit_distill.diffusion import Denoiser
from lit_distill.metrics.cache import Key, cache_file, hash_tensors, read_cache, write_cache
from lit_distill.metrics.cost import Sampler
from lit_distill.metrics.evaluation import ImageSet, describe
from lit_distill.metrics.extractors import Extractor


class References:
    """Image sets of one run of a trainer, kept in memory and, where they are costly, on disk.

    Args:
        trainer: The running trainer.
        data: The real images.
        num_classes: Classes of the models that are sampled; None for unconditional ones, which
            labelled data may have as well.
        extractor: What sees the images; it is moved to the trainer's device.
        folder: Cache of teacher samples and real features; None: ``cache`` beside the run's folder.
        batch_size: Images per pass of the extractor.
    """

    def __init__(
        self,
        trainer: Trainer,
        data: ImageDataModule,
        num_classes: int | None,
        extractor: Extractor,
        folder: Path | None,
        batch_size: int,
    ) -> None:
        self.trainer, self.data, self.num_classes = trainer, data, num_classes
        self.folder = folder or Path(trainer.default_root_dir).resolve().parent / "cache"
        self.extractor, self.batch_size = extractor.to(trainer.strategy.root_device), batch_size
        self._sets: dict[object, ImageSet] = {}

    def draw(self, count: int, seed: int) -> Draw:
        """The images ``0 .. count - 1`` of a seed."""
        return Draw(self.data.image_shape, self.num_classes, count, seed, self.batch_size)

    def real(self, split: Split) -> ImageSet:
        """The real images of "train", "val" or "test"."""
        if split not in self._sets:
            self._sets[split] = self._describe_real(split)
        return self._sets[split]

    def teacher(self, teacher: Denoiser, solver: str, steps: int, draw: Draw) -> ImageSet:
        """Samples of a teacher."""
        key = (teacher.fingerprint(), solver, steps, draw)  # a staged method changes its teacher
        if key not in self._sets:
            images = teacher_images(self.trainer, teacher, solver, steps, draw, self.folder)
            self._sets[key] = self.describe(images, draw.labels())
        return self._sets[key]

    def samples(self, sampler: Sampler, draw: Draw, title: str) -> ImageSet:
        """Fresh samples of a model."""
        return self.describe(draw_images(self.trainer, sampler, draw, title), draw.labels())

    def describe(self, images: Tensor, labels: Tensor | None) -> ImageSet:
        """Run the extractor over images (N, C, H, W) uint8."""
        return describe(
            self.extractor,
            images,
            labels,
            batch_size=self.batch_size,
            device=self.trainer.strategy.root_device,
            progress=self.trainer.is_global_zero,
        )

    def _describe_real(self, split: Split) -> ImageSet:
        images, labels = self.data.images(split)
        name = self.extractor.name
        key: Key = {"weights": hash_tensors(self.extractor), "images": hash_tensors(images)}
        path = cache_file(self.folder, f"{name}-{self.data.name}-{split}", key)
        cached = read_cache(path, key)
        if cached is not None:
            return ImageSet(images, labels, cached["features"], cached.get("logits"))
        made = self.describe(images, labels)
        if self.trainer.is_global_zero:
            tensors = {"features": made.features, "logits": made.logits}
            write_cache(path, key, {n: t for n, t in tensors.items() if t is not None})
        return made
