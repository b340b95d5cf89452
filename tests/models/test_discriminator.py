"""Heads on the features of networks."""

import pytest
import torch
from tiny_networks import tiny_network
from torch import nn

from lit_distill.diffusion import EDMDenoiser, GaussianMixtureDenoiser
from lit_distill.models import Discriminator, LoRA, adapted, tapped


def model(**arguments):
    return EDMDenoiser(tiny_network(**arguments)).eval()


def test_one_logit_for_each_place():
    teacher = model(num_classes=3)
    heads = Discriminator(teacher, ["unet.mid_block", "unet.down_blocks.0"])
    x, sigma = torch.randn(5, 1, 8, 8), torch.ones(5)
    features = heads.features(teacher, x, sigma, torch.zeros(5, dtype=torch.long))
    assert [f.shape for f in features] == [(5, 8, 4, 4), (5, 16, 4, 4)]  # as they are evaluated
    assert heads(features).shape == (5, 32)


def test_by_default_the_network_names_its_layers():
    assert Discriminator(model()).layers == ("unet.mid_block",)


def test_looking_gives_what_the_model_makes_and_leaves_no_hook():
    teacher = model()
    heads, x, sigma = Discriminator(teacher), torch.randn(2, 1, 8, 8), torch.ones(2)
    denoised, features = heads.look(teacher, x, sigma)
    assert torch.equal(denoised, teacher(x, sigma)) and len(features) == 1
    assert not any(module._forward_hooks for module in teacher.modules())


def test_the_gradient_reaches_the_image_and_the_heads():
    teacher = model().requires_grad_(False)
    heads, x = Discriminator(teacher), torch.randn(2, 1, 8, 8, requires_grad=True)
    heads(heads.features(teacher, x, torch.ones(2))).sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is not None for p in heads.parameters())


def test_another_network_looks_at_the_image():
    class Other(nn.Module):
        image_shape = (1, 8, 8)

        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(1, 6, 3)

        def forward(self, image):
            return [self.layer(image), image.mean((2, 3))]

    other = Other()
    heads, x = Discriminator(other), torch.randn(3, 1, 8, 8)
    assert heads(heads.features(other, x, torch.ones(3))).shape == (3, 36 + 1)
    with pytest.raises(ValueError, match="not of feature_network"):
        Discriminator(other, ["layer"])


def test_a_network_with_an_adapter_shows_its_backbones_layers():
    teacher = model()
    student = adapted(teacher, LoRA(rank=2))
    heads = Discriminator(student)
    assert heads(heads.features(student, torch.randn(2, 1, 8, 8), torch.ones(2))).shape == (2, 16)


def test_a_layer_that_is_not_there():
    message = r"UNet has no layer unet\.middle \(option feature_layers\).*unet\.mid_block"
    with pytest.raises(ValueError, match=message):
        Discriminator(model(), ["unet.middle"])
    with pytest.raises(ValueError, match="no layer nothing"), tapped(model().network, ["nothing"]):
        pass


def test_networks_that_cannot_be_looked_into():
    with pytest.raises(ValueError, match="has no network whose features"):
        Discriminator(GaussianMixtureDenoiser(torch.zeros(1, 2), 1.0))

    class Silent(nn.Module):
        image_shape = (1, 8, 8)

        def forward(self, x, time, condition):
            return x

    with pytest.raises(ValueError, match=r"name some .option feature_layers."):
        Discriminator(EDMDenoiser(Silent()))
    with pytest.raises(ValueError, match="does not say its image_shape"):
        Discriminator(nn.Identity())
