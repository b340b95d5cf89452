"""Points in the plane: a mixture of Gaussians whose ODE is known, and networks small enough."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from tiny import trainer
from torch import Tensor, nn

from lit_distill.datamodules.batches import FixedLoader
from lit_distill.diffusion import (
    Denoiser,
    EDMDenoiser,
    GaussianMixtureDenoiser,
    LogUniformSigma,
    rho_grid,
    solve,
)
from lit_distill.methods import DiffusionTeacher, DistillationModule

MODES = 8
ANGLES = torch.arange(MODES) * (2 * math.pi / MODES)
MEANS = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
SIGMA_MIN, SIGMA_MAX = 0.01, 20.0


class Perceptron(nn.Module):
    """Predicts a point from a point and, in each layer, the time: 47 thousand weights at most."""

    image_shape = (2,)

    def __init__(self, width: int = 128, layers: int = 3, waves: int = 8) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(waves))
        self.layers = nn.ModuleList(nn.Linear(2 if i == 0 else width, width) for i in range(layers))
        self.last = nn.Linear(width, 2)
        self.numbers = nn.ModuleDict({"time": self._embedding()})

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(name for name in self.numbers if name != "time")

    def add_inputs(self, inputs: tuple[str, ...]) -> None:
        """Take further numbers, embedded as the time is; they change nothing at first."""
        for name in inputs:
            self.numbers[name] = self._embedding()
            for parameter in self.numbers[name].parameters():
                nn.init.zeros_(parameter)

    def _embedding(self) -> nn.ModuleList:
        waves = 1 + 2 * len(self.frequencies)
        return nn.ModuleList(nn.Linear(waves, layer.out_features) for layer in self.layers)

    def forward(self, x, time, condition):
        numbers = {"time": time, **(condition or {})}
        waves = {}
        for name in self.numbers.keys() & numbers.keys():
            number = numbers[name][:, None].float()
            angles = number * self.frequencies
            waves[name] = torch.cat([number, angles.cos(), angles.sin()], 1)
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else nn.functional.silu(x))
            x = x + sum(self.numbers[name][i](w) for name, w in waves.items())
        return self.last(nn.functional.silu(x))


class Points(LightningDataModule):
    """Random batches of tensors in memory, as many as there are steps."""

    def __init__(self, batch_size: int, **tensors: Tensor) -> None:
        super().__init__()
        self.tensors, self.batch_size = tensors, batch_size

    def train_dataloader(self):
        count = len(self.tensors["image"])
        generator = torch.Generator().manual_seed(0)
        size = (self.trainer.max_steps, self.batch_size)
        rows = torch.randint(count, size, generator=generator)
        return FixedLoader(lambda i: {name: t[i] for name, t in self.tensors.items()}, rows)


def truth() -> GaussianMixtureDenoiser:
    """Eight Gaussians of standard deviation 0.3 on a circle of radius 2."""
    return GaussianMixtureDenoiser(MEANS, 0.3, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)


def noises(count: int = 4_096) -> Tensor:
    """The noises that maps are compared on."""
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(1))


def exact_ends(noise: Tensor, steps: int = 256) -> Tensor:
    """The teacher's ODE map by Heun's method, in float64 (64 steps are right to 0.1%)."""
    grid = rho_grid(steps, SIGMA_MIN, SIGMA_MAX)
    return solve(truth(), SIGMA_MAX * noise.double(), grid).float()


@dataclass(frozen=True)
class Errors:
    """How far a map is from the exact one.

    Attributes:
        relative: Root mean square error over the root mean square of the exact ends.
        median: Median distance.
        other_mode: Share of points that end at another mode.
    """

    relative: float
    median: float
    other_mode: float

    def __str__(self) -> str:
        return f"{self.relative:.2%} {self.median:.4f} {self.other_mode:.2%}"


def errors(points: Tensor, exact: Tensor) -> Errors:
    """Compare a map's ends with the exact ones from the same noises."""
    distance = (points - exact).square().sum(1)
    nearest, expected = (torch.cdist(p, MEANS).argmin(1) for p in (points, exact))
    return Errors(
        relative=float((distance.mean() / exact.square().sum(1).mean()).sqrt()),
        median=float(distance.sqrt().median()),
        other_mode=float((nearest != expected).float().mean()),
    )


def fit(module: DistillationModule, data: Points, updates: int, folder: Path) -> None:
    """Train for a number of student updates."""
    run = trainer(folder, max_steps=updates, limit_val_batches=0)
    run.fit(module, data)
    assert run.global_step >= updates


def falling(updates: int) -> Any:
    """A learning rate that warms up shortly and falls to almost nothing by half a cosine."""

    def factor(step: int) -> float:
        share = min(step / updates, 1)
        return min(1, (step + 1) / 100) * (0.005 + 0.995 * (1 + math.cos(math.pi * share)) / 2)

    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def pretrained(folder: Path, updates: int, batch_size: int = 1_024) -> Denoiser:
    """A small network, trained to denoise the mixture."""
    torch.manual_seed(0)
    start = EDMDenoiser(Perceptron(), SIGMA_MIN, SIGMA_MAX, sigma_data=1.45, time_scale=1.0)
    module = DiffusionTeacher(
        start,
        LogUniformSigma(SIGMA_MIN, SIGMA_MAX),
        optimizer=partial(torch.optim.Adam, lr=2e-3),
        lr_scheduler=falling(updates),
    )
    fit(module, Points(batch_size, image=truth().draw(100_000)), updates, folder)
    return module.network
