"""Networks, and denoisers in diffusers folders."""

from lit_distill.models.loading import load_denoiser
from lit_distill.models.networks import UNet
from lit_distill.models.saving import save_denoiser

__all__ = ["UNet", "load_denoiser", "save_denoiser"]
