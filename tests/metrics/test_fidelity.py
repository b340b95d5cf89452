"""The Frechet distance beside torch-fidelity's own, on the same images and the same extractor."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics, register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from lit_distill.datamodules import DigitsDataModule
from lit_distill.metrics import (
    DigitsExtractor,
    Extractor,
    ImageSet,
    MNISTExtractor,
    describe,
    frechet_distance,
)


class Images(Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def their_distance(extractor: Extractor, sets: list[Tensor]) -> float:
    """torch-fidelity's whole way from images to the distance."""

    class Given(FeatureExtractorBase):  # type: ignore[misc]
        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)
            self.own = extractor

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return (extractor.name,)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return extractor.name

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            return (self.own(images),)

    name = f"{extractor.name}-of-a-test"
    register_feature_extractor(name, Given)
    found = calculate_metrics(
        input1=Images(sets[0]),
        input2=Images(sets[1]),
        fid=True,
        feature_extractor=name,
        batch_size=100,
        cuda=False,
        cache=False,
        verbose=False,
    )
    return float(found["frechet_inception_distance"])


def digit_sets() -> list[Tensor]:
    """Held-out digits, and training digits with noise."""
    data = DigitsDataModule()
    train, test = data.images("train")[0], data.images("test")[0]
    noise = 40 * torch.randn(train.shape, generator=torch.Generator().manual_seed(0))
    return [test, (train + noise).clamp(0, 255).to(torch.uint8)]


@pytest.mark.parametrize("size", [8, 28])
def test_the_frechet_distance_is_torch_fidelitys(size: int) -> None:
    extractor = DigitsExtractor() if size == 8 else MNISTExtractor()
    sets = digit_sets()
    if size == 28:  # as MNIST's images are
        sets = [s.repeat_interleave(3, 2).repeat_interleave(3, 3) for s in sets]
        sets = [torch.nn.functional.pad(s, (2, 2, 2, 2)) for s in sets]
    own = [describe(extractor, images) for images in sets]
    assert all(isinstance(s, ImageSet) for s in own)
    distance = frechet_distance(own[0].features, own[1].features)
    assert distance > 1
    assert distance == pytest.approx(their_distance(extractor, sets), rel=1e-3)
