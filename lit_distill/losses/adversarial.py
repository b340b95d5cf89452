"""Losses of a discriminator and of the generator that it judges.

Logits are ``(B, N)``: one for each place that a head looks at; above 0 means "real".
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

AdversarialLoss = Literal["softplus", "hinge"]


def discriminator_loss(real: Tensor, fake: Tensor, kind: AdversarialLoss = "softplus") -> Tensor:
    """What a discriminator lowers, ``(B,)``.

    ``softplus`` is the cross entropy of the original GAN (Goodfellow et al. 2014), ``hinge`` that
    of Lim & Ye 2017, which leaves alone what is told apart with a margin.

    Args:
        real: ``(B, N)``, logits of real samples.
        fake: ``(B, N)``, logits of generated ones.
        kind: Which.
    """
    if kind == "hinge":
        return (functional.relu(1 - real) + functional.relu(1 + fake)).mean(1)
    return (functional.softplus(-real) + functional.softplus(fake)).mean(1)


def generator_loss(fake: Tensor, kind: AdversarialLoss = "softplus") -> Tensor:
    """What a generator lowers, ``(B,)``: the non-saturating loss, or the negative logit.

    Args:
        fake: ``(B, N)``, logits of generated samples.
        kind: Which.
    """
    return (-fake if kind == "hinge" else functional.softplus(-fake)).mean(1)


def r1_penalty(head: Callable[[list[Tensor]], Tensor], features: list[Tensor]) -> Tensor:
    """Squared gradient ``(B,)`` of a head's logits in its own input (Mescheder et al. 2018).

    In the features and not in the image (Sauer et al. 2023), so that it costs a pass through the
    heads only.

    Args:
        head: Makes logits from features.
        features: Those of real samples, each ``(B, ...)``; a graph behind them is cut.
    """
    inputs = [feature.detach().requires_grad_() for feature in features]
    logits = head(inputs)
    gradients = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    return torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0)


def check_adversarial_loss(kind: AdversarialLoss) -> None:
    """Raise a ``ValueError`` unless it is one of the two."""
    if kind not in ("softplus", "hinge"):
        raise ValueError(f"adversarial_loss={kind!r} is unknown; choose softplus or hinge.")
