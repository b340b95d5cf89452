"""Evaluates any method while it trains and after, through ``generate`` and ``teacher`` only."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_distill.callbacks.candidates import (
    Candidate,
    comparison_strip,
    cost_of,
    module_candidates,
    teacher_candidates,
)
from lit_distill.callbacks.pictures import draw_rows
from lit_distill.callbacks.references import References
from lit_distill.callbacks.report import Row, format_table, make_row, metric_names, write_rows
from lit_distill.callbacks.sampling import (
    Draw,
    GenerativeModule,
    data_of,
    generative,
    module_sampler,
)
from lit_distill.diffusion import Denoiser, check_solver
from lit_distill.metrics.cost import Cost
from lit_distill.metrics.evaluation import ImageSet, Measures, check_resamples, measure
from lit_distill.metrics.extractors import Extractor
from lit_distill.metrics.figures import coverage, frechet_distance, label_accuracy

_PICTURE_COLUMNS = 10


class Evaluation(Callback):
    """Measures a distilled student, or a teacher in training, beside its teacher and real images.

    **In validation** it logs ``val/fd_teacher_<extractor>`` (``val/fd_<extractor>`` or ``val/fid``
    for a module without a teacher), ``val/coverage`` and ``val/label_accuracy``, for checkpoints to
    be chosen by. The samples always have the same seeds.

    **In testing** it writes ``metrics.json`` and ``comparison.png`` into the trainer's
    ``default_root_dir`` and prints a table. There is a row for the teacher at its best, at each of
    ``teacher_few_steps`` and at one Euler step, for the student at each of ``steps``, and for real
    training and held-out images, the yardstick. Student and teacher start from the same noise
    (image ``i``: seed ``seed + i``, label ``i % num_classes``); the teacher's samples that
    distances are measured to come from other noise (``seed + num_samples + i``), or a student that
    copies its teacher would fall below the floor. A module whose ``teacher`` is None is evaluated
    alone, by its own solver.

    Published FIDs are those of 50,000 samples to the training images: compare ``fid_train`` at
    ``num_samples=50000`` with them, where the training split is (nearly) all of these images.

    Args:
        extractor: What sees the images; the distances are named after it.
        num_samples: Images of each set.
        steps: Numbers of steps that the student is evaluated at; the first one in validation.
        batch_size: Images per batch in sampling and for the throughput.
        seed: Seed of the first test image; beyond the seeds of any training pairs.
        teacher_steps: Steps of the teacher at its best.
        teacher_solver: Its solver.
        teacher_few_steps: Smaller numbers of steps that a test has rows of the teacher for, too:
            what a user could do without any distillation.
        teacher_few_solver: Its solver at these.
        validation_samples: Images of a validation; 0 = none.
        validation_seed: Seed of its first image.
        floor: Measure the teacher against itself, which takes a second set of its samples. Without
            it the teacher's row has no distance to itself, and no paired distances are given.
        cache_dir: Folder of the teacher's samples and of real images' features; None: a folder
            ``cache`` beside the run's.
        throughput_batch_sizes: Further batch sizes to give the images per second at.
        resamples: Draws of the bootstrap intervals of a test; 0 = no intervals. For Inception's
            2,048 features 20 will do, as each takes some 10 s on a core.

    Attributes:
        rows: The rows of the latest test.

    Raises:
        ValueError: If a number is too small, or a solver unknown.
    """

    def __init__(
        self,
        extractor: Extractor,
        num_samples: int = 10_000,
        steps: tuple[int, ...] = (1,),
        batch_size: int = 500,
        seed: int = 10_000_000,
        teacher_steps: int = 18,
        teacher_solver: str = "heun",
        teacher_few_steps: tuple[int, ...] = (),
        teacher_few_solver: str = "dpmpp_2m",
        validation_samples: int = 1_000,
        validation_seed: int = 20_000_000,
        floor: bool = True,
        cache_dir: str | Path | None = None,
        throughput_batch_sizes: tuple[int, ...] = (),
        resamples: int = 50,
    ) -> None:
        counts = (*steps, teacher_steps, *teacher_few_steps, batch_size, *throughput_batch_sizes)
        if not steps or min(counts) < 1:
            raise ValueError(
                "Evaluation takes at least one number of steps, and steps, teacher_steps and batch "
                f"sizes of at least 1, not steps={tuple(steps)}, teacher_steps={teacher_steps}, "
                f"teacher_few_steps={tuple(teacher_few_steps)}, "
                f"batch_size={batch_size}, throughput_batch_sizes={tuple(throughput_batch_sizes)}."
            )
        if num_samples < 2 or validation_samples < 0:
            raise ValueError(
                f"Evaluation cannot work with num_samples={num_samples} and validation_samples="
                f"{validation_samples}: take at least 2, and at least 0 (0 = no validation)."
            )
        for solver in (teacher_solver, teacher_few_solver):
            check_solver(solver)
        check_resamples(resamples)
        self.resamples = resamples
        self.extractor = extractor  # not on the module, or every checkpoint would hold it
        self.num_samples, self.steps, self.seed = num_samples, tuple(steps), seed
        self.batch_sizes = (batch_size, *throughput_batch_sizes)
        self.teacher_steps, self.teacher_solver = teacher_steps, teacher_solver
        few = [(teacher_few_solver, count) for count in teacher_few_steps]
        self.teacher_runs = [(teacher_solver, teacher_steps), *few, ("euler", 1)]
        self.validation_samples, self.validation_seed = validation_samples, validation_seed
        self.floor, self.cache_dir = floor, None if cache_dir is None else Path(cache_dir)
        self.names = metric_names(extractor.name)
        self.rows: list[Row] = []
        self._kept: References | None = None
        self._spent: dict[str, Any] = {"student_updates": 0, "peak_memory_mb": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the references of an earlier run."""
        self._kept = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object, **kwargs: object
    ) -> None:
        """Count the steps: a test of a checkpoint cannot ask its trainer."""
        self._spent["student_updates"] = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints keep."""
        if torch.cuda.is_initialized():
            peak = torch.cuda.max_memory_allocated() / 2**20
            self._spent["peak_memory_mb"] = max(peak, self._spent["peak_memory_mb"] or 0.0)
        return dict(self._spent)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read what a checkpoint kept."""
        self._spent.update(state_dict)

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the figures that checkpoints are chosen by."""
        if trainer.sanity_checking or self.validation_samples == 0:
            return
        module = generative(pl_module)
        references = self._references(trainer, module)
        draw = references.draw(self.validation_samples, self.validation_seed)
        samples = references.samples(module_sampler(module, self.steps[0]), draw, "validation")
        real = references.real("val")
        if module.teacher is None:
            name, reference = self.names["test"], real
        else:
            name = self.names["teacher"]
            reference = self._at_best(references, module.teacher, draw.following())
        figures = {
            name: frechet_distance(reference.features, samples.features),
            "coverage": coverage(real.features, samples.features),
        }
        if samples.logits is not None and samples.labels is not None:
            figures["label_accuracy"] = label_accuracy(samples.logits, samples.labels)
        for decay in module.further_ema_decays:
            with module.sampled_with(decay):
                of_decay = references.samples(
                    module_sampler(module, self.steps[0]), draw, "average"
                )
            figures[f"{name}/ema_{decay:g}"] = frechet_distance(
                reference.features, of_decay.features
            )
        for name, value in figures.items():
            pl_module.log(f"val/{name}", value, sync_dist=True)  # equal on all processes already

    @torch.no_grad()
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, write and print; the rows are equal on all processes."""
        module = generative(pl_module)
        references = self._references(trainer, module)
        spent = {
            **self.state_dict(),
            "teacher_evaluations": module.teacher_evaluations,
            "train_seconds": module.train_seconds,
        }
        candidates = [
            *teacher_candidates(module, self.teacher_runs),
            *module_candidates(module, pl_module, self.steps),
        ]
        costs = [cost_of(candidate, references, self.batch_sizes) for candidate in candidates]
        made: list[Row] = [
            {
                **candidate.row(),
                **asdict(cost),
                **asdict(self._measure(references, module.teacher, candidate)),
                **(spent if candidate.solver is None else {}),
                "num_images": self.num_samples,
                "seed": self.seed,
            }
            for candidate, cost in zip(candidates, costs, strict=True)
        ]
        self.rows = self._complete(references, made, module.teacher)
        if trainer.is_global_zero:
            self._report(trainer, references, candidates, costs)

    def _measure(
        self, references: References, teacher: Denoiser | None, candidate: Candidate
    ) -> Measures:
        """The figures of a candidate's images, made of the same noise for all candidates."""
        train, test = references.real("train"), references.real("test")
        draw = references.draw(self.num_samples, self.seed)
        count = self.resamples
        if teacher is None:
            samples = references.samples(candidate.sampler, draw, candidate.title())
            return measure(samples, train=train, test=test, resamples=count)
        other = self._at_best(references, teacher, draw.following())
        own = self._at_best(references, teacher, draw) if self.floor else None
        if candidate.solver is None:
            samples = references.samples(candidate.sampler, draw, candidate.title())
        elif (candidate.solver, candidate.steps) != (self.teacher_solver, self.teacher_steps):
            samples = references.teacher(teacher, candidate.solver, candidate.steps, draw)
        elif own is None:
            return measure(other, train=train, test=test, resamples=count)
        else:
            return measure(own, train=train, test=test, teacher=other, resamples=count)
        paired = None if own is None else own.images
        return measure(
            samples, train=train, test=test, teacher=other, paired=paired, resamples=count
        )

    def _complete(
        self, references: References, made: list[Row], teacher: Denoiser | None
    ) -> list[Row]:
        """Add the rows of real images, the floors and what else all rows share."""
        train, test = references.real("train"), references.real("test")
        known = {"method": "real training", "num_images": len(train)}
        held_out = {"method": "real held-out", "num_images": len(test)}
        count = self.resamples
        real = [{**asdict(measure(train, test=test, resamples=count)), **known}]
        real += [{**asdict(measure(test, train=train, resamples=count)), **held_out}]
        between = real[0]["fd_test"]
        floors = {self.names["test"]: between, self.names["train"]: between}
        sizes = {"test": len(test), "train": len(train)}
        if teacher is not None:
            sizes["teacher"] = self.num_samples
            if self.floor:
                floors[self.names["teacher"]] = made[0]["fd_teacher"]
            else:  # its only samples are the reference's
                made[0]["seed"] += self.num_samples
        shared = {
            "dataset": references.data.name,
            "floors": floors,
            "reference_images": sizes,
        }
        return [make_row(self.extractor.name, **row, **shared) for row in [*made, *real]]

    def _report(
        self,
        trainer: Trainer,
        references: References,
        candidates: list[Candidate],
        costs: list[Cost],
    ) -> None:
        """Write ``metrics.json`` and ``comparison.png``, and print the table."""
        folder = Path(trainer.default_root_dir)
        write_rows(self.rows, folder / "metrics.json")
        draw = references.draw(_PICTURE_COLUMNS, self.seed)
        train = references.real("train").images
        strip = comparison_strip(trainer, candidates, costs, draw, train)
        title = f"{references.data.name}: images from the same noise"
        draw_rows(strip, folder / "comparison.png", _PICTURE_COLUMNS, title)
        print(f"\n{format_table(self.rows, self.extractor.name)}")
        print(f"Numbers: {folder / 'metrics.json'}\nPicture: {folder / 'comparison.png'}\n")

    def _at_best(self, references: References, teacher: Denoiser, draw: Draw) -> ImageSet:
        """The teacher's images by its best solver."""
        return references.teacher(teacher, self.teacher_solver, self.teacher_steps, draw)

    def _references(self, trainer: Trainer, module: GenerativeModule) -> References:
        """The references of this run."""
        if self._kept is None:
            self._kept = References(
                trainer,
                data_of(trainer, self),
                module.student.num_classes,
                self.extractor,
                self.cache_dir,
                self.batch_sizes[0],
            )
        return self._kept
