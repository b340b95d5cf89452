"""The conditional network of a widely used MNIST diffusion tutorial, with its tensors' names.

A folder of such a network holds a copy of this file, and loads it without lit_distill: it needs
torch and diffusers only.
"""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn


class MNISTUNet(ModelMixin, ConfigMixin):
    """U-Net of 28x28 images whose public checkpoints have the prefix ``nn_model.``.

    It is called as diffusers' ``UNet2DModel``. Time and class scale and shift the features of two
    levels; the class enters as a *minus* one-hot vector, and "no class" as zeros. Batch
    normalisation always uses its stored statistics, whatever ``train()`` says: those of a batch
    would let a teacher, a generator and a fake score see different networks.

    Args:
        sample_size: Height and width of an image, a multiple of 4.
        in_channels: Its channels.
        n_feat: Width; a multiple of 8.
        num_class_embeds: Number of labels; the last one stands for "no class".
        num_timesteps: T. The network sees ``t / T`` with t = 1..T; its argument ``timestep`` is
            ``t - 1``, an index into T betas.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 28,
        in_channels: int = 1,
        n_feat: int = 128,
        num_class_embeds: int = 11,
        num_timesteps: int = 400,
    ) -> None:
        super().__init__()
        self.num_classes, self.num_timesteps = num_class_embeds - 1, num_timesteps
        wide, bottom = 2 * n_feat, sample_size // 4
        self.init_conv = _Convolutions(in_channels, n_feat, residual=True)
        self.down1 = _Stage(_Convolutions(n_feat, n_feat), nn.MaxPool2d(2))
        self.down2 = _Stage(_Convolutions(n_feat, wide), nn.MaxPool2d(2))
        self.to_vec = nn.Sequential(nn.AvgPool2d(bottom), nn.GELU())
        self.timeembed1, self.timeembed2 = _embedding(1, wide), _embedding(1, n_feat)
        self.contextembed1 = _embedding(self.num_classes, wide)
        self.contextembed2 = _embedding(self.num_classes, n_feat)
        self.up0 = nn.Sequential(
            nn.ConvTranspose2d(wide, wide, bottom, bottom), nn.GroupNorm(8, wide), nn.ReLU()
        )
        self.up1, self.up2 = _upward(2 * wide, n_feat), _upward(wide, n_feat)
        self.out = nn.Sequential(
            nn.Conv2d(wide, n_feat, 3, 1, 1),
            nn.GroupNorm(8, n_feat),
            nn.ReLU(),
            nn.Conv2d(n_feat, in_channels, 3, 1, 1),
        )
        self.train()

    def train(self, mode: bool = True) -> "MNISTUNet":
        """Set the mode of all but batch normalisation."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predict the noise.

        Args:
            sample: ``(B, C, H, W)``, noisy images; clean ones lie in [0, 1].
            timestep: ``(B,)`` or one for all, from 0 to ``num_timesteps - 1``.
            class_labels: ``(B,)`` int64; None stands for no class.
            return_dict: Return diffusers' output object instead of a tuple.

        Returns:
            ``(B, C, H, W)`` as ``sample`` of the object, or in a tuple.
        """
        count, dtype = len(sample), sample.dtype
        index = torch.as_tensor(timestep, device=sample.device).expand(count)
        time = ((index + 1) / self.num_timesteps)[:, None].to(dtype)
        if class_labels is None:
            class_labels = torch.full((count,), self.num_classes, device=sample.device)
        # The last column is that of "no class", which leaves zeros.
        context = -nn.functional.one_hot(class_labels, self.num_classes + 1)[:, :-1].to(dtype)

        first = self.init_conv(sample)
        down1 = self.down1(first)
        down2 = self.down2(down1)
        up = self.up0(self.to_vec(down2))
        scale, shift = _pixel(self.contextembed1(context)), _pixel(self.timeembed1(time))
        up = self.up1(torch.cat([scale * up + shift, down2], 1))
        scale, shift = _pixel(self.contextembed2(context)), _pixel(self.timeembed2(time))
        up = self.up2(torch.cat([scale * up + shift, down1], 1))
        noise = self.out(torch.cat([up, first], 1))
        return UNet2DOutput(sample=noise) if return_dict else (noise,)


class _Convolutions(nn.Module):
    """Two convolutions; ``residual`` adds the result of the first."""

    def __init__(self, inputs: int, outputs: int, residual: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = _convolution(inputs, outputs), _convolution(outputs, outputs)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv1(x)
        second = self.conv2(first)
        return (first + second) / 1.414 if self.residual else second


class _Stage(nn.Module):
    """Layers under the name that the checkpoints give them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.GELU())


def _upward(inputs: int, outputs: int) -> _Stage:
    return _Stage(
        nn.ConvTranspose2d(inputs, outputs, 2, 2),
        _Convolutions(outputs, outputs),
        _Convolutions(outputs, outputs),
    )


def _embedding(inputs: int, outputs: int) -> _Stage:
    return _Stage(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


def _pixel(vector: Tensor) -> Tensor:
    return vector[:, :, None, None]
