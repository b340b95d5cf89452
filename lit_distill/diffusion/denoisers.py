"""The parameterisations: what a network predicts, and how it wants its input and its time."""

from typing import Any

import torch
from torch import Tensor, nn

from lit_distill.diffusion.contract import Condition, NetworkDenoiser, like, told
from lit_distill.diffusion.noise_levels import (
    check_steps,
    linear_betas,
    placed,
    sigma_to_timestep,
    sigmas_from_alphas_cumprod,
    timestep_to_sigma,
    trailing_timesteps,
    wide,
)

_PURE_NOISE = 1e6  # the level that stands for t = 1 of a flow, which no finite level is


class EDMDenoiser(NetworkDenoiser):
    """Preconditioning of Karras et al. 2022 (EDM), Table 1: ``D = c_skip x + c_out F``.

    Args:
        network: Predicts ``F`` from ``c_in * x`` and the time ``time_scale * ln(sigma) / 4``.
        sigma_min: Smallest level of the sampling grid.
        sigma_max: Largest level.
        sigma_data: Standard deviation of the data.
        time_scale: 1000 for networks made here (diffusers' consistency scheduler asks a network
            at ``250 ln(sigma)``); 1 for networks of ``EDMEulerScheduler`` folders.
    """

    def __init__(
        self,
        network: nn.Module,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        time_scale: float = 1000.0,
    ) -> None:
        super().__init__(network)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.sigma_data, self.time_scale = sigma_data, time_scale

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``c_skip``, ``c_out`` and ``c_in`` at ``sigma``."""
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        return c_skip, sigma * self.sigma_data / variance.sqrt(), 1 / variance.sqrt()

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        """Denoise, see :meth:`Denoiser.forward`."""
        c_skip, c_out, c_in = (like(c, x) for c in self.scalings(sigma))
        return c_skip * x + c_out * self.predict(c_in * x, sigma, condition)

    def time(self, sigma: Tensor) -> Tensor:
        """``time_scale ln(sigma) / 4``."""
        return self.time_scale / 4 * sigma.log()

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """``1 / c_out^2`` (Karras et al. 2022, Table 1)."""
        sigma = wide(sigma)
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers."""
        names = ("sigma_min", "sigma_max", "sigma_data", "time_scale")
        return {name: getattr(self, name) for name in names}


class ConsistencyDenoiser(EDMDenoiser):
    """EDM's network with the boundary condition ``D(x, sigma_min) = x``.

    ``c_skip = sd^2 / ((sigma - sigma_min)^2 + sd^2)`` and
    ``c_out = (sigma - sigma_min) sd / sqrt(sigma^2 + sd^2)`` (Song et al. 2023, Appendix C). The
    loss weight is EDM's: that of these scalings is infinite at ``sigma_min``.

    Args:
        network: As for :class:`EDMDenoiser`.
        sigma_min: The level of the boundary condition.
        sigma_max: Largest level.
        sigma_data: Standard deviation of the data.
        time_scale: As for :class:`EDMDenoiser`.
        num_timesteps: Levels of the Karras grid that ``sigmas`` picks from, as diffusers'
            ``CMStochasticIterativeScheduler`` does.
    """

    def __init__(
        self,
        network: nn.Module,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        time_scale: float = 1000.0,
        num_timesteps: int = 40,
    ) -> None:
        super().__init__(network, sigma_min, sigma_max, sigma_data, time_scale)
        self.num_timesteps, self.floor = num_timesteps, sigma_min

    def sigmas(self, steps: int) -> Tensor:
        """Every ``num_timesteps // steps``-th level of the Karras grid, from the top; then 0.

        Raises:
            ValueError: If there are more steps than levels, or fewer than one.
        """
        check_steps(steps)
        if steps > self.num_timesteps:
            raise ValueError(
                f"steps={steps} is more than the {self.num_timesteps} levels of this model's grid."
            )
        index = torch.arange(steps, dtype=torch.float64) * (self.num_timesteps // steps)
        levels = self.schedule(1 - index / max(self.num_timesteps - 1, 1))
        return torch.cat([levels, levels.new_zeros(1)])

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers."""
        return {**super().settings(), "num_timesteps": self.num_timesteps}

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``c_skip``, ``c_out`` and ``c_in`` at ``sigma``."""
        above, variance = sigma - self.sigma_min, sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / (above**2 + self.sigma_data**2)
        return c_skip, above * self.sigma_data / variance.sqrt(), 1 / variance.sqrt()


class _TableDenoiser(NetworkDenoiser):
    """A network trained on the discrete times of a DDPM variance schedule.

    Args:
        network: Asked at times in [0, T - 1] with the variance-preserving input
            ``x / sqrt(1 + sigma^2)``.
        betas: ``(T,)`` variance schedule; DDPM's linear one by default.
        discrete: Round times to integers, for networks that know no others.
        generator_sigma: Start lower than the table's end (a one-step student may).
        image_range: Black and white of the images that the network was trained on, for example
            (0, 1). What goes in and comes out of the denoiser is in [-1, 1] in any case: a pixel
            ``x`` is ``pixel_scale x + pixel_shift`` to the network, so that a level of its table
            is ``pixel_scale sigma``, and unit noise is a state around a grey that is not 0.

    Raises:
        ValueError: If black is not below white.
    """

    table: Tensor

    def __init__(
        self,
        network: nn.Module,
        betas: Tensor | list[float] | None = None,
        discrete: bool = False,
        generator_sigma: float | None = None,
        image_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        super().__init__(network)
        black, white = image_range
        if not black < white:
            raise ValueError(f"image_range={list(image_range)} must be black, then white.")
        self.image_range = (float(black), float(white))
        self.pixel_scale, self.pixel_shift = (white - black) / 2, (white + black) / 2
        # The dtype is given, as a list from a file would become float32 else.
        chosen = linear_betas() if betas is None else betas
        self.betas = torch.as_tensor(chosen, dtype=torch.float64)
        # Kept out of the module's buffers: ``.half()`` or ``.to(bfloat16)`` must not round it.
        self.table = sigmas_from_alphas_cumprod((1 - self.betas).cumprod(0)) / self.pixel_scale
        self._near = self.table
        self.discrete, self.generator_sigma = discrete, generator_sigma
        self.last = len(self.table) - 1  # the time at which sampling starts
        self.sigma_min, self.sigma_max = float(self.table[0]), float(self.table[-1])
        if generator_sigma is not None:
            self.start_from(generator_sigma)

    def start_from(self, sigma: float) -> None:
        """Let sampling start at the table's level nearest to ``sigma``."""
        super().start_from(sigma)
        self.generator_sigma = sigma
        self.last = int(sigma_to_timestep(torch.tensor(sigma), self.table).round())
        self.sigma_max = float(self.table[self.last])

    def start(self, noise: Tensor) -> Tensor:
        """Unit noise is the variance-preserving state: ``sqrt(1 + sigma_max^2) * noise`` here."""
        return self.to_signed((1 + (self.pixel_scale * self.sigma_max) ** 2) ** 0.5 * noise)

    def to_own(self, x: Tensor) -> Tensor:
        """Images in [-1, 1], noisy or not, in the network's own range."""
        return x if self.image_range == (-1, 1) else self.pixel_scale * x + self.pixel_shift

    def to_signed(self, own: Tensor) -> Tensor:
        """The inverse of :meth:`to_own`."""
        return own if self.image_range == (-1, 1) else (own - self.pixel_shift) / self.pixel_scale

    def signal(self, sigma: Tensor) -> Tensor:
        """Factor from the network's variance-exploding state to its input, at our ``sigma``."""
        return (1 + (self.pixel_scale * wide(sigma)) ** 2).rsqrt()

    def sigmas(self, steps: int) -> Tensor:
        """Levels at the trailing times of the table, then 0."""
        times = trailing_timesteps(steps, self.last + 1)
        return torch.cat([self.table[times], self.table.new_zeros(1)])

    def schedule(self, u: Tensor) -> Tensor:
        """Uniform in the table's time."""
        times = wide(u) * self.last
        return timestep_to_sigma(
            times.round() if self.discrete else times, self._table_on(u.device)
        )

    def time(self, sigma: Tensor) -> Tensor:
        """The network's time at ``sigma``."""
        time = sigma_to_timestep(sigma, self._table_on(sigma.device))
        return time.round() if self.discrete else time

    def _table_on(self, device: torch.device) -> Tensor:
        """The table on a device, kept there: a GPU would wait for a copy at each evaluation."""
        if self._near.device != device:
            self._near = placed(self.table, device)
        return self._near

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers."""
        found = {
            "betas": self.betas.tolist(),
            "discrete": self.discrete,
            "generator_sigma": self.generator_sigma,
        }
        # Left out where it is the usual one, so that fingerprints of earlier folders stay.
        usual = self.image_range == (-1, 1)
        return found if usual else {**found, "image_range": list(self.image_range)}


class EpsilonDenoiser(_TableDenoiser):
    """A DDPM network that predicts the noise: ``D = x - sigma * eps`` (Ho et al. 2020)."""

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        """Denoise, see :meth:`Denoiser.forward`."""
        scaled = self.to_own(x) * like(self.signal(sigma), x)
        return x - like(sigma, x) * self.predict(scaled, sigma, condition)


class VelocityDenoiser(_TableDenoiser):
    """A network that predicts ``v = alpha eps - s x0`` (Salimans & Ho 2022, Appendix D)."""

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        """Denoise, see :meth:`Denoiser.forward`."""
        alpha = like(self.signal(sigma), x)
        scaled = alpha * self.to_own(x)
        v = self.predict(scaled, sigma, condition)
        return self.to_signed(alpha * (scaled - self.pixel_scale * like(sigma, x) * v))

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """``SNR + 1``, in the network's own range."""
        return self.pixel_scale**2 + 1 / wide(sigma) ** 2


class LatentConsistencyDenoiser(_TableDenoiser):
    """The scalings of latent consistency models (Luo et al. 2023) around a table's network.

    ``D = c_skip x / sqrt(1 + sigma^2) + c_out x0``, where ``x0`` is the network's own estimate,
    ``c_skip = sd^2 / (s^2 + sd^2)``, ``c_out = s / sqrt(s^2 + sd^2)``, ``s = time_scaling t`` and
    ``sd = 0.5``, so that at the time ``t = 0`` it is the variance-preserving state itself. The
    numbers are those of diffusers' ``LCMScheduler``.

    Args:
        network: As for :class:`EpsilonDenoiser` or :class:`VelocityDenoiser`.
        betas: ``(T,)`` variance schedule.
        prediction: What the network predicts: ``epsilon`` or ``v_prediction``.
        grid_steps: Times of the grid that it was trained on, and that ``sigmas`` picks from.
        time_scaling: Factor of the time in the scalings.
        guidance: The scale that a network which embeds it is told where none is given; 1 = none.
        discrete: As for :class:`EpsilonDenoiser`.
        generator_sigma: As for :class:`EpsilonDenoiser`.

    Raises:
        ValueError: If the prediction is unknown or the grid has more times than the table.
    """

    def __init__(
        self,
        network: nn.Module,
        betas: Tensor | list[float] | None = None,
        prediction: str = "epsilon",
        grid_steps: int = 50,
        time_scaling: float = 10.0,
        guidance: float = 1.0,
        discrete: bool = False,
        generator_sigma: float | None = None,
    ) -> None:
        super().__init__(network, betas, discrete, generator_sigma)
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction={prediction!r}: choose epsilon or v_prediction.")
        if not 1 <= grid_steps <= len(self.table):
            raise ValueError(
                f"grid_steps={grid_steps}: the grid has 1 to {len(self.table)} times of the table."
            )
        self.prediction, self.grid_steps = prediction, grid_steps
        self.time_scaling, self.guidance = time_scaling, guidance

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        """Denoise, see :meth:`Denoiser.forward`."""
        is_told = isinstance(condition, dict) and "guidance" in condition
        if not is_told:
            condition = told(self, condition, guidance=torch.full_like(sigma, self.guidance))
        alpha = like((1 + wide(sigma) ** 2).rsqrt(), x)
        out = self.predict(alpha * x, sigma, condition)
        noise = out if self.prediction == "epsilon" else alpha * (out + like(sigma, x) * alpha * x)
        c_skip, c_out = (like(c, x) for c in self.scalings(sigma))
        return c_skip * alpha * x + c_out * (x - like(sigma, x) * noise)

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """``c_skip`` and ``c_out`` at ``sigma``."""
        s = self.time_scaling * wide(self.time(sigma))
        return 0.25 / (s**2 + 0.25), s / (s**2 + 0.25).sqrt()

    def times(self) -> Tensor:
        """The grid's times, ascending, ``(grid_steps,)`` int64: ``k n - 1`` for n = 1, 2, ..."""
        return torch.arange(1, self.grid_steps + 1) * (len(self.table) // self.grid_steps) - 1

    def sigmas(self, steps: int) -> Tensor:
        """Levels at ``steps`` evenly spaced times of the grid, from its end; then 0.

        Raises:
            ValueError: If there are more steps than times, or fewer than one.
        """
        check_steps(steps)
        if steps > self.grid_steps:
            raise ValueError(
                f"steps={steps} is more than the {self.grid_steps} times of this model's grid."
            )
        places = torch.arange(steps) * self.grid_steps // steps
        return torch.cat([self.table[self.times().flip(0)[places]], self.table.new_zeros(1)])

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers."""
        names = ("prediction", "grid_steps", "time_scaling", "guidance")
        return {**super().settings(), **{name: getattr(self, name) for name in names}}


class FlowDenoiser(NetworkDenoiser):
    """A rectified flow: the network predicts ``u = noise - x0`` on ``x_t = (1-t) x0 + t noise``.

    With ``t = sigma / (1 + sigma)`` the straight path is the variance-exploding one scaled by
    ``1 - t``, so that ``D = x_t - t u`` (Liu et al. 2023).

    Args:
        network: Asked at the time ``time_scale t``.
        sigma_max: Largest level; 1e6 stands for ``t = 1``, which no finite level is.
        sigma_min: Stands for ``t = 0`` in grids that may not end there.
        time_scale: 1000 is diffusers' convention.
    """

    def __init__(
        self,
        network: nn.Module,
        sigma_max: float = _PURE_NOISE,
        sigma_min: float = 1e-3,
        time_scale: float = 1000.0,
    ) -> None:
        super().__init__(network)
        self.sigma_min, self.sigma_max, self.time_scale = sigma_min, sigma_max, time_scale

    def time(self, sigma: Tensor) -> Tensor:
        """``time_scale t``, with ``t`` in [0, 1]."""
        return self.time_scale * self.path_time(sigma)

    def path_time(self, sigma: Tensor) -> Tensor:
        """``t`` in [0, 1] at ``sigma``; exactly 1 from 1e6 on."""
        t = wide(sigma) / (1 + wide(sigma))
        return torch.where(sigma >= _PURE_NOISE, torch.ones_like(t), t)

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        """Denoise, see :meth:`Denoiser.forward`."""
        scaled = x * like(self.signal_scale(sigma), x)
        t = self.path_time(sigma)
        return scaled - like(t, x) * self.predict(scaled, sigma, condition)

    def velocity(
        self, x: Tensor, t: Tensor, condition: Condition = None, end: Tensor | None = None
    ) -> Tensor:
        """The network's own output: the mean velocity of the flow.

        Args:
            x: ``(B, *shape)``, a state of the straight path ``x_t = (1-t) x0 + t noise``.
            t: ``(B,)``, its time in [0, 1].
            condition: Passed to the network.
            end: ``(B,)``, the time that a network with the input ``to_sigma`` shall average the
                velocity down to; ``t`` by default, which is the velocity at ``t``.

        Returns:
            ``(B, *shape)``, an estimate of ``noise - x0``.
        """
        to_time = self.time_scale * (t if end is None else end)
        return self.ask(x, self.time_scale * t, told(self, condition, to_sigma=to_time))

    def start(self, noise: Tensor) -> Tensor:
        """The network's first input is the noise itself, as in a stock pipeline at ``t = 1``."""
        return (1 + self.sigma_max) * noise

    def signal_scale(self, sigma: Tensor) -> Tensor:
        """``1 - t``: the straight path is the variance-exploding one times this."""
        return 1 / (1 + wide(sigma))

    def schedule(self, u: Tensor) -> Tensor:
        """Uniform in ``t``."""
        t = wide(u) * float(self.path_time(torch.tensor(self.sigma_max)))
        return (t / (1 - t)).clamp(self.sigma_min, self.sigma_max)  # t = 1 gives infinity

    def sigmas(self, steps: int) -> Tensor:
        """Levels of a grid that is uniform in ``t``."""
        check_steps(steps)
        grid = self.schedule(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
        grid[-1] = 0
        return grid

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """``1 / t^2``."""
        return 1 / self.path_time(sigma) ** 2

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers."""
        names = ("sigma_max", "sigma_min", "time_scale")
        return {name: getattr(self, name) for name in names}
