"""Export of what was trained as a diffusers folder."""

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_distill.callbacks.report import numbers_of
from lit_distill.diffusion import Denoiser
from lit_distill.models import (
    AdaptedNetwork,
    save_adapter,
    save_denoiser,
    update_card,
    updates_of,
    write_card,
)


class ExportPipeline(Callback):
    """Writes ``<run folder>/pipeline/`` at the end of a fit.

    The folder holds the averaged weights of the best checkpoint where a checkpoint callback
    watches a metric, else those of the last step. It is the teacher of the next stage and opens
    in stock diffusers. A module whose ``milestone()`` names a folder, such as that of a stage
    (``stage-4-steps``), gets its averaged weights of that moment written to
    ``<run folder>/<name>/`` too, and further averages of the weights theirs to
    ``<run folder>/pipeline-ema-<decay>/``, those of the last step.

    Each folder has a model card, ``README.md``, with the recipe and how it is opened; a test adds
    its numbers. A card of the user's own is kept.

    Args:
        folder: Another place to write the end to.
        adapter: Write the low-rank adapter of a student too, in peft's format, to
            ``<run folder>/adapter/``; the pipeline holds its weights merged in any case.
    """

    def __init__(self, folder: str | Path | None = None, adapter: bool = False) -> None:
        self.folder, self.adapter = None if folder is None else Path(folder), adapter
        self._exported: dict[Path, int | None] = {}  # and the student updates of these weights

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
            _write_card(folder, trainer, pl_module, trainer.global_step)
            print(f"Exported the weights of this stage to {folder}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export."""
        if not _exports(trainer):
            return
        denoiser = _copy(pl_module)
        best, updates = _best_checkpoint(trainer), trainer.global_step
        if best is not None:
            checkpoint = torch.load(best, map_location="cpu", weights_only=True)
            state, updates = checkpoint["state_dict"], checkpoint["global_step"]
            prefix = "ema.module."
            weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            denoiser.load_state_dict(weights)
        root, folder = Path(trainer.default_root_dir), self._folder(trainer)
        save_denoiser(denoiser, folder)
        self._exported = {folder: updates}
        if self.adapter:
            save_adapter(denoiser, root / "adapter")
        print(f"Exported {'the best' if best else 'the last'} weights to {folder}")
        for decay in getattr(pl_module, "further_ema_decays", ()):
            with pl_module.sampled_with(decay):  # type: ignore[operator]
                further = root / f"pipeline-ema-{decay:g}"
                save_denoiser(_copy(pl_module), further)
                self._exported[further] = None  # a test measures the first average alone

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the model cards; the module has closed its books by then."""
        spent = getattr(pl_module, "teacher_evaluations", None)
        for folder, updates in self._exported.items():
            _write_card(folder, trainer, pl_module, updates, spent)
        self._exported = {}

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the numbers of a test of the exported weights into their model card."""
        folder = self._folder(trainer)
        if not _exports(trainer) or not (folder / "model_index.json").is_file():
            return
        numbers = numbers_of(trainer.default_root_dir, updates_of(folder))
        if numbers is not None:
            update_card(folder, numbers)

    def _folder(self, trainer: Trainer) -> Path:
        return self.folder or Path(trainer.default_root_dir) / "pipeline"


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


def _write_card(
    folder: Path,
    trainer: Trainer,
    module: LightningModule,
    updates: int | None,
    teacher_evaluations: int | None = None,
) -> None:
    """Write a folder's model card with the recipe of this run."""
    arguments = dict(module.hparams)
    teacher, data = arguments.get("teacher"), getattr(trainer, "datamodule", None)
    if not isinstance(teacher, str):  # an object, whose origin is not known
        teacher = None if getattr(module, "teacher", teacher) is None else ""
    few = cast(Denoiser, module.network).few_steps
    jumps = "the student's own jumps"
    if few is not None and few.gamma > 0 and max(few.trained) > 1:
        share = "" if few.gamma == 1 else f" (a share of {few.gamma:g})"
        jumps += f", with fresh noise{share} between them"
    solver = getattr(module, "solver", None) or ("heun" if few is None else jumps)
    steps = [getattr(module, "steps", 1)] if few is None else few.trained
    facts = {
        "Method": f"`{type(module).__name__}`",
        "Settings that differ from its defaults": _settings(module, arguments),
        "Teacher": "none" if teacher is None else "another model",
        "Data": _data(data),
        "Steps": ", ".join(map(str, steps)),
        "Solver": solver,
        "Student updates": f"{trainer.global_step:,}",
    }
    if teacher:
        facts["Teacher"] = f"`{_without_root(teacher)}`"
    if updates not in (None, trainer.global_step):
        facts["Student updates"] += f", of which these weights, the best, had {updates:,}"
    if teacher is not None and teacher_evaluations is not None:
        facts["Teacher evaluations"] = f"{teacher_evaluations:,}"
    written = write_card(
        folder,
        method=type(module).__name__,
        facts=facts,
        teacher=teacher,
        student_updates=updates,
    )
    if not written:
        print(f"{folder / 'README.md'} is a card of your own and stays as it is.")


def _data(data: Any) -> str:
    """The data set's name and the size of its batches."""
    if data is None:
        return "not recorded"
    size = getattr(data, "batch_size", None)
    batch = "" if size is None else f", batches of {size} a process"
    return f"{getattr(data, 'name', type(data).__name__)}{batch}"


def _settings(module: LightningModule, arguments: Mapping[str, Any]) -> str:
    """The plain arguments that are not a method's defaults, one a line."""
    usual: dict[str, str | None] = {}
    for kind in reversed(type(module).__mro__):  # a method hands further arguments to its base
        parameters = inspect.signature(cast(Any, kind).__init__).parameters.values()
        usual |= {parameter.name: _plain(parameter.default) for parameter in parameters}
    texts = {k: _plain(v) for k, v in arguments.items() if k in usual and k != "teacher"}
    told = {k: text for k, text in texts.items() if text not in (None, usual[k])}
    return "".join(f"\n  - `{name} = {text}`" for name, text in told.items()) or "none"


def _plain(value: Any) -> str | None:
    """A setting as text; None where it is an object without a short one."""
    if isinstance(value, str):
        return _without_root(value)
    if isinstance(value, bool | int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, list | tuple):  # a default's tuple is a list in YAML
        parts = [_plain(part) for part in value]
        return None if None in parts else f"[{', '.join(map(str, parts))}]"
    if not isinstance(value, dict):
        return None
    path = value.get("class_path", "")
    inner = value.get("init_args") or {} if path else value
    texts = {k: _plain(v) for k, v in inner.items() if v is not False}
    told = [f"{k}={text}" for k, text in texts.items() if text is not None]
    return f"{path.rpartition('.')[2]}({', '.join(told)})"


def _without_root(path: str) -> str:
    """A path for strangers: of an absolute one the last three names."""
    return str(Path(*Path(path).parts[-3:])) if Path(path).is_absolute() else path
