"""Latent consistency distillation of guided text-to-image models (Luo et al. 2023)."""

from typing import Any, Literal

import torch
from torch import Tensor

from lit_distill.diffusion import (
    Condition,
    Denoiser,
    EpsilonDenoiser,
    FewSteps,
    LatentConsistencyDenoiser,
    VelocityDenoiser,
    jump,
    like,
    placed,
    told,
)
from lit_distill.losses import Distance, Huber, as_distance
from lit_distill.methods.base import (
    Batch,
    DistillationModule,
    as_denoiser,
    condition_of,
    network_of,
    noised,
    round_weights,
    student_of,
)
from lit_distill.methods.consistency import (
    Target,
    random_state,
    same_randomness,
    target_of,
    with_scalings,
)
from lit_distill.models import LoRA, adapted, add_inputs


class LatentConsistencyDistillation(DistillationModule):
    """Student that jumps from any point of the *guided* teacher's ODE to its end: LCM, LCM-LoRA.

    The data are noised to a random time ``t`` of the DDIM grid and carried down the grid by one
    DDIM step of the teacher under classifier-free guidance of a random scale (Luo et al. 2023,
    Algorithm 1: ``w``, which is the scale - 1 here). The student's estimates at the two are to
    agree; it learns to need no guidance any more. Sampled in one step, or in several with fresh
    noise between them, by diffusers' ``LCMScheduler``.

    Without ``lora`` the whole network is trained and told the scale (``time_cond_proj_dim``); with
    it, adapters are trained and the scale is not told (Luo et al. 2023, "LCM-LoRA").

    Reference recipe (Stable Diffusion 1.5): grid of 50 times, guidance 6 to 16 (w from 5 to 15),
    Huber with c = .001; full: 1e-6 or 8e-6, EMA target .95; LoRA: rank 64, 1e-4.

    Deviation: a grid time below the step's length goes to the time 0 of the table, as in diffusers'
    training script, and not to a level without noise.

    Data: latents with prompts, :class:`~lit_distill.datamodules.LatentTextDataModule`; labelled
    images do too. Under DDP use ``strategy: ddp``.

    Args:
        teacher: A denoiser that predicts noise or v at the times of a table and knows an empty
            prompt (or a null class), or a folder or hub id of one.
        guidance: Smallest and largest scale of the teacher's guidance, 1 = none.
        grid_steps: Times of the DDIM grid; 50 make steps of 20 of 1000 times.
        distance: ``huber``, ``l2``, ``l1``, ``pseudo_huber``, or an object; by default ``huber``.
        target: What judges the lower time: the student itself without a gradient, or an average of
            its weights.
        target_decay: Decay of that average.
        lora: Train low-rank adapters on the teacher's network instead of a network of its own.
        student: What the student starts from, where that is not the teacher; not with ``lora``.
        teacher_precision: ``bfloat16`` halves the teacher's memory; what shares its network too.
        steps: Steps of a sampling run where none are asked for.
        base: Arguments of :class:`DistillationModule`.

    Raises:
        ValueError: If a setting is impossible.
    """

    def __init__(
        self,
        teacher: str | Denoiser,
        guidance: tuple[float, float] = (6.0, 16.0),
        grid_steps: int = 50,
        distance: str | Distance | None = None,
        target: Target = "stop_gradient",
        target_decay: float = 0.95,
        lora: LoRA | None = None,
        student: str | Denoiser | None = None,
        teacher_precision: Literal["float32", "bfloat16"] = "float32",
        steps: int = 4,
        **base: Any,
    ) -> None:
        low, high = guidance
        _check(low, high, lora, student)
        frozen = as_denoiser(teacher)
        start = student_of(frozen, student) if lora is None else adapted(network_of(frozen), lora)
        _check_table(start)
        generator = with_scalings(start, grid_steps, (low + high) / 2)
        if lora is None:
            add_inputs(generator, ("guidance",))
        assert isinstance(generator, LatentConsistencyDenoiser)
        round_weights(frozen, teacher_precision)
        generator.few_steps = FewSteps(trained=(4, 1, 2, 8), gamma=1.0)
        super().__init__(generator, frozen, steps=steps, **base)
        self.save_hyperparameters(logger=False)
        self.guidance, self.skip = (low, high), len(generator.table) // grid_steps
        self.distance = Huber() if distance is None else as_distance(distance, frozen.codec)
        self.times, self.table = generator.times(), generator.table
        self.average = target_of(generator, target, target_decay)
        self.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The distance of the student's estimates at two neighbouring points of an ODE."""
        x0, condition = batch["image"], condition_of(batch)
        times, table = self.times.to(x0.device), placed(self.table, x0.device)
        time = times[torch.randint(len(times), (len(x0),), device=x0.device)]
        sigma, below = table[time], table[(time - self.skip).clamp_min(0)]
        low, high = self.guidance
        scale = low + (high - low) * torch.rand(len(x0), device=x0.device)
        x = noised(x0, sigma)
        with torch.no_grad():
            x_below = jump(x, self.guided(x, sigma, condition, scale), sigma, below)
        condition = told(self.student, condition, guidance=scale)
        state = random_state(x.device)
        here = self.student(x, sigma, condition)
        with torch.no_grad(), same_randomness(state, x.device):
            judge = self.student if self.average is None else self.average
            there = judge(x_below, below, condition)
        loss = self.distance(here, there).mean()
        self.watch(loss)
        self.log("loss/consistency", loss, prog_bar=True)
        return loss

    def guided(self, x: Tensor, sigma: Tensor, condition: Condition, scale: Tensor) -> Tensor:
        """The teacher's estimates under guidance of a scale ``(B,)`` for each sample."""
        assert self.teacher is not None
        conditional = self.teacher(x, sigma, condition)
        unconditional = self.teacher(x, sigma, self.teacher.null(condition))
        return torch.lerp(unconditional, conditional, like(scale, x))

    def student_stepped(self) -> None:
        """The averages of the student's weights follow."""
        super().student_stepped()
        if self.average is not None:
            self.average.update_parameters(self.student)

    def train(self, mode: bool = True) -> "LatentConsistencyDistillation":
        """The average has the student's mode, as both sides drop the same units."""
        super().train(mode)
        average = getattr(self, "average", None)  # none yet while the base is being made
        if average is not None:
            average.train(mode)
        return self

    def frozen_modules(self) -> tuple[str, ...]:
        """Teacher and distance."""
        return ("teacher", "distance")


def _check(low: float, high: float, lora: LoRA | None, student: object) -> None:
    if low > high or low < 0:
        raise ValueError(f"guidance={(low, high)} is no range of scales: smallest, then largest.")
    if low == high and lora is None:
        raise ValueError(
            f"guidance={(low, high)} has no width, and the student is told the scale, which it "
            "could not learn from one: give a range such as (6, 16), or train adapters (lora)."
        )
    if lora is not None and student is not None:
        raise ValueError("lora trains adapters on the teacher's network: leave student out.")


def _check_table(denoiser: Denoiser) -> None:
    """Raise a ``ValueError`` unless the model predicts noise or v at the times of a table."""
    if not isinstance(denoiser, EpsilonDenoiser | VelocityDenoiser | LatentConsistencyDenoiser):
        raise ValueError(
            "Latent consistency distillation needs a teacher that predicts noise or v at the times "
            f"of a table, and this one is a {type(denoiser).__name__}: give a Stable Diffusion "
            "folder, or a model trained as an EpsilonDenoiser or VelocityDenoiser."
        )
