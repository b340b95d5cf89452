"""Two questions to SFD on the digits: where its grid should end, and step counts it never saw.

    python benchmarks/sfd_plots.py --runs runs/digits --out docs/images/sfd

Left: students of 4 evaluations, each trained for ``--updates`` updates on a grid that ends at
another ``sigma_min``, beside the teacher's best multi-step solver on the same grids. Right: the
finished students of ``make methods`` (SFD of 4 steps; SFD-v of 2 to 5) sampled with 1 to 8
evaluations. Figures are Frechet distances to the teacher, of 10,000 samples. Writes ``.png`` and
``.json``.
"""

import lit_distill  # noqa: F401  # isort: skip  # before lightning: see lit_distill/_torchvision_ops.py

import argparse
import json
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from lit_distill.datamodules import DigitsDataModule
from lit_distill.diffusion import (
    Denoiser,
    drawn_noise,
    rho_grid,
    sample,
    seeded_generators,
    solve,
)
from lit_distill.methods import SFD
from lit_distill.metrics import DigitsExtractor, ImageSet, describe, to_uint8
from lit_distill.metrics.figures import frechet_distance
from lit_distill.models import load_denoiser

SEED = 10_000_000  # of the evaluation's test
BATCH = 500
ENDS = (0.002, 0.006, 0.02, 0.06, 0.2)
STEPS = 4


@torch.inference_mode()
def draw(denoiser: Denoiser, count: int, seed: int, **how: Any) -> Tensor:
    """uint8 images of a denoiser; ``grid`` stands for another than its own."""
    images = []
    grid = how.pop("grid", None)
    for first in range(0, count, BATCH):
        rows = torch.arange(first, min(first + BATCH, count))
        generators = seeded_generators((seed + rows).tolist())
        noise, label = drawn_noise((1, 8, 8), generators), rows % 10
        if grid is not None:
            x = solve(denoiser, denoiser.start(noise), grid, condition=label, **how)
        else:
            x = sample(denoiser, noise, condition=label, generator=generators, **how)
        images.append(to_uint8(x))
    return torch.cat(images)


def trained(teacher: str, sigma_min: float, updates: int) -> Denoiser:
    """A student with the settings of ``configs/digits/sfd.yaml``, but for the grid's end."""
    seed_everything(0, verbose=False)
    module = SFD(
        teacher,
        steps=STEPS,
        sigma_min=sigma_min,
        distance="l1",
        teacher_solver="dpmpp_2m",
        teacher_substeps=3,
        ema_decay=0.99,
        optimizer=partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.99)),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, updates + STEPS),
    )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            accelerator="cpu",
            max_steps=updates,
            max_epochs=-1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=folder,
        ).fit(module, DigitsDataModule(batch_size=128))
    return module.network.eval()


def main() -> None:
    """Train, sample, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/digits"))
    parser.add_argument("--out", type=Path, default=Path("sfd"))
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--num-images", type=int, default=10_000)
    options = parser.parse_args()
    count, extractor = options.num_images, DigitsExtractor()
    folder = str(options.runs / "teacher" / "pipeline")
    teacher = load_denoiser(folder)

    def seen(model: Denoiser, seed: int = SEED, **how: Any) -> ImageSet:
        images = draw(model, count, seed, **how)
        return describe(extractor, images, torch.arange(count) % 10)

    other = seen(teacher, SEED + count, steps=18, solver="heun")

    def distance(model: Denoiser, **how: Any) -> float:
        found = frechet_distance(other.features, seen(model, **how).features)
        print(f"{found:.4f}", how, flush=True)
        return found

    ends: dict[str, list[float]] = {"student": [], "teacher, DPM++ 2M": [], "teacher, iPNDM": []}
    for end in ENDS:
        ends["student"].append(distance(trained(folder, end, options.updates), steps=STEPS))
        grid = rho_grid(STEPS, end, teacher.sigma_max)
        ends["teacher, DPM++ 2M"].append(distance(teacher, solver="dpmpp_2m", grid=grid))
        ends["teacher, iPNDM"].append(distance(teacher, solver="ipndm", grid=grid))
    counts: dict[str, list[float]] = {}
    for name, title in {"sfd": "SFD, trained for 4", "sfd_v": "SFD-v, trained for 2 to 5"}.items():
        student = load_denoiser(options.runs / name / "pipeline")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it was not trained for these, which is the point
            counts[title] = [distance(student, steps=steps) for steps in range(1, 9)]
    counts["teacher, iPNDM"] = [
        distance(teacher, solver="ipndm", grid=rho_grid(steps, 0.006, teacher.sigma_max))
        for steps in range(1, 9)
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"sigma_min": list(ENDS), "at 4 evaluations": ends, "evaluations": counts}
    options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, values in ends.items():
        left.plot(ENDS, values, "o-", label=name)
    left.set(xscale="log", yscale="log", xlabel="sigma_min", ylabel="fd_teacher_digits")
    left.set_title(f"where the grid ends ({options.updates} updates)")
    for name, values in counts.items():
        right.plot(range(1, 9), values, "o-", label=name)
    right.set(yscale="log", xlabel="evaluations", title="numbers of steps, trained or not")
    left.legend()
    right.legend()
    figure.savefig(options.out.with_suffix(".png"), dpi=90)


if __name__ == "__main__":
    main()
