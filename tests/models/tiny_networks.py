"""Networks of a few thousand weights with the classes of the real ones."""

from typing import Any

import torch
from diffusers import UNet2DModel

from lit_distill.models import UNet

SIZE = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}


def tiny_network(num_classes: int | None = None, seed: int = 0, **arguments: Any) -> UNet:
    """A network for 8x8 images of one channel."""
    torch.manual_seed(seed)
    return UNet(**({"image_size": 8, "channels": 1, "num_classes": num_classes} | SIZE | arguments))


def stock_unet(**arguments: Any) -> UNet2DModel:
    """The same architecture, made by diffusers alone."""
    torch.manual_seed(1)
    blocks = {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    shape = {"sample_size": 8, "in_channels": 1, "out_channels": 1}
    return UNet2DModel(**(shape | SIZE | blocks | arguments))


def perturbed(network: UNet) -> UNet:
    """The same network, with further conditions that change its output."""
    if network.conditions is not None:
        generator = torch.Generator().manual_seed(5)
        for embedding in network.conditions.numbers.values():
            weight = embedding.linear_2.weight
            weight.data = 0.5 * torch.randn(weight.shape, generator=generator)
    return network
