"""Tensors kept on disk between runs: a teacher's samples, the features of real images."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Key = dict[str, Any]
"""Everything that the tensors depend on, JSON-ready."""


def cache_file(folder: Path, name: str, key: Key) -> Path:
    """The file for a key: a readable name and the start of the key's hash."""
    digest = hashlib.sha256(_text(key).encode()).hexdigest()[:16]
    return folder / f"{name}-{digest}.safetensors"


def read_cache(path: Path, key: Key) -> dict[str, Tensor] | None:
    """Read tensors written for exactly this key; None if there are none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != _text(key):
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):  # absent, or damaged: it is made again
        return None


def write_cache(path: Path, key: Key, tensors: dict[str, Tensor]) -> None:
    """Write tensors with their key, under a temporary name that is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, {"key": _text(key)})
    os.replace(temporary, path)


def hash_tensors(source: Tensor | nn.Module) -> str:
    """SHA-256 (hex) over the bytes of a tensor, or of a module's parameters and buffers."""
    tensors = {"": source} if isinstance(source, Tensor) else source.state_dict()
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _text(key: Key) -> str:
    return json.dumps(key, sort_keys=True)
