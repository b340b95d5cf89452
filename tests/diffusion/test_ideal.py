import math

import pytest
import torch
from sklearn.datasets import load_digits

from lit_distill.diffusion import (
    EmpiricalDenoiser,
    GaussianMixtureDenoiser,
    karras_sigmas,
    sample,
    seeded_noise,
    solve,
)


@pytest.fixture(scope="module")
def digits():
    return torch.tensor(load_digits().images[:300], dtype=torch.float64)[:, None] / 8 - 1


def lecture_formula(x, sigma, data):
    """``sum_j softmax_j(-|x - x_j|^2 / (2 s^2)) x_j``, in plain loops."""
    rows = []
    for query, level in zip(x, sigma.tolist(), strict=True):
        logits = [-float(((query - point) ** 2).sum()) / (2 * level**2) for point in data]
        top = max(logits)
        weights = [math.exp(logit - top) for logit in logits]
        total = sum(weights)
        rows.append(sum(w / total * point for w, point in zip(weights, data, strict=True)))
    return torch.stack(rows)


def mixture(shape=(2,)):
    generator = torch.Generator().manual_seed(3)
    means = 2 * torch.randn((3, *shape), generator=generator, dtype=torch.float64)
    std = torch.tensor([0.1, 0.5, 1.2], dtype=torch.float64)
    return GaussianMixtureDenoiser(means, std, torch.tensor([1.0, 3.0, 2.0]))


# --- The ideal model of a data set ---------------------------------------------------------------


@pytest.mark.parametrize("level", [0.01, 0.3, 1.0, 5.0, 80.0])
def test_the_empirical_denoiser_is_the_lectures_formula(digits, level):
    sigma = torch.full((4,), level, dtype=torch.float64)
    x = digits[:4] + level * torch.randn_like(digits[:4])
    expected = lecture_formula(x, sigma, digits[:60])
    assert torch.allclose(EmpiricalDenoiser(digits[:60])(x, sigma), expected, rtol=0, atol=1e-10)


def test_every_sample_has_its_own_level(digits):
    sigma = torch.logspace(-1, 1, 5).double()
    x = digits[:5] + torch.randn_like(digits[:5])
    expected = lecture_formula(x, sigma, digits[:40])
    assert torch.allclose(EmpiricalDenoiser(digits[:40])(x, sigma), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_the_chunk_does_not_matter(digits, chunk):
    sigma = torch.logspace(-1, 1, 7).double()
    x = digits[:7] + torch.randn_like(digits[:7])
    whole, cut = EmpiricalDenoiser(digits), EmpiricalDenoiser(digits, chunk=chunk)
    assert torch.allclose(cut(x, sigma), whole(x, sigma), rtol=0, atol=1e-12)


def test_single_precision_is_enough_at_every_level(digits):
    exact, single = EmpiricalDenoiser(digits), EmpiricalDenoiser(digits.float())
    for level in (0.002, 0.03, 0.1, 0.3, 1, 10, 80):
        # Between two images, where the softmax decides.
        x = (digits[:100] + digits[100:200]) / 2 + level * torch.randn_like(digits[:100])
        x = x.float().double()
        sigma = torch.full((100,), level)
        assert float((single(x.float(), sigma) - exact(x, sigma)).abs().max()) < 2e-4


def test_autocast_does_not_reach_the_closed_forms(digits):
    x, sigma = torch.randn(5, 1, 8, 8), torch.tensor([0.1, 0.5, 1, 5, 80])
    flat = GaussianMixtureDenoiser(digits[:5].float(), 0.3)
    for denoiser in (EmpiricalDenoiser(digits.float()), flat):
        plain = denoiser(x, sigma)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(denoiser(x, sigma), plain)


@pytest.mark.parametrize("solver", ["heun", "euler", "dpmpp_2m"])
def test_the_ideal_model_ends_on_its_data(digits, solver):
    # Each run ends on one data point, whatever the noise: the ideal model memorises.
    denoiser = EmpiricalDenoiser(digits)
    out = sample(denoiser, seeded_noise((1, 8, 8), range(16)).double(), steps=60, solver=solver)
    distance = torch.cdist(out.flatten(1), digits.flatten(1)).min(1)
    assert float(distance.values.max()) < 1e-3
    assert len(distance.indices.unique()) > 8


def test_the_ideal_model_knows_its_shape(digits):
    assert EmpiricalDenoiser(digits).image_shape == (1, 8, 8)
    assert EmpiricalDenoiser(digits)(digits[:0], torch.zeros(0)).shape == (0, 1, 8, 8)


# --- Gaussian mixtures ---------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.01, 0.3, 2.0, 50.0])
@pytest.mark.parametrize("shape", [(2,), (1, 2, 3)])
def test_the_mixtures_denoiser_is_tweedies_formula(level, shape):
    # D = x + sigma^2 grad log p_sigma(x)
    denoiser = mixture(shape)
    x = denoiser.means[[0, 1, 2, 0]] + level * torch.randn((4, *shape), dtype=torch.float64)
    sigma = torch.tensor([0.5, 0.8, 1.0, 2.0]).double() * level
    leaf = x.clone().requires_grad_(True)
    (score,) = torch.autograd.grad(denoiser.log_density(leaf, sigma).sum(), leaf)
    expected = x + sigma.view(-1, *[1] * len(shape)) ** 2 * score
    assert torch.allclose(denoiser(x, sigma), expected, rtol=1e-9, atol=1e-9)


def test_the_mixtures_density_is_the_sum_of_its_components():
    denoiser, sigma = mixture(), torch.tensor([0.7, 0.7], dtype=torch.float64)
    x = torch.randn(2, 2, dtype=torch.float64)
    total = 0
    for mean, std, weight in zip(denoiser.means, (0.1, 0.5, 1.2), (1, 3, 2), strict=True):
        cov = (std**2 + 0.7**2) * torch.eye(2, dtype=torch.float64)
        normal = torch.distributions.MultivariateNormal(mean, cov)
        total = total + weight / 6 * normal.log_prob(x).exp()
    assert torch.allclose(denoiser.log_density(x, sigma), total.log(), rtol=1e-9)


@pytest.mark.parametrize("level", [0.0, 0.2, 3.0])
def test_the_mixtures_density_integrates_to_one(level):
    denoiser = mixture((1,))
    x = torch.linspace(-40, 40, 80_001, dtype=torch.float64)
    density = denoiser.log_density(x[:, None], torch.full_like(x, level)).exp()
    assert float(torch.trapezoid(density, x)) == pytest.approx(1, abs=1e-6)


def test_draws_have_the_mixtures_moments():
    denoiser = mixture()
    x = denoiser.draw(100_000, torch.Generator().manual_seed(0))
    share = torch.tensor([1, 3, 2]).double() / 6
    mean = share @ denoiser.means
    second = share @ (denoiser.means**2 + denoiser.variance[:, None])
    assert torch.allclose(x.mean(0), mean, rtol=0, atol=0.03)
    assert torch.allclose(x.var(0), second - mean**2, rtol=0.03)
    again = denoiser.draw(100_000, torch.Generator().manual_seed(0))
    assert torch.equal(x, again) and x.dtype == torch.float64


def test_the_mixtures_run_ends_in_its_distribution():
    # Deterministic runs from many noises: shares, means and spreads of well separated modes.
    means = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2])
    denoiser = GaussianMixtureDenoiser(means, torch.tensor([0.2, 0.3, 0.4]), weights)
    noise = seeded_noise((20_000, 2), [0])[0].double()
    out = solve(denoiser, 80 * noise, karras_sigmas(60, 0.002, 80), solver="dpmpp_2m")
    nearest = torch.cdist(out, means).argmin(1)
    for k, std in enumerate((0.2, 0.3, 0.4)):
        mine = out[nearest == k]
        assert len(mine) / len(out) == pytest.approx(float(weights[k]), rel=0.05)
        assert torch.allclose(mine.mean(0), means[k], rtol=0, atol=0.02)
        assert float((mine - means[k]).std()) == pytest.approx(std, rel=0.05)


def test_far_away_and_at_huge_levels_nothing_overflows():
    denoiser = GaussianMixtureDenoiser(torch.randn(4, 2), 0.1)
    x = torch.randn(5, 2) * torch.tensor([1e-3, 1, 1e3, 1e5, 1e6])[:, None]
    for level in (1e-3, 1.0, 1e6):
        out = denoiser(x, torch.full((5,), level))
        assert out.isfinite().all()
    assert torch.allclose(out, denoiser.means.mean(0).expand(5, 2), atol=1e-4)
