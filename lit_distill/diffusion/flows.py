"""The straight path of flows, ``x_t = (1 - t) x0 + t noise``, and how straight a model's own are.

In the coordinate of denoisers it is ``x_sigma = x_t sigma / t`` with ``t = sigma / (1 + sigma)``.
"""

from itertools import pairwise

import torch
from torch import Tensor

from lit_distill.diffusion.contract import Condition, Denoiser, like
from lit_distill.diffusion.denoisers import FlowDenoiser
from lit_distill.diffusion.noise_levels import check_steps


def on_path(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The state ``(1 - t) x0 + t noise`` at the times ``t`` (B,) in [0, 1]."""
    return torch.lerp(x0, noise, like(t, x0))


def velocity(denoiser: Denoiser, x: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
    """The velocity of any model's ODE on the straight path: its estimate of ``noise - x0``.

    Args:
        denoiser: A flow, which is asked as it is, or any other model.
        x: ``(B, *shape)``, a state of the straight path.
        t: ``(B,)``, its time in [0, 1]. A model that knows no pure noise is asked at the nearest
            level that it knows, with the state scaled to that level's noise.
        condition: Passed to the model.

    Returns:
        ``(B, *shape)``.
    """
    if isinstance(denoiser, FlowDenoiser):
        return denoiser.velocity(x, t, condition)
    t = t.clamp_min(denoiser.sigma_min / (1 + denoiser.sigma_min))
    sigma = (t / (1 - t)).clamp_max(denoiser.sigma_max)
    x0 = denoiser(like(sigma / t, x) * x, sigma, condition)
    return (x - x0) / like(t, x)


@torch.no_grad()
def straightness(
    denoiser: Denoiser, noise: Tensor, condition: Condition = None, steps: int = 20
) -> Tensor:
    """How far a model's own trajectories are from straight lines (Liu et al. 2023).

    ``mean over t of |(noise - x0) - u(x_t, t)|^2`` along the trajectory from ``noise`` to its end
    ``x0`` in Euler's steps. Where it is 0, one step is as good as many.

    Args:
        denoiser: The model.
        noise: ``(B, *shape)``, unit noise.
        condition: Passed to the model.
        steps: Euler's steps.

    Returns:
        ``(B,)``, averaged over the numbers of a sample.
    """
    check_steps(steps)
    x, velocities = noise, []
    for t, to in pairwise(torch.linspace(1, 0, steps + 1, device=noise.device)):
        velocities.append(velocity(denoiser, x, t.expand(len(x)), condition))
        x = x - (t - to) * velocities[-1]
    return (noise - x - torch.stack(velocities)).flatten(2).square().mean((0, 2))
