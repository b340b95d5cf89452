"""Pictures that are made on the spot."""

import io
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RANDOM = np.random.default_rng(0)


def noise(height: int, width: int | None = None) -> np.ndarray:
    """A colour picture of random pixels."""
    return RANDOM.integers(0, 256, (height, width or height, 3), dtype=np.uint8)


def plain(level: int, size: int = 8) -> np.ndarray:
    """A colour picture of one grey level."""
    return np.full((size, size, 3), level, np.uint8)


def encoded(picture: np.ndarray | Image.Image, kind: str = "png", **options: Any) -> bytes:
    """The content of an image file."""
    buffer = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """Files in a folder and its sub-folders."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    """The same in a zip file."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def listing(labels: Iterable[tuple[str, int]] | None) -> bytes:
    """``dataset.json``."""
    return json.dumps({"labels": None if labels is None else list(labels)}).encode()


def numbered(count: int, folder: str = "") -> dict[str, bytes]:
    """Pictures whose grey level is their number, from 256 on again from 0."""
    return {f"{folder}{i:03d}.png": encoded(plain(i % 256)) for i in range(count)}
