"""Distribution Matching Distillation (Yin et al. 2024)."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lit_distill.diffusion import (
    Condition,
    Denoiser,
    FewSteps,
    GuidedDenoiser,
    of_rows,
    sample,
)
from lit_distill.losses import (
    Distance,
    as_distance,
    denoising_loss,
    distribution_matching,
    surrogate_loss,
)
from lit_distill.methods.alternating import AlternatingDistillationModule
from lit_distill.methods.base import (
    Batch,
    Trained,
    always_the_same,
    as_denoiser,
    condition_of,
    copy_of,
    network_of,
    round_weights,
)
from lit_distill.models import LoRA, adapted


class Generated(NamedTuple):
    """Samples of the student, what they are conditional on, and the data beside them.

    They are judged at noise levels from ``sigma_min`` on, a number or one ``(B,)`` for each.
    """

    image: Tensor
    condition: Condition
    data: Tensor
    sigma_min: float | Tensor = 0.0

    def detached(self) -> "Generated":
        """Without a graph."""
        return self._replace(image=self.image.detach())


class DMD(AlternatingDistillationModule):
    """One-step generator by distribution matching and regression (Yin et al. 2024, Algorithm 1).

    Student and fake score start as the teacher. In turn, on the same batch:

    1. The student's samples ``x = G(z)`` are noised to a level ``sigma``; the difference of the
       fake score's and the teacher's denoisings, divided by ``mean |x - mu_real|``, is the
       gradient of the divergence of the two densities (Eqs. 7-8). On stored noise-image pairs of
       the teacher the student is regressed (Eq. 9).
    2. The fake score learns to denoise the student's samples (Eq. 6).

    Reference recipe (CIFAR10): AdamW 5e-5, weight decay .01, warm-up of 500 steps, clip 10, batch
    392, 300k steps, LPIPS at 224 with weight .25 (conditional) or .5, pairs from 18 Heun steps.

    Deviations: the weight of the fake score's loss is that of the network's own objective; no
    dropout anywhere; noise of the distribution-matching term is fresh, while its labels are the
    batch's.

    Data: :class:`~lit_distill.datamodules.PairsDataModule`, or any other if ``regression_weight``
    is 0. Under DDP use ``strategy: ddp_find_unused_parameters_true``.

    Args:
        teacher: A denoiser, or a folder or hub id of one.
        distance: Of the regression: ``lpips``, ``l2``, ``l1``, ``pseudo_huber``, or an object.
        regression_weight: Weight of the regression.
        distribution_weight: Weight of distribution matching.
        guidance: Classifier-free guidance of the real score; 1 = none.
        noise_range: Levels to match and to train the fake score at, as shares of the teacher's
            time.
        generator_sigma: Noise level that the student starts from; the teacher's largest by
            default.
        normalise: Divide the gradient by ``mean |x - mu_real|``.
        update_ratio: Fake-score updates for each student update. All but the first are made on
            fresh samples, which the student makes without a graph.
        cache_features: Keep the distance's features of the stored images, in half precision on
            the CPU (for LPIPS, a third of its work from the second pass over the pairs on).
        optimizer: Makes the student's optimizer.
        fake_optimizer: Makes the fake score's; like the student's by default.
        lr_scheduler: Makes the learning-rate schedule of both.
        clip: Largest gradient norm of the student, or None.
        fake_clip: Largest gradient norm of the fake score, or None.
        accumulate: Micro-batches of a batch.
        ema_decay: Decay of the average of the student's weights.
        ema_warmup: Whether it warms up, see :class:`DistillationModule`.
        compile: Compile all networks, but one whose features a discriminator looks at.
        channels_last: Keep weights in the channels-last layout.
        student: What the student starts from, where that is not the teacher: a denoiser of any
            size, or a folder or hub id of one.
        fake_score: What the fake score starts from, likewise.
        lora: Train low-rank adapters for student and fake score, which share the teacher's
            network, instead of two networks of their own.
        teacher_precision: ``bfloat16`` halves the teacher's memory; what shares its network too.
        gradient_checkpointing: Compute the student's and the fake score's states again in the
            backward pass instead of keeping them.
        ema_device: Where the average is kept, see :class:`DistillationModule`.
        further_ema_decays: Decays of further averages, likewise.

    Raises:
        ValueError: If a setting is impossible.
    """

    def __init__(
        self,
        teacher: str | Denoiser,
        distance: str | Distance = "lpips",
        regression_weight: float = 0.25,
        distribution_weight: float = 1.0,
        guidance: float = 1.0,
        noise_range: tuple[float, float] = (0.02, 0.98),
        generator_sigma: float | None = None,
        normalise: bool = True,
        update_ratio: int = 1,
        cache_features: bool = False,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-5),
        fake_optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        clip: float | None = 10.0,
        fake_clip: float | None = 10.0,
        accumulate: int = 1,
        ema_decay: float = 0.999,
        ema_warmup: bool = True,
        compile: bool = False,
        channels_last: bool = False,
        student: str | Denoiser | None = None,
        fake_score: str | Denoiser | None = None,
        lora: LoRA | None = None,
        teacher_precision: Literal["float32", "bfloat16"] = "float32",
        gradient_checkpointing: bool = False,
        ema_device: str | None = None,
        further_ema_decays: Sequence[float] = (),
    ) -> None:
        _check(update_ratio, noise_range)
        frozen = as_denoiser(teacher)
        generator, fake = _trainable(frozen, student, fake_score, lora, generator_sigma)
        if gradient_checkpointing:
            _checkpoint_gradients(generator, fake, shared=lora is not None)
        round_weights(frozen, teacher_precision)
        generator.few_steps = FewSteps(trained=(1,))
        super().__init__(
            generator,
            frozen,
            accumulate=accumulate,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            ema_decay=ema_decay,
            ema_warmup=ema_warmup,
            compile=compile,
            channels_last=channels_last,
            ema_device=ema_device,
            further_ema_decays=further_ema_decays,
        )
        self.save_hyperparameters(logger=False)
        self.fake_score = fake
        self.real_score = GuidedDenoiser(frozen, guidance)
        self.distance = as_distance(distance, frozen.codec) if regression_weight > 0 else None
        self.regression_weight, self.distribution_weight = regression_weight, distribution_weight
        self.noise_range, self.normalise, self.update_ratio = noise_range, normalise, update_ratio
        self.fake_optimizer, self.clip, self.fake_clip = fake_optimizer, clip, fake_clip
        self.target_features: dict[int, list[Tensor]] | None = {} if cache_features else None
        self.train()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One student update, then ``update_ratio`` updates of the fake score."""
        parts = self.split(batch)
        samples: list[Generated] = []
        self.update("student", lambda part: self.student_loss(part, samples), parts)
        for i in range(self.update_ratio):
            if i > 0:
                samples = [self.fresh_samples(part) for part in parts]
            self.update("fake_score", self.fake_loss, samples)
        self.step_schedules()

    @property
    def data_free(self) -> bool:
        """Without the regression."""
        return self.distance is None

    def student_loss(self, batch: Batch, samples: list[Generated]) -> Tensor:
        """The loss of fresh samples, which are handed on, and regression on pairs."""
        if self.distance is None:
            made = self.generated(batch)
        else:
            condition, data = condition_of(batch), batch["image"]
            both = torch.cat([torch.randn_like(data), _noise_of(batch)])
            twice = of_rows(condition, torch.arange(len(data), device=data.device).repeat(2))
            x, x_paired = self.one_step(both, twice).split(len(data))
            made = Generated(x, condition, data)
        samples.append(made.detached())
        loss = self.sample_loss(made)
        if self.distance is not None:
            regression = self.regression(x_paired, batch).mean()
            self.log("loss/regression", regression, prog_bar=True)
            loss = loss + self.regression_weight * regression
        return loss

    def sample_loss(self, samples: Generated) -> Tensor:
        """The loss of the student's samples: distribution matching."""
        loss = self.distribution_loss(samples)
        self.log("loss/distribution", loss, prog_bar=True)
        return self.distribution_weight * loss

    def distribution_loss(self, samples: Generated) -> Tensor:
        """A scalar whose gradient is that of the divergence to the teacher's density."""
        x = samples.image
        matching = distribution_matching(
            x,
            self.draw_sigma(samples),
            torch.randn_like(x),
            self.real_score,
            self.fake_score,
            samples.condition,
            normalise=self.normalise,
        )
        self.log("weight/mean", matching.weight.mean())
        return surrogate_loss(x, matching.gradient).mean()

    def fake_loss(self, samples: Generated) -> Tensor:
        """Denoising score matching on the student's samples."""
        x, sigma, condition = samples.image, self.draw_sigma(samples), samples.condition
        loss = denoising_loss(self.fake_score, x, sigma, torch.randn_like(x), condition).mean()
        self.log("loss/fake_score", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def fresh_samples(self, batch: Batch) -> Generated:
        """Samples without a graph."""
        return self.generated(batch)

    def generated(self, batch: Batch) -> Generated:
        """The student's samples from fresh noise."""
        data, condition = batch["image"], condition_of(batch)
        x = self.one_step(torch.randn_like(data), condition)
        return Generated(x, condition, data)

    def one_step(self, noise: Tensor, condition: Condition) -> Tensor:
        """The student's samples from unit noise."""
        return sample(self.student, noise, steps=1, condition=condition)

    def draw_sigma(self, samples: Generated) -> Tensor:
        """Noise levels to judge samples at, uniform in ``noise_range`` of the teacher's time."""
        low, high = self.noise_range
        assert self.teacher is not None
        u = low + (high - low) * torch.rand(len(samples.image), device=self.device)
        return self.teacher.schedule(u).clamp(min=samples.sigma_min)

    def regression(self, x: Tensor, batch: Batch) -> Tensor:
        """Distance ``(B,)`` to the teacher's images."""
        assert self.distance is not None
        if self.target_features is None:
            return self.distance(x, batch["image"])
        return self.distance.compare(self.distance.features(x), self._cached_features(batch))

    @torch.no_grad()
    def _cached_features(self, batch: Batch) -> list[Tensor]:
        assert self.distance is not None and self.target_features is not None
        indices = batch["index"].tolist()
        missing = [i for i, index in enumerate(indices) if index not in self.target_features]
        if missing:
            fresh = [f.half().cpu() for f in self.distance.features(batch["image"][missing])]
            for row, i in enumerate(missing):
                self.target_features[indices[i]] = [f[row] for f in fresh]
        columns = zip(*(self.target_features[index] for index in indices), strict=True)
        return [torch.stack(c).to(self.device, torch.float32) for c in columns]

    @torch.no_grad()
    def preview(self, noise: Tensor, condition: Condition = None) -> dict[str, Tensor]:
        """Student, its noised samples, and how the real and the fake score denoise them."""
        x = self.generate(noise, condition, generator=always_the_same(noise))
        assert self.teacher is not None
        sigma = self.teacher.schedule(torch.full((len(x),), 0.5, device=x.device))
        seen = distribution_matching(
            x, sigma, noise, self.real_score, self.fake_score, condition, normalise=False
        )
        return {"student": x, "noised": seen.noisy, "real": seen.real, "fake": seen.fake}

    def trained_modules(self) -> list[Trained]:
        """The student, then the fake score."""
        fake = self.fake_optimizer or self.optimizer
        return [
            Trained("student", self.student, self.optimizer, self.lr_scheduler, self.clip),
            Trained("fake_score", self.fake_score, fake, self.lr_scheduler, self.fake_clip),
        ]

    def frozen_modules(self) -> tuple[str, ...]:
        """Teacher (also as real score) and distance."""
        return ("teacher", "real_score", "distance")

    def train(self, mode: bool = True) -> "DMD":
        """All networks stay in eval mode: dropout is off, and BatchNorm keeps its statistics."""
        super().train(mode)
        for network in self.children():
            network.eval()
        return self


def _check(update_ratio: int, noise_range: tuple[float, float]) -> None:
    if update_ratio < 1:
        raise ValueError(f"update_ratio={update_ratio}: the fake score needs at least 1 update.")
    low, high = noise_range
    if not 0 <= low < high <= 1:
        raise ValueError(f"noise_range={noise_range} must be two rising shares in [0, 1].")


def _trainable(
    teacher: Denoiser,
    student: str | Denoiser | None,
    fake_score: str | Denoiser | None,
    lora: LoRA | None,
    generator_sigma: float | None,
) -> tuple[Denoiser, Denoiser]:
    """Student and fake score: two networks, or two adapters on the teacher's."""
    if lora is None:
        first, second = (teacher if s is None else as_denoiser(s) for s in (student, fake_score))
        return copy_of(first, generator_sigma), copy_of(second)
    if student is not None or fake_score is not None:
        raise ValueError(
            "With lora the student and the fake score share the teacher's network: leave the "
            "options student and fake_score out."
        )
    shared = network_of(teacher)
    generator, fake = adapted(shared, lora), adapted(shared, lora)
    if generator_sigma is not None:
        generator.start_from(generator_sigma)
    return generator, fake


def _checkpoint_gradients(*denoisers: Denoiser, shared: bool) -> None:
    if shared:
        raise ValueError(
            "gradient_checkpointing does not work with lora: the states would be computed again "
            "after the adapter has left the network. Use one of the two."
        )
    for denoiser in denoisers:
        network = network_of(denoiser).network
        enable: Any = getattr(
            getattr(network, "unet", network), "enable_gradient_checkpointing", None
        )
        if enable is None:
            raise ValueError(
                f"A {type(network).__name__} cannot compute its states again: set "
                "gradient_checkpointing to false."
            )
        enable()


def _noise_of(batch: Batch) -> Tensor:
    if "noise" not in batch:
        raise ValueError(
            "The regression needs noise-image pairs, but the batches hold images only: use "
            "PairsDataModule with a folder of pairs (lit-distill predict --config "
            "configs/digits/pairs.yaml), or set regression_weight to 0."
        )
    return batch["noise"]
