"""Solvers against diffusers' schedulers of the same name, on the same grid."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    KDPM2DiscreteScheduler,
)
from torch import nn

from lit_distill.diffusion import (
    EDMDenoiser,
    EpsilonDenoiser,
    FlowDenoiser,
    GaussianMixtureDenoiser,
    VelocityDenoiser,
    karras_sigmas,
    sigmas_from_alphas_cumprod,
    solve,
    timestep_to_sigma,
)

NOISE = torch.randn((6, 3, 2, 2), generator=torch.Generator().manual_seed(0))


class Smooth(nn.Module):
    """A smooth network of input and time, with no exact solution."""

    def __init__(self, period: float) -> None:
        super().__init__()
        self.period = period

    def forward(self, x, time, condition=None):
        phase = (time / self.period).reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        return 0.6 * (1.5 * x + phase).sin() + 0.3 * x.flip(1) + 0.1


class Diffused(nn.Module):
    """The noise, or v, of a Gaussian mixture at the times of a DDPM table."""

    def __init__(self, betas: torch.Tensor, velocity: bool = False) -> None:
        super().__init__()
        self.table = sigmas_from_alphas_cumprod((1 - betas.double()).cumprod(0))
        means = torch.tensor([[-0.8, 0.1, 0.5], [0.7, -0.4, 0.0], [0.0, 0.9, -0.9]])
        self.exact = GaussianMixtureDenoiser(
            means[:, :, None, None].expand(3, 3, 2, 2).contiguous().double(),
            torch.tensor([0.2, 0.3, 0.4]),
        )
        self.velocity = velocity

    def forward(self, x, time, condition=None):
        sigma = timestep_to_sigma(time, self.table)
        s = sigma.view(-1, 1, 1, 1)
        noisy = x.double() * (1 + s**2).sqrt()
        x0 = self.exact(noisy, sigma)
        noise = (noisy - x0) / s
        return ((noise - s * x0) / (1 + s**2).sqrt() if self.velocity else noise).to(x.dtype)


def run(scheduler, network, x):
    """The loop of diffusers' pipelines."""
    for time in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, time)
        x = scheduler.step(network(scaled, time.expand(len(x))), time, x).prev_sample
    return x


def grid_of(scheduler):
    """The levels of a scheduler's run, each of them once."""
    return torch.unique_consecutive(scheduler.sigmas).double()


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("kind", [EpsilonDenoiser, VelocityDenoiser])
def test_ddim_is_diffusers_ddim(steps, kind):
    prediction = "epsilon" if kind is EpsilonDenoiser else "v_prediction"
    scheduler = DDIMScheduler(
        timestep_spacing="trailing", clip_sample=False, prediction_type=prediction
    )
    scheduler.set_timesteps(steps)
    network = Diffused(scheduler.betas, velocity=kind is VelocityDenoiser)
    denoiser = kind(network, betas=scheduler.betas)
    expected = run(scheduler, denoiser.network, NOISE)
    out = solve(denoiser, denoiser.start(NOISE), denoiser.sigmas(steps), solver="ddim")
    assert torch.allclose(out, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [2, 10, 30])
@pytest.mark.parametrize("karras", [True, False])
def test_heun_is_diffusers_heun(steps, karras):
    scheduler = HeunDiscreteScheduler(
        beta_start=1e-4, beta_end=2e-2, use_karras_sigmas=karras, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    denoiser = EpsilonDenoiser(Diffused(scheduler.betas), betas=scheduler.betas)
    x = denoiser.start(NOISE)
    grid = grid_of(scheduler)
    if karras:
        assert torch.allclose(grid, karras_sigmas(steps, grid[-2], grid[0]), rtol=1e-5)
    expected = run(scheduler, denoiser.network, x)
    out = solve(denoiser, x, grid, solver="heun")
    # Off the table's nodes the two interpolate times alike, up to float32.
    assert torch.allclose(out, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [2, 10, 30])
def test_dpmpp_2m_is_diffusers_on_ddpm_levels(steps):
    scheduler = DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=2e-2, use_karras_sigmas=True, final_sigmas_type="zero"
    )
    assert scheduler.config.algorithm_type == "dpmsolver++"
    assert (scheduler.config.solver_order, scheduler.config.solver_type) == (2, "midpoint")
    scheduler.set_timesteps(steps)
    grid = grid_of(scheduler)
    denoiser = EpsilonDenoiser(Diffused(scheduler.betas), betas=scheduler.betas)
    # This scheduler rounds the times that it asks its network at.
    asked = iter(scheduler.timesteps.tolist())
    denoiser.time = lambda sigma: torch.full_like(sigma, next(asked))
    expected = run(scheduler, denoiser.network, NOISE)
    out = solve(denoiser, (1 + grid[0] ** 2).sqrt().float() * NOISE, grid, solver="dpmpp_2m")
    assert torch.allclose(out, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [2, 10, 30])
def test_dpm_2_is_diffusers(steps):
    scheduler = KDPM2DiscreteScheduler(beta_start=1e-4, beta_end=2e-2, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    denoiser = EpsilonDenoiser(Diffused(scheduler.betas), betas=scheduler.betas)
    x, grid = denoiser.start(NOISE), grid_of(scheduler)
    assert len(grid) == steps + 1 and grid[-1] == 0
    expected = run(scheduler, denoiser.network, x)
    out = solve(denoiser, x, grid, solver="dpm_2")
    assert torch.allclose(out, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [2, 3, 10, 30])
def test_dpmpp_3m_is_diffusers_on_edm_levels(steps):
    scheduler = EDMDPMSolverMultistepScheduler(solver_order=3, lower_order_final=False)
    scheduler.set_timesteps(steps)
    denoiser = EDMDenoiser(Smooth(1), time_scale=1)
    x = denoiser.start(NOISE)
    expected = run(scheduler, denoiser.network, x)
    out = solve(denoiser, x, scheduler.sigmas, solver="dpmpp_3m")
    assert torch.allclose(out, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [3, 10, 30])
def test_dpmpp_3m_is_diffusers_on_ddpm_levels(steps):
    scheduler = DPMSolverMultistepScheduler(
        beta_start=1e-4,
        beta_end=2e-2,
        solver_order=3,
        algorithm_type="dpmsolver++",
        lower_order_final=False,  # here only the step to 0 is of lower order
        use_karras_sigmas=True,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(steps)
    grid = grid_of(scheduler)
    denoiser = EpsilonDenoiser(Diffused(scheduler.betas), betas=scheduler.betas)
    asked = iter(scheduler.timesteps.tolist())  # rounded
    denoiser.time = lambda sigma: torch.full_like(sigma, next(asked))
    expected = run(scheduler, denoiser.network, NOISE)
    out = solve(denoiser, (1 + grid[0] ** 2).sqrt().float() * NOISE, grid, solver="dpmpp_3m")
    assert torch.allclose(out, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [2, 3, 4, 10, 30])
def test_ipndm_is_diffusers(steps):
    denoiser = EDMDenoiser(Smooth(1), time_scale=1)
    grid = karras_sigmas(steps + 1, 0.01, 80)[:-1]
    scheduler = IPNDMScheduler()
    scheduler.set_timesteps(steps)
    # In the variance-exploding coordinate its slope is betas * x + alphas * output.
    scheduler.betas, scheduler.alphas = grid, torch.ones_like(grid)
    expected = x = denoiser.start(NOISE.double())
    for i, time in enumerate(scheduler.timesteps):
        slope = (expected - denoiser(expected, grid[i].expand(len(x)))) / grid[i]
        output = slope - grid[i] * expected
        expected = scheduler.step(output, time, expected).prev_sample
    out = solve(denoiser, x, grid, solver="ipndm")
    assert torch.allclose(out, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [2, 8, 20])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler"])
def test_solvers_are_diffusers_on_edm_levels(steps, solver):
    kind = EDMDPMSolverMultistepScheduler if solver == "dpmpp_2m" else EDMEulerScheduler
    scheduler = kind()
    scheduler.set_timesteps(steps)
    denoiser = EDMDenoiser(Smooth(1), time_scale=1)
    grid = denoiser.sigmas(steps)
    assert torch.allclose(grid.float(), scheduler.sigmas, rtol=1e-4)
    x = denoiser.start(NOISE)
    expected = run(scheduler, denoiser.network, x)
    out = solve(denoiser, x, scheduler.sigmas, solver=solver)
    assert torch.allclose(out, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [2, 10])
@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_solvers_are_diffusers_on_a_flow(steps, solver):
    kind = FlowMatchHeunDiscreteScheduler if solver == "heun" else FlowMatchEulerDiscreteScheduler
    scheduler = kind()
    scheduler.set_timesteps(steps)
    denoiser = FlowDenoiser(Smooth(1000))
    x = NOISE
    for time in scheduler.timesteps:
        x = scheduler.step(denoiser.network(x, time.expand(len(x))), time, x).prev_sample
    t = grid_of(scheduler)
    grid = (t / (1 - t)).clamp(max=denoiser.sigma_max)
    out = solve(denoiser, denoiser.start(NOISE), grid, solver=solver)
    assert torch.allclose(out, x, rtol=0, atol=1e-4)
