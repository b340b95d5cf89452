"""The base of all methods: one trained network with automatic optimization.

It owns what is the same for every method: the frozen teacher, the average of the student's
weights, random state, checkpoints, sampling and the count of what was spent. A method's file owns
its loss. Several networks in turn: :mod:`lit_distill.methods.alternating`.
"""

import copy
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lit_distill.diffusion import (
    Condition,
    Denoiser,
    EvaluationCounter,
    FewSteps,
    Generators,
    NetworkDenoiser,
    check_solver,
    like,
    sample,
)
from lit_distill.models import load_denoiser

Batch = dict[str, Tensor]
"""``image`` (B, C, H, W) in [-1, 1], or latents (B, c, h, w) of unit variance; and where there are
any: ``label`` or ``prompt_embeds``, ``noise``, ``index``."""

# How often a run looks whether its losses are finite: a look makes a GPU wait.
_CHECK_EVERY = 20


def as_denoiser(source: str | Denoiser) -> Denoiser:
    """A denoiser itself, or the one in a folder or on the hub."""
    return source if isinstance(source, Denoiser) else load_denoiser(source)


def condition_of(batch: Batch) -> Condition:
    """What a batch's images are conditional on."""
    if "prompt_embeds" in batch:
        return {"prompt_embeds": batch["prompt_embeds"]}
    return batch.get("label")


class DistillationModule(LightningModule):
    """One trained network, automatic optimization.

    Subclasses implement ``training_step``. Concrete classes call ``self.save_hyperparameters()``
    in their constructor, so that a checkpoint can rebuild them.

    Args:
        student: The network in training.
        teacher: The frozen model it learns from, if there is one.
        optimizer: Makes the student's optimizer from its parameters.
        lr_scheduler: Makes its learning-rate schedule, stepped once a student update.
        ema_decay: Decay of the average of the student's weights that is sampled and exported.
            It warms up as ``(1 + n) / (10 + n)`` after ``n`` updates.
        ema_warmup: Whether it warms up. Without, the average starts as the given student and
            leaves it slowly: after ``n`` updates that student is still ``ema_decay ** n`` of it,
            which holds on to what an already trained student is good at.
        steps: Steps of a sampling run where none are asked for.
        solver: Solver of a sampling run, see :func:`lit_distill.diffusion.sample`; by default a
            student's own way.
        compile: Compile the networks with ``torch.compile``, see :meth:`compiled_modules`.
        channels_last: Keep weights in the channels-last layout (faster convolutions on GPUs).
        ema_device: Device that the average is kept on, for example ``cpu`` to leave a GPU's memory
            to the training, for a copy of the weights each update; by default the student's.
        further_ema_decays: Decays of further averages, to find out which length is best: each is
            measured in validation, kept in checkpoints and exported beside the first.

    Attributes:
        ema: The averaged student, ``ema.module``.
        teacher_evaluations: Teacher evaluations that training spent, times batch rows, over all
            processes and restarts; up to date in checkpoints and after a fit. Those of previews
            and evaluations are left out.
        train_seconds: Wall-clock seconds spent in training steps and the callbacks after them,
            over restarts.
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser | None = None,
        *,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        ema_decay: float = 0.999,
        ema_warmup: bool = True,
        steps: int = 1,
        solver: str | None = None,
        compile: bool = False,
        channels_last: bool = False,
        ema_device: str | None = None,
        further_ema_decays: Sequence[float] = (),
    ) -> None:
        if solver is not None:
            check_solver(solver)  # not first when the training is over
        super().__init__()
        self.student = student
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False)
        self.ema_decay, self.ema_warmup = ema_decay, ema_warmup
        self.ema = _average_of(student, ema_decay, ema_warmup, ema_device)
        self.further_averages = nn.ModuleDict(
            {_key(d): _average_of(student, d, ema_warmup, ema_device) for d in further_ema_decays}
        )
        self.further_ema_decays = tuple(further_ema_decays)
        if ema_device is not None:  # DDP has no part in them, and refuses weights on two devices
            named = [*self.named_parameters(), *self.named_buffers()]
            averaged = [name for name, _ in named if name.startswith(("ema.", "further_averages."))]
            self._ddp_params_and_buffers_to_ignore = averaged
        self._sampled = 0  # which of the averages
        self._near_average: tuple[AveragedModel, int, Denoiser] | None = None
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.steps, self.solver = steps, solver
        self.compile_networks, self.channels_last = compile, channels_last
        self.teacher_evaluations, self.train_seconds = 0, 0.0
        self._losses: list[Tensor] = []
        self._counter: EvaluationCounter | None = None
        self.train()

    # --- What a method may use ------------------------------------------------------------------

    @property
    def network(self) -> Denoiser:
        """The model that is sampled and exported: the student with averaged weights."""
        sampled = self.averages[self._sampled]
        average = cast(Denoiser, sampled.module)
        if not isinstance(sampled, _AverageElsewhere) or sampled.device == self.device:
            return average
        count, near = int(sampled.n_averaged), self._near_average
        if near is None or near[0] is not sampled or near[1] != count:
            near = sampled, count, copy.deepcopy(average).to(self.device)
            self._near_average = near
        return near[2]

    @property
    def averages(self) -> list[AveragedModel]:
        """All averages of the student's weights, the one that is sampled first."""
        return [self.ema, *cast(list[AveragedModel], self.further_averages.values())]

    def sample_by(self, few_steps: FewSteps) -> None:
        """Set how the student is sampled, and all averages of its weights."""
        self._near_average = None  # a copy
        for model in (self.student, *(cast(Denoiser, a.module) for a in self.averages)):
            model.few_steps = few_steps

    @contextmanager
    def sampled_with(self, decay: float) -> Iterator[None]:
        """Sample and export with one of the further averages for a while."""
        self._sampled = 1 + self.further_ema_decays.index(decay)
        try:
            yield
        finally:
            self._sampled = 0

    @torch.no_grad()
    def generate(
        self,
        noise: Tensor,
        condition: Condition = None,
        steps: int | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Make samples with the averaged weights.

        Args:
            noise: ``(B, *shape)``, unit noise, see :func:`lit_distill.diffusion.seeded_noise`.
            condition: Labels ``(B,)`` or named tensors.
            steps: Number of steps; the module's own by default.
            generator: Source of the noise that some students add between steps; a list has one
                for each sample.

        Returns:
            ``(B, *shape)`` in about [-1, 1].
        """
        return sample(
            self.network,
            noise,
            steps=self.steps if steps is None else steps,
            solver=self.solver,
            condition=condition,
            generator=generator,
        )

    def preview(self, noise: Tensor, condition: Condition = None) -> dict[str, Tensor]:
        """Rows of images that show how training stands, by name; always from the same noise."""
        return {"student": self.generate(noise, condition, generator=always_the_same(noise))}

    def sampling_record(self) -> dict[str, Any]:
        """How ``generate`` samples: what a set of stored pairs says about its origin."""
        precision, few = str(self.trainer.precision), self.network.few_steps
        with EvaluationCounter(self.network) as counter:
            shape = self.network.image_shape or ()
            zeros = torch.zeros((1, *shape), device=self.device)
            self.generate(zeros, self.network.some_condition(1, self.device))
        return {
            "teacher": self.network.fingerprint(),
            "solver": self.solver or "heun" if few is None else self.solver or "few_step",
            "steps": self.steps,
            "nfe": counter.calls,
            "sigma_min": self.network.sigma_min,
            "sigma_max": self.network.sigma_max,
            "dtype": precision.replace("32-true", "float32"),
            "deterministic": few is None or few.gamma == 0 or self.solver is not None,
        }

    @property
    def data_free(self) -> bool:
        """Whether training looks at a batch's conditions and the shape of its images only."""
        return False

    def milestone(self) -> str | None:
        """Name of a folder that the averaged weights of this moment are exported to, if any.

        Asked after each batch; the weights of the end are exported anyway.
        """
        return None

    def drawn_for_all(self, count: int) -> int:
        """Draw a number below ``count`` for this step, alike in all processes."""
        return int(self._seeds(0).integers(count))

    def trained_modules(self) -> list["Trained"]:
        """What is trained, the student first."""
        return [Trained("student", self.student, self.optimizer, self.lr_scheduler)]

    def compiled_modules(self) -> list[nn.Module]:
        """What the option ``compile`` compiles."""
        return [*(t.module for t in self.trained_modules()), *self.teachers()]

    def teachers(self) -> list[Denoiser]:
        """Whose evaluations in training count as the teacher's."""
        return [] if self.teacher is None else [self.teacher]

    def frozen_modules(self) -> tuple[str, ...]:
        """Names of submodules that never change and are therefore left out of checkpoints."""
        return ("teacher",)

    def watch(self, loss: Tensor) -> None:
        """Remember a loss, so that training stops with a sentence once one is not finite.

        Raises:
            FloatingPointError: Every so many steps, if one of the losses since was NaN or infinite.
        """
        self._losses.append(loss.detach())
        if len(self._losses) >= _CHECK_EVERY:
            self._check_losses()

    def student_stepped(self) -> None:
        """Follow a student update: the average of its weights moves with it, and only then."""
        for average in self.averages:
            average.update_parameters(self.student)

    def restart_averages(self) -> None:
        """Begin all averages anew, at the student's weights of this moment."""
        for average in self.averages:
            average.module.load_state_dict(self.student.state_dict())
            average.n_averaged.fill_(_first(self.ema_warmup))

    # --- Lightning's hooks ----------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the data against the teacher, and prepare the networks for speed."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and not self.data_free and not getattr(data, "has_images", True):
            raise ValueError(
                f"{type(self).__name__} learns from images, and {data} has captions only: give "
                "data with images, or a method that needs none (SFD, KnowledgeDistillation with "
                "online, DMD with regression_weight 0, DMD2 without its discriminator)."
            )
        if stage == "fit" and hasattr(data, "check_teacher"):
            if self.teacher is None:
                data.check_model(self.student)
            else:
                data.check_teacher(self.teacher)
        self.prepare_networks()

    def prepare_networks(self) -> None:
        """Lay the weights out and compile, as the options say."""
        if self.channels_last:
            self.to(memory_format=torch.channels_last)
        if self.compile_networks:
            for module in self.compiled_modules():
                module.compile()

    def configure_optimizers(self) -> Any:
        """One optimizer for each trained network; schedules count student updates."""
        optimizers, schedulers = [], []
        for trained in self.trained_modules():
            optimizer = trained.optimizer(trained.module.parameters())
            optimizers.append(optimizer)
            if trained.lr_scheduler is not None:
                scheduler = trained.lr_scheduler(optimizer)
                schedulers.append({"scheduler": scheduler, "interval": "step"})
        return optimizers, schedulers

    def train(self, mode: bool = True) -> "DistillationModule":
        """Set the mode of what is trained; teacher and average always stay in eval mode."""
        super().train(mode)
        for average in self.averages:
            average.eval()
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def on_fit_start(self) -> None:
        """Start to count the teacher's evaluations, in training mode: not those of callbacks."""
        if teachers := self.teachers():
            watched = cast(Denoiser, nn.ModuleList(teachers))  # it looks at modules only
            self._counter = EvaluationCounter(watched, when=lambda: self.training)
            self._counter.__enter__()

    def on_fit_end(self) -> None:
        """Stop counting."""
        if self._counter is not None:
            self._counted()
            self._counter.__exit__(None, None, None)
            self._counter = None

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the step by (seed, step, rank), so that a resumed run draws what it would have."""
        torch.manual_seed(int(self._seeds(1 + self.global_rank).integers(2**63)))
        self._near_average = None  # its memory is the training's now
        self._step_began = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Keep the books."""
        self.train_seconds += time.perf_counter() - self._step_began

    def on_train_epoch_end(self) -> None:
        """Look at the last losses before the run's end is written anywhere."""
        self._check_losses()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the student (automatic optimization); its average follows."""
        super().optimizer_step(*args, **kwargs)
        self.student_stepped()

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Samples for a batch of ``index``, ``noise`` and maybe ``label``."""
        return {**batch, "image": self.generate(batch["noise"], condition_of(batch)).float()}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Nothing: samples are judged by a callback, which asks ``generate``."""

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Nothing: samples are judged by a callback, which asks ``generate``."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what never changes, and what is not plain; add the books.

        Raises:
            FloatingPointError: If a loss was not finite, or a weight is not: such weights never
                replace good ones.
        """
        self._check_losses()
        prefixes = tuple(f"{name}." for name in self.frozen_modules())
        state = checkpoint["state_dict"]
        state = {k: v for k, v in state.items() if not k.startswith(prefixes)}
        checkpoint["state_dict"] = state
        if not all(bool(weight.isfinite().all()) for weight in state.values()):
            self._stop("The weights are")  # a finite loss may have a gradient that is not
        if "hyper_parameters" in checkpoint:
            arguments = checkpoint["hyper_parameters"]
            checkpoint["hyper_parameters"] = {k: v for k, v in arguments.items() if _is_plain(v)}
        checkpoint["spent"] = {
            "teacher_evaluations": self._counted(),
            "train_seconds": self.train_seconds,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read the books."""
        spent = checkpoint.get("spent", {})
        self.teacher_evaluations = int(spent.get("teacher_evaluations", 0))
        self.train_seconds = float(spent.get("train_seconds", 0.0))

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load weights; only those of :meth:`frozen_modules` may be missing."""
        prefixes = tuple(f"{name}." for name in self.frozen_modules())
        own = {k: v for k, v in self.state_dict().items() if k.startswith(prefixes)}
        return super().load_state_dict({**own, **state_dict}, strict=strict, assign=assign)

    # --- Inside ---------------------------------------------------------------------------------

    def _seeds(self, stream: int) -> np.random.Generator:
        """Random numbers of this step that a resumed run draws again."""
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        return np.random.default_rng((int(os.environ.get("PL_GLOBAL_SEED", "0")), step, stream))

    def _counted(self) -> int:
        """All teacher evaluations so far, those of other processes included."""
        if self._counter is not None:
            self.teacher_evaluations += self._counter.samples * self.trainer.world_size
            self._counter.samples = 0
        return self.teacher_evaluations

    def _check_losses(self) -> None:
        losses, self._losses = self._losses, []
        if losses and not bool(torch.stack(losses).isfinite().all()):
            self._stop("The loss is")

    def _stop(self, what: str) -> NoReturn:
        raise FloatingPointError(
            f"{what} not finite near step {self.trainer.global_step}. Training stopped, and the "
            "checkpoints from before are kept. Lower the learning rate, clip gradients, or use "
            "precision 32-true or bf16-mixed instead of 16-mixed; then go on with --ckpt_path last."
        )


def always_the_same(noise: Tensor) -> torch.Generator:
    """The source of what is drawn between the steps of a preview."""
    return torch.Generator(noise.device).manual_seed(0)


def _key(decay: float) -> str:
    """Name of an average as a submodule."""
    return f"{decay:g}".replace(".", "_")


def _average_of(student: Denoiser, decay: float, warmup: bool, device: str | None) -> AveragedModel:
    """A frozen average of a student's weights."""
    move = partial(_move_average, decay, warmup)
    if device is None:
        average = AveragedModel(student, multi_avg_fn=move)
    else:
        average = _AverageElsewhere(student, device, multi_avg_fn=move)
    average.n_averaged.fill_(_first(warmup))
    return average.requires_grad_(False)


def _first(warmup: bool) -> int:
    """Where an average begins to count: at 0, the first update replaces what it starts as."""
    return 0 if warmup else 1


def _move_average(
    decay: float, warmup: bool, averaged: Any, current: Any, count: Tensor | int
) -> None:
    """Move an average by ``1 - decay`` towards the student."""
    if warmup:
        n = int(count)
        decay = min(decay, (1 + n) / (10 + n))
    torch._foreach_lerp_(list(averaged), list(current), 1 - decay)


class _AverageElsewhere(AveragedModel):
    """An average that stays on its device, whatever its module is moved to."""

    def __init__(self, model: nn.Module, device: str, **options: Any) -> None:
        super().__init__(model, torch.device(device), **options)
        self.device = torch.device(device)

    def _apply(self, fn: Any, recurse: bool = True) -> "_AverageElsewhere":
        return self


@dataclass
class Trained:
    """A network in training and how it is trained.

    Attributes:
        name: Its name in the module and in the log.
        module: The network's denoiser.
        optimizer: Makes its optimizer from its parameters.
        lr_scheduler: Makes its schedule, stepped once a *student* update.
        clip: Largest norm of its gradient, or None.
    """

    name: str
    module: nn.Module
    optimizer: OptimizerCallable
    lr_scheduler: LRSchedulerCallable | None = None
    clip: float | None = None


def _is_plain(value: Any) -> bool:
    """Whether a constructor argument is made of numbers, texts, lists and dicts only."""
    if isinstance(value, dict):
        return all(_is_plain(v) for v in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)


def copy_of(denoiser: Denoiser, generator_sigma: float | None = None) -> Denoiser:
    """A trainable copy of a frozen model, which may start to sample from another level."""
    new = copy.deepcopy(denoiser).requires_grad_(True)
    new.original = None
    if generator_sigma is not None:
        if denoiser.few_steps is not None and generator_sigma != denoiser.sigma_max:
            rank_zero_warn(
                f"generator_sigma={generator_sigma}: the model that the student starts as was "
                f"distilled to make its samples from sigma={denoiser.sigma_max:g}, and at another "
                "level it knows little. Set generator_sigma to null to go on from what it learned."
            )
        new.start_from(generator_sigma)
    return new


def student_of(
    teacher: Denoiser,
    start: str | Denoiser | None = None,
    generator_sigma: float | None = None,
) -> Denoiser:
    """A trainable student that starts as the teacher, or as another model.

    Args:
        teacher: The teacher.
        start: A denoiser of any size, or a folder or hub id of one; the teacher if None.
        generator_sigma: Noise level that it makes its samples from; its largest if None.
    """
    student = copy_of(teacher if start is None else as_denoiser(start), generator_sigma)
    student.few_steps = None  # the method will say how it is sampled
    return student


def network_of(denoiser: Denoiser) -> NetworkDenoiser:
    """The same model, known to have a network.

    Raises:
        ValueError: If it has none.
    """
    if not isinstance(denoiser, NetworkDenoiser):
        raise ValueError(
            f"A {type(denoiser).__name__} has no network that a student could start as: give the "
            "option student."
        )
    return denoiser


def round_weights(denoiser: Denoiser, precision: str) -> None:
    """Round a frozen model's weights to ``bfloat16``, in place; keep them for ``float32``.

    Raises:
        ValueError: If it is neither.
    """
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"teacher_precision={precision!r}: choose float32 or bfloat16.")
    if precision == "bfloat16":
        denoiser.original = denoiser.original or denoiser.fingerprint()
        denoiser.to(torch.bfloat16)


def noised(x0: Tensor, sigma: Tensor) -> Tensor:
    """Data ``(B, *shape)`` with fresh noise of the levels ``sigma`` (B,)."""
    return x0 + like(sigma, x0) * torch.randn_like(x0)
