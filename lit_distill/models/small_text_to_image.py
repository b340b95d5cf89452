"""A text-to-image model of Stable Diffusion's classes, small enough to train on a laptop."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

_START, _END = "<|startoftext|>", "<|endoftext|>"  # CLIP's


def small_text_to_image(
    captions: Iterable[str],
    image_size: int = 16,
    channels: int = 1,
    tokens: int = 12,
    text_width: int = 32,
    vae_widths: tuple[int, ...] = (16, 32),
    unet_widths: tuple[int, ...] = (48, 96),
    seed: int = 0,
) -> StableDiffusionPipeline:
    """An untrained ``StableDiffusionPipeline`` of stock classes.

    The tokenizer is a byte-level BPE of the captions' words, as CLIP's. The text encoder keeps its
    random weights: it tells words apart, and the U-Net learns what they mean.

    Args:
        captions: Texts whose words become tokens; other words are spelled.
        image_size: Height and width of an image.
        channels: Channels of an image.
        tokens: Tokens of a prompt, with the two that mark its start and end.
        text_width: Width of a token's embedding; a multiple of 4.
        vae_widths: Channels of the VAE's levels; each after the first halves the image.
        unet_widths: Channels of the U-Net's levels; all but the first look at the prompt.
        seed: Seed of the weights.

    Raises:
        ValueError: If the image cannot be halved as often as the levels ask, or is no multiple of 8
            pixels, as the stock pipeline asks.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    halvings = len(vae_widths) + len(unet_widths) - 2
    if image_size % 2**halvings or image_size % 8:
        raise ValueError(
            f"image_size={image_size} must be a multiple of {max(8, 2**halvings)}: levels halve it "
            "and stock pipelines ask for multiples of 8."
        )
    latent_size, levels = image_size // 2 ** (len(vae_widths) - 1), len(unet_widths)
    tokenizer = word_tokenizer(captions, tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=text_width,
                intermediate_size=2 * text_width,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=tokens,
                projection_dim=text_width,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ).eval()
        vae = AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(vae_widths),
            up_block_types=("UpDecoderBlock2D",) * len(vae_widths),
            block_out_channels=vae_widths,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=image_size,
            mid_block_add_attention=False,
        ).eval()
        unet = UNet2DConditionModel(
            sample_size=latent_size,
            in_channels=4,
            out_channels=4,
            block_out_channels=unet_widths,
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * (levels - 1)),
            up_block_types=(*("CrossAttnUpBlock2D",) * (levels - 1), "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=text_width,
            attention_head_dim=4,  # a number of heads, by diffusers' oldest mistake
            norm_num_groups=8,
        ).eval()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def word_tokenizer(captions: Iterable[str], tokens: int) -> Any:
    """A ``CLIPTokenizer`` that knows the captions' words, each as one token.

    Args:
        captions: The texts.
        tokens: Tokens of a prompt, with start and end.

    Raises:
        ValueError: If there are no words.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    words = sorted({caption.lower() for caption in captions if caption.strip()})
    if not words:
        raise ValueError("There are no captions to take the words of a tokenizer from.")
    empty = CLIPTokenizer(vocab={_START: 0, _END: 1}, merges=[]).backend_tokenizer
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False
    )
    trained.train_from_iterator(words, trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    # Every byte, alone and at a word's end, so that any text can be spelled.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(f"{letter}</w>" for letter in letters)]
    names += ["".join(pair) for pair in merges]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys([*names, _START, _END]))}
    with tempfile.TemporaryDirectory() as folder:
        vocabulary_file, merges_file = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary_file.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        merges_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=tokens)
