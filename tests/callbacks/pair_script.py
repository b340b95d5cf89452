"""Writes pairs of a stand-in teacher; as a script it can be killed while it does so."""

import lit_distill  # noqa: F401  # isort: skip  # before lightning: see lit_distill/_torchvision_ops.py

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_distill.callbacks.pair_writer import PairWriter
from lit_distill.datamodules import DigitsDataModule
from lit_distill.datamodules.pairs_folder import shard_name


class Sampler(LightningModule):
    """Maps noise to images by a fixed network, and can send itself a signal at an item."""

    def __init__(self, kill_at: int | None = None, by: int = signal.SIGKILL, **record: Any) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = torch.nn.Conv2d(1, 1, 3, padding=1)
        self.kill_at, self.by = kill_at, by
        self.record = record
        self.items: list[int] = []

    def sampling_record(self) -> dict[str, Any]:
        made = {"teacher": "a" * 64, "solver": "heun", "steps": 18, "nfe": 35, "dtype": "float32"}
        levels = {"sigma_min": 0.002, "sigma_max": 80.0, "deterministic": True}
        return {**made, **levels, **self.record}

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        item = int(batch["index"][0]) // 8
        if item == self.kill_at:
            os.kill(os.getpid(), self.by)
        self.items.append(item)
        shift = batch["label"].view(-1, 1, 1, 1) / 10
        return {**batch, "image": torch.tanh(self.network(batch["noise"]) + shift)}


def data(**options: Any) -> DigitsDataModule:
    """Six items, the last one smaller."""
    return DigitsDataModule(**{"predict_samples": 42, "predict_batch_size": 8, **options})


def predict(folder: Path, sampler: Sampler, numbers: DigitsDataModule, **options: Any) -> Trainer:
    """Write pairs on the CPU, quietly."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "devices": 1, **quiet, **options}
    trainer = Trainer(callbacks=[PairWriter(str(folder))], **settings)
    trainer.predict(sampler, numbers)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--again", type=int)
    args = parser.parse_args()
    strategy = "ddp" if args.devices > 1 else "auto"
    sampler, numbers = Sampler(args.kill_at), data()
    trainer = predict(args.folder, sampler, numbers, devices=args.devices, strategy=strategy)
    if args.again is not None:  # without one shard: more processes than work
        lost = args.folder / shard_name(args.again)
        if trainer.is_global_zero:
            lost.rename(lost.with_suffix(".first"))
        trainer.strategy.barrier()
        trainer.predict(sampler, numbers)
