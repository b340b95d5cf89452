"""Noise-image pairs a second: ours beside diffusers' DDIMPipeline, with the same network.

Both draw the same images: the same noise of each seed, the same number of steps, the same batch.
Ours writes them too, as shards with checksums, by the command that users give. Lines alternate, so
that a machine that slows down slows both. Each figure is the median over the rounds, and its least
and greatest.

    python benchmarks/pairs.py                         # the small network, one thread
    python benchmarks/pairs.py --network cifar10 --device cuda --batch 500 --steps 50
"""

import lit_distill  # noqa: F401  # isort: skip  (before all else: it lets torchvision be imported)

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from torch import Tensor

from lit_distill.callbacks import PairWriter
from lit_distill.datamodules import CIFAR10DataModule
from lit_distill.datamodules.pairs_folder import shard_name
from lit_distill.diffusion import sample, seeded_noise
from lit_distill.methods import DiffusionTeacher
from lit_distill.models import load_denoiser

Made = Callable[[], Tensor]  # reads what was made, outside the time
Way = Callable[[], Made]

NETWORKS: dict[str, dict[str, Any]] = {
    "small": {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8},
    "cifar10": {  # google/ddpm-cifar10-32
        "block_out_channels": (128, 256, 256, 256),
        "layers_per_block": 2,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
    },
}


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "teacher"
        save_teacher(folder, options.network)
        ways = {
            "diffusers' DDIMPipeline": stock(folder, options),
            "ours, sampling alone": sampling(folder, options),
            "ours, written to disk": written(folder, options, Path(scratch) / "pairs"),
        }
        clock = time.process_time if options.cpu_time else time.perf_counter
        images: dict[str, Tensor] = {}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for i in range(options.rounds + 1):
            for name, way in ways.items():
                begin = clock()
                made = way()
                if i > 0:  # the first round warms up
                    seconds[name].append(clock() - begin)
                images[name] = made()
    print(
        f"{options.network} network, {options.steps} DDIM steps, batch {options.batch}, "
        f"{options.batches} batches a round, {options.rounds} rounds, {options.threads} thread(s), "
        f"{options.device}, {'processor' if options.cpu_time else 'wall-clock'} time"
    )
    first = next(iter(ways))
    for name, times in seconds.items():
        rates = sorted(options.batch * options.batches / t for t in times)
        apart = (images[name] - images[first]).abs().max()
        ratio = statistics.median(a / b for a, b in zip(seconds[first], times, strict=True))
        print(
            f"{name:<26} {statistics.median(rates):8.2f} images/s ({rates[0]:.2f} to "
            f"{rates[-1]:.2f}), {ratio:.3f} of the first line; images apart by {apart:.1e}"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="small")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--cpu-time", action="store_true", help="for a processor that other programs use too"
    )
    return parser.parse_args()


def save_teacher(folder: Path, network: str) -> None:
    """An untrained network: what it draws does not matter here."""
    torch.manual_seed(0)
    widths = NETWORKS[network]["block_out_channels"]
    attends = [False, network == "cifar10", False, False][: len(widths)]
    unet = UNet2DModel(
        sample_size=32,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        **NETWORKS[network],
    )
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    DDIMPipeline(unet, scheduler).save_pretrained(folder)


def stock(folder: Path, options: argparse.Namespace) -> Way:
    """Images by the stock pipeline; its own clamping and conversion are part of its work."""
    pipeline = DDIMPipeline.from_pretrained(folder).to(options.device)
    pipeline.set_progress_bar_config(disable=True)

    def run() -> Made:
        drawn = []
        for batch in range(options.batches):
            seeds = range(batch * options.batch, (batch + 1) * options.batch)
            images = pipeline(
                batch_size=options.batch,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                num_inference_steps=options.steps,
                output_type="np",
            ).images
            drawn.append(torch.from_numpy(images).permute(0, 3, 1, 2))
        return lambda: torch.cat(drawn)

    return run


def sampling(folder: Path, options: argparse.Namespace) -> Way:
    """The same images by ``sample``, from the same folder."""
    denoiser = load_denoiser(folder).to(options.device)

    @torch.no_grad()
    def run() -> Made:
        drawn = []
        for batch in range(options.batches):
            seeds = range(batch * options.batch, (batch + 1) * options.batch)
            noise = seeded_noise((3, 32, 32), seeds).to(options.device)
            x = sample(denoiser, noise, steps=options.steps, solver="ddim")
            drawn.append((x / 2 + 0.5).clamp(0, 1).cpu())
        return lambda: torch.cat(drawn)

    return run


def written(folder: Path, options: argparse.Namespace, out: Path) -> Way:
    """What ``lit-distill predict`` does: a trainer, noise from the data module, shards on disk."""
    module = DiffusionTeacher(str(folder), steps=options.steps, solver="ddim")
    count = 0

    def run() -> Made:
        nonlocal count
        target, count = out / str(count), count + 1  # a folder with pairs would be complete
        data = CIFAR10DataModule(
            predict_samples=options.batch * options.batches, predict_batch_size=options.batch
        )
        trainer = Trainer(
            accelerator="cpu" if options.device == "cpu" else "gpu",
            devices=1,
            logger=False,
            callbacks=[PairWriter(str(target))],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.predict(module, data)
        shards = [target / shard_name(i) for i in range(options.batches)]
        return lambda: torch.cat(
            [(load_file(shard)["image"] / 2 + 0.5).clamp(0, 1) for shard in shards]
        )

    return run


if __name__ == "__main__":
    main()
