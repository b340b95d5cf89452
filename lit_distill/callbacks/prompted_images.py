"""Draws the images that a text-to-image model is judged by, and looks at them once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, distributed
from tqdm import tqdm

from lit_distill.datamodules import CaptionedImages
from lit_distill.diffusion import (
    Condition,
    Denoiser,
    GuidedDenoiser,
    drawn_noise,
    sample,
    seeded_generators,
    told,
)
from lit_distill.metrics.clip import ClipScore
from lit_distill.metrics.evaluation import ImageSet, describe, joined
from lit_distill.metrics.extractors import Extractor
from lit_distill.metrics.figures import to_uint8
from lit_distill.models import LatentCodec

_KEPT = 2_000  # images of a set: a mean over them is known to a hundredth


@dataclass(frozen=True)
class PromptedModel:
    """A text-to-image model, its name in the table, and how it is sampled.

    Attributes:
        method: Its name.
        denoiser: The model.
        steps: Number of steps.
        solver: None for the model's own way to be sampled.
        guidance: Scale; None for none, or for what the model was trained for.
    """

    method: str
    denoiser: Denoiser
    steps: int
    solver: str | None
    guidance: float | None

    @property
    def codec(self) -> LatentCodec:
        """Its VAE and text encoder."""
        codec = self.denoiser.codec
        assert isinstance(codec, LatentCodec)
        return codec

    def sampler(self) -> Callable[[Tensor, Condition, Any], Tensor]:
        """Noise, condition and generators to images in about [-1, 1]."""
        model, scale = self.denoiser, self.guidance
        is_told = "guidance" in model.inputs
        if scale is not None and scale != 1 and not is_told:
            model = GuidedDenoiser(model, scale)

        def run(noise: Tensor, condition: Condition, generator: Any = None) -> Tensor:
            if scale is not None and is_told:
                scales = torch.full((len(noise),), scale, device=noise.device)
                condition = told(self.denoiser, condition, guidance=scales)
            x = sample(
                model,
                noise,
                steps=self.steps,
                solver=self.solver,
                condition=condition,
                generator=generator,
            )
            return self.denoiser.decode(x)

        return run

    def condition(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """What it is asked with; a prompt that occurs several times is embedded once."""
        numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        rows = torch.tensor([numbers[prompt] for prompt in prompts])
        self.codec.text_encoder.to(device)
        embedded = self.codec.condition(list(numbers))
        return {name: t[rows.to(t.device)].to(device) for name, t in embedded.items()}


@dataclass(frozen=True)
class Seen:
    """What is known of a set of images.

    Attributes:
        images: With what the extractor says of them; at most 2,000 are kept.
        clip_score: Their CLIP score, where that is measured.
    """

    images: ImageSet
    clip_score: float | None


class PromptedImages:
    """Images to prompts, of models and real ones, as an extractor and CLIP see them.

    Image ``i`` is of prompt ``i % len(prompts)``. Of large sets some images are kept, and what was
    seen of all.

    Args:
        trainer: The running trainer. Its processes each make their share of the batches, and all
            know what was seen of all.
        extractor: What sees the images.
        prompts: What is asked for.
        labels: (len(prompts),) The extractor's class that each prompt asks for, or None.
        clip_score: What else sees them, or None.
        batch_size: Images a batch.
    """

    def __init__(
        self,
        trainer: Trainer,
        extractor: Extractor,
        prompts: Sequence[str],
        labels: Sequence[int] | None,
        clip_score: ClipScore | None,
        batch_size: int,
    ) -> None:
        self.trainer, self.prompts = trainer, list(prompts)
        self.device = trainer.strategy.root_device
        self.clip_score = None if clip_score is None else clip_score.to(self.device)
        self.extractor, self.batch_size = extractor.to(self.device), batch_size
        self.labels = None if labels is None else torch.tensor(list(labels))

    def of_model(self, model: PromptedModel, count: int, seed: int) -> Seen:
        """A model's images ``0 .. count - 1``; ``i`` starts from the noise of seed ``seed + i``."""
        run, shape = model.sampler(), model.codec.latent_shape

        def made(rows: range, prompts: list[str]) -> Tensor:
            generators = seeded_generators([seed + i for i in rows])
            noise = drawn_noise(shape, generators).to(self.device)
            condition = model.condition(prompts, self.device)
            with isolate_rng(), self.trainer.precision_plugin.forward_context():
                return to_uint8(run(noise, condition, generators).float())

        return self._seen(made, range(count), f"{model.method}, {model.steps} steps")

    def of_source(self, source: CaptionedImages, rows: range, shape: tuple[int, ...]) -> Seen:
        """Real images, whose captions are the prompts."""
        return self._seen(lambda part, _: source.images(part, shape), rows, "real images")

    def _seen(self, made: Callable[[range, list[str]], Tensor], rows: range, title: str) -> Seen:
        """Make images of rows and prompts ``(N, C, H, W)`` uint8 batch by batch, and look."""
        parts: dict[int, ImageSet] = {}
        rank, count = self.trainer.global_rank, self.trainer.world_size
        firsts = range(rows.start, rows.stop, self.batch_size)[rank::count]
        for first in tqdm(firsts, title, leave=False, disable=True if rank else None):
            part = range(first, min(first + self.batch_size, rows.stop))
            asked = [i % len(self.prompts) for i in part]
            prompts = [self.prompts[i] for i in asked]
            images = made(part, prompts).to(self.device)
            if self.clip_score is not None:
                self.clip_score.update(images, prompts)
            labels = None
            if self.labels is not None and self.extractor.classifies:
                labels = self.labels[asked]
            looked = describe(self.extractor, images, labels, device=self.device)
            left = max(0, _KEPT - (first - rows.start))
            parts[first] = joined([looked], left)
        if count > 1:
            every: list[Any] = [None] * count
            distributed.all_gather_object(every, parts)
            parts = {first: seen for found in every for first, seen in found.items()}
        score = None if self.clip_score is None else self.clip_score.compute()
        return Seen(joined([parts[first] for first in sorted(parts)], _KEPT), score)
