"""What training by distribution matching needs in memory, and what each saving saves.

    python benchmarks/memory.py --out memory.json

DMD on the network of ``google/ddpm-cifar10-32`` (35,746,307 parameters, random weights), two
updates without regression, for each choice in a process of its own. Counted are the bytes of the
tensors that live through the training: weights of all networks (what they share once), gradients,
optimizer state and the average of the weights, on the training's device. Beside them stands the
largest memory that was allocated at any time: on a GPU as torch counts it, on a CPU the process's
resident memory, less that of before the networks were made.
"""

import lit_distill  # noqa: F401  # isort: skip  # before lightning: see lit_distill/_torchvision_ops.py

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from lit_distill.datamodules import ImageDataModule
from lit_distill.diffusion import EpsilonDenoiser
from lit_distill.methods import DMD
from lit_distill.models import LoRA, UNet

ADAM = partial(torch.optim.AdamW, lr=1e-5)
BF16 = {"teacher_precision": "bfloat16"}
CHOICES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, teacher in bf16": BF16,
    "full, average on the CPU": {"ema_device": "cpu"},
    "full, gradient checkpointing": {"gradient_checkpointing": True},
    "LoRA, rank 8": {"lora": LoRA(8)},
    "LoRA, rank 16": {"lora": LoRA(16)},
    "LoRA, rank 64": {"lora": LoRA(64)},
    "LoRA, rank 8, backbone in bf16": {"lora": LoRA(8), **BF16},
    "LoRA, rank 16, backbone in bf16": {"lora": LoRA(16), **BF16},
    "LoRA, rank 64, backbone in bf16": {"lora": LoRA(64), **BF16},
}
if find_spec("torchao") is not None:
    CHOICES["full, 8-bit Adam of torchao"] = {"optimizer": "torchao"}
if find_spec("bitsandbytes") is not None:
    CHOICES["full, 8-bit Adam of bitsandbytes"] = {"optimizer": "bitsandbytes"}


class Images(ImageDataModule):
    """Random images of CIFAR10's shape."""

    name, num_classes = "random", None
    image_shape = (3, 32, 32)

    def load(self, split: str) -> tuple[Tensor, None]:
        shape = (4 * self.batch_size, *self.image_shape)
        return torch.randint(0, 256, shape, dtype=torch.uint8), None


def network() -> UNet2DModel:
    """The architecture of ``google/ddpm-cifar10-32``."""
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        norm_num_groups=32,
        attention_head_dim=None,
    )


def optimizer_of(name: str | None) -> Any:
    """AdamW, or one with a state of 8 bits."""
    if name == "torchao":
        from torchao.optim import AdamW8bit

        return partial(AdamW8bit, lr=1e-5)
    if name == "bitsandbytes":
        from bitsandbytes.optim import AdamW8bit

        return partial(AdamW8bit, lr=1e-5)
    return ADAM


def size(tensors: Iterable[Any], device: torch.device) -> int:
    """Bytes of those on a device, each storage once."""
    found = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.device.type == device.type:
            found[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(found.values())


def resident() -> int:
    """The process's largest resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train_and_count(
    module: LightningModule,
    data: ImageDataModule,
    precision: str,
    before: int,
    average_elsewhere: bool = False,
) -> dict[str, Any]:
    """Train two updates and count; ``before`` is what was resident without the networks."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="auto",
            devices=1,
            precision=precision,
            max_steps=2,
            logger=False,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        began = time.perf_counter()
        trainer.fit(module, data)
        seconds = time.perf_counter() - began
    device = trainer.strategy.root_device
    averages = [m for m in module.modules() if isinstance(m, AveragedModel)]
    average = [t for a in averages for t in a.parameters()]
    averaged = {id(tensor) for tensor in average}
    weights = [p for p in module.parameters() if id(p) not in averaged]
    states = [t for o in trainer.optimizers for s in o.state.values() for t in s.values()]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident() - before
    counted = {
        "weights": size(weights, device),
        "gradients": size((p.grad for p in weights if p.grad is not None), device),
        "optimizer": size(states, device),
        # Kept elsewhere it is none of the device's, also where the test's device is a CPU.
        "average": 0 if average_elsewhere else size(average, device),
    }
    return {
        **{f"{name}_mb": value / 2**20 for name, value in counted.items()},
        "total_mb": sum(counted.values()) / 2**20,
        "trained": sum(p.numel() for p in module.student.parameters()),
        "peak_mb": peak / 2**20,
        "seconds": seconds,
        "device": device.type,
    }


def measure(choice: str, batch_size: int, precision: str) -> dict[str, Any]:
    """Count for a choice."""
    options = dict(CHOICES[choice])
    optimizer = optimizer_of(options.pop("optimizer", None))
    before = resident()
    teacher = EpsilonDenoiser(UNet.wrap(network()))
    own = sum(p.numel() for p in teacher.parameters())
    module = DMD(teacher, regression_weight=0, optimizer=optimizer, **options)
    elsewhere = options.get("ema_device") == "cpu"
    found = train_and_count(module, Images(batch_size), precision, before, elsewhere)
    return {"choice": choice, **found, "copies": found["total_mb"] * 2**20 / (4 * own)}


def main() -> None:
    """Measure each choice, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--one", choices=CHOICES, help=argparse.SUPPRESS)  # in its own process
    options = parser.parse_args()
    if options.one:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(options.one, options.batch_size, options.precision)))
        return
    rows = []
    head = ("weights", "gradients", "optimizer", "average", "total", "peak")
    print(f"{'MB':<34}" + "".join(f"{name:>11}" for name in head) + f"{'copies':>9}")
    for choice in options.choices:
        command = [sys.executable, __file__, "--one", choice]
        command += ["--batch-size", str(options.batch_size), "--precision", options.precision]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            raise SystemExit(f"{choice} failed.")
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        figures = "".join(f"{row[f'{name}_mb']:>11.0f}" for name in head)
        print(f"{choice:<34}{figures}{row['copies']:>9.2f}", flush=True)
    if options.out is not None:
        settings = {"batch_size": options.batch_size, "precision": options.precision}
        options.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
