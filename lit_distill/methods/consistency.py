"""Consistency distillation (Song et al. 2023)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lit_distill.diffusion import (
    ConsistencyDenoiser,
    Denoiser,
    EDMDenoiser,
    EpsilonDenoiser,
    FewSteps,
    GuidedDenoiser,
    LatentConsistencyDenoiser,
    VelocityDenoiser,
    check_solver,
    jump,
    like,
    placed,
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

Target = Literal["stop_gradient", "ema"]


class ConsistencyDistillation(DistillationModule):
    """Student that maps any point of the teacher's ODE to its end (Song et al. 2023, Algorithm 2).

    The data are noised to a random node of the grid and carried to the next by one step of the
    teacher; the student's estimates at the two are to agree. Sampled in one step, or in several
    with fresh noise between them.

    Data: any. Under DDP use ``strategy: ddp``.

    Reference recipe (CIFAR10): 18 nodes, LPIPS at 224, EMA target .95 (here: ``target: ema``),
    RAdam 4e-4, batch 512, EMA .9999.

    Args:
        teacher: A denoiser with EDM's scalings or of a DDPM table, or a folder or hub id of one;
            any other together with ``student``.
        num_nodes: Nodes of the grid, between the teacher's largest and smallest level.
        distance: ``lpips``, ``l2``, ``l1``, ``pseudo_huber``, or an object.
        target: What judges the lower node: the student itself without a gradient, or an average of
            its weights.
        target_decay: Decay of that average.
        teacher_solver: The teacher's solver, for one step.
        student: What the student starts from, where that is not the teacher; with such scalings.
        guidance: Scale of the teacher's guidance, 1 = none. The student is sampled without.
        base: Arguments of :class:`DistillationModule`.

    Raises:
        ValueError: If a setting is impossible, or the student cannot have the boundary condition.
    """

    def __init__(
        self,
        teacher: str | Denoiser,
        num_nodes: int = 18,
        distance: str | Distance = "lpips",
        target: Target = "stop_gradient",
        target_decay: float = 0.95,
        teacher_solver: str = "heun",
        student: str | Denoiser | None = None,
        guidance: float = 1.0,
        **base: Any,
    ) -> None:
        check_solver(teacher_solver)
        if num_nodes < 2:
            raise ValueError(f"num_nodes={num_nodes}: a grid has at least 2 nodes.")
        frozen = as_denoiser(teacher)
        generator = with_scalings(student_of(frozen, student), num_nodes, guidance)
        generator.few_steps = FewSteps(trained=(1, 2), gamma=1.0)
        super().__init__(generator, frozen, **base)
        self.save_hyperparameters(logger=False)
        self.distance = as_distance(distance, frozen.codec)
        self.teacher_solver = teacher_solver
        self.guidance = guidance
        self.nodes = rho_grid(num_nodes - 1, generator.sigma_min, generator.sigma_max)
        self.ends = torch.zeros(num_nodes - 1, dtype=torch.float64)
        self.average = target_of(generator, target, target_decay)
        self.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The distance of the student's jumps from two neighbouring points of an ODE."""
        x0, condition = batch["image"], condition_of(batch)
        nodes, ends = placed(self.nodes, x0.device), placed(self.ends, x0.device)
        node = torch.randint(len(nodes) - 1, (len(x0),), device=x0.device)
        sigma, below, end = nodes[node], nodes[node + 1], ends[node]
        x = noised(x0, sigma)
        with torch.no_grad():
            assert self.teacher is not None
            levels = torch.stack([sigma, below])
            teacher = GuidedDenoiser(self.teacher, self.guidance)
            x_below = solve(teacher, x, levels, solver=self.teacher_solver, condition=condition)
        state = random_state(x.device)
        there = jump(x, self.student(x, sigma, condition), sigma, end)
        with torch.no_grad(), same_randomness(state, x.device):
            judge = self.student if self.average is None else self.average
            target = jump(x_below, judge(x_below, below, condition), below, end)
            target = torch.where(like(below == end, x).bool(), x_below, target)
        loss = self.distance(there, target).mean()
        self.watch(loss)
        self.log("loss/consistency", loss, prog_bar=True)
        return loss

    def student_stepped(self) -> None:
        """The averages of the student's weights follow."""
        super().student_stepped()
        if self.average is not None:
            self.average.update_parameters(self.student)

    def train(self, mode: bool = True) -> "ConsistencyDistillation":
        """The average has the student's mode, as both sides drop the same units."""
        super().train(mode)
        average = getattr(self, "average", None)  # none yet while the base is being made
        if average is not None:
            average.train(mode)
        return self

    def frozen_modules(self) -> tuple[str, ...]:
        """Teacher and distance."""
        return ("teacher", "distance")


def with_scalings(
    denoiser: Denoiser, num_timesteps: int, guidance: float = 1.0
) -> ConsistencyDenoiser | LatentConsistencyDenoiser:
    """The same network as a consistency model: of a DDPM table as latent ones, else as EDM's.

    Args:
        denoiser: A model with EDM's scalings, or one that predicts noise or v at a table's times.
        num_timesteps: Levels that multistep sampling picks from.
        guidance: Scale that a network which embeds it is told where none is given.

    Raises:
        ValueError: If it has other scalings, or was trained on images in another range.
    """
    if isinstance(denoiser, LatentConsistencyDenoiser):  # to go on with
        return denoiser
    if not isinstance(denoiser, EpsilonDenoiser | VelocityDenoiser):
        return with_boundary(denoiser, num_timesteps)
    if denoiser.image_range != (-1, 1):
        raise ValueError(
            f"This model was trained on images in {list(denoiser.image_range)}, for which a "
            "consistency model has no scalings: give a teacher of images in [-1, 1], or use "
            "another method."
        )
    return LatentConsistencyDenoiser(
        denoiser.network,
        betas=denoiser.betas,
        prediction="epsilon" if isinstance(denoiser, EpsilonDenoiser) else "v_prediction",
        grid_steps=num_timesteps,
        guidance=guidance,
        discrete=denoiser.discrete,
    )


def with_boundary(denoiser: Denoiser, num_timesteps: int) -> ConsistencyDenoiser:
    """The same network with the boundary condition ``D(x, sigma_min) = x``.

    Args:
        denoiser: A model with EDM's scalings.
        num_timesteps: Levels that multistep sampling picks from.

    Raises:
        ValueError: If it does not have EDM's scalings, of which this is a variant.
    """
    if not isinstance(denoiser, EDMDenoiser):
        raise ValueError(
            f"A consistency model needs EDM's scalings, and a {type(denoiser).__name__} has "
            "others: give a teacher that was trained as an EDMDenoiser, or such a model as the "
            "option student."
        )
    settings = {**denoiser.settings(), "num_timesteps": num_timesteps}
    return ConsistencyDenoiser(denoiser.network, **settings)


def target_of(student: Denoiser, target: Target, decay: float) -> AveragedModel | None:
    """The network that judges the lower level; None if it is the student itself.

    Raises:
        ValueError: If the name is unknown or the decay is no share.
    """
    check_target(target)
    if not 0 <= decay < 1:
        raise ValueError(f"target_decay={decay} is no share: it lies in [0, 1).")
    if target == "stop_gradient":
        return None
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay))
    return average.requires_grad_(False)


def check_target(target: Target, option: str = "target") -> None:
    """Raise a ``ValueError`` unless it is one of the two."""
    if target not in ("stop_gradient", "ema"):
        raise ValueError(f"{option}={target!r} is unknown; choose stop_gradient or ema.")


def random_state(device: torch.device) -> Tensor:
    """The state of a device's own random generator, from which dropout is drawn."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def same_randomness(state: Tensor, device: torch.device) -> Iterator[None]:
    """Draw what was drawn from a state on (the same units are dropped); nothing else changes."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield
