"""Diffusion distillation on PyTorch Lightning: few-step generators that open in plain diffusers."""

from importlib.metadata import PackageNotFoundError, version

from lit_distill._torchvision_ops import define_missing_torchvision_ops

define_missing_torchvision_ops()

try:
    __version__ = version("lit-distill")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["__version__"]
