"""The straight path, velocities and straightness against closed forms."""

import pytest
import torch
from torch import nn

from lit_distill.diffusion import (
    EpsilonDenoiser,
    FlowDenoiser,
    GaussianMixtureDenoiser,
    on_path,
    sample,
    straightness,
    velocity,
)
from lit_distill.losses import denoising_loss, flow_matching_loss


class Network(nn.Module):
    """A smooth function of its state and both times."""

    inputs = ("to_sigma",)

    def forward(self, x, time, condition):
        return torch.sin(x + time[:, None]) + condition["to_sigma"][:, None]


def gaussian(mean=0.0, std=0.5):
    means = torch.full((1, 2), mean, dtype=torch.float64)
    return GaussianMixtureDenoiser(means, std, sigma_min=1e-6, sigma_max=1e6)


def test_velocity_of_gaussian_data_is_the_exact_one():
    mean, std = 0.3, 0.5
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    x = torch.randn(7, 2, dtype=torch.float64)
    # E[noise - x0 | x_t] of jointly Gaussian variables
    a, b = (1 - t)[:, None], t[:, None]
    gain = (b - a * std**2) / (a**2 * std**2 + b**2)
    exact = -mean + gain * (x - a * mean)
    torch.testing.assert_close(velocity(gaussian(mean, std), x, t), exact)


def test_a_flow_is_asked_as_it_is_and_agrees_with_its_denoiser():
    flow = FlowDenoiser(Network(), time_scale=1.0)
    x, t = torch.randn(5, 2), torch.tensor([0.1, 0.3, 0.5, 0.9, 1.0])
    u = velocity(flow, x, t)
    torch.testing.assert_close(u, torch.sin(x + t[:, None]) + t[:, None])
    sigma = torch.where(t < 1, t / (1 - t), 1e6)
    x0 = flow(x * (1 + sigma[:, None]), sigma)
    torch.testing.assert_close(x - t[:, None] * u, x0, rtol=1e-4, atol=1e-5)
    end = torch.zeros(5)
    torch.testing.assert_close(flow.velocity(x, t, None, end), torch.sin(x + t[:, None]))


def test_the_loss_is_the_flows_own_denoising_loss():
    flow = FlowDenoiser(Network(), time_scale=1.0)
    x0, noise, t = torch.randn(6, 2), torch.randn(6, 2), torch.linspace(0.1, 0.9, 6)
    expected = denoising_loss(flow, x0, t / (1 - t), noise)
    torch.testing.assert_close(flow_matching_loss(flow, x0, noise, t), expected)


def test_path_and_ends():
    x0, noise = torch.randn(3, 2), torch.randn(3, 2)
    found = on_path(x0, noise, torch.tensor([0.0, 0.25, 1.0]))
    expected = torch.stack([x0[0], 0.75 * x0[1] + 0.25 * noise[1], noise[2]])
    torch.testing.assert_close(found, expected)


def test_one_point_has_straight_trajectories_and_two_have_not():
    noise = torch.randn(64, 2, dtype=torch.float64)
    point = GaussianMixtureDenoiser(torch.ones(1, 2).double(), 1e-6, sigma_max=1e6)
    assert straightness(point, noise, steps=8).max() < 1e-9
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    two = GaussianMixtureDenoiser(means, 0.1, sigma_min=1e-6, sigma_max=1e6)
    curved = straightness(two, noise, steps=64).mean()
    assert curved > 0.1
    # It converges with the steps, so it is a property of the model.
    assert abs(straightness(two, noise, steps=256).mean() / curved - 1) < 0.05


def test_its_trajectory_is_the_models_own():
    """Straightness is the variance of the velocities around noise minus the end."""
    model, noise = gaussian(0.3), torch.randn(16, 2, dtype=torch.float64)
    x, seen = noise, []
    for i in range(20):
        t = torch.full((16,), 1 - i / 20, dtype=torch.float64)
        seen.append(velocity(model, x, t))
        x = x - seen[-1] / 20
    expected = (torch.stack(seen) - (noise - x)).square().mean((0, 2))
    torch.testing.assert_close(straightness(model, noise), expected, rtol=1e-4, atol=1e-9)
    exact = sample(model, noise, steps=2_000, solver="heun")
    assert (x - exact).abs().max() < 0.1


def test_a_model_that_knows_no_pure_noise_is_asked_at_its_largest_level():
    class Ask(nn.Module):
        def forward(self, x, time, condition):
            self.seen = x, time
            return torch.zeros_like(x)

    model = EpsilonDenoiser(Ask())
    noise = torch.randn(2, 3)
    velocity(model, noise, torch.ones(2))
    x, time = model.network.seen
    assert time.tolist() == [999.0, 999.0]
    torch.testing.assert_close(x, noise, rtol=1e-4, atol=1e-4)  # unit noise is its first state


def test_no_step_is_no_trajectory():
    with pytest.raises(ValueError, match="steps=0"):
        straightness(gaussian(), torch.zeros(1, 2), steps=0)
