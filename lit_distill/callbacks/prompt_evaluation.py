"""Evaluates a text-to-image student beside its guided teacher, prompt by prompt."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from tqdm import tqdm

from lit_distill.callbacks.pictures import draw_rows
from lit_distill.callbacks.report import Row, format_table, make_row, metric_names, write_rows
from lit_distill.callbacks.sampling import generative, in_precision
from lit_distill.diffusion import (
    Condition,
    Denoiser,
    GuidedDenoiser,
    drawn_noise,
    sample,
    seeded_generators,
    told,
)
from lit_distill.metrics.cost import Sampler, measure_cost
from lit_distill.metrics.evaluation import ImageSet, describe, measure
from lit_distill.metrics.extractors import Extractor
from lit_distill.metrics.figures import to_uint8

_PICTURED = 3  # images of each prompt and model


@dataclass(frozen=True)
class _Model:
    """What is measured: a model, its name in the table, and how it is sampled."""

    method: str
    denoiser: Denoiser
    steps: int
    solver: str | None
    guidance: float | None

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


class PromptEvaluation(Callback):
    """Measures a text-to-image model when it is tested: are its images recognised as asked?

    Image ``i`` shows prompt ``i % len(prompts)`` and starts from the noise of seed ``seed + i``,
    for the student and its teacher alike; the teacher's images that distances are measured to come
    from the seeds that follow. It writes ``metrics.json`` and ``comparison.png`` (a row for each
    prompt) into the trainer's ``default_root_dir`` and prints a table. A module without a teacher
    is sampled as one.

    Args:
        extractor: What sees the images, of the VAE's own size.
        prompts: What is asked for, in turn.
        labels: The extractor's class that each prompt asks for; by default 0, 1, 2, ... Used where
            the extractor is a classifier.
        num_samples: Images of each set.
        steps: Numbers of steps that the student is evaluated at.
        guidance: Scale of the student's guidance; by default none, or what it was trained for.
        teacher_steps: DDIM steps of the teacher.
        teacher_guidance: Its scale of guidance, 1 = none.
        batch_size: Images a batch.
        seed: Seed of the first image.

    Attributes:
        rows: The rows of the latest test.

    Raises:
        ValueError: If a number is too small, or there is not one label for each prompt.
    """

    def __init__(
        self,
        extractor: Extractor,
        prompts: Sequence[str],
        labels: Sequence[int] | None = None,
        num_samples: int = 400,
        steps: tuple[int, ...] = (4, 2, 1),
        guidance: float | None = None,
        teacher_steps: int = 50,
        teacher_guidance: float = 1.0,
        batch_size: int = 100,
        seed: int = 10_000_000,
    ) -> None:
        if not prompts or not steps or min(*steps, teacher_steps, batch_size, num_samples - 1) < 1:
            raise ValueError(
                "PromptEvaluation takes at least one prompt and one number of steps, steps, "
                "teacher_steps and batch_size of at least 1, and num_samples of at least 2."
            )
        if labels is not None and len(labels) != len(prompts):
            raise ValueError(f"{len(labels)} labels are given for {len(prompts)} prompts.")
        self.extractor, self.prompts = extractor, list(prompts)
        self.labels = list(range(len(prompts))) if labels is None else list(labels)
        self.num_samples, self.steps, self.guidance = num_samples, tuple(steps), guidance
        self.teacher_steps, self.teacher_guidance = teacher_steps, teacher_guidance
        self.batch_size, self.seed = batch_size, seed
        self.rows: list[Row] = []
        self._updates = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object, **kwargs: object
    ) -> None:
        """Count the steps: a test of a checkpoint cannot ask its trainer."""
        self._updates = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints keep."""
        return {"student_updates": self._updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read what a checkpoint kept."""
        self._updates = state_dict["student_updates"]

    @torch.no_grad()
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, write and print, on the first process.

        Raises:
            ValueError: If the model takes no prompts.
        """
        if trainer.is_global_zero:
            self._test(trainer, pl_module)
        trainer.strategy.barrier("prompts evaluated")

    def _test(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = generative(pl_module)
        network: Denoiser = pl_module.network  # type: ignore[assignment]
        first, steps = module.teacher or network, self.teacher_steps
        if first.codec is None:
            raise ValueError("PromptEvaluation is for text-to-image models: use Evaluation.")
        self.extractor.to(pl_module.device)
        teacher = _Model("teacher", first, steps, "ddim", self.teacher_guidance)
        models = [teacher]
        if module.teacher is not None:
            name = type(pl_module).__name__
            models += [_Model(name, network, n, module.solver, self.guidance) for n in self.steps]
        sets = [self._images(trainer, model, self.seed) for model in models]
        other = self._images(trainer, teacher, self.seed + self.num_samples)
        spent = {
            "student_updates": self._updates,
            "teacher_evaluations": module.teacher_evaluations,
            "train_seconds": module.train_seconds,
        }
        made: list[Row] = []
        for model, images in zip(models, sets, strict=True):
            figures = asdict(measure(images, test=other, teacher=other, paired=sets[0].images))
            figures["fd_test"] = None  # coverage is that of the teacher's images too
            made.append(
                {
                    **{"method": model.method, "solver": model.solver, "steps": model.steps},
                    **figures,
                    **asdict(self._cost(trainer, model)),
                    **({} if model is teacher else spent),
                    "parameters": sum(p.numel() for p in model.denoiser.parameters()),
                    **{"num_images": self.num_samples, "seed": self.seed},
                }
            )
        shared = {
            "dataset": "prompts",
            "floors": {metric_names(self.extractor.name)["teacher"]: made[0]["fd_teacher"]},
            "reference_images": {"teacher": self.num_samples},
        }
        self.rows = [make_row(self.extractor.name, **row, **shared) for row in made]
        folder = Path(trainer.default_root_dir)
        write_rows(self.rows, folder / "metrics.json")
        self._draw(models, sets, folder / "comparison.png")
        print(f"\n{format_table(self.rows, self.extractor.name)}")
        print(f"Numbers: {folder / 'metrics.json'}\nPicture: {folder / 'comparison.png'}\n")

    def _images(self, trainer: Trainer, model: _Model, seed: int) -> ImageSet:
        """A model's images with what the extractor says of them."""
        device, run = trainer.strategy.root_device, model.sampler()
        assert model.denoiser.codec is not None and model.denoiser.image_shape is not None
        embeddings = model.denoiser.codec.condition(self.prompts)
        asked, parts = torch.arange(self.num_samples) % len(self.prompts), []
        rows = torch.arange(self.num_samples).split(self.batch_size)
        title = f"{model.method}, {model.steps} steps"
        for row in tqdm(rows, title, leave=False, disable=None):
            generators = seeded_generators((seed + row).tolist())
            noise = drawn_noise(model.denoiser.image_shape, generators).to(device)
            condition = {name: t[asked[row]].to(device) for name, t in embeddings.items()}
            with isolate_rng(), trainer.precision_plugin.forward_context():
                parts.append(to_uint8(run(noise, condition, generators).float()).cpu())
        labels = torch.tensor(self.labels)[asked] if self.extractor.classifies else None
        return describe(self.extractor, torch.cat(parts), labels, device=device)

    def _cost(self, trainer: Trainer, model: _Model) -> Any:
        """Evaluations and latency of one image."""
        run, device = model.sampler(), trainer.strategy.root_device
        assert model.denoiser.codec is not None and model.denoiser.image_shape is not None
        condition = model.denoiser.codec.condition(self.prompts[:1])
        asked = {name: tensor.to(device) for name, tensor in condition.items()}
        one: Sampler = in_precision(trainer, lambda noise, _: run(noise, asked, None))
        return measure_cost(
            one, model.denoiser, model.denoiser.image_shape, None, device=device, batch_sizes=(1,)
        )

    def _draw(self, models: list[_Model], sets: list[ImageSet], path: Path) -> None:
        """A row for each prompt: some images of each model, from the same noise."""
        count = len(self.prompts)
        rows = {
            prompt: torch.cat([made.images[i::count][:_PICTURED] for made in sets])
            for i, prompt in enumerate(self.prompts)
        }
        names = [f"{model.steps} step{'s' * (model.steps > 1)}" for model in models]
        names[0] += f" of the teacher, guidance {self.teacher_guidance:g}"
        columns = len(next(iter(rows.values())))
        draw_rows(rows, path, columns, f"{_PICTURED} images each: {'; '.join(names)}")
