"""Networks from diffusers behind the one signature that denoisers ask for."""

from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from lit_distill.diffusion import Condition, labels_of
from lit_distill.models.condition_embedding import ConditionEmbedding
from lit_distill.models.mnist_unet import MNISTUNet


class UNet(nn.Module):
    """diffusers' ``UNet2DModel`` as ``network(x, time, condition)``.

    A class-conditional network has one class more than the data: the last one, the *null class*,
    stands for "no label", so that it can be guided.

    Args:
        image_size: Height and width of an image; divisible by ``patch_size``, and then by 2 for
            each level but the first.
        channels: Channels of an image.
        num_classes: Number of classes, or None for an unconditional network.
        block_out_channels: Channels of each resolution level, from the finest.
        layers_per_block: Residual blocks of each level.
        attention_levels: Levels with self-attention (0 is the finest). The middle always has it.
        dropout: Dropout rate inside the residual blocks.
        norm_num_groups: Groups of the group normalisation.
        options: Any other argument of ``UNet2DModel``; these win.
        patch_size: Side of the squares of pixels that become the channels of one pixel
            (space-to-depth): 2 makes the network about 4 times as fast. Noise stays noise, so
            that nothing else changes.

    Raises:
        ValueError: If the image cannot be cut or halved as often as is asked, or the widths do not
            fit the normalisation or the attention.
    """

    def __init__(
        self,
        image_size: int,
        channels: int = 3,
        num_classes: int | None = None,
        block_out_channels: list[int] | None = None,
        layers_per_block: int = 2,
        attention_levels: list[int] | None = None,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        options: dict[str, Any] | None = None,
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        widths = [128, 256, 256] if block_out_channels is None else block_out_channels
        halvings = len(widths) - 1
        if patch_size < 1 or image_size % patch_size:
            raise ValueError(
                f"image_size={image_size} cannot be cut into squares of patch_size={patch_size}: "
                "give a size that divides it."
            )
        if image_size // patch_size % 2**halvings:
            patches = f" after patch_size={patch_size}" if patch_size > 1 else ""
            raise ValueError(
                f"image_size={image_size} cannot be halved {halvings} times{patches}: give fewer "
                "block_out_channels, or images of another size."
            )
        narrow = [width for width in widths if width % norm_num_groups]
        if narrow:
            raise ValueError(
                f"block_out_channels={widths} must be multiples of norm_num_groups="
                f"{norm_num_groups}."
            )
        head = (options or {}).get("attention_head_dim", 8)
        if (options or {}).get("add_attention", True) and head is not None and widths[-1] < head:
            raise ValueError(
                f"The last of block_out_channels={widths} is less than attention_head_dim={head}: "
                "give more channels, or options: {add_attention: false}."
            )
        attends = [level in (attention_levels or []) for level in range(len(widths))]
        arguments: dict[str, Any] = {
            "sample_size": image_size // patch_size,
            "in_channels": channels * patch_size**2,
            "out_channels": channels * patch_size**2,
            "block_out_channels": tuple(widths),
            "layers_per_block": layers_per_block,
            "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            "up_block_types": tuple(
                "AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)
            ),
            "dropout": dropout,
            "norm_num_groups": norm_num_groups,
            "num_class_embeds": None if num_classes is None else num_classes + 1,
        }
        unet = UNet2DModel(**(arguments | (options or {})))
        self._adopt(unet, num_classes, num_classes, patch_size)

    def _adopt(
        self,
        unet: UNet2DModel | MNISTUNet,
        classes: int | None,
        null_label: int | None,
        patch_size: int,
    ) -> None:
        size, channels = unet.config.sample_size, unet.config.in_channels // patch_size**2
        sides = (size, size) if isinstance(size, int) else size
        self.unet, self.patch_size = unet, patch_size
        self.conditions: ConditionEmbedding | None = None
        self.image_shape = None
        if sides is not None:
            self.image_shape = (channels, *(patch_size * side for side in sides))
        self.num_classes, self.null_label = classes, null_label
        # What a discriminator looks at.
        self.feature_layers = ("unet.down2" if isinstance(unet, MNISTUNet) else "unet.mid_block",)

    @classmethod
    def wrap(
        cls,
        unet: UNet2DModel | MNISTUNet,
        num_classes: int | None = None,
        null_label: int | None = None,
        conditions: ConditionEmbedding | None = None,
        patch_size: int = 1,
    ) -> "UNet":
        """Take over a ``UNet2DModel`` made elsewhere, or a network that is called as one.

        Args:
            unet: The network.
            num_classes: Its classes; by default all that it embeds.
            null_label: The one that stands for "no label", if it has one.
            conditions: Embedding of its further conditions, where it takes any.
            patch_size: Side of the squares of pixels that are one pixel to the network.

        Raises:
            ValueError: If its channels are no squares of that side.
        """
        if unet.config.in_channels % patch_size**2:
            raise ValueError(
                f"A network of {unet.config.in_channels} channels takes no squares of "
                f"patch_size={patch_size}."
            )
        network = cls.__new__(cls)
        nn.Module.__init__(network)
        embedded = unet.config.num_class_embeds
        if conditions is not None:
            embedded = conditions.config.num_labels
        classes = embedded if num_classes is None else num_classes
        network._adopt(unet, classes, null_label, patch_size)
        network.conditions = conditions
        return network

    @property
    def inputs(self) -> tuple[str, ...]:
        """Further conditions that the network takes."""
        return () if self.conditions is None else tuple(self.conditions.config.inputs)

    def add_inputs(self, inputs: tuple[str, ...]) -> None:
        """Let the network take further conditions; until it is trained they change nothing.

        Raises:
            ValueError: If the network's place for them is taken.
        """
        if isinstance(self.unet, MNISTUNet):
            raise ValueError(
                f"An MNISTUNet has no place for {', '.join(inputs)}: choose a method without "
                "further inputs, or a teacher with another network."
            )
        old, kind = self.unet, self.unet.config.class_embed_type
        if self.conditions is None and kind is not None:
            raise ValueError(
                f"This UNet2DModel embeds its class as {kind!r}, which leaves no place for "
                f"{', '.join(inputs)}: use a network with plain classes or none."
            )
        labels = old.class_embedding if self.conditions is None else self.conditions.label
        conditions = ConditionEmbedding(
            width=old.time_embedding.linear_2.out_features,
            inputs=(*self.inputs, *inputs),
            num_labels=None if labels is None else labels.num_embeddings,
        )
        if self.conditions is not None:
            conditions.load_state_dict(self.conditions.state_dict(), strict=False)
        elif labels is not None:
            conditions.label.load_state_dict(labels.state_dict())
        config = {k: v for k, v in old.config.items() if not k.startswith("_")}
        config |= {"class_embed_type": "identity", "num_class_embeds": None}
        unet = UNet2DModel(**config)
        unet.load_state_dict(
            {k: v for k, v in old.state_dict().items() if not k.startswith("class_embedding.")}
        )
        if old.is_gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        weight = next(old.parameters())
        for module in (unet, conditions):
            module.train(old.training).to(weight.device)
            if weight.dtype != torch.float32:  # said only where needed: diffusers warns of it
                module.to(weight.dtype)
        self.unet, self.conditions = unet, conditions

    def forward(self, x: Tensor, time: Tensor, condition: Condition = None) -> Tensor:
        """Evaluate at ``x`` (B, C, H, W) and ``time`` (B,), with labels (B,) where it takes any.

        Raises:
            ValueError: If a label-conditional network gets no labels.
        """
        labels = labels_of(condition)
        if self.num_classes is None:
            labels = None  # data may carry labels that an unconditional network does not take
        elif labels is None:
            raise ValueError(
                f"This network is conditional on {self.num_classes} classes and got no labels: "
                "use data with labels, or an unconditional network."
            )
        if self.conditions is not None:
            given = dict(condition) if isinstance(condition, dict) else {}
            if labels is not None:
                given["label"] = labels
            labels = self.conditions(len(x), given)
        patches = torch.pixel_unshuffle(x, self.patch_size)
        out = self.unet(patches, time, class_labels=labels, return_dict=False)[0]
        return torch.pixel_shuffle(out, self.patch_size)
