import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from gaussian import MEAN, VARIANCE, Exact, Straight, exact_denoisers, flow_map

from lit_distill.diffusion import (
    SOLVERS,
    Denoiser,
    EvaluationCounter,
    FlowDenoiser,
    GaussianMixtureDenoiser,
    GuidedDenoiser,
    jump,
    karras_sigmas,
    noise_levels,
    sample,
    seeded_noise,
    solve,
)

ORDERS = {"euler": 1, "heun": 2, "dpm_2": 2, "dpmpp_2m": 2, "dpmpp_3m": 2, "ipndm": 2}
NFE = {solver: 35 if solver in ("heun", "dpm_2") else 18 for solver in SOLVERS}


def first_states(count=5, sigma_max=80.0):
    noise = seeded_noise((3,), range(count)).double()
    return MEAN + (VARIANCE + sigma_max**2) ** 0.5 * noise


def mixture():
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, -1.0]], dtype=torch.float64)
    return GaussianMixtureDenoiser(means, torch.tensor([0.3, 0.5, 0.4]))


def measured_order(error, counts):
    """Slope of the error over the step count, in logarithms, between neighbouring counts."""
    errors = [error(count) for count in counts]
    return [
        math.log(errors[i] / errors[i + 1]) / math.log(counts[i + 1] / counts[i])
        for i in range(len(counts) - 1)
    ]


# --- Truth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ORDERS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_measured_orders_on_gaussian_data(solver, per_sample):
    x = first_states()

    def error(count):
        sigmas = karras_sigmas(count + 1, 0.01, 80)[:-1]  # ends at sigma_min > 0
        truth = flow_map(x, 80, 0.01)
        if per_sample:
            sigmas = sigmas[:, None].expand(-1, len(x))
        return float((solve(Exact(), x, sigmas, solver=solver) - truth).abs().max())

    slopes = measured_order(error, [128, 256, 512, 1024])
    assert slopes == pytest.approx([ORDERS[solver]] * 3, abs=0.12)
    # A wrong limit would pass as slow convergence at first.
    assert error(512) < (2e-2 if solver == "euler" else 2e-4)


@pytest.mark.parametrize("solver", ORDERS)
def test_measured_orders_where_the_ode_is_not_linear(solver):
    denoiser = mixture()
    x = 10 * seeded_noise((2,), range(20)).double()
    truth = solve(denoiser, x, karras_sigmas(4001, 0.05, 10)[:-1], solver="heun")

    def error(count):
        sigmas = karras_sigmas(count + 1, 0.05, 10)[:-1]
        return float((solve(denoiser, x, sigmas, solver=solver) - truth).abs().mean())

    slopes = measured_order(error, [64, 128, 256])
    assert slopes == pytest.approx([ORDERS[solver]] * 2, abs=0.25)


def test_heun_is_of_order_two_in_the_flows_coordinate_from_pure_noise():
    # In the variance-exploding one its first step, from 1e6, would miss by more than 10.
    denoiser = FlowDenoiser(Straight())
    x = denoiser.start(seeded_noise((3,), range(5)).double())

    def error(count):
        sigmas = denoiser.schedule(torch.linspace(1, 0.1, count + 1))
        truth = flow_map(x, sigmas[0], sigmas[-1])
        return float((solve(denoiser, x, sigmas, solver="heun") - truth).abs().max())

    assert measured_order(error, [16, 32, 64]) == pytest.approx([2, 2], abs=0.15)
    assert error(64) < 1e-3
    guided = GuidedDenoiser(denoiser, 1)
    assert torch.equal(sample(guided, x, steps=4), sample(denoiser, x, steps=4))


def test_runs_of_float32_follow_those_of_float64():
    for name, denoiser in exact_denoisers().items():
        noise = seeded_noise((3,), range(5))
        for solver in ORDERS:
            single = sample(denoiser, noise, steps=20, solver=solver)
            double = sample(denoiser, noise.double(), steps=20, solver=solver)
            assert single.dtype == torch.float32
            assert torch.allclose(single.double(), double, rtol=0, atol=1e-4), (name, solver)


@pytest.mark.parametrize("name", exact_denoisers())
def test_devices_without_float64_are_served(name, monkeypatch):
    # Apple's GPUs, stood in for by the CPU.
    noise = seeded_noise((3,), range(5))
    expected = sample(exact_denoisers()[name], noise, steps=10)
    monkeypatch.setattr(noise_levels, "_precision", lambda device: torch.float32)
    denoiser, asked = exact_denoisers()[name], []
    if hasattr(denoiser, "table"):
        denoiser._near = denoiser.table.float()  # what moving it to such a device makes of it
    denoiser.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[1].dtype))
    assert torch.allclose(sample(denoiser, noise, steps=10), expected, rtol=0, atol=2e-4)
    assert set(asked) == {torch.float32}
    sigma = denoiser.schedule(torch.tensor([0.1, 0.5]))
    assert sigma.dtype == denoiser.loss_weight(sigma).dtype == torch.float32


# --- Jumps and grids -----------------------------------------------------------------------------


def test_a_jump_is_the_straight_line_to_the_denoising():
    x, x0 = torch.randn(2, 4, 3, dtype=torch.float64)
    sigma, to_sigma = torch.tensor([1.0, 2, 3, 4]).double(), torch.tensor([0.0, 1, 3, 8]).double()
    out = jump(x, x0, sigma, to_sigma)
    assert torch.equal(out[0], x0[0])  # to 0: the denoising itself
    assert torch.equal(out[2], x0[2] + (x[2] - x0[2]))  # nowhere
    slope = (x - x0) / sigma[:, None]  # Euler's step on dx/dsigma = (x - D) / sigma
    assert torch.allclose(out, x + (to_sigma - sigma)[:, None] * slope)


def test_jumps_of_exact_denoisings_compose():
    # Two jumps with one denoising are one jump.
    x, x0 = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64)
    level = [torch.full((5,), s, dtype=torch.float64) for s in (10.0, 3.0, 0.5)]
    twice = jump(jump(x, x0, level[0], level[1]), x0, level[1], level[2])
    assert torch.allclose(twice, jump(x, x0, level[0], level[2]))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_grid_for_each_sample_is_a_run_for_each_sample(solver):
    # One ends at 0 and one above it, which takes another branch in the same last step.
    denoiser, x = mixture(), 5 * seeded_noise((2,), range(3)).double()
    grids = [karras_sigmas(6, 0.01, 5), karras_sigmas(7, 0.1, 5)[:-1], karras_sigmas(6, 1, 4)]
    together = solve(denoiser, x, torch.stack(grids, 1), solver=solver)
    for i, grid in enumerate(grids):
        alone = solve(denoiser, x[i : i + 1], grid, solver=solver)
        assert torch.allclose(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_may_stop_before_the_others(solver):
    """It stays at its level while they go on, as in a batch of jumps of several lengths."""
    denoiser, x = mixture(), 5 * seeded_noise((2,), range(2)).double()
    long = karras_sigmas(6, 0.1, 5)[:-1]
    short = torch.cat([long[:3], long[2].expand(3)])
    together = solve(denoiser, x, torch.stack([long, short], 1), solver=solver)
    alone = (
        solve(denoiser, x[:1], long, solver=solver),
        solve(denoiser, x[1:], short[:3], solver=solver),
    )
    assert torch.allclose(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_last_step_to_zero_is_the_denoising(solver):
    denoiser, x = mixture(), torch.randn(4, 2, dtype=torch.float64)
    out = solve(denoiser, x, torch.tensor([0.5, 0.0]), solver=solver)
    assert torch.equal(out, denoiser(x, torch.full((4,), 0.5)))


def test_ddim_is_euler():
    assert SOLVERS["ddim"] is SOLVERS["euler"]


def test_the_ode_runs_backwards_too():
    x, sigmas = first_states(), karras_sigmas(200, 0.01, 80)[:-1]
    down = solve(Exact(), x, sigmas)
    up = solve(Exact(), down, sigmas.flip(0))
    assert torch.allclose(up, x, rtol=2e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_callback_sees_each_jumps_state_and_denoising(solver):
    denoiser, x, seen = mixture(), torch.randn(2, 2, dtype=torch.float64), []
    sigmas = karras_sigmas(5, 0.01, 5)
    solve(denoiser, x, sigmas, solver=solver, callback=lambda *state: seen.append(state))
    assert [i for i, _, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[0][1], x)
    for i, state, x0 in seen:
        assert torch.equal(x0, denoiser(state, sigmas[i].expand(2)))


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_condition_reaches_every_evaluation(solver):
    class Labelled(Denoiser):
        def forward(self, x, sigma, condition=None):
            return condition["label"][:, None].to(x.dtype).expand_as(x)

    label = torch.tensor([3, 5])
    x, grid = torch.randn(2, 2), karras_sigmas(4, 0.1, 5)
    out = solve(Labelled(), x, grid, solver=solver, condition={"label": label})
    assert out.tolist() == [[3, 3], [5, 5]]


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_reach_the_first_state(solver):
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    solve(mixture(), x, karras_sigmas(4, 0.1, 2), solver=solver).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and (x.grad != 0).any()


# --- What it costs -------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_are_counted_where_they_happen(solver):
    with EvaluationCounter(Exact()) as idle, EvaluationCounter(denoiser := Exact()) as counter:
        sample(denoiser, torch.randn(4, 2), steps=18, solver=solver)
    assert counter.calls == NFE[solver] and counter.samples == 4 * NFE[solver]
    assert idle.calls == 0
    sample(denoiser, torch.randn(4, 2), steps=18, solver=solver)
    assert counter.calls == NFE[solver]  # closed


def test_counters_do_not_count_twice_for_wrapped_models():
    guided = GuidedDenoiser(Exact())
    with EvaluationCounter(guided) as outer, EvaluationCounter(guided.denoiser) as inner:
        sample(guided, torch.randn(2, 2), steps=3, solver="heun")
    assert outer.calls == inner.calls == 5


def test_a_counter_can_be_told_when_to_count():
    denoiser = Exact().train()
    with EvaluationCounter(denoiser, when=lambda: denoiser.training) as counter:
        sample(denoiser, torch.randn(2, 2), steps=2, solver="euler")
        sample(denoiser.eval(), torch.randn(2, 2), steps=2, solver="euler")
    assert counter.calls == 2


def test_compiled_models_are_counted():
    denoiser = Exact()
    denoiser.compile(backend="eager")
    sample(denoiser, torch.randn(2, 2), steps=3, solver="euler")
    with EvaluationCounter(denoiser) as counter:
        sample(denoiser, torch.randn(2, 2), steps=3, solver="euler")
    assert counter.calls == 3


# --- Bad input -----------------------------------------------------------------------------------


def test_an_unknown_solver_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"solver='rk4'.*euler.*heun.*dpmpp_2m"):
        solve(Exact(), torch.randn(1, 2), karras_sigmas(2, 0.1, 1), solver="rk4")


@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (3, 2, 2)])
def test_what_is_no_grid_is_refused(shape):
    with pytest.raises(ValueError, match="no grid for a batch of 2"):
        solve(Exact(), torch.randn(2, 2), torch.ones(shape))


def test_a_grid_that_touches_zero_before_its_end_is_refused():
    with pytest.raises(ValueError, match="only the last level"):
        solve(Exact(), torch.randn(2, 2), torch.tensor([1.0, 0.0, 0.0]))
