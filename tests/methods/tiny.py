"""Tiny networks, data and runs of every method, and callbacks that a run's YAML may name."""

import lit_distill  # noqa: F401  # isort: skip  # before lightning: see lit_distill/_torchvision_ops.py

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_distill.datamodules import DigitsDataModule
from lit_distill.diffusion import EDMDenoiser, EpsilonDenoiser, FlowDenoiser, seeded_noise
from lit_distill.methods import (
    DMD,
    DMD2,
    SFD,
    AdversarialDistillation,
    ConsistencyDistillation,
    ConsistencyTraining,
    ConsistencyTrajectory,
    DiffusionTeacher,
    DistillationModule,
    FlowDistillation,
    KnowledgeDistillation,
    LatentConsistencyDistillation,
    MeanFlow,
    MultiBoundaryConsistencyDistillation,
    ProgressiveDistillation,
    RectifiedFlow,
    Reflow,
    SiD,
    TrajectoryDistillation,
)
from lit_distill.models import LoRA, UNet

NETWORK = {
    "image_size": 8,
    "channels": 1,
    "num_classes": 10,
    "block_out_channels": [8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def denoiser(seed: int = 0, **network: Any) -> EDMDenoiser:
    """A network of one level and some 10 thousand weights, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EDMDenoiser(UNet(**{**NETWORK, **network}), sigma_data=0.75)


def flow(seed: int = 0, **network: Any) -> FlowDenoiser:
    """The same network, taken for a flow's."""
    return FlowDenoiser(denoiser(seed, **network).network)


def epsilon(seed: int = 0, **network: Any) -> EpsilonDenoiser:
    """A network of two levels, with what halves and doubles images, taken for a DDPM's."""
    return EpsilonDenoiser(denoiser(seed, **{"block_out_channels": [8, 8], **network}).network)


class Digits(DigitsDataModule):
    """Real digits that pass for a teacher's images of some noise."""

    def __init__(self, batch_size: int = 16, **options: Any) -> None:
        super().__init__(batch_size=batch_size, **options)

    def on_before_batch_transfer(self, batch: dict[str, Tensor], _: int) -> dict[str, Tensor]:
        count = len(batch["image"])
        noise = seeded_noise(self.image_shape, range(count))
        return {"index": torch.arange(count), "noise": noise, **batch}


def adam(parameters: Any) -> torch.optim.Optimizer:
    """A learning rate that moves a tiny network within a few steps."""
    return torch.optim.Adam(parameters, lr=1e-2)


def teacher_module(**options: Any) -> DiffusionTeacher:
    return DiffusionTeacher(denoiser(), **{"optimizer": adam, "steps": 2, **options})


def dmd_module(**options: Any) -> DMD:
    return DMD(denoiser(), **{"distance": "l2", "optimizer": adam, **options})


KD_ONLINE = {"online": True, "teacher_steps": 2}
PD = {"teacher_steps": 8, "steps": 2, "updates": [3, 60]}
PD_AT_LENGTH = {"teacher_steps": 4, "steps": 1, "updates": [12, 13]}
TD = {"steps": 2, "teacher_substeps": 2}
SFD_2 = {"steps": 2, "teacher_substeps": 2}
SFD_V = {"steps": [3, 2], "teacher_substeps": 2}
CD = {"num_nodes": 6}
CTM = {"num_nodes": 6, "max_teacher_steps": 2, "steps": [1, 2]}
ALTERNATING = "ddp_find_unused_parameters_true"
# Large enough weights that a few steps of them move a tiny network.
JUDGED = {"adversarial_weight": 1.0, "discriminator_weight": 1.0}
DMD2_MORE = {**JUDGED, "features": "teacher", "divergence": "jensen_shannon", "r1_weight": 1.0}
ADD = {"distillation_weight": 1.0, "steps": 2, "adversarial_loss": "softplus"}
NETWORK_YAML = {"network": {"class_path": "lit_distill.models.UNet", "init_args": NETWORK}}
FLOW_YAML = {"class_path": "lit_distill.diffusion.FlowDenoiser", "init_args": NETWORK_YAML}


START: dict[type[DistillationModule], Callable[[], Any]] = {
    RectifiedFlow: flow,
    FlowDistillation: flow,
    LatentConsistencyDistillation: epsilon,
}
WITHOUT_DISTANCE = (ProgressiveDistillation, RectifiedFlow, Reflow, MeanFlow)


def module(kind: type[DistillationModule], **options: Any) -> DistillationModule:
    """A method around a tiny network."""
    plain = {"distance": "l2"} if kind not in WITHOUT_DISTANCE else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)  # what a student takes beside its teacher's weights starts at random
        start = START.get(kind, denoiser)()
        return kind(start, **{**plain, "optimizer": adam, **options})


@dataclass(frozen=True)
class Row:
    """A method in the table of the invariants.

    Attributes:
        make: Builds it around a tiny network; takes any of its options.
        model: What a YAML file says of it, given the folder of a teacher.
        on_pairs: Whether it is trained on pairs, and not on the data.
        strategy: The strategy that it names for several processes.
        follows: Its submodules that change without an optimizer of their own, beside ``ema``.
        updates: Student updates of the first batches; of all further ones, the last of these.
        renewed: Student updates after which average, optimizer and schedule start anew.
        precise: Whether a part of its step runs in float32 whatever the precision.
        teacher: Name of the folder of its teacher.
    """

    make: Callable[..., DistillationModule]
    model: Callable[[Path], dict[str, Any]]
    on_pairs: bool = False
    strategy: str = "ddp"
    follows: tuple[str, ...] = ()
    updates: tuple[int, ...] = (1,)
    renewed: tuple[int, ...] = ()
    precise: bool = False
    teacher: str = "teacher"

    def after(self, limit: int) -> list[int]:
        """Student updates after each batch of a run with ``max_steps=limit``."""
        steps = [0]
        while steps[-1] < limit:
            batch = min(len(steps), len(self.updates)) - 1
            steps.append(steps[-1] + self.updates[batch])
        return steps[1:]

    def age(self, update: int) -> int:
        """Updates since the average, the optimizer and the schedule last started anew."""
        return update - max([0, *(end for end in self.renewed if end <= update)])


def _teacher_yaml(folder: Path) -> dict[str, Any]:
    network = {"class_path": "lit_distill.models.UNet", "init_args": NETWORK}
    return {
        "class_path": "lit_distill.methods.DiffusionTeacher",
        "init_args": {
            "denoiser": {
                "class_path": "lit_distill.diffusion.EDMDenoiser",
                "init_args": {"network": network},
            },
            "label_dropout": 0.1,
            **_training_yaml(),
        },
    }


def _dmd_yaml(folder: Path, **options: Any) -> dict[str, Any]:
    arguments = {"teacher": str(folder), "distance": "l2", **_training_yaml(), **options}
    return {"class_path": "lit_distill.methods.DMD", "init_args": arguments}


def _training_yaml() -> dict[str, Any]:
    warm_up = {"start_factor": 0.1, "total_iters": 20}
    return {
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}},
        "lr_scheduler": {
            "class_path": "torch.optim.lr_scheduler.LinearLR",
            "init_args": warm_up,
        },
    }


def _yaml(folder: Path, kind: type[DistillationModule], **options: Any) -> dict[str, Any]:
    start = "denoiser" if kind in (ConsistencyTraining, RectifiedFlow) else "teacher"
    plain = {"distance": "l2"} if kind not in WITHOUT_DISTANCE else {}
    training = _training_yaml()
    if kind is ProgressiveDistillation:
        del training["lr_scheduler"]  # it has its own
    if kind is RectifiedFlow:
        options = {**options, "denoiser": FLOW_YAML}
    if kind is FlowDistillation:
        options = {**options, "student": FLOW_YAML}
    arguments = {start: str(folder), **plain, **training, **options}
    return {"class_path": f"lit_distill.methods.{kind.__name__}", "init_args": arguments}


def _row(
    kind: type[DistillationModule],
    options: dict[str, Any] | None = None,
    long: dict[str, Any] | None = None,
    **row: Any,
) -> Row:
    """A method with the same options in code and YAML, where ``long`` has no others for YAML."""
    options = options or {}
    return Row(
        partial(module, kind, **options), partial(_yaml, kind=kind, **(long or options)), **row
    )


METHODS = {
    "teacher": Row(teacher_module, _teacher_yaml),
    "dmd": Row(dmd_module, _dmd_yaml, on_pairs=True, strategy=ALTERNATING),
    "dmd_ratio_3": Row(
        partial(dmd_module, update_ratio=3),
        partial(_dmd_yaml, update_ratio=3),
        on_pairs=True,
        strategy=ALTERNATING,
    ),
    "kd": _row(KnowledgeDistillation, on_pairs=True),
    "kd_online": _row(KnowledgeDistillation, KD_ONLINE),
    "pd": _row(ProgressiveDistillation, PD, PD_AT_LENGTH, follows=("previous",), renewed=(3,)),
    "td": _row(TrajectoryDistillation, TD),
    "sfd": _row(SFD, SFD_2, updates=(2,)),
    # As its own seed has it draw.
    "sfd_v": _row(SFD, SFD_V, updates=(2, 2, 2, 2, 3, 2, 3, 2, 3)),
    "cd": _row(ConsistencyDistillation, CD),
    "cd_ema": _row(ConsistencyDistillation, {**CD, "target": "ema"}, follows=("average",)),
    "ct": _row(ConsistencyTraining, {"stage_updates": 3}),
    "multi_boundary": _row(MultiBoundaryConsistencyDistillation, {**CD, "boundaries": 2}),
    "lcm": _row(
        LatentConsistencyDistillation,
        {"target": "ema"},
        follows=("average",),
        teacher="epsilon",
    ),
    "lcm_lora": Row(
        partial(module, LatentConsistencyDistillation, lora=LoRA(rank=2)),
        partial(_yaml, kind=LatentConsistencyDistillation, lora={"rank": 2}),
        teacher="epsilon",
    ),
    "ctm": _row(ConsistencyTrajectory, CTM, follows=("average",)),
    "rectified_flow": _row(RectifiedFlow),
    "reflow": _row(Reflow, on_pairs=True),
    "flow_distillation": _row(FlowDistillation, on_pairs=True),
    "mean_flow": _row(MeanFlow, precise=True),
    "mean_flow_differences": _row(MeanFlow, {"derivative": "finite_difference"}, precise=True),
    "dmd2": _row(
        DMD2, {**JUDGED, "update_ratio": 3}, strategy=ALTERNATING, follows=("discriminator",)
    ),
    "dmd2_2_steps": _row(
        DMD2,
        {**DMD2_MORE, "steps": 2, "update_ratio": 2},
        strategy=ALTERNATING,
        follows=("discriminator",),
    ),
    "dmd2_told_steps": _row(
        DMD2,
        {**JUDGED, "steps": 2, "fake_score_knows_step": True, "update_ratio": 2},
        strategy=ALTERNATING,
        follows=("discriminator",),
    ),
    "dmd_lora": Row(
        partial(module, DMD, lora=LoRA(rank=2)),
        partial(_dmd_yaml, lora={"rank": 2}),
        on_pairs=True,
        strategy=ALTERNATING,
    ),
    "sid": _row(SiD, strategy=ALTERNATING),
    "adversarial": _row(AdversarialDistillation, strategy=ALTERNATING),
    "adversarial_2_steps": _row(AdversarialDistillation, ADD, strategy=ALTERNATING),
}
"""Add one row a method: the tests of invariants, checkpoints and resuming go through them all."""

VARIANTS = (
    *("dmd_ratio_3", "kd_online", "sfd_v", "cd_ema", "mean_flow_differences"),
    *("dmd2_2_steps", "dmd2_told_steps", "adversarial_2_steps"),
)
"""Second settings of a method that has a row of its own: left to `make test-ci`."""

every_method = pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=name, marks=[pytest.mark.ci] if name in VARIANTS else [])
        for name, row in METHODS.items()
    ],
)
"""Runs a test with the row of each method."""


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """A quiet trainer on the CPU that writes nothing by itself."""
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "devices": 1,
    }
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        **{**quiet, **options},
    )


def write_config(path: Path, root: Path, row: Row, world: Path, **options: Any) -> Path:
    """The YAML file of a run in ``root``, with 11 batches an epoch.

    Args:
        path: Where to write it.
        root: The run folder.
        row: One of :data:`METHODS`.
        world: Folder with ``teacher/``, ``epsilon/`` and ``pairs/``.
        options: Of the trainer.
    """
    digits = "lit_distill.datamodules.DigitsDataModule"
    data = {"class_path": digits, "init_args": {"batch_size": 100}}
    if row.on_pairs:
        pairs = {"folder": str(world / "pairs"), "data": digits, "batch_size": 8}
        data = {"class_path": "lit_distill.datamodules.PairsDataModule", "init_args": pairs}
    run = {
        "default_root_dir": str(root),
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    config = {"trainer": {**run, **options}, "model": row.model(world / row.teacher), "data": data}
    path.write_text(yaml.safe_dump(config))
    return path


class KillAt(Callback):
    """Ends the process as a power cut would, after some step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class SaveEachRank(Callback):
    """Writes what each process ends with to ``rank<i>.pt``, and what it drew to another file."""

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        self._draw = {"image": batch["image"], "random": torch.rand(8)}

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        path = Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({k: v.clone() for k, v in module.state_dict().items()}, path)
        torch.save(self._draw, path.with_name(f"{path.stem}-draw.pt"))


class Disturb(Callback):
    """Draws random numbers and asks for samples after each step, as pictures in training do."""

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        torch.randn(5)
        modes = {part: part.training for part in module.modules()}
        module.eval()
        module.preview(batch["noise"][:4], batch["label"][:4])
        for part, training in modes.items():
            part.training = training
