"""Decoding image files into one array, in memory or in a cache on disk that is memory-mapped."""

import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from tqdm.auto import tqdm

from lit_distill.datamodules.base import Images
from lit_distill.datamodules.frame import Frame
from lit_distill.datamodules.image_files import ImageFiles

Broken = Literal["skip", "error"]
FORMAT = 1
_ARRAY, _ABOUT, _PART = "images.npy", "about.json", ".part"
_CHUNK = 1024
Faults = dict[str, str]
"""Why an image could not be decoded, by its name."""


def read_images(
    files: ImageFiles,
    frame: Frame,
    broken: Broken = "error",
    cache: str | Path | None = None,
    name: str = "images",
) -> Images:
    """Decode image files, with one thread a core.

    With ``cache``, the array is built once, in ``<cache>/<name>-<size>x<channels>-<hash>/``, and
    from then on memory-mapped. It is written under another name and renamed when it is whole; of
    several processes one builds it and the others wait. It is built again if the list of files, or
    the size or time of any of them, is no longer what it was made from.

    Args:
        files: What to decode.
        frame: What is taken of each picture, and its size.
        broken: What to do about files that cannot be decoded: ``skip`` leaves them out and warns;
            ``error`` raises an error. Both count and name them.
        cache: Folder of caches, or None to decode into memory.
        name: Name of these images in the cache.

    Returns:
        Images ``(N, C, H, W)`` uint8 and labels ``(N,)`` int64 or None, in the order of the names.

    Raises:
        ValueError: If files are broken and ``broken`` is ``error``, or all are.
        OSError: If the cache cannot be written (a full disk); nothing is left of it.
    """
    if cache is None:
        array = np.empty((len(files), *frame.shape), np.uint8)
        faults: Faults = {}
        for place, image in enumerate(_decoded(files, frame, faults)):
            array[place] = image
        array = array[: len(files) - len(faults)]
        _report(files, faults, broken)
    else:
        array, faults = _cached(Path(cache).expanduser(), name, files, frame, broken)
    images = torch.from_numpy(array)
    if files.labels is None:
        return images, None
    pairs = zip(files.names, files.labels, strict=True)
    return images, torch.tensor([label for name, label in pairs if name not in faults])


def _decoded(files: ImageFiles, frame: Frame, faults: Faults) -> Iterator[np.ndarray]:
    """The images that can be decoded, in order; the others are noted in ``faults``."""

    def decode(name: str) -> np.ndarray | str:
        try:
            return frame.pixels(read(name))
        except Exception as error:  # of any class: what matters is which file it was
            return str(error) or type(error).__name__

    progress = tqdm(
        total=len(files),
        desc=f"Decoding {files.path.name}",
        unit="image",
        leave=False,
        delay=2,
        mininterval=1,
        disable=getattr(rank_zero_only, "rank", 0) > 0 or None,
    )
    names = iter(files.names)
    with progress, files.reader() as read, ThreadPoolExecutor(os.cpu_count()) as threads:
        # In chunks, as all of the images together need not fit into memory.
        while chunk := list(itertools.islice(names, _CHUNK)):
            for name, image in zip(chunk, threads.map(decode, chunk), strict=True):
                progress.update()
                if isinstance(image, str):
                    faults[name] = image
                else:
                    yield image


def _report(files: ImageFiles, faults: Faults, broken: Broken) -> None:
    """Raise an error or warn because of files that could not be decoded."""
    if not faults:
        return
    named = "; ".join(f"{name} ({why})" for name, why in itertools.islice(faults.items(), 5))
    more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
    what = f"{len(faults)} of {len(files)} images are broken: {named}{more}"
    if broken == "skip" and len(faults) < len(files):
        warnings.warn(f"{files.path}: {what}. They are left out.", stacklevel=3)
        return
    raise ValueError(
        f"{files.path} cannot be read as a whole: {what}. Copy or download them again, or take "
        "them out (where the data have the option broken, skip does)."
    )


def _cached(
    folder: Path, name: str, files: ImageFiles, frame: Frame, broken: Broken
) -> tuple[np.ndarray, Faults]:
    """Open the cache; build it before if there is none of these files."""
    what = {"format": FORMAT, "path": str(files.path.absolute()), "frame": asdict(frame)}
    content = json.dumps([files.names, files.stamps])
    about = {**what, "count": len(files), "content": _hash(content)}
    place = folder / f"{name}-{frame.size}x{frame.channels}-{_hash(json.dumps(what))[:8]}"
    found = _open(place, about)
    if found is None:
        with _writing(folder, len(files) * math.prod(frame.shape)):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{place}.lock"):
                found = _open(place, about)  # another process may have built it meanwhile
                if found is None:
                    if place.exists():
                        rank_zero_info(f"{place} is built again, as {files.path} has changed.")
                    _build(place, about, files, frame)
                    found = _open(place, about)
    if found is None:
        raise ValueError(f"The cache {place} cannot be read although it was just written.")
    _report(files, found[1], broken)
    return found


@contextmanager
def _writing(folder: Path, size: int) -> Iterator[None]:
    """Say what to do if a cache of that many bytes cannot be written."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"The cache of {size / 2**20:,.0f} MB in {folder} could not be written "
            f"({error.strerror}). Make room, choose another folder (option cache), or set "
            "cache: null, to decode into memory at every start",
        ) from error


def _open(place: Path, about: dict[str, Any]) -> tuple[np.ndarray, Faults] | None:
    """The array and the faults of a whole cache that was made from this; else None."""
    try:
        written = json.loads((place / _ABOUT).read_bytes())
        faults = written.pop("faults")
        # Copy on write: nothing reaches the file, and torch warns of arrays that are read-only.
        array = np.load(place / _ARRAY, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent, or damaged
        return None
    return (array, faults) if written == about else None


def _build(place: Path, about: dict[str, Any], files: ImageFiles, frame: Frame) -> None:
    """Decode into a folder of another name, and rename it when it is whole."""
    part = place.with_name(place.name + _PART)
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    if shutil.disk_usage(place.parent).free < len(files) * math.prod(frame.shape):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    faults: Faults = {}
    try:
        part.mkdir()
        with (part / _ARRAY).open("wb") as file:
            _write_head(file, len(files), frame)
            # Written, not mapped: on a full disk a mapped file ends the process without a word.
            for image in _decoded(files, frame, faults):
                file.write(image.tobytes())
            file.seek(0)
            # numpy leaves room for another number of images.
            _write_head(file, len(files) - len(faults), frame)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the name is: also after a power cut
        if len(faults) == len(files):
            _report(files, faults, "error")
        (part / _ABOUT).write_text(json.dumps({**about, "faults": faults}, indent=1))
        if place.exists():  # of files that were others; who has opened it can still read it
            shutil.rmtree(place)
        os.replace(part, place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_head(file: BinaryIO, count: int, frame: Frame) -> None:
    head = {"descr": "|u1", "fortran_order": False, "shape": (count, *frame.shape)}
    np.lib.format.write_array_header_1_0(file, head)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
