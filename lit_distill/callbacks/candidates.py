"""What a test compares: the student and its teacher, each at some numbers of steps."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lit_distill.callbacks.references import References
from lit_distill.callbacks.sampling import (
    Draw,
    GenerativeModule,
    in_precision,
    module_sampler,
    teacher_sampler,
)
from lit_distill.metrics.cost import Cost, Sampler, measure_cost
from lit_distill.metrics.figures import nearest_images, to_uint8


@dataclass(frozen=True)
class Candidate:
    """A model with a way to sample it: one row of the table.

    Attributes:
        method: Name in the table.
        solver: The teacher's solver; None for the trained module, which brings its own.
        steps: Steps of the solver, or of the student.
        sampler: Unit noise and condition to images.
        network: What is sampled; its parameters are counted.
        watched: Holds every denoiser that the sampler may evaluate.
    """

    method: str
    solver: str | None
    steps: int
    sampler: Sampler
    network: nn.Module
    watched: nn.Module

    def row(self) -> dict[str, Any]:
        """What its row says of the model itself."""
        return {
            "method": self.method,
            "solver": self.solver,
            "steps": self.steps,
            "parameters": sum(p.numel() for p in self.network.parameters()),
        }

    def title(self) -> str:
        """Name and steps, for a progress bar."""
        solver = "" if self.solver is None else f"{self.solver}, "
        return f"{self.method}, {solver}{self.steps} steps"

    def caption(self, cost: Cost) -> str:
        """Name and cost in two lines, for a picture."""
        return f"{self.method}\n{cost.nfe} NFE, {cost.latency_ms:.1f} ms"


def teacher_candidates(module: GenerativeModule, runs: list[tuple[str, int]]) -> list[Candidate]:
    """The teacher by each solver and number of steps; nothing for a module without a teacher."""
    teacher = module.teacher
    if teacher is None:
        return []
    return [
        Candidate("teacher", name, count, teacher_sampler(teacher, name, count), teacher, teacher)
        for name, count in dict.fromkeys(runs)  # once, where some are the same
    ]


def module_candidates(
    module: GenerativeModule, watched: nn.Module, steps: tuple[int, ...]
) -> list[Candidate]:
    """The trained module itself at each number of steps.

    Args:
        module: The module.
        watched: The same; it may sample by the student or by an average of it.
        steps: Numbers of steps.
    """
    return [
        Candidate(
            type(module).__name__,
            None,
            count,
            module_sampler(module, count),
            module.student,
            watched,
        )
        for count in steps
    ]


def cost_of(candidate: Candidate, references: References, batch_sizes: tuple[int, ...]) -> Cost:
    """Cost of a candidate on the trainer's device: of the first process, while the others wait."""
    trainer = references.trainer
    cost: Cost | None = None
    if trainer.is_global_zero:
        cost = measure_cost(
            in_precision(trainer, candidate.sampler),
            candidate.watched,
            references.data.image_shape,
            references.num_classes,
            device=trainer.strategy.root_device,
            batch_sizes=batch_sizes,
        )
    return cast(Cost, trainer.strategy.broadcast(cost))


@torch.no_grad()
def comparison_strip(
    trainer: Trainer, candidates: list[Candidate], costs: list[Cost], draw: Draw, train: Tensor
) -> dict[str, Tensor]:
    """Images of all candidates from the same noise, and the nearest training images.

    Args:
        trainer: The running trainer; other processes are not needed.
        candidates: The first one that is not a teacher is compared with the training images.
        costs: Cost of each candidate.
        draw: One batch of images.
        train: (N, C, H, W) uint8, the training images.

    Returns:
        Captions and images (count, C, H, W) uint8.
    """
    device, (noise, labels) = trainer.strategy.root_device, draw.batch(0)
    noise, labels = noise.to(device), None if labels is None else labels.to(device)
    images = []
    for candidate in candidates:
        with isolate_rng():
            torch.manual_seed(draw.seed)
            images.append(to_uint8(in_precision(trainer, candidate.sampler)(noise, labels)).cpu())
    first = next(i for i, candidate in enumerate(candidates) if candidate.solver is None)
    _, nearest = nearest_images(images[first], train)
    captions = [c.caption(cost) for c, cost in zip(candidates, costs, strict=True)]
    rows = dict(zip(captions, images, strict=True))
    return {**rows, "nearest\ntraining image": train[nearest]}
