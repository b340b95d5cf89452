"""The ODE-based methods against the truth: the map of an exact teacher in the plane.

The teacher is the closed form of eight Gaussians (``plane.py``); the student is a small network
that was first trained as a denoiser. Its map from noise is compared with the teacher's ODE. The
bars of the long runs are those that the project set itself beforehand; those of the short ones say
only that a method works. ``docs/results.md`` has the figures.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from plane import (
    SIGMA_MAX,
    SIGMA_MIN,
    Points,
    errors,
    exact_ends,
    falling,
    fit,
    noises,
    pretrained,
    truth,
)

from lit_distill.diffusion import LogUniformSigma, rho_grid, solve
from lit_distill.losses import PseudoHuber
from lit_distill.methods import (
    SFD,
    ConsistencyDistillation,
    ConsistencyTraining,
    ConsistencyTrajectory,
    DistillationModule,
    KnowledgeDistillation,
    MultiBoundaryConsistencyDistillation,
    ProgressiveDistillation,
    TrajectoryDistillation,
)

LONG, SHORT, BATCH = 8_000, 400, 1_024


@dataclass(frozen=True)
class Case:
    """A method with its settings.

    Attributes:
        make: Builds it from a start, its options and the number of updates.
        rate: Largest learning rate.
        bars: Largest relative error after a long run, for each number of steps; None: reported.
        short_bars: The same after a short run.
        on_pairs: Whether it is trained on ends of the exact ODE.
    """

    make: Callable[..., DistillationModule]
    bars: dict[int, float | None]
    short_bars: dict[int, float]
    rate: float = 2e-3
    on_pairs: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def _progressive(teacher, student, updates, **options):
    options.pop("lr_scheduler")  # its own falls within each stage
    lengths = [updates // share for share in (16, 16, 8, 8, 8)]
    lengths.append(updates - sum(lengths))
    return ProgressiveDistillation(teacher, 64, 1, lengths, student=student, **options)


def _training(teacher, student, updates, **options):
    huber = PseudoHuber(0.01)
    return ConsistencyTraining(student, huber, stage_updates=max(updates // 8, 1), **options)


def _plain(method, *arguments, **settings):
    def make(teacher, student, updates, **options):
        return method(teacher, *arguments, student=student, **settings, **options)

    return make


_HUBER = PseudoHuber(0.01)
_SUBSTEPS = {"teacher_substeps": 8, "sigma_min": SIGMA_MIN}
CASES = {
    "kd": Case(_plain(KnowledgeDistillation, "l2"), {1: 0.02}, {1: 0.1}, on_pairs=True),
    "pd": Case(_progressive, {1: 0.07}, {1: 0.3}),
    "td": Case(
        _plain(TrajectoryDistillation, 4, "l2", teacher_substeps=4, sigma_min=SIGMA_MIN),
        {4: None},
        {4: 0.15},
    ),
    "sfd": Case(_plain(SFD, 4, "l2", **_SUBSTEPS), {4: 0.03}, {4: 0.1}),
    "sfd_v": Case(
        _plain(SFD, [4, 5, 6], "l2", **_SUBSTEPS), {4: 0.05, 5: 0.05, 6: 0.05}, {4: 0.15, 6: 0.15}
    ),
    "cd": Case(
        _plain(ConsistencyDistillation, 18, _HUBER, target="ema"),
        {1: 0.05, 2: None},
        {1: 0.3},
        rate=1e-3,
    ),
    "ct": Case(_training, {1: None, 2: None}, {1: 0.5}, rate=1e-3),
    "multi_boundary_4": Case(
        _plain(MultiBoundaryConsistencyDistillation, 4, 18, _HUBER, target="ema"),
        {4: 0.06},
        {4: 0.3},
        rate=1e-3,
    ),
    "multi_boundary_2": Case(
        _plain(MultiBoundaryConsistencyDistillation, 2, 18, _HUBER, target="ema"),
        {2: None},
        {2: 0.4},
        rate=1e-3,
    ),
    "multi_boundary_1": Case(
        _plain(MultiBoundaryConsistencyDistillation, 1, 18, _HUBER, target="ema"),
        {1: None},
        {1: 0.3},
        rate=1e-3,
    ),
    "ctm": Case(
        _plain(
            ConsistencyTrajectory,
            18,
            _HUBER,
            max_teacher_steps=6,
            sigma_distribution=LogUniformSigma(SIGMA_MIN, SIGMA_MAX),
        ),
        {1: 0.07, 2: None, 4: None},
        {1: 0.3},
        rate=1e-3,
    ),
}


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Denoisers of the mixture to start from, by their number of updates."""
    made: dict[int, Any] = {}

    def denoiser(updates: int):
        if updates not in made:
            made[updates] = pretrained(tmp_path_factory.mktemp("start"), updates)
        return copy.deepcopy(made[updates])

    return denoiser


def distilled(case: Case, student, updates: int, folder, teacher=None) -> DistillationModule:
    """A method's module after its training."""
    torch.manual_seed(0)
    module = case.make(
        teacher or truth(),
        student,
        updates,
        optimizer=partial(torch.optim.Adam, lr=case.rate),
        lr_scheduler=falling(updates),
        ema_decay=0.999 if updates == LONG else 0.99,
    )
    if case.on_pairs:
        noise = torch.randn(200_000 if updates == LONG else 20_000, 2)
        data = Points(BATCH, noise=noise, image=exact_ends(noise, 64))
    else:
        data = Points(BATCH, image=truth().draw(100_000))
    fit(module, data, updates, folder)
    return module


@pytest.mark.parametrize("name", CASES)
def test_a_short_run_comes_near_the_exact_map(name, start, tmp_path):
    case = CASES[name]
    module = distilled(case, start(800), SHORT, tmp_path)
    noise = noises(1_024)
    exact = exact_ends(noise)
    for steps, bar in case.short_bars.items():
        found = errors(module.generate(noise, steps=steps), exact)
        assert found.relative < bar, f"{steps} steps: {found}"


@pytest.mark.full
@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("name", CASES)
def test_a_long_run_meets_its_bar(name, start, tmp_path):
    case = CASES[name]
    module = distilled(case, start(4_000), LONG, tmp_path)
    noise = noises()
    exact = exact_ends(noise)
    found = {s: errors(module.generate(noise, steps=s), exact) for s in case.bars}
    for steps, error in found.items():
        print(f"{name} at {steps}: {error} (relative, median, other mode)")
    for steps, bar in case.bars.items():
        assert bar is None or found[steps].relative < bar, f"{steps} steps: {found[steps]}"


def test_the_teachers_own_solvers_are_worse_at_few_steps():
    """What the students are compared with: far above all bars."""
    noise = noises(1_024)
    exact = exact_ends(noise)
    for solver, steps in [("euler", n) for n in (1, 2, 4, 8)] + [("heun", n) for n in (1, 2, 4)]:
        grid = rho_grid(steps, SIGMA_MIN, SIGMA_MAX)
        found = errors(solve(truth(), SIGMA_MAX * noise, grid, solver=solver), exact)
        print(f"{solver}, {steps} steps: {found}")
        assert found.relative > 0.09
