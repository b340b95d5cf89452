"""The embedding of all that a U-Net is conditional on beside its time.

A folder of such a network holds a copy of this file, and loads it without lit_distill: it needs
torch and diffusers only.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn

_WAVES = 64  # numbers of the sinusoidal embedding of a value


class ConditionEmbedding(ModelMixin, ConfigMixin):
    """Sum of embeddings of a label and of numbers such as a second noise level or a step count.

    Its result takes the place of the class embedding of diffusers' ``UNet2DModel`` with
    ``class_embed_type="identity"``. The numbers' embeddings start as zeros, so that a network that
    is given new ones starts as what it was.

    Args:
        width: Length of the result: that of the network's time embedding.
        inputs: Names of the numbers.
        num_labels: Number of labels, the null class included, or None.
    """

    @register_to_config
    def __init__(
        self, width: int, inputs: tuple[str, ...] = (), num_labels: int | None = None
    ) -> None:
        super().__init__()
        self.width = width
        self.label = None if num_labels is None else nn.Embedding(num_labels, width)
        self.numbers = nn.ModuleDict({name: TimestepEmbedding(_WAVES, width) for name in inputs})
        for embedding in self.numbers.values():
            last: nn.Linear = embedding.linear_2  # type: ignore[assignment]
            for weight in last.parameters():
                nn.init.zeros_(weight)

    def forward(self, count: int, condition: dict[str, Tensor]) -> Tensor:
        """Embed what is given; a number that is left out adds nothing.

        Args:
            count: Batch size.
            condition: ``label`` (B,) int64 and the numbers, each (B,).

        Returns:
            ``(B, width)``.
        """
        weight = next(self.parameters())
        total = torch.zeros(count, self.width, device=weight.device, dtype=weight.dtype)
        if self.label is not None:
            total = total + self.label(condition["label"])
        for name, embedding in self.numbers.items():
            if name in condition:
                waves = get_timestep_embedding(condition[name].float(), _WAVES)
                total = total + embedding(waves.to(weight.dtype))
        return total
