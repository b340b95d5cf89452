"""Points in the plane."""

import math

import torch

from lit_distill.datamodules import PlaneDataModule, to_signed


def test_eight_modes_on_a_circle_always_the_same() -> None:
    data = PlaneDataModule()
    images, labels = data.images("train")
    assert labels is None
    assert images.shape == (8_000, 2, 1, 1)
    points = to_signed(images).flatten(1)
    angle = torch.atan2(points[:, 1], points[:, 0]) / (2 * math.pi / 8)
    mode = angle.round().long() % 8
    assert mode.bincount().min() > 800
    for k in range(8):
        centre = 0.7 * torch.tensor([math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)])
        own = points[mode == k]
        assert torch.allclose(own.mean(0), centre, atol=0.01)
        assert torch.allclose(own.std(0), torch.full((2,), 0.06), atol=0.005)
    assert torch.equal(images, PlaneDataModule().images("train")[0])
    assert not torch.equal(images[:100], data.images("test")[0][:100])
