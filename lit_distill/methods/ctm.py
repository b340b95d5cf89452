"""Consistency trajectory models (Kim et al. 2024)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_distill.diffusion import (
    Condition,
    Denoiser,
    FewSteps,
    LogNormalSigma,
    SigmaDistribution,
    check_solver,
    jump,
    placed,
    rho_grid,
    solve,
    told,
)
from lit_distill.losses import Distance, as_distance, denoising_loss
from lit_distill.methods.alternating import AlternatingDistillationModule
from lit_distill.methods.base import (
    Batch,
    Trained,
    as_denoiser,
    condition_of,
    network_of,
    noised,
    student_of,
)
from lit_distill.methods.consistency import Target, check_target, target_of
from lit_distill.models import add_inputs


class ConsistencyTrajectory(AlternatingDistillationModule):
    """Student that jumps from any level ``t`` of an ODE to any lower level ``s``.

    ``G(x, t, s) = jump(x, g(x, t, s), t, s)``, where ``g`` is the teacher's network with ``s`` as a
    second time (Eqs. 6-7 of the paper). The data are noised to a node ``t`` and carried to a node
    ``u`` by some steps of the teacher; ``G`` from ``t`` and from ``u`` to the same ``s`` are
    compared after a frozen average of the student has taken both on to the end, through which the
    gradient flows (Eq. 8). Denoising score matching on ``g(x, t, t)`` is added (Eq. 11). The GAN
    term and the adaptive weights of the paper are not there.

    Data: images. Under DDP use ``strategy: ddp``.

    Reference recipe (CIFAR10): 18 nodes, up to 17 teacher steps, LPIPS, RAdam 4e-4, batch 256,
    EMA and average .999, denoising weight 1 (adaptive).

    Args:
        teacher: A denoiser, or a folder or hub id of one.
        num_nodes: Nodes of the grid, between the teacher's largest and smallest level.
        distance: ``lpips``, ``l2``, ``l1``, ``pseudo_huber``, or an object.
        max_teacher_steps: Most steps of the teacher from ``t`` to ``u``; each batch draws a number.
        teacher_solver: The teacher's solver.
        inner_target: Who jumps from ``u``: the student itself without a gradient, or its average.
        target_decay: Decay of the average.
        denoising_weight: Weight of denoising score matching.
        sigma_distribution: Levels of denoising score matching, from uniform numbers.
        steps: Numbers of steps to sample with; the first is the default.
        gamma: Share of fresh noise between the jumps of sampling, in [0, 1].
        clip: Largest gradient norm, or None.
        student: What the student starts from, where that is not the teacher.
        base: Arguments of :class:`AlternatingDistillationModule`.

    Raises:
        ValueError: If a setting is impossible.
    """

    def __init__(
        self,
        teacher: str | Denoiser,
        num_nodes: int = 18,
        distance: str | Distance = "lpips",
        max_teacher_steps: int = 17,
        teacher_solver: str = "heun",
        inner_target: Target = "stop_gradient",
        target_decay: float = 0.999,
        denoising_weight: float = 1.0,
        sigma_distribution: SigmaDistribution | None = None,
        steps: Sequence[int] = (1, 2, 4),
        gamma: float = 0.0,
        clip: float | None = None,
        student: str | Denoiser | None = None,
        **base: Any,
    ) -> None:
        check_solver(teacher_solver)
        check_target(inner_target, "inner_target")
        if not steps:
            raise ValueError("steps is an empty list: name at least one number of steps.")
        if num_nodes < 2 or max_teacher_steps < 1:
            raise ValueError(
                f"num_nodes={num_nodes}, max_teacher_steps={max_teacher_steps}: a grid has at "
                "least 2 nodes, and the teacher takes at least 1 step."
            )
        frozen = as_denoiser(teacher)
        generator = student_of(frozen, student)
        add_inputs(network_of(generator), ("to_sigma",))
        sigma_min, sigma_max = frozen.sigma_min, frozen.sigma_max
        grids = [rho_grid(n, sigma_min, sigma_max, end=0.0).tolist() for n in steps]
        generator.few_steps = FewSteps(steps, grids, gamma=gamma)
        average = target_of(generator, "ema", target_decay)
        super().__init__(generator, frozen, steps=steps[0], **base)
        self.save_hyperparameters(logger=False)
        assert average is not None
        self.average = average
        self.distance, self.clip = as_distance(distance, frozen.codec), clip
        self.nodes = rho_grid(num_nodes - 1, sigma_min, sigma_max)
        self.max_teacher_steps, self.teacher_solver = max_teacher_steps, teacher_solver
        self.inner_target, self.denoising_weight = inner_target, denoising_weight
        self.sigma_distribution = sigma_distribution or LogNormalSigma()
        self.train()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One update."""
        self.update("student", self.loss, self.split(batch))
        self.step_schedules()

    def loss(self, batch: Batch) -> Tensor:
        """Consistency of jumps, and denoising score matching."""
        x0, condition = batch["image"], condition_of(batch)
        consistency = self.consistency(x0, condition).mean()
        self.log("loss/consistency", consistency, prog_bar=True)
        if self.denoising_weight == 0:
            return consistency
        sigma = self.sigma_distribution(torch.rand(len(x0), device=x0.device))
        noise = torch.randn_like(x0)
        denoising = denoising_loss(self.student, x0, sigma, noise, condition).mean()
        self.log("loss/denoising", denoising, prog_bar=True)
        return consistency + self.denoising_weight * denoising

    def consistency(self, x0: Tensor, condition: Condition) -> Tensor:
        """Distance ``(B,)``, at the end, of the jumps from ``t`` and from ``u`` to ``s``."""
        nodes = placed(self.nodes, x0.device)
        last, steps = len(nodes) - 1, 1 + self.drawn_for_all(self.max_teacher_steps)
        start = torch.randint(last, (len(x0),), device=x0.device)
        to = start + 1 + (torch.rand(len(x0), device=x0.device) * (last - start)).long()
        path = [torch.minimum(start + k, to) for k in range(steps + 1)]  # stops where s is
        t, u, s = nodes[start], nodes[path[-1]], nodes[to]
        x = noised(x0, t)
        ahead = self.go(self.student, x, t, s, condition)
        with torch.no_grad():
            assert self.teacher is not None
            levels = torch.stack([nodes[index] for index in path])
            x_u = solve(self.teacher, x, levels, solver=self.teacher_solver, condition=condition)
            judge = self.average.module if self.inner_target == "ema" else self.student
            target = self.to_end(self.go(judge, x_u, u, s, condition), s, condition)
        return self.distance(self.to_end(ahead, s, condition), target)

    def go(self, model: Any, x: Tensor, sigma: Tensor, to_sigma: Tensor, condition: Any) -> Tensor:
        """``G(x, t, s)``: a jump with the network told where it goes."""
        x0 = model(x, sigma, told(self.student, condition, to_sigma=to_sigma))
        return jump(x, x0, sigma, to_sigma)

    def to_end(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The frozen average's jump to the smallest level."""
        end = placed(self.nodes[-1], x.device).expand(len(x))
        return self.go(self.average.module, x, sigma, end, condition)

    def student_stepped(self) -> None:
        """The averages of the student's weights follow."""
        super().student_stepped()
        self.average.update_parameters(self.student)

    def trained_modules(self) -> list[Trained]:
        """The student."""
        return [Trained("student", self.student, self.optimizer, self.lr_scheduler, self.clip)]

    def frozen_modules(self) -> tuple[str, ...]:
        """Teacher and distance."""
        return ("teacher", "distance")

    def train(self, mode: bool = True) -> "ConsistencyTrajectory":
        """The average stays in eval mode."""
        super().train(mode)
        if hasattr(self, "average"):
            self.average.eval()
        return self
