"""CLIP score: how well images fit the prompts that they were asked for by."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.multimodal import CLIPScore

from lit_distill.models.text_to_image import without_bars

_FILES = ["*.json", "*.txt", "model.safetensors"]  # of a repository, beside the same in other forms


class ClipScore:
    """100 times the cosine between CLIP's embeddings of image and prompt, averaged, at least 0.

    torchmetrics' ``CLIPScore``, with weights from safetensors alone. Figures of different CLIP
    models are not comparable: rows name the model. A prompt is cut to what the text encoder takes.

    Args:
        model: Folder or hub id of a ``CLIPModel`` with its ``CLIPProcessor``; by default it is
            downloaded (1.7 GB, once).

    Attributes:
        name: The model, as it was given.

    Raises:
        FileNotFoundError: If there is no such folder, or the hub cannot be reached.
        ValueError: If the folder holds no such model.

    Source:
        Hessel et al., CLIPScore (2021), without the paper's factor of 2.5.
    """

    def __init__(self, model: str = "openai/clip-vit-large-patch14") -> None:
        self.name = model
        load: Any = partial(_load, _folder(model))  # of what stands in for torchmetrics' types
        self._metric = CLIPScore(load)

    def to(self, device: torch.device) -> "ClipScore":
        """Go to where the images are."""
        self._metric.to(device)
        return self

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Take in images and their prompts.

        Args:
            images: (N, C, H, W) uint8 with 1 or 3 channels, on the device to compute on.
            prompts: N texts.
        """
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            self._metric.update(list(images.expand(-1, 3, -1, -1)), list(prompts))

    def compute(self) -> float:
        """The score of what was taken in since the last time, by all processes: each calls it."""
        score = float(self._metric.compute())
        self._metric.reset()
        return score


class _Features(nn.Module):
    """A CLIP model as torchmetrics (1.9) asks it: for tensors, also where transformers 5 wraps."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels: Tensor) -> Tensor:
        return _tensor(self.model.get_image_features(pixel_values=pixels))

    def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        return _tensor(self.model.get_text_features(input_ids=ids, attention_mask=mask))


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


def _folder(model: str) -> Path:
    """The folder itself, or a snapshot of the hub's."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=_FILES))
    except Exception as error:  # the client raises errors of many kinds without a common base
        raise FileNotFoundError(
            f"There is no local folder {model} with a CLIP model, and it could not be fetched from "
            f"the hub ({type(error).__name__}): download its model.safetensors, config.json, and "
            "the files of its tokenizer and image processor where there is a network, and give "
            "the folder as the option model of ClipScore."
        ) from error


def _load(folder: Path) -> tuple[nn.Module, Any]:
    """The model and what prepares its inputs, as torchmetrics wants them."""
    from transformers import CLIPModel, CLIPProcessor  # slow to import, and only needed here

    try:
        with without_bars():
            loaded: Any = CLIPModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        processor = CLIPProcessor.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder} holds no CLIP model that can be read ({error}): give a whole folder, with "
            "model.safetensors, config.json, tokenizer and image processor, as the option model "
            "of ClipScore."
        ) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers
        raise ValueError(f"The CLIP weights in {folder} lack {', '.join(missing[:3])}.")
    length = model.config.text_config.max_position_embeddings

    def prepare(**inputs: Any) -> Any:
        cut = {"truncation": True, "max_length": length} if "text" in inputs else {}
        return processor(**inputs, **cut)  # torchmetrics would cut the end of the text's mark too

    return _Features(model.requires_grad_(False).eval()), prepare
