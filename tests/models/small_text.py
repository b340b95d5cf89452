"""A text-to-image model of a few thousand weights with Stable Diffusion's classes."""

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from lit_distill.models import small_text_to_image

WORDS = ["a handwritten picture of the digit", "zero one two three four five six seven eight nine"]
SIZE = {"tokens": 8, "text_width": 16, "vae_widths": (8, 16, 16), "unet_widths": (16, 16)}


def text_pipeline(seed: int = 0, **options: Any) -> StableDiffusionPipeline:
    """Untrained, but not mute: a fresh U-Net hardly listens to its prompt."""
    pipeline = small_text_to_image(WORDS, seed=seed, **{**SIZE, **options})
    with torch.no_grad():
        for name, weight in pipeline.unet.named_parameters():
            if "attn2.to_" in name and weight.ndim == 2:
                weight *= 4
    return pipeline


def text_folder(folder: Path, seed: int = 0, **options: Any) -> str:
    """The same as a folder that diffusers wrote."""
    text_pipeline(seed, **options).save_pretrained(folder)
    return str(folder)
