"""What a set of generated images is worth: all figures of it, from one pass of an extractor.

A Frechet distance alone is easily fooled on small data: a copy of the training set scores better
than a good model, and a few repeated images a class look fine. So :func:`measure` reports coverage,
the labels and the distance to the nearest training image beside it. Real held-out images, measured
in the same way, are the yardstick.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from lit_distill.metrics.extractors import Extractor
from lit_distill.metrics.figures import (
    bootstrap_interval,
    class_entropy,
    coverage,
    coverage_interval,
    covered,
    frechet_distance,
    label_accuracy,
    nearest_images,
    pixel_distance,
    recall,
    subset,
)

_NEAREST_IMAGES = 2_000  # their mean is known to a hundredth, and 50,000 images are searched


@dataclass(frozen=True)
class ImageSet:
    """Images with what an extractor says of them; all on the CPU.

    Attributes:
        images: (N, C, H, W) uint8; of a set that is too large to keep, the first of them.
        labels: (N,) int64, the labels asked for or given with the data; None without classes.
        features: (N, F) float32.
        logits: (N, K) float32; None if the extractor is no classifier of the data's labels.
    """

    images: Tensor
    labels: Tensor | None
    features: Tensor
    logits: Tensor | None

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Measures:
    """The figures of one set of images; None where one makes no sense.

    Attributes:
        fd_teacher: Frechet distance to the teacher's samples.
        fd_test: Frechet distance to held-out images.
        fd_train: Frechet distance to training images.
        coverage: Share of the held-out images that the set covers, see :func:`coverage`.
        recall: Share of the held-out images that is within the set's reach, see :func:`recall`.
        coverage_train: Share of the training images that it covers.
        label_accuracy: Share of images recognised as their label, in [0, 1].
        class_entropy: Entropy of the recognised classes over its maximum ``ln K``, in [0, 1].
        nearest_train: Mean L2 distance to the nearest training image, pixels in [-1, 1], over at
            most 2,000 images.
        paired_distance: Mean L2 distance to the teacher's image from the same noise.
        fd_teacher_interval: Ends of the 95% interval of ``fd_teacher``, see
            :func:`bootstrap_interval`.
        fd_test_interval: Those of ``fd_test``.
        coverage_interval: Those of ``coverage``, see :func:`coverage_interval`.
    """

    fd_teacher: float | None = None
    fd_test: float | None = None
    fd_train: float | None = None
    coverage: float | None = None
    recall: float | None = None
    coverage_train: float | None = None
    label_accuracy: float | None = None
    class_entropy: float | None = None
    nearest_train: float | None = None
    paired_distance: float | None = None
    fd_teacher_interval: tuple[float, float] | None = None
    fd_test_interval: tuple[float, float] | None = None
    coverage_interval: tuple[float, float] | None = None


@torch.no_grad()
def describe(
    extractor: Extractor,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    batch_size: int = 500,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> ImageSet:
    """Run an extractor over images.

    Args:
        extractor: It must be on ``device`` already.
        images: (N, C, H, W) uint8.
        labels: (N,) int64, kept beside the images.
        batch_size: Images per pass.
        device: Where the extractor is.
        progress: Show a progress bar, in a terminal.

    Returns:
        The images with their features and, from a classifier, logits; on the CPU.
    """
    features, logits = [], []
    title, hidden = f"{extractor.name} features", None if progress else True
    batches = tqdm(images.split(batch_size), title, disable=hidden, leave=False)
    for batch in batches:
        if extractor.classifies:
            batch_features, batch_logits = extractor.features_and_logits(batch.to(device))
            logits.append(batch_logits.cpu())
        else:
            batch_features = extractor(batch.to(device))
        features.append(batch_features.cpu())
    return ImageSet(images, labels, torch.cat(features), torch.cat(logits) if logits else None)


def joined(parts: Sequence[ImageSet], keep: int) -> ImageSet:
    """One set of several, in their order.

    Args:
        parts: At least one.
        keep: How many images to keep, if there are more; features and logits are kept of all.
    """
    images = torch.cat([part.images[:keep] for part in parts])[:keep]
    labels = [part.labels for part in parts if part.labels is not None]
    logits = [part.logits for part in parts if part.logits is not None]
    return ImageSet(
        images,
        torch.cat(labels) if labels else None,
        torch.cat([part.features for part in parts]),
        torch.cat(logits) if logits else None,
    )


def check_resamples(resamples: int) -> None:
    """Check the option of that name before anything slow.

    Raises:
        ValueError: If an interval cannot be drawn of so few.
    """
    if resamples < 0 or resamples == 1:
        raise ValueError(
            f"resamples={resamples}: an interval takes at least 2, and 0 leaves it out."
        )


def measure(
    samples: ImageSet,
    *,
    train: ImageSet | None = None,
    test: ImageSet | None = None,
    teacher: ImageSet | None = None,
    paired: Tensor | None = None,
    resamples: int = 0,
) -> Measures:
    """All figures of a set of images; leave a reference out to leave its figures out.

    Args:
        samples: What is judged: generated images, or real ones as the yardstick.
        train: Training images.
        test: Held-out images.
        teacher: The teacher's samples from other noise than the set's own.
        paired: (N, C, H, W) uint8, the teacher's images from the set's own noise; as many as there
            are images in ``samples``.
        resamples: Draws of each bootstrap interval; 0 leaves the intervals out.

    Returns:
        The figures, with None where a reference or a classifier is missing.
    """
    logits, labels = samples.logits, samples.labels

    def distance(reference: ImageSet | None) -> float | None:
        if reference is None:
            return None
        return frechet_distance(reference.features, samples.features)

    def interval(reference: ImageSet | None) -> tuple[float, float] | None:
        if reference is None or not resamples:
            return None
        return bootstrap_interval(
            reference.features,
            samples.features,
            groups=(_given_in_turn(reference), _given_in_turn(samples)),
            resamples=resamples,
        )

    def nearest(pool: ImageSet | None) -> float | None:
        if pool is None:
            return None
        images = subset(samples.images, _NEAREST_IMAGES)
        return float(nearest_images(images, pool.images)[0].double().mean())

    found = None if test is None else covered(test.features, samples.features)
    return Measures(
        fd_teacher=distance(teacher),
        fd_test=distance(test),
        fd_train=distance(train),
        coverage=None if found is None else float(found.double().mean()),
        recall=None if test is None else recall(test.features, samples.features),
        coverage_train=None if train is None else coverage(train.features, samples.features),
        label_accuracy=None if logits is None or labels is None else label_accuracy(logits, labels),
        class_entropy=None if logits is None else class_entropy(logits),
        nearest_train=nearest(train),
        paired_distance=None if paired is None else pixel_distance(samples.images, paired),
        fd_teacher_interval=interval(teacher),
        fd_test_interval=interval(test),
        coverage_interval=None if found is None or not resamples else coverage_interval(found),
    )


def _given_in_turn(images: ImageSet) -> Tensor | None:
    """Labels that were asked for in turn, as their equal counts show, and not drawn."""
    if images.labels is None:
        return None
    counts = images.labels.unique(return_counts=True)[1]
    return images.labels if counts.max() - counts.min() <= 1 else None
