"""Training of a teacher: denoising score matching, with any denoiser's own objective."""

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lit_distill.diffusion import (
    Condition,
    Denoiser,
    Generators,
    GuidedDenoiser,
    SigmaDistribution,
    karras_sigmas,
    like,
    sample,
    solve,
)
from lit_distill.losses import denoising_loss
from lit_distill.methods.base import Batch, DistillationModule, as_denoiser, condition_of


class DiffusionTeacher(DistillationModule):
    """Trains a diffusion or flow model from data.

    The objective follows from the denoiser: an ``EDMDenoiser`` is trained as in Karras et al. 2022
    (Eq. 8), an ``EpsilonDenoiser`` as in DDPM (Ho et al. 2020, Eq. 14), a ``VelocityDenoiser`` on
    v (Salimans & Ho 2022), a ``FlowDenoiser`` as a rectified flow (Liu et al. 2023, Eq. 1). All of
    them are ``weight(sigma) |D(x0 + sigma noise, sigma) - x0|^2`` with their own weight.

    Under DDP use ``strategy: ddp``.

    Args:
        denoiser: The model to train, or a folder or hub id to go on from.
        sigma_distribution: Maps uniform numbers to training noise levels, for example
            ``LogNormalSigma``; by default uniform in the denoiser's own time.
        label_dropout: Share of samples whose label is replaced by the null class, or their prompt
            by the empty one, for guidance.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule, in steps.
        ema_decay: Decay of the average of the weights.
        steps: Steps of a sampling run.
        solver: Solver of a sampling run.
        compile: Compile the network.
        channels_last: Keep weights in the channels-last layout.
        guidance: Scale of classifier-free guidance of its samples, such as those of stored pairs; 1
            = none.
        sigma_min: Where the grid of its samples (Karras et al. 2022, Eq. 5) ends before the last
            step, to 0; by default they are made on the denoiser's own grid.

    Raises:
        ValueError: If labels shall be dropped but the network has no null class, or the grid would
            end outside the denoiser's levels.
    """

    def __init__(
        self,
        denoiser: str | Denoiser,
        sigma_distribution: SigmaDistribution | None = None,
        label_dropout: float = 0.0,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
        ema_decay: float = 0.999,
        steps: int = 18,
        solver: str = "heun",
        compile: bool = False,
        channels_last: bool = False,
        guidance: float = 1.0,
        sigma_min: float | None = None,
    ) -> None:
        student = as_denoiser(denoiser)
        if label_dropout > 0 and student.null_label is None and student.codec is None:
            raise ValueError(
                f"label_dropout={label_dropout} needs a class-conditional network with a null "
                "class: set the network's num_classes, or label_dropout to 0."
            )
        if sigma_min is not None and not student.sigma_min <= sigma_min < student.sigma_max:
            raise ValueError(
                f"sigma_min={sigma_min} is outside the denoiser's levels, {student.sigma_min:g} to "
                f"{student.sigma_max:g}."
            )
        super().__init__(
            student,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            ema_decay=ema_decay,
            steps=steps,
            solver=solver,
            compile=compile,
            channels_last=channels_last,
        )
        self.save_hyperparameters(logger=False)
        self.sigma_distribution = sigma_distribution or student.schedule
        self.label_dropout, self.guidance, self.sigma_min = label_dropout, guidance, sigma_min

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Denoising score matching on a batch of data."""
        x0, condition = batch["image"], condition_of(batch)
        sigma = self.sigma_distribution(torch.rand(len(x0), device=self.device))
        if self.label_dropout > 0 and condition is not None:
            drop = torch.rand(len(x0), device=self.device) < self.label_dropout
            condition = either(drop, self.student.null(condition), condition)
        loss = denoising_loss(self.student, x0, sigma, torch.randn_like(x0), condition).mean()
        self.watch(loss)
        self.log("loss/denoising", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def generate(
        self,
        noise: Tensor,
        condition: Condition = None,
        steps: int | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Make samples with the averaged weights, see :meth:`DistillationModule.generate`."""
        model: Denoiser = self.network
        if self.guidance != 1:
            model = GuidedDenoiser(self.network, self.guidance)
        steps = self.steps if steps is None else steps
        if self.sigma_min is None:
            return sample(
                model,
                noise,
                steps=steps,
                solver=self.solver,
                condition=condition,
                generator=generator,
            )
        assert self.solver is not None
        grid = karras_sigmas(steps, self.sigma_min, model.sigma_max)
        return solve(model, model.start(noise), grid, solver=self.solver, condition=condition)

    def sampling_record(self) -> dict[str, Any]:
        """How ``generate`` samples."""
        own = {} if self.sigma_min is None else {"sigma_min": self.sigma_min}
        return {**super().sampling_record(), **own, "guidance": self.guidance}


def either(which: Tensor, one: Condition, other: Condition) -> Condition:
    """The condition ``one`` of the samples where ``which`` (B,) is true, else the ``other``."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {
            name: torch.where(like(which, one[name]).bool(), one[name], other[name]) for name in one
        }
    assert isinstance(one, Tensor) and isinstance(other, Tensor)
    return torch.where(which, one, other)
