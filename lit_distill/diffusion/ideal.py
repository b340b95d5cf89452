"""Denoisers in closed form: the ideal diffusion model of a data set, and Gaussian mixtures."""

import math
from typing import Any

import torch
from torch import Tensor

from lit_distill.diffusion.contract import Condition, Denoiser, like


class EmpiricalDenoiser(Denoiser):
    """The ideal diffusion model of a finite data set.

    ``D(x, sigma) = sum_j softmax_j(-|x - x_j|^2 / (2 sigma^2)) x_j``: the posterior mean when the
    data distribution is the data set itself (Karras et al. 2022, Eq. 57). It memorises: its
    trajectories end on data points.

    Args:
        data: ``(N, *shape)``.
        sigma_min: Smallest level of its default grid.
        sigma_max: Largest level.
        chunk: Number of queries whose ``N`` distances are held at once.
    """

    data: Tensor

    def __init__(
        self, data: Tensor, sigma_min: float = 0.002, sigma_max: float = 80.0, chunk: int = 1024
    ) -> None:
        super().__init__()
        self.register_buffer("data", data)
        self.sigma_min, self.sigma_max, self.chunk = sigma_min, sigma_max, chunk
        self.image_shape = tuple(data.shape[1:])

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        """Denoise, see :meth:`Denoiser.forward`; a condition is ignored."""
        points = self.data.flatten(1).to(x.dtype)
        # Distances are taken around the data's mean, where less is lost to rounding (6-100 times
        # on images), and in full precision: bfloat16 would leave nothing of them.
        centre = points.mean(0)
        around = points - centre
        half_square = around.square().sum(1) / 2
        parts = zip(x.flatten(1).split(self.chunk), sigma.split(self.chunk), strict=True)
        means = []
        with torch.autocast(x.device.type, enabled=False):
            for queries, level in parts:
                # |x|^2 is the same for every point, so the softmax does not see it.
                products = (queries - centre) @ around.T
                logits = (products - half_square) / like(level, queries) ** 2
                means.append(logits.softmax(1) @ points)
        return torch.cat(means).view_as(x)

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers."""
        return {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}


class GaussianMixtureDenoiser(Denoiser):
    """The exact denoiser of ``sum_k w_k N(mu_k, v_k I)``.

    Component ``k`` has the posterior mean ``(v_k x + sigma^2 mu_k) / (v_k + sigma^2)``; the
    responsibilities follow from ``x ~ N(mu_k, v_k + sigma^2)``.

    Args:
        means: ``(K, *shape)``.
        std: Standard deviation of the components: one number, or ``(K,)``.
        weights: ``(K,)``, any positive numbers; equal by default.
        sigma_min: Smallest level of its default grid.
        sigma_max: Largest level.
    """

    means: Tensor
    variance: Tensor
    log_weights: Tensor

    def __init__(
        self,
        means: Tensor,
        std: Tensor | float,
        weights: Tensor | None = None,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> None:
        super().__init__()
        shares = means.new_ones(len(means)) if weights is None else weights.to(means)
        self.register_buffer("means", means)
        variance = torch.as_tensor(std, dtype=means.dtype, device=means.device) ** 2
        self.register_buffer("variance", variance.expand(len(means)).clone())
        self.register_buffer("log_weights", (shares / shares.sum()).log())
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.image_shape = tuple(means.shape[1:])

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        """Denoise, see :meth:`Denoiser.forward`; a condition is ignored."""
        flat, means = x.flatten(1), self.means.flatten(1).to(x.dtype)
        noise = like(sigma, flat) ** 2  # (B, 1)
        total = self.variance.to(x.dtype) + noise  # (B, K)
        responsibility = self._log_joint(flat, total).softmax(1)
        # sum_k r_k (v_k x + s^2 mu_k) / (v_k + s^2), without a (B, K, D) tensor
        ratio = responsibility / total
        share = (ratio * self.variance.to(x.dtype)).sum(1, keepdim=True)
        with torch.autocast(x.device.type, enabled=False):
            return (share * flat + noise * (ratio @ means)).view_as(x)

    def log_density(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Log density ``(B,)`` of the mixture smoothed by noise of level ``sigma`` ``(B,)``."""
        flat = x.flatten(1)
        total = self.variance.to(x.dtype) + like(sigma, flat) ** 2
        constant = flat.shape[1] / 2 * math.log(2 * math.pi)
        return self._log_joint(flat, total).logsumexp(1) - constant

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``(count, *shape)`` samples of the mixture."""
        device = self.means.device
        index = torch.multinomial(
            self.log_weights.exp(), count, replacement=True, generator=generator
        )
        centres = self.means[index]
        noise = torch.randn(centres.shape, generator=generator, dtype=centres.dtype, device=device)
        return centres + like(self.variance[index].sqrt(), centres) * noise

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers."""
        return {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}

    def _log_joint(self, flat: Tensor, total: Tensor) -> Tensor:
        """``ln w_k + ln N(x | mu_k, total_k)`` up to a constant: ``(B, K)``."""
        # Differences first: at small noise the expanded square loses all digits.
        distance = (flat[:, None] - self.means.flatten(1).to(flat.dtype)).square().sum(2)
        weights = self.log_weights.to(flat.dtype)
        return weights - distance / (2 * total) - flat.shape[1] / 2 * total.log()
