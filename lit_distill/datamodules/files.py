"""Finding a published data set on disk, and cutting a validation split from it."""

import os
from pathlib import Path

from torch import Tensor

from lit_distill.datamodules.base import Images, Split


def hold_out(images: Tensor, labels: Tensor | None, split: Split) -> Images:
    """Cut a training set: its last tenth (5,000 images at most) is ``val``, the rest ``train``."""
    cut = len(images) - min(5_000, len(images) // 10)
    part = slice(cut, None) if split == "val" else slice(cut)
    return images[part], None if labels is None else labels[part]


def data_folder(
    root: str | Path | None,
    name: str,
    create: bool = False,
    source: str = "download: true to fetch the data",
) -> Path:
    """Folder of a data set: ``root``, or else ``$LIT_DISTILL_DATA/<name>``.

    Args:
        root: The option of that name.
        name: Name of the data set.
        create: Make the folder if it is missing, as a download needs.
        source: How to get the data where there are none, for the error message.

    Raises:
        FileNotFoundError: If neither is given, or there is no such folder.
    """
    advice = (
        f"Set the option root to the folder of {name}, or the environment variable "
        f"LIT_DISTILL_DATA to a folder that contains {name}/, or {source}."
    )
    collection = os.environ.get("LIT_DISTILL_DATA")
    if root is None and not collection:
        raise FileNotFoundError(f"No folder with the data of {name} is given. {advice}")
    folder = Path(root).expanduser() if root is not None else Path(str(collection)) / name
    if create:
        folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder {folder} with the data of {name} is missing. {advice}")
    return folder
