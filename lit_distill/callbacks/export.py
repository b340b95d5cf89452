"""Export of what was trained as a diffusers folder."""

import copy
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_distill.diffusion import Denoiser
from lit_distill.models import AdaptedNetwork, save_adapter, save_denoiser


class ExportPipeline(Callback):
    """Writes ``<run folder>/pipeline/`` at the end of a fit.

    The folder holds the averaged weights of the best checkpoint where a checkpoint callback
    watches a metric, else those of the last step. It is the teacher of the next stage and opens
    in stock diffusers. A module whose ``milestone()`` names a folder, such as that of a stage
    (``stage-4-steps``), gets its averaged weights of that moment written to
    ``<run folder>/<name>/`` too, and further averages of the weights theirs to
    ``<run folder>/pipeline-ema-<decay>/``, those of the last step.

    Args:
        folder: Another place to write the end to.
        adapter: Write the low-rank adapter of a student too, in peft's format, to
            ``<run folder>/adapter/``; the pipeline holds its weights merged in any case.
    """

    def __init__(self, folder: str | Path | None = None, adapter: bool = False) -> None:
        self.folder, self.adapter = None if folder is None else Path(folder), adapter

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse at once what would fail in the end.

        Raises:
            ValueError: If an adapter shall be written and the student has none.
        """
        network = getattr(pl_module.student, "network", None)
        if stage == "fit" and self.adapter and not isinstance(network, AdaptedNetwork):
            raise ValueError(
                f"ExportPipeline(adapter=True): the student of this {type(pl_module).__name__} has "
                "no adapter. Set the method's option lora, or adapter to false."
            )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Export a milestone, where the module names one."""
        if not _exports(trainer):
            return
        name = getattr(pl_module, "milestone", lambda: None)()
        if name is not None:
            folder = Path(trainer.default_root_dir) / name
            save_denoiser(_copy(pl_module), folder)
            print(f"Exported the weights of this stage to {folder}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export."""
        if not _exports(trainer):
            return
        denoiser = _copy(pl_module)
        best = _best_checkpoint(trainer)
        if best is not None:
            state = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
            prefix = "ema.module."
            weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            denoiser.load_state_dict(weights)
        root = Path(trainer.default_root_dir)
        folder = self.folder or root / "pipeline"
        save_denoiser(denoiser, folder)
        if self.adapter:
            save_adapter(denoiser, root / "adapter")
        print(f"Exported {'the best' if best else 'the last'} weights to {folder}")
        for decay in getattr(pl_module, "further_ema_decays", ()):
            with pl_module.sampled_with(decay):  # type: ignore[operator]
                save_denoiser(_copy(pl_module), root / f"pipeline-ema-{decay:g}")


def _exports(trainer: Trainer) -> bool:
    """Whether this process writes: one does, and none in a run that only looks for errors."""
    return trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False)


def _copy(module: LightningModule) -> Denoiser:
    """What the module samples with, on the CPU."""
    return copy.deepcopy(cast(Denoiser, module.network)).cpu()


def _best_checkpoint(trainer: Trainer) -> str | None:
    """The best checkpoint of the first callback that watches a metric, if it wrote one."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            return callback.best_model_path
    return None
