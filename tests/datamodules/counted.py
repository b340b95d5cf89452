"""Stand-ins whose images carry their own number, and a module that notes what it is given.

Run as a script it trains, validates and predicts on two processes and notes what each saw.
"""

import lit_distill  # noqa: F401  # isort: skip  # before lightning: see lit_distill/_torchvision_ops.py

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_distill.datamodules import ImageDataModule


class CountedData(ImageDataModule):
    """Image ``i`` has the pixels ``[i // 256, i % 256, 0, 255]``; its label is ``i % 3``."""

    name = "counted"
    image_shape = (1, 2, 2)
    num_classes = 3

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        number = torch.arange({"train": 44, "val": 9, "test": 5}[split])
        constant = torch.tensor([0, 255]).expand(len(number), 2)
        pixels = torch.cat([number[:, None] // 256, number[:, None] % 256, constant], 1)
        return pixels.to(torch.uint8).view(-1, 1, 2, 2), number % 3


def numbers_of(batch: dict[str, Tensor]) -> list[int]:
    """The numbers that the images of a batch carry."""
    pixels = ((batch["image"] + 1) * 127.5).round().long().flatten(1)
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


class Recorder(LightningModule):
    """Notes the images of each step; its weight depends on their order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.seen: dict[str, list[list[int]]] = {"train": [], "val": [], "predict": []}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen["train"].append(numbers_of(batch))
        return (self.weight * batch["image"].flatten(1)).pow(2).sum() - self.weight.sum()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.seen["val"].append(numbers_of(batch))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen["predict"].append(batch["index"].tolist())
        return batch["index"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def trainer(folder: Path, **options: Any) -> Trainer:
    """A quiet trainer on the CPU."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", default_root_dir=folder, **{**quiet, **options})


def main(folder: Path) -> None:
    recorder = Recorder()
    data = CountedData(batch_size=8, predict_samples=10, predict_batch_size=3, workers=2)
    # use_distributed_sampler stays at Lightning's default, which must not touch our loaders.
    two = trainer(
        folder,
        devices=2,
        strategy="ddp",
        max_epochs=2,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
    )
    two.fit(recorder, data)
    two.predict(recorder, data, return_predictions=False)
    data.skip_predict = {0, 1, 3}  # one item left: the second process has none
    two.predict(recorder, data, return_predictions=False)
    (folder / f"rank{two.global_rank}.json").write_text(json.dumps(recorder.seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
