"""Networks, and denoisers in diffusers folders."""

from lit_distill.models.folders import load_denoiser, save_denoiser
from lit_distill.models.networks import UNet

__all__ = ["UNet", "load_denoiser", "save_denoiser"]
