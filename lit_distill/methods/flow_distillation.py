"""One-step distillation of a flow: the last stage of InstaFlow (Liu et al. 2024)."""

from typing import Any

from lit_distill.diffusion import Denoiser, FlowDenoiser
from lit_distill.losses import Distance
from lit_distill.methods.base import as_denoiser
from lit_distill.methods.knowledge import KnowledgeDistillation


class FlowDistillation(KnowledgeDistillation):
    """One-step generator from a flow that reflow has straightened.

    ``distance(noise - u(noise, 1), ODE(noise))`` on stored pairs (Liu et al. 2023, Sec. 3; Liu et
    al. 2024): :class:`KnowledgeDistillation` whose student starts as a flow, near to the
    answer where its trajectories are nearly straight.

    Data: :class:`~lit_distill.datamodules.PairsDataModule`, with pairs of the teacher: those that
    the flow was reflowed on serve if their model is the teacher and the flow the student. Under
    DDP use ``strategy: ddp``.

    Args:
        teacher: The model that made the pairs, or a folder or hub id of it.
        distance: ``lpips``, ``l2``, ``l1``, ``pseudo_huber``, or an object.
        student: The flow to start from; the teacher by default.
        base: Arguments of :class:`KnowledgeDistillation`.

    Raises:
        ValueError: If the student is no flow.
    """

    def __init__(
        self,
        teacher: str | Denoiser,
        distance: str | Distance = "lpips",
        student: str | Denoiser | None = None,
        **base: Any,
    ) -> None:
        start = as_denoiser(teacher if student is None else student)
        if not isinstance(start, FlowDenoiser):
            raise ValueError(
                f"Flow distillation starts from a {type(start).__name__}, which is no flow: give "
                "the folder of a reflowed one as the option student, or use KnowledgeDistillation."
            )
        super().__init__(teacher, distance, student=start, **base)
        self.save_hyperparameters(logger=False)
