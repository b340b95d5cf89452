"""Discriminators: small heads on the features of a network that knows images already."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_distill.diffusion import Condition, Denoiser, NetworkDenoiser


@contextmanager
def tapped(network: nn.Module, layers: Sequence[str]) -> Iterator[list[Tensor]]:
    """Collect what named layers of a network put out while it is evaluated once.

    Args:
        network: The network.
        layers: Names of submodules, as in ``network.named_modules()``.

    Yields:
        A list that fills with ``(B, C, ...)``, in the order in which the layers are evaluated.

    Raises:
        ValueError: If it has no such layer; the message lists those it has.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in _layers(network, layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class Discriminator(nn.Module):
    """Tells real from generated samples by heads on the features of a backbone.

    The backbone is not part of it, and is given at each call: a fake score in training (DMD2), a
    frozen teacher (Sauer et al. 2024, LADD), or any network that takes images.

    Args:
        backbone: A denoiser, whose network is asked at noised samples, or another module, which is
            asked at images and returns features ``(B, C, ...)`` or a list of such.
        layers: Names of the layers of a denoiser's network to look at; by default those that the
            network names itself in ``feature_layers``.
        width: Width of the heads.

    Raises:
        ValueError: If the network has no such layers, or none are named.
    """

    def __init__(
        self, backbone: nn.Module, layers: Sequence[str] | None = None, width: int = 128
    ) -> None:
        super().__init__()
        self.layers: tuple[str, ...] = ()
        if isinstance(backbone, NetworkDenoiser):
            network = backbone.network
            named = getattr(network, "feature_layers", ()) if layers is None else layers
            if not named:
                raise ValueError(
                    f"A {type(network).__name__} does not say which of its layers a discriminator "
                    "may look at: name some (option feature_layers), of "
                    f"{_names(network)}."
                )
            self.layers = tuple(named)
        elif isinstance(backbone, Denoiser):
            raise ValueError(
                f"A {type(backbone).__name__} has no network whose features a discriminator could "
                "look at."
            )
        elif layers is not None:
            raise ValueError("feature_layers name layers of a denoiser, not of feature_network.")
        self.heads = nn.ModuleList(_Head(size, width) for size in self._sizes(backbone))

    def features(
        self, backbone: nn.Module, x: Tensor, sigma: Tensor, condition: Condition = None
    ) -> list[Tensor]:
        """Features of samples: of noised ones where the backbone is a denoiser.

        Args:
            backbone: What it was made for, or a network of the same form.
            x: ``(B, *shape)``, samples, noised to ``sigma`` for a denoiser.
            sigma: ``(B,)``, their noise levels.
            condition: Passed to a denoiser.
        """
        return self.look(backbone, x, sigma, condition)[1]

    def look(
        self, backbone: nn.Module, x: Tensor, sigma: Tensor, condition: Condition = None
    ) -> tuple[Tensor, list[Tensor]]:
        """What the backbone makes of samples, and the features on the way to it."""
        if not isinstance(backbone, NetworkDenoiser):
            made = backbone(x)
            return x, list(made) if isinstance(made, list | tuple) else [made]
        with tapped(backbone.network, self.layers) as seen:
            denoised = backbone(x, sigma, condition)
        return denoised, seen

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits ``(B, N)`` of features: one for each place of each layer."""
        return torch.cat([h(f) for h, f in zip(self.heads, features, strict=True)], 1)

    @torch.no_grad()
    def _sizes(self, backbone: nn.Module) -> list[int]:
        """Channels of the features, found by asking for those of an empty image."""
        shape: Any = getattr(backbone, "image_shape", None)
        if shape is None:
            raise ValueError(
                f"A {type(backbone).__name__} does not say its image_shape, which a discriminator "
                "needs to know: set the attribute."
            )
        weight = next(backbone.parameters(), torch.zeros(1))
        x, sigma = torch.zeros(1, *shape, device=weight.device), torch.ones(1, device=weight.device)
        some = backbone.some_condition(1, weight.device) if isinstance(backbone, Denoiser) else None
        found = self.features(backbone, x, sigma, some)
        return [feature.shape[1] for feature in found]


class _Head(nn.Module):
    """Logits of features ``(B, C, ...)``, for each place by itself."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        places = features.flatten(2).mT if features.ndim > 2 else features[:, None]
        # Under autocast the last layer's are in bfloat16, which rounds a loss of 0.693 by 0.002.
        return self.layers(places.float()).squeeze(-1).float()


def _layers(network: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    network = getattr(network, "backbone", network)  # of one with an adapter
    modules = dict(network.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(
            f"{type(network).__name__} has no layer {', '.join(unknown)} (option feature_layers); "
            f"it has {_names(network)}."
        )
    return [modules[name] for name in names]


def _names(network: nn.Module) -> str:
    """Its layers, down to those of blocks."""
    return ", ".join(name for name, _ in network.named_modules() if name and name.count(".") < 3)
