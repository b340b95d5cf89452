"""Losses: pure functions and distances, usable without any trainer."""

from lit_distill.losses.adversarial import (
    AdversarialLoss,
    check_adversarial_loss,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)
from lit_distill.losses.distances import (
    DISTANCES,
    L1,
    L2,
    LPIPS,
    Decoded,
    Distance,
    Huber,
    PseudoHuber,
    as_distance,
)
from lit_distill.losses.flow_matching import (
    adaptive_loss,
    flow_matching_loss,
    mean_velocity_target,
)
from lit_distill.losses.score_matching import (
    DistributionMatching,
    denoising_error,
    denoising_loss,
    distribution_matching,
    score_identity_loss,
    surrogate_loss,
)

__all__ = [
    "DISTANCES",
    "L1",
    "L2",
    "LPIPS",
    "AdversarialLoss",
    "Decoded",
    "Distance",
    "DistributionMatching",
    "Huber",
    "PseudoHuber",
    "adaptive_loss",
    "as_distance",
    "check_adversarial_loss",
    "denoising_error",
    "denoising_loss",
    "discriminator_loss",
    "distribution_matching",
    "flow_matching_loss",
    "generator_loss",
    "mean_velocity_target",
    "r1_penalty",
    "score_identity_loss",
    "surrogate_loss",
]
