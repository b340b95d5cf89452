"""Data modules: real images, captioned latents, noise to predict on, and noise-image pairs."""

from lit_distill.datamodules.base import ImageDataModule, to_signed
from lit_distill.datamodules.caption_shards import CaptionedParquet, CaptionedWebDataset
from lit_distill.datamodules.captions import (
    CaptionedDigits,
    CaptionedFolder,
    CaptionedImages,
    caption_of,
)
from lit_distill.datamodules.celeba import CelebADataModule
from lit_distill.datamodules.cifar10 import CIFAR10DataModule
from lit_distill.datamodules.digits import DigitsDataModule
from lit_distill.datamodules.image_folder import ImageFolderDataModule
from lit_distill.datamodules.latent_text import LatentTextDataModule
from lit_distill.datamodules.mnist import MNISTDataModule
from lit_distill.datamodules.pairs import PairsDataModule
from lit_distill.datamodules.plane import PlaneDataModule

__all__ = [
    "CIFAR10DataModule",
    "CaptionedDigits",
    "CaptionedFolder",
    "CaptionedImages",
    "CaptionedParquet",
    "CaptionedWebDataset",
    "CelebADataModule",
    "DigitsDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "LatentTextDataModule",
    "MNISTDataModule",
    "PairsDataModule",
    "PlaneDataModule",
    "caption_of",
    "to_signed",
]
