"""A CLIP model of a few thousand random weights, with all that belongs to its folder."""

import sys
from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from small_text import text_pipeline

LENGTH = 8
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # those of CLIP
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
LAYERS = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def clip_folder(folder: Path, seed: int = 0) -> str:
    """Its image encoder takes 16x16, its text encoder ``LENGTH`` tokens of the digits' captions."""
    tokenizer = text_pipeline().tokenizer
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, **ends, **LAYERS}
    vision = {"image_size": 16, "patch_size": 8, **LAYERS}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(folder)
    sides = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(CLIPImageProcessor(**sides), tokenizer).save_pretrained(folder)
    return str(folder)


def by_hand(folder: str, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Cosines (N,) of images and prompts from the model's own parts, one at a time."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        ids = tokenizer(prompt).input_ids
        ids = [*ids[: LENGTH - 1], ids[-1]] if len(ids) > LENGTH else ids  # it keeps its end
        with torch.no_grad():
            pixels = (image.float() / 255 - MEAN) / STD
            seen = model.visual_projection(model.vision_model(pixels[None]).pooler_output)[0]
            states = model.text_model(torch.tensor([ids])).last_hidden_state
            read = model.text_projection(states[0, -1])
        found.append(seen @ read / seen.norm() / read.norm())
    return torch.stack(found)
