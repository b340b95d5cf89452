"""Distances between images: ``distance(x, target) -> (B,)``, averaged over all but the batch."""

import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lit_distill._undrawn import Undrawn
from lit_distill.diffusion import Codec


class Distance(nn.Module):
    """A distance between two batches of images ``(B, C, H, W)`` in [-1, 1].

    It is computed from features of both, so that those of a fixed target can be kept.

    Attributes:
        of_images: Whether it knows images only, so that latents are decoded for it; the others
            compare any numbers.
    """

    of_images: ClassVar[bool] = False

    def features(self, images: Tensor) -> list[Tensor]:
        """What is compared: for plain distances the images themselves."""
        return [images]

    def compare(self, features: list[Tensor], targets: list[Tensor]) -> Tensor:
        """Distance ``(B,)`` between two sets of features, each ``(B, ...)``."""
        raise NotImplementedError

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Distance ``(B,)`` of ``x`` to a fixed ``target``; no gradient reaches the target."""
        with torch.no_grad():
            targets = self.features(target)
        return self.compare(self.features(x), targets)


class L2(Distance):
    """Mean squared error."""

    def compare(self, features: list[Tensor], targets: list[Tensor]) -> Tensor:
        """Mean of ``(x - y)^2``."""
        return (features[0] - targets[0]).flatten(1).square().mean(1)


class L1(Distance):
    """Mean absolute error."""

    def compare(self, features: list[Tensor], targets: list[Tensor]) -> Tensor:
        """Mean of ``|x - y|``."""
        return (features[0] - targets[0]).flatten(1).abs().mean(1)


class PseudoHuber(Distance):
    """``sqrt(|x - y|^2 + c^2) - c`` of the whole image (Song & Dhariwal 2024, Eq. 7).

    Args:
        c: Where the square ends and the norm begins; by default ``0.00054 sqrt(D)`` for ``D``
            numbers an image, as in that paper.

    Raises:
        ValueError: If ``c`` is not above 0.
    """

    def __init__(self, c: float | None = None) -> None:
        super().__init__()
        if c is not None and c <= 0:
            raise ValueError(f"c={c}: the pseudo-Huber distance needs a constant above 0.")
        self.c = c

    def compare(self, features: list[Tensor], targets: list[Tensor]) -> Tensor:
        """Pseudo-Huber distance, divided by nothing: it grows with the image."""
        difference = (features[0] - targets[0]).flatten(1)
        c = 0.00054 * difference.shape[1] ** 0.5 if self.c is None else self.c
        # |d|^2 / (sqrt(|d|^2 + c^2) + c): the same number without the cancellation near 0
        square = difference.square().sum(1)
        return square / ((square + c**2).sqrt() + c)


class Huber(Distance):
    """Mean of ``sqrt((x - y)^2 + c^2) - c`` over all numbers, as in diffusers' LCM training.

    Args:
        c: Where the square ends and the absolute value begins.

    Raises:
        ValueError: If ``c`` is not above 0.
    """

    def __init__(self, c: float = 1e-3) -> None:
        super().__init__()
        if c <= 0:
            raise ValueError(f"c={c}: the Huber distance needs a constant above 0.")
        self.c = c

    def compare(self, features: list[Tensor], targets: list[Tensor]) -> Tensor:
        """Mean of the smoothed absolute error."""
        square = (features[0] - targets[0]).flatten(1).square()
        return (square / ((square + self.c**2).sqrt() + self.c)).mean(1)


class LPIPS(Distance):
    """Learned perceptual distance (Zhang et al. 2018), through the ``lpips`` package.

    Methods compare latents by it as the images that they decode to, see :func:`as_distance`.

    Args:
        net: Backbone: ``vgg``, ``alex`` or ``squeeze``.
        resize: Side length that images are resized to before (224 in the DMD and consistency
            papers; smaller is faster); None keeps theirs, which must be at least 32 pixels.
        weights: Local file of the backbone's torchvision ``state_dict``; None lets torchvision
            download it.

    Raises:
        ValueError: If the backbone is unknown, or the file holds something else.
        FileNotFoundError: If the weights are not there and cannot be downloaded.
    """

    of_images = True
    _FILES: ClassVar[dict[str, str]] = {
        "vgg": "vgg16-397923af.pth",
        "alex": "alexnet-owt-7be5be79.pth",
        "squeeze": "squeezenet1_1-b8a52dc0.pth",
    }

    def __init__(
        self, net: str = "vgg", resize: int | None = 224, weights: str | Path | None = None
    ) -> None:
        super().__init__()
        if net not in self._FILES:
            raise ValueError(f"net={net!r} is no LPIPS backbone; choose {', '.join(self._FILES)}.")
        self.resize = resize
        self.model: Any = self._build(net, weights).requires_grad_(False).eval()

    def _build(self, net: str, weights: str | Path | None) -> Any:
        if weights is None:
            try:
                return _lpips(net, pnet_rand=False)
            # torch.hub raises the first without a network, the second after a broken download
            except (OSError, RuntimeError) as error:
                raise FileNotFoundError(
                    f"LPIPS needs {self._FILES[net]} (torchvision's weights), which could not be "
                    f"downloaded ({error}). Fetch that file where there is a network and give its "
                    "path as the distance's option `weights`, or choose distance: l2."
                ) from error
        if not Path(weights).is_file():
            raise FileNotFoundError(
                f"The option `weights` of LPIPS names {weights}, which does not exist; it must be "
                f"a local copy of torchvision's {self._FILES[net]}."
            )
        model = _lpips(net, pnet_rand=True)
        # lpips cuts torchvision's `features` into slices that keep the layers' numbers.
        names = {key: "features." + key.split(".", 1)[1] for key in model.net.state_dict()}
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise TypeError("it holds no state_dict")
            model.net.load_state_dict({key: state[name] for key, name in names.items()})
        # damaged or empty, no state_dict, the names or the shapes of another network
        except (UnpicklingError, KeyError, EOFError, TypeError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{weights}, the option `weights` of LPIPS, is not torchvision's "
                f"{self._FILES[net]} ({type(error).__name__} {reason})."
            ) from error
        return model

    def train(self, mode: bool = True) -> "LPIPS":
        """The heads have dropout, which must stay off."""
        return super().train(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Unit-normalised activations of the backbone's five (seven for squeeze) stages.

        Raises:
            ValueError: If the images are too small for the backbone, or neither grey nor colour.
        """
        if images.shape[1] not in (1, 3):
            raise ValueError(
                f"LPIPS cannot look at images of {images.shape[1]} channels: it was trained on "
                "colour images. Choose another distance."
            )
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if self.resize is not None:
            size = (self.resize, self.resize)
            images = functional.interpolate(images, size, mode="bilinear", antialias=False)
        if min(images.shape[-2:]) < 32:
            raise ValueError(
                f"LPIPS cannot look at images of {tuple(images.shape[-2:])} pixels: set the "
                "distance's option `resize` to 32 or more (64 is a good choice for tiny images)."
            )
        stages = self.model.net(self.model.scaling_layer(images))
        return [_unit(stage) for stage in stages]

    def compare(self, features: list[Tensor], targets: list[Tensor]) -> Tensor:
        """Sum over stages of the weighted squared differences, averaged over positions."""
        total = torch.zeros(len(features[0]), device=features[0].device)
        for head, ours, theirs in zip(self.model.lins, features, targets, strict=True):
            total = total + head((ours - theirs) ** 2).float().mean(dim=(1, 2, 3))
        return total


def _lpips(net: str, pnet_rand: bool) -> Any:
    """The package's model, without its warnings of torchvision's old argument names."""
    import lpips

    with warnings.catch_warnings(), Undrawn():
        warnings.simplefilter("ignore", UserWarning)
        return lpips.LPIPS(net=net, pnet_rand=pnet_rand, verbose=False)


def _unit(features: Tensor) -> Tensor:
    """Normalise over channels, with a finite gradient where all of them are 0 (lpips's is NaN)."""
    return features * (features.float().square().sum(1, keepdim=True) + 1e-20).rsqrt()


class Decoded(Distance):
    """A distance between latents ``(B, c, h, w)``: that of the images which they decode to.

    The student's gradient passes through the frozen decoder; the target is decoded without one.

    Args:
        distance: Between images.
        codec: The latent model's, which decodes.
    """

    def __init__(self, distance: Distance, codec: Codec) -> None:
        super().__init__()
        self.distance, self.codec = distance, codec

    def features(self, images: Tensor) -> list[Tensor]:
        """The distance's features of the decoded latents."""
        return self.distance.features(self.codec.decode_with_gradient(images))

    def compare(self, features: list[Tensor], targets: list[Tensor]) -> Tensor:
        """As the distance does."""
        return self.distance.compare(features, targets)


DISTANCES: dict[str, type[Distance]] = {
    "lpips": LPIPS,
    "l2": L2,
    "l1": L1,
    "huber": Huber,
    "pseudo_huber": PseudoHuber,
}
"""Distances by name, with their default settings."""


def as_distance(distance: str | Distance, codec: Codec | None = None) -> Distance:
    """A distance itself, or the one of that name, between what a model works on.

    Args:
        distance: The distance, or a name in ``DISTANCES``.
        codec: The model's :attr:`~lit_distill.diffusion.Denoiser.codec`. For latents a distance
            that knows images only, such as LPIPS, sees them decoded; the others compare latents.

    Raises:
        ValueError: If the name is unknown.
    """
    if not isinstance(distance, Distance):
        distance = _named(distance)
    if codec is None or not distance.of_images:
        return distance
    return Decoded(distance, codec)


def _named(distance: str) -> Distance:
    if distance not in DISTANCES:
        raise ValueError(
            f"distance={distance!r} is unknown; choose one of {', '.join(DISTANCES)}, or give a "
            "class_path with init_args."
        )
    return DISTANCES[distance]()
