"""Losses that are defined on the straight path of flows."""

import torch
from torch import Tensor

from lit_distill.diffusion import Condition, Denoiser, on_path, velocity


def flow_matching_loss(
    denoiser: Denoiser, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition = None
) -> Tensor:
    """Squared error of the velocity, ``|u(x_t, t) - (noise - x0)|^2`` (Liu et al. 2023, Eq. 1).

    Args:
        denoiser: The flow in training.
        x0: ``(B, *shape)``, the path's ends: data, or what a model made of ``noise``.
        noise: ``(B, *shape)``, unit noise: fresh, or that of the pairs.
        t: ``(B,)``, times in [0, 1].
        condition: Passed to the flow.

    Returns:
        ``(B,)``, averaged over the numbers of a sample.
    """
    u = velocity(denoiser, on_path(x0, noise, t), t, condition)
    return (u - (noise - x0)).flatten(1).square().mean(1)


def adaptive_loss(error: Tensor, power: float = 0.75, floor: float = 1e-3) -> Tensor:
    """``e / sg(e + floor) ** power``, which lets samples of a large error count less.

    With ``power = 0`` it is the error itself, with 0.5 about its root (Geng et al. 2025).

    Args:
        error: ``(B,)``, squared error of each sample.
        power: Exponent of the weight.
        floor: Keeps the weight finite.

    Returns:
        ``(B,)``.
    """
    return error / (error.detach() + floor) ** power


def mean_velocity_target(velocity: Tensor, slope: Tensor, t: Tensor, end: Tensor) -> Tensor:
    """The target of a mean velocity: ``v - (t - r) du/dt`` (Geng et al. 2025).

    Args:
        velocity: ``(B, *shape)``, the velocity ``v`` at ``t``.
        slope: ``(B, *shape)``, the total derivative of the mean velocity along the path.
        t: ``(B,)``, times.
        end: ``(B,)``, times ``r`` that the velocity is averaged down to.

    Returns:
        ``(B, *shape)``, without a graph.
    """
    length = (t - end).reshape(-1, *[1] * (velocity.ndim - 1)).to(velocity.dtype)
    return torch.sub(velocity, length * slope).detach()
