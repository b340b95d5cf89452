"""Consistency training: a consistency model without a teacher (Song & Dhariwal 2024; Geng 2024)."""

from typing import Any

import torch
from torch import Tensor

from lit_distill.diffusion import Denoiser, FewSteps, LogNormalSigma, SigmaDistribution, like, wide
from lit_distill.losses import Distance, as_distance
from lit_distill.methods.base import Batch, DistillationModule, as_denoiser, condition_of, copy_of
from lit_distill.methods.consistency import random_state, same_randomness, with_boundary

_LEVELS = 40  # that multistep sampling picks from


class ConsistencyTraining(DistillationModule):
    """Consistency model from data alone, started from a pretrained denoiser or from nothing.

    The teacher's step of consistency distillation is replaced by less of the *same* noise: the
    student's estimates at ``x0 + t eps`` and ``x0 + r eps`` are to agree, and ``r`` comes closer to
    ``t`` while training goes on (ECT, Geng et al. 2024, Eqs. 10-12)::

        r = t (1 - q^-(stage + 1) (1 + 8 sigmoid(-t))),  weight 1 / (t - r)

    Whether a pretrained model is needed can be asked by ``denoiser``: a folder, or a new network.

    Data: images. Under DDP use ``strategy: ddp``.

    Reference recipe (CIFAR10): pretrained EDM, q 2 (256 for one hour), stage after every 1/8 of
    the run, RAdam 1e-4, batch 128, dropout .2.

    Args:
        denoiser: What to start from: a denoiser with EDM's scalings, or a folder or hub id of one.
        distance: ``pseudo_huber``, ``l2``, ``lpips``, ``l1``, or an object.
        q: How fast ``r`` comes closer.
        stage_updates: Updates of a stage.
        sigma_distribution: Maps uniform numbers to ``t``.
        base: Arguments of :class:`DistillationModule`.

    Raises:
        ValueError: If a number is impossible, or the model cannot have the boundary condition.
    """

    def __init__(
        self,
        denoiser: str | Denoiser,
        distance: str | Distance = "pseudo_huber",
        q: float = 2.0,
        stage_updates: int = 50_000,
        sigma_distribution: SigmaDistribution | None = None,
        **base: Any,
    ) -> None:
        if q <= 1 or stage_updates < 1:
            raise ValueError(
                f"q={q}, stage_updates={stage_updates}: q must be above 1, and a stage has at "
                "least one update."
            )
        student = with_boundary(copy_of(as_denoiser(denoiser)), _LEVELS)
        student.few_steps = FewSteps(trained=(1, 2), gamma=1.0)
        super().__init__(student, **base)
        self.save_hyperparameters(logger=False)
        self.distance = as_distance(distance, student.codec)
        self.q, self.stage_updates = q, stage_updates
        self.sigma_distribution = sigma_distribution or LogNormalSigma(-1.1, 2.0)
        self.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The distance of the student's estimates at two levels of the same noise."""
        x0, condition = batch["image"], condition_of(batch)
        sigma = self.sigma_distribution(torch.rand(len(x0), device=x0.device))
        sigma = sigma.clamp(1.01 * self.student.sigma_min, self.student.sigma_max)
        below = self.lower_level(sigma)
        noise = torch.randn_like(x0)
        state = random_state(x0.device)
        there = self.student(x0 + like(sigma, x0) * noise, sigma, condition)
        with torch.no_grad(), same_randomness(state, x0.device):
            target = self.student(x0 + like(below, x0) * noise, below, condition)
        distance = self.distance(there, target)
        loss = (distance / (sigma - below).to(distance.dtype)).mean()
        self.watch(loss)
        self.log("loss/consistency", loss, prog_bar=True)
        self.log("stage/number", float(self.stage))
        return loss

    @property
    def stage(self) -> int:
        """Number of the stage, from 0."""
        return self.trainer.global_step // self.stage_updates

    def lower_level(self, sigma: Tensor) -> Tensor:
        """``r`` for ``t``, not below the level of the boundary condition."""
        gap = self.q ** -(self.stage + 1) * (1 + 8 * torch.sigmoid(-wide(sigma)))
        return (sigma * (1 - gap)).clamp_min(self.student.sigma_min)

    def frozen_modules(self) -> tuple[str, ...]:
        """Distance."""
        return ("distance",)
