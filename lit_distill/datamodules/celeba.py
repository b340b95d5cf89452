"""CelebA: faces, without labels."""

from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from lit_distill.datamodules.base import ImageDataModule, Images, Split
from lit_distill.datamodules.decoding import read_images
from lit_distill.datamodules.files import data_folder
from lit_distill.datamodules.frame import Frame
from lit_distill.datamodules.image_files import ImageFiles, find_images

_SOURCES = ("img_align_celeba", "img_align_celeba.zip", "celeba-10k-89x109.zip")
_PARTITION = "list_eval_partition.txt"
_GET = (
    "get img_align_celeba.zip and list_eval_partition.txt from "
    "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html (torchvision's files in its folder celeba)"
)


class CelebADataModule(ImageDataModule):
    """Aligned faces in colour, unconditional (Liu et al. 2015).

    Reads the first of these in ``root``: the folder ``img_align_celeba`` (torchvision's layout),
    ``img_align_celeba.zip``, or ``celeba-10k-89x109.zip``, the first 10,000 faces at half size.
    Taken are the 140x140 pixels in the middle of 178x218, as is usual for images of 64x64 (Song et
    al. 2021), and at half size the same region.

    With ``list_eval_partition.txt`` beside them, the splits are the published ones: 162,770, 19,867
    and 19,962 faces. Without it, or if one of them were empty, the last tenth by number is ``test``
    and the one before ``val``; then, one person may be in several of them.

    Args:
        root: Folder of the files; by default ``$LIT_DISTILL_DATA/celeba``.
        image_size: Height and width in pixels; 64 and 32 are usual.
        cache: Folder for the decoded images, see
            :func:`~lit_distill.datamodules.decoding.read_images`; None decodes them at every start.
        **options: Options of :class:`ImageDataModule`.

    Raises:
        ValueError: If ``image_size`` is below 1.
    """

    name = "celeba"
    num_classes = None

    def __init__(
        self,
        root: str | None = None,
        image_size: int = 64,
        cache: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.root = root
        self.cache = cache
        self.frame = Frame(image_size, side=140 / 178)
        self.image_shape = self.frame.shape

    def load(self, split: Split) -> Images:
        """Read one split."""
        name = f"{self.name}-{split}"
        return read_images(self._splits[split], self.frame, cache=self.cache, name=name)

    @cached_property
    def _splits(self) -> dict[Split, ImageFiles]:
        root = data_folder(self.root, self.name, source=_GET)
        sources = [root / name for name in _SOURCES if (root / name).exists()]
        if not sources:
            raise FileNotFoundError(
                f"{root} holds none of {', '.join(_SOURCES)}. Set the option root (or "
                f"LIT_DISTILL_DATA) to the folder with one of them, or {_GET}."
            )
        files = find_images(sources[0], labels=False)
        if (root / _PARTITION).is_file():
            published = _partition(root / _PARTITION)
            numbers = [published.get(Path(name).name) for name in files.names]
            if {0, 1, 2} <= set(numbers):
                return {
                    split: files.part([i for i, number in enumerate(numbers) if number == wanted])
                    for wanted, split in enumerate(get_args(Split))
                }
        tenth = len(files) // 10
        if tenth == 0:
            raise ValueError(
                f"{sources[0]} has {len(files)} images; for three splits 10 are needed."
            )
        val, test = len(files) - 2 * tenth, len(files) - tenth
        return {
            "train": files.part(range(val)),
            "val": files.part(range(val, test)),
            "test": files.part(range(test, len(files))),
        }


def _partition(path: Path) -> dict[str, int]:
    """Number of the split of each picture: 0 is ``train``, 1 ``val``, 2 ``test``."""
    try:
        rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
        return {name: int(number) for name, number in rows}
    except ValueError as error:
        raise ValueError(
            f"{path} does not say the split of a picture in each line, as in '000001.jpg 0' "
            f"({error}): copy or download it again, or remove it."
        ) from error
