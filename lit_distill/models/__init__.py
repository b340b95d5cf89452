"""Networks, and denoisers in diffusers folders."""

from lit_distill.models.condition_embedding import ConditionEmbedding
from lit_distill.models.conditioning import ModulatedNetwork, add_inputs
from lit_distill.models.discriminator import Discriminator, tapped
from lit_distill.models.loading import load_codec, load_denoiser
from lit_distill.models.lora import AdaptedNetwork, LoRA, adapted, merged, save_adapter
from lit_distill.models.mnist_ddpm import read_mnist_ddpm
from lit_distill.models.mnist_unet import MNISTUNet
from lit_distill.models.model_card import update_card, updates_of, write_card
from lit_distill.models.networks import UNet
from lit_distill.models.saving import folder_in_place, has_own_card, save_denoiser
from lit_distill.models.small_text_to_image import small_text_to_image
from lit_distill.models.text_to_image import LatentCodec, TextUNet

__all__ = [
    "AdaptedNetwork",
    "ConditionEmbedding",
    "Discriminator",
    "LatentCodec",
    "LoRA",
    "MNISTUNet",
    "ModulatedNetwork",
    "TextUNet",
    "UNet",
    "adapted",
    "add_inputs",
    "folder_in_place",
    "has_own_card",
    "load_codec",
    "load_denoiser",
    "merged",
    "read_mnist_ddpm",
    "save_adapter",
    "save_denoiser",
    "small_text_to_image",
    "tapped",
    "update_card",
    "updates_of",
    "write_card",
]
