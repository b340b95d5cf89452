"""Writes a teacher's noise-image pairs during ``predict``, so that a killed run can go on."""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from tqdm.auto import tqdm

from lit_distill.datamodules.base import ImageDataModule
from lit_distill.datamodules.pairs_folder import (
    MANIFEST,
    UNFINISHED,
    Manifest,
    Shard,
    read_manifest,
    sha256,
    shard_name,
    shards_in,
    write_atomically,
)


class PairWriter(Callback):
    """Writes each batch of ``predict`` as one shard, and a manifest that vouches for all of them.

    The module's ``predict_step`` returns ``{"index", "noise", "image", "label"?, "trajectory"?}``,
    or ``prompt_embeds`` (B, L, D) in the place of the label
    (``trajectory`` (B, S, C, H, W): states on the way from noise to image), and its
    ``sampling_record()`` says how: ``teacher`` (fingerprint), ``solver``, ``steps``, ``nfe``,
    ``sigma_min``, ``sigma_max``, ``dtype``, ``deterministic`` and maybe ``trajectory``. A shard
    gets its name when it is whole, so a run that was stopped in any way goes on at the first
    missing shard when the same command is given again. Any number of processes writes the same
    files.

    Args:
        folder: Where to write; it is made if it does not exist.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._manifest: Manifest | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the data module leave out the shards that are there."""
        if stage == "predict":
            self._manifest = None
            _data_of(trainer).skip_predict = shards_in(self.folder)
            trainer.predict_loop.return_predictions = False  # they need not stay in memory

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the folder; not before, as the teacher's weights may come from a checkpoint."""
        self._open(trainer, pl_module)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write one shard.

        Raises:
            ValueError: If an image has a NaN or infinite value.
            OSError: If the disk is full; the shards that are there are kept.
            SIGTERMException: If the process was asked to end.
        """
        manifest = self._open(trainer, pl_module)
        index = outputs["index"].cpu()
        number = int(index[0]) // manifest.shard_size
        if not torch.isfinite(outputs["image"]).all():
            raise ValueError(
                f"The teacher's images {int(index[0])} to {int(index[-1])} hold NaN or infinite "
                "values, so they are not written: check the teacher and the trainer's precision."
            )
        tensors = {"index": index, "noise": outputs["noise"], "image": outputs["image"]}
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
        if "label" in outputs:
            tensors["label"] = outputs["label"]
        if "prompt_embeds" in outputs:
            tensors["prompt_embeds"] = outputs["prompt_embeds"].float()
        if "trajectory" in outputs:
            tensors["trajectory"] = outputs["trajectory"].float()
        on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_atomically(self.folder / shard_name(number), safetensors.torch.save(on_cpu))
        if trainer.received_sigterm:  # at which Lightning's loop of predictions would go on
            raise SIGTERMException

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Complete the manifest once all processes have written; a run with an error ends before.

        Raises:
            ValueError: If a shard that was there before does not have its recorded checksum.
        """
        if stage != "predict":
            return
        # A process that had no shard to write, which Lightning then skips, has not opened it yet.
        manifest = self._open(trainer, pl_module)
        trainer.strategy.barrier("pairs written")
        if trainer.is_global_zero:
            self._close(manifest)
        trainer.strategy.barrier("pairs complete")
        _data_of(trainer).skip_predict = set()

    def _open(self, trainer: Trainer, pl_module: LightningModule) -> Manifest:
        """Compare this run with the folder and begin the manifest, once on every process."""
        if self._manifest is not None:
            return self._manifest
        manifest = self._manifest = _manifest_of(_data_of(trainer), pl_module)
        if (self.folder / MANIFEST).exists():
            before = read_manifest(self.folder)
            if differences := before.differences(manifest):
                raise ValueError(
                    f"{self.folder} holds pairs that were made in another way "
                    f"({'; '.join(differences)}). Give the same settings to complete them, or "
                    "another folder (option folder of PairWriter)."
                )
            gone = before.missing(self.folder)  # written anew: bits may differ on another machine
            manifest.shards = [shard for shard in before.shards if shard.file not in gone]
        elif shards_in(self.folder):
            raise ValueError(
                f"{self.folder} holds shards but no {MANIFEST}, so it is not known how they were "
                "made. Delete them or give another folder (option folder of PairWriter)."
            )
        trainer.strategy.barrier("pairs compared")  # nobody reads any more: now it may change
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f"*{UNFINISHED}"):
                leftover.unlink()
            manifest.write(self.folder)
        trainer.strategy.barrier("pairs opened")
        return manifest

    def _close(self, manifest: Manifest) -> None:
        """Record the checksums, and compare those of shards that were recorded before."""
        if missing := manifest.missing(self.folder):
            rank_zero_info(
                f"{len(manifest.files) - len(missing)} of {len(manifest.files)} shards of pairs "
                f"are in {self.folder}. Run the same command again for the rest."
            )
            return
        recorded = {shard.file: shard.sha256 for shard in manifest.shards}
        hidden = len(manifest.files) < 20 or None
        files = tqdm(manifest.files, "Checksums", unit="shard", leave=False, disable=hidden)
        shards = []
        for number, file in enumerate(files):
            checksum = sha256((self.folder / file).read_bytes())
            if recorded.get(file, checksum) != checksum:
                raise ValueError(
                    f"The shard {self.folder / file} is truncated or was altered: its SHA-256 is "
                    "not the recorded one. Delete this file and run the same command again."
                )
            shards.append(Shard(file, checksum, manifest.count(number)))
        manifest.shards, manifest.complete = shards, True
        manifest.write(self.folder)
        rank_zero_info(f"{manifest.num_pairs} pairs are complete in {self.folder}.")


def _data_of(trainer: Trainer) -> ImageDataModule:
    """The data module, which numbers the batches."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ImageDataModule):
        raise ValueError(
            "PairWriter needs one of lit_distill's image data modules, which number the noise: "
            "give one to predict (option data)."
        )
    return data


def _manifest_of(data: ImageDataModule, pl_module: LightningModule) -> Manifest:
    """The manifest that this run's settings make."""
    sampling_record = getattr(pl_module, "sampling_record", None)
    if sampling_record is None:
        raise ValueError(
            f"{type(pl_module).__name__} has no sampling_record(), which says how its images are "
            "made: give a module that samples a teacher (option model)."
        )
    record = dict(sampling_record())
    if not record.pop("deterministic"):
        raise ValueError(
            f"solver={record['solver']} adds random noise, so its images are no function of the "
            "stored noise: choose a deterministic solver to write pairs."
        )
    return Manifest(
        **record,
        seed=data.predict_seed,
        image_shape=list(data.image_shape),
        num_classes=data.num_classes,
        num_pairs=data.predict_samples,
        shard_size=data.predict_batch_size,
    )
