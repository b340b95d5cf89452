"""Trajectory distillation: one student jump for several steps of the teacher's solver."""

from typing import Any

import torch
from torch import Tensor

from lit_distill.diffusion import (
    Denoiser,
    FewSteps,
    check_solver,
    jump,
    placed,
    refined,
    rho_grid,
    solve,
)
from lit_distill.losses import Distance, as_distance
from lit_distill.methods.base import (
    Batch,
    DistillationModule,
    as_denoiser,
    condition_of,
    noised,
    student_of,
)


class TrajectoryDistillation(DistillationModule):
    """Few-step student whose every jump matches ``K`` steps of the teacher (Luo 2023, Sec. 3.1).

    A node of the student's grid is drawn, the data are noised to its level, and the student's one
    Euler step to the next node is compared with the teacher's solver between the two.

    Data: any. Under DDP use ``strategy: ddp``.

    Args:
        teacher: A denoiser, or a folder or hub id of one.
        steps: Jumps of the student.
        distance: Between the two states, ``l2``, ``l1``, ``pseudo_huber`` or an object.
        teacher_substeps: Steps of the teacher for one of the student (K).
        teacher_solver: The teacher's solver.
        sigma_min: Where the student's grid ends; the last jump goes on to 0 if ``to_zero``.
        to_zero: End the grid at 0 instead of ``sigma_min``.
        student: What the student starts from, where that is not the teacher.
        base: Arguments of :class:`DistillationModule`.

    Raises:
        ValueError: If a count or the solver is impossible.
    """

    def __init__(
        self,
        teacher: str | Denoiser,
        steps: int = 4,
        distance: str | Distance = "l2",
        teacher_substeps: int = 4,
        teacher_solver: str = "heun",
        sigma_min: float = 0.006,
        to_zero: bool = False,
        student: str | Denoiser | None = None,
        **base: Any,
    ) -> None:
        check_solver(teacher_solver)
        frozen = as_denoiser(teacher)
        generator = student_of(frozen, student)
        grid = rho_grid(steps, sigma_min, frozen.sigma_max, end=0.0 if to_zero else None)
        generator.few_steps = FewSteps(trained=(steps,), grids=(grid.tolist(),))
        super().__init__(generator, frozen, steps=steps, **base)
        self.save_hyperparameters(logger=False)
        self.distance = as_distance(distance, frozen.codec)
        self.fine_grid = refined(grid, teacher_substeps)
        self.teacher_substeps, self.teacher_solver = teacher_substeps, teacher_solver

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The distance of a student's jump to the teacher's steps between random nodes."""
        x0, condition = batch["image"], condition_of(batch)
        fine, parts = placed(self.fine_grid, x0.device), self.teacher_substeps
        node = torch.randint((len(fine) - 1) // parts, (len(x0),), device=x0.device)
        levels = torch.stack([fine[node * parts + k] for k in range(parts + 1)])
        x = noised(x0, levels[0])
        with torch.no_grad():
            assert self.teacher is not None
            target = solve(self.teacher, x, levels, solver=self.teacher_solver, condition=condition)
        ahead = jump(x, self.student(x, levels[0], condition), levels[0], levels[-1])
        loss = self.distance(ahead, target).mean()
        self.watch(loss)
        self.log("loss/trajectory", loss, prog_bar=True)
        return loss

    def frozen_modules(self) -> tuple[str, ...]:
        """Teacher and distance."""
        return ("teacher", "distance")
