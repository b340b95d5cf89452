"""A small world with closed forms: three patterns of 4x4 pixels, their exact denoiser, a student.

Run as a script it tests a student on some processes and writes the rows.
"""

import lit_distill  # noqa: F401  # isort: skip  # before lightning: see lit_distill/_torchvision_ops.py

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lit_distill.callbacks.evaluation import Evaluation
from lit_distill.datamodules import ImageDataModule
from lit_distill.diffusion import Denoiser, sample
from lit_distill.metrics import Extractor

SPREAD = 0.2
SIZES = {"train": 120, "val": 60, "test": 90}


def patterns() -> Tensor:
    """Three images (3, 1, 4, 4) in [-1, 1] that are far apart."""
    rows = torch.eye(4)[:3].repeat_interleave(4, 1).view(3, 1, 4, 4)
    return 1.2 * rows - 0.6


class ToyData(ImageDataModule):
    """A pattern plus noise; the label says which."""

    name = "toy"
    image_shape = (1, 4, 4)
    num_classes: int | None = 3

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(len(split))
        labels = torch.arange(SIZES[split]) % 3
        noise = torch.randn((len(labels), 1, 4, 4), generator=generator)
        images = patterns()[labels] + SPREAD * noise
        return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), labels


class ToyDenoiser(Denoiser):
    """The exact denoiser of each class, up to a bias that a student can learn."""

    sigma_min, sigma_max = 0.02, 20.0
    image_shape, num_classes = (1, 4, 4), 3

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, x: Tensor, sigma: Tensor, condition: Any = None) -> Tensor:
        noise = sigma.view(-1, 1, 1, 1).to(x.dtype) ** 2
        means = patterns().to(x.device).mean(0) if condition is None else patterns()[condition]
        return (SPREAD**2 * x + noise * means) / (SPREAD**2 + noise) + self.bias


class ToyExtractor(Extractor):
    """Features are the pixels; an image has the class of the nearest pattern."""

    name, num_features, classifies = "toy", 16, True

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.requires_grad_(False).eval()

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self.scale * (images.float() / 127.5 - 1).flatten(1)
        return pixels, -torch.cdist(pixels, patterns().flatten(1))


class Toy(LightningModule):
    """Learns the bias away; draws random numbers in training and in its preview."""

    def __init__(self, teacher: Denoiser | None = None, bias: float = 0.1, solver: str = "euler"):
        super().__init__()
        self.student, self.teacher, self.solver = ToyDenoiser(bias), teacher, solver
        self.teacher_evaluations, self.train_seconds = 7, 1.5
        self.further_ema_decays: tuple[float, ...] = ()
        self.previews: list[tuple[Tensor, Tensor | None]] = []

    def generate(self, noise: Tensor, condition: Any, steps: int) -> Tensor:
        return sample(self.student, noise, steps=steps, solver=self.solver, condition=condition)

    def preview(self, noise: Tensor, condition: Any) -> dict[str, Tensor]:
        self.previews.append((noise, condition))
        assert not self.training
        return {
            "student": self.generate(noise, condition, 1),
            "noised": noise + torch.randn_like(noise),
        }

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x = batch["image"] + torch.randn_like(batch["image"])
        sigma = torch.ones(len(x), device=x.device)
        return (self.student(x, sigma, batch["label"]) - batch["image"]).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=0.1)


def evaluation(**options: Any) -> Evaluation:
    """An evaluation that takes a second."""
    small = {"num_samples": 200, "batch_size": 30, "teacher_steps": 4, "validation_samples": 80}
    return Evaluation(ToyExtractor(), **{**small, **options})


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    """A quiet trainer on the CPU."""
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "devices": 1,
    }
    options = {**quiet, **options}
    return Trainer(accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **options)


def compare_with_teacher(folder: Path, devices: int) -> None:
    """Test and validate on some processes; each writes its rows and what it logged."""
    callback = evaluation(steps=(1, 2))
    run = trainer(folder, callback, devices=devices, strategy="ddp" if devices > 1 else "auto")
    run.test(Toy(ToyDenoiser()), ToyData(batch_size=10))
    run.validate(Toy(ToyDenoiser()), ToyData(batch_size=10), verbose=False)
    logged = {name: value.item() for name, value in run.callback_metrics.items()}
    torch.save((callback.rows, logged), folder / f"rank-{run.global_rank}.pt")


if __name__ == "__main__":
    compare_with_teacher(Path(sys.argv[1]), int(sys.argv[2]))
