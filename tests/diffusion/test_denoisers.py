import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from gaussian import MEAN, VARIANCE, Exact, Preconditioned, denoise, exact_denoisers, flow_map

from lit_distill.diffusion import (
    ConsistencyDenoiser,
    Denoiser,
    EDMDenoiser,
    EpsilonDenoiser,
    EvaluationCounter,
    FewSteps,
    FlowDenoiser,
    GaussianMixtureDenoiser,
    GuidedDenoiser,
    VelocityDenoiser,
    karras_sigmas,
    labels_of,
    linear_betas,
    sample,
    seeded_noise,
    solve,
)

CLASSES = (EDMDenoiser, EpsilonDenoiser, VelocityDenoiser, FlowDenoiser, ConsistencyDenoiser)
EXACT = sorted(exact_denoisers())


class Waves(nn.Module):
    """A network without any meaning that notes what it was asked."""

    num_classes, null_label, image_shape = 3, 3, (2,)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.3))
        self.x = self.time = self.condition = torch.empty(0)

    def forward(self, x, time, condition):
        self.x, self.time, self.condition = x.detach(), time, condition
        labels = labels_of(condition)
        shift = 0 if labels is None else labels[:, None].to(x.dtype)
        return (self.weight * x).sin() + 1e-3 * time[:, None].to(x.dtype) + shift


def levels_of(denoiser, count=200):
    """Levels from the smallest to the largest; of a table, so that the network knows them."""
    if isinstance(denoiser, EpsilonDenoiser | VelocityDenoiser):
        return denoiser.table[torch.linspace(0, len(denoiser.table) - 1, count).long()]
    low, high = denoiser.sigma_min / 10, denoiser.sigma_max
    return torch.logspace(*torch.tensor([low, high]).log10().tolist(), count).double()


# --- Truth: the exact network of Gaussian data ---------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_the_exact_network_gives_the_posterior_mean(name):
    denoiser = exact_denoisers()[name]
    sigma = levels_of(denoiser)
    noise = torch.randn(len(sigma), 5, dtype=torch.float64)
    x = MEAN + (VARIANCE + sigma[:, None] ** 2).sqrt() * noise
    out = denoiser(x, sigma)
    assert out.dtype == torch.float64
    # The flow's last level, 1e6, stands for infinity.
    atol = 1e-6 if name == "flow" else 1e-9
    assert torch.allclose(out, denoise(x, sigma), rtol=1e-6, atol=atol)


@pytest.mark.parametrize("name", EXACT)
def test_float32_loses_little(name):
    denoiser = exact_denoisers()[name]
    sigma = levels_of(denoiser)
    x = MEAN + (VARIANCE + sigma[:, None] ** 2).sqrt() * torch.randn(len(sigma), 5)
    out = denoiser(x.float(), sigma.float())
    assert out.dtype == torch.float32
    # epsilon's estimate is a difference of numbers as large as sigma
    bound = 2e-6 * (1 + sigma[:, None])
    if isinstance(denoiser, FlowDenoiser):
        bound = 1e-5
    assert ((out.double() - denoise(x, sigma)).abs() < bound).all()


def test_the_closed_forms_agree_with_each_other():
    sigma = torch.logspace(-4, 4, 50).double()
    x = torch.randn(50, 3, dtype=torch.float64) * (1 + sigma[:, None])
    mixture = GaussianMixtureDenoiser(torch.full((1, 3), MEAN, dtype=torch.float64), VARIANCE**0.5)
    assert torch.allclose(mixture(x, sigma), denoise(x, sigma), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", EXACT)
def test_a_whole_run_is_the_exact_ode_map(name):
    denoiser = exact_denoisers()[name]
    steps = 1000 if name in ("epsilon_discrete", "epsilon_unit") else 200
    noise = seeded_noise((4,), range(6)).double()
    out = sample(denoiser, noise, steps=steps)
    truth = flow_map(denoiser.start(noise), denoiser.sigma_max, 0)
    assert float((out - truth).abs().max()) < 2e-3
    single = sample(denoiser, noise.float(), steps=steps)
    assert single.dtype == torch.float32
    assert float((single - out).abs().max()) < 1e-4


@pytest.mark.parametrize("name", EXACT)
def test_start_is_the_stock_pipelines_first_state(name):
    denoiser = exact_denoisers()[name]
    noise, top = torch.randn(3, 2, dtype=torch.float64), denoiser.sigma_max
    scale = top if isinstance(denoiser, EDMDenoiser) else (1 + top**2) ** 0.5
    if isinstance(denoiser, FlowDenoiser):
        scale = 1 + top
    expected = scale * noise
    if name == "epsilon_unit":  # (x + 1) / 2 is what the network was trained on
        expected = 2 * (1 + (top / 2) ** 2) ** 0.5 * noise - 1
    elif name == "velocity_range":
        expected = ((1 + (2 * top) ** 2) ** 0.5 * noise + 1) / 2
    assert torch.allclose(denoiser.start(noise), expected)


@pytest.mark.parametrize("name", ["epsilon", "velocity", "flow"])
def test_the_networks_first_input_is_unit_noise(name):
    waves = Waves().double()
    denoiser = type(exact_denoisers()[name])(waves)
    noise = torch.randn(3, 2, dtype=torch.float64)
    sigma = denoiser.sigmas(4)[0]
    denoiser(denoiser.start(noise), sigma.expand(3))
    assert torch.allclose(waves.x, noise, rtol=1e-12)
    assert waves.time.tolist() == [1000 if name == "flow" else 999] * 3


# --- Parameterisations ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES[:4])
def test_the_weighted_error_is_the_networks_own(kind):
    waves = Waves().double()
    denoiser = kind(waves)
    sigma = levels_of(denoiser, 30)[1:].clamp(max=100)
    if kind in (EpsilonDenoiser, VelocityDenoiser):
        sigma = denoiser.table[10::50]
    x0, noise = torch.randn(2, len(sigma), 2, dtype=torch.float64)
    denoised = denoiser(x0 + sigma[:, None] * noise, sigma)
    error = denoiser.loss_weight(sigma) * (denoised - x0).square().sum(1)
    prediction = waves(waves.x, waves.time, None)
    s = sigma[:, None]
    if kind is EDMDenoiser:
        sd, total = 0.5, s**2 + 0.25
        target = (x0 - sd**2 / total * (x0 + s * noise)) * total.sqrt() / (s * sd)
    elif kind is EpsilonDenoiser:
        target = noise
    elif kind is VelocityDenoiser:
        target = (noise - s * x0) / (1 + s**2).sqrt()
    else:
        target = noise - x0
    own = (prediction - target).square().sum(1)
    assert torch.allclose(error, own, rtol=1e-6)


def test_the_weighted_error_is_the_networks_own_in_its_own_range():
    waves = Waves().double()
    denoiser = VelocityDenoiser(waves, image_range=(0, 1))
    sigma = denoiser.table[10::50]
    x0, noise = torch.randn(2, len(sigma), 2, dtype=torch.float64)
    denoised = denoiser(x0 + sigma[:, None] * noise, sigma)
    error = denoiser.loss_weight(sigma) * (denoised - x0).square().sum(1)
    s = sigma[:, None] / 2
    target = (noise - s * (x0 + 1) / 2) / (1 + s**2).sqrt()
    own = (waves(waves.x, waves.time, None) - target).square().sum(1)
    assert torch.allclose(error, own, rtol=1e-6)


@pytest.mark.parametrize("bad", [(1, 0), (1, 1)])
def test_a_range_of_images_rises(bad):
    with pytest.raises(ValueError, match="must be black, then white"):
        EpsilonDenoiser(Waves(), image_range=bad)


def test_only_an_unusual_range_is_written_down():
    assert "image_range" not in EpsilonDenoiser(Waves()).settings()
    settings = EpsilonDenoiser(Waves(), image_range=(0, 1)).settings()
    assert settings["image_range"] == [0, 1]
    assert EpsilonDenoiser(Waves(), **settings).settings() == settings


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_consistency_model_keeps_what_is_at_its_boundary(dtype):
    denoiser = ConsistencyDenoiser(Waves(), sigma_min=0.002)
    x = torch.randn(3, 2, dtype=dtype)
    assert torch.equal(denoiser(x, torch.full((3,), 0.002, dtype=dtype)), x)
    assert not torch.allclose(denoiser(x, torch.full((3,), 0.1, dtype=dtype)), x, atol=1e-3)


def test_a_consistency_model_far_from_its_boundary_is_edms():
    sigma = torch.logspace(-1, 2, 20).double()
    x = torch.randn(20, 2, dtype=torch.float64) * sigma[:, None]
    network = Preconditioned(0.5, 1000)
    near = ConsistencyDenoiser(network, sigma_min=1e-9)(x, sigma)
    assert torch.allclose(near, EDMDenoiser(network)(x, sigma), rtol=1e-6)


@pytest.mark.parametrize(("scale", "expected"), [(1000.0, 250.0), (1.0, 0.25)])
def test_edm_asks_at_its_time_scale(scale, expected):
    waves = Waves()
    EDMDenoiser(waves, time_scale=scale)(torch.randn(2, 2), torch.tensor([1.0, 2.718281828]))
    assert waves.time.tolist() == pytest.approx([0, expected], abs=1e-4)


@pytest.mark.parametrize("kind", CLASSES)
def test_half_precision_networks_see_full_times_and_give_full_results(kind):
    waves = Waves().to(torch.bfloat16)
    out = kind(waves)(torch.randn(3, 2), torch.full((3,), 1.2345))
    assert waves.x.dtype == torch.bfloat16 and waves.time.dtype == torch.float32
    assert out.dtype == torch.float32


@pytest.mark.parametrize("kind", CLASSES)
def test_samples_of_a_batch_do_not_touch_each_other(kind):
    denoiser = kind(Waves())
    x, sigma = torch.randn(4, 2), denoiser.sigmas(5)[:4].float()
    whole = denoiser(x, sigma, torch.arange(4))
    for i in range(4):
        one = denoiser(x[i : i + 1], sigma[i : i + 1], torch.tensor([i]))
        assert torch.allclose(whole[i : i + 1], one, rtol=1e-6)


def test_discrete_networks_are_asked_at_integers_only():
    waves = Waves()
    denoiser = EpsilonDenoiser(waves, discrete=True)
    denoiser(torch.randn(50, 2), torch.logspace(-2, 2, 50))
    assert torch.equal(waves.time, waves.time.round())
    assert torch.equal(denoiser.time(denoiser.schedule(torch.rand(50))) % 1, torch.zeros(50))


def test_settings_of_the_network_are_taken_over():
    denoiser = EDMDenoiser(Waves())
    assert (denoiser.image_shape, denoiser.num_classes, denoiser.null_label) == ((2,), 3, 3)


# --- Grids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_every_grid_descends_from_the_largest_level_to_zero(kind, steps):
    denoiser = kind(Waves())
    grid = denoiser.sigmas(steps)
    assert grid.shape == (steps + 1,) and grid.dtype == torch.float64
    assert float(grid[0]) == pytest.approx(denoiser.sigma_max) and grid[-1] == 0
    assert (grid.diff() < 0).all()


@pytest.mark.parametrize("kind", CLASSES)
def test_schedules_rise_over_the_whole_range(kind):
    denoiser = kind(Waves())
    levels = denoiser.schedule(torch.linspace(0, 1, 101))
    assert levels.isfinite().all() and (levels.diff() > 0).all()
    assert float(levels[-1]) == pytest.approx(denoiser.sigma_max)
    assert float(levels[0]) == pytest.approx(denoiser.sigma_min)


@pytest.mark.parametrize("kind", CLASSES)
def test_no_steps_are_no_grid(kind):
    with pytest.raises(ValueError, match="steps=0"):
        kind(Waves()).sigmas(0)


def test_the_flows_grid_is_uniform_in_its_time():
    denoiser = FlowDenoiser(Waves())
    grid = denoiser.sigmas(8)
    expected = torch.linspace(1, 0, 9).double()
    assert torch.allclose(denoiser.path_time(grid), expected, rtol=0, atol=1e-12)
    assert torch.equal(denoiser.time(grid), 1000 * denoiser.path_time(grid))


def test_more_steps_than_levels_are_refused():
    with pytest.raises(ValueError, match="steps=41"):
        ConsistencyDenoiser(Waves()).sigmas(41)
    with pytest.raises(ValueError, match="steps=1001"):
        EpsilonDenoiser(Waves()).sigmas(1001)


# --- A lower start -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_a_lower_start_changes_the_grid_and_not_the_model(kind):
    waves = Waves().double()
    whole, lowered = kind(waves), kind(waves)
    lowered.start_from(2.5)
    assert lowered.sigma_max == pytest.approx(2.5, rel=0.02)
    grid = lowered.sigmas(4)
    assert float(grid[0]) == pytest.approx(lowered.sigma_max)
    assert (grid.diff() < 0).all() and grid[-1] == 0
    assert float(lowered.schedule(torch.tensor(1.0))) == pytest.approx(lowered.sigma_max)
    x, sigma = torch.randn(5, 2, dtype=torch.float64), torch.tensor([0.1, 1, 2.4, 2.5, 2.6])
    assert torch.equal(lowered(x, sigma), whole(x, sigma))
    rebuilt = kind(waves, **lowered.settings())
    assert rebuilt.sigma_max == lowered.sigma_max
    assert torch.equal(rebuilt.sigmas(3), lowered.sigmas(3))


@pytest.mark.parametrize("name", EXACT)
def test_a_run_from_a_lower_start_is_the_exact_ode_map(name):
    denoiser = exact_denoisers()[name]
    denoiser.start_from(2.5)
    noise = seeded_noise((4,), range(6)).double()
    out = sample(denoiser, noise, steps=150)
    truth = flow_map(denoiser.start(noise), denoiser.sigma_max, 0)
    assert float((out - truth).abs().max()) < 5e-3


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("level", [0.0, -1.0, 1e9])
def test_a_start_outside_the_models_levels_is_refused(kind, level):
    with pytest.raises(ValueError, match="generator_sigma"):
        kind(Waves()).start_from(level)


def test_a_table_keeps_its_precision_when_the_weights_lose_theirs():
    denoiser = EpsilonDenoiser(Waves(), betas=linear_betas(400))
    grid = denoiser.sigmas(7)
    denoiser.half()
    assert torch.equal(denoiser.sigmas(7), grid)


# --- Guidance ------------------------------------------------------------------------------------


def test_guidance_follows_diffusers_convention():
    denoiser = EDMDenoiser(Waves())
    x, sigma, labels = torch.randn(4, 2), torch.rand(4) + 0.1, torch.tensor([0, 1, 2, 0])
    plain, null = denoiser(x, sigma, labels), denoiser(x, sigma, torch.full((4,), 3))
    guided = GuidedDenoiser(denoiser, 2.5)(x, sigma, labels)
    assert torch.allclose(guided, null + 2.5 * (plain - null), rtol=1e-5, atol=1e-6)
    assert torch.equal(GuidedDenoiser(denoiser, 1)(x, sigma, labels), plain)
    assert torch.allclose(GuidedDenoiser(denoiser, 0.0)(x, sigma, labels), null)


@pytest.mark.parametrize(("scale", "calls"), [(1.0, 1), (2.0, 2)])
def test_guidance_of_one_costs_one_evaluation(scale, calls):
    guided = GuidedDenoiser(EDMDenoiser(Waves()), scale)
    with EvaluationCounter(guided) as counter:
        guided(torch.randn(4, 2), torch.ones(4), torch.arange(4) % 3)
    assert (counter.calls, counter.samples) == (calls, 4 * calls)


def test_guidance_takes_over_how_its_model_is_sampled():
    inner = EpsilonDenoiser(Waves())
    inner.few_steps = FewSteps((1, 2), gamma=0.5)
    guided = GuidedDenoiser(inner, 3)
    guided.start_from(2.5)
    noise = torch.randn(2, 2)
    assert guided.sigma_max == inner.sigma_max < 3
    assert torch.equal(guided.start(noise), inner.start(noise))
    assert torch.equal(guided.sigmas(3), inner.sigmas(3))
    assert torch.equal(guided.schedule(torch.rand(3)) > 3, torch.zeros(3).bool())
    assert torch.equal(guided.loss_weight(torch.ones(2)), inner.loss_weight(torch.ones(2)))
    assert (guided.num_classes, guided.image_shape) == (3, (2,))
    assert guided.few_steps is inner.few_steps


def test_guidance_needs_something_to_guide_by():
    denoiser = EDMDenoiser(Waves())
    for condition in (None, {"step": torch.zeros(1)}):
        with pytest.raises(ValueError, match="guidance=2"):
            GuidedDenoiser(denoiser, 2)(torch.randn(1, 2), torch.ones(1), condition)
    denoiser.null_label = None
    with pytest.raises(ValueError, match="no null class"):
        GuidedDenoiser(denoiser, 2)(torch.randn(1, 2), torch.ones(1), torch.zeros(1).long())


def test_the_null_condition_replaces_the_label_alone():
    denoiser, labels = EDMDenoiser(Waves()), torch.tensor([0, 2])
    assert torch.equal(denoiser.null(labels), torch.tensor([3, 3]))
    assert denoiser.null(None) is None
    named = denoiser.null({"label": labels, "to_sigma": torch.ones(2)})
    assert torch.equal(named["label"], torch.tensor([3, 3]))
    assert torch.equal(named["to_sigma"], torch.ones(2))


# --- Fingerprints --------------------------------------------------------------------------------


def test_the_fingerprint_sees_class_settings_and_weights():
    torch.manual_seed(0)

    def build(kind=EDMDenoiser, **settings):
        return kind(nn.Linear(3, 3), **settings)

    one = build()
    again = EDMDenoiser(nn.Linear(3, 3))
    again.load_state_dict(one.state_dict())
    assert one.fingerprint() == again.fingerprint() and len(one.fingerprint()) == 64
    others = [build(), build(sigma_max=70), build(ConsistencyDenoiser)]
    for other in others[1:]:
        other.load_state_dict(one.state_dict())
    lowered = EDMDenoiser(one.network)
    lowered.start_from(40)
    guided = [GuidedDenoiser(one, 2), GuidedDenoiser(one, 3), GuidedDenoiser(others[2], 2)]
    prints = [d.fingerprint() for d in [one, *others, lowered, *guided]]
    assert len(set(prints)) == len(prints)


def test_the_fingerprint_does_not_depend_on_layout_or_mode():
    denoiser = EDMDenoiser(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    before = denoiser.fingerprint()
    denoiser.eval().to(memory_format=torch.channels_last)
    assert denoiser.fingerprint() == before


def test_the_bare_contract_says_what_is_missing():
    with pytest.raises(NotImplementedError):
        Denoiser()(torch.zeros(1, 2), torch.ones(1))


def test_the_models_own_grid_is_what_sample_uses():
    denoiser, noise = Exact(), torch.randn(3, 2, dtype=torch.float64)
    by_hand = solve(denoiser, 80 * noise, karras_sigmas(6, 0.002, 80), solver="dpmpp_2m")
    assert torch.equal(sample(denoiser, noise, steps=6, solver="dpmpp_2m"), by_hand)
