"""Knowledge distillation of a sampler into one step (Luhman & Luhman 2021)."""

from typing import Any

import torch
from torch import Tensor

from lit_distill.diffusion import Denoiser, FewSteps, check_solver, sample
from lit_distill.losses import Distance, as_distance
from lit_distill.methods.base import (
    Batch,
    DistillationModule,
    as_denoiser,
    condition_of,
    student_of,
)


class KnowledgeDistillation(DistillationModule):
    """One-step generator by regression on the end points of the teacher's ODE.

    ``distance(G(z), ODE(z))`` on stored noise-image pairs, or with ``online`` on those that the
    teacher makes within the step (Luhman & Luhman 2021, Eq. 7, with any distance). Online, and
    with an SFD student as the teacher, it is the second stage of SFD (Zhou et al. 2024).

    Data: :class:`~lit_distill.datamodules.PairsDataModule`; online any, of which it takes the
    labels. Under DDP use ``strategy: ddp``.

    Args:
        teacher: A denoiser, or a folder or hub id of one.
        distance: ``lpips``, ``l2``, ``l1``, ``pseudo_huber``, or an object.
        online: Solve the teacher's ODE in each step, on fresh noise.
        teacher_steps: Steps of the teacher, online.
        teacher_solver: Its solver, online; by default Heun's method, and a few-step teacher's own
            way.
        generator_sigma: Noise level that the student starts from; the teacher's largest by default.
        student: What the student starts from, where that is not the teacher.
        base: Arguments of :class:`DistillationModule`.

    Raises:
        ValueError: If the solver is unknown, or the teacher cannot take so many steps.
    """

    def __init__(
        self,
        teacher: str | Denoiser,
        distance: str | Distance = "lpips",
        online: bool = False,
        teacher_steps: int = 18,
        teacher_solver: str | None = None,
        generator_sigma: float | None = None,
        student: str | Denoiser | None = None,
        **base: Any,
    ) -> None:
        if teacher_solver is not None:
            check_solver(teacher_solver)
        frozen = as_denoiser(teacher)
        if online:
            frozen.grid(teacher_steps)  # what it refuses, it refuses now
        generator = student_of(frozen, student, generator_sigma)
        generator.few_steps = FewSteps(trained=(1,))
        super().__init__(generator, frozen, **base)
        self.save_hyperparameters(logger=False)
        self.distance = as_distance(distance, frozen.codec)
        self.online, self.teacher_steps, self.teacher_solver = online, teacher_steps, teacher_solver

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The distance of the student's images to the teacher's."""
        condition = condition_of(batch)
        noise, target = self.online_pair(batch) if self.online else stored_pair(batch, self)
        x = sample(self.student, noise, steps=1, condition=condition)
        loss = self.distance(x, target).mean()
        self.watch(loss)
        self.log("loss/regression", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def online_pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Fresh noise and the end of the teacher's ODE."""
        assert self.teacher is not None
        noise = torch.randn_like(batch["image"])
        target = sample(
            self.teacher,
            noise,
            steps=self.teacher_steps,
            solver=self.teacher_solver,
            condition=condition_of(batch),
        )
        return noise, target

    @property
    def data_free(self) -> bool:
        """Online the teacher makes the targets."""
        return self.online

    def frozen_modules(self) -> tuple[str, ...]:
        """Teacher and distance."""
        return ("teacher", "distance")


def stored_pair(batch: Batch, method: DistillationModule) -> tuple[Tensor, Tensor]:
    """Noise and image of a batch of pairs, for a method.

    Raises:
        ValueError: If the batch holds images only.
    """
    if "noise" not in batch:
        online = ", or set online to true" if isinstance(method, KnowledgeDistillation) else ""
        raise ValueError(
            f"{type(method).__name__} needs noise-image pairs, but the batches hold images only: "
            "use PairsDataModule with a folder of its teacher's pairs (lit-distill predict --config"
            f" configs/digits/pairs.yaml, or flow_pairs.yaml there for a flow's){online}."
        )
    return batch["noise"], batch["image"]
