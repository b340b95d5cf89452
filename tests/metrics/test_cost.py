import pytest
import torch
from torch import nn

from lit_distill.diffusion import EpsilonDenoiser, GaussianMixtureDenoiser, GuidedDenoiser, sample
from lit_distill.metrics import measure_cost

CPU = torch.device("cpu")


def cost(sampler, network, classes=None, **options):
    return measure_cost(sampler, network, (1, 2, 2), classes, device=CPU, **options)


@pytest.mark.parametrize(("solver", "steps", "nfe"), [("heun", 5, 9), ("euler", 5, 5)])
def test_evaluations_are_counted_by_watching(solver, steps, nfe):
    model = GaussianMixtureDenoiser(torch.zeros(1, 1, 2, 2), 0.5)
    holder = nn.ModuleDict({"deep": nn.Sequential(model)})

    def sampler(noise, labels):
        return sample(model, noise, steps=steps, solver=solver)

    assert cost(sampler, holder, batch_sizes=(4,)).nfe == nfe


def test_guidance_counts_both_branches():
    model = EpsilonDenoiser(Zero())
    model.null_label = 3
    guided = GuidedDenoiser(model, scale=2.0)

    def sampler(noise, labels):
        return sample(guided, noise, steps=2, solver="euler", condition=labels)

    assert cost(sampler, guided, classes=3, batch_sizes=(4,)).nfe == 4


class Zero(nn.Module):
    def forward(self, x, time, condition):
        assert condition is not None and len(condition) == len(x)
        return torch.zeros_like(x)


class Clock:
    """Time that passes only in a sampler: so many seconds for each batch size."""

    def __init__(self, seconds):
        self.seconds, self.now, self.batches = seconds, 0.0, []

    def perf_counter(self):
        return self.now

    def sampler(self, noise, labels):
        self.batches.append(len(noise))
        self.now += self.seconds[len(noise)]
        return noise


@pytest.fixture
def clock(monkeypatch):
    def make(seconds):
        made = Clock(seconds)
        monkeypatch.setattr("lit_distill.metrics.cost.time", made)
        return made

    return make


def test_latency_is_at_batch_1_and_throughput_at_the_given_sizes(clock):
    sampler = clock({1: 0.004, 50: 0.025, 10: 0.02}).sampler
    measured = cost(sampler, nn.Identity(), batch_sizes=(50, 10))
    assert measured.nfe == 0
    assert measured.latency_ms == pytest.approx(4)
    assert measured.throughput == pytest.approx({50: 2000, 10: 500})
    assert measured.images_per_second == measured.throughput[50]


def test_the_median_is_free_of_a_slow_start_and_of_outliers(clock):
    seconds = {1: 0.001}
    ticking = clock(seconds)

    def sampler(noise, labels):
        seconds[1] = 0.5 if len(ticking.batches) in (0, 1, 7) else 0.001
        return ticking.sampler(noise, labels)

    measured = cost(sampler, nn.Identity(), batch_sizes=(1,))
    assert measured.latency_ms == pytest.approx(1)


def test_a_slow_sampler_is_repeated_a_few_times_only(clock):
    slow = clock({1: 0.001, 8: 100.0})
    cost(slow.sampler, nn.Identity(), batch_sizes=(8,))
    assert slow.batches.count(8) == 4  # one to warm up, three timed
    assert slow.batches.count(1) == 22  # one to count, one to warm up, twenty timed
