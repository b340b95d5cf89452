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

from lit_distill.diffusion.contract import Condition, Denoiser, like, told
from lit_distill.diffusion.noise_levels import check_steps, placed

Callback = Callable[[int, Tensor, Tensor], None]
"""Called after each jump with its number, the state before it and the denoiser's estimate there."""


Generators = torch.Generator | list[torch.Generator] | None
"""Where noise comes from: one generator for each sample, one for all, or the global one."""


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
    step to 0 falls back to order 1, since its length in lambda is infinite. A sample may stay
    where it is (a step to its own level).
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
            goes_on = (to_sigma > 0) & (length != 0)
            ratio = torch.where(goes_on, length / (2 * last_length), 0.0)
            estimate = x0 + like(ratio, x) * (x0 - previous)
        x = jump(x, estimate, sigma, to_sigma)
        previous, last_length = x0, length
    return x


def dpm_2(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    condition: Condition = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver-2 (Lu et al. 2022, Algorithm 1) of order 2, two evaluations a step.

    The slope is taken in the middle of the step in ``lambda = -ln(sigma)``. A step to 0 is Euler's.
    """
    for i, (sigma, to_sigma) in enumerate(pairwise(sigmas)):
        x0 = denoiser(x, sigma, condition)
        if callback is not None:
            callback(i, x, x0)
        ends = to_sigma == 0
        ahead = jump(x, x0, sigma, to_sigma)
        # Looked at on the last step only: on a GPU the look waits for all work before it.
        if i < len(sigmas) - 2 or not bool(ends.all()):
            middle = torch.where(ends, sigma, (sigma * to_sigma).sqrt())
            x0_middle = denoiser(jump(x, x0, sigma, middle), middle, condition)
            # The x0 whose jump has the slope of the middle: a flow's float32 state, of 1e6, would
            # lose the image in ``x + (to_sigma - sigma) slope``.
            estimate = x0 + like(sigma / middle, x) * (x0_middle - x0)
            corrected = jump(x, estimate, sigma, to_sigma)
            ahead = torch.where(like(ends, x).bool(), ahead, corrected)
        x = ahead
    return x


def dpmpp_3m(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    condition: Condition = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(3M) (Lu et al. 2022) in its published form, one evaluation a step.

    Its last coefficient belongs to half the second difference, so that on grids like Karras' its
    measured order is 2; it is kept since that form does better at few steps. The first steps are
    of lower order, and so is one to 0. A sample may stay where it is (a step to its own level).
    """
    past: list[Tensor] = []
    lengths: list[Tensor] = []
    for i, (sigma, to_sigma) in enumerate(pairwise(sigmas)):
        x0 = denoiser(x, sigma, condition)
        if callback is not None:
            callback(i, x, x0)
        # Any length will do for a step to 0 or to where it begins, which takes none of what
        # follows: an infinite one, or 0, would leave NaNs.
        goes_on = (to_sigma > 0) & (to_sigma != sigma)
        length = torch.where(goes_on, (sigma / to_sigma).log(), 1.0)
        change = torch.zeros_like(x)
        if len(past) == 1:
            change = (x0 - past[0]) * like(length / (2 * lengths[0]), x)
        elif len(past) == 2:
            recent, older = (like(before / length, x) for before in lengths)
            first, before = (x0 - past[0]) / recent, (past[0] - past[1]) / older
            second = (first - before) / (recent + older)
            first = first + recent * second
            shrink = torch.expm1(-length)  # to_sigma / sigma - 1
            weight = shrink / length + 1
            weight_2 = (shrink + length) / length**2 - 0.5
            change = (like(weight, x) * first - like(weight_2, x) * second) / like(-shrink, x)
        estimate = torch.where(like(goes_on, x).bool(), x0 + change, x0)
        x = jump(x, estimate, sigma, to_sigma)
        past, lengths = [x0, *past[:1]], [length, *lengths[:1]]
    return x


_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def ipndm(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    condition: Condition = None,
    callback: Callback | None = None,
) -> Tensor:
    """Improved PNDM (Zhang & Chen 2023) up to four slopes, one evaluation a step.

    Adams-Bashforth's coefficients, which are those of equal steps: on other grids the order is 2.
    """
    slopes: list[Tensor] = []
    for i, (sigma, to_sigma) in enumerate(pairwise(sigmas)):
        x0 = denoiser(x, sigma, condition)
        if callback is not None:
            callback(i, x, x0)
        slopes = [(x - x0) / like(sigma, x), *slopes[:3]]
        coefficients = _ADAMS_BASHFORTH[len(slopes) - 1]
        # The coefficients add up to 1, so that only differences to the newest slope remain. They
        # go into x0, since a flow's float32 state, of 1e6, would lose the image.
        change = torch.zeros_like(x)
        for coefficient, slope in zip(coefficients[1:], slopes[1:], strict=True):
            change = change + coefficient * (slope - slopes[0])
        estimate = torch.where(like(to_sigma, x) > 0, x0 - like(sigma, x) * change, x0)
        x = jump(x, estimate, sigma, to_sigma)
    return x


SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "ddim": euler,
    "heun": heun,
    "dpm_2": dpm_2,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "ipndm": ipndm,
}
"""Solvers by name. All of them are deterministic."""


def check_solver(solver: str) -> None:
    """Raise a ``ValueError`` unless ``solver`` is a name in :data:`SOLVERS`."""
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is unknown; choose one of {', '.join(SOLVERS)}.")


class _AnalyticalFirst(Denoiser):
    """Answers the first question by a formula, and hands on all others."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser, self._first = denoiser, True

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        """Denoise."""
        if not self._first:
            return self.denoiser(x, sigma, condition)
        self._first = False
        return analytical_x0(x, sigma)

    def signal_scale(self, sigma: Tensor) -> Tensor:
        """As the denoiser's."""
        return self.denoiser.signal_scale(sigma)


def analytical_x0(x: Tensor, sigma: Tensor) -> Tensor:
    """What a denoiser would answer far above the data's own spread, without asking it.

    There the direction ``(x - D) / sigma`` is ``x / sqrt(1 + sigma^2)`` for data of unit variance
    (the *analytical first step*, Dockhorn et al. 2022; Zhou et al. 2024).

    Args:
        x: ``(B, *shape)``, the state.
        sigma: ``(B,)``, its level, large.
    """
    return x - like(sigma * (1 + sigma**2).rsqrt(), x) * x


def solve(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    solver: str = "heun",
    condition: Condition = None,
    callback: Callback | None = None,
    analytical_first_step: bool = False,
) -> Tensor:
    """Carry a state along the probability-flow ODE over a grid of noise levels.

    Args:
        denoiser: The model.
        x: ``(B, *shape)``, the state at ``sigmas[0]``.
        sigmas: ``(S,)``, or ``(S, B)`` with a grid for each sample: descending levels.
        solver: A name in :data:`SOLVERS`.
        condition: Passed to the denoiser.
        callback: Called after each evaluation that starts a jump.
        analytical_first_step: Put a formula in the place of the first evaluation, see
            :func:`analytical_x0`.

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
    if sigmas.device.type == "cpu":
        _check_positive(sigmas)
    grid = placed(sigmas, x.device).expand(-1, len(x))
    asked = _AnalyticalFirst(denoiser) if analytical_first_step else denoiser
    return SOLVERS[solver](asked, x, grid, condition, callback)


def _check_positive(sigmas: Tensor) -> None:
    """Raise a ``ValueError`` if a level but the last is 0."""
    if not bool((sigmas[:-1] > 0).all()):
        raise ValueError(
            "sigmas has a level that is not above 0 before its end: the ODE stops at 0, so that "
            "only the last level may be 0."
        )


def sample(
    denoiser: Denoiser,
    noise: Tensor,
    *,
    steps: int,
    solver: str | None = None,
    condition: Condition = None,
    generator: Generators = None,
) -> Tensor:
    """Generate from unit noise on the denoiser's own grid.

    Args:
        denoiser: The model.
        noise: ``(B, *shape)``, unit noise, see :func:`seeded_noise`.
        steps: Number of evaluations of a student, of jumps of a solver.
        solver: A name in :data:`SOLVERS`; by default a student's own way (:func:`few_step`), and
            Heun's method for a teacher.
        condition: Passed to the denoiser.
        generator: Source of the noise that some students add between jumps, see
            :func:`few_step`.

    Returns:
        ``(B, *shape)``, samples in the data's range.
    """
    x, sigmas, few = denoiser.start(noise), denoiser.grid(steps), denoiser.few_steps
    if solver is not None or few is None:
        return solve(
            denoiser,
            x,
            sigmas,
            solver=solver or "heun",
            condition=condition,
            analytical_first_step=few is not None and few.analytical_first_step,
        )
    return few_step(
        denoiser,
        x,
        sigmas,
        gamma=few.gamma,
        analytical_first_step=few.analytical_first_step,
        condition=condition,
        generator=generator,
    )


def few_step(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    gamma: float = 0.0,
    analytical_first_step: bool = False,
    condition: Condition = None,
    generator: Generators = None,
) -> Tensor:
    """Sample a student: jump from level to level, or lower and back up by fresh noise.

    A jump to ``s`` first goes to ``sqrt(1 - gamma^2) s`` and adds the rest as noise (Kim et al.
    2024, Algorithm 3): with ``gamma = 0`` there is none, ``gamma = 1`` is the multistep sampling of
    consistency models (Song et al. 2023, Algorithm 1). A network that takes the level it jumps to,
    or the number of steps, is told.

    Args:
        denoiser: A student.
        x: ``(B, *shape)``, the state at ``sigmas[0]``.
        sigmas: ``(S,)`` descending levels; only the last may be 0.
        gamma: Share of fresh noise between the jumps, in [0, 1].
        analytical_first_step: The first jump is by :func:`analytical_x0`.
        condition: Passed to the denoiser.
        generator: Source of the added noise; a list has one for each sample, so that they do not
            depend on their batch.

    Returns:
        ``(B, *shape)``, the state at ``sigmas[-1]``.

    Raises:
        ValueError: If ``gamma`` is no share or the levels are no grid.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma} is no share of fresh noise: it lies between 0 and 1.")
    if sigmas.ndim != 1:
        raise ValueError(f"sigmas of shape {tuple(sigmas.shape)} is no grid of a student: (S,) is.")
    count, jumps = len(x), len(sigmas) - 1
    check_steps(jumps - analytical_first_step)
    steps = torch.full((count,), jumps - int(analytical_first_step), device=x.device)
    sigmas = sigmas.cpu()  # where looking at them costs no wait
    _check_positive(sigmas)
    for i, (sigma, to_sigma) in enumerate(pairwise(sigmas)):
        lower = (1 - gamma**2) ** 0.5 * to_sigma if i < jumps - 1 else to_sigma
        level, target = (placed(s, x.device).expand(count) for s in (sigma, lower))
        if i == 0 and analytical_first_step:
            x0 = analytical_x0(x, level)
        else:
            x0 = denoiser(x, level, told(denoiser, condition, to_sigma=target, steps=steps))
        x = jump(x, x0, level, target)
        missing = to_sigma**2 - lower**2 - denoiser.floor**2
        if missing > 0:
            x = x + float(missing.sqrt()) * _noise_like(x, generator)
    return x


def _noise_like(x: Tensor, generator: Generators) -> Tensor:
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
