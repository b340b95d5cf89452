"""Score identity distillation (Zhou et al. 2024)."""

from typing import Any

import torch
from torch import Tensor

from lit_distill.diffusion import Denoiser, like
from lit_distill.losses import score_identity_loss
from lit_distill.methods.alternating import untrained
from lit_distill.methods.dmd import Generated
from lit_distill.methods.dmd2 import DMD2


class SiD(DMD2):
    """Generator by an estimate of the Fisher divergence, data-free.

    Student and fake score alternate as in :class:`DMD`, but the student's loss is
    ``(f_real - f_fake) . [(f_real - x) - alpha (f_real - f_fake)]`` with a gradient through both
    scores (Zhou et al. 2024). With an adversarial weight it is SiDA (Zhou et al. 2025).

    Reference recipe (CIFAR10): student from ``sigma = 2.5``, Adam(0, .999) 1e-5 for both, batch
    256, alpha 1.2 (1 with fewer, slower updates), EMA half-life .5 M images.

    Data: any, of which it takes the labels. Under DDP use
    ``strategy: ddp_find_unused_parameters_true``.

    Args:
        teacher: A denoiser, or a folder or hub id of one.
        alpha: Weight of the squared difference of the scores.
        generator_sigma: Noise level that the student starts from; None: the teacher's largest.
        adversarial_weight: As for :class:`DMD2`; 0 with ``discriminator_weight`` 0 = no
            discriminator.
        discriminator_weight: As for :class:`DMD2`.
        update_ratio: Fake-score updates for each student update.
        dmd2: Arguments of :class:`DMD2`.

    Raises:
        ValueError: If a setting is impossible.
    """

    def __init__(
        self,
        teacher: str | Denoiser,
        alpha: float = 1.2,
        generator_sigma: float | None = 2.5,
        adversarial_weight: float = 0.0,
        discriminator_weight: float = 0.0,
        update_ratio: int = 1,
        **dmd2: Any,
    ) -> None:
        super().__init__(
            teacher,
            adversarial_weight=adversarial_weight,
            discriminator_weight=discriminator_weight,
            update_ratio=update_ratio,
            generator_sigma=generator_sigma,
            **dmd2,
        )
        self.save_hyperparameters(logger=False)
        if self.divergence != "reverse_kl":
            raise ValueError(
                f"divergence={self.divergence!r} is one of DMD2; SiD has its own, leave it out."
            )
        self.alpha = alpha

    def distribution_loss(self, samples: Generated) -> Tensor:
        """The score identity, with a graph through both scores."""
        x, condition, sigma = samples.image, samples.condition, self.draw_sigma(samples)
        noisy = x + like(sigma, x) * torch.randn_like(x)
        with untrained(self.fake_score):
            real = self.real_score(noisy, sigma, condition)
            fake = self.fake_score(noisy, sigma, condition)
        return score_identity_loss(x, real, fake, self.alpha, normalise=self.normalise).mean()
