"""What a fake score can tell apart: students that a Frechet distance tells apart easily?

    python benchmarks/score_resolution.py --teacher runs/digits/teacher/pipeline \\
        --pairs runs/digits/pairs --students runs/digits/dmd/pipeline runs/digits/sid/pipeline

Methods without pairs (DMD2, SiD) see a student through a network that is fitted to its samples. So
this fits one, from the teacher on, to the samples of each student and to the teacher's own stored
ones, and prints how far they are apart (root mean square over the numbers of a denoising, at the
first student's samples, by noise level), beside two fits to the first student that differ by their
random numbers alone, which is what no difference below can be told from. Last, how far the samples
of a network that was fitted to the teacher's are from these (at the levels that the teacher
learned at).
"""

import lit_distill  # noqa: F401  # isort: skip  # before lightning: see lit_distill/_torchvision_ops.py

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import trange

from lit_distill.datamodules import DigitsDataModule, PairsDataModule
from lit_distill.diffusion import Denoiser, LogNormalSigma, SigmaDistribution, sample
from lit_distill.losses import denoising_loss
from lit_distill.methods.base import copy_of, noised
from lit_distill.metrics import DigitsExtractor
from lit_distill.metrics.evaluation import describe
from lit_distill.metrics.figures import frechet_distance, to_uint8
from lit_distill.models import load_denoiser

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
Draw = Callable[[int], tuple[Tensor, Tensor]]
"""``count -> (images, labels)``."""


def drawn_by(student: Denoiser) -> Draw:
    """Samples of a one-step student of random labels."""

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(10, (count,))
        noise = torch.randn(count, *DigitsDataModule.image_shape)
        with torch.no_grad():
            return sample(student, noise, steps=1, condition=labels), labels

    return draw


def drawn_from(images: Tensor, labels: Tensor) -> Draw:
    """Stored samples."""

    def draw(count: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(images), (count,))
        return images[chosen], labels[chosen]

    return draw


def fitted(
    teacher: Denoiser, draw: Draw, updates: int, seed: int, levels: SigmaDistribution | None = None
) -> Denoiser:
    """A denoiser of what is drawn, from the teacher on; by default at DMD2's levels."""
    torch.manual_seed(seed)
    score = copy_of(teacher)
    optimizer = torch.optim.AdamW(score.parameters(), 1e-3, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates, 1e-5)
    for _ in trange(updates, leave=False):
        x, labels = draw(128)
        u = torch.rand(len(x))
        sigma = teacher.schedule(0.15 + 0.55 * u) if levels is None else levels(u).float()
        optimizer.zero_grad()
        denoising_loss(score, x, sigma, torch.randn_like(x), labels).mean().backward()
        optimizer.step()
        rate.step()
    return score


def features(denoiser: Denoiser, seed: int, count: int = 10_000) -> Tensor:
    """Features of samples by 18 Heun steps."""
    torch.manual_seed(seed)
    noise, labels = torch.randn(count, *DigitsDataModule.image_shape), torch.arange(count) % 10
    samples = [
        sample(denoiser, n, steps=18, solver="heun", condition=y)
        for n, y in zip(noise.split(500), labels.split(500), strict=True)
    ]
    return describe(DigitsExtractor(), to_uint8(torch.cat(samples))).features


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--students", nargs="+", required=True)
    parser.add_argument("--updates", type=int, default=1200)
    parser.add_argument("--refit", type=int, default=4000, help="updates of the last fit")
    options = parser.parse_args()
    teacher = load_denoiser(options.teacher).requires_grad_(False)
    data = PairsDataModule(DigitsDataModule(), str(options.pairs), batch_size=128)
    data.setup("fit")
    batches = list(data.train_dataloader())
    own = drawn_from(*(torch.cat([b[key] for b in batches]) for key in ("image", "label")))
    draws = [drawn_by(load_denoiser(folder)) for folder in options.students]
    with torch.enable_grad():
        scores = [fitted(teacher, draw, options.updates, i) for i, draw in enumerate(draws)]
        again = fitted(teacher, draws[0], options.updates, 100)
        of_own = fitted(teacher, own, options.updates, 101)
    torch.manual_seed(0)
    x, labels = draws[0](2000)
    columns = {"two fits to the first": again, "teacher's samples": of_own, "teacher": teacher}
    columns |= {
        Path(s).parent.name: f for s, f in zip(options.students[1:], scores[1:], strict=True)
    }
    print("| sigma | " + " | ".join(columns) + " | teacher - its samples |")
    print("|---" * (len(columns) + 2) + "|")
    for share in SHARES:
        sigma = teacher.schedule(torch.full((len(x),), share))
        noisy = noised(x, sigma)
        first = scores[0](noisy, sigma, labels)
        apart = [_apart(first, score(noisy, sigma, labels)) for score in columns.values()]
        apart.append(_apart(of_own(noisy, sigma, labels), teacher(noisy, sigma, labels)))
        print(f"| {sigma[0]:.2f} | " + " | ".join(f"{a:.4f}" for a in apart) + " |", flush=True)
    with torch.enable_grad():
        refitted = fitted(teacher, own, options.refit, 102, LogNormalSigma(-1.0, 1.4))
    reference = features(teacher, 0)
    for name, other in {"teacher": teacher, "network fitted to its samples": refitted}.items():
        distance = frechet_distance(reference, features(other, 1))
        print(f"samples of the {name}: {distance:.4f} from the teacher's")


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().mean().sqrt())


if __name__ == "__main__":
    main()
