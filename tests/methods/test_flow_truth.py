"""Flows against the truth: closed forms of Gaussian data, and curved flows made straight."""

from functools import partial

import pytest
import torch
from plane import Perceptron, Points, falling
from tiny import trainer

from lit_distill.diffusion import (
    FlowDenoiser,
    GaussianMixtureDenoiser,
    LogNormalSigma,
    sample,
    straightness,
    velocity,
)
from lit_distill.methods import FlowDistillation, MeanFlow, RectifiedFlow, Reflow
from lit_distill.methods.mean_flow import total_derivative

MEANS = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])
SPREAD = 0.3


def two_gaussians():
    return GaussianMixtureDenoiser(MEANS, SPREAD, sigma_min=1e-3, sigma_max=1e6)


def new_flow(width=128):
    torch.manual_seed(0)
    return FlowDenoiser(Perceptron(width), time_scale=1.0)


def fitted(module, data, updates, folder):
    trainer(folder, max_steps=updates, limit_val_batches=0).fit(module, data)
    return module


def options(updates, rate=2e-3):
    adam = partial(torch.optim.Adam, lr=rate)
    return {"optimizer": adam, "lr_scheduler": falling(updates), "ema_decay": 0.99}


def distance(a, b):
    return (a - b).square().sum(1).mean().sqrt()


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """A rectified flow from noise to two Gaussians, by its training."""
    torch.manual_seed(0)
    points = Points(512, image=two_gaussians().draw(20_000))
    module = RectifiedFlow(new_flow(), **options(800))
    return fitted(module, points, 800, tmp_path_factory.mktemp("flow")).network


def test_the_flow_has_the_velocity_of_the_data(flow):
    x, t = 2 * torch.randn(2_000, 2), torch.rand(2_000) * 0.9 + 0.05
    x = (1 - t[:, None]) * two_gaussians().draw(2_000) + t[:, None] * torch.randn(2_000, 2)
    exact = velocity(two_gaussians(), x, t)
    error = (velocity(flow, x, t) - exact).square().mean() / exact.square().mean()
    print(f"relative squared error of the velocity: {error:.4f}")
    assert error < 0.03


def test_reflow_makes_it_straight_and_one_step_good(flow, tmp_path):
    torch.manual_seed(1)
    noise, fresh = torch.randn(20_000, 2), torch.randn(4_000, 2)
    ends = partial(sample, flow, steps=50, solver="heun")
    module = Reflow(flow, **options(600))
    pairs = Points(512, noise=noise, image=ends(noise))
    again = fitted(module, pairs, 600, tmp_path).network
    before, after = straightness(flow, fresh).mean(), straightness(again, fresh).mean()
    one_step = partial(sample, noise=fresh, steps=1, solver="euler")
    many = partial(sample, noise=fresh, steps=50, solver="heun")
    far, near = (distance(one_step(model), many(model)) for model in (flow, again))
    print(f"straightness {before:.4f} -> {after:.4f}, one step off by {far:.3f} -> {near:.3f}")
    assert after < before / 5
    assert near < far / 3
    # And it still makes the data: half of the points at each mode.
    points = many(again)
    assert abs((points[:, 0] > 0).float().mean() - 0.5) < 0.03
    assert abs((points[:, 0].abs() - 2).square().mean().sqrt() - SPREAD) < 0.1
    # The last stage takes what is left.
    student = FlowDistillation(flow, "l2", student=again, **options(300))
    fitted(student, pairs, 300, tmp_path)
    error = distance(student.generate(fresh), ends(fresh))
    print(
        f"one step of the reflowed flow {distance(one_step(again), ends(fresh)):.3f}, distilled "
        f"{error:.3f} from the flow's own ends"
    )
    assert error < 0.6 * distance(one_step(flow), ends(fresh))


def test_the_two_derivatives_agree():
    flow = new_flow(32)
    torch.manual_seed(2)
    x, v = (torch.randn(16, 2, dtype=torch.float64) for _ in range(2))
    t = torch.rand(16, dtype=torch.float64) * 0.8 + 0.1
    end = t / 2
    flow.network.add_inputs(("to_sigma",))
    for parameter in flow.network.numbers["to_sigma"].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    flow.double()

    def u(x, t, end):
        # Perceptron embeds its numbers in float32, which a difference would see.
        return flow.velocity(x.float(), t.float(), None, end.float()).to(x)

    flow.float()
    forward, differences = (
        total_derivative(u, x.float(), v.float(), t.float(), end.float(), how)
        for how in ("jvp", "finite_difference")
    )
    assert forward.abs().mean() > 0.1
    torch.testing.assert_close(forward, differences, rtol=1e-2, atol=5e-3)


def test_the_derivative_of_a_formula():
    def u(x, t, end):
        return x.square() * t[:, None] + end[:, None]

    x, v = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    t = 0.1 + 0.8 * torch.rand(5, dtype=torch.float64)  # at the ends a difference is one-sided
    end = torch.rand(5, dtype=torch.float64)
    exact = 2 * x * v * t[:, None] + x.square()
    for how in ("jvp", "finite_difference"):
        found = total_derivative(u, x, v, t, end, how)
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)


def test_a_difference_stays_between_the_times_0_and_1():
    asked = []

    def u(x, t, end):
        asked.append(t)
        return x * t[:, None]

    x, v = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    t = torch.tensor([0.0, 0.01, 0.98, 1.0], dtype=torch.float64)
    found = total_derivative(u, x, v, t, t / 2, "finite_difference", 0.05)
    assert torch.cat(asked).min() == 0 and torch.cat(asked).max() == 1
    # One-sided at the ends, it is off by the shift times v there: to rounding.
    bound = 0.05 * float(v.abs().max()) + 1e-12
    torch.testing.assert_close(found, v * t[:, None] + x, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("source", "derivative", "updates", "bar"),
    [
        ("teacher", "finite_difference", 1_500, 0.1),
        pytest.param("data", "jvp", 1_500, 0.12, marks=pytest.mark.ci),
        pytest.param("teacher", "jvp", 4_000, 0.03, marks=pytest.mark.full),
        pytest.param("data", "jvp", 4_000, 0.08, marks=pytest.mark.full),
    ],
)
def test_one_step_of_a_mean_flow_is_the_exact_map_of_gaussian_data(
    source, derivative, updates, bar, tmp_path
):
    torch.manual_seed(0)
    mean, std = torch.tensor([[1.0, -0.5]]), 0.5
    exact = GaussianMixtureDenoiser(mean, std, sigma_min=1e-3, sigma_max=1e6)
    module = MeanFlow(
        teacher=exact if source == "teacher" else None,
        student=new_flow(),
        sigma_distribution=LogNormalSigma(0.0, 4.0),  # often from near 1 to near 0
        derivative=derivative,
        steps=(1, 2),
        **options(updates),
    )
    fitted(module, Points(512, image=exact.draw(50_000)), updates, tmp_path)
    noise = torch.randn(4_000, 2)
    ends = mean + std * noise  # the ODE keeps order: x0 = mu + std z
    scale = ends.square().sum(1).mean().sqrt()
    off = {steps: distance(module.generate(noise, steps=steps), ends) / scale for steps in (1, 2)}
    print(f"from {source} by {derivative}, {updates} updates: relative error {off}")
    assert off[1] < bar and off[2] < off[1]
