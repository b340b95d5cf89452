"""What distilling Stable Diffusion 1.5 needs in memory, and what each saving saves.

    python benchmarks/memory_text.py --out memory_text.json

Computed for the published size of its U-Net (859,520,964 parameters, never allocated) are the bytes
of the tensors that live through the training: weights of all networks (what they share once),
gradients, AdamW's state, and the averages of the weights; methods and adapters are those of
``configs/coco``. The same arithmetic is held against what is counted while a U-Net of the same
classes and reduced width trains two updates, for each choice in a process of its own; beside it
stands the largest memory that was allocated at any time, as ``memory.py`` has it. Activations, the
VAE and the text encoder are in that peak only.
"""

import lit_distill  # noqa: F401  # isort: skip  # before lightning: see lit_distill/_torchvision_ops.py

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import UNet2DConditionModel
from memory import ADAM, resident, train_and_count
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from lit_distill.datamodules import CaptionedImages, LatentTextDataModule
from lit_distill.methods import DMD, LatentConsistencyDistillation
from lit_distill.models import LoRA, load_denoiser, small_text_to_image

CONFIGS = Path(__file__).parents[1] / "configs" / "coco"
LATENT = 16  # side of the latents of the reduced network; 64 of the real one
# What Stable Diffusion 1.5's unet/config.json says, but for what is a default of the class.
REAL = {"sample_size": 64, "cross_attention_dim": 768}
REDUCED = {
    "sample_size": LATENT,
    "cross_attention_dim": 160,
    "block_out_channels": (64, 128, 256, 256),
}
GUIDANCE_WIDTH = 256  # of the embedding that a full LCM is given


@dataclass(frozen=True)
class Choice:
    """A method of ``configs/coco``, and how its networks are held."""

    recipe: str
    backbone: str | None = None  # precision of the one that adapters share; None: all weights

    @property
    def options(self) -> dict[str, Any]:
        """The recipe's settings of the method."""
        return yaml.safe_load((CONFIGS / f"{self.recipe}.yaml").read_text())["model"]["init_args"]

    @property
    def lora(self) -> LoRA | None:
        """The adapters; of rank 64 in all recipes."""
        if self.backbone is None:
            return None
        return LoRA(**self.options["lora"])

    @property
    def is_dmd(self) -> bool:
        return self.recipe == "dmd"


CHOICES = {
    "LCM, full": Choice("lcm"),
    "LCM-LoRA": Choice("lcm_lora", "float32"),
    "LCM-LoRA, backbone in bf16": Choice("lcm_lora", "bfloat16"),
    "DMD, full": Choice("dmd"),
    "DMD, LoRA": Choice("dmd", "float32"),
    "DMD, LoRA, backbone in bf16": Choice("dmd", "bfloat16"),
}


class Captions(CaptionedImages):
    """Random images with captions."""

    name = "random"
    captions = ("one two", "three four") * 8

    def identity(self) -> str:
        return ""

    def images(self, indices: range, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(0, 256, (len(indices), *shape), dtype=torch.uint8)


def parameters(config: dict[str, Any], lora: LoRA | None = None, **further: Any) -> int:
    """Parameters of a U-Net, or of an adapter to it by peft; nothing is allocated."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config, **further)
        if lora is not None:
            settings = LoraConfig(r=lora.rank, target_modules=list(lora.target_modules or ()))
            inject_adapter_in_model(settings, unet)
    chosen = (p for n, p in unet.named_parameters() if lora is None or ".lora_" in n)
    return sum(p.numel() for p in chosen)


def compute(choice: Choice, config: dict[str, Any]) -> dict[str, float]:
    """MB of what lives through the training of a network."""
    teacher = parameters(config)
    trained = 2 if choice.is_dmd else 1  # the student, and the fake score
    averages = 1 + (choice.options.get("target") == "ema")
    if choice.lora is None:
        told = {} if choice.is_dmd else {"time_cond_proj_dim": GUIDANCE_WIDTH}
        own = parameters(config, **told)
        weights = 4 * (teacher + trained * own)
    else:
        own = parameters(config, choice.lora)
        width = 2 if choice.backbone == "bfloat16" else 4
        weights = width * (teacher + own) + 4 * trained * own  # the backbone has a slot for one
    parts = {
        "weights": weights,
        "gradients": 4 * trained * own,
        "optimizer": 8 * trained * own,
        "average": 4 * averages * own,
    }
    found = {f"{name}_mb": value / 2**20 for name, value in parts.items()}
    return {**found, "total_mb": sum(found.values()), "trained": own}


def measure(choice: Choice, batch_size: int, precision: str) -> dict[str, Any]:
    """Train the reduced network."""
    with tempfile.TemporaryDirectory() as place:
        pipeline = small_text_to_image(
            ["one two three four"],
            image_size=4 * LATENT,
            channels=3,
            text_width=REDUCED["cross_attention_dim"],
            vae_widths=(8, 16, 16),
        )
        pipeline.unet = UNet2DConditionModel(**REDUCED)
        folder = f"{place}/pipeline"
        pipeline.save_pretrained(folder)
        del pipeline
        data = LatentTextDataModule(Captions(), folder, f"{place}/cache", batch_size=batch_size)
        data.prepare_data()
        before = resident()
        teacher = load_denoiser(folder)
        options: dict[str, Any] = {"lora": choice.lora, "optimizer": ADAM}
        options["teacher_precision"] = choice.backbone or "float32"
        if choice.is_dmd:
            options |= {"regression_weight": 0.0, "guidance": choice.options["guidance"]}
            module: Any = DMD(teacher, **options)
        else:
            options |= {"guidance": tuple(choice.options["guidance"])}
            options |= {"target": choice.options.get("target", "stop_gradient")}
            module = LatentConsistencyDistillation(teacher, **options)
        return train_and_count(module, data, precision, before)


def main() -> None:
    """Compute and measure each choice, print two tables, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--one", choices=CHOICES, help=argparse.SUPPRESS)  # in its own process
    options = parser.parse_args()
    if options.one:
        warnings.simplefilter("ignore")
        found = measure(CHOICES[options.one], options.batch_size, options.precision)
        print(json.dumps(found))
        return
    head = ("weights", "gradients", "optimizer", "average", "total")
    computed = {name: compute(CHOICES[name], REAL) for name in options.choices}
    print(f"Stable Diffusion 1.5, {parameters(REAL):,} parameters, computed; GB of 2^30 bytes")
    print(f"{'':<30}" + "".join(f"{name:>11}" for name in (*head, "trained M")))
    for name, row in computed.items():
        figures = "".join(f"{row[f'{part}_mb'] / 1024:>11.2f}" for part in head)
        print(f"{name:<30}{figures}{row['trained'] / 1e6:>11.1f}")
    print(f"\nReduced to {parameters(REDUCED):,} parameters, counted; MB of 2^20 bytes")
    print(f"{'':<30}" + "".join(f"{name:>11}" for name in (*head, "computed", "peak")), flush=True)
    measured = {}
    for name in options.choices:
        command = [sys.executable, __file__, "--one", name]
        command += ["--batch-size", str(options.batch_size), "--precision", options.precision]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            raise SystemExit(f"{name} failed.")
        row = measured[name] = json.loads(done.stdout.splitlines()[-1])
        row["computed_mb"] = compute(CHOICES[name], REDUCED)["total_mb"]
        columns = (*head, "computed", "peak")
        figures = "".join(f"{row[f'{part}_mb']:>11.1f}" for part in columns)
        print(f"{name:<30}{figures}", flush=True)
        if abs(row["total_mb"] / row["computed_mb"] - 1) > 0.005:
            raise SystemExit("The arithmetic is wrong: it is not what was counted.")
    if options.out is not None:
        settings = {"batch_size": options.batch_size, "precision": options.precision}
        written = {"settings": settings, "computed": computed, "measured": measured}
        options.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
