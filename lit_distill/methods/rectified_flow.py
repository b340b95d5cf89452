"""Rectified flow and reflow (Liu et al. 2023)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_distill.diffusion import (
    Denoiser,
    FlowDenoiser,
    NetworkDenoiser,
    SigmaDistribution,
    straightness,
)
from lit_distill.losses import flow_matching_loss
from lit_distill.methods.base import (
    Batch,
    DistillationModule,
    as_denoiser,
    condition_of,
    copy_of,
    network_of,
)
from lit_distill.methods.knowledge import stored_pair
from lit_distill.methods.teacher import DiffusionTeacher

_LOOKED_AT = 64  # samples whose trajectories say how straight a flow is


class RectifiedFlow(DiffusionTeacher):
    """Trains a flow from data: a teacher whose ODE moves at the mean speed of straight lines.

    ``|u(x_t, t) - (noise - x0)|^2`` at ``x_t = (1 - t) x0 + t noise`` (Liu et al. 2023, Eq. 1):
    :class:`DiffusionTeacher` with a flow. How straight its trajectories are is logged in
    validation.

    Data: any. Under DDP use ``strategy: ddp``.

    Args:
        denoiser: A :class:`~lit_distill.diffusion.FlowDenoiser`, or a folder or hub id of one.
        sigma_distribution: Times, as levels ``t / (1 - t)``: uniform in ``t`` by default, logit
            normal by ``LogNormalSigma(0, 1)`` (Esser et al. 2024).
        label_dropout: Share of samples whose label is replaced by the null class, for guidance.
        steps: Steps of a sampling run.
        solver: Solver of a sampling run.
        base: Arguments of :class:`DiffusionTeacher`.

    Raises:
        ValueError: If the model is no flow, or has no null class that labels could be dropped for.
    """

    def __init__(
        self,
        denoiser: str | Denoiser,
        sigma_distribution: SigmaDistribution | None = None,
        label_dropout: float = 0.0,
        steps: int = 18,
        solver: str = "heun",
        **base: Any,
    ) -> None:
        flow = _flow(as_denoiser(denoiser), "denoiser")
        super().__init__(
            flow, sigma_distribution, label_dropout, steps=steps, solver=solver, **base
        )
        self.save_hyperparameters(logger=False)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log how straight the flow is."""
        log_straightness(self, batch, batch_idx)


class Reflow(DistillationModule):
    """Trains a flow on the pairs of another model, which makes its trajectories straighter.

    The loss of :class:`RectifiedFlow` on stored pairs ``(noise, ODE(noise))`` of the teacher (Liu
    et al. 2023, Sec. 2.2). With the previous flow as the teacher it is the next rectification;
    with a diffusion model it is the first stage of InstaFlow (Liu et al. 2024), whose last stage is
    :class:`~lit_distill.methods.FlowDistillation`. The straightness of the student's trajectories
    is logged in validation.

    Data: :class:`~lit_distill.datamodules.PairsDataModule`. Under DDP use ``strategy: ddp``.

    Args:
        teacher: The model that made the pairs, or a folder or hub id of it.
        sigma_distribution: As for :class:`RectifiedFlow`.
        student: The flow to start from. By default the teacher where it is one; else a flow with
            the teacher's network, which has to learn a new meaning of its output (as InstaFlow
            does).
        steps: Euler's steps of a sampling run.
        solver: Solver of a sampling run.
        base: Arguments of :class:`DistillationModule`.

    Raises:
        ValueError: If the student is no flow.
    """

    def __init__(
        self,
        teacher: str | Denoiser,
        sigma_distribution: SigmaDistribution | None = None,
        student: str | Denoiser | None = None,
        steps: int = 1,
        solver: str = "euler",
        **base: Any,
    ) -> None:
        frozen = as_denoiser(teacher)
        if student is not None:
            flow = copy_of(_flow(as_denoiser(student), "student"))
        else:
            flow = copy_of(as_flow(network_of(frozen)))
        flow.few_steps = None  # a flow is sampled in any number of steps
        super().__init__(flow, frozen, steps=steps, solver=solver, **base)
        self.save_hyperparameters(logger=False)
        self.sigma_distribution = sigma_distribution or flow.schedule

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Flow matching on a batch of pairs."""
        noise, x0 = stored_pair(batch, self)
        t = drawn_times(self.sigma_distribution, noise)
        loss = flow_matching_loss(self.student, x0, noise, t, condition_of(batch)).mean()
        self.watch(loss)
        self.log("loss/flow_matching", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log how straight the flow is."""
        log_straightness(self, batch, batch_idx)


def as_flow(denoiser: NetworkDenoiser) -> FlowDenoiser:
    """A flow itself, or one with the network of another model."""
    if isinstance(denoiser, FlowDenoiser):
        return denoiser
    return FlowDenoiser(denoiser.network).train(denoiser.training)


def drawn_times(distribution: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Random times ``(B,)`` in [0, 1] of the levels that a distribution draws."""
    sigma = distribution(torch.rand(len(x), device=x.device))
    return (sigma / (1 + sigma)).float()


def log_straightness(module: DistillationModule, batch: Batch, batch_idx: int) -> None:
    """Log ``val/straightness`` of the averaged weights, on the noise of one small batch."""
    if batch_idx > 0:
        return
    image = batch["image"][:_LOOKED_AT]
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    some = {name: tensor[:_LOOKED_AT] for name, tensor in batch.items()}
    found = straightness(module.network, noise.to(image), condition_of(some)).mean()
    module.log("val/straightness", found, batch_size=len(image), sync_dist=True)


def _flow(denoiser: Denoiser, option: str) -> FlowDenoiser:
    if not isinstance(denoiser, FlowDenoiser):
        raise ValueError(
            f"The option {option} is a {type(denoiser).__name__}, and a rectified flow needs a "
            "FlowDenoiser: give the folder of one, or lit_distill.diffusion.FlowDenoiser with a "
            "network of its own."
        )
    return denoiser
