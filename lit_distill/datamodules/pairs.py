"""Training on noise-image pairs that a teacher made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from lit_distill.datamodules.base import ImageDataModule, Images, Split
from lit_distill.datamodules.batches import Batch, FixedLoader
from lit_distill.datamodules.latent_text import LatentTextDataModule
from lit_distill.datamodules.pairs_folder import MANIFEST, Manifest, Shard, read_manifest, sha256
from lit_distill.diffusion import Denoiser


class PairsDataModule(ImageDataModule):
    """Trains on pairs; validates, tests and compares on the real images of another data module.

    Training batches are ``{"index": (B,) int64, "noise": (B, C, H, W) unit noise, "image": (B, C,
    H, W) the end of the teacher's ODE, "label": (B,) int64}``, without ``label`` for unconditional
    pairs, with ``"prompt_embeds": (B, L, D)`` in its place for latents and prompts, and with
    ``"trajectory": (B, S, C, H, W)`` where states on the way were written. All pairs are kept in
    memory; each shard's checksum is verified once, when it is read.

    Args:
        data: The data that the teacher was trained on.
        folder: Folder of the pairs, as :class:`~lit_distill.callbacks.PairWriter` writes it.
        **options: Options of :class:`ImageDataModule`, except ``flip``: a mirrored image is not
            what the teacher makes of mirrored noise.

    Raises:
        ValueError: If ``flip`` is set.
    """

    def __init__(self, data: ImageDataModule, folder: str, **options: Any) -> None:
        super().__init__(**options)
        if self.flip:
            raise ValueError(
                "flip: true cannot be used with pairs, because the mirrored image is not what the "
                "teacher makes of the mirrored noise."
            )
        self.data = data
        self.folder = Path(folder)
        self.name = data.name
        self.image_shape = getattr(data, "image_shape", (0, 0, 0))  # of latents: once it is set up
        self.num_classes = data.num_classes
        self._manifest: Manifest | None = None
        self._pairs: Batch = {}

    def prepare_data(self) -> None:
        """Prepare the real data."""
        self.data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Read what a stage needs: the pairs for training, real images for the rest.

        Raises:
            FileNotFoundError: If the folder holds no pairs.
            ValueError: If the pairs are incomplete, damaged, or do not fit the data.
        """
        self.data.setup("validate" if stage == "fit" else stage)  # real images do not train here
        self.image_shape = self.data.image_shape
        if stage in ("fit", None) and not self._pairs:
            self._manifest = self._checked_manifest()
            self._pairs = self._read(self._manifest)

    def load(self, split: Split) -> Images:
        """Read one split of the real data."""
        return self.data.images(split)

    @property
    def trajectory(self) -> dict[str, Any] | None:
        """How the stored trajectories were made; None where the pairs have none."""
        return None if self._manifest is None else self._manifest.trajectory

    def check_model(self, denoiser: Denoiser) -> None:
        """Check that a model fits the data."""
        self.data.check_model(denoiser)

    def check_teacher(self, denoiser: Denoiser) -> None:
        """Check that a teacher fits the data and, once they are read, that it made the pairs.

        Raises:
            ValueError: If it does not.
        """
        super().check_teacher(denoiser)
        known_as = denoiser.original or denoiser.fingerprint()
        if self._manifest is not None and known_as != self._manifest.teacher:
            raise ValueError(
                f"The pairs in {self.folder} were made by another teacher than the one given "
                f"(its hash is {known_as[:12]}, the manifest says "
                f"{self._manifest.teacher[:12]}). Give the teacher that made them (option teacher),"
                " or write new pairs to another folder with `lit-distill predict`."
            )

    def _in_order(self, split: Split) -> FixedLoader:
        if isinstance(self.data, LatentTextDataModule):  # without images to compare with
            return self.data.val_dataloader()
        return super()._in_order(split)

    def _training_items(self) -> tuple[Callable[[Tensor], Batch], int]:
        return self._gather_pairs, len(self._pairs["index"])

    def _gather_pairs(self, indices: Tensor) -> Batch:
        return {name: tensor.index_select(0, indices) for name, tensor in self._pairs.items()}

    def _checked_manifest(self) -> Manifest:
        """The manifest of a complete set that fits the data."""
        manifest = read_manifest(self.folder)
        missing = manifest.missing(self.folder)
        again = "Run the same `lit-distill predict` command again; it goes on where it stopped."
        if missing:
            raise ValueError(
                f"The pairs in {self.folder} are incomplete: {len(missing)} of "
                f"{len(manifest.files)} shards are missing, the first is {missing[0]}. {again}"
            )
        if not manifest.complete:
            raise ValueError(
                f"The pairs in {self.folder} are incomplete: {MANIFEST} lacks the checksums of the "
                f"shards, as the run that wrote them did not end. {again}"
            )
        for what, pairs, data in [
            ("images of shape", tuple(manifest.image_shape), self.image_shape),
            ("a number of classes of", manifest.num_classes, self.num_classes),
        ]:
            if pairs != data:
                raise ValueError(
                    f"The pairs in {self.folder} have {what} {pairs}, but the data set "
                    f"{self.name!r} has {data}: give the data that the pairs were made for "
                    "(option data), or another folder (option folder)."
                )
        return manifest

    def _read(self, manifest: Manifest) -> Batch:
        """All pairs, in the order of their index."""
        progress = tqdm(
            manifest.shards,
            "Reading and checking pairs",
            unit="shard",
            leave=False,
            disable=len(manifest.shards) < 20 or getattr(rank_zero_only, "rank", 0) > 0 or None,
        )
        shards = [self._read_shard(shard) for shard in progress]
        pairs = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
        if not torch.equal(pairs["index"], torch.arange(manifest.num_pairs)):
            raise ValueError(
                f"The pairs in {self.folder} are not numbered from 0 on: write them again."
            )
        return pairs

    def _read_shard(self, shard: Shard) -> Batch:
        path = self.folder / shard.file
        content = path.read_bytes()
        try:
            if sha256(content) != shard.sha256:
                raise SafetensorError("its SHA-256 is not the one in the manifest")
            return safetensors.torch.load(content)
        except SafetensorError as error:
            raise ValueError(
                f"The shard {path} is truncated or was altered ({error}). Delete this file and run "
                "the same `lit-distill predict` command again: it writes only what is missing."
            ) from error
