"""Simple and fast distillation (Zhou et al. 2024), for one or for several numbers of steps."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lit_distill.diffusion import (
    Condition,
    Denoiser,
    EvaluationCounter,
    FewSteps,
    analytical_x0,
    check_solver,
    jump,
    placed,
    refined,
    rho_grid,
    solve,
    told,
)
from lit_distill.losses import Distance, as_distance
from lit_distill.methods.alternating import AlternatingDistillationModule
from lit_distill.methods.base import (
    Batch,
    Trained,
    as_denoiser,
    condition_of,
    network_of,
    student_of,
)
from lit_distill.models import add_inputs

_OFFERED = 10  # a grid stands in the student for so many numbers of steps, trained or not


class SFD(AlternatingDistillationModule):
    """Few-step student that follows the teacher's trajectory from the same noise.

    Algorithm 2 of the paper: the student goes down its grid beside the teacher, which takes
    ``teacher_substeps`` steps for each of the student's. At every node the student is updated by
    the distance of the two states, and goes on from the point that it had reached *before* that
    update. With several numbers of steps (SFD-v) one is drawn for each batch, and the network is
    told which.

    ``predict`` writes the teacher's trajectories as pairs with one tensor more; on such a folder
    ``fit`` does not ask the teacher.

    Data: any, of which only labels are taken (the method needs no images), or a
    :class:`~lit_distill.datamodules.PairsDataModule` with trajectories. A batch is one update for
    each evaluation of the student. Under DDP use ``strategy: ddp``.

    Reference recipe (CIFAR10): steps 4, L1, Adam 5e-5, a tenth of it in the second half, batch 128,
    200k images (SFD-v: 2 to 5 of them, 800k), no EMA, no clipping.

    Deviations: the embedding of the number of steps starts as zeros, so that the student starts as
    the teacher; distances are means over pixels.

    Args:
        teacher: A denoiser, or a folder or hub id of one.
        steps: Evaluations of the student, or a list of the numbers to be able to do (SFD-v).
        distance: ``l1``, ``l2``, ``lpips``, ``pseudo_huber``, or an object.
        teacher_substeps: Steps of the teacher for one of the student (``M + 1`` in the paper).
        teacher_solver: The teacher's solver.
        sigma_min: Where the grids end (0.1 for Stable Diffusion).
        analytical_first_step: Both make a first jump that costs no evaluation.
        clip: Largest gradient norm, or None.
        student: What the student starts from, where that is not the teacher.
        base: Arguments of :class:`AlternatingDistillationModule`.

    Raises:
        ValueError: If a count, the range or the solver is impossible.
    """

    def __init__(
        self,
        teacher: str | Denoiser,
        steps: int | list[int] = 4,
        distance: str | Distance = "l1",
        teacher_substeps: int = 4,
        teacher_solver: str = "dpmpp_3m",
        sigma_min: float = 0.006,
        analytical_first_step: bool = False,
        clip: float | None = None,
        student: str | Denoiser | None = None,
        **base: Any,
    ) -> None:
        check_solver(teacher_solver)
        counts = [steps] if isinstance(steps, int) else list(steps)
        if not counts:
            raise ValueError("steps is an empty list: name at least one number of steps.")
        if teacher_substeps < 1:
            raise ValueError(
                f"teacher_substeps={teacher_substeps}: the teacher takes at least 1 step for each "
                "of the student."
            )
        frozen = as_denoiser(teacher)
        generator = student_of(frozen, student)
        if len(counts) > 1:
            add_inputs(network_of(generator), ("steps",))
        offered = sorted({*counts, *range(1, _OFFERED + 1)})
        free = int(analytical_first_step)
        grids = [rho_grid(n + free, sigma_min, frozen.sigma_max).tolist() for n in offered]
        generator.few_steps = FewSteps(counts, grids, analytical_first_step=analytical_first_step)
        super().__init__(generator, frozen, steps=counts[0], **base)
        self.save_hyperparameters(logger=False)
        self.distance, self.clip = as_distance(distance, frozen.codec), clip
        self.counts, self.analytical_first_step = counts, analytical_first_step
        self.teacher_substeps, self.teacher_solver = teacher_substeps, teacher_solver

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Follow the teacher down one grid, with an update at each node."""
        steps = self.counts[self.drawn_for_all(len(self.counts))]
        grid = placed(self.student.grid(steps), self.device)
        runs = [self.begin(part, steps, grid) for part in self.split(batch)]
        for i, levels in enumerate(pairwise(grid)):
            if i == 0 and self.analytical_first_step:
                for run in runs:
                    sigma, to_sigma = run.expanded(levels)
                    run.x = jump(run.x, analytical_x0(run.x, sigma), sigma, to_sigma)
                continue
            self.update("student", partial(self.node_loss, node=i + 1, levels=levels), runs)
            self.step_schedules()
        self.log_updates()

    def log_updates(self) -> None:
        """Log against student updates, where Lightning would take the number of batches."""
        self.log("step", float(self.trainer.global_step), sync_dist=not self.training)

    def on_validation_epoch_end(self) -> None:
        """Log the figures of a validation at the right place, too."""
        self.log_updates()

    def node_loss(self, run: "Run", node: int, levels: tuple[Tensor, Tensor]) -> Tensor:
        """Distance of the student's next state to the teacher's; the run goes on from there."""
        sigma, to_sigma = run.expanded(levels)
        ahead = jump(run.x, self.student(run.x, sigma, run.condition), sigma, to_sigma)
        loss = self.distance(ahead, run.nodes[:, node]).mean()
        run.x = ahead.detach()
        self.log(f"loss/node_{node}", loss)
        return loss

    def begin(self, batch: Batch, steps: int, grid: Tensor) -> "Run":
        """The teacher's trajectory of a batch, and the student at its start."""
        condition = condition_of(batch)
        noise = batch["noise"] if "noise" in batch else torch.randn_like(batch["image"])
        if "trajectory" in batch:
            nodes = batch["trajectory"]
        else:
            nodes = self.teacher_nodes(noise, grid, condition)
        count = torch.full((len(noise),), steps, device=noise.device)
        condition = told(self.student, condition, steps=count)
        return Run(self.student.start(noise), nodes, condition)

    @torch.no_grad()
    def teacher_nodes(self, noise: Tensor, grid: Tensor, condition: Condition) -> Tensor:
        """The teacher's states ``(B, S, *shape)`` at the ``S`` levels of the student's grid."""
        assert self.teacher is not None
        nodes: list[Tensor] = []

        def keep(step: int, x: Tensor, x0: Tensor) -> None:
            if step % self.teacher_substeps == 0:
                nodes.append(x)

        end = solve(
            self.teacher,
            self.teacher.start(noise),
            refined(grid, self.teacher_substeps),
            solver=self.teacher_solver,
            condition=condition,
            callback=keep,
            analytical_first_step=self.analytical_first_step,
        )
        return torch.stack([*nodes, end], 1)

    def setup(self, stage: str) -> None:
        """Compare stored trajectories with what this run would make.

        Raises:
            ValueError: If they are of another teacher, grid or solver, or there are several grids.
        """
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        stored = getattr(data, "trajectory", None)
        if stage != "fit" or stored is None:
            return
        own = self.trajectory_record()
        differing = [
            f"{name}: {stored.get(name)}, not {own[name]}"
            for name in own
            if stored.get(name) != own[name]
        ]
        if differing:
            raise ValueError(
                f"The stored trajectories were made in another way ({'; '.join(differing)}). Write "
                "them anew to another folder by `lit-distill predict` with this configuration, or "
                "give the settings that they were made with."
            )

    def trajectory_record(self) -> dict[str, Any]:
        """What stored trajectories have to agree in.

        Raises:
            ValueError: If the student learns several numbers of steps, whose grids differ.
        """
        if len(self.counts) > 1:
            raise ValueError(
                f"Trajectories can be stored for one number of steps, not for {self.counts}: set "
                "steps to one, or train without stored trajectories."
            )
        return {
            "sigmas": self.student.grid(self.counts[0]).tolist(),
            "substeps": self.teacher_substeps,
            "solver": self.teacher_solver,
            "analytical_first_step": self.analytical_first_step,
        }

    def sampling_record(self) -> dict[str, Any]:
        """How ``predict`` makes the teacher's trajectories."""
        assert self.teacher is not None
        trajectory = self.trajectory_record()
        jumps = self.teacher_substeps * (len(trajectory["sigmas"]) - 1)
        with EvaluationCounter(self.teacher) as counter:
            shape = self.teacher.image_shape or ()
            zeros = torch.zeros((1, *shape), device=self.device)
            grid = placed(self.student.grid(self.counts[0]), self.device)
            self.teacher_nodes(zeros, grid, self.teacher.some_condition(1, self.device))
        return {
            "teacher": self.teacher.fingerprint(),
            "solver": self.teacher_solver,
            "steps": jumps,
            "nfe": counter.calls,
            "sigma_min": trajectory["sigmas"][-1],
            "sigma_max": trajectory["sigmas"][0],
            "dtype": str(self.trainer.precision).replace("32-true", "float32"),
            "deterministic": True,
            "trajectory": trajectory,
        }

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """The teacher's trajectories for a batch of ``index``, ``noise`` and maybe ``label``."""
        grid = placed(self.student.grid(self.counts[0]), self.device)
        nodes = self.teacher_nodes(batch["noise"], grid, condition_of(batch)).float()
        return {**batch, "trajectory": nodes, "image": nodes[:, -1]}

    @property
    def data_free(self) -> bool:
        """The teacher makes the targets."""
        return True

    def trained_modules(self) -> list[Trained]:
        """The student."""
        return [Trained("student", self.student, self.optimizer, self.lr_scheduler, self.clip)]

    def frozen_modules(self) -> tuple[str, ...]:
        """Teacher and distance."""
        return ("teacher", "distance")


@dataclass
class Run:
    """A batch on its way.

    Attributes:
        x: ``(B, *shape)``, the student's state.
        nodes: ``(B, S, *shape)``, the teacher's states at all levels of the student's grid.
        condition: What the student is told.
    """

    x: Tensor
    nodes: Tensor
    condition: Condition

    def expanded(self, levels: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Two levels for each sample."""
        sigma, to_sigma = levels
        return sigma.expand(len(self.x)), to_sigma.expand(len(self.x))
