"""Text to image on latents: the U-Net behind denoisers, and its frozen companions."""

import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from lit_distill.diffusion import Condition

_PIXELS_AT_ONCE = 2**22  # of images that are decoded in one pass: 16 of 512x512
_PROMPTS_AT_ONCE = 256
_GUIDANCE_WAVES = 256  # width of the embedded guidance (diffusers' LCM)


class LatentCodec:
    """The frozen parts of a ``StableDiffusionPipeline``: VAE, text encoder and tokenizer.

    It is shared by teacher, student and average, also by their copies, and no part of their
    weights. Latents are those that the U-Net sees: scaled by ``vae.config.scaling_factor``.

    Args:
        vae: Between images and latents.
        text_encoder: A ``CLIPTextModel``; its last hidden state is what prompts become.
        tokenizer: A ``CLIPTokenizer``.
        latent_size: Height and width of the latents that the U-Net was made for.

    Attributes:
        latent_shape: ``(c, h, w)`` of such latents.
        image_shape: ``(C, H, W)`` of their images.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: Any,
        tokenizer: Any,
        latent_size: int | tuple[int, int],
    ) -> None:
        self.vae = vae.requires_grad_(False).eval()
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        sides = (latent_size,) * 2 if isinstance(latent_size, int) else tuple(latent_size)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_shape = (vae.config.latent_channels, *sides)
        self.image_shape = (vae.config.in_channels, *(factor * side for side in sides))
        self._warned = False
        self._null = self.embed([""])

    def __deepcopy__(self, memo: dict[int, Any]) -> "LatentCodec":
        """The same object: it is frozen, and large."""
        return self

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings ``(N, L, D)`` of prompts, on the text encoder's device.

        A prompt that is longer than the text encoder takes is truncated, with one warning.
        """
        length = self.tokenizer.model_max_length
        if not self._warned:
            counts = [len(ids) for ids in self.tokenizer(list(prompts)).input_ids]
            if long := [i for i, count in enumerate(counts) if count > length]:
                self._warned = True
                warnings.warn(
                    f"Prompts of more than {length - 2} tokens are cut off there, as the text "
                    f"encoder takes no more: {len(long)} of these {len(prompts)}, the first is "
                    f"{prompts[long[0]]!r}.",
                    stacklevel=2,
                )
        parts = []
        for first in range(0, len(prompts), _PROMPTS_AT_ONCE):
            ids = self.tokenizer(
                list(prompts[first : first + _PROMPTS_AT_ONCE]),
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            parts.append(self.text_encoder(ids.to(self.text_encoder.device))[0])
        return torch.cat(parts)

    def condition(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What a denoiser is asked with for prompts."""
        return {"prompt_embeds": self.embed(prompts)}

    def null(self, prompt_embeds: Tensor) -> Tensor:
        """The empty prompt's embedding, in the shape of ``prompt_embeds`` (B, L, D)."""
        if self._null.device != prompt_embeds.device:
            self._null = self._null.to(prompt_embeds.device)
        return self._null.to(prompt_embeds.dtype).expand_as(prompt_embeds)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents ``(B, c, h, w)``, the VAE's mean, of images ``(B, C, H, W)`` in [-1, 1]."""
        self.vae.to(images.device)
        mean = self.vae.encode(images.to(self.vae.dtype)).latent_dist.mean
        return mean.float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` in about [-1, 1] of latents ``(B, c, h, w)``."""
        return self.decode_with_gradient(latents)

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """As :meth:`decode`, for distances between images that train on latents."""
        self.vae.to(latents.device)
        parts = latents.split(max(1, _PIXELS_AT_ONCE // math.prod(self.image_shape[1:])))
        scaled = (part.to(self.vae.dtype) / self.vae.config.scaling_factor for part in parts)
        return torch.cat([self.vae.decode(part).sample for part in scaled]).to(latents.dtype)

    def vae_hash(self) -> str:
        """SHA-256 (hex) of what latents depend on."""
        return _hash(self.vae, str(self.vae.config.scaling_factor))

    def text_hash(self) -> str:
        """SHA-256 (hex) of what embeddings of prompts depend on."""
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return _hash(self.text_encoder, f"{self.tokenizer.model_max_length} {vocabulary}")


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars for files that are read in a moment."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _hash(module: nn.Module, facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class TextUNet(nn.Module):
    """diffusers' ``UNet2DConditionModel`` on latents as ``network(x, time, condition)``.

    The condition is a dict with ``prompt_embeds`` (B, L, D), and where the network embeds the scale
    of guidance (``time_cond_proj_dim``, as latent consistency models do), ``guidance`` (B,), with 1
    for none; that such networks count from ``w = scale - 1`` is settled here.

    Args:
        unet: The network.
        codec: Its frozen companions.

    Raises:
        ValueError: If the network asks for more than a prompt.
    """

    feature_layers = ("unet.mid_block",)  # what a discriminator looks at
    num_classes = None
    null_label = None

    def __init__(self, unet: UNet2DConditionModel, codec: LatentCodec) -> None:
        super().__init__()
        config = unet.config
        if config.addition_embed_type is not None or config.class_embed_type is not None:
            raise ValueError(
                "This UNet2DConditionModel asks for more than a prompt (addition_embed_type="
                f"{config.addition_embed_type!r}, class_embed_type={config.class_embed_type!r}), "
                "as that of SDXL does; U-Nets of Stable Diffusion 1 and 2 are what can be loaded."
            )
        if {config.in_channels, config.out_channels} != {codec.latent_shape[0]}:
            raise ValueError(
                f"This UNet2DConditionModel has {config.in_channels} channels of input and "
                f"{config.out_channels} of output, and the VAE's latents have "
                f"{codec.latent_shape[0]}: give a model for text to image, not for inpainting."
            )
        self.unet, self.codec = unet, codec
        self.image_shape = codec.latent_shape

    @property
    def inputs(self) -> tuple[str, ...]:
        """Further conditions that the network takes."""
        return () if self.unet.config.time_cond_proj_dim is None else ("guidance",)

    def add_inputs(self, inputs: tuple[str, ...]) -> None:
        """Let the network take the scale of guidance; until it is trained that changes nothing.

        Raises:
            ValueError: If something else is asked for.
        """
        if inputs != ("guidance",):
            raise ValueError(
                f"A UNet2DConditionModel has no place for {', '.join(inputs)}; guidance is all "
                "that it can be given."
            )
        old = self.unet
        config = {k: v for k, v in old.config.items() if not k.startswith("_")}
        unet = UNet2DConditionModel(**{**config, "time_cond_proj_dim": _GUIDANCE_WAVES})
        unet.load_state_dict(old.state_dict(), strict=False)
        nn.init.zeros_(unet.time_embedding.cond_proj.weight)
        weight = next(old.parameters())
        self.unet = unet.train(old.training).to(weight.device)
        if weight.dtype != torch.float32:  # said only where needed: diffusers warns of it
            self.unet.to(weight.dtype)

    def forward(self, x: Tensor, time: Tensor, condition: Condition = None) -> Tensor:
        """Evaluate at latents ``x`` (B, c, h, w) and ``time`` (B,).

        Raises:
            ValueError: If there is no prompt in the condition, or no guidance where that is asked.
        """
        given = condition if isinstance(condition, dict) else {}
        if "prompt_embeds" not in given:
            raise ValueError(
                "This network is conditional on prompts and got none: use data with captions, such "
                "as LatentTextDataModule, or give the embedding of a prompt as prompt_embeds."
            )
        waves = None
        if self.inputs:
            if "guidance" not in given:
                raise ValueError("This network is told the scale of guidance and got none.")
            w = given["guidance"].float() - 1
            width = self.unet.config.time_cond_proj_dim
            waves = get_timestep_embedding(1000 * w, width).to(x.dtype)
        prompts = given["prompt_embeds"].to(x.dtype)
        return self.unet(x, time, prompts, timestep_cond=waves, return_dict=False)[0]
