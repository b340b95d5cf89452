"""Data modules: real images, noise to predict on, and noise-image pairs."""

from lit_distill.datamodules.base import ImageDataModule, to_signed
from lit_distill.datamodules.cifar10 import CIFAR10DataModule
from lit_distill.datamodules.digits import DigitsDataModule
from lit_distill.datamodules.mnist import MNISTDataModule
from lit_distill.datamodules.pairs import PairsDataModule
from lit_distill.datamodules.plane import PlaneDataModule

__all__ = [
    "CIFAR10DataModule",
    "DigitsDataModule",
    "ImageDataModule",
    "MNISTDataModule",
    "PairsDataModule",
    "PlaneDataModule",
    "to_signed",
]
