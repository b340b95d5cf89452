"""Exact networks for Gaussian data N(mean, variance), each written in its own coordinate.

None of them uses the denoiser that it is put into, so that the two can disagree.
"""

import torch
from torch import Tensor, nn

from lit_distill.diffusion import (
    Condition,
    Denoiser,
    EDMDenoiser,
    EpsilonDenoiser,
    FlowDenoiser,
    NetworkDenoiser,
    VelocityDenoiser,
    linear_betas,
)

MEAN, VARIANCE = 0.3, 0.16


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """Posterior mean of ``x0`` given ``x = x0 + sigma * noise``; ``x`` (B, D), ``sigma`` (B,)."""
    noise = sigma[:, None] ** 2
    return (VARIANCE * x + noise * MEAN) / (VARIANCE + noise)


def flow_map(x: Tensor, sigma: Tensor | float, to_sigma: Tensor | float) -> Tensor:
    """The exact probability-flow ODE from ``sigma`` to ``to_sigma``."""
    ratio = (VARIANCE + torch.as_tensor(to_sigma) ** 2) / (VARIANCE + torch.as_tensor(sigma) ** 2)
    return MEAN + (x - MEAN) * ratio.sqrt()


class Preconditioned(nn.Module):
    """EDM's F, asked at ``time_scale * ln(sigma) / 4`` with ``x / sqrt(sigma^2 + sd^2)``."""

    def __init__(self, sigma_data: float, time_scale: float) -> None:
        super().__init__()
        self.sigma_data, self.time_scale = sigma_data, time_scale

    def forward(self, x: Tensor, time: Tensor, condition: Condition = None) -> Tensor:
        sigma = (4 * time / self.time_scale).exp()[:, None]
        sd, total = self.sigma_data, sigma**2 + self.sigma_data**2
        noisy = x * total.sqrt()
        # F = (D - c_skip x) / c_out with D from the posterior, written without cancellation
        gain = (VARIANCE - sd**2) * sigma**2 / ((VARIANCE + sigma**2) * total)
        shift = sigma**2 * MEAN / (VARIANCE + sigma**2)
        return (gain * noisy + shift) * total.sqrt() / (sigma * sd)


class Diffused(nn.Module):
    """Epsilon or v of a DDPM, asked at its times with the variance-preserving state."""

    def __init__(
        self, betas: Tensor, velocity: bool, half: float = 1.0, middle: float = 0.0
    ) -> None:
        super().__init__()
        self.abar, self.velocity = (1 - betas).cumprod(0), velocity
        # Of the data as this network saw them, half x + middle.
        self.mean, self.variance = half * MEAN + middle, half**2 * VARIANCE

    def forward(self, x: Tensor, time: Tensor, condition: Condition = None) -> Tensor:
        abar = self.abar[time.round().long()].to(x.dtype)[:, None]
        alpha, std = abar.sqrt(), (1 - abar).sqrt()
        whitened = (x - alpha * self.mean) / (abar * self.variance + 1 - abar)
        noise, x0 = std * whitened, self.mean + alpha * self.variance * whitened
        return alpha * noise - std * x0 if self.velocity else noise


class Straight(nn.Module):
    """``E[noise - x0 | x_t]`` on the straight path, asked at ``1000 t`` with ``x_t``."""

    def forward(self, x: Tensor, time: Tensor, condition: Condition = None) -> Tensor:
        t = (time / 1000)[:, None]
        whitened = (x - (1 - t) * MEAN) / ((1 - t) ** 2 * VARIANCE + t**2)
        return t * whitened - (MEAN + (1 - t) * VARIANCE * whitened)


def exact_denoisers() -> dict[str, NetworkDenoiser]:
    """All classes around their exact network."""
    betas, short = linear_betas(), linear_betas(400)
    return {
        "edm": EDMDenoiser(Preconditioned(0.5, 1000)),
        "edm_foreign": EDMDenoiser(Preconditioned(0.7, 1), sigma_data=0.7, time_scale=1),
        "epsilon": EpsilonDenoiser(Diffused(betas, velocity=False)),
        "epsilon_short": EpsilonDenoiser(Diffused(short, velocity=False), betas=short),
        "epsilon_discrete": EpsilonDenoiser(Diffused(betas, velocity=False), discrete=True),
        "epsilon_unit": EpsilonDenoiser(
            Diffused(betas, False, half=0.5, middle=0.5), image_range=(0, 1)
        ),
        "velocity": VelocityDenoiser(Diffused(betas, velocity=True), betas=betas.tolist()),
        "velocity_range": VelocityDenoiser(
            Diffused(betas, True, half=2.0, middle=-1.0), image_range=(-3, 1)
        ),
        "flow": FlowDenoiser(Straight()),
    }


class Exact(Denoiser):
    """The posterior mean itself, which counts as one network evaluation."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        super().__init__()
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        return denoise(x, sigma)


class ExactConsistency(Exact):
    """The perfect consistency model: the exact ODE map from ``sigma`` to ``sigma_min``."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        super().__init__(sigma_min, sigma_max)
        self.floor = sigma_min

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        return flow_map(x, sigma[:, None], self.sigma_min)
