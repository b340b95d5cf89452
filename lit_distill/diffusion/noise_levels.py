"""Noise levels: grids to sample on, DDPM tables both ways, and distributions to train on.

Everything is expressed in the variance-exploding coordinate ``x_sigma = x0 + sigma * noise``.
Times and levels are computed in float64, where precision costs nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor


def seeded_noise(shape: tuple[int, ...], seeds: Iterable[int]) -> Tensor:
    """Draw one unit-noise tensor for each seed.

    Row ``i`` depends on ``seeds[i]`` alone, so that an image is the same however a run is batched
    or spread over processes. It is what stock diffusers pipelines draw when they are given
    ``generator=[torch.Generator().manual_seed(s) for s in seeds]``.

    Args:
        shape: Shape of one sample, for example ``(C, H, W)``.
        seeds: One seed for each sample.

    Returns:
        ``(len(seeds), *shape)``, float32, on the CPU.
    """
    return drawn_noise(shape, seeded_generators(seeds))


def seeded_generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """One generator on the CPU for each seed."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def drawn_noise(shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    """Draw unit noise ``(len(generators), *shape)``, each row from its own generator."""
    rows = [torch.randn(shape, generator=generator) for generator in generators]
    return torch.stack(rows) if rows else torch.empty((0, *shape))


def wide(level: Tensor) -> Tensor:
    """Levels or times in float64, or in float32 on devices that have no more (Apple's GPUs)."""
    return level.to(_precision(level.device))


def placed(level: Tensor, device: torch.device) -> Tensor:
    """Levels on a device, in its highest precision."""
    return level.to(device, _precision(device))


def _precision(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def rho_levels(u: Tensor, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Map ``u`` in [0, 1] to a noise level, uniformly in ``sigma ** (1 / rho)``.

    Args:
        u: Any shape; 0 gives ``sigma_min``, 1 gives ``sigma_max``.
        sigma_min: Smallest level, > 0.
        sigma_max: Largest level.
        rho: Curvature; 7 in EDM (Karras et al. 2022, Eq. 5), 1 is linear.

    Returns:
        Levels of the shape of ``u``, float64.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + wide(u) * (high - low)) ** rho


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Grid of Karras et al. 2022 (EDM), Eq. 5: ``num_steps`` jumps that end at 0.

    Args:
        num_steps: Number of jumps, at least 1.
        sigma_min: The last level before 0, > 0. A grid of one jump goes straight from
            ``sigma_max`` to 0.
        sigma_max: The first level.
        rho: Curvature of the grid.

    Returns:
        ``(num_steps + 1,)`` descending levels, float64; the last is 0.

    Raises:
        ValueError: If the count or the range is impossible.
    """
    check_steps(num_steps)
    if not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"sigma_min={sigma_min} and sigma_max={sigma_max} are no range of noise levels: "
            "0 < sigma_min < sigma_max is needed."
        )
    u = torch.linspace(1, 0, num_steps, dtype=torch.float64)
    return torch.cat([rho_levels(u, sigma_min, sigma_max, rho), u.new_zeros(1)])


def rho_grid(
    num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0, end: float | None = None
) -> Tensor:
    """Grid of ``num_steps`` jumps whose nodes are uniform in ``sigma ** (1 / rho)`` to the end.

    Unlike :func:`karras_sigmas`, which adds a last jump from ``sigma_min`` to 0, so that all jumps
    of a short grid do their share.

    Args:
        num_steps: Number of jumps, at least 1.
        sigma_min: Where the spacing ends.
        sigma_max: The first level.
        rho: Curvature.
        end: A level to put in the place of the last, for example 0.

    Returns:
        ``(num_steps + 1,)`` descending levels, float64.

    Raises:
        ValueError: If the count or the range is impossible.
    """
    check_steps(num_steps)
    levels = karras_sigmas(num_steps + 1, sigma_min, sigma_max, rho)[:-1]
    if end is not None:
        levels[-1] = end
    return levels


def refined(sigmas: Tensor, parts: int, rho: float = 7.0) -> Tensor:
    """Cut each jump of a grid into ``parts``, uniformly in ``sigma ** (1 / rho)``.

    Args:
        sigmas: ``(S,)`` descending levels.
        parts: Jumps instead of one, at least 1.
        rho: Curvature, 7 as in :func:`karras_sigmas`.

    Returns:
        ``((S - 1) * parts + 1,)`` levels, float64; every ``parts``-th is one of ``sigmas``.

    Raises:
        ValueError: If ``parts`` is below 1.
    """
    if parts < 1:
        raise ValueError(f"A jump of a grid cannot be cut into {parts} parts: 1 is the least.")
    nodes = wide(sigmas)
    roots = nodes ** (1 / rho)
    share = torch.arange(parts, dtype=nodes.dtype, device=nodes.device) / parts
    levels = (roots[:-1, None] + share * (roots[1:] - roots[:-1])[:, None]) ** rho
    levels[:, 0] = nodes[:-1]  # exactly: methods compare levels
    return torch.cat([levels.flatten(), nodes[-1:]])


def check_steps(num_steps: int) -> None:
    """Raise a ``ValueError`` unless ``num_steps`` is at least 1."""
    if num_steps < 1:
        raise ValueError(f"steps={num_steps}: sampling needs at least one step.")


# --- DDPM tables -------------------------------------------------------------------------------


def linear_betas(num_timesteps: int = 1000, start: float = 1e-4, end: float = 2e-2) -> Tensor:
    """The linear variance schedule of DDPM (Ho et al. 2020), ``(num_timesteps,)`` in float64."""
    return torch.linspace(start, end, num_timesteps, dtype=torch.float64)


def sigmas_from_alphas_cumprod(alphas_cumprod: Tensor) -> Tensor:
    """``sigma_t = sqrt((1 - abar_t) / abar_t)`` for a table of cumulative alphas.

    Args:
        alphas_cumprod: ``(T,)`` descending in [0, 1]. Values below 1e-9 (zero terminal SNR) are
            clamped there, since no finite sigma stands for pure noise.

    Returns:
        ``(T,)`` ascending levels, float64.
    """
    abar = alphas_cumprod.double().clamp_min(1e-9)
    return ((1 - abar) / abar).sqrt()


def sigma_to_timestep(sigma: Tensor, table: Tensor) -> Tensor:
    """Time of a noise level in a DDPM table, interpolated linearly in ``ln sigma``.

    Args:
        sigma: Levels of any shape; those outside the table get its first or last time.
        table: ``(T,)`` ascending levels, see :func:`sigmas_from_alphas_cumprod`.

    Returns:
        Times in [0, T - 1], float64, of the shape of ``sigma``. A level of the table gives its
        index exactly.
    """
    logs = table.log()
    target = wide(sigma).clamp(table[0], table[-1]).log()  # tensors: a GPU need not wait
    high = torch.searchsorted(logs, target).clamp(1, len(table) - 1)
    low = high - 1
    time = low + (target - logs[low]) / (logs[high] - logs[low])
    nearest = time.round()
    # A float32 level of the table must ask the network for its own integer time.
    return torch.where((time - nearest).abs() < 1e-3, nearest, time)


def timestep_to_sigma(timestep: Tensor, table: Tensor) -> Tensor:
    """Inverse of :func:`sigma_to_timestep`: the level at a time in [0, T - 1], float64."""
    time = wide(timestep).clamp(0, len(table) - 1)
    low = time.floor().long().clamp_max(len(table) - 2)
    logs = table.log()
    return torch.lerp(logs[low], logs[low + 1], time - low).exp()


def trailing_timesteps(num_steps: int, num_timesteps: int) -> Tensor:
    """Integer times of ``timestep_spacing="trailing"`` (Lin et al. 2023): always start at T - 1.

    Args:
        num_steps: Number of jumps, at most ``num_timesteps``.
        num_timesteps: Length ``T`` of the table.

    Returns:
        ``(num_steps,)`` descending times, int64.

    Raises:
        ValueError: If there are more steps than times, or fewer than one.
    """
    check_steps(num_steps)
    if num_steps > num_timesteps:
        raise ValueError(
            f"steps={num_steps} is more than the {num_timesteps} times of the teacher's table."
        )
    times = torch.arange(num_steps, 0, -1, dtype=torch.float64) * (num_timesteps / num_steps)
    return times.round().long() - 1


# --- Distributions of training noise levels ----------------------------------------------------


class SigmaDistribution(ABC):
    """Draws training noise levels: ``distribution(u) -> sigma`` for ``u`` uniform in (0, 1)."""

    @abstractmethod
    def __call__(self, u: Tensor) -> Tensor:
        """Map uniform numbers to levels of the same shape, float64."""


class LogNormalSigma(SigmaDistribution):
    """``ln sigma ~ N(mean, std^2)``: EDM's training distribution (Karras et al. 2022, Table 1).

    Args:
        mean: Mean of ``ln sigma``.
        std: Its standard deviation.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        self.mean, self.std = mean, std

    def __call__(self, u: Tensor) -> Tensor:
        """Map uniform numbers to levels by the inverse distribution function."""
        normal = torch.special.ndtri(wide(u).clamp(1e-7, 1 - 1e-7))
        return (self.mean + self.std * normal).exp()


class LogUniformSigma(SigmaDistribution):
    """``ln sigma`` uniform between two levels.

    Args:
        sigma_min: Smallest level.
        sigma_max: Largest level.
    """

    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def __call__(self, u: Tensor) -> Tensor:
        """Map uniform numbers to levels."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** wide(u)


class RhoUniformSigma(SigmaDistribution):
    """Uniform in ``sigma ** (1 / rho)``: the density of a Karras grid's nodes.

    Args:
        sigma_min: Smallest level.
        sigma_max: Largest level.
        rho: Curvature of the grid.
    """

    def __init__(self, sigma_min: float, sigma_max: float, rho: float = 7.0) -> None:
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def __call__(self, u: Tensor) -> Tensor:
        """Map uniform numbers to levels."""
        return rho_levels(u, self.sigma_min, self.sigma_max, self.rho)
