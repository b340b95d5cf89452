import sys
from pathlib import Path

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from gaussian import MEAN, VARIANCE, ExactConsistency

from lit_distill.diffusion import ConsistencyDenoiser, consistency_sampling

# Large, so that noise of sqrt(tau^2 - sigma_min^2) and noise of tau differ by 15% in the variance.
SIGMA_MIN = 0.3


@pytest.mark.parametrize("levels", [[5.0], [5.0, 0.8], [5.0, 2.0, 0.8, 0.5, 0.0]])
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


def test_the_generator_decides():
    model, x = ExactConsistency(), torch.randn(4, 3)
    levels = torch.tensor([80.0, 5.0, 1.0])

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return consistency_sampling(model, x, levels, generator=generator)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_a_generator_for_each_sample_makes_samples_independent_of_their_batch():
    model, levels = ExactConsistency(), torch.tensor([80.0, 5.0, 1.0])
    x = torch.randn(3, 2)

    def run(rows):
        generators = [torch.Generator().manual_seed(i) for i in rows]
        return consistency_sampling(model, x[rows], levels, generator=generators)

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


def test_a_grid_without_a_level_is_refused():
    with pytest.raises(ValueError, match="steps=0"):
        consistency_sampling(ExactConsistency(), torch.randn(1, 2), torch.zeros(1))
