import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from tiny_networks import perturbed, stock_unet, tiny_network

from lit_distill.diffusion import (
    EDMDenoiser,
    EpsilonDenoiser,
    FewSteps,
    FlowDenoiser,
    sample,
    told,
)
from lit_distill.models import ModulatedNetwork, UNet, add_inputs

BOTH = ("to_sigma", "steps")
LABELS = torch.tensor([0, 2, 3])
X = torch.randn((3, 1, 8, 8), generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([0.1, 0.4, 0.7])


class Plain(nn.Module):
    """A network that takes nothing more by itself."""

    image_shape, num_classes, null_label = (2,), 3, 3

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.3))

    def forward(self, x, time, condition=None):
        return (self.weight * x).sin() + 1e-3 * time[:, None].to(x.dtype)


def condition_with(labels, **values):
    named = {name: torch.full((3,), value) for name, value in values.items()}
    return named if labels is None else {"label": labels, **named}


def silently(function, *arguments):
    with warnings.catch_warnings(action="ignore"):
        function(*arguments)


@torch.no_grad()
@pytest.mark.parametrize("kind", [EDMDenoiser, EpsilonDenoiser, FlowDenoiser])
@pytest.mark.parametrize("labels", [None, LABELS])
def test_new_inputs_change_nothing_until_they_are_trained(kind, labels):
    denoiser = kind(tiny_network(None if labels is None else 3)).eval()
    before = denoiser(X, SIGMA, labels)
    add_inputs(denoiser, BOTH)
    assert denoiser.inputs == BOTH and denoiser.null_label == (None if labels is None else 3)
    given = condition_with(labels, to_sigma=0.05, steps=3)
    for condition in (labels, given):
        assert torch.allclose(denoiser(X, SIGMA, condition), before, rtol=0, atol=1e-5)
    perturbed(denoiser.network)
    outputs = [
        denoiser(X, SIGMA, condition_with(labels, to_sigma=to_sigma, steps=steps))
        for to_sigma, steps in [(0.05, 3), (0.02, 3), (0.05, 4)]
    ]
    for other in outputs[1:]:
        assert float((other - outputs[0]).abs().amax((1, 2, 3)).min()) > 1e-4
    assert not any(module.training for module in denoiser.modules())


@torch.no_grad()
def test_a_second_level_is_given_as_a_time_and_is_the_first_one_where_it_is_left_out():
    denoiser, seen = EDMDenoiser(tiny_network(), sigma_min=0.01).eval(), []
    add_inputs(denoiser, ("to_sigma",))
    perturbed(denoiser.network)
    denoiser.network.conditions.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[1]["to_sigma"])
    )
    out = denoiser(X, SIGMA)
    assert torch.equal(out, denoiser(X, SIGMA, {"to_sigma": SIGMA}))
    denoiser(X, SIGMA, {"to_sigma": torch.tensor([0.5, 0.0, 0.01])})
    expected = [SIGMA, SIGMA, torch.tensor([0.5, 0.01, 0.01])]  # 0 has no time
    for given, level in zip(seen, expected, strict=True):
        assert torch.allclose(given, denoiser.time(level))


@torch.no_grad()
def test_inputs_are_added_one_after_another_without_forgetting():
    one, other = (EDMDenoiser(tiny_network(3)).eval() for _ in range(2))
    add_inputs(one, ("steps",))
    perturbed(one.network)
    kept = one(X, SIGMA, condition_with(LABELS, steps=3))
    add_inputs(one, ("steps", "to_sigma"))
    assert one.inputs == ("steps", "to_sigma")
    assert torch.allclose(one(X, SIGMA, condition_with(LABELS, steps=3)), kept, rtol=0, atol=1e-5)
    network = one.network.conditions
    add_inputs(one, ("to_sigma",))  # known
    assert one.network.conditions is network
    add_inputs(other, ())
    assert other.inputs == () and other.network.conditions is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_added_is_of_the_networks_mode_and_precision(training, dtype):
    denoiser = EDMDenoiser(tiny_network(3)).to(dtype).train(training)
    add_inputs(denoiser, BOTH)
    assert {module.training for module in denoiser.modules()} == {training}
    assert {weight.dtype for weight in denoiser.parameters()} == {dtype}
    assert all(weight.requires_grad for weight in denoiser.parameters())
    out = denoiser(X, SIGMA, condition_with(LABELS, to_sigma=0.05, steps=2))
    assert out.dtype == X.dtype and out.isfinite().all()


def test_states_are_still_computed_again_where_they_were():
    denoiser = EDMDenoiser(tiny_network(3))
    assert not denoiser.network.unet.is_gradient_checkpointing
    denoiser.network.unet.enable_gradient_checkpointing()
    add_inputs(denoiser, BOTH)
    assert denoiser.network.unet.is_gradient_checkpointing


def test_all_that_is_added_is_trained():
    denoiser = EDMDenoiser(tiny_network(3))
    add_inputs(denoiser, BOTH)
    perturbed(denoiser.network)
    condition = condition_with(LABELS, to_sigma=0.05, steps=2)
    denoiser(X, SIGMA, condition).square().sum().backward()
    for name, weight in denoiser.network.conditions.named_parameters():
        assert weight.grad is not None and (weight.grad != 0).any(), name


def test_a_network_whose_class_is_a_time_has_no_place():
    denoiser = EDMDenoiser(UNet.wrap(stock_unet(class_embed_type="timestep")))
    with pytest.raises(ValueError, match=r"embeds its class as 'timestep'.* no place for steps"):
        add_inputs(denoiser, ("steps",))


# --- Networks of other kinds ---------------------------------------------------------------------


@torch.no_grad()
def test_any_other_network_is_wrapped_and_a_warning_tells_it():
    denoiser, x = EDMDenoiser(Plain()).eval(), torch.randn(3, 2)
    before = denoiser(x, SIGMA, LABELS)
    with pytest.warns(UserWarning, match=r"Plain cannot take to_sigma, steps.*no diffusers folder"):
        add_inputs(denoiser, BOTH)
    assert isinstance(denoiser.network, ModulatedNetwork) and not denoiser.network.training
    assert denoiser.inputs == BOTH and denoiser.network.num_classes == 3
    given = condition_with(LABELS, to_sigma=0.05, steps=3)
    for condition in (LABELS, given):
        assert torch.equal(denoiser(x, SIGMA, condition), before)
    generator = torch.Generator().manual_seed(1)
    last = denoiser.network.modulation[-1]
    last.weight.copy_(torch.randn(last.weight.shape, generator=generator))
    outputs = [
        denoiser(x, SIGMA, condition_with(LABELS, to_sigma=to_sigma, steps=steps))
        for to_sigma, steps in [(0.05, 3), (0.02, 3), (0.05, 4)]
    ]
    for other in outputs[1:]:
        assert float((other - outputs[0]).abs().amax(1).min()) > 1e-4


def test_wrapped_networks_are_sampled_and_wrapped_again():
    denoiser = EDMDenoiser(Plain())
    silently(add_inputs, denoiser, ("steps",))
    silently(add_inputs, denoiser, ("steps", "to_sigma"))
    assert denoiser.inputs == ("steps", "to_sigma")
    denoiser.few_steps = FewSteps((2,))
    out = sample(denoiser, torch.randn(3, 2), steps=2, condition=LABELS)
    assert out.shape == (3, 2) and out.isfinite().all()
    assert set(told(denoiser, LABELS, to_sigma=SIGMA, steps=SIGMA)) == {"label", *BOTH}


def test_a_network_that_does_not_say_its_shape_cannot_be_wrapped():
    denoiser = EDMDenoiser(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Linear does not say its image_shape"):
        add_inputs(denoiser, ("steps",))
