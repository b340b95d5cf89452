"""Adversarial diffusion distillation (Sauer et al. 2023), in latent space or not (2024)."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lit_distill.diffusion import (
    Condition,
    Denoiser,
    FewSteps,
    GuidedDenoiser,
    LogNormalSigma,
    SigmaDistribution,
    like,
    sample,
)
from lit_distill.losses import (
    AdversarialLoss,
    Distance,
    as_distance,
    check_adversarial_loss,
    generator_loss,
)
from lit_distill.methods.alternating import AlternatingDistillationModule, untrained
from lit_distill.methods.base import (
    Batch,
    Trained,
    always_the_same,
    as_denoiser,
    condition_of,
    noised,
    student_of,
)
from lit_distill.methods.dmd import Generated
from lit_distill.methods.dmd2 import (
    judged,
    noised_next,
    samples_of_steps,
    several_steps,
    steps_in_turn,
)
from lit_distill.models import Discriminator


class AdversarialDistillation(AlternatingDistillationModule):
    """Generator of one or a few steps that has to pass for real.

    In turn, on the same batch: the student's samples are noised again, and heads on the frozen
    teacher's own features judge them (Sauer et al. 2024, LADD, Sec. 3); the heads learn to tell
    them from real data, with a gradient penalty. With ``distillation_weight`` the distance to the
    teacher's denoising of the same noised samples is added, with the weight
    ``1 / sqrt(1 + sigma^2)`` (Sauer et al. 2023, ADD).

    Reference recipes: ADD with DINOv2 features of the images, hinge, R1 1e-5, distillation weight
    2.5; LADD with levels of a logit-normal distribution, no distillation.

    Data: any, as real images. Under DDP use ``strategy: ddp_find_unused_parameters_true``.

    Args:
        teacher: A denoiser, or a folder or hub id of one.
        steps: Steps of the student; those beyond the first are trained on its own samples. What a
            step but the last makes is judged from the level on that it will be noised to.
        levels: Noise levels that the steps beyond the first start from, falling; by default those
            uniform in the teacher's own time.
        sigma_distribution: Levels to judge at, from uniform numbers.
        adversarial_loss: ``softplus`` or ``hinge``.
        r1_weight: Weight of the gradient penalty of the heads on real data; 0 = none.
        feature_layers: Layers of the teacher's network that heads look at; by default those that
            the network names itself.
        feature_network: Another frozen network to look with, at images without noise: a module
            that makes features ``(B, C, ...)``, or a list of such, and says its ``image_shape``.
        distance: Of the distillation: ``lpips``, ``l2``, ``l1``, ``pseudo_huber``, or an object.
        distillation_weight: Weight of the distance to the teacher's denoising; 0 = none.
        guidance: Classifier-free guidance of that denoising; 1 = none.
        generator_sigma: Noise level that the student starts from; the teacher's largest by default.
        optimizer: Makes the student's optimizer.
        discriminator_optimizer: Makes the discriminator's; like the student's by default.
        lr_scheduler: Makes the learning-rate schedule of both.
        clip: Largest gradient norm of the student, or None.
        discriminator_clip: Largest gradient norm of the discriminator, or None.
        student: What the student starts from, where that is not the teacher.
        base: Arguments of :class:`AlternatingDistillationModule`.

    Raises:
        ValueError: If a setting is impossible, or the network has no such layers.
    """

    def __init__(
        self,
        teacher: str | Denoiser,
        steps: int = 1,
        levels: Sequence[float] | None = None,
        sigma_distribution: SigmaDistribution | None = None,
        adversarial_loss: AdversarialLoss = "hinge",
        r1_weight: float = 1e-5,
        feature_layers: Sequence[str] | None = None,
        feature_network: nn.Module | None = None,
        distance: str | Distance = "l2",
        distillation_weight: float = 0.0,
        guidance: float = 1.0,
        generator_sigma: float | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-5),
        discriminator_optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        clip: float | None = 10.0,
        discriminator_clip: float | None = 10.0,
        student: str | Denoiser | None = None,
        **base: Any,
    ) -> None:
        check_adversarial_loss(adversarial_loss)
        if steps < 1:
            raise ValueError(f"steps={steps}: a student takes at least 1 step.")
        frozen = as_denoiser(teacher)
        generator = student_of(frozen, student, generator_sigma)
        one_step = steps == 1 and levels is None
        generator.few_steps = (
            FewSteps((1,)) if one_step else several_steps(generator, steps, levels)
        )
        super().__init__(
            generator, frozen, optimizer=optimizer, lr_scheduler=lr_scheduler, steps=steps, **base
        )
        self.save_hyperparameters(logger=False)
        self.feature_network = feature_network
        if feature_network is not None:
            feature_network.requires_grad_(False)
        self.discriminator = Discriminator(self.backbone, feature_layers)
        self.real_score = GuidedDenoiser(frozen, guidance)
        self.distance = as_distance(distance, frozen.codec) if distillation_weight > 0 else None
        self.distillation_weight = distillation_weight
        self.sigma_distribution = sigma_distribution or LogNormalSigma(0.0, 1.0)
        self.adversarial_loss, self.r1_weight = adversarial_loss, r1_weight
        self.discriminator_optimizer = discriminator_optimizer
        self.clip, self.discriminator_clip = clip, discriminator_clip
        self.train()

    @property
    def backbone(self) -> nn.Module:
        """Whose features the heads look at."""
        assert self.teacher is not None
        return self.teacher if self.feature_network is None else self.feature_network

    def compiled_modules(self) -> list[nn.Module]:
        """The student, and the network that denoises unless it is looked into, as of DMD2."""
        return [self.student, *(t for t in self.teachers() if t is not self.backbone)]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One student update, then one of the discriminator."""
        parts = self.split(batch)
        samples: list[Generated] = []
        self.update("student", lambda part: self.student_loss(part, samples), parts)
        self.update("discriminator", self.discriminator_loss, samples)
        self.step_schedules()

    def student_loss(self, batch: Batch, samples: list[Generated]) -> Tensor:
        """Passing for real, and the distance to the teacher's denoising; samples are handed on."""
        made = self.generated(batch)
        samples.append(made.detached())
        x, condition, sigma = made.image, made.condition, self.draw_sigma(made)
        noisy = noised(x, sigma)
        with untrained(self.discriminator):
            features = self.features(x, noisy, sigma, condition)
            logits = self.discriminator(features)
        loss = generator_loss(logits, self.adversarial_loss).mean()
        self.log("loss/adversarial", loss, prog_bar=True)
        if self.distance is None:
            return loss
        with torch.no_grad():
            target = self.real_score(noisy, sigma, condition)
        weight = (1 + sigma**2).rsqrt()
        distillation = (weight * self.distance(x, target)).mean()
        self.log("loss/distillation", distillation, prog_bar=True)
        return loss + self.distillation_weight * distillation

    def generated(self, batch: Batch) -> Generated:
        """The student's samples of its steps, from fresh noise, judged as DMD2's are."""
        data, condition = batch["image"], condition_of(batch)
        noise = torch.randn_like(data)
        if self.steps == 1:
            x = sample(self.student, noise, steps=1, condition=condition)
            return Generated(x, condition, data)
        step = steps_in_turn(len(data), self.steps)
        x = samples_of_steps(self.student, noise, step, self.steps, condition)
        lowest = noised_next(self.student, step, self.steps, x.device)
        return Generated(x, condition, data, lowest)

    def features(
        self, x: Tensor, noisy: Tensor, sigma: Tensor, condition: Condition
    ) -> list[Tensor]:
        """What the heads look at: noised samples through the teacher, or the samples themselves."""
        seen = noisy if self.feature_network is None else x
        return self.discriminator.features(self.backbone, seen, sigma, condition)

    def discriminator_loss(self, samples: Generated) -> Tensor:
        """Telling the student's samples from real ones."""
        x, condition, data = samples.image, samples.condition, samples.data
        sigma = self.draw_sigma(samples)
        with torch.no_grad():
            fake = self.features(x, noised(x, sigma), sigma, condition)
            real = self.features(data, noised(data, sigma), sigma, condition)
        return judged(self, self.discriminator, real, fake, self.adversarial_loss, self.r1_weight)

    def draw_sigma(self, samples: Generated) -> Tensor:
        """Noise levels to judge at, within those that the teacher knows."""
        assert self.teacher is not None
        sigma = self.sigma_distribution(torch.rand(len(samples.image), device=self.device))
        known = sigma.clamp(self.teacher.sigma_min, self.teacher.sigma_max)
        return known.clamp(min=samples.sigma_min)

    @torch.no_grad()
    def preview(self, noise: Tensor, condition: Condition = None) -> dict[str, Tensor]:
        """Student, its noised samples, and how the teacher denoises them."""
        x = self.generate(noise, condition, generator=always_the_same(noise))
        sigma = torch.ones(len(x), device=x.device)
        noisy = x + like(sigma, x) * noise
        real = self.real_score(noisy, sigma, condition)
        return {"student": x, "noised": noisy, "real": real}

    def trained_modules(self) -> list[Trained]:
        """The student, then the discriminator."""
        heads = self.discriminator_optimizer or self.optimizer
        return [
            Trained("student", self.student, self.optimizer, self.lr_scheduler, self.clip),
            Trained(
                "discriminator",
                self.discriminator,
                heads,
                self.lr_scheduler,
                self.discriminator_clip,
            ),
        ]

    def frozen_modules(self) -> tuple[str, ...]:
        """Teacher (also with guidance), distance and injected network."""
        return ("teacher", "real_score", "distance", "feature_network")

    def train(self, mode: bool = True) -> "AdversarialDistillation":
        """All networks stay in eval mode, as of DMD."""
        super().train(mode)
        for network in self.children():
            network.eval()
        return self
