"""Latents and prompts for text-to-image models, computed once and kept on disk."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from lit_distill.datamodules.base import ImageDataModule, Images, Split, to_signed
from lit_distill.datamodules.batches import Batch, FixedLoader
from lit_distill.datamodules.captions import CaptionedImages
from lit_distill.datamodules.pairs_folder import (
    MANIFEST,
    UNFINISHED,
    Shard,
    sha256,
    write_atomically,
)
from lit_distill.diffusion import Denoiser, seeded_noise
from lit_distill.models import LatentCodec, load_codec

FORMAT = 1
_AT_ONCE = 16  # images in one pass of the VAE
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass
class LatentManifest:
    """What a cache of latents and prompts was computed from, and what it consists of.

    Attributes:
        source: SHA-256 (hex) of what the source calls its identity.
        vae: SHA-256 (hex) of the VAE.
        text_encoder: SHA-256 (hex) of text encoder and tokenizer.
        latent_shape: ``[c, h, w]``.
        num_images: Number of latents; 0 for captions alone.
        num_prompts: Number of different captions.
        shard_size: Items a shard; the last of each kind may be smaller.
        dtype: Of what is stored, ``float32`` or ``float16``.
        shards: The written shards, once ``complete``.
        complete: Whether all shards are there, with their checksums.
        format: Version of this format.
    """

    source: str
    vae: str
    text_encoder: str
    latent_shape: list[int]
    num_images: int
    num_prompts: int
    shard_size: int
    dtype: str
    shards: list[Shard] = field(default_factory=list)
    complete: bool = False
    format: int = FORMAT

    def parts(self, kind: str) -> list[tuple[str, range]]:
        """File name and items of each shard of a kind, ``prompts`` or ``latents``."""
        total = self.num_prompts if kind == "prompts" else self.num_images
        firsts = range(0, total, self.shard_size)
        return [
            (f"{kind}-{i:05d}.safetensors", range(first, min(first + self.shard_size, total)))
            for i, first in enumerate(firsts)
        ]

    def differences(self, other: "LatentManifest") -> list[str]:
        """The facts in which another manifest differs, as ``name: here, not there``."""
        here, there = dataclasses.asdict(self), dataclasses.asdict(other)
        return [
            f"{name}: {_short(here[name])}, not {_short(there[name])}"
            for name in here
            if name not in ("shards", "complete") and here[name] != there[name]
        ]


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


class LatentTextDataModule(ImageDataModule):
    """Latents and prompt embeddings of captioned images, or of captions alone.

    Training batches are ``{"image": (B, c, h, w) latents of about unit variance, "prompt_embeds":
    (B, L, D)}``. For captions alone ``image`` is NaN: methods that need no data look at its shape
    only. The batches of ``predict`` are ``{"index", "noise", "prompt_embeds"}``, with the captions
    in turn.

    Latents are the mean of the VAE's; each different caption is embedded once. Both are written to
    ``cache`` when they are first needed, by one process; a run that was killed goes on at the first
    missing shard. Shards are mapped into memory, so that they may be larger than it. With several
    nodes the folder must be one that all of them see.

    Args:
        source: The captioned images.
        pipeline: Folder or hub id of the text-to-image model whose VAE and text encoder are used;
            the teacher's.
        cache: Folder of what is computed.
        shard_size: Items a shard.
        dtype: Of what is stored, ``float32`` or ``float16``.
        options: Those of :class:`ImageDataModule`, except ``flip``.

    Raises:
        ValueError: If an option is impossible.
    """

    num_classes = None

    def __init__(
        self,
        source: CaptionedImages,
        pipeline: str,
        cache: str,
        shard_size: int = 1024,
        dtype: str = "float32",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if self.flip:
            raise ValueError("flip: true cannot be used with latents: a latent is not mirrored.")
        if shard_size < 1:
            raise ValueError(f"shard_size={shard_size}: it must be at least 1.")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype!r}: choose {' or '.join(_DTYPES)}.")
        self.prepare_data_per_node = False
        self.source, self.pipeline, self.cache = source, pipeline, Path(cache)
        self.shard_size, self.dtype = shard_size, dtype
        self.name = source.name
        # Each different caption once, and for each caption which of them it is.
        numbers: dict[str, int] = {}
        found = [numbers.setdefault(text, len(numbers)) for text in source.captions]
        self._prompts, self._numbers = list(numbers), torch.tensor(found)
        self._kept: LatentCodec | None = None
        self._manifest: LatentManifest | None = None
        self._shards: dict[str, list[dict[str, Tensor]]] = {}

    @property
    def has_images(self) -> bool:
        """Whether there is more than captions."""
        return self.source.has_images

    # --- The cache ------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Compute what the cache lacks.

        Raises:
            ValueError: If the folder holds what was computed in another way.
        """
        wanted = self._wanted()
        if self._check_folder(wanted).complete:
            return
        self.cache.mkdir(parents=True, exist_ok=True)
        for leftover in self.cache.glob(f"*{UNFINISHED}"):
            leftover.unlink()
        self._write(wanted)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for kind in ("prompts", "latents"):
            parts = [
                (name, items)
                for name, items in wanted.parts(kind)
                if not (self.cache / name).is_file()
            ]
            for name, items in tqdm(parts, f"Computing {kind}", unit="shard", disable=None):
                if kind == "prompts":
                    made = {"prompt_embeds": self._embedded(items, device)}
                else:
                    made = {"latent": self._encoded(items, device)}
                write_atomically(self.cache / name, safetensors.torch.save(made))
        names = [name for kind in ("prompts", "latents") for name, _ in wanted.parts(kind)]
        sizes = [len(items) for kind in ("prompts", "latents") for _, items in wanted.parts(kind)]
        wanted.shards = [
            Shard(name, sha256((self.cache / name).read_bytes()), size)
            for name, size in zip(names, sizes, strict=True)
        ]
        wanted.complete = True
        self._write(wanted)
        rank_zero_info(
            f"{wanted.num_images} latents and {wanted.num_prompts} prompts are in {self.cache}."
        )

    def setup(self, stage: str | None = None) -> None:
        """Open the cache.

        Raises:
            ValueError: If it is incomplete, damaged or was computed in another way.
        """
        if self._shards:
            return
        self._manifest = self._check_folder(self._wanted())
        if not self._manifest.complete:
            raise ValueError(f"The cache in {self.cache} is incomplete: call prepare_data() first.")
        for kind in ("prompts", "latents"):
            self._shards[kind] = [self._open(name) for name, _ in self._manifest.parts(kind)]

    def load(self, split: Split) -> Images:
        """Refuse to: there are no splits of images in memory.

        Raises:
            ValueError: Always; it says what evaluates a text-to-image model.
        """
        raise ValueError(
            f"The captioned data {self.name!r} have no {split} images to compare samples with: use "
            "the callback PromptEvaluation instead of Evaluation."
        )

    @property
    def codec(self) -> LatentCodec:
        """The VAE and the text encoder."""
        if self._kept is None:
            self._kept = load_codec(self.pipeline)
            self.image_shape = self._kept.latent_shape
        return self._kept

    def _wanted(self) -> LatentManifest:
        """The manifest of what the options ask for."""
        captions = self.source.captions
        return LatentManifest(
            source=hashlib.sha256(self.source.identity().encode()).hexdigest(),
            vae=self.codec.vae_hash(),
            text_encoder=self.codec.text_hash(),
            latent_shape=list(self.codec.latent_shape),
            num_images=len(captions) if self.source.has_images else 0,
            num_prompts=len(self._prompts),
            shard_size=self.shard_size,
            dtype=self.dtype,
        )

    def _check_folder(self, wanted: LatentManifest) -> LatentManifest:
        """The folder's manifest, or the one that is wanted where it has none yet."""
        path = self.cache / MANIFEST
        if not path.is_file():
            if any(self.cache.glob("*.safetensors")):
                raise ValueError(
                    f"{self.cache} holds shards but no {MANIFEST}, so it is not known how they "
                    "were made: name another folder (option cache), or delete them."
                )
            return wanted
        try:
            content = json.loads(path.read_bytes())
            shards = [Shard(**shard) for shard in content.pop("shards")]
            found = LatentManifest(**content, shards=shards)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no manifest of latents ({error}).") from error
        if differences := found.differences(wanted):
            raise ValueError(
                f"{self.cache} holds latents and prompts that were computed in another way ("
                f"{'; '.join(differences)}): name another folder (option cache), or delete this."
            )
        return found

    def _write(self, manifest: LatentManifest) -> None:
        text = json.dumps(dataclasses.asdict(manifest), indent=1)
        write_atomically(self.cache / MANIFEST, text.encode())

    def _embedded(self, items: range, device: torch.device) -> Tensor:
        self.codec.text_encoder.to(device)
        embeddings = self.codec.embed(self._prompts[items.start : items.stop])
        return embeddings.to(_DTYPES[self.dtype]).cpu().contiguous()

    def _encoded(self, items: range, device: torch.device) -> Tensor:
        parts = []
        for first in range(items.start, items.stop, _AT_ONCE):
            chosen = range(first, min(first + _AT_ONCE, items.stop))
            images = to_signed(self.source.images(chosen, self.codec.image_shape))
            parts.append(self.codec.encode(images.to(device)).cpu())
        latents = torch.cat(parts)
        if not latents.isfinite().all():
            raise ValueError(
                f"The VAE makes NaN or infinite latents of the images {items.start} to "
                f"{items.stop - 1}: look at these images, or give another VAE (option pipeline)."
            )
        return latents.to(_DTYPES[self.dtype]).contiguous()

    def _open(self, name: str) -> dict[str, Tensor]:
        """A shard, mapped into memory."""
        assert self._manifest is not None
        path = self.cache / name
        recorded = {shard.file: shard.sha256 for shard in self._manifest.shards}
        try:
            if sha256(path.read_bytes()) != recorded.get(name):
                raise SafetensorError("its SHA-256 is not the one in the manifest")
            return safetensors.torch.load_file(path)
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(
                f"The shard {path} is missing, truncated or was altered ({error}). Delete "
                f"{path.parent} and start again: it is computed anew."
            ) from error

    # --- Batches --------------------------------------------------------------------------------

    def check_model(self, denoiser: Denoiser) -> None:
        """Check that a model has the VAE and the text encoder that the cache was computed with.

        Raises:
            ValueError: If it has others, or none.
        """
        super().check_model(denoiser)
        codec = denoiser.codec
        if not isinstance(codec, LatentCodec):
            raise ValueError(
                f"The data set {self.name!r} holds latents and prompts, and this model works on "
                "images: give the folder of a text-to-image model (option teacher)."
            )
        for what, own, other in [
            ("VAE", self.codec.vae_hash, codec.vae_hash),
            ("text encoder", self.codec.text_hash, codec.text_hash),
        ]:
            if codec is not self.codec and own() != other():
                raise ValueError(
                    f"The latents and prompts in {self.cache} were computed with another {what} "
                    "than the model's: give the same folder as the options teacher and pipeline."
                )

    def val_dataloader(self) -> FixedLoader:
        """The first training batch, for what needs one: samples are judged by a callback."""
        count = min(self.batch_size, len(self.source.captions))
        return FixedLoader(self._gather_items, [torch.arange(count)])

    test_dataloader = val_dataloader

    def embeddings(self, captions: Tensor) -> Tensor:
        """Embeddings ``(B, L, D)`` float32 of the captions with these numbers ``(B,)``."""
        return self._rows("prompts", "prompt_embeds", self._numbers[captions]).float()

    def _training_items(self) -> tuple[Callable[[Tensor], Batch], int]:
        return self._gather_items, len(self.source.captions)

    def _gather_items(self, indices: Tensor) -> Batch:
        if not self.source.has_images:
            latents = torch.full((len(indices), *self.image_shape), float("nan"))
        else:
            latents = self._rows("latents", "latent", indices).float()
        return {"image": latents, "prompt_embeds": self.embeddings(indices)}

    def _noise(self, indices: Tensor) -> Batch:
        seeds = [self.predict_seed + int(i) for i in indices]
        return {
            "index": indices,
            "noise": seeded_noise(self.image_shape, seeds),
            "prompt_embeds": self.embeddings(indices % len(self.source.captions)),
        }

    def _rows(self, kind: str, name: str, indices: Tensor) -> Tensor:
        """Rows ``(B, ...)`` of a tensor that is spread over shards."""
        shards = self._shards[kind]
        if len(shards) == 1:
            return shards[0][name].index_select(0, indices)
        return torch.stack(
            [shards[i // self.shard_size][name][i % self.shard_size] for i in indices.tolist()]
        )
