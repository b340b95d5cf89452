"""Draws fixed sets of images, the same for any number of processes, and caches a teacher's."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from tqdm import tqdm

from lit_distill.datamodules import ImageDataModule
from lit_distill.diffusion import Condition, Denoiser, sample, seeded_noise
from lit_distill.metrics.cache import Key, cache_file, read_cache, write_cache
from lit_distill.metrics.cost import Sampler, labels_at
from lit_distill.metrics.figures import to_uint8


class GenerativeModule(Protocol):
    """What the callbacks ask of a module; every distillation module fulfils it."""

    student: Denoiser
    teacher: Denoiser | None
    solver: str | None
    teacher_evaluations: int
    train_seconds: float
    further_ema_decays: tuple[float, ...]

    def sampled_with(self, decay: float) -> AbstractContextManager[None]:
        """Generate with another average of the weights for a while."""
        ...

    def generate(self, noise: Tensor, condition: Condition, steps: int) -> Tensor:
        """Images (B, C, H, W) in about [-1, 1] from unit noise."""
        ...

    def preview(self, noise: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Images (B, C, H, W) in about [-1, 1] that show how the training goes, by name."""
        ...


def generative(module: LightningModule) -> GenerativeModule:
    """The same module, seen as one that generates."""
    return cast(GenerativeModule, module)


def data_of(trainer: Trainer, callback: object) -> ImageDataModule:
    """The data module of a running trainer.

    Raises:
        ValueError: If the trainer was given none; the sentence names the callback that asks.
    """
    data = getattr(trainer, "datamodule", None)
    if data is None:
        raise ValueError(
            f"The callback {type(callback).__name__} needs a data module for the image shape, the "
            "classes and the real images: pass one (datamodule=...), or take the callback out."
        )
    return cast(ImageDataModule, data)


@dataclass(frozen=True)
class Draw:
    """Which images: image ``i`` has the noise of seed ``seed + i`` and the label ``i % K``.

    Attributes:
        shape: (C, H, W).
        num_classes: K, or None for unconditional models.
        count: Number of images.
        seed: Seed of the first image.
        batch_size: Images per batch; fixed batches keep the bits free of the process count.
    """

    shape: tuple[int, ...]
    num_classes: int | None
    count: int
    seed: int
    batch_size: int

    def labels(self) -> Tensor | None:
        """The labels (count,) int64, or None."""
        return labels_at(torch.arange(self.count), self.num_classes)

    def following(self) -> "Draw":
        """As many images with the seeds that come next."""
        return replace(self, seed=self.seed + self.count)

    def batch(self, first: int) -> tuple[Tensor, Tensor | None]:
        """Noise and labels of the batch that starts at image ``first``."""
        indices = torch.arange(first, min(first + self.batch_size, self.count))
        noise = seeded_noise(self.shape, (self.seed + indices).tolist())
        return noise, labels_at(indices, self.num_classes)


def in_precision(trainer: Trainer, sampler: Sampler) -> Sampler:
    """The same sampler in the trainer's precision; float32 comes out."""

    def run(noise: Tensor, condition: Condition) -> Tensor:
        # Around the networks only: "bf16-true" would draw the noise itself in bfloat16.
        with trainer.precision_plugin.forward_context():
            return sampler(noise, condition).float()

    return run


@torch.no_grad()
def draw_images(trainer: Trainer, sampler: Sampler, draw: Draw, title: str) -> Tensor:
    """Sample a set of images, shared over the trainer's processes.

    Sampling runs in the trainer's precision. The global random state, which a stochastic sampler
    may use, is seeded for each batch and left as it was found.

    Args:
        trainer: Its processes each make their share of the batches; all receive all images.
        sampler: Noise and condition to images.
        draw: Which images.
        title: Text of the progress bar (first process only).

    Returns:
        (count, C, H, W) uint8, on the CPU.

    Raises:
        ValueError: If an image is not finite.
    """
    device = trainer.strategy.root_device
    images = torch.zeros((draw.count, *draw.shape), dtype=torch.uint8)
    firsts = range(0, draw.count, draw.batch_size)[trainer.global_rank :: trainer.world_size]
    run = in_precision(trainer, sampler)
    with isolate_rng():
        hidden = None if trainer.is_global_zero else True  # None: where a person looks at it
        for first in tqdm(firsts, title, disable=hidden, leave=False):
            noise, labels = draw.batch(first)
            torch.manual_seed(draw.seed + first)
            made = run(noise.to(device), None if labels is None else labels.to(device))
            if not made.isfinite().all():
                raise ValueError(
                    f"There are NaN or infinite values among the images of '{title}': the model "
                    "has diverged. Take an earlier checkpoint, or train with a lower learning rate."
                )
            images[first : first + len(made)] = to_uint8(made).cpu()
    return _share(trainer, images)


def module_sampler(module: GenerativeModule, steps: int) -> Sampler:
    """A sampler that asks a module to generate."""
    return lambda noise, condition: module.generate(noise, condition, steps)


def teacher_sampler(teacher: Denoiser, solver: str, steps: int) -> Sampler:
    """A sampler that runs a solver on the teacher's own grid."""
    return lambda noise, condition: sample(
        teacher, noise, steps=steps, solver=solver, condition=condition
    )


def teacher_images(
    trainer: Trainer, teacher: Denoiser, solver: str, steps: int, draw: Draw, folder: Path
) -> Tensor:
    """Sample a teacher, or take its images from the cache.

    Args:
        trainer: As for :func:`draw_images`. The first process alone reads and writes the cache.
        teacher: The teacher.
        solver: Name of the solver.
        steps: Its number of steps.
        draw: Which images.
        folder: The cache.

    Returns:
        (count, C, H, W) uint8, on the CPU.
    """
    key: Key = {
        "teacher": teacher.fingerprint(),
        "solver": solver,
        "steps": steps,
        "precision": str(trainer.precision),
        **{name: getattr(draw, name) for name in ("num_classes", "count", "seed", "batch_size")},
        "shape": list(draw.shape),
    }
    title = f"teacher, {solver} {steps}"
    path = cache_file(folder, f"teacher-{solver}{steps}-{draw.count}", key)
    cached = read_cache(path, key) if trainer.is_global_zero else None
    if trainer.strategy.broadcast(cached is not None):
        empty = torch.zeros((draw.count, *draw.shape), dtype=torch.uint8)
        return _share(trainer, empty if cached is None else cached["images"])
    images = draw_images(trainer, teacher_sampler(teacher, solver, steps), draw, title)
    if trainer.is_global_zero:
        write_cache(path, key, {"images": images})
    return images


def _share(trainer: Trainer, images: Tensor) -> Tensor:
    """Give every process all images, of which each holds some and zeros at the others' places."""
    if trainer.world_size == 1:
        return images
    on_device = images.to(trainer.strategy.root_device)
    return trainer.strategy.reduce(on_device, reduce_op="sum").cpu()
