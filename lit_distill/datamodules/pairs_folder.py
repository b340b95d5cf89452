"""The folder of noise-image pairs that travels from ``predict`` to training.

``manifest.json`` says how the pairs were made; ``shard-00000.safetensors`` and so on hold them.
Both sides, the writer and the data module, know the format from here alone.
"""

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1
UNFINISHED = ".part"
"""Suffix of a file that is being written; what a killed run leaves under it counts for nothing."""


@dataclass
class Shard:
    """One written shard: file name, SHA-256 (hex) of the file, number of pairs."""

    file: str
    sha256: str
    count: int


@dataclass
class Manifest:
    """How a set of pairs was made, and what it consists of.

    Attributes:
        teacher: The teacher's fingerprint, SHA-256 (hex).
        solver: Name of the solver.
        steps: Steps of the solver.
        nfe: Network evaluations an image.
        sigma_min: Smallest noise level that the teacher was sampled at.
        sigma_max: Noise level that sampling started at.
        dtype: Precision of the teacher's network.
        seed: Noise ``i`` was drawn with seed ``seed + i``.
        image_shape: ``[C, H, W]``.
        num_classes: Number of classes, or None for unconditional pairs.
        num_pairs: Number of pairs in all.
        shard_size: Pairs a shard; the last may be smaller. One shard was computed as one batch.
        trajectory: How the states between noise and image were made, where they are stored too.
        guidance: Scale of the teacher's guidance, 1 = none.
        shards: The written shards, once ``complete``.
        complete: Whether all shards are there, with their checksums.
        format: Version of this format.
    """

    teacher: str
    solver: str
    steps: int
    nfe: int
    sigma_min: float
    sigma_max: float
    dtype: str
    seed: int
    image_shape: list[int]
    num_classes: int | None
    num_pairs: int
    shard_size: int
    trajectory: dict[str, Any] | None = None
    guidance: float = 1.0
    shards: list[Shard] = field(default_factory=list)
    complete: bool = False
    format: int = FORMAT

    @property
    def files(self) -> list[str]:
        """Names of all shards, in order, written or not."""
        return [shard_name(number) for number in range(-(-self.num_pairs // self.shard_size))]

    def count(self, number: int) -> int:
        """Number of pairs in a shard."""
        return min(self.shard_size, self.num_pairs - number * self.shard_size)

    def missing(self, folder: Path) -> list[str]:
        """Names of the shards that the folder lacks."""
        return [file for file in self.files if not (folder / file).is_file()]

    def differences(self, other: "Manifest") -> list[str]:
        """The settings in which another manifest differs, as ``name: here, not there``."""
        here, there = dataclasses.asdict(self), dataclasses.asdict(other)
        return [
            f"{name}: {here[name]}, not {there[name]}"
            for name in here
            if name not in ("shards", "complete") and here[name] != there[name]
        ]

    def write(self, folder: Path) -> None:
        """Write ``manifest.json``."""
        text = json.dumps(dataclasses.asdict(self), indent=1)
        write_atomically(folder / MANIFEST, text.encode())


def read_manifest(folder: Path) -> Manifest:
    """Read ``manifest.json``.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not a manifest of this version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {MANIFEST} in {folder}, so it is no folder of noise-image pairs. Write "
            "them with `lit-distill predict`, or set the option folder to where they are."
        )
    try:
        content = json.loads(path.read_bytes())
        shards = [Shard(**shard) for shard in content.pop("shards")]
        manifest = Manifest(**content, shards=shards)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest of noise-image pairs ({error}).") from error
    if manifest.format != FORMAT:
        raise ValueError(
            f"{path} has format {manifest.format}, but this version of lit_distill reads format "
            f"{FORMAT}: write the pairs again."
        )
    return manifest


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


def shards_in(folder: Path) -> set[int]:
    """Numbers of the shards in a folder, which need not exist."""
    found = (re.fullmatch(r"shard-(\d{5,})\.safetensors", path.name) for path in folder.glob("*"))
    return {int(match[1]) for match in found if match}


def sha256(content: bytes) -> str:
    """SHA-256 (hex) of a file's content."""
    return hashlib.sha256(content).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that its name never stands for a part of it.

    Args:
        path: The file; it is replaced if it exists.
        content: What to write.

    Raises:
        OSError: If it cannot be written (a full disk); nothing is left behind.
    """
    part = path.with_name(path.name + UNFINISHED)
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the name is: also after a power cut
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"{path} could not be written ({error.strerror}). Make room or choose another folder, "
            "then run the same command again: what was written before is kept",
        ) from error
