"""Multi-boundary (multistep) consistency distillation."""

from typing import Any

import torch

from lit_distill.diffusion import Denoiser, FewSteps
from lit_distill.losses import Distance
from lit_distill.methods.consistency import ConsistencyDistillation, Target


class MultiBoundaryConsistencyDistillation(ConsistencyDistillation):
    """Consistency distillation with ``K`` boundaries and deterministic ``K``-step sampling.

    The student's jump goes to the largest boundary below its level instead of to 0, so that it
    crosses one segment of the ODE only (Heek et al. 2024, Algorithm 1; Starodubcev et al. 2024).
    With one boundary it is :class:`ConsistencyDistillation`, draw for draw.

    Data: any. Under DDP use ``strategy: ddp``.

    Args:
        teacher: As for :class:`ConsistencyDistillation`.
        boundaries: Their number, for boundaries spread evenly over the nodes, or a descending list
            of nodes of the grid that ends at 0, for example ``[2.5, 0.0]``.
        num_nodes: Nodes of the grid.
        distance: As for :class:`ConsistencyDistillation`.
        target: Likewise.
        target_decay: Likewise.
        teacher_solver: Likewise.
        student: Likewise.
        guidance: Likewise.
        base: Arguments of :class:`DistillationModule`.

    Raises:
        ValueError: If the boundaries are no descending nodes of the grid, or another setting is
            impossible.
    """

    def __init__(
        self,
        teacher: str | Denoiser,
        boundaries: int | list[float] = 4,
        num_nodes: int = 18,
        distance: str | Distance = "lpips",
        target: Target = "stop_gradient",
        target_decay: float = 0.95,
        teacher_solver: str = "heun",
        student: str | Denoiser | None = None,
        guidance: float = 1.0,
        **base: Any,
    ) -> None:
        super().__init__(
            teacher,
            num_nodes,
            distance,
            target,
            target_decay,
            teacher_solver,
            student,
            guidance,
            **base,
        )
        self.save_hyperparameters(logger=False)
        levels = _levels(boundaries, self.nodes.tolist())
        below = [max(b for b in levels if b < node) for node in self.nodes[:-1].tolist()]
        self.ends = torch.tensor(below, dtype=torch.float64)
        grid = (float(self.nodes[0]), *levels)
        self.sample_by(FewSteps(trained=(len(levels),), grids=(grid,), only=True))
        self.steps = len(levels)


def _levels(boundaries: int | list[float], nodes: list[float]) -> list[float]:
    """The boundaries from above, each one exactly a node, and 0."""
    known = ", ".join(f"{node:.4g}" for node in nodes[1:-1])
    if isinstance(boundaries, int):
        if not 1 <= boundaries < len(nodes):
            raise ValueError(
                f"boundaries={boundaries}: a grid of {len(nodes)} nodes has room for 1 to "
                f"{len(nodes) - 1} (option num_nodes)."
            )
        chosen = (round(i * (len(nodes) - 1) / boundaries) for i in range(1, boundaries))
        return [*(nodes[i] for i in chosen), 0.0]
    if not boundaries or boundaries[-1] != 0 or sorted(boundaries, reverse=True) != boundaries:
        raise ValueError(f"boundaries={boundaries} must descend and end at 0.")
    if len(set(boundaries)) < len(boundaries):
        raise ValueError(f"boundaries={boundaries} has a level twice.")
    found = []
    for level in boundaries[:-1]:
        if not nodes[-1] < level < nodes[0]:
            raise ValueError(
                f"The boundary {level} is outside the noise levels between {nodes[-1]:g} and "
                f"{nodes[0]:g}."
            )
        node = min(nodes, key=lambda n: abs(n - level))
        if abs(node - level) > 1e-2 * level:
            raise ValueError(
                f"The boundary {level} is no node of the grid; its nodes are {known} (option "
                "num_nodes)."
            )
        found.append(node)
    return [*found, 0.0]
