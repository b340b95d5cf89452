"""Progressive distillation: halve the steps, again and again (Salimans & Ho 2022)."""

from bisect import bisect_left
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR

from lit_distill.diffusion import Denoiser, FewSteps, jump, like, placed
from lit_distill.methods.base import (
    Batch,
    DistillationModule,
    Trained,
    as_denoiser,
    condition_of,
    copy_of,
    noised,
    student_of,
)


class ProgressiveDistillation(DistillationModule):
    """Student of ``steps`` steps through stages that each halve their number.

    In a stage, the student's one jump from a node learns to land where two jumps of the stage's
    teacher do (Algorithm 2 of the paper). Then the student, with averaged weights, becomes the
    teacher, and the student and its average start from the same weights, with a new optimizer and
    learning-rate schedule. The stage follows from the number of updates, so that a run can be
    killed and resumed in any of them. The end of a stage exports ``stage-<steps>-steps``, and that
    of the last stops the training.

    The levels of ``teacher_steps`` steps are the teacher's own; those of ``n`` steps are every
    ``teacher_steps / n``-th of them.

    Data: any. Under DDP use ``strategy: ddp``.

    Reference recipe: Adam 5e-5 that falls linearly to 0 in each stage, 50k updates a stage and
    100k in the last two.

    Args:
        teacher: A denoiser, or a folder or hub id of one.
        teacher_steps: Steps of the first teacher: ``steps`` times a power of 2.
        steps: Steps of the last student.
        updates: Updates of each stage, or a list with one number for each.
        student: What the student starts from, where that is not the teacher.
        base: Arguments of :class:`DistillationModule`; the learning-rate schedule is made anew for
            each stage, and falls linearly to 0 by default.

    Attributes:
        previous: The teacher of all stages but the first: the last stage's student.

    Raises:
        ValueError: If the steps cannot be halved, or the stages and their updates differ in number.
    """

    def __init__(
        self,
        teacher: str | Denoiser,
        teacher_steps: int = 32,
        steps: int = 1,
        updates: int | list[int] = 50_000,
        student: str | Denoiser | None = None,
        **base: Any,
    ) -> None:
        counts = _halvings(teacher_steps, steps)
        lengths = [updates] * len(counts) if isinstance(updates, int) else list(updates)
        if len(lengths) != len(counts) or min(lengths) < 1:
            raise ValueError(
                f"updates={updates}: from teacher_steps={teacher_steps} to steps={steps} there are "
                f"{len(counts)} stages; give one positive number, or one for each of them."
            )
        frozen = as_denoiser(teacher)
        generator = student_of(frozen, student)
        super().__init__(generator, frozen, steps=steps, **base)
        self.save_hyperparameters(logger=False)
        self.counts, self.lengths, self.ends = counts, lengths, list(accumulate(lengths))
        self.levels = frozen.grid(teacher_steps)
        self.previous = copy_of(generator).requires_grad_(False)
        self.enter(0)
        self.train()

    def enter(self, stage: int) -> None:
        """Set what differs between stages, except for weights."""
        self.stage, self.steps = stage, self.counts[stage]
        grid = tuple(self.levels[:: (len(self.levels) - 1) // self.steps].tolist())
        self.sample_by(FewSteps(trained=(self.steps,), grids=(grid,)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Squared distance, in ``x0``, to the jump that lands where the teacher's two do."""
        x0, condition = batch["image"], condition_of(batch)
        stride = (len(self.levels) - 1) // self.steps
        levels = placed(self.levels, x0.device)
        node = stride * torch.randint(self.steps, (len(x0),), device=x0.device)
        start, middle, end = (levels[node + k] for k in (0, stride // 2, stride))
        x = noised(x0, start)
        target = self.two_jumps(x, start, middle, end, condition)
        error = (self.student(x, start, condition) - target).flatten(1).square().mean(1)
        weight = (start**-2).clamp_min(1).to(error.dtype)  # max(SNR, 1), Eq. 9
        loss = (weight * error).mean()
        self.watch(loss)
        self.log("loss/progressive", loss, prog_bar=True)
        self.log("stage/steps", float(self.steps))
        return loss

    @torch.no_grad()
    def two_jumps(
        self, x: Tensor, start: Tensor, middle: Tensor, end: Tensor, condition: Any
    ) -> Tensor:
        """The ``x0`` whose one jump from ``start`` lands where the teacher's two jumps do."""
        teacher = self.stage_teacher
        halfway = jump(x, teacher(x, start, condition), start, middle)
        there = jump(halfway, teacher(halfway, middle, condition), middle, end)
        return there - like(end / (start - end), x) * (x - there)

    @property
    def stage_teacher(self) -> Denoiser:
        """What this stage learns from."""
        assert self.teacher is not None
        return self.teacher if self.stage == 0 else self.previous

    def setup(self, stage: str) -> None:
        """As the base; and no checkpoint is chosen among students of different numbers of steps.

        Raises:
            ValueError: If a checkpoint callback watches a metric.
        """
        super().setup(stage)
        watched = [getattr(c, "monitor", None) for c in self.trainer.checkpoint_callbacks]
        if stage == "fit" and (metrics := [metric for metric in watched if metric]):
            raise ValueError(
                f"ProgressiveDistillation cannot choose its best weights by {metrics[0]}: a "
                "student of an early stage has more steps and would win. Leave monitor out of the "
                "callbacks; the end of each stage is exported in any case."
            )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Begin the next stage once this one has had its updates."""
        super().on_train_batch_start(batch, batch_idx)
        last = len(self.ends) - 1
        while self.stage < last and self.trainer.global_step >= self.ends[self.stage]:
            self.promote()

    def promote(self) -> None:
        """The averaged student becomes the teacher, and training starts again from it."""
        weights = self.network.state_dict()
        self.previous.load_state_dict(weights)
        self.student.load_state_dict(weights)
        self.restart_averages()
        self.enter(self.stage + 1)
        self.trainer.strategy.setup_optimizers(self.trainer)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Stop after the last stage."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.trainer.global_step >= self.ends[-1]:
            self.trainer.should_stop = True

    def milestone(self) -> str | None:
        """The end of each stage."""
        ended = self.trainer.global_step == self.ends[self.stage]
        return f"stage-{self.steps}-steps" if ended else None

    def trained_modules(self) -> list[Trained]:
        """The student, by default with a learning rate that falls to 0 within the stage."""
        fall = partial(
            LinearLR, start_factor=1.0, end_factor=0.0, total_iters=self.lengths[self.stage]
        )
        return [Trained("student", self.student, self.optimizer, self.lr_scheduler or fall)]

    def teachers(self) -> list[Denoiser]:
        """The teachers of all stages."""
        return [*super().teachers(), self.previous]

    def frozen_modules(self) -> tuple[str, ...]:
        """The teacher, and its copy in the first stage, which has no other."""
        return ("teacher", "previous") if self.stage == 0 else ("teacher",)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go back to the checkpoint's stage, before its optimizer is restored."""
        super().on_load_checkpoint(checkpoint)
        stage = bisect_left(self.ends, checkpoint["global_step"])
        self.enter(min(stage, len(self.ends) - 1))

    def train(self, mode: bool = True) -> "ProgressiveDistillation":
        """The teacher of later stages stays in eval mode as well."""
        super().train(mode)
        if hasattr(self, "previous"):
            self.previous.eval()
        return self


def _halvings(teacher_steps: int, steps: int) -> list[int]:
    """Steps of each stage's student."""
    counts = []
    remaining = teacher_steps
    while remaining > steps >= 1 and remaining % 2 == 0:
        remaining //= 2
        counts.append(remaining)
    if not counts or remaining != steps:
        raise ValueError(
            f"teacher_steps={teacher_steps} cannot be halved down to steps={steps}: take "
            "teacher_steps = steps times 2, 4, 8, ..."
        )
    return counts
