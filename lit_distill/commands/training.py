"""``lit-distill fit | validate | test | predict``: LightningCLI, one folder a run."""

import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

import lit_distill.datamodules  # noqa: F401  (so that data modules are known by their short names)
from lit_distill.callbacks import RunCost
from lit_distill.commands import run_folder
from lit_distill.methods import DistillationModule


class SaveRunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run folder, whatever the logger is and also on resuming."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save, but in a fit wait: what fails before its first step changes nothing."""
        if stage != "fit":
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save in a fit."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the parsed configuration; after a fit the other commands leave the fit's file."""
        path = Path(trainer.default_root_dir) / run_folder.CONFIG
        if stage != "fit" and path.exists():
            return
        # The file is to be used again: it must neither clear nor resume anything by itself.
        config = self.config.clone()
        config.overwrite, config.ckpt_path = False, None
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(self.parser.dump(config, skip_none=False), encoding="utf-8")
        os.replace(temporary, path)


class ReplaceRun(Callback):
    """Removes the run that the folder held, once the new one is ready for its first step.

    Args:
        paths: What the old run wrote.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove it, on the first process."""
        if trainer.is_global_zero:
            run_folder.remove(self.paths)
            names = ", ".join(path.name for path in self.paths)
            rank_zero_info(f"Replacing the run in {trainer.default_root_dir}: removed {names}.")


class DistillationCLI(LightningCLI):
    """LightningCLI for any method on any data, with a run folder that is never overwritten.

    Args:
        args: The command line after the program's name, e.g.
            ``["fit", "--config", "configs/digits/dmd.yaml"]``.

    Raises:
        argparse.ArgumentError: The command line or a configuration file is wrong.
    """

    def __init__(self, args: list[str]) -> None:
        self._asked = args[0] if args else ""
        # Interpolations across files and overrides need both this and "omegaconf+".
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        super().__init__(
            DistillationModule,
            LightningDataModule,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={
                "num_sanity_val_steps": 0,  # a metric of two batches means nothing
                "use_distributed_sampler": False,  # the data modules know the ranks
            },
            seed_everything_default=0,
            parser_kwargs={"parser_mode": "omegaconf+", "exit_on_error": False},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # there it is static
        """The one that is asked for, as it takes its time to build the parser of each; else all."""
        known = super().subcommands()
        return {self._asked: known[self._asked]} if self._asked in known else known

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--overwrite`` (to every command, as they share configuration files)."""
        parser.add_argument(
            "--overwrite",
            type=bool,
            default=False,
            help="fit: remove the run that the folder holds, then start",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse without the base's warning that both ``args`` and ``sys.argv`` are there."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: the base lets a checkpoint's hyperparameters win over the command line."""

    @property
    def root(self) -> Path:
        """The run folder.

        Raises:
            ValueError: None is configured.
        """
        root = self._get(self.config, "trainer").default_root_dir
        if not root:
            raise ValueError(
                "The run has no folder: name one, e.g. --trainer.default_root_dir runs/digits/dmd."
            )
        return Path(root).expanduser()

    def before_instantiate_classes(self) -> None:
        """Check the run folder before anything slow happens."""
        if self.subcommand == "fit" and not self._get(self.config, "trainer").fast_dev_run:
            ckpt_path = self._get(self.config, "ckpt_path")
            run_folder.check_fit(self.root, ckpt_path, self._get(self.config, "overwrite"))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; its logger and checkpoints write to the run folder."""
        config = self._get(self.config_init, "trainer")
        callbacks = config.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if self.subcommand == "predict":
            config.logger = False  # it logs nothing, and would leave an empty file of events
        elif config.logger is None or config.logger is True:
            config.logger = TensorBoardLogger(
                self.root, name="", version="", default_hp_metric=False
            )
        saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
        if not saves and config.enable_checkpointing is not False:
            callbacks = [*callbacks, ModelCheckpoint(filename="last")]
        if self._get(self.config, "overwrite") and self.subcommand == "fit":
            old = [] if config.fast_dev_run else run_folder.written(self.root)
            callbacks = [ReplaceRun(old), *callbacks] if old else callbacks  # before all that write
        callbacks = [*callbacks, RunCost()]
        config.callbacks = callbacks
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint):
                self._keep_in_root(callback)
        return super().instantiate_trainer(**kwargs)

    def _keep_in_root(self, callback: ModelCheckpoint) -> None:
        """Let a checkpoint callback write to the run folder and never beside an older file."""
        if callback.dirpath is None:
            callback.dirpath = str((self.root / run_folder.LAST.parent).absolute())
        # Else a resumed run can leave last.ckpt as it is and write last-v1.ckpt.
        callback._enable_version_counter = False

    def _run_subcommand(self, subcommand: str) -> None:
        """Choose the checkpoint, clear the folder if asked to, and run."""
        fit = subcommand == "fit"
        config = self.config_init[subcommand]
        config.ckpt_path = run_folder.resolve_checkpoint(self.root, config.ckpt_path, fit=fit)
        if config.ckpt_path is None and not fit:
            rank_zero_info(f"There is no checkpoint in {self.root}: the model as configured.")
        config.weights_only = True if config.weights_only is None else config.weights_only
        if subcommand == "predict" and config.return_predictions is None:
            config.return_predictions = False  # a writer callback keeps them, memory would not
        super()._run_subcommand(subcommand)


def run_training(args: list[str]) -> int:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        args: The command and its options.

    Returns:
        The exit status: 0, or 143 after a SIGTERM, to which Lightning alone would say 0.

    Raises:
        ValueError: Lightning cannot run what is configured, or a checkpoint does not fit it.
    """
    _hush()
    try:
        DistillationCLI(args)
    except SIGTERMException:
        print("lit-distill: stopped by SIGTERM", file=sys.stderr)
        return 128 + signal.SIGTERM
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except RuntimeError as error:
        if "loading state_dict" in str(error) or "PytorchStreamReader" in str(error):
            raise ValueError(
                f"The checkpoint is damaged or does not fit the configured model: {error}"
            ) from error
        raise
    return 0


def _hush() -> None:
    """Silence what Lightning says at every run and nobody can act on."""
    for message in (
        r".*treespec, LeafSpec.* is deprecated",  # its own use of torch
        r"Found \d+ module\(s\) in eval mode",  # the teacher and the average, on purpose
        r"Using ModelCheckpoint with manual optimization",  # it asks for weights from before a step
        r"Checkpoint directory .* exists and is not empty",  # a run that goes on
        r"The number of training batches .* is smaller than the logging interval",  # steps count
    ):
        warnings.filterwarnings("ignore", message)
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless cloud" not in record.getMessage()
