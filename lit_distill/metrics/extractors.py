"""Feature extractors: what a Frechet distance, a coverage or a label accuracy sees of an image.

An extractor takes uint8 images and gives float32 features and logits. It is frozen, in eval mode,
and stays so. The two small classifiers were trained by
:mod:`lit_distill.metrics.train_extractors` on the training part of their data only, and their
weights are part of the package. A metric carries its extractor's ``name``.
"""

import io
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.hub import load_state_dict_from_url
from torch.nn import functional

from lit_distill._undrawn import Undrawn
from lit_distill.datamodules import to_signed

WEIGHTS_FOLDER = Path(__file__).with_name("weights")


class Extractor(nn.Module):
    """Base of all extractors: checks the images, runs the network, stays frozen.

    A subclass implements :meth:`run` and calls ``self.requires_grad_(False).eval()`` when built.

    Attributes:
        name: Suffix of the metrics made with it, as in ``fd_digits``.
        num_features: Size F of a feature vector (torchmetrics' FID looks for it).
        image_shape: (C, H, W) that it takes; None stands for any.
        classifies: Whether its logits are over the data's own labels, so that a label accuracy
            makes sense.
    """

    name: str
    num_features: int
    image_shape: tuple[int, int, int] | None = None
    classifies: bool = False

    def run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of images that were checked: the part that a subclass writes."""
        raise NotImplementedError

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits in one pass.

        Args:
            images: (N, C, H, W) uint8, 0..255.

        Returns:
            Features (N, F) and logits (N, K), both float32 and without a gradient.

        Raises:
            ValueError: If the images are not uint8, or not of a shape that the extractor takes.
        """
        self.check(images)
        # A trainer's bf16 autocast would move the distances by more than what is compared.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self.run(images)

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, F); see :meth:`features_and_logits`."""
        return self.features_and_logits(images)[0]

    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, K); see :meth:`features_and_logits`."""
        return self.features_and_logits(images)[1]

    def check(self, images: Tensor) -> None:
        """Raise ValueError if the images are not uint8 or not of a shape that is taken."""
        if images.dtype != torch.uint8:
            raise ValueError(
                f"The {self.name} extractor takes uint8 images (0..255), not {images.dtype}: "
                "convert images in [-1, 1] by lit_distill.metrics.to_uint8."
            )
        if images.ndim != 4 or self.image_shape not in (None, tuple(images.shape[1:])):
            wanted = "C, H, W" if self.image_shape is None else str(self.image_shape)[1:-1]
            raise ValueError(
                f"The {self.name} extractor takes images of shape (N, {wanted}), not "
                f"{tuple(images.shape)}: choose the extractor that belongs to the data."
            )

    def train(self, mode: bool = True) -> "Extractor":
        """Stay in eval mode whatever ``mode`` says: a parent's ``train()`` arrives here too."""
        return super().train(False)


class PixelExtractor(Extractor):
    """No network: the features are the pixel values in [-1, 1], for points and tiny images.

    Args:
        num_features: Pixels times channels of an image.
    """

    name = "pixels"

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The values, and no logits to speak of."""
        features = to_signed(images).flatten(1)
        if features.shape[1] != self.num_features:
            raise ValueError(
                f"num_features={self.num_features}, but these images have {features.shape[1]} "
                "values: set it to that."
            )
        return features, features[:, :0]


class ConvClassifier(nn.Module):
    """LeNet-like classifier of small images: stages of two convolutions and a pooling.

    SiLU and average pooling instead of ReLU and max pooling make the features smooth functions of
    the pixels.

    Args:
        image_shape: (C, H, W) of the images.
        widths: Channels of each stage; a stage halves height and width.
        num_features: Size of the penultimate layer.
        num_classes: Number of logits.

    Source:
        LeCun et al., Gradient-based learning applied to document recognition (1998), figure 2.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        widths: tuple[int, ...],
        num_features: int,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        layers: list[nn.Module] = []
        for stage_width in widths:
            for inputs in (channels, stage_width):
                layers += [nn.Conv2d(inputs, stage_width, 3, padding=1, bias=False)]
                layers += [nn.BatchNorm2d(stage_width), nn.SiLU()]
            layers += [nn.AvgPool2d(2)]
            channels, height, width = stage_width, height // 2, width // 2
        layers += [nn.Flatten(), nn.Linear(channels * height * width, num_features, bias=False)]
        layers += [nn.BatchNorm1d(num_features), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, F) and logits (N, K) of images (N, C, H, W) in [-1, 1]."""
        features = self.features(images)
        return features, self.head(features)


class ClassifierExtractor(Extractor):
    """A :class:`ConvClassifier` of the data's labels; subclasses say for which images.

    Args:
        weights: A safetensors file; None stands for the package's own.

    Attributes:
        widths: Channels of the network's stages.

    Raises:
        FileNotFoundError: If that file does not exist.
    """

    image_shape: tuple[int, int, int]
    widths: tuple[int, ...]
    num_features = 64
    classifies = True

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        path = Path(weights) if weights else WEIGHTS_FOLDER / f"{self.name}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(
                f"The weights of the {self.name} extractor are not at {path}: make them with "
                f"python -m lit_distill.metrics.train_extractors {self.name}."
            )
        self.network = self.build_network()
        self.network.load_state_dict(load_file(path))  # float16 in the file, float32 from here on
        self.requires_grad_(False).eval()

    @classmethod
    def build_network(cls) -> ConvClassifier:
        """The untrained network; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            return ConvClassifier(cls.image_shape, cls.widths, cls.num_features)

    def run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 64) after the activation, and logits (N, 10)."""
        features, logits = self.network(images.float() / 127.5 - 1)
        return features, logits


class DigitsExtractor(ClassifierExtractor):
    """Classifier of scikit-learn's 8x8 digits.

    Args:
        weights: As for :class:`ClassifierExtractor`.
        scale: Width and height of the square that stands for a pixel; squares are averaged.

    Raises:
        ValueError: If the scale is below 1.
    """

    name = "digits"
    image_shape = (1, 8, 8)
    widths = (32, 64)

    def __init__(self, weights: str | Path | None = None, scale: int = 1) -> None:
        if scale < 1:
            raise ValueError(f"scale={scale}: a pixel stands in a square of at least 1.")
        super().__init__(weights)
        self.scale, self.image_shape = scale, (1, 8 * scale, 8 * scale)

    def run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 64) after the activation, and logits (N, 10)."""
        return super().run(functional.avg_pool2d(images.float(), self.scale))


class MNISTExtractor(ClassifierExtractor):
    """Classifier of MNIST's 28x28 digits; options as :class:`ClassifierExtractor`."""

    name = "mnist"
    image_shape = (1, 28, 28)
    widths = (16, 32, 64)


class InceptionExtractor(Extractor):
    """The Inception-v3 network of the FID, from torch-fidelity: 2048 features, 1008 logits.

    Images of any size, of 1 channel (repeated) or 3; they are resized to 299x299 as in the original
    TensorFlow graph (bilinear, without antialiasing). The logits are those of ImageNet's classes,
    so it ``classifies`` nothing.

    Args:
        weights: Local copy of torch-fidelity's weight file; None downloads it (91 MB, once).

    Raises:
        FileNotFoundError: If the local copy does not exist, or the download fails.
        ValueError: If the file holds no such network.

    Source:
        Heusel et al., GANs trained by a two time-scale update rule (2017), section 3.
    """

    name = "inception"
    num_features = 2048

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import (  # only who uses it needs it
            URL_INCEPTION_V3,
            FeatureExtractorInceptionV3,
        )

        # torch-fidelity would read the file by torch.load(weights_only=False), which runs code
        # from it: it is read safely here and handed over in memory.
        memory = io.BytesIO()
        try:
            torch.save(_read_weights(URL_INCEPTION_V3, weights), memory)
            memory.seek(0)
            with Undrawn():
                self.network = FeatureExtractorInceptionV3(
                    self.name, ["2048", "logits"], feature_extractor_weights_path=memory
                )
        except (RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"The file {weights or URL_INCEPTION_V3} does not hold the weights of "
                f"torch-fidelity's Inception ({type(error).__name__}): give a whole copy of "
                f"{URL_INCEPTION_V3} as the option weights of InceptionExtractor."
            ) from error
        self.requires_grad_(False).eval()

    def check(self, images: Tensor) -> None:
        """Raise ValueError if the images are not uint8 of 1 or 3 channels."""
        super().check(images)
        if images.shape[1] not in (1, 3):
            raise ValueError(
                f"The inception extractor takes images of 1 or 3 channels, not {images.shape[1]}."
            )

    def run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 2048) of the last pooling, and logits (N, 1008)."""
        features, logits = self.network(images.expand(-1, 3, -1, -1))
        return features, logits


def _read_weights(url: str, path: str | Path | None) -> dict[str, Tensor]:
    """The state dict in a local file or, without one, behind the URL; never runs code from it."""
    if path is None:
        try:
            return load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        except OSError as error:
            raise FileNotFoundError(
                f"The Inception weights {url.rsplit('/', 1)[-1]} could not be downloaded "
                f"({error}): fetch {url} elsewhere and give the file as the option weights of "
                "InceptionExtractor, or choose another extractor."
            ) from error
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"There is no file {path}: the option weights of InceptionExtractor names a local copy "
            f"of {url}; without it the file is downloaded."
        )
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights
