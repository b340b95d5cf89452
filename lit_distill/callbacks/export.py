"""Export of what was trained as a diffusers folder."""

import copy
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_distill.diffusion import Denoiser
from lit_distill.models import save_denoiser


class ExportPipeline(Callback):
    """Writes ``<run folder>/pipeline/`` at the end of a fit.

    The folder holds the averaged weights of the best checkpoint where a checkpoint callback
    watches a metric, else those of the last step. It is the teacher of the next stage and opens
    in stock diffusers.

    Args:
        folder: Another place to write to.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export."""
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        denoiser = copy.deepcopy(cast(Denoiser, pl_module.network))
        best = _best_checkpoint(trainer)
        if best is not None:
            state = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
            prefix = "ema.module."
            weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            denoiser.load_state_dict(weights)
        folder = self.folder or Path(trainer.default_root_dir) / "pipeline"
        save_denoiser(denoiser.cpu(), folder)
        print(f"Exported {'the best' if best else 'the last'} weights to {folder}")


def _best_checkpoint(trainer: Trainer) -> str | None:
    """The best checkpoint of the first callback that watches a metric, if it wrote one."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            return callback.best_model_path
    return None
