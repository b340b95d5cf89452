import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from gaussian import MEAN, VARIANCE, Exact, ExactConsistency

from lit_distill.diffusion import (
    ConsistencyDenoiser,
    Denoiser,
    EDMDenoiser,
    EvaluationCounter,
    FewSteps,
    GuidedDenoiser,
    analytical_x0,
    few_step,
    karras_sigmas,
    sample,
    seeded_generators,
    seeded_noise,
    solve,
    told,
)

# Large, so that noise of sqrt(tau^2 - sigma_min^2) and noise of tau differ by 15% in the variance.
SIGMA_MIN = 0.3

consistency_sampling = partial(few_step, gamma=1.0)


class Asked(Denoiser):
    """Answers zeros and notes what it was told."""

    sigma_min, sigma_max, inputs = 0.01, 8.0, ("to_sigma", "steps")

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, sigma, condition=None):
        self.seen.append((sigma, condition))
        return torch.zeros_like(x)


# --- Noise between the jumps ---------------------------------------------------------------------


@pytest.mark.parametrize("levels", [[5.0, 0.0], [5.0, 0.8, 0.0], [5.0, 2.0, 0.8, 0.5, 0.0]])
def test_a_perfect_consistency_model_gives_the_right_distribution(levels):
    model = ExactConsistency(sigma_min=SIGMA_MIN, sigma_max=5.0)
    generator = torch.Generator().manual_seed(0)
    count = 400_000
    noise = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    x = MEAN + (VARIANCE + 25) ** 0.5 * noise
    out = consistency_sampling(model, x, torch.tensor(levels), generator=generator)[:, 0]
    # The model's data is what the ODE gives at sigma_min.
    std = (VARIANCE + SIGMA_MIN**2) ** 0.5
    assert float(out.mean()) == pytest.approx(MEAN, abs=5 * std / count**0.5)
    assert float(out.std()) == pytest.approx(std, rel=5 / (2 * count) ** 0.5)
    quantiles = torch.tensor([0.05, 0.25, 0.75, 0.95], dtype=torch.float64)
    expected = MEAN + std * torch.special.ndtri(quantiles)
    found = out.sort().values[(quantiles * count).long()]
    assert torch.allclose(found, expected, rtol=0, atol=0.01 * std)


def test_each_later_step_draws_fresh_noise():
    model = ExactConsistency(sigma_min=SIGMA_MIN, sigma_max=5.0)
    x = torch.full((1000, 1), 2.0, dtype=torch.float64)
    one = consistency_sampling(model, x, torch.tensor([5.0, 0.0]))
    assert float(one.std()) < 1e-12  # one step is deterministic
    two = consistency_sampling(model, x, torch.tensor([5.0, 4.9, 0.0]))
    assert float(two.std()) > 0.4


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_gamma_is_the_share_of_fresh_noise(gamma):
    # The paper's Algorithm 3 for a model that answers 0: of the old noise sqrt(1 - gamma^2) stays.
    x = torch.full((200_000, 1), 8.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    out = few_step(Asked(), x, torch.tensor([8.0, 2.0, 1.0]), gamma=gamma, generator=generator)
    # To 1 the last jump goes straight.
    assert float(out.mean()) == pytest.approx((1 - gamma**2) ** 0.5, abs=0.01)
    assert float(out.std()) == pytest.approx(gamma, abs=0.01)


@pytest.mark.parametrize("end", [0.0, 0.1])
def test_without_fresh_noise_it_is_eulers_method(end):
    model, x = Exact(), torch.randn(5, 3, dtype=torch.float64)
    grid = torch.cat([karras_sigmas(4, 0.5, 80)[:-1], torch.tensor([end]).double()])
    expected = solve(model, x, grid, solver="euler")
    assert torch.equal(few_step(model, x, grid), expected)
    model.floor = 0.3  # matters to fresh noise only
    assert torch.equal(few_step(model, x, grid), expected)


def test_the_generator_decides():
    model, x = ExactConsistency(), torch.randn(4, 3)
    levels = torch.tensor([80.0, 5.0, 1.0, 0.0])

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return consistency_sampling(model, x, levels, generator=generator)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


@pytest.mark.parametrize("gamma", [0.4, 1.0])
def test_a_generator_for_each_sample_makes_samples_independent_of_their_batch(gamma):
    model, levels = ExactConsistency(), torch.tensor([80.0, 5.0, 1.0, 0.0])
    x = torch.randn(3, 2)

    def run(rows):
        return few_step(model, x[rows], levels, gamma=gamma, generator=seeded_generators(rows))

    assert torch.equal(run([0, 1, 2])[1:], run([1, 2]))


@pytest.mark.parametrize("num_timesteps", [40, 18, 2])
def test_the_grid_is_the_stock_schedulers(num_timesteps):
    stock = CMStochasticIterativeScheduler(num_train_timesteps=num_timesteps)
    model = ConsistencyDenoiser(nn.Identity(), num_timesteps=num_timesteps)
    for steps in range(1, num_timesteps + 1):
        stock.set_timesteps(steps)
        grid = model.sigmas(steps)
        assert grid[-1] == 0
        assert torch.allclose(grid[:-1].float(), stock.sigmas[:-1], rtol=1e-5)


# --- What the network is told --------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.6])
def test_the_network_is_told_where_the_jump_goes_and_the_number_of_steps(gamma):
    model, labels = Asked(), torch.tensor([4, 5])
    few_step(model, torch.randn(2, 3), torch.tensor([8.0, 2.0, 0.5]), gamma=gamma, condition=labels)
    # Down to the lower level, from where fresh noise leads up again; the last jump to its end.
    lower = [2.0 * (1 - gamma**2) ** 0.5, 0.5]
    assert [sigma.tolist() for sigma, _ in model.seen] == [[8.0, 8.0], [2.0, 2.0]]
    for (_, condition), level in zip(model.seen, lower, strict=True):
        assert condition["to_sigma"].tolist() == pytest.approx([level] * 2)
        assert condition["steps"].tolist() == [2, 2]
        assert condition["label"] is labels


def test_only_what_the_network_takes_is_added_to_a_condition():
    model, labels, two = Asked(), torch.tensor([1, 2]), torch.full((2,), 2)
    plain = EDMDenoiser(nn.Identity())
    assert told(plain, labels, steps=two) is labels and told(plain, None, steps=two) is None
    named = told(model, labels, steps=two, guidance=two)
    assert set(named) == {"label", "steps"} and named["label"] is labels
    given = {"label": labels, "steps": labels}
    assert told(model, given, steps=two)["steps"] is two and given["steps"] is labels
    assert set(told(model, None, to_sigma=two)) == {"to_sigma"}
    assert told(GuidedDenoiser(model, 2.0), labels, steps=two)["steps"] is two


# --- The analytical first step -------------------------------------------------------------------


def test_the_analytical_direction_is_that_of_unit_data():
    x, sigma = torch.randn(3, 2, dtype=torch.float64), torch.tensor([80.0, 7.0, 0.5]).double()
    direction = (x - analytical_x0(x, sigma)) / sigma[:, None]
    assert torch.allclose(direction, x / (1 + sigma[:, None] ** 2).sqrt(), rtol=1e-12)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm_2", "dpmpp_3m", "ipndm", "student"])
def test_the_analytical_first_step_saves_one_evaluation(solver):
    model, x = Exact(), 80 * torch.randn(4, 2, dtype=torch.float64)
    grid, seen = karras_sigmas(5, 0.01, 80)[:-1], []
    options = {} if solver == "student" else {"solver": solver}
    run = few_step if solver == "student" else solve
    with EvaluationCounter(model) as whole:
        run(model, x, grid, **options)
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    with EvaluationCounter(model) as counter:
        run(model, x, grid, analytical_first_step=True, **options)
    assert counter.calls == whole.calls - 1
    assert all(float(sigma[0]) < 80 for sigma in seen)


def test_a_student_with_an_analytical_step_still_counts_evaluations_as_steps():
    model, noise = Exact(), seeded_noise((3,), range(4))
    model.few_steps = FewSteps((2,), [(80.0, 5.0, 1.0, 0.1)], analytical_first_step=True)
    x = model.start(noise)
    first = x - 75 / 80 * (x - analytical_x0(x, torch.full((4,), 80.0)))
    expected = solve(model, first, torch.tensor([5.0, 1.0, 0.1]), solver="euler")
    torch.testing.assert_close(sample(model, noise, steps=2), expected, atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match=r"trained for 2 step\(s\), not for 5"):
        assert len(model.grid(5)) == 7  # its own levels, with a jump more
    for solver in (None, "euler"):
        with EvaluationCounter(model) as counter, warnings.catch_warnings(action="ignore"):
            sample(model, noise, steps=5, solver=solver)
        assert counter.calls == 5


# --- How a student is sampled --------------------------------------------------------------------


def test_a_grid_belongs_to_its_number_of_steps():
    few = FewSteps([2, 1], grids=[[80, 2.0, 0.0], [80, 0.5], [80, 3, 1, 0.1]])
    assert few.trained == (2, 1) and few == FewSteps((2, 1), grids=few.grids)
    assert few.grid(2).tolist() == [80, 2, 0] and few.grid(2).dtype == torch.float64
    assert few.grid(1).tolist() == [80, 0.5]
    with pytest.warns(UserWarning, match=r"trained for 2, 1 step\(s\), not for 3"):
        assert few.grid(3).tolist() == [80, 3, 1, 0.1]  # offered, though not trained
    assert FewSteps((4,)).grid(4) is None


def test_a_student_may_refuse_other_numbers_of_steps():
    model = Exact()
    model.few_steps = FewSteps((2, 4), only=True)
    assert torch.equal(model.grid(4), model.sigmas(4))
    for solver in (None, "heun"):
        with pytest.raises(ValueError, match=r"steps=3: .* in 2, 4 step\(s\) only"):
            sample(model, torch.randn(1, 2), steps=3, solver=solver)


def test_a_warning_points_at_the_caller():
    model = Exact()
    model.few_steps = FewSteps((1,))
    with pytest.warns(UserWarning, match="not for 2") as caught:
        sample(model, torch.randn(1, 2), steps=2)
    assert caught[0].filename == __file__


def test_sample_takes_a_students_own_way_unless_a_solver_is_named():
    model, noise = ExactConsistency(SIGMA_MIN, 5.0), seeded_noise((3,), range(4))
    model.few_steps = FewSteps((2,), [(5.0, 1.0, 0.0)], gamma=1.0)
    x, grid = model.start(noise), torch.tensor([5.0, 1.0, 0.0]).double()
    own = sample(model, noise, steps=2, generator=seeded_generators(range(4)))
    by_hand = consistency_sampling(model, x, grid, generator=seeded_generators(range(4)))
    assert torch.equal(own, by_hand)
    assert torch.equal(sample(model, noise, steps=2, solver="heun"), solve(model, x, grid))
    model.few_steps = None
    assert torch.equal(sample(model, noise, steps=3), solve(model, x, model.sigmas(3)))


def test_guidance_takes_over_how_a_student_is_sampled():
    model = Asked()
    model.few_steps, model.floor, model.null_label = FewSteps((2,), [(8.0, 1.0, 0.0)]), 0.2, 3
    guided = GuidedDenoiser(model, 2.0)
    assert torch.equal(guided.grid(2), model.grid(2))
    assert (guided.inputs, guided.floor) == (model.inputs, 0.2)
    sample(guided, torch.randn(2, 3), steps=2, condition=torch.tensor([0, 1]))
    labels = [condition["label"].tolist() for _, condition in model.seen]
    assert labels == [[0, 1], [3, 3]] * 2
    assert all(condition["steps"].tolist() == [2, 2] for _, condition in model.seen)


def test_the_fingerprint_sees_how_a_student_is_sampled():
    model, prints = EDMDenoiser(nn.Linear(2, 2)), []
    ways = [None, FewSteps((1,)), FewSteps((1,), gamma=1.0), FewSteps((1,), [(80.0, 0.1)])]
    for model.few_steps in ways:
        prints.append(model.fingerprint())
    assert len(set(prints)) == len(ways)


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"trained": ()}, "no numbers of steps"),
        ({"trained": (0, 1)}, "no numbers of steps"),
        ({"trained": (1,), "gamma": 1.5}, r"gamma=1\.5 is no share"),
        ({"trained": (1,), "grids": [(1.0,)]}, "is no grid of a student"),
        ({"trained": (1,), "grids": [(1.0, 2.0)]}, "is no grid of a student"),
        ({"trained": (1,), "grids": [(1.0, -1.0)]}, "is no grid of a student"),
        ({"trained": (1,), "grids": [(2.0, 0.0, 0.0)]}, "is no grid of a student"),
    ],
)
def test_what_is_no_way_of_sampling_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        FewSteps(**arguments)


@pytest.mark.parametrize(
    ("levels", "options", "sentence"),
    [
        ([0.0], {}, "steps=0"),
        ([1.0, 0.0], {"analytical_first_step": True}, "steps=0"),
        ([1.0, 0.0], {"gamma": -0.1}, r"gamma=-0\.1 is no share"),
        ([1.0, 0.0, 0.0], {}, "only the last level may be 0"),
        ([[1.0], [0.5]], {}, r"sigmas of shape \(2, 1\) is no grid of a student"),
    ],
)
def test_what_cannot_be_sampled_is_refused(levels, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        few_step(ExactConsistency(), torch.randn(1, 2), torch.tensor(levels), **options)
