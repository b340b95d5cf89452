import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor

from lit_distill.diffusion import (
    LogNormalSigma,
    LogUniformSigma,
    RhoUniformSigma,
    karras_sigmas,
    linear_betas,
    refined,
    rho_levels,
    seeded_noise,
    sigma_to_timestep,
    sigmas_from_alphas_cumprod,
    timestep_to_sigma,
    trailing_timesteps,
)


def table_of(betas):
    return sigmas_from_alphas_cumprod((1 - betas).cumprod(0))


@pytest.mark.parametrize("num_steps", [2, 5, 18])
def test_karras_grid_is_the_papers_formula(num_steps):
    low, high, rho = 0.002, 80.0, 7
    grid = karras_sigmas(num_steps, low, high)
    assert grid.dtype == torch.float64 and grid.shape == (num_steps + 1,)
    for i in range(num_steps):
        root = high ** (1 / rho) + i / (num_steps - 1) * (low ** (1 / rho) - high ** (1 / rho))
        assert float(grid[i]) == pytest.approx(root**rho, rel=1e-12)
    assert float(grid[0]) == pytest.approx(high) and float(grid[-2]) == pytest.approx(low)
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_karras_grid_of_one_jump_goes_straight_to_the_data():
    assert karras_sigmas(1, 0.002, 80).tolist() == pytest.approx([80, 0])


def test_rho_of_one_is_linear():
    assert karras_sigmas(3, 1, 3, rho=1).tolist() == pytest.approx([3, 2, 1, 0])


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("end", [0.006, 0.0])
def test_a_refined_grid_keeps_the_nodes_and_the_spacing(parts, end):
    nodes = torch.tensor([80.0, 7.3, 0.4, end], dtype=torch.float64)
    grid = refined(nodes, parts)
    assert grid.dtype == torch.float64 and len(grid) == 3 * parts + 1
    assert torch.equal(grid[::parts], nodes)  # exactly
    roots = (grid ** (1 / 7)).unfold(0, parts + 1, parts).diff(dim=1)
    assert torch.allclose(roots, roots.mean(1, keepdim=True).expand_as(roots), rtol=1e-9)
    assert refined(nodes, parts, rho=1)[1] == pytest.approx(80 - 72.7 / parts)


def test_a_refined_karras_grid_is_a_finer_one():
    coarse, fine = karras_sigmas(4, 0.006, 80)[:-1], karras_sigmas(10, 0.006, 80)[:-1]
    assert torch.allclose(refined(coarse, 3), fine, rtol=1e-12)


def test_a_jump_cut_into_nothing_is_refused():
    with pytest.raises(ValueError, match="cut into 0 parts"):
        refined(torch.tensor([1.0, 0.5]), 0)


def test_rho_levels_meet_their_ends_and_keep_the_shape():
    u = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    levels = rho_levels(u, 0.01, 50)
    assert levels.shape == u.shape and levels.dtype == torch.float64
    assert float(levels[0, 0]) == pytest.approx(0.01) and float(levels[0, 1]) == pytest.approx(50)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((0, 0.002, 80), "steps=0"), ((4, 0, 80), "sigma_min=0"), ((4, 2, 1), "sigma_max=1")],
)
def test_impossible_grids_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        karras_sigmas(*arguments)


@pytest.mark.parametrize(
    ("start", "end", "length", "sigma_max"),
    [(1e-4, 2e-2, 1000, 157.4), (1e-4, 2e-2, 400, 7.5), (1e-4, 1e-2, 1000, 12.6)],
)
def test_known_tables_end_where_they_are_known_to(start, end, length, sigma_max):
    table = table_of(linear_betas(length, start, end))
    assert table.shape == (length,) and (table.diff() > 0).all()
    assert float(table[-1]) == pytest.approx(sigma_max, rel=0.01)


def test_linear_betas_are_diffusers():
    stock = DDPMScheduler()
    assert torch.allclose(linear_betas(), stock.betas.double(), rtol=0, atol=3e-9)
    expected = ((1 - stock.alphas_cumprod) / stock.alphas_cumprod).sqrt().double()
    assert torch.allclose(table_of(linear_betas()), expected, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_levels_of_the_table_have_their_own_integer_times(dtype):
    table = table_of(linear_betas())
    assert torch.equal(sigma_to_timestep(table.to(dtype), table), torch.arange(1000.0).double())


def test_times_and_levels_are_each_others_inverse():
    table = table_of(linear_betas(400))
    times = torch.linspace(0, 399, 777, dtype=torch.float64).reshape(7, 111)
    sigma = timestep_to_sigma(times, table)
    assert sigma.shape == times.shape
    assert torch.allclose(sigma_to_timestep(sigma, table), times, rtol=0, atol=1e-3)
    assert torch.allclose(timestep_to_sigma(sigma_to_timestep(sigma, table), table), sigma, 1e-4)
    assert (timestep_to_sigma(times.flatten(), table).diff() > 0).all()
    assert torch.equal(timestep_to_sigma(torch.arange(400), table), table.log().exp())


def test_what_lies_outside_the_table_gets_its_ends():
    table = table_of(linear_betas(400))
    assert sigma_to_timestep(torch.tensor([1e-9, 1e9]), table).tolist() == [0, 399]
    outside = timestep_to_sigma(torch.tensor([-3.0, 1e4]), table)
    assert torch.allclose(outside, table[[0, -1]])


def test_zero_terminal_snr_gets_a_finite_level():
    stock = DDPMScheduler(rescale_betas_zero_snr=True)
    table = table_of(stock.betas.double())
    assert table.isfinite().all() and (table.diff() > 0).all()
    assert float(table[-1]) > 1e4


@pytest.mark.parametrize("length", [1000, 400])
def test_trailing_times_are_diffusers(length):
    stock = DDIMScheduler(num_train_timesteps=length, timestep_spacing="trailing")
    for steps in (n for n in range(1, length + 1) if length % n == 0):
        stock.set_timesteps(steps)
        assert torch.equal(trailing_timesteps(steps, length), stock.timesteps)


def test_trailing_times_start_at_the_end_for_any_count():
    # Where the count does not divide, diffusers at times asks once too often (62 for 61).
    for steps in range(1, 401):
        times = trailing_timesteps(steps, 400)
        assert len(times) == steps and times[0] == 399 and times[-1] >= 0
        assert (times.diff() < 0).all()


@pytest.mark.parametrize("steps", [0, -1, 401])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps={steps}"):
        trailing_timesteps(steps, 400)


def test_log_normal_levels_have_the_right_quantiles():
    u = torch.tensor([0.158655, 0.5, 0.841345, 0.977250])
    levels = LogNormalSigma(mean=-1.2, std=1.2)(u)
    expected = torch.tensor([-1.0, 0.0, 1.0, 2.0]).double() * 1.2 - 1.2
    assert torch.allclose(levels.log(), expected, rtol=0, atol=1e-4)


def test_log_uniform_levels_have_the_right_quantiles():
    levels = LogUniformSigma(0.01, 100)(torch.tensor([0.0, 0.25, 0.5, 1.0]))
    assert levels.tolist() == pytest.approx([0.01, 0.1, 1, 100], rel=1e-6)


def test_rho_uniform_levels_are_those_of_the_grid():
    nodes = RhoUniformSigma(0.002, 80)(torch.linspace(1, 0, 18, dtype=torch.float64))
    assert torch.equal(nodes, karras_sigmas(18, 0.002, 80)[:-1])


@pytest.mark.parametrize(
    "distribution", [LogNormalSigma(), LogUniformSigma(0.002, 80), RhoUniformSigma(0.002, 80)]
)
def test_drawn_levels_are_positive_and_finite_even_at_the_ends(distribution):
    u = torch.cat([torch.tensor([0.0, 1 - 2**-24]), torch.rand(1000)])
    levels = distribution(u)
    assert levels.dtype == torch.float64 and levels.shape == u.shape
    assert levels.isfinite().all() and (levels > 0).all()
    assert float(distribution(torch.tensor(0.2))) < float(distribution(torch.tensor(0.3)))


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 32, 32)])
def test_seeded_noise_is_what_stock_pipelines_draw(shape):
    seeds = [5, 6, 2**40]
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    expected = randn_tensor((3, *shape), generator=generators)
    assert torch.equal(seeded_noise(shape, seeds), expected)


def test_seeded_noise_of_an_image_does_not_depend_on_its_batch():
    assert torch.equal(seeded_noise((2,), range(9))[4:6], seeded_noise((2,), [4, 5]))
    assert seeded_noise((3, 4), []).shape == (0, 3, 4)


def test_seeded_noise_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    noise = seeded_noise((1000,), range(10))
    assert torch.equal(torch.rand(3), expected)
    assert abs(float(noise.std()) - 1) < 5 / math.sqrt(2 * 10_000)
