"""Evaluates a text-to-image student beside its guided teacher, prompt by prompt."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_distill.callbacks.pictures import draw_rows
from lit_distill.callbacks.prompted_images import PromptedImages, PromptedModel, Seen
from lit_distill.callbacks.report import Row, format_table, make_row, metric_names, write_rows
from lit_distill.callbacks.sampling import GenerativeModule, generative, in_precision
from lit_distill.datamodules import CaptionedImages
from lit_distill.diffusion import Denoiser
from lit_distill.metrics.clip import ClipScore
from lit_distill.metrics.cost import Cost, Sampler, measure_cost
from lit_distill.metrics.evaluation import measure
from lit_distill.metrics.extractors import Extractor

_PICTURED = 3  # images of each prompt and model
_ROWS = 10  # prompts of a source in the picture


class PromptEvaluation(Callback):
    """Measures a text-to-image model when it is tested: does it show what is asked, and as well?

    What is asked for is a list of ``prompts`` or the captions of a ``source``, in turn: image ``i``
    is of prompt ``i % len(prompts)`` and starts from the noise of seed ``seed + i``, for a student
    and its teacher alike; the teacher's images that distances are measured to come from the seeds
    that follow. The images of a source, those of its first ``num_samples`` captions, are what
    ``fid`` (or ``fd_<extractor>``), coverage and recall are measured to. Where a source has twice
    as many, the next ones are measured as a model's are: that is the floor of the distance.

    Processes share the images. The first writes ``metrics.json`` and ``comparison.png`` (a row for
    each prompt, of a source for the first ten) into the trainer's ``default_root_dir`` and prints a
    table. A module without a teacher is sampled as one.

    Args:
        extractor: What sees the images, of the VAE's own size.
        prompts: What is asked for, in turn.
        labels: The extractor's class that each of ``prompts`` asks for; by default 0, 1, 2, ...
            Used where the extractor is a classifier.
        num_samples: Images of each set.
        steps: Numbers of steps that the student is evaluated at.
        guidance: Scale of the student's guidance; by default none, or what it was trained for.
        teacher_steps: DDIM steps of the teacher.
        teacher_guidance: Its scale of guidance, 1 = none.
        batch_size: Images a batch.
        seed: Seed of the first image.
        source: Captions to ask for, and their images to compare with; instead of ``prompts``.
        clip_score: Measures how well images fit their prompts; by default that is not measured.

    Attributes:
        rows: The rows of the latest test, on the first process.

    Raises:
        ValueError: If a number is too small, there are both prompts and a source or neither, or
            there is not one label for each prompt.
    """

    def __init__(
        self,
        extractor: Extractor,
        prompts: Sequence[str] = (),
        labels: Sequence[int] | None = None,
        num_samples: int = 400,
        steps: tuple[int, ...] = (4, 2, 1),
        guidance: float | None = None,
        teacher_steps: int = 50,
        teacher_guidance: float = 1.0,
        batch_size: int = 100,
        seed: int = 10_000_000,
        source: CaptionedImages | None = None,
        clip_score: ClipScore | None = None,
    ) -> None:
        if not steps or min(*steps, teacher_steps, batch_size, num_samples - 1) < 1:
            raise ValueError(
                "PromptEvaluation takes at least one number of steps, steps, teacher_steps and "
                "batch_size of at least 1, and num_samples of at least 2."
            )
        if bool(prompts) == (source is not None):
            raise ValueError(
                "PromptEvaluation takes either at least one prompt (option prompts) or a source "
                f"of captions (option source); it was given {'both' if prompts else 'neither'}."
            )
        if labels is not None and len(labels) != len(prompts):
            raise ValueError(f"{len(labels)} labels are given for {len(prompts)} prompts.")
        self.extractor, self.source, self.clip_score = extractor, source, clip_score
        self.prompts = list(prompts) if source is None else source.captions
        self.labels = labels if labels or source is not None else range(len(prompts))
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
        """Draw and look on all processes; measure, write and print on the first.

        Raises:
            ValueError: If the model takes no prompts.
        """
        module = generative(pl_module)
        network: Denoiser = pl_module.network  # type: ignore[assignment]
        first = module.teacher or network
        if first.codec is None:
            raise ValueError("PromptEvaluation is for text-to-image models: use Evaluation.")
        teacher = PromptedModel("teacher", first, self.teacher_steps, "ddim", self.teacher_guidance)
        models = [teacher]
        if module.teacher is not None:
            name = type(pl_module).__name__
            solver = module.solver
            models += [PromptedModel(name, network, n, solver, self.guidance) for n in self.steps]
        images = PromptedImages(
            trainer, self.extractor, self.prompts, self.labels, self.clip_score, self.batch_size
        )
        real, next_real = self._real(images, teacher)
        sets = [images.of_model(model, self.num_samples, self.seed) for model in models]
        other = images.of_model(teacher, self.num_samples, self.seed + self.num_samples)
        if trainer.is_global_zero:
            made = [
                {
                    **{"method": model.method, "solver": model.solver, "steps": model.steps},
                    **self._figures(seen, sets[0], other, real),
                    **asdict(self._cost(trainer, model)),
                    **({} if model is teacher else self._spent(module)),
                    "parameters": sum(p.numel() for p in model.denoiser.parameters()),
                    **{"num_images": self.num_samples, "seed": self.seed},
                }
                for model, seen in zip(models, sets, strict=True)
            ]
            self.rows = self._complete(made, real, next_real)
            folder = Path(trainer.default_root_dir)
            write_rows(self.rows, folder / "metrics.json")
            self._draw(models, sets, real, folder / "comparison.png")
            print(f"\n{format_table(self.rows, self.extractor.name)}")
            print(f"Numbers: {folder / 'metrics.json'}\nPicture: {folder / 'comparison.png'}\n")
        trainer.strategy.barrier("prompts evaluated")

    def _complete(self, made: list[Row], real: Seen | None, next_real: Seen | None) -> list[Row]:
        """Add the row of real images, the floors and what else all rows share."""
        names = metric_names(self.extractor.name)
        floors, sizes = {names["teacher"]: made[0]["fd_teacher"]}, {"teacher": self.num_samples}
        if real is not None:
            sizes["test"] = len(real.images)
        if next_real is not None:
            figures = self._figures(next_real, None, None, real)
            floors[names["test"]] = figures["fd_test"]
            made = [*made, {"method": "real", **figures, "num_images": len(next_real.images)}]
        shared = {
            "dataset": "prompts" if self.source is None else self.source.name,
            "clip_model": None if self.clip_score is None else self.clip_score.name,
            **{"floors": floors, "reference_images": sizes},
        }
        return [make_row(self.extractor.name, **row, **shared) for row in made]

    def _real(
        self, images: PromptedImages, teacher: PromptedModel
    ) -> tuple[Seen | None, Seen | None]:
        """The source's images of the captions that are asked for, and as many of the next ones."""
        if self.source is None or not self.source.has_images:
            return None, None
        shape, count = teacher.codec.image_shape, min(self.num_samples, len(self.prompts))
        asked = images.of_source(self.source, range(count), shape)
        if 2 * count > len(self.prompts):
            return asked, None
        return asked, images.of_source(self.source, range(count, 2 * count), shape)

    def _figures(
        self, seen: Seen, paired: Seen | None, teacher: Seen | None, real: Seen | None
    ) -> dict[str, Any]:
        """The figures of a set; without real images coverage is that of the teacher's."""
        reference = real or teacher
        assert reference is not None
        figures = measure(
            seen.images,
            test=reference.images,
            teacher=None if teacher is None else teacher.images,
            paired=None if paired is None else paired.images.images,
        )
        found = {**asdict(figures), "clip_score": seen.clip_score}
        return found if real is not None else {**found, "fd_test": None}

    def _spent(self, module: GenerativeModule) -> dict[str, Any]:
        """What the training took."""
        return {
            "student_updates": self._updates,
            "teacher_evaluations": module.teacher_evaluations,
            "train_seconds": module.train_seconds,
        }

    def _cost(self, trainer: Trainer, model: PromptedModel) -> Cost:
        """Evaluations and latency of one image."""
        run, device = model.sampler(), trainer.strategy.root_device
        asked = model.condition(self.prompts[:1], device)
        one: Sampler = in_precision(trainer, lambda noise, _: run(noise, asked, None))
        return measure_cost(
            one, model.denoiser, model.codec.latent_shape, None, device=device, batch_sizes=(1,)
        )

    def _draw(
        self, models: list[PromptedModel], sets: list[Seen], real: Seen | None, path: Path
    ) -> None:
        """A row for each prompt: images of each model from the same noise, and a source's own."""
        count = len(self.prompts)
        each, shown = (_PICTURED, count) if self.source is None else (1, min(_ROWS, count))
        pictured = [seen.images.images for seen in (*sets, real) if seen is not None]
        rows = {
            fill(prompt, 24): torch.cat([images[i::count][:each] for images in pictured])
            for i, prompt in enumerate(self.prompts[: min(shown, self.num_samples)])
        }
        names = [f"{model.steps} step{'s' * (model.steps > 1)}" for model in models]
        names[0] += f" of the teacher, guidance {self.teacher_guidance:g}"
        names += ["the source's own"] * (real is not None)
        title = f"{each} image{'s' * (each > 1)} each: {'; '.join(names)}"
        draw_rows(rows, path, len(next(iter(rows.values()))), title)
