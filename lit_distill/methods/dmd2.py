"""Improved distribution matching distillation (Yin et al. 2024b)."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_distill.diffusion import (
    Condition,
    Denoiser,
    FewSteps,
    NetworkDenoiser,
    like,
    of_rows,
    told,
)
from lit_distill.losses import (
    AdversarialLoss,
    check_adversarial_loss,
    denoising_error,
    discriminator_loss,
    distribution_matching,
    generator_loss,
    r1_penalty,
    surrogate_loss,
)
from lit_distill.methods.alternating import untrained
from lit_distill.methods.base import Batch, Trained, condition_of, network_of, noised
from lit_distill.methods.dmd import DMD, Generated
from lit_distill.models import Discriminator, add_inputs

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon"]
Inputs = Literal["backward_simulation", "noised_data"]

# Weight of a sample by its log ratio of densities, data over student (Xu et al. 2025).
_DENSITY_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": torch.exp,
    "jensen_shannon": torch.sigmoid,
}


class DMD2(DMD):
    """Generator of one or a few steps by distribution matching without pairs, beside a GAN.

    :class:`DMD` with three changes (Yin et al. 2024b):

    1. No regression; the fake score takes ``update_ratio`` updates for each of the student (Sec.
       4.2).
    2. A discriminator's head on the fake score's features of noised samples tells them from real
       data, and the student is trained to pass (Sec. 4.3).
    3. A student of several steps is trained on what it will see in sampling, its own samples of
       the step before, noised again (*backward simulation*, Sec. 4.5).

    Reference recipe (ImageNet 64): AdamW 2e-6, weight decay .01, warm-up 500, clip 10, batch 280,
    ratio 5, adversarial weights 3e-3 (student) and 1e-2 (discriminator), bf16.

    Deviations: all updates of a batch look at its real images, with fresh noise; the heads are
    small perceptrons on each place of the feature maps; a batch has samples of all steps, where one
    fake score would let the errors of one step make up for another's: it is told the step
    (``fake_score_knows_step``), or what a step but the last makes is judged at the level that it
    will be noised to, and above it.

    Data: any, as real images; :class:`~lit_distill.datamodules.PairsDataModule` if
    ``regression_weight`` is not 0. Under DDP use ``strategy: ddp_find_unused_parameters_true``.

    Args:
        teacher: A denoiser, or a folder or hub id of one.
        steps: Steps of the student.
        levels: Noise levels that the steps beyond the first start from, falling; by default those
            uniform in the teacher's own time.
        inputs: What a step beyond the first is trained on: ``backward_simulation``, or
            ``noised_data``.
        fake_score_knows_step: Tell the fake score of which step a sample is, and judge the samples
            of all steps at all levels. It takes a network with a place for a further input
            (:class:`~lit_distill.models.UNet`), a discriminator on its features if any, and no
            ``lora``.
        adversarial_weight: Weight of the student's adversarial loss; 0 with
            ``discriminator_weight`` 0 = no discriminator.
        discriminator_weight: Weight of the discriminator's loss beside the fake score's.
        adversarial_loss: ``softplus`` or ``hinge``.
        r1_weight: Weight of the gradient penalty of the heads on real data; 0 = none.
        features: Whose features the discriminator looks at: the ``fake_score``, which learns with
            it, or the frozen ``teacher``.
        feature_layers: Layers of that network; by default those that the network names itself.
        divergence: ``reverse_kl``, or another whose gradient weighs the samples by the
            discriminator's log ratio of densities: ``forward_kl``, ``jensen_shannon`` (Xu et al.
            2025).
        regression_weight: As for :class:`DMD`.
        update_ratio: As for :class:`DMD`.
        dmd: Arguments of :class:`DMD`.

    Raises:
        ValueError: If a setting is impossible, or the network has no such layers.
    """

    def __init__(
        self,
        teacher: str | Denoiser,
        steps: int = 1,
        levels: Sequence[float] | None = None,
        inputs: Inputs = "backward_simulation",
        fake_score_knows_step: bool = False,
        adversarial_weight: float = 3e-3,
        discriminator_weight: float = 1e-2,
        adversarial_loss: AdversarialLoss = "softplus",
        r1_weight: float = 0.0,
        features: Literal["fake_score", "teacher"] = "fake_score",
        feature_layers: Sequence[str] | None = None,
        divergence: Divergence = "reverse_kl",
        regression_weight: float = 0.0,
        update_ratio: int = 5,
        **dmd: Any,
    ) -> None:
        check_adversarial_loss(adversarial_loss)
        _check(steps, inputs, features, divergence)
        if fake_score_knows_step:
            _check_that_steps_can_be_told(steps, features, dmd.get("lora"))
        super().__init__(
            teacher, regression_weight=regression_weight, update_ratio=update_ratio, **dmd
        )
        self.save_hyperparameters(logger=False)
        if steps > 1 and regression_weight > 0:
            raise ValueError(
                f"steps={steps}: the regression of pairs (regression_weight={regression_weight}) "
                "is that of one step."
            )
        if fake_score_knows_step:
            _let_know_step(network_of(self.fake_score))
        self.fake_score_knows_step = fake_score_knows_step
        judged = adversarial_weight > 0 or discriminator_weight > 0
        if judged and discriminator_weight == 0:
            raise ValueError(
                f"adversarial_weight={adversarial_weight} with discriminator_weight=0: nothing "
                "would train the discriminator that the student has to pass. Set both, or both to "
                "0 for no discriminator."
            )
        if divergence != "reverse_kl" and not judged:
            raise ValueError(
                f"divergence={divergence!r} needs a discriminator: set discriminator_weight."
            )
        if divergence != "reverse_kl" and adversarial_loss != "softplus":
            raise ValueError(
                f"divergence={divergence!r} takes the discriminator's logits for a log ratio of "
                f"densities, which those of adversarial_loss={adversarial_loss!r} are not: use "
                "softplus."
            )
        self.steps = steps
        if steps > 1 or levels is not None:
            self.sample_by(several_steps(self.student, steps, levels))
        self.inputs, self.features, self.divergence = inputs, features, divergence
        self.adversarial_weight, self.discriminator_weight = (
            adversarial_weight,
            discriminator_weight,
        )
        self.adversarial_loss, self.r1_weight = adversarial_loss, r1_weight
        self.discriminator = Discriminator(self.backbone, feature_layers) if judged else None
        self.train()

    @property
    def backbone(self) -> Denoiser:
        """Whose features the discriminator looks at."""
        assert self.teacher is not None
        return self.fake_score if self.features == "fake_score" else self.teacher

    def compiled_modules(self) -> list[nn.Module]:
        """All networks but the one that is looked into: compiled, it would call no hooks."""
        networks: list[nn.Module] = [self.student, self.fake_score, *self.teachers()]
        if self.discriminator is not None:
            networks.remove(self.backbone)
        return networks

    @property
    def data_free(self) -> bool:
        """Without a discriminator and noised data."""
        return self.discriminator is None and self.inputs != "noised_data"

    def generated(self, batch: Batch) -> Generated:
        """The student's samples of all its steps in equal shares, with a graph of that step only.

        What a step but the last makes is noised again. Where the fake score does not know the step,
        it is judged from that level on: below, a fake score of all steps' samples would let the
        errors of one step make up for another's.
        """
        if self.steps == 1:
            return super().generated(batch)
        data, condition = batch["image"], condition_of(batch)
        step, noise = steps_in_turn(len(data), self.steps), torch.randn_like(data)
        given = data if self.inputs == "noised_data" else None
        x = samples_of_steps(self.student, noise, step, self.steps, condition, given)
        if self.fake_score_knows_step:
            return Generated(x, self.with_step(condition, step), data)
        lowest = noised_next(self.student, step, self.steps, x.device)
        return Generated(x, condition, data, lowest)

    def with_step(self, condition: Condition, step: Tensor) -> Condition:
        """A condition for the fake score, if it knows the steps ``(B,)`` that samples are of."""
        return told(self.fake_score, condition, step=step.to(self.device, non_blocking=True))

    @torch.no_grad()
    def preview(self, noise: Tensor, condition: Condition = None) -> dict[str, Tensor]:
        """As of DMD; the samples are those of the last step."""
        last = torch.full((len(noise),), self.steps - 1)
        return super().preview(noise, self.with_step(condition, last))

    def sample_loss(self, samples: Generated) -> Tensor:
        """Distribution matching, and passing for real."""
        loss = super().sample_loss(samples)
        if self.discriminator is None or self.adversarial_weight == 0:
            return loss
        with untrained(self.fake_score, self.discriminator):
            logits = self.logits(samples, self.draw_sigma(samples), torch.randn_like(samples.image))
        adversarial = generator_loss(logits, self.adversarial_loss).mean()
        self.log("loss/adversarial", adversarial, prog_bar=True)
        return loss + self.adversarial_weight * adversarial

    def logits(self, samples: Generated, sigma: Tensor, noise: Tensor) -> Tensor:
        """The discriminator's logits ``(B, N)`` of samples, noised to ``sigma``."""
        assert self.discriminator is not None
        noisy = samples.image + like(sigma, samples.image) * noise
        return self.discriminator(
            self.discriminator.features(self.backbone, noisy, sigma, samples.condition)
        )

    def distribution_loss(self, samples: Generated) -> Tensor:
        """As of DMD; for other divergences the samples are weighted."""
        if self.divergence == "reverse_kl":
            return super().distribution_loss(samples)
        x, sigma = samples.image, self.draw_sigma(samples)
        noise = torch.randn_like(x)
        matching = distribution_matching(
            x,
            sigma,
            noise,
            self.real_score,
            self.fake_score,
            samples.condition,
            normalise=self.normalise,
        )
        with torch.no_grad():
            ratio = self.logits(samples, sigma, noise).mean(1).clamp(-5, 5)
            weight = _DENSITY_WEIGHTS[self.divergence](ratio)
            weight = weight / weight.mean()
        self.log("weight/mean", matching.weight.mean())
        return (weight * surrogate_loss(x, matching.gradient)).mean()

    def fake_loss(self, samples: Generated) -> Tensor:
        """Denoising of the student's samples, and telling them from real ones."""
        if self.discriminator is None:
            return super().fake_loss(samples)
        x, condition, data = samples.image, samples.condition, samples.data
        sigma = self.draw_sigma(samples)
        if self.features == "fake_score":  # one pass serves both losses
            denoised, fake = self.discriminator.look(
                self.fake_score, noised(x, sigma), sigma, condition
            )
        else:
            denoised = self.fake_score(noised(x, sigma), sigma, condition)
            with torch.no_grad():
                fake = self.discriminator.features(
                    self.backbone, noised(x, sigma), sigma, condition
                )
        loss = denoising_error(self.fake_score, denoised, x, sigma).mean()
        self.log("loss/fake_score", loss, prog_bar=True)
        with torch.set_grad_enabled(self.features == "fake_score"):
            real = self.discriminator.features(self.backbone, noised(data, sigma), sigma, condition)
        return loss + self.discriminator_weight * judged(
            self, self.discriminator, real, fake, self.adversarial_loss, self.r1_weight
        )

    def trained_modules(self) -> list[Trained]:
        """The student, then the fake score together with the discriminator."""
        trained = super().trained_modules()
        if self.discriminator is not None:
            trained[1].module = nn.ModuleList([self.fake_score, self.discriminator])
        return trained


def judged(
    module: Any,
    discriminator: Discriminator,
    real: list[Tensor],
    fake: list[Tensor],
    kind: AdversarialLoss,
    r1_weight: float,
) -> Tensor:
    """The discriminator's loss on features, logged by a method."""
    real_logits, fake_logits = discriminator(real), discriminator(fake)
    loss = discriminator_loss(real_logits, fake_logits, kind).mean()
    module.log("loss/discriminator", loss)
    with torch.no_grad():
        right = (real_logits.mean(1) > 0).float().mean() + (fake_logits.mean(1) < 0).float().mean()
    module.log("discriminator/win_rate", right / 2)
    if r1_weight > 0:
        penalty = r1_penalty(discriminator, real).mean()
        module.log("loss/r1", penalty)
        loss = loss + r1_weight / 2 * penalty
    return loss


def several_steps(
    denoiser: Denoiser, steps: int, levels: Sequence[float] | None = None
) -> FewSteps:
    """Levels to start from, with fresh noise between them.

    Args:
        denoiser: The student.
        steps: Its steps.
        levels: Where the steps beyond the first start; by default uniform in the model's own time.

    Raises:
        ValueError: If these are not as many levels, falling, within those that the model knows.
    """
    if levels is None:
        shares = 1 - torch.arange(1, steps, dtype=torch.float64) / steps
        levels = denoiser.schedule(shares).tolist()
    known = (denoiser.sigma_max, *levels, denoiser.sigma_min)
    if len(levels) != steps - 1 or not all(after < before for before, after in pairwise(known)):
        raise ValueError(
            f"levels={list(levels)}: a student of {steps} step(s) starts all but the first at "
            f"{steps - 1} levels of its own, which fall, between its smallest and largest noise "
            f"({denoiser.sigma_min:g} and {denoiser.sigma_max:g})."
        )
    return FewSteps((steps,), [[denoiser.sigma_max, *levels, 0.0]], gamma=1.0)


def steps_in_turn(count: int, steps: int) -> Tensor:
    """A step for each sample of a batch, ``(count,)`` indices, from a random one on in turn."""
    return (torch.arange(count) + torch.randint(steps, ())) % steps


def noised_next(student: Denoiser, step: Tensor, steps: int, device: torch.device) -> Tensor:
    """The levels ``(B,)`` that samples of steps ``(B,)`` of ``steps`` are noised to; 0: none."""
    return student.grid(steps)[step + 1].float().to(device, non_blocking=True)


def samples_of_steps(
    student: Denoiser,
    noise: Tensor,
    step: Tensor,
    steps: int,
    condition: Condition,
    data: Tensor | None = None,
) -> Tensor:
    """Samples of a student's steps, with a graph of that step only.

    Args:
        student: A student of several steps with fresh noise between them.
        noise: ``(B, *shape)``, unit noise to start from.
        step: ``(B,)``, the step of each sample, from 0; on the CPU, where it costs no wait.
        steps: Their number.
        condition: Passed to the student.
        data: ``(B, *shape)``, samples that the later steps start from once noised; by default the
            student's own, of the steps before.

    Returns:
        ``(B, *shape)``.
    """
    grid = student.grid(steps)
    x = student.start(noise).clone()
    for i, (level, after) in enumerate(pairwise(grid.tolist()[:-1])):
        later = (step > i).nonzero().flatten().to(x.device, non_blocking=True)
        if not len(later):
            break
        if data is None:
            with torch.no_grad():
                sigma = torch.full((len(later),), level, device=x.device)
                x0 = student(x[later], sigma, of_rows(condition, later))
            x[later] = x0 + after * torch.randn_like(x0)
        else:
            x[later] = data[later] + after * noise[later]
    sigma = grid[step].float().to(x.device, non_blocking=True)
    return student(x, sigma, condition)


def _check(steps: int, inputs: Inputs, features: str, divergence: Divergence) -> None:
    if steps < 1:
        raise ValueError(f"steps={steps}: a student takes at least 1 step.")
    if inputs not in ("backward_simulation", "noised_data"):
        raise ValueError(
            f"inputs={inputs!r} is unknown; choose backward_simulation or noised_data."
        )
    if features not in ("fake_score", "teacher"):
        raise ValueError(f"features={features!r} is unknown; choose fake_score or teacher.")
    if divergence not in _DENSITY_WEIGHTS:
        raise ValueError(
            f"divergence={divergence!r} is unknown; choose {', '.join(_DENSITY_WEIGHTS)}."
        )


def _let_know_step(fake_score: NetworkDenoiser) -> None:
    network = fake_score.network
    if not hasattr(network, "add_inputs"):  # it would be wrapped, and hide its layers from a head
        raise ValueError(
            f"fake_score_knows_step=True: {type(network).__name__} has no place for a further "
            "input. Set it to false, or use lit_distill.models.UNet."
        )
    try:
        add_inputs(fake_score, ("step",))
    except ValueError as error:
        raise ValueError(f"fake_score_knows_step=True: {error}") from error


def _check_that_steps_can_be_told(steps: int, features: str, lora: object) -> None:
    if steps == 1:
        raise ValueError("fake_score_knows_step=True with steps=1: there is only one to know of.")
    if lora is not None:
        raise ValueError(
            "fake_score_knows_step=True with lora: the network is the student's too, and cannot be "
            "given a further input for one of them. Use one of the two."
        )
    if features != "fake_score":
        raise ValueError(
            f"fake_score_knows_step=True with features={features!r}: a discriminator on that "
            "network's features would not know the step. Use features fake_score."
        )
