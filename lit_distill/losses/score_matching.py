"""Losses on denoisings: denoising score matching and distribution matching."""

from typing import NamedTuple

import torch
from torch import Tensor

from lit_distill.diffusion import Condition, Denoiser, like


def denoising_loss(
    denoiser: Denoiser,
    x0: Tensor,
    sigma: Tensor,
    noise: Tensor,
    condition: Condition = None,
) -> Tensor:
    """Denoising score matching with the weight that makes it the network's own squared error.

    For an EDM network this is Karras et al. 2022, Eq. 8; for one that predicts the noise, the
    velocity or the flow it is the plain mean squared error of that prediction.

    Args:
        denoiser: The model in training.
        x0: ``(B, *shape)``, clean samples.
        sigma: ``(B,)``, noise levels.
        noise: ``(B, *shape)``, unit noise.
        condition: Passed to the denoiser.

    Returns:
        ``(B,)``, the loss of each sample, averaged over its numbers.
    """
    denoised = denoiser(x0 + like(sigma, x0) * noise, sigma, condition)
    return denoising_error(denoiser, denoised, x0, sigma)


def denoising_error(denoiser: Denoiser, denoised: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """The loss ``(B,)`` of denoised samples, see :func:`denoising_loss`.

    Args:
        denoiser: The model that denoised them, whose weight is taken.
        denoised: ``(B, *shape)``, its estimates of ``x0``.
        x0: ``(B, *shape)``, clean samples.
        sigma: ``(B,)``, noise levels.
    """
    error = (denoised - x0).flatten(1).square().mean(1)
    return denoiser.loss_weight(sigma).to(error.dtype) * error


class DistributionMatching(NamedTuple):
    """What :func:`distribution_matching` computed.

    Attributes:
        gradient: ``(B, *shape)``, the direction in which each sample lowers the divergence, with
            the sign of a gradient (samples move against it).
        weight: ``(B,)``, the factor that the difference of denoisings was multiplied by.
        noisy: ``(B, *shape)``, the noised samples both scores looked at.
        real: ``(B, *shape)``, the teacher's denoising of them.
        fake: ``(B, *shape)``, the fake score's.
    """

    gradient: Tensor
    weight: Tensor
    noisy: Tensor
    real: Tensor
    fake: Tensor


@torch.no_grad()
def distribution_matching(
    x: Tensor,
    sigma: Tensor,
    noise: Tensor,
    real_score: Denoiser,
    fake_score: Denoiser,
    condition: Condition = None,
    *,
    normalise: bool = True,
    floor: float = 1e-3,
) -> DistributionMatching:
    """Gradient of the divergence between generated and real samples (Yin et al. 2024, Eqs. 7-8).

    ``s_fake - s_real = (mu_fake - mu_real) / sigma^2`` is the gradient of the log ratio of the two
    noised densities. Without the normaliser the result is that difference of denoisings: the
    gradient of the KL divergence at this level times ``sigma^2``.

    Args:
        x: ``(B, *shape)``, generated samples.
        sigma: ``(B,)``, levels to compare at.
        noise: ``(B, *shape)``, unit noise.
        real_score: The teacher, guided or not.
        fake_score: A denoiser of the generator's own samples.
        condition: Passed to both.
        normalise: Divide by ``mean |x - mu_real|`` of each sample, so that all levels count alike.
        floor: Smallest value of that divisor.

    Returns:
        The gradient and what it was made of; nothing carries a graph.
    """
    noisy = x + like(sigma, x) * noise
    real = real_score(noisy, sigma, condition)
    fake = fake_score(noisy, sigma, condition)
    weight = torch.ones_like(sigma, dtype=x.dtype)
    if normalise:
        weight = 1 / (x - real).flatten(1).abs().mean(1).clamp_min(floor)
    return DistributionMatching(like(weight, x) * (fake - real), weight, noisy, real, fake)


def surrogate_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """A loss ``(B,)`` whose gradient in ``x`` is ``gradient`` over the numbers of a sample.

    ``0.5 |x - sg(x - gradient)|^2`` (Yin et al. 2024, Algorithm 2); its value is the squared
    gradient's mean, which tells how far the two densities are apart.
    """
    target = (x - gradient).detach()
    return 0.5 * (x - target).flatten(1).square().mean(1)


def score_identity_loss(
    x: Tensor, real: Tensor, fake: Tensor, alpha: float = 1.2, *, normalise: bool = True
) -> Tensor:
    """Loss ``(B,)`` of score identity distillation (Zhou et al. 2024, SiD).

    ``(f_real - f_fake) . [(f_real - x) - alpha (f_real - f_fake)]``, over the numbers of a sample.
    With ``alpha = 0.5``, not normalised, and with an exact fake score its gradient is half that
    of the Fisher divergence (times ``sigma^4``); at 1.2 it is no divergence's gradient.

    Args:
        x: ``(B, *shape)``, the generator's samples.
        real: ``(B, *shape)``, the teacher's denoising of them once noised, with its graph.
        fake: ``(B, *shape)``, the fake score's, with its graph.
        alpha: Weight of the squared difference.
        normalise: Divide by ``mean |x - f_real|``, without a gradient.

    Returns:
        The mean over the numbers of each sample.
    """
    difference = real - fake
    loss = (difference * ((real - x) - alpha * difference)).flatten(1).mean(1)
    if not normalise:
        return loss
    return loss / (x - real).detach().flatten(1).abs().mean(1).clamp_min(1e-3)
