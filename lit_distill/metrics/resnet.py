"""A CIFAR-10 classifier from a local file, for where Inception cannot be had."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_distill.metrics.extractors import Extractor

_FILE = Path("weights", "resnet56-4bfd9763.th")
_SOURCE = "https://github.com/akamaster/pytorch_resnet_cifar10"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images it was trained on


class ResNet56(nn.Module):
    """ResNet of 56 layers for 32x32 images, with shortcuts that have no parameters (option A).

    Args:
        num_classes: Number of logits.

    Source:
        He et al., Deep residual learning for image recognition (2016), section 4.2.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = _stage(16, 16), _stage(16, 32), _stage(32, 64)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 64) and logits (N, K) of normalised images (N, 3, 32, 32)."""
        x = torch.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))
        return features, self.linear(features)


class _Block(nn.Module):
    """Two convolutions and a shortcut, which skips pixels and adds empty channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.added = outputs // inputs, (outputs - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        change = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        kept = x[:, :, :: self.stride, :: self.stride]
        return torch.relu(change + nn.functional.pad(kept, (0, 0, 0, 0, self.added, self.added)))


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_Block(inputs, outputs), *(_Block(outputs, outputs) for _ in range(8)))


class ResNet56Extractor(Extractor):
    """Features of a CIFAR-10 classifier, ``fd_resnet56``: a smoke signal, and no FID.

    It tells whether a run goes well where Inception cannot be downloaded. Its figures stand beside
    each other only, never beside a published FID. Its label accuracy is that of CIFAR-10's classes.

    Args:
        weights: The file ``resnet56-4bfd9763.th``; None reads
            ``$LIT_DISTILL_DATA/weights/resnet56-4bfd9763.th``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """

    name = "resnet56"
    num_features = 64
    image_shape = (3, 32, 32)
    classifies = True
    mean: Tensor
    std: Tensor

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        path = _path(weights)
        with torch.random.fork_rng(devices=[]):
            self.network = ResNet56()
        try:
            self.network.load_state_dict(_state(path))
        except (RuntimeError, TypeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{path} does not hold the weights of the CIFAR-10 ResNet-56 "
                f"({type(error).__name__}): give a whole copy of {_FILE.name} from {_SOURCE} as "
                "the option weights of ResNet56Extractor."
            ) from error
        self.register_buffer("mean", 255 * torch.tensor(_MEAN).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(_STD).view(3, 1, 1))
        self.requires_grad_(False).eval()

    def run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 64) of the last pooling, and logits (N, 10)."""
        features, logits = self.network((images.float() - self.mean) / self.std)
        return features, logits


def _path(weights: str | Path | None) -> Path:
    collection = os.environ.get("LIT_DISTILL_DATA")
    if weights is None and not collection:
        raise FileNotFoundError(
            f"The resnet56 extractor reads {_FILE.name} ({_SOURCE}): give it as the option weights "
            f"of ResNet56Extractor, or set LIT_DISTILL_DATA to a folder that contains {_FILE}."
        )
    path = Path(weights) if weights is not None else Path(str(collection)) / _FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {path}: fetch {_FILE.name} from {_SOURCE}, and give it as the "
            "option weights of ResNet56Extractor."
        )
    return path


def _state(path: Path) -> dict[str, Any]:
    """The weights, without the prefix of the wrapper that they were trained in."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    return {name.removeprefix("module."): tensor for name, tensor in saved["state_dict"].items()}
