"""Image files in a folder or a zip file: which there are, and their classes."""

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, Literal

LISTING = "dataset.json"
ENDINGS = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"))
HOW_TO_LABEL = (
    "Labels come from two or more sub-folders, one a class, or from a dataset.json with "
    '{"labels": [[name, class], ...]}.'
)


@dataclass(frozen=True)
class ImageFiles:
    """The images of a folder or a zip file, in the order of their names.

    Attributes:
        path: The folder or zip file.
        names: Names within it, with ``/`` between folders.
        stamps: Of each file what is another if its content is: size and time of its last change;
            in a zip file size and CRC-32.
        labels: Class of each image, or None.
        labels_from: Where the labels come from: ``dataset.json``, ``folders``, or None.
        num_classes: Number of classes, or None without labels.
        folders: Names of the folders that are classes, where the labels come from folders.
    """

    path: Path
    names: tuple[str, ...]
    stamps: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    labels_from: Literal["dataset.json", "folders"] | None = None
    num_classes: int | None = None
    folders: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def part(self, places: Sequence[int]) -> "ImageFiles":
        """Some of the images, by their places in the order; the classes stay."""
        return replace(
            self,
            names=tuple(self.names[i] for i in places),
            stamps=tuple(self.stamps[i] for i in places),
            labels=None if self.labels is None else tuple(self.labels[i] for i in places),
        )

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], bytes]]:
        """A function that reads the file of a name; several threads may call it."""
        if self.path.is_dir():
            yield lambda name: (self.path / name).read_bytes()
            return
        one_at_a_time = Lock()
        with zipfile.ZipFile(self.path) as archive:

            def read(name: str) -> bytes:
                with one_at_a_time:
                    return archive.read(name)

            yield read


def find_images(path: Path, labels: bool | None = None) -> ImageFiles:
    """List the images of a folder or a zip file, with their labels where there are any.

    In EDM's data set format, ``dataset.json`` at the top says which images there are and their
    classes, ``{"labels": [[name, class], ...]}``, or ``{"labels": null}``. Without it, every file
    that is an image by its ending counts, and sub-folders are classes, numbered by the order of
    their names, if there are two or more and every image lies in one. Folders that enclose all
    images, and hidden files, are passed over.

    Args:
        path: A folder or a zip file.
        labels: Whether they must be there (True), are passed over (False), or are taken if they
            are there (None).

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If it contains no image, no labels where they must be there, images both beside
            and inside of class folders, or a ``dataset.json`` that does not fit; if it is no zip
            file, or a damaged one.
    """
    if path.is_dir():
        stamps = {name: stamp(path / name) for name in _walk(path)}
        listing = path / LISTING
        text = listing.read_bytes() if listing.is_file() else None
    elif path.is_file():
        stamps, text = _zip_contents(path)
    else:
        raise FileNotFoundError(
            f"There is neither a folder nor a zip file {path}: set the option root to the images."
        )
    listed = None if text is None else _listed_labels(text, path)
    absent = [name for name in listed or () if name not in stamps]
    if absent:
        raise ValueError(
            f"{path} cannot be read as a whole: {LISTING} lists {len(absent)} images that are not "
            f"there, the first is {absent[0]}. Copy or make it again."
        )
    names = tuple(sorted(filter(_is_image, stamps) if listed is None else listed))
    if not names:
        raise ValueError(
            f"{path} contains no image: no file in it ends in {', '.join(sorted(ENDINGS))}."
        )
    files = ImageFiles(path, names, tuple(stamps[name] for name in names))
    if labels is False:
        return files
    if listed is not None:
        numbers = tuple(listed[name] for name in names)
        files = replace(
            files, labels=numbers, labels_from="dataset.json", num_classes=max(numbers) + 1
        )
    elif text is None:
        files = _with_class_folders(files)
    if labels and files.labels is None:
        raise ValueError(f"{path} contains no labels (option labels: true). {HOW_TO_LABEL}")
    return files


def _walk(folder: Path) -> Iterator[str]:
    """Names of all files below a folder, but hidden ones."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        inside = Path(place).relative_to(folder)
        yield from ((inside / name).as_posix() for name in files if not _is_hidden(name))


def _zip_contents(path: Path) -> tuple[dict[str, str], bytes | None]:
    """The stamps of all files in a zip file, and its listing."""
    try:
        with zipfile.ZipFile(path) as archive:
            stamps = {
                info.filename: f"{info.file_size} {info.CRC:08x}"
                for info in archive.infolist()
                if not info.is_dir() and not any(map(_is_hidden, info.filename.split("/")))
            }
            return stamps, archive.read(LISTING) if LISTING in stamps else None
    except Exception as error:  # of many classes, from damaged zip files
        raise ValueError(f"{path} cannot be read ({error}): copy or download it again.") from error


def stamp(path: Path) -> str:
    """Size and time of the last change of a file, to notice that it is another one."""
    try:
        found = path.stat()
    except OSError:  # a link to nothing: it is reported with the images that cannot be read
        return "absent"
    return f"{found.st_size} {found.st_mtime_ns}"


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # what macOS adds to a zip file


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in ENDINGS


def _listed_labels(text: bytes, path: Path) -> dict[str, int] | None:
    """Class of each image in ``dataset.json``; None where it says that there are none."""
    try:
        pairs: Any = json.loads(text)["labels"]
        if pairs is None:
            return None
        labels = {str(name): int(label) for name, label in pairs}
        if min(labels.values(), default=0) < 0:
            raise ValueError("a class is negative")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{LISTING} in {path} does not list the images with their classes, "
            '{"labels": [[name, class], ...]}, as EDM\'s data set format has it.'
        ) from error
    return labels


def _with_class_folders(files: ImageFiles) -> ImageFiles:
    """Labels by the folders at the highest level where there is a choice."""
    folders = [PurePosixPath(name).parts[:-1] for name in files.names]
    enclosing = len(os.path.commonprefix(folders))  # noqa: RUF071  # of tuples, not strings
    if all(len(parts) == enclosing for parts in folders):
        return files
    if any(len(parts) == enclosing for parts in folders):
        raise ValueError(
            f"{files.path} contains images beside folders with images, so that the folders cannot "
            "be classes: put every image into the folder of its class, or set labels: false."
        )
    classes = tuple(sorted({parts[enclosing] for parts in folders}))
    numbers = {name: number for number, name in enumerate(classes)}
    return replace(
        files,
        labels=tuple(numbers[parts[enclosing]] for parts in folders),
        labels_from="folders",
        num_classes=len(classes),
        folders=classes,
    )
