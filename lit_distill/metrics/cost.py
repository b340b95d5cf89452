"""What a sample costs: network evaluations, latency, images per second."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import cast

import torch
from torch import Tensor, nn

from lit_distill.diffusion import Condition, Denoiser, EvaluationCounter, seeded_noise

Sampler = Callable[[Tensor, Condition], Tensor]
"""Unit noise (B, C, H, W) and condition to images (B, C, H, W) in about [-1, 1]."""


@dataclass(frozen=True)
class Cost:
    """Cost of sampling on one device.

    Attributes:
        nfe: Network evaluations per image, counted (guidance counts two).
        latency_ms: Milliseconds per image at batch 1, median after warm-up.
        images_per_second: Throughput at the first batch size, median after warm-up.
        throughput: Throughput by batch size.
    """

    nfe: int
    latency_ms: float
    images_per_second: float
    throughput: dict[int, float]


def labels_at(indices: Tensor, num_classes: int | None) -> Tensor | None:
    """The label of image ``i``: ``i % num_classes``; None for unconditional models."""
    return None if num_classes is None else indices % num_classes


@torch.no_grad()
def measure_cost(
    sampler: Sampler,
    network: nn.Module,
    shape: tuple[int, ...],
    num_classes: int | None,
    *,
    device: torch.device,
    batch_sizes: tuple[int, ...] = (500,),
) -> Cost:
    """Count and time a sampler, with noise and labels on the device already.

    Args:
        sampler: The sampler; it must evaluate denoisers inside ``network`` only.
        network: Any module; every denoiser inside it is watched.
        shape: (C, H, W) of the noise.
        num_classes: Number of classes, or None.
        device: Where ``network`` is.
        batch_sizes: Batch sizes of the throughput, at least one.

    Returns:
        The cost.
    """

    def run(batch_size: int) -> Callable[[], Tensor]:
        noise = seeded_noise(shape, range(batch_size)).to(device)
        labels = labels_at(torch.arange(batch_size, device=device), num_classes)
        return lambda: sampler(noise, labels)

    with EvaluationCounter(cast(Denoiser, network)) as counter:  # it looks at modules only
        run(1)()
    seconds = {size: _median_seconds(run(size), device) for size in {1, *batch_sizes}}
    throughput = {size: size / seconds[size] for size in batch_sizes}
    return Cost(
        nfe=counter.samples,  # of one image, so a guided batch of two rows counts two
        latency_ms=1e3 * seconds[1],
        images_per_second=throughput[batch_sizes[0]],
        throughput=throughput,
    )


def _median_seconds(
    run: Callable[[], object], device: torch.device, repeats: int = 20, budget: float = 1.0
) -> float:
    """Median over repeats after a warm-up; fewer (at least 3) once ``budget`` seconds are spent."""
    run()
    seconds: list[float] = []
    while len(seconds) < 3 or (len(seconds) < repeats and sum(seconds) < budget):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
