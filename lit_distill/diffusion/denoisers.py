"""The contract that every model is seen through, and the classes that fulfil it.

A denoiser takes ``x = x0 + sigma * noise`` and returns its estimate of ``x0``. Whatever a network
predicts, and however it wants its input scaled and its time named, is settled here and nowhere
else; solvers, losses and methods see denoisers only.
"""

import hashlib
import json
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lit_distill.diffusion.noise_levels import (
    check_steps,
    karras_sigmas,
    linear_betas,
    rho_levels,
    sigma_to_timestep,
    sigmas_from_alphas_cumprod,
    timestep_to_sigma,
    trailing_timesteps,
)

Condition = Tensor | dict[str, Tensor] | None
"""Labels ``(B,)``, or named tensors (``label``, ``prompt_embeds``, ``to_sigma``, ...), or None."""


class Network(Protocol):
    """What a denoiser asks of its network: ``network(x, time, condition) -> prediction``."""

    def __call__(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Evaluate at ``x`` (B, *shape) and ``time`` (B,); the result has the shape of ``x``."""
        ...


def like(level: Tensor, x: Tensor) -> Tensor:
    """View per-sample numbers ``(B,)`` so that they broadcast against ``x`` ``(B, *shape)``."""
    return level.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def labels_of(condition: Condition) -> Tensor | None:
    """The class labels in a condition, or None if it has none."""
    return condition.get("label") if isinstance(condition, dict) else condition


class Denoiser(nn.Module):
    """Estimates ``x0`` from ``x = x0 + sigma * noise``.

    Attributes:
        sigma_min: Smallest noise level that the model knows.
        sigma_max: Largest; sampling starts there.
        image_shape: Shape of one sample, or None where any will do.
        num_classes: Number of classes of a conditional model, or None.
        null_label: The label that stands for "no label", or None.
        trained_steps: Step counts that a student was trained for; None for a teacher, whose
            count is free.
    """

    sigma_min: float
    sigma_max: float
    image_shape: tuple[int, ...] | None = None
    num_classes: int | None = None
    null_label: int | None = None
    trained_steps: tuple[int, ...] | None = None

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        """Denoise.

        Args:
            x: ``(B, *shape)``, noisy samples.
            sigma: ``(B,)``, their noise levels.
            condition: Labels ``(B,)`` or named tensors.

        Returns:
            ``(B, *shape)``, the estimate of ``x0``, in the dtype of ``x``.
        """
        raise NotImplementedError

    def start(self, noise: Tensor) -> Tensor:
        """First state of a sampling run, at ``sigma_max``, from unit noise ``(B, *shape)``."""
        return self.sigma_max * noise

    def sigmas(self, steps: int) -> Tensor:
        """The model's own grid: ``(steps + 1,)`` descending levels that end at 0, float64."""
        return karras_sigmas(steps, self.sigma_min, self.sigma_max)

    def schedule(self, u: Tensor) -> Tensor:
        """Map ``u`` in [0, 1] to noise levels, uniformly in the model's own notion of time."""
        return rho_levels(u, self.sigma_min, self.sigma_max)

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """Weight of ``|D - x0|^2`` at ``sigma`` that makes it the network's own squared error."""
        return 1 / sigma.double() ** 2

    def null(self, condition: Condition) -> Condition:
        """The unconditional counterpart of a condition.

        Raises:
            ValueError: If the model was not trained with a null class.
        """
        labels = labels_of(condition)
        if labels is None:
            return condition
        if self.null_label is None:
            raise ValueError(
                "This model has no null class, so it cannot be guided: use guidance 1, or train "
                "the teacher with label_dropout > 0."
            )
        null = torch.full_like(labels, self.null_label)
        return {**condition, "label": null} if isinstance(condition, dict) else null

    def start_from(self, sigma: float) -> None:
        """Let sampling start at a lower noise level than the teacher's largest.

        Raises:
            ValueError: If the level is outside the range that the network knows.
        """
        if not self.sigma_min < sigma <= self.sigma_max:
            raise ValueError(
                f"generator_sigma={sigma} is outside the teacher's noise levels "
                f"({self.sigma_min:g} to {self.sigma_max:g})."
            )
        self.sigma_max = sigma

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers, JSON-ready; with the network they rebuild the denoiser."""
        return {}

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the class, its settings and all weights."""
        digest = hashlib.sha256(type(self).__name__.encode())
        digest.update(json.dumps(self.settings(), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


class NetworkDenoiser(Denoiser):
    """A denoiser around a network; subclasses say what the network predicts.

    Args:
        network: Called as ``network(x, time, condition)``. Its attributes ``image_shape``,
            ``num_classes`` and ``null_label`` are taken over where it has them.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.image_shape = getattr(network, "image_shape", None)
        self.num_classes = getattr(network, "num_classes", None)
        self.null_label = getattr(network, "null_label", None)

    def predict(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Evaluate the network in its own precision; the result comes back in that of ``x``."""
        weight = next(self.network.parameters(), None)
        # Under autocast the weights stay float32, and so does the state between the passes.
        dtype = x.dtype if weight is None else weight.dtype
        # Never in bfloat16, which cannot tell neighbouring times apart.
        time = time.to(torch.promote_types(dtype, torch.float32))
        return self.network(x.to(dtype), time, condition).to(x.dtype)


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
        time = self.time_scale / 4 * sigma.log()
        return c_skip * x + c_out * self.predict(c_in * x, time, condition)

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """``1 / c_out^2`` (Karras et al. 2022, Table 1)."""
        sigma = sigma.double()
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers."""
        names = ("sigma_min", "sigma_max", "sigma_data", "time_scale")
        return {name: getattr(self, name) for name in names}


class ConsistencyDenoiser(EDMDenoiser):
    """EDM's network with the boundary condition ``D(x, sigma_min) = x``.

    ``c_skip = sd^2 / ((sigma - sigma_min)^2 + sd^2)`` and
    ``c_out = (sigma - sigma_min) sd / sqrt(sigma^2 + sd^2)`` (Song et al. 2023, Appendix C).

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
        self.num_timesteps = num_timesteps

    def sigmas(self, steps: int) -> Tensor:
        """Every ``num_timesteps // steps``-th level of the Karras grid, from the top; then 0."""
        check_steps(steps)
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
    """

    table: Tensor

    def __init__(
        self,
        network: nn.Module,
        betas: Tensor | list[float] | None = None,
        discrete: bool = False,
        generator_sigma: float | None = None,
    ) -> None:
        super().__init__(network)
        self.betas = torch.as_tensor(linear_betas() if betas is None else betas).double()
        # Kept out of the module's buffers: ``.half()`` or ``.to(bfloat16)`` must not round it.
        self.table = sigmas_from_alphas_cumprod((1 - self.betas).cumprod(0))
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
        return (1 + self.sigma_max**2) ** 0.5 * noise

    def sigmas(self, steps: int) -> Tensor:
        """Levels at the trailing times of the table, then 0."""
        times = trailing_timesteps(steps, self.last + 1)
        return torch.cat([self.table[times], self.table.new_zeros(1)])

    def schedule(self, u: Tensor) -> Tensor:
        """Uniform in the table's time."""
        table = self.table.to(u.device)
        times = u.double() * self.last
        return timestep_to_sigma(times.round() if self.discrete else times, table)

    def time(self, sigma: Tensor) -> Tensor:
        """The network's time at ``sigma``."""
        time = sigma_to_timestep(sigma, self.table.to(sigma.device))
        return time.round() if self.discrete else time

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers."""
        return {
            "betas": self.betas.tolist(),
            "discrete": self.discrete,
            "generator_sigma": self.generator_sigma,
        }


class EpsilonDenoiser(_TableDenoiser):
    """A DDPM network that predicts the noise: ``D = x - sigma * eps`` (Ho et al. 2020)."""

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        """Denoise, see :meth:`Denoiser.forward`."""
        scaled = x * like((1 + sigma.double() ** 2).rsqrt(), x)
        return x - like(sigma, x) * self.predict(scaled, self.time(sigma), condition)


class VelocityDenoiser(_TableDenoiser):
    """A network that predicts ``v = alpha eps - s x0`` (Salimans & Ho 2022, Appendix D)."""

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        """Denoise, see :meth:`Denoiser.forward`."""
        alpha = like((1 + sigma.double() ** 2).rsqrt(), x)
        v = self.predict(alpha * x, self.time(sigma), condition)
        return alpha * (alpha * x - like(sigma, x) * v)

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """``SNR + 1``."""
        return 1 + 1 / sigma.double() ** 2


class FlowDenoiser(NetworkDenoiser):
    """A rectified flow: the network predicts ``u = noise - x0`` on ``x_t = (1-t) x0 + t noise``.

    With ``t = sigma / (1 + sigma)`` the straight path is the variance-exploding one scaled by
    ``1 - t``, so that ``D = x_t - t u`` (Liu et al. 2023).

    Args:
        network: Asked at the time ``1000 t`` (diffusers' convention).
        sigma_max: Stands for ``t = 1``, which no finite level is.
        sigma_min: Stands for ``t = 0`` in grids that may not end there.
    """

    def __init__(
        self, network: nn.Module, sigma_max: float = 1e6, sigma_min: float = 1e-3
    ) -> None:
        super().__init__(network)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def time(self, sigma: Tensor) -> Tensor:
        """``t`` in [0, 1] at ``sigma``; exactly 1 from ``sigma_max`` on."""
        t = sigma.double() / (1 + sigma.double())
        return torch.where(sigma >= self.sigma_max, torch.ones_like(t), t)

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        """Denoise, see :meth:`Denoiser.forward`."""
        scaled = x * like(1 / (1 + sigma.double()), x)
        t = self.time(sigma)
        return scaled - like(t, x) * self.predict(scaled, 1000 * t, condition)

    def start(self, noise: Tensor) -> Tensor:
        """The state at ``t = 1`` is the noise itself."""
        return (1 + self.sigma_max) * noise

    def schedule(self, u: Tensor) -> Tensor:
        """Uniform in ``t``."""
        t = u.double()
        return (t / (1 - t).clamp_min(1e-12)).clamp(self.sigma_min, self.sigma_max)

    def sigmas(self, steps: int) -> Tensor:
        """Levels of a grid that is uniform in ``t``."""
        check_steps(steps)
        grid = self.schedule(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
        grid[-1] = 0
        return grid

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """``1 / t^2``."""
        return 1 / self.time(sigma) ** 2

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers."""
        return {"sigma_max": self.sigma_max, "sigma_min": self.sigma_min}


class GuidedDenoiser(Denoiser):
    """Classifier-free guidance: ``D_null + scale (D - D_null)`` (Ho & Salimans 2022).

    Args:
        denoiser: A conditional model with a null class.
        scale: 1 = none, which costs one evaluation instead of two.
    """

    def __init__(self, denoiser: Denoiser, scale: float = 1.0) -> None:
        super().__init__()
        self.denoiser, self.scale = denoiser, scale
        self.sigma_min, self.sigma_max = denoiser.sigma_min, denoiser.sigma_max
        self.image_shape, self.num_classes = denoiser.image_shape, denoiser.num_classes
        self.null_label = denoiser.null_label

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        """Denoise, see :meth:`Denoiser.forward`.

        Raises:
            ValueError: If the scale is not 1 and there is nothing to guide by.
        """
        conditional = self.denoiser(x, sigma, condition)
        if self.scale == 1:
            return conditional
        if condition is None:
            raise ValueError(
                f"guidance={self.scale} needs a condition (labels or prompts); "
                "use guidance 1 for an unconditional model."
            )
        unconditional = self.denoiser(x, sigma, self.denoiser.null(condition))
        return torch.lerp(unconditional, conditional, self.scale)

    def start(self, noise: Tensor) -> Tensor:
        """As the guided model."""
        return self.denoiser.start(noise)

    def sigmas(self, steps: int) -> Tensor:
        """As the guided model."""
        return self.denoiser.sigmas(steps)

    def schedule(self, u: Tensor) -> Tensor:
        """As the guided model."""
        return self.denoiser.schedule(u)

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """As the guided model."""
        return self.denoiser.loss_weight(sigma)

    def null(self, condition: Condition) -> Condition:
        """As the guided model."""
        return self.denoiser.null(condition)

    def settings(self) -> dict[str, Any]:
        """The scale beside the guided model's numbers."""
        return {"scale": self.scale, **self.denoiser.settings()}
