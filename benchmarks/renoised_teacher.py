"""What fresh noise between the steps costs, before any student is trained.

    python benchmarks/renoised_teacher.py --teacher runs/digits/teacher/pipeline

A student of several steps (DMD2, SiD, LADD, consistency models) noises its own samples again. So
this noises the teacher's samples to one level or to several in turn, follows the teacher's ODE from
there to its end, and prints how far these samples are from the teacher's own, and from the real
digits that it learned from. With the exact score of one density they would not move.
"""

import lit_distill  # noqa: F401  # isort: skip  # before lightning: see lit_distill/_torchvision_ops.py

import argparse

import torch
from torch import Tensor
from tqdm import tqdm

from lit_distill.datamodules import DigitsDataModule
from lit_distill.diffusion import Denoiser, karras_sigmas, sample, solve
from lit_distill.methods.base import noised
from lit_distill.metrics import DigitsExtractor
from lit_distill.metrics.evaluation import describe
from lit_distill.metrics.figures import frechet_distance, to_uint8
from lit_distill.models import load_denoiser

LEVELS = ([], [40.0], [20.0], [8.0], [3.0], [1.5], [0.5], [20.0, 8.0, 3.0], [5.0, 1.5, 0.5])
STEPS, BATCH = 18, 500  # of Heun's method


def renoised(teacher: Denoiser, x: Tensor, level: float, labels: Tensor) -> Tensor:
    """Where the teacher's ODE ends from samples ``(B, *shape)`` noised to a level."""
    sigmas = karras_sigmas(STEPS, teacher.sigma_min, level)
    return solve(teacher, noised(x, torch.full((len(x),), level)), sigmas, condition=labels)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    teacher, extractor = load_denoiser(options.teacher), DigitsExtractor()
    torch.manual_seed(options.seed)
    labels = torch.arange(options.images) % 10
    batches = labels.split(BATCH)
    drawn = [
        [
            sample(
                teacher,
                torch.randn(len(y), *DigitsDataModule.image_shape),
                steps=STEPS,
                condition=y,
            )
            for y in tqdm(batches, desc="the teacher's samples", leave=False)
        ]
        for _ in range(2)
    ]
    reference = describe(extractor, to_uint8(torch.cat(drawn[1]))).features
    real = describe(extractor, DigitsDataModule().images("train")[0]).features
    print("| noised to | from the teacher's samples | from its training images |")
    print("|---|---|---|")
    for levels in LEVELS:
        x = list(drawn[0])
        for level in levels:
            x = [
                renoised(teacher, part, level, y)
                for part, y in zip(x, tqdm(batches, desc=str(levels), leave=False), strict=True)
            ]
        found = describe(extractor, to_uint8(torch.cat(x))).features
        distances = [frechet_distance(other, found) for other in (reference, real)]
        name = ", ".join(f"{level:g}" for level in levels) or "nothing"
        print(f"| {name} | " + " | ".join(f"{d:.4f}" for d in distances) + " |", flush=True)


if __name__ == "__main__":
    main()
