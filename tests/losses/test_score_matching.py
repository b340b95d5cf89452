import math

import numpy as np
import pytest
import torch
from torch import nn

from lit_distill.diffusion import (
    Denoiser,
    EDMDenoiser,
    EpsilonDenoiser,
    FlowDenoiser,
    GaussianMixtureDenoiser,
    VelocityDenoiser,
)
from lit_distill.losses import denoising_loss, distribution_matching, surrogate_loss

A, B = 0.7, 0.4  # the generator: x = a + b z
C, D = -0.2, 0.9  # the data: N(c, d^2)


def gaussian(mean, std):
    means = torch.tensor([[float(mean)]], dtype=torch.float64)
    return GaussianMixtureDenoiser(means, float(std))


def normal_nodes(count):
    """Nodes and weights of the expectation over two independent standard normals."""
    node, weight = np.polynomial.hermite_e.hermegauss(count)
    node, weight = torch.tensor(node), torch.tensor(weight / math.sqrt(2 * math.pi))
    z, noise = torch.meshgrid(node, node, indexing="ij")
    return z.reshape(-1, 1), noise.reshape(-1, 1), torch.outer(weight, weight).flatten()


def generator_gradient(real, level, nodes, **options):
    """The gradient in (a, b) that the loss gives, its expectation taken by quadrature."""
    a = torch.tensor(A, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(B, dtype=torch.float64, requires_grad=True)
    z, noise, weight = nodes
    x = a + b * z
    sigma = torch.full((len(z),), level, dtype=torch.float64)
    found = distribution_matching(x, sigma, noise, real, gaussian(A, B), **options)
    (surrogate_loss(x, found.gradient) * weight).sum().backward()
    return torch.stack([a.grad, b.grad])


# --- Truth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.05, 0.5, 3.0, 40.0])
def test_without_normaliser_it_is_the_gradient_of_the_kl_divergence(level):
    # KL(N(a, b^2 + s^2) || N(c, d^2 + s^2)), times s^2
    a = torch.tensor(A, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(B, dtype=torch.float64, requires_grad=True)
    fake, real = b**2 + level**2, D**2 + level**2
    divergence = 0.5 * (fake / real + (a - C) ** 2 / real - 1 - (fake / real).log())
    (level**2 * divergence).backward()
    expected = torch.stack([a.grad, b.grad])
    by_hand = [level**2 * (A - C) / real, level**2 * (B / real - B / fake.item())]
    assert expected.tolist() == pytest.approx(by_hand, rel=1e-9)
    found = generator_gradient(gaussian(C, D), level, normal_nodes(8), normalise=False)
    assert torch.allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("level", [0.3, 1.0, 5.0])
def test_it_is_that_gradient_for_data_of_several_modes_too(level):
    means = torch.tensor([[-1.0], [1.5]], dtype=torch.float64)
    real = GaussianMixtureDenoiser(means, torch.tensor([0.4, 0.6]), torch.tensor([2.0, 1.0]))
    a = torch.tensor(A, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(B, dtype=torch.float64, requires_grad=True)
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64) * (1 + level)
    std = (b**2 + level**2).sqrt()
    log_fake = -0.5 * ((x - a) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    log_real = real.log_density(x[:, None], torch.full_like(x, level))
    (level**2 * torch.trapezoid(log_fake.exp() * (log_fake - log_real), x)).backward()
    found = generator_gradient(real, level, normal_nodes(60), normalise=False)
    assert torch.allclose(found, torch.stack([a.grad, b.grad]), rtol=1e-4, atol=1e-6)


def test_nothing_pulls_where_the_two_agree():
    z, noise, _ = normal_nodes(5)
    sigma = torch.full((len(z),), 0.7, dtype=torch.float64)
    found = distribution_matching(A + B * z, sigma, noise, gaussian(A, B), gaussian(A, B))
    assert torch.equal(found.gradient, torch.zeros_like(z))


def test_the_normaliser_keeps_each_samples_direction():
    torch.manual_seed(0)
    means = torch.randn(3, 2, 2, dtype=torch.float64)
    real, fake = GaussianMixtureDenoiser(means, 0.3), GaussianMixtureDenoiser(means + 0.4, 0.5)
    x, noise = torch.randn(2, 50, 2, 2, dtype=torch.float64)
    sigma = torch.logspace(-1, 1, 50).double()
    plain = distribution_matching(x, sigma, noise, real, fake, normalise=False)
    scaled = distribution_matching(x, sigma, noise, real, fake)
    assert torch.equal(plain.gradient, plain.fake - plain.real)
    assert torch.equal(plain.weight, torch.ones(50))
    divisor = (x - real(x + sigma.view(-1, 1, 1) * noise, sigma)).abs().mean((1, 2))
    assert torch.allclose(scaled.weight, 1 / divisor)
    assert torch.allclose(scaled.gradient, plain.gradient / divisor.view(-1, 1, 1))


def test_the_divisor_has_a_floor():
    class Identity(Denoiser):
        def forward(self, x, sigma, condition=None):
            return x

    x = torch.randn(3, 2)
    found = distribution_matching(
        x, torch.zeros(3), torch.randn(3, 2), Identity(), Identity(), floor=0.01
    )
    assert torch.allclose(found.weight, torch.full((3,), 100.0))
    assert found.gradient.isfinite().all()


# --- What is returned ----------------------------------------------------------------------------


def test_nothing_carries_a_graph_and_both_scores_see_the_same():
    class Asked(Denoiser):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, x, sigma, condition=None):
            self.seen = (x, sigma, condition)
            return self.scale * x

    real, fake = Asked(), Asked()
    x = torch.randn(4, 1, 2, 2, requires_grad=True)
    label, sigma, noise = torch.arange(4), torch.rand(4).double(), torch.randn(4, 1, 2, 2)
    found = distribution_matching(x, sigma, noise, real, fake, label)
    assert not any(part.requires_grad for part in found)
    assert all(part.dtype == torch.float32 for part in found)
    assert real.seen[0] is fake.seen[0] and real.seen[2] is label and fake.seen[2] is label
    assert torch.allclose(found.noisy, x.detach() + sigma.view(-1, 1, 1, 1).float() * noise)
    assert found.weight.shape == (4,) and found.gradient.shape == x.shape


def test_the_surrogates_gradient_is_the_gradient():
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = surrogate_loss(x, gradient)
    assert loss.shape == (3,)
    assert torch.allclose(loss, 0.5 * gradient.square().mean((1, 2, 3)))
    loss.sum().backward()
    assert torch.allclose(x.grad, gradient.detach() / 16)
    assert gradient.grad is None


# --- Denoising score matching --------------------------------------------------------------------


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x, time, condition=None):
        self.prediction = self.weight * x + 0.1
        return self.prediction


@pytest.mark.parametrize("kind", [EpsilonDenoiser, VelocityDenoiser, FlowDenoiser])
def test_denoising_loss_is_the_networks_plain_mean_squared_error(kind):
    denoiser = kind(Linear())
    x0, noise = torch.randn(2, 6, 1, 3, 3, dtype=torch.float64)
    sigma = torch.tensor([0.1, 0.5, 1, 2, 10, 50]).double()
    loss = denoising_loss(denoiser, x0, sigma, noise)
    s = sigma.view(-1, 1, 1, 1)
    target = {
        EpsilonDenoiser: noise,
        VelocityDenoiser: (noise - s * x0) / (1 + s**2).sqrt(),
        FlowDenoiser: noise - x0,
    }[kind]
    own = (denoiser.network.prediction - target).square().mean((1, 2, 3))
    assert loss.shape == (6,) and torch.allclose(loss, own, rtol=1e-6)
    (found,) = torch.autograd.grad(loss.sum(), denoiser.network.weight, retain_graph=True)
    (expected,) = torch.autograd.grad(own.sum(), denoiser.network.weight)
    assert torch.allclose(found, expected, rtol=1e-6)


def test_denoising_loss_of_edm_is_equation_8():
    denoiser = EDMDenoiser(Linear(), sigma_data=0.6)
    x0, noise = torch.randn(2, 5, 4, dtype=torch.float64)
    sigma = torch.logspace(-2, 1.5, 5).double()
    loss = denoising_loss(denoiser, x0, sigma, noise)
    s, sd = sigma[:, None], 0.6
    noisy, total = x0 + s * noise, s**2 + sd**2
    target = (x0 - sd**2 / total * noisy) * total.sqrt() / (s * sd)
    own = (denoiser.network(noisy / total.sqrt(), sigma) - target).square().mean(1)
    assert torch.allclose(loss, own, rtol=1e-6)


def test_no_denoiser_has_a_smaller_loss_than_the_exact_one():
    # The minimum of denoising score matching is the posterior mean.
    class Off(Denoiser):
        def __init__(self, exact, shift, stretch):
            super().__init__()
            self.exact, self.shift, self.stretch = exact, shift, stretch

        def forward(self, x, sigma, condition=None):
            return self.stretch * self.exact(x, sigma) + self.shift

    z, noise, weight = normal_nodes(12)
    exact, sigma = gaussian(C, D), torch.full((len(z),), 0.8, dtype=torch.float64)

    def expected_loss(shift, stretch):
        loss = denoising_loss(Off(exact, shift, stretch), C + D * z, sigma, noise)
        return float((weight * loss).sum())

    best = expected_loss(0.0, 1.0)
    posterior = D**2 * 0.64 / (D**2 + 0.64)
    assert best == pytest.approx(posterior / 0.64, rel=1e-9)
    for shift, stretch in ((0.05, 1), (-0.05, 1), (0, 1.05), (0, 0.95)):
        assert expected_loss(shift, stretch) > best


def test_the_loss_keeps_the_samples_dtype_and_passes_the_condition():
    class Asked(Denoiser):
        def forward(self, x, sigma, condition=None):
            self.condition = condition
            return 0.5 * x

    asked, label = Asked(), torch.tensor([1, 2])
    loss = denoising_loss(
        asked, torch.randn(2, 3), torch.rand(2, dtype=torch.float64), torch.randn(2, 3), label
    )
    assert loss.dtype == torch.float32 and asked.condition is label
