"""Writes what a run cost beside what it made."""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

COST = "cost.json"
_WARM_UP = 3  # batches: the first ones also pay for memory and kernels


class RunCost(Callback):
    """Writes ``<run folder>/cost.json`` at the end of a fit or of the writing of pairs.

    After a fit: ``student_updates``, ``teacher_evaluations`` and ``train_seconds``, as the module
    counts them, over restarts, ``updates_here`` and ``seconds_per_update`` of this process (the
    first batches, which also warm up, are left out where there are more). After ``predict``:
    ``seconds``. Both: ``peak_memory_mb``, the largest of the process on the CPU (code and data
    included), or what tensors took on the GPU.
    """

    def __init__(self) -> None:
        self._began = 0.0
        # Step and time at the start, after each batch of the warm-up, and after the latest.
        self._batches: list[tuple[int, float]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        self._write(trainer, {"seconds": time.perf_counter() - self._began})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._batches = [(trainer.global_step, time.perf_counter())]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object, **kwargs: object
    ) -> None:
        """Look at the clock."""
        del self._batches[_WARM_UP + 1 :]
        self._batches.append((trainer.global_step, time.perf_counter()))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write after a fit that ended well; the module has closed its books by then."""
        if stage != "fit" or not self._batches or trainer.interrupted:
            return
        first, last = self._batches[0], self._batches[-1]
        warm = self._batches[min(_WARM_UP, max(len(self._batches) - 2, 0))]
        updates = last[0] - warm[0]
        self._write(
            trainer,
            {
                "student_updates": trainer.global_step,
                "teacher_evaluations": pl_module.teacher_evaluations,
                "train_seconds": pl_module.train_seconds,
                "updates_here": last[0] - first[0],
                "seconds_per_update": (last[1] - warm[1]) / updates if updates else None,
            },
        )

    def _write(self, trainer: Trainer, cost: dict[str, Any]) -> None:
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        device = trainer.strategy.root_device
        path = Path(trainer.default_root_dir) / COST
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{COST}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps({**cost, "peak_memory_mb": _peak(device)}, indent=1) + "\n")
        os.replace(temporary, path)


def _peak(device: torch.device) -> float:
    """Largest memory of the process so far, MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
