"""Solvers of the probability-flow ODE ``dx/dsigma = (x - D(x, sigma)) / sigma``.

Each solver is a function of a denoiser, a state and a grid, and reads like its paper's
algorithm. Grids are ``(S,)``, or ``(S, B)`` where every sample has its own. NFE is what the
denoiser was in fact asked: see :class:`EvaluationCounter`.
"""

from collections.abc import Callable
from itertools import pairwise
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_distill.diffusion.contract import Condition, Denoiser, like
from lit_distill.diffusion.noise_levels import check_steps, placed

Callback = Callable[[int, Tensor, Tensor], None]
"""Called after each jump with its number, the state before it and the denoiser's estimate there."""


class Solver(Protocol):
    """Signature of all solvers; ``sigmas`` is ``(S, B)``."""

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        condition: Condition,
        callback: Callback | None,
    ) -> Tensor:
        """Carry ``x`` from ``sigmas[0]`` to ``sigmas[-1]``."""
        ...


def jump(x: Tensor, x0: Tensor, sigma: Tensor, to_sigma: Tensor) -> Tensor:
    """One Euler (= DDIM) step of any length: ``x0 + (to_sigma / sigma) (x - x0)``.

    Args:
        x: ``(B, *shape)``, the state at ``sigma``.
        x0: ``(B, *shape)``, its denoising.
        sigma: ``(B,)`` level of ``x``, > 0.
        to_sigma: ``(B,)`` level to go to; 0 gives ``x0`` itself.

    Returns:
        ``(B, *shape)``, the state at ``to_sigma``.
    """
    return x0 + like(to_sigma / sigma, x) * (x - x0)


def euler(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    condition: Condition = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method, which is DDIM (Song et al. 2021), of order 1."""
    for i, (sigma, to_sigma) in enumerate(pairwise(sigmas)):
        x0 = denoiser(x, sigma, condition)
        if callback is not None:
            callback(i, x, x0)
        x = jump(x, x0, sigma, to_sigma)
    return x


def heun(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    condition: Condition = None,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's method (Karras et al. 2022, Algorithm 1) of order 2; a step to 0 is Euler's.

    It steps in the denoiser's own coordinate, see :meth:`Denoiser.signal_scale`.
    """
    for i, (sigma, to_sigma) in enumerate(pairwise(sigmas)):
        x0 = denoiser(x, sigma, condition)
        if callback is not None:
            callback(i, x, x0)
        ahead = jump(x, x0, sigma, to_sigma)
        ends = to_sigma == 0
        # Looked at on the last step only: on a GPU the look waits for all work before it.
        if i < len(sigmas) - 2 or not bool(ends.all()):
            level = torch.where(ends, sigma, to_sigma)  # any level that is not 0 will do
            scale, scale_ahead = denoiser.signal_scale(sigma), denoiser.signal_scale(level)
            time, time_ahead = scale * sigma, scale_ahead * level
            slope = (like(scale, x) * x - x0) / like(time, x)
            x0_ahead = denoiser(ahead, level, condition)
            slope_ahead = (like(scale_ahead, x) * ahead - x0_ahead) / like(time_ahead, x)
            moved = like(time_ahead - time, x) * (slope + slope_ahead) / 2
            corrected = (like(scale, x) * x + moved) / like(scale_ahead, x)
            ahead = torch.where(like(ends, x).bool(), ahead, corrected)
        x = ahead
    return x


def dpmpp_2m(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    condition: Condition = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2) of order 2, one evaluation a step.

    The data prediction is extrapolated to the middle of the step in ``lambda = -ln(sigma)``. A
    step to 0 falls back to order 1, since its length in lambda is infinite.
    """
    previous: Tensor | None = None
    last_length = torch.zeros_like(sigmas[0])
    for i, (sigma, to_sigma) in enumerate(pairwise(sigmas)):
        x0 = denoiser(x, sigma, condition)
        if callback is not None:
            callback(i, x, x0)
        length = (sigma / to_sigma).log()
        estimate = x0
        if previous is not None:
            ratio = torch.where(to_sigma > 0, length / (2 * last_length), 0.0)
            estimate = x0 + like(ratio, x) * (x0 - previous)
        x = jump(x, estimate, sigma, to_sigma)
        previous, last_length = x0, length
    return x


SOLVERS: dict[str, Solver] = {"euler": euler, "ddim": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}
"""Solvers by name. All of them are deterministic."""


def check_solver(solver: str) -> None:
    """Raise a ``ValueError`` unless ``solver`` is a name in :data:`SOLVERS`."""
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is unknown; choose one of {', '.join(SOLVERS)}.")


def solve(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    solver: str = "heun",
    condition: Condition = None,
    callback: Callback | None = None,
) -> Tensor:
    """Carry a state along the probability-flow ODE over a grid of noise levels.

    Args:
        denoiser: The model.
        x: ``(B, *shape)``, the state at ``sigmas[0]``.
        sigmas: ``(S,)``, or ``(S, B)`` with a grid for each sample: descending levels.
        solver: A name in :data:`SOLVERS`.
        condition: Passed to the denoiser.
        callback: Called after each evaluation that starts a jump.

    Returns:
        ``(B, *shape)``, the state at ``sigmas[-1]``.

    Raises:
        ValueError: If the solver is unknown or the grid is not one.
    """
    check_solver(solver)
    if sigmas.ndim == 1:
        sigmas = sigmas[:, None]
    if sigmas.ndim != 2 or len(sigmas) < 2 or sigmas.shape[1] not in (1, len(x)):
        raise ValueError(
            f"sigmas of shape {tuple(sigmas.shape)} is no grid for a batch of {len(x)}: "
            "(S,) or (S, B) with S >= 2 is needed."
        )
    # Looked at where a look is free: on a GPU it would wait for all work before it.
    if sigmas.device.type == "cpu" and not bool((sigmas[:-1] > 0).all()):
        raise ValueError(
            "sigmas has a level that is not above 0 before its end: the ODE stops at 0, so that "
            "only the last level may be 0."
        )
    grid = placed(sigmas, x.device).expand(-1, len(x))
    return SOLVERS[solver](denoiser, x, grid, condition, callback)


def sample(
    denoiser: Denoiser,
    noise: Tensor,
    *,
    steps: int,
    solver: str = "heun",
    condition: Condition = None,
) -> Tensor:
    """Generate from unit noise on the denoiser's own grid.

    Args:
        denoiser: The model.
        noise: ``(B, *shape)``, unit noise, see :func:`seeded_noise`.
        steps: Number of jumps.
        solver: A name in :data:`SOLVERS`.
        condition: Passed to the denoiser.

    Returns:
        ``(B, *shape)``, samples in the data's range.
    """
    x, sigmas = denoiser.start(noise), denoiser.sigmas(steps)
    return solve(denoiser, x, sigmas, solver=solver, condition=condition)


def consistency_sampling(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    condition: Condition = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Tensor:
    """Stochastic multistep sampling of consistency models (Song et al. 2023, Algorithm 1).

    Jump to the data, add noise of the next level, jump again.

    Args:
        denoiser: A consistency model.
        x: ``(B, *shape)``, the state at ``sigmas[0]``.
        sigmas: ``(S,)`` descending levels at which the model is asked; a final 0 is ignored.
        condition: Passed to the denoiser.
        generator: Source of the added noise; a list has one for each sample, so that they do not
            depend on their batch.

    Returns:
        ``(B, *shape)``, samples in the data's range.
    """
    levels = sigmas[sigmas > 0]
    check_steps(len(levels))
    for i, level in enumerate(levels):
        if i > 0:
            spread = (level**2 - denoiser.sigma_min**2).clamp_min(0).sqrt()
            x = x + float(spread) * _noise_like(x, generator)
        x = denoiser(x, placed(level, x.device).expand(len(x)), condition)
    return x


def _noise_like(x: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """Unit noise, drawn where the generator lives, as diffusers' pipelines do."""
    if isinstance(generator, list):
        rows = zip(x.split(1), generator, strict=True)
        return torch.cat([_noise_like(row, own) for row, own in rows])
    device = x.device if generator is None else generator.device
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device)
    return noise.to(x.device)


class EvaluationCounter:
    """Counts how often the networks inside a denoiser are evaluated, by watching them.

    Example:
        >>> with EvaluationCounter(teacher) as counter:
        ...     sample(teacher, noise, steps=18)
        >>> counter.calls
        35

    Args:
        denoiser: What to watch.
        when: Says at each evaluation whether it counts; by default all do.

    Attributes:
        calls: Network evaluations: the NFE of one sampling run.
        samples: Evaluations times batch rows.
    """

    def __init__(self, denoiser: Denoiser, when: Callable[[], bool] = lambda: True) -> None:
        self._when = when
        self.calls = 0
        self.samples = 0
        inner = [m for m in denoiser.modules() if isinstance(m, Denoiser)]
        self._leaves = [
            m for m in inner if not any(isinstance(c, Denoiser) for c in list(m.modules())[1:])
        ]
        self._handles: list[Any] = []

    def __enter__(self) -> "EvaluationCounter":
        self._handles = [leaf.register_forward_hook(self._count) for leaf in self._leaves]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._when():
            self.calls += 1
            self.samples += len(output)
