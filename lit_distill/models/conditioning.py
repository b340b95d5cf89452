"""Further conditions of a network: the level a jump goes to, the number of steps, the guidance."""

import warnings
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from lit_distill.diffusion import Condition, NetworkDenoiser

_WAVES, _HIDDEN = 32, 128


def add_inputs(denoiser: NetworkDenoiser, inputs: tuple[str, ...]) -> None:
    """Let a denoiser's network take further conditions, in place and without a change at first.

    A network with a method ``add_inputs`` (:class:`~lit_distill.models.UNet`) embeds them with its
    time; any other is wrapped by :class:`ModulatedNetwork`, of which a warning tells.

    Args:
        denoiser: The model.
        inputs: Names, see :func:`lit_distill.diffusion.told`.

    Raises:
        ValueError: If the network has no place for them.
    """
    new = tuple(name for name in inputs if name not in denoiser.inputs)
    if not new:
        return
    own_way: Any = getattr(denoiser.network, "add_inputs", None)
    if own_way is not None:
        own_way(new)
        return
    shape = denoiser.image_shape
    if shape is None:
        raise ValueError(
            f"{type(denoiser.network).__name__} does not say its image_shape, so that it cannot "
            f"be given {', '.join(new)}: set the attribute, or use lit_distill.models.UNet."
        )
    warnings.warn(
        f"{type(denoiser.network).__name__} cannot take {', '.join(new)} by itself: it is wrapped, "
        "so that they scale and shift the channels of its input and output. Such a student has no "
        "diffusers folder.",
        stacklevel=2,
    )
    wrapped = ModulatedNetwork(denoiser.network, shape[0], new)
    weight = next(denoiser.network.parameters(), None)
    if weight is not None:
        wrapped.modulation.to(weight.device)
    denoiser.network = wrapped.train(denoiser.network.training)


class ModulatedNetwork(nn.Module):
    """A network whose input and output channels are scaled and shifted by further conditions.

    Args:
        network: Called as ``network(x, time, condition)``.
        channels: Its channels.
        inputs: Names of the conditions, each ``(B,)``.
    """

    def __init__(self, network: nn.Module, channels: int, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.inputs = network, (*getattr(network, "inputs", ()), *inputs)
        self._own = inputs
        for name in ("image_shape", "num_classes", "null_label"):
            setattr(self, name, getattr(network, name, None))
        last = nn.Linear(_HIDDEN, 4 * channels)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.modulation = nn.Sequential(
            nn.Linear(_WAVES * (1 + len(inputs)), _HIDDEN), nn.SiLU(), last
        )

    def forward(self, x: Tensor, time: Tensor, condition: Condition = None) -> Tensor:
        """Evaluate at ``x`` (B, *shape) and ``time`` (B,)."""
        given = condition if isinstance(condition, dict) else {}
        zeros = torch.zeros(len(x), _WAVES, device=x.device)
        waves = [get_timestep_embedding(time.float(), _WAVES)]
        waves += [
            get_timestep_embedding(given[name].float(), _WAVES) if name in given else zeros
            for name in self._own
        ]
        parts = self.modulation(torch.cat(waves, 1).to(x.dtype)).to(x.dtype).chunk(4, 1)
        scale, shift, scale_out, shift_out = (
            part.reshape(len(x), -1, *[1] * (x.ndim - 2)) for part in parts
        )
        y = self.network((1 + scale) * x + shift, time, condition)
        return (1 + scale_out) * y + shift_out
