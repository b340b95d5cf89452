"""Losses: pure functions and distances, usable without any trainer."""

from lit_distill.losses.distances import (
    DISTANCES,
    L1,
    L2,
    LPIPS,
    Distance,
    PseudoHuber,
    as_distance,
)
from lit_distill.losses.score_matching import (
    DistributionMatching,
    denoising_loss,
    distribution_matching,
    surrogate_loss,
)

__all__ = [
    "DISTANCES",
    "L1",
    "L2",
    "LPIPS",
    "Distance",
    "DistributionMatching",
    "PseudoHuber",
    "as_distance",
    "denoising_loss",
    "distribution_matching",
    "surrogate_loss",
]
