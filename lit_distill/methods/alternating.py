"""The base of methods with several trained networks, each with its own optimizer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from lightning.pytorch.core.optimizer import LightningOptimizer, do_nothing_closure
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lit_distill.diffusion import Denoiser
from lit_distill.methods.base import Batch, DistillationModule

Part = TypeVar("Part")


class AlternatingDistillationModule(DistillationModule):
    """Several trained networks, each with its own optimizer, stepped in turn.

    A batch is one student update and as many of the others as the method wants, so that batches,
    ``global_step``, ``max_steps``, checkpoints and the log all count student updates.

    Under DDP use ``strategy: ddp_find_unused_parameters_true``: each backward pass reaches one of
    the networks only.

    Args:
        student: The network in training.
        teacher: The frozen model.
        accumulate: Micro-batches that a batch is split into, whose gradients add up to one update.
        base: Arguments of :class:`DistillationModule`.
    """

    def __init__(
        self, student: Denoiser, teacher: Denoiser, *, accumulate: int = 1, **base: Any
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"accumulate={accumulate}: a batch has at least 1 part.")
        super().__init__(student, teacher, **base)
        self.automatic_optimization = False
        self.accumulate = accumulate

    def setup(self, stage: str) -> None:
        """Refuse float16, whose scaled gradients could not be clipped; prepare as the base does.

        Raises:
            ValueError: If the trainer's precision is a float16 one, or its strategy expects every
                backward pass to reach all networks.
        """
        if stage == "fit" and str(self.trainer.precision).startswith("16"):
            raise ValueError(
                f"precision={self.trainer.precision} does not work with several optimizers: use "
                "bf16-mixed or 32-true (option trainer.precision)."
            )
        if stage == "fit" and len(self.trained_modules()) > 1:
            self._check_strategy()
        super().setup(stage)

    def _check_strategy(self) -> None:
        strategy = self.trainer.strategy
        if self.trainer.world_size == 1 or not isinstance(strategy, DDPStrategy):
            return
        options = strategy._ddp_kwargs
        if not options.get("find_unused_parameters") and not options.get("static_graph"):
            names = " and ".join(trained.name for trained in self.trained_modules())
            raise ValueError(
                f"{type(self).__name__} trains {names} in turn, so that a backward pass reaches "
                "one of them only, for which DDP has to look: set strategy to "
                "ddp_find_unused_parameters_true (option trainer.strategy)."
            )

    def split(self, batch: Batch) -> list[Batch]:
        """Cut a batch into ``accumulate`` micro-batches.

        Raises:
            ValueError: If the batch does not divide.
        """
        size = len(batch["image"])
        part = size // self.accumulate
        if size % self.accumulate:
            raise ValueError(
                f"A batch of {size} does not divide into accumulate={self.accumulate} parts."
            )
        return [{k: v[i : i + part] for k, v in batch.items()} for i in range(0, size, part)]

    def update(self, name: str, loss: Callable[[Part], Tensor], parts: Sequence[Part]) -> None:
        """Step one of the trained networks.

        Args:
            name: Which, see :meth:`trained_modules`.
            loss: The loss of a part, a scalar.
            parts: Micro-batches; the update's gradient is the mean of theirs.
        """
        index, trained = next(
            (i, t) for i, t in enumerate(self.trained_modules()) if t.name == name
        )
        optimizers = self.optimizers()
        optimizer = optimizers[index] if isinstance(optimizers, list) else optimizers
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        for part in parts:
            value = loss(part)
            self.watch(value)
            self.manual_backward(value / len(parts))
        gradients = [p.grad for p in trained.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self.log(f"grad_norm/{name}", norm)
        if trained.clip is not None:
            nn.utils.clip_grads_with_norm_(trained.module.parameters(), trained.clip, norm)
        if index > 0:
            _step_uncounted(optimizer)
            return
        optimizer.step()
        self.student_stepped()

    def step_schedules(self) -> None:
        """Go on in all learning-rate schedules, once a student update and after it.

        Not beyond ``max_steps``, which the last batch of a method with several updates a batch may
        pass: some schedules refuse to.
        """
        if 0 <= self.trainer.max_steps < self.trainer.global_step:
            return
        schedulers = self.lr_schedulers()
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            if scheduler is not None:
                scheduler.step()


@contextmanager
def untrained(*modules: nn.Module) -> Iterator[None]:
    """Let gradients pass through modules and not into their weights, for what runs forward here."""
    weights = [p for module in modules for p in module.parameters() if p.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def _step_uncounted(optimizer: LightningOptimizer) -> None:
    """Step an optimizer without a count in ``global_step``, which means student updates.

    Lightning counts every step of every optimizer through these two hooks, and sets them anew for
    each batch.
    """
    hooks = optimizer._on_before_step, optimizer._on_after_step
    optimizer._on_before_step = optimizer._on_after_step = do_nothing_closure
    try:
        optimizer.step()
    finally:
        optimizer._on_before_step, optimizer._on_after_step = hooks
