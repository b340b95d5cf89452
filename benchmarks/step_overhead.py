"""What a training step costs beyond its network passes.

    python benchmarks/step_overhead.py --out step_overhead.json

A whole step through Lightning's Trainer, as users run it (pairs, logging, progress bar, gradient
clipping, the average of the weights), is timed against a plain loop of every network pass and
optimizer step that it needs. Both run in turn in one process, in blocks of steps: plain, trainer,
plain. A repeat's ratio is the trainer's block over the mean of the two plain ones; the second plain
block over the first is the null test, which tells how far a ratio can be trusted. Reported are
medians over the repeats. The target is a ratio of at most 1.05.

A method is one entry in ``METHODS``.
"""

import lit_distill  # noqa: F401  # isort: skip  # before lightning: see lit_distill/_torchvision_ops.py

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lit_distill.callbacks import PairWriter
from lit_distill.datamodules import ImageDataModule, PairsDataModule
from lit_distill.diffusion import Denoiser, EDMDenoiser
from lit_distill.methods import DMD, DiffusionTeacher, DistillationModule
from lit_distill.methods.base import copy_of
from lit_distill.models import UNet

Step = Callable[[], None]


class Method(NamedTuple):
    """A method to measure.

    Attributes:
        module: Makes it from a teacher.
        passes: Makes a plain step of the same passes, for a batch size.
    """

    module: Callable[[Denoiser], DistillationModule]
    passes: Callable[[Denoiser, int], Step]


def dmd_passes(teacher: Denoiser, batch_size: int) -> Step:
    """DMD: the student on fresh and stored noise, both scores on its samples, the fake score."""
    student, fake = copy_of(teacher).eval(), copy_of(teacher).eval()
    adams = [torch.optim.AdamW(network.parameters(), lr=5e-5) for network in (student, fake)]
    noise, label = inputs(teacher, 2 * batch_size)
    top, sigma = torch.full((2 * batch_size,), 80.0), torch.full((batch_size,), 1.0)

    def step() -> None:
        samples = student(80.0 * noise, top, label)
        x = samples[:batch_size].detach() + noise[:batch_size]
        with torch.no_grad():
            teacher(x, sigma, label[:batch_size])
            fake(x, sigma, label[:batch_size])
        update(adams[0], samples.square().mean())
        update(adams[1], fake(x, sigma, label[:batch_size]).square().mean())

    return step


def teacher_passes(teacher: Denoiser, batch_size: int) -> Step:
    """Training of a teacher: one pass."""
    network = copy_of(teacher).train()
    adam = torch.optim.AdamW(network.parameters(), lr=1e-3)
    noise, label = inputs(teacher, batch_size)
    sigma = torch.full((batch_size,), 1.0)
    return lambda: update(adam, network(noise, sigma, label).square().mean())


METHODS = {
    "dmd": Method(partial(DMD, distance="l2"), dmd_passes),
    "teacher": Method(lambda denoiser: DiffusionTeacher(copy_of(denoiser)), teacher_passes),
}


def inputs(teacher: Denoiser, count: int) -> tuple[Tensor, Tensor]:
    """Noise and labels."""
    return torch.randn(count, *(teacher.image_shape or ())), torch.arange(count) % 10


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """A backward pass and an optimizer step."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class Images(ImageDataModule):
    """Random images of MNIST's shape."""

    name, num_classes = "random", 10
    image_shape = (1, 28, 28)

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        count = 20 * self.batch_size
        images = torch.randint(0, 256, (count, *self.image_shape), dtype=torch.uint8)
        return images, torch.arange(count) % 10


class Stopwatch(Callback):
    """Times blocks of the trainer's steps, and of plain steps between them."""

    def __init__(self, plain: Step, steps: int, warm_up: int) -> None:
        self.plain, self.steps, self.warm_up = plain, steps, warm_up
        self.whole: list[float] = []
        self.before: list[float] = []
        self.after: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        done = trainer.global_step - self.warm_up
        if done < 0 or done % self.steps:
            return
        if done == 0:
            self._block(self.warm_up)
        else:
            self.whole.append((time.perf_counter() - self._began) / self.steps)
            self.after.append(self._block(self.steps))
        self.before.append(self._block(self.steps))
        self._began = time.perf_counter()

    def _block(self, steps: int) -> float:
        """Seconds of a plain step."""
        began = time.perf_counter()
        for _ in range(steps):
            self.plain()
        return (time.perf_counter() - began) / steps


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time one method; seconds are those of one step."""
    torch.manual_seed(0)
    network = UNet(28, 1, 10, options.widths, options.layers, norm_num_groups=8)
    teacher = EDMDenoiser(network).requires_grad_(False).eval()
    bf16 = options.precision == "bf16-mixed"
    context = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    plain = METHODS[name].passes(teacher, options.batch_size)

    def plain_step() -> None:
        with context:
            plain()

    watch = Stopwatch(plain_step, options.steps, options.warm_up)
    with tempfile.TemporaryDirectory() as folder:
        data = write_pairs(teacher, options.batch_size, folder)
        trainer = Trainer(
            accelerator="cpu",
            precision=options.precision,
            max_epochs=-1,
            max_steps=options.warm_up + options.repeats * options.steps,
            limit_val_batches=0,
            logger=TensorBoardLogger(folder),
            default_root_dir=folder,
            callbacks=[watch],
        )
        trainer.fit(METHODS[name].module(teacher), data if name != "teacher" else data.data)
    blocks = list(zip(watch.whole, watch.before, watch.after, strict=False))
    return {
        "method": name,
        "whole_step_s": statistics.median(watch.whole),
        "passes_s": statistics.median((a + b) / 2 for _, a, b in blocks),
        "ratio": statistics.median(2 * whole / (a + b) for whole, a, b in blocks),
        "null_ratio": statistics.median(b / a for _, a, b in blocks),
        "ratios": [2 * whole / (a + b) for whole, a, b in blocks],
        "null_ratios": [b / a for _, a, b in blocks],
        "network_parameters": sum(p.numel() for p in teacher.parameters()),
    }


def write_pairs(teacher: Denoiser, batch_size: int, folder: str) -> PairsDataModule:
    """Pairs of one Euler step, and the data module that trains on them."""
    data = Images(batch_size, predict_samples=20 * batch_size, predict_batch_size=batch_size)
    writer = PairWriter(f"{folder}/pairs")
    quiet = {"logger": False, "enable_progress_bar": False}
    sampler = DiffusionTeacher(teacher, steps=1, solver="euler")
    Trainer(accelerator="cpu", callbacks=[writer], **quiet).predict(sampler, data)
    return PairsDataModule(data, f"{folder}/pairs", batch_size=batch_size)


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--widths", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--layers", type=int, default=1, help="residual blocks a level")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5, help="steps a block")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=3, help="steps that are not timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "Attribute '.*|.*does not have many workers|Found .* module")
    results = [measure(name, options) for name in options.methods]
    print(f"\n{'method':<10}{'whole step':>12}{'its passes':>12}{'ratio':>8}{'null':>8}")
    for row in results:
        print(
            f"{row['method']:<10}{1e3 * row['whole_step_s']:>9.1f} ms{1e3 * row['passes_s']:>9.1f} "
            f"ms{row['ratio']:>8.3f}{row['null_ratio']:>8.3f}"
        )
    if options.out is not None:
        settings = {k: v for k, v in vars(options).items() if k != "out"}
        machine = {"processor": platform.processor(), "torch": torch.__version__}
        report = {"settings": settings, "machine": machine, "results": results}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
