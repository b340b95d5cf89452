"""One evaluation for all: each model's images from the same noise, its figures and its cost."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lit_distill.callbacks.candidates import Candidate, cost_of
from lit_distill.callbacks.references import References
from lit_distill.callbacks.report import write_rows
from lit_distill.callbacks.sampling import in_precision, teacher_sampler
from lit_distill.datamodules import ImageDataModule
from lit_distill.diffusion import Condition, Denoiser, check_solver, rho_grid, sample, solve
from lit_distill.metrics.cache import Key, hash_tensors, read_cache, write_cache
from lit_distill.metrics.cost import Sampler
from lit_distill.metrics.evaluation import check_resamples, measure
from lit_distill.metrics.extractors import Extractor
from lit_distill.metrics.figures import frechet_distance
from lit_distill.models import load_denoiser

Row = dict[str, Any]
"""One line of the table."""

SHOWN = 20
"""Images of each row that the report shows."""
_PATHS = 60  # trajectories that the report shows where the data are points
_ENDS = (0.006, 0.02, 0.06)  # of the teacher's further grids: few steps are wasted on less
_CHOSEN_BY = 5  # the teacher's solver is chosen by this part of the images, of other seeds


@dataclass
class Judge:
    """How the models of a comparison are judged.

    Attributes:
        data: The real images.
        extractor: What sees the images.
        num_images: Images of each row, and of the teacher that they are compared with.
        seed: Seed of the first; beyond the seeds of any stored pairs.
        batch_size: Images at a time, also for the throughput.
        precision: Of sampling, as Lightning's Trainer names it.
        accelerator: Where to sample, as Lightning's Trainer names it.
        teacher_steps: Steps of the teacher at its best.
        teacher_solver: Its solver.
        teacher_nfe: Evaluations that its other rows may spend, each with the best solver.
        solvers: Solvers to choose from, of one evaluation a step.
        resamples: Draws of the bootstrap intervals; 0 = no intervals.
    """

    data: ImageDataModule
    extractor: Extractor
    num_images: int = 10_000
    seed: int = 10_000_000
    batch_size: int = 500
    precision: str = "32-true"
    accelerator: str = "auto"
    teacher_steps: int = 18
    teacher_solver: str = "heun"
    teacher_nfe: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    solvers: list[str] = field(default_factory=lambda: ["euler", "dpmpp_2m", "dpmpp_3m", "ipndm"])
    resamples: int = 100

    def __post_init__(self) -> None:
        if (
            self.num_images < 50
            or min([self.batch_size, self.teacher_steps, *self.teacher_nfe]) < 1
        ):
            raise ValueError(
                "evaluation: num_images must be at least 50, and batch_size, teacher_steps and "
                f"teacher_nfe at least 1, not {self.num_images}, {self.batch_size}, "
                f"{self.teacher_steps} and {self.teacher_nfe}."
            )
        for solver in [self.teacher_solver, *self.solvers]:
            check_solver(solver)
        check_resamples(self.resamples)


class Evaluator:
    """Measures exported models; what was measured is kept and not measured again.

    Args:
        judge: How.
        folder: Folder of the comparison; teachers' samples are cached in it.
    """

    def __init__(self, judge: Judge, folder: Path) -> None:
        self.judge, self.folder = judge, folder
        judge.data.prepare_data()
        for stage in ("fit", "test"):
            judge.data.setup(stage)
        self.trainer = _carrier(judge, folder)
        self._extractor = hash_tensors(judge.extractor)
        self._references: dict[int | None, References] = {}

    @property
    def device(self) -> torch.device:
        """Where models are sampled."""
        return self.trainer.strategy.root_device

    def load(self, folder: str | Path) -> Denoiser:
        """An exported model, where it is sampled."""
        return load_denoiser(str(folder)).to(self.device).eval()

    @torch.no_grad()
    def real(self) -> list[Row]:
        """The row of real images, the yardstick of all."""
        references = self._of(None)
        train, test = references.real("train"), references.real("test")
        return [{"label": "training images", **asdict(measure(train, test=test))}]

    @torch.no_grad()
    def teacher(self, folder: str) -> tuple[list[Row], dict[str, Tensor]]:
        """Rows of a teacher: at its best, and with each number of evaluations by its best solver.

        Args:
            folder: Where it is.

        Returns:
            Rows, and images by row, as for :meth:`student`.
        """
        teacher = self.load(folder)
        solver, steps = self.judge.teacher_solver, self.judge.teacher_steps
        whole = teacher_sampler(teacher, solver, steps)
        candidates = [_candidate(solver, steps, whole, teacher)]
        for nfe in self.judge.teacher_nfe:
            how, sampler = self._best_solver(teacher, nfe)
            candidates.append(_candidate(how, nfe, sampler, teacher))
        return self._rows(teacher, candidates)

    @torch.no_grad()
    def student(
        self, run: Path, steps: list[int], teacher: str
    ) -> tuple[list[Row], dict[str, Any]]:
        """Rows of a student.

        Args:
            run: Its run folder.
            steps: Numbers of steps; those that it was trained for if none are named.
            teacher: Folder of the teacher that it is compared with.

        Returns:
            Rows, and images ``(20, C, H, W)`` uint8 by ``str(nfe)``; where the data are points in
            the plane, trajectories ``(T, B, 2)`` by ``paths-<nfe>``.

        Raises:
            ValueError: It cannot be sampled so, or makes no finite images.
        """
        own = self.load(run / "pipeline")
        candidates = []
        for count in steps or _trained(own):
            stage = run / f"stage-{count}-steps"
            known = own.few_steps is None or count in own.few_steps.trained
            student = self.load(stage) if not known and stage.is_dir() else own
            solver = "euler" if student.few_steps is None else None
            candidates.append(_candidate(None, count, _sampler(student, count, solver), student))
        return self._rows(self.load(teacher), candidates)

    def kept(
        self, name: str, key: Key, make: Callable[[], tuple[list[Row], dict[str, Tensor]]]
    ) -> tuple[list[Row], dict[str, Tensor]]:
        """Rows and images that were measured with the same settings, or made now.

        Args:
            name: Of the run.
            key: What the figures depend on, beside the settings of the evaluation.
            make: Measures them.
        """
        judge = self.judge
        whole: Key = {
            **key,
            **{k: v for k, v in vars(judge).items() if k not in ("data", "extractor")},
            "data": str(judge.data),
            "extractor": self._extractor,
            "device": self.device.type,
        }
        rows_file = self.folder / name / "evaluation.json"
        images_file = rows_file.with_suffix(".safetensors")
        images = read_cache(images_file, whole)
        if images is not None and rows_file.is_file():
            return json.loads(rows_file.read_text()), images
        images_file.unlink(missing_ok=True)  # the two belong together: written last, removed first
        rows, images = make()
        write_rows(rows, rows_file)
        write_cache(images_file, whole, images)
        return rows, images

    def _rows(
        self, teacher: Denoiser, candidates: list[Candidate]
    ) -> tuple[list[Row], dict[str, Tensor]]:
        """Figures, costs and pictures of candidates, against a teacher at its best."""
        judge = self.judge
        references = self._of(teacher.num_classes)
        train, test = references.real("train"), references.real("test")
        at_best = (judge.teacher_solver, judge.teacher_steps)
        draw = references.draw(judge.num_images, judge.seed)
        other = references.teacher(teacher, *at_best, draw.following())
        paired = references.teacher(teacher, *at_best, draw)
        rows: list[Row] = []
        shown: dict[str, Tensor] = {}
        for candidate in candidates:
            cost = cost_of(candidate, references, (judge.batch_size,))
            made = self._of(candidate.network.num_classes)  # type: ignore[arg-type]
            samples = (
                paired
                if (candidate.solver, candidate.steps) == at_best
                else made.samples(candidate.sampler, draw, candidate.title())
            )
            figures = measure(
                samples,
                train=train,
                test=test,
                teacher=other,
                paired=paired.images,
                resamples=judge.resamples,
            )
            rows.append(
                {
                    **candidate.row(),
                    **asdict(figures),
                    **{k: v for k, v in asdict(cost).items() if k != "throughput"},
                }
            )
            key = str(cost.nfe)
            shown[key] = samples.images[:SHOWN].clone()
            if samples.images[0].numel() == 2:
                shown[f"paths-{key}"] = self._paths(candidate)
        return rows, shown

    def _best_solver(self, teacher: Denoiser, nfe: int) -> tuple[str, Sampler]:
        """The solver and grid that serve a teacher best at so few evaluations, and their name."""
        grids = {"own grid": teacher.sigmas(nfe)}
        if nfe > 1 and teacher.sigma_max < 1e3:
            for end in _ENDS:
                if teacher.sigma_min < end < teacher.sigma_max:
                    grids[f"to {end:g}"] = rho_grid(nfe, end, teacher.sigma_max)
        tried = [
            (f"{solver}, {name}", _solved(teacher, solver, grid))
            for solver in (self.judge.solvers if nfe > 1 else ["euler"])
            for name, grid in grids.items()
        ]
        if len(tried) == 1:
            return tried[0]
        references = self._of(teacher.num_classes)
        # Not of the seeds that it is measured by, or it would be flattered.
        count = max(50, self.judge.num_images // _CHOSEN_BY)
        draw = references.draw(count, self.judge.seed + 3 * self.judge.num_images)
        whole = references.draw(self.judge.num_images, self.judge.seed).following()
        best = references.teacher(
            teacher, self.judge.teacher_solver, self.judge.teacher_steps, whole
        )
        distances = [
            frechet_distance(best.features, references.samples(sampler, draw, how).features)
            for how, sampler in tried
        ]
        return tried[distances.index(min(distances))]

    def _paths(self, candidate: Candidate) -> Tensor:
        """States on the way from noise to data, ``(T, B, 2)``, in the data's range of [-1, 1]."""
        draw = self._of(candidate.network.num_classes).draw(_PATHS, self.judge.seed)  # type: ignore[arg-type]
        noise, labels = draw.batch(0)
        states: list[Tensor] = []

        def look(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            x, sigma = args[0], args[1]
            # As a mean of data and noise, or the first states would be off the picture.
            states.append((x.float() / (1 + sigma.float().square().view(-1, 1, 1, 1)).sqrt()).cpu())

        handle = candidate.network.register_forward_pre_hook(look)
        try:
            with isolate_rng():
                torch.manual_seed(self.judge.seed)
                sampler = in_precision(self.trainer, candidate.sampler)
                condition = None if labels is None else labels.to(self.device)
                end = sampler(noise.to(self.device), condition).cpu()
        finally:
            handle.remove()
        return torch.stack([*states, end]).flatten(2).contiguous()

    def _of(self, num_classes: int | None) -> References:
        """References of models with so many classes."""
        if num_classes not in self._references:
            judge = self.judge
            self._references[num_classes] = References(
                self.trainer,
                judge.data,
                num_classes,
                judge.extractor,
                self.folder / "cache",
                judge.batch_size,
            )
        return self._references[num_classes]


def _carrier(judge: Judge, folder: Path) -> Trainer:
    """A trainer that never runs: it says where to sample and in which precision."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before = log.level
    log.setLevel(logging.WARNING)  # it would list the hardware
    try:
        return Trainer(
            accelerator=judge.accelerator,
            devices=1,
            precision=judge.precision,  # type: ignore[arg-type]
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    finally:
        log.setLevel(before)


def _trained(denoiser: Denoiser) -> list[int]:
    """Numbers of steps that a model was trained for."""
    return [1, 2, 4] if denoiser.few_steps is None else list(denoiser.few_steps.trained)


def _candidate(solver: str | None, steps: int, sampler: Sampler, network: Denoiser) -> Candidate:
    return Candidate("teacher" if solver else "student", solver, steps, sampler, network, network)


def _sampler(denoiser: Denoiser, steps: int, solver: str | None) -> Sampler:
    def run(noise: Tensor, condition: Condition) -> Tensor:
        return sample(denoiser, noise, steps=steps, solver=solver, condition=condition)

    return run


def _solved(denoiser: Denoiser, solver: str, grid: Tensor) -> Sampler:
    def run(noise: Tensor, condition: Condition) -> Tensor:
        return solve(denoiser, denoiser.start(noise), grid, solver=solver, condition=condition)

    return run
