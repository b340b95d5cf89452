"""Data modules: real images, captioned latents, noise to predict on, and noise-image pairs."""

from lit_distill.datamodules.base import ImageDataModule, to_signed
from lit_distill.datamodules.captions import (
    CaptionedDigits,
    CaptionedFolder,
    CaptionedImages,
    caption_of,
)
from lit_distill.datamodules.cifar10 import CIFAR10DataModule
from lit_distill.datamodules.digits import DigitsDataModule
from lit_distill.datamodules.latent_text import LatentTextDataModule
from lit_distill.datamodules.mnist import MNISTDataModule
from lit_distill.datamodules.pairs import PairsDataModule

__all__ = [
    "CIFAR10DataModule",
    "CaptionedDigits",
    "CaptionedFolder",
    "CaptionedImages",
    "DigitsDataModule",
    "ImageDataModule",
    "LatentTextDataModule",
    "MNISTDataModule",
    "PairsDataModule",
    "caption_of",
    "to_signed",
]
