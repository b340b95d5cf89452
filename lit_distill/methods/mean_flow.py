"""Mean flows (Geng et al. 2025)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_distill.diffusion import (
    Condition,
    Denoiser,
    FewSteps,
    FlowDenoiser,
    GuidedDenoiser,
    LogNormalSigma,
    SigmaDistribution,
    like,
    on_path,
    velocity,
)
from lit_distill.losses import adaptive_loss, mean_velocity_target
from lit_distill.methods.base import (
    Batch,
    DistillationModule,
    as_denoiser,
    condition_of,
    copy_of,
    network_of,
)
from lit_distill.methods.rectified_flow import as_flow, drawn_times
from lit_distill.models import add_inputs

Derivative = Literal["jvp", "finite_difference"]
MeanVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(x, t, end) -> u``: the mean velocity from ``t`` down to ``end``."""


class MeanFlow(DistillationModule):
    """Flow whose network knows the *mean* velocity between two times, so that one step is enough.

    ``u(x_t, t, r)`` is trained towards ``v - (t - r) du/dt`` without a gradient, where ``v`` is
    the velocity at ``t`` and ``du/dt`` the derivative of ``u`` along the path (the MeanFlow
    identity); a step is ``x_r = x_t - (t - r) u(x_t, t, r)``. With a teacher ``v`` is its velocity,
    without one that of the data's straight line, ``noise - x0``, so that no pretrained model is
    needed.

    The second time is the network's further input ``to_sigma``, as in
    :class:`~lit_distill.methods.ConsistencyTrajectory`.

    Data: images. Under DDP use ``strategy: ddp``: the derivative is computed without a graph, apart
    from the pass that the gradient goes through, whose hooks DDP needs. That pass is one more than
    in the public code.

    Reference recipe (CIFAR10, from data): Adam 6e-4, batch 1024, 800k iterations, EMA .99995,
    times logit-normal (-2, 2), 75% of them equal, power .75.

    Args:
        teacher: A model whose velocity is averaged, or a folder or hub id of it; None for data.
        student: The flow to start from; by default a flow with the teacher's network.
        guidance: Classifier-free guidance of the teacher's velocity; 1 = none.
        equal_share: Share of a batch with ``r = t``, which learns the velocity itself.
        sigma_distribution: Both times, as levels ``t / (1 - t)``; logit-normal (-0.4, 1) by
            default.
        derivative: ``jvp`` by forward-mode differentiation, or ``finite_difference`` (two more
            evaluations): for networks that have no forward mode, and for those whose derivative is
            mostly unrest in their time's embedding, as with a ``time_scale`` of 1000 after a short
            training; in float32, both.
        shift: Half of the difference's step, in time.
        power: Exponent of the adaptive weight; 0 = none.
        steps: Numbers of steps to sample with; the first is the default.
        base: Arguments of :class:`DistillationModule`.

    Raises:
        ValueError: If there is nothing to start from, or a setting is impossible.
    """

    def __init__(
        self,
        teacher: str | Denoiser | None = None,
        student: str | Denoiser | None = None,
        guidance: float = 1.0,
        equal_share: float = 0.5,
        sigma_distribution: SigmaDistribution | None = None,
        derivative: Derivative = "jvp",
        shift: float = 5e-3,
        power: float = 0.75,
        steps: Sequence[int] = (1, 2, 4),
        **base: Any,
    ) -> None:
        if derivative not in ("jvp", "finite_difference"):
            raise ValueError(
                f"derivative={derivative!r} is unknown; choose jvp or finite_difference."
            )
        if not 0 < shift <= 0.5:
            raise ValueError(f"shift={shift} must be above 0 and at most 0.5: times are in [0, 1].")
        if not 0 <= equal_share < 1:
            raise ValueError(f"equal_share={equal_share} is no share below 1 of a batch.")
        if not steps:
            raise ValueError("steps is an empty list: name at least one number of steps.")
        if teacher is None and guidance != 1:
            raise ValueError(f"guidance={guidance} needs a teacher that can be guided.")
        frozen = None if teacher is None else as_denoiser(teacher)
        start = frozen if student is None else as_denoiser(student)
        if start is None:
            raise ValueError("MeanFlow needs a teacher, or a student to start from, or both.")
        flow = as_flow(network_of(copy_of(start)))
        add_inputs(flow, ("to_sigma",))
        flow.few_steps = FewSteps(steps, [flow.sigmas(n).tolist() for n in steps])
        super().__init__(flow, frozen, steps=steps[0], **base)
        self.save_hyperparameters(logger=False)
        self.guided = None if frozen is None else GuidedDenoiser(frozen, guidance)
        self.equal_share, self.power = equal_share, power
        self.derivative, self.shift = derivative, shift
        self.sigma_distribution = sigma_distribution or LogNormalSigma(-0.4, 1.0)
        self.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean velocity's own identity on a batch of data."""
        x0, condition = batch["image"], condition_of(batch)
        t, end = self.drawn_ends(x0)
        noise = torch.randn_like(x0)
        x = on_path(x0, noise, t)
        with torch.no_grad():
            v = noise - x0 if self.guided is None else velocity(self.guided, x, t, condition)
            slope = self.slope(x, v, t, end, condition)
        u = self.mean_velocity(x, t, end, condition)
        error = (u - mean_velocity_target(v, slope, t, end)).flatten(1).square().mean(1)
        loss = adaptive_loss(error, self.power).mean()
        self.watch(loss)
        self.log("loss/mean_flow", loss, prog_bar=True)
        self.log("loss/error", error.mean())
        return loss

    def drawn_ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Times ``t`` and ``r <= t``, each ``(B,)``; equal in the first samples of the batch."""
        pair = torch.stack([drawn_times(self.sigma_distribution, x) for _ in range(2)])
        t, end = pair.amax(0), pair.amin(0)
        equal = self.equal_rows(len(x))  # the data come in random order
        return t, torch.cat([t[:equal], end[equal:]])

    def equal_rows(self, count: int) -> int:
        """Samples of a batch with equal times: all but one at most."""
        return min(round(self.equal_share * count), count - 1)

    def mean_velocity(self, x: Tensor, t: Tensor, end: Tensor, condition: Condition) -> Tensor:
        """The student's ``u`` from ``t`` down to ``end``."""
        assert isinstance(self.student, FlowDenoiser)
        return self.student.velocity(x, t, condition, end)

    @torch.no_grad()
    def slope(self, x: Tensor, v: Tensor, t: Tensor, end: Tensor, condition: Condition) -> Tensor:
        """``du/dt`` along the path, for those samples of which it counts; 0 elsewhere."""
        equal = self.equal_rows(len(x))
        rest = slice(equal, None)
        chosen = _rows(condition, rest)
        # Dropout would make it the difference of two networks.
        training = self.student.training
        self.student.eval()
        try:
            with contiguous_norms(self.student):
                found = total_derivative(
                    lambda x, t, end: self.mean_velocity(x, t, end, chosen),
                    x[rest],
                    v[rest],
                    t[rest],
                    end[rest],
                    self.derivative,
                    self.shift,
                )
        finally:
            self.student.train(training)
        return torch.cat([torch.zeros_like(x[:equal]), found])

    def frozen_modules(self) -> tuple[str, ...]:
        """The teacher, also with guidance."""
        return ("teacher", "guided")


def total_derivative(
    u: MeanVelocity,
    x: Tensor,
    v: Tensor,
    t: Tensor,
    end: Tensor,
    derivative: Derivative,
    shift: float = 5e-3,
) -> Tensor:
    """``du/dt`` along the path: the derivative in the direction ``(v, 1, 0)``.

    Args:
        u: The mean velocity.
        x: ``(B, *shape)``, states.
        v: ``(B, *shape)``, the velocity there.
        t: ``(B,)``, times.
        end: ``(B,)``, times that the velocity is averaged down to.
        derivative: How it is computed.
        shift: Half of a finite difference's step; less at the ends of [0, 1].

    Returns:
        ``(B, *shape)``.
    """
    # In float32: a difference of bfloat16 is noise, and autocast does not see through forward mode.
    with torch.autocast(x.device.type, enabled=False):
        if derivative == "jvp":
            # The fused attention kernels have no forward mode.
            with sdpa_kernel(SDPBackend.MATH):
                tangents = (v, torch.ones_like(t), torch.zeros_like(end))
                return torch.func.jvp(u, (x, t, end), tangents)[1]
        ahead, behind = (t + shift).clamp_max(1), (t - shift).clamp_min(0)
        after, before = like(ahead - t, x) * v, like(behind - t, x) * v
        difference = u(x + after, ahead, end) - u(x + before, behind, end)
        return difference / like(ahead - behind, x)


@contextmanager
def contiguous_norms(module: nn.Module) -> Iterator[None]:
    """Let group normalisation see no transposed states, which its forward mode cannot view."""
    norms = [part for part in module.modules() if isinstance(part, nn.GroupNorm)]
    handles = [
        norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
        for norm in norms
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(condition: Condition, rows: slice) -> Condition:
    """Some samples' part of a condition."""
    if condition is None:
        return None
    if isinstance(condition, dict):
        return {name: value[rows] for name, value in condition.items()}
    return condition[rows]
