"""Adversarial losses against their definitions."""

import math

import pytest
import torch
from torch import nn

from lit_distill.losses import (
    check_adversarial_loss,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)

REAL, FAKE = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, -3.0]])


def test_softplus_is_the_cross_entropy():
    right = nn.functional.binary_cross_entropy_with_logits
    expected = right(REAL, torch.ones_like(REAL)) + right(FAKE, torch.zeros_like(FAKE))
    torch.testing.assert_close(discriminator_loss(REAL, FAKE), expected[None])
    torch.testing.assert_close(generator_loss(FAKE), right(FAKE, torch.ones_like(FAKE))[None])


def test_hinge_leaves_alone_what_is_told_apart():
    assert discriminator_loss(torch.ones(1, 2), -torch.ones(1, 2), "hinge").item() == 0
    expected = ((0 + 2) + (1.5 + 0)) / 2
    assert discriminator_loss(REAL, FAKE, "hinge").item() == expected
    assert generator_loss(FAKE, "hinge").item() == 1.25


def test_the_best_discriminator_knows_the_log_ratio_of_densities():
    """Gaussians at -1 and 1: ``2 x``."""
    torch.manual_seed(0)
    weight = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100)
    real, fake = torch.randn(100_000) + 1, torch.randn(100_000) - 1

    def step():
        optimizer.zero_grad()
        logits = [(weight[0] * x + weight[1])[:, None] for x in (real, fake)]
        loss = discriminator_loss(*logits).mean()
        loss.backward()
        return loss

    optimizer.step(step)
    torch.testing.assert_close(weight.detach(), torch.tensor([2.0, 0.0]), rtol=0.02, atol=0.03)


def test_the_penalty_is_the_squared_gradient_in_the_features():
    features = [torch.randn(3, 4), torch.randn(3, 2, 5, 5)]
    weight = torch.tensor([0.5], requires_grad=True)

    def head(inputs):
        return (weight * (inputs[0].square().sum(1) + inputs[1].sum((1, 2, 3))))[:, None]

    penalty = r1_penalty(head, features)
    expected = 0.25 * (4 * features[0].square().sum(1) + 50)
    torch.testing.assert_close(penalty, expected)
    penalty.sum().backward()  # it has a gradient in the head, which is what it is for
    torch.testing.assert_close(weight.grad, (expected.detach() / 0.25).sum()[None])
    assert all(not feature.requires_grad for feature in features)


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"adversarial_loss='wgan'.*softplus or hinge"):
        check_adversarial_loss("wgan")


def test_equal_logits_cost_what_a_coin_costs():
    zeros = torch.zeros(4, 3)
    torch.testing.assert_close(discriminator_loss(zeros, zeros), torch.full((4,), 2 * math.log(2)))
