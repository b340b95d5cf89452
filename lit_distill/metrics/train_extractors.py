"""Train the small classifiers whose features the metrics use, and write their weight files.

    python -m lit_distill.metrics.train_extractors digits
    python -m lit_distill.metrics.train_extractors mnist --data FOLDER

FOLDER contains ``mnist/``. Only the training split is learned from; the recipes were chosen on the
validation split; the accuracy on the test split is printed at the end and decides nothing.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import save as to_bytes
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from lit_distill.datamodules import DigitsDataModule, ImageDataModule, MNISTDataModule, to_signed
from lit_distill.datamodules.base import Split
from lit_distill.metrics.extractors import (
    WEIGHTS_FOLDER,
    ClassifierExtractor,
    ConvClassifier,
    DigitsExtractor,
    MNISTExtractor,
)


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained.

    Attributes:
        reconstruction: Weight of the squared error of the image as a linear map of the features.
            The features of a plain classifier shrink to one point a class, and then a Frechet
            distance hardly sees that a generator repeats itself. With weight 1 the distance of 20
            digits a class from their whole training set is twice as large (0.53 instead of 0.28,
            beside 1.0 and 0.9 between its halves), at the same accuracy.
        shift: Standard deviation of the shift, in pixels.
        affine: That of the four entries of the linear map (rotation, zoom, shear).
        elastic: That of a smooth random displacement, in pixels.
        contrast: That of the relative brightness of the ink.
        noise: That of the pixels' noise, for a pixel range of [-1, 1].
    """

    epochs: int
    shift: float
    affine: float
    elastic: float
    batch_size: int = 100
    learning_rate: float = 3e-3
    weight_decay: float = 0.02
    dropout: float = 0.3
    ema_decay: float = 0.995
    reconstruction: float = 1.0
    contrast: float = 0.2
    noise: float = 0.1


RECIPES = {
    "digits": Recipe(epochs=200, shift=0.5, affine=0.1, elastic=0.2),
    "mnist": Recipe(epochs=5, shift=1.0, affine=0.1, elastic=0.5),
}
EXTRACTORS: dict[str, type[ClassifierExtractor]] = {
    "digits": DigitsExtractor,
    "mnist": MNISTExtractor,
}


def distort(images: Tensor, recipe: Recipe, generator: Generator) -> Tensor:
    """Random affine and elastic distortion and contrast, another one for each image.

    Args:
        images: (N, C, H, W) in [-1, 1], where -1 is the background.
        recipe: Strength of the distortions.
        generator: Source of all randomness.

    Returns:
        Images (N, C, H, W), about [-1, 1].

    Source:
        Simard et al., Best practices for convolutional neural networks (2003), section 2.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(len(images), *shape, generator=generator)

    height, width = images.shape[2:]
    pixel = torch.tensor([2 / width, 2 / height])  # the image spans [-1, 1] in grid_sample
    linear = torch.eye(2) + recipe.affine * normal(2, 2)
    shift = recipe.shift * pixel * normal(2)
    grid = functional.affine_grid(
        torch.cat([linear, shift.unsqueeze(2)], 2), list(images.shape), align_corners=False
    )
    coarse = recipe.elastic * normal(2, 4, 4)
    elastic = functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    grid = grid + pixel * elastic.permute(0, 2, 3, 1)
    ink = functional.grid_sample(images + 1, grid, align_corners=False)  # outside there is no ink
    return ink * (1 + recipe.contrast * normal(1, 1, 1)) - 1


def train(
    network: ConvClassifier, images: Tensor, labels: Tensor, recipe: Recipe, seed: int
) -> dict[str, Tensor]:
    """Train by AdamW and average the weights along the way.

    Args:
        network: The untrained network; its weights are changed.
        images: (N, C, H, W) in [-1, 1].
        labels: (N,) int64.
        recipe: All settings.
        seed: Seeds the order and the distortions.

    Returns:
        The averaged weights, as ``network.state_dict()``.
    """
    generator = Generator().manual_seed(seed)
    decoder = nn.Linear(network.head.in_features, images[0].numel())
    parameters = [*network.parameters(), *decoder.parameters()]
    steps_per_epoch = len(images) // recipe.batch_size
    optimizer = torch.optim.AdamW(
        parameters, recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.epochs * steps_per_epoch, pct_start=0.1
    )
    averaged = AveragedModel(
        network, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay), use_buffers=True
    )
    network.train()
    for _ in tqdm(range(recipe.epochs), "training", unit="epoch"):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: steps_per_epoch * recipe.batch_size].split(recipe.batch_size):
            clean = distort(images[rows], recipe, generator)
            noise = torch.randn(clean.shape, generator=generator)
            features = network.features(clean + recipe.noise * noise)
            logits = network.head(functional.dropout(features, recipe.dropout))
            loss = functional.cross_entropy(logits, labels[rows])
            loss += recipe.reconstruction * functional.mse_loss(decoder(features), clean.flatten(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(network)
    return averaged.module.state_dict()


def save(weights: dict[str, Tensor], path: Path) -> None:
    """Write weights as float16; a killed run leaves no half file under the final name."""
    half = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(to_bytes(half))  # save_file would make it unreadable for other users
    os.replace(unfinished, path)


def labelled(data: ImageDataModule, split: Split) -> tuple[Tensor, Tensor]:
    """Images and labels of a split of labelled data."""
    images, labels = data.images(split)
    if labels is None:
        raise ValueError(f"The data set {data.name!r} has no labels: a classifier needs them.")
    return images, labels


def accuracy(extractor: ClassifierExtractor, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 images whose largest logit is that of their label."""
    guesses = torch.cat([extractor.logits(part).argmax(1) for part in images.split(500)])
    return (guesses == labels).double().mean().item()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train one classifier, write its weights, print its accuracies."""
    parser = argparse.ArgumentParser(prog="train_extractors", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("dataset", choices=sorted(EXTRACTORS))
    parser.add_argument("--data", type=Path, help="folder of mnist/ (default: $LIT_DISTILL_DATA)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="weight file (default: the package's own)")
    options = parser.parse_args(arguments)

    data: ImageDataModule = DigitsDataModule()
    if options.dataset == "mnist":
        data = MNISTDataModule(root=options.data and str(options.data / "mnist"))
    images, labels = labelled(data, "train")
    torch.set_num_threads(1)  # the bits of the result change with the number of threads
    torch.manual_seed(options.seed)
    extractor_class = EXTRACTORS[options.dataset]
    network = extractor_class.build_network()
    weights = train(network, to_signed(images), labels, RECIPES[options.dataset], options.seed)

    path = options.out or WEIGHTS_FOLDER / f"{options.dataset}.safetensors"
    save(weights, path)
    extractor = extractor_class(path)
    print(f"{path}: {path.stat().st_size:,} bytes")
    for split in get_args(Split):
        print(f"accuracy on {split}: {accuracy(extractor, *labelled(data, split)):.2%}")


if __name__ == "__main__":
    main()
