"""Captioned images in parquet and webdataset shards, which may be larger than the memory."""

import glob
import itertools
import json
import tarfile
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_distill.datamodules.captions import CaptionedImages
from lit_distill.datamodules.image_files import ENDINGS, stamp

_CAPTIONS = ("text", "caption")  # names that are looked for
_AT_ONCE = 16  # images of a parquet shard in memory
_BUFFER = 2**20  # bytes of a parquet shard that are read at once


class _Shards(CaptionedImages):
    """What both kinds share: which files there are, in the order of their names."""

    def __init__(self, shards: str, ending: str, images: bool) -> None:
        self.shards, self.has_images = find_shards(shards, ending), images
        self.name = self.shards[0].parent.name if len(self.shards) > 1 else self.shards[0].stem
        self.captions: list[str] = []

    def _check_captions(self) -> None:
        if not self.captions:
            raise ValueError(f"{self.shards[0]} holds no captions, nor do the shards beside it.")

    def identity(self) -> str:
        """All captions and, for images, name, size and time of the last change of each shard.

        The size alone would not do: a tar file is padded to whole blocks.
        """
        files = [(path.name, stamp(path)) for path in self.shards]
        return json.dumps([self.captions, files if self.has_images else []])


class CaptionedParquet(_Shards):
    """Parquet shards as Hugging Face's data sets have them: a column of images, one of captions.

    An image is a struct ``{bytes, path}`` or the bytes themselves. Captions are read once; images
    when they are asked for, a page of the file at a time (as pyarrow writes them, of at most 1,024
    rows). It takes pyarrow (``pip install 'lit-distill[parquet]'``).

    Args:
        shards: A file, a folder of ``.parquet`` files, or a pattern such as
            ``data/train-*.parquet``, where a folder holds other parts of the data too.
        image: Column of the images.
        text: Column of the captions; ``text`` or else ``caption`` by default.
        images: Whether there are images; without, a column of captions is enough.

    Raises:
        FileNotFoundError: If there are no such files.
        ImportError: If pyarrow is not installed.
        ValueError: If a shard is damaged, lacks a column, or has a row without image or caption.
    """

    def __init__(
        self, shards: str, image: str = "image", text: str | None = None, images: bool = True
    ) -> None:
        super().__init__(shards, ".parquet", images)
        self.image = image
        self._groups: list[tuple[Path, int, int]] = []  # file, row group, its first row there
        self._starts: list[int] = []  # of each group, among all images
        for path in self.shards:
            self._add(path, text)
        self._check_captions()
        self._reading: tuple[int, Iterator[tuple[str, bytes]]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file."""
        return {**self.__dict__, "_reading": None}

    def _add(self, path: Path, text: str | None) -> None:
        with _opened(path) as file:
            columns = file.schema_arrow.names
            caption = next((c for c in ((text,) if text else _CAPTIONS) if c in columns), None)
            for option, column, is_there in [
                ("text", text or " or ".join(_CAPTIONS), caption is not None),
                ("image", self.image, self.image in columns or not self.has_images),
            ]:
                if not is_there:
                    raise ValueError(
                        f"{path} has no column {column}; its columns are {', '.join(columns)}: "
                        f"name one as the option {option}."
                    )
            row = 0
            for group in range(file.num_row_groups):
                self._groups.append((path, group, row))
                self._starts.append(len(self.captions))
                for batch in file.iter_batches(row_groups=[group], columns=[caption]):
                    for value in batch.column(0).to_pylist():
                        if not isinstance(value, str):
                            raise ValueError(
                                f"{_row(path, row)} has no caption: there is {value!r} in the "
                                f"column {caption}, not a text."
                            )
                        self.captions.append(value)
                        row += 1
                if self.has_images and _may_lack_images(file, group, self._leaf(file, path)):
                    for _ in self._read(file, *self._groups[-1]):
                        pass  # it raises an error at a row without an image

    def _leaf(self, file: Any, path: Path) -> str:
        """Name of the column of bytes."""
        import pyarrow as pa

        kind = file.schema_arrow.field(self.image).type
        is_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        leaf = kind.field("bytes").type if is_struct else kind
        if not (pa.types.is_binary(leaf) or pa.types.is_large_binary(leaf)):
            raise ValueError(
                f"The column {self.image} of {path} holds {kind}, neither the bytes of image files "
                "nor a struct with such bytes: name another one as the option image."
            )
        return f"{self.image}.bytes" if is_struct else self.image

    def files(self, indices: range) -> Iterator[tuple[str, bytes]]:
        """The images of the rows ``indices``, counted over all shards."""
        for index in indices:
            place, rows = self._reading or (None, iter(()))
            if place != index:
                rows = self._from(index)
            self._reading = None  # a file that fails is opened anew
            found = next(rows)
            self._reading = index + 1, rows
            yield found

    def _from(self, index: int) -> Iterator[tuple[str, bytes]]:
        """All images from one on."""
        group = bisect_right(self._starts, index) - 1
        skipped = index - self._starts[group]
        for path, file_groups in itertools.groupby(self._groups[group:], key=lambda g: g[0]):
            with _opened(path) as file:
                for part in file_groups:
                    yield from itertools.islice(self._read(file, *part), skipped, None)
                    skipped = 0

    def _read(self, file: Any, path: Path, group: int, row: int) -> Iterator[tuple[str, bytes]]:
        """The images of a row group."""
        options = {"row_groups": [group], "columns": [self._leaf(file, path)]}
        for batch in file.iter_batches(_AT_ONCE, **options):
            for value in batch.column(0).to_pylist():
                content = value["bytes"] if isinstance(value, dict) else value
                if not content:
                    raise ValueError(
                        f"{_row(path, row)} has a caption and no image: its column {self.image} "
                        "is empty. Take the row out, or set images: false for a method that needs "
                        "captions only."
                    )
                yield _row(path, row), content
                row += 1


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A parquet file, of which little is held in memory; its errors name it."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(
            "Parquet shards are read by pyarrow: pip install 'lit-distill[parquet]'."
        ) from error
    try:
        # Else the whole of a row group is read ahead, and rows come from there.
        options = {"pre_buffer": False, "buffer_size": _BUFFER}
        with pq.ParquetFile(path, page_checksum_verification=True, **options) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is no parquet file, or a damaged one ({error}): copy or download it again."
        ) from error


def _may_lack_images(file: Any, group: int, leaf: str) -> bool:
    """Whether a row group's statistics do not tell that every row has an image."""
    about = file.metadata.row_group(group)
    for column in map(about.column, range(about.num_columns)):
        if column.path_in_schema == leaf:
            known = column.statistics
            return known is None or not known.has_null_count or known.null_count > 0
    return True


def _row(path: Path, row: int) -> str:
    return f"{path}, row {row} (from 0)"


@dataclass(frozen=True, slots=True)  # there may be millions
class _Member:
    """Where the content of a member stands in its shard."""

    path: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.name} in {self.path}"


class CaptionedWebDataset(_Shards):
    """Webdataset shards, as img2dataset writes them: ``.tar`` files of ``0001.jpg``, ``0001.txt``.

    Members whose names agree up to their first dot are a sample. Its caption is the ``.txt`` or,
    without one, ``text`` or else ``caption`` of the ``.json``. Captions are read once; of images it
    is noted where they stand, and they are read when they are asked for.

    Args:
        shards: A file, a folder of ``.tar`` files, or a pattern such as ``data/0000*.tar``.
        text: Key of the captions in ``.json`` members, which are then read instead of ``.txt``.
        images: Whether there are images; without, captions are enough.

    Raises:
        FileNotFoundError: If there are no such files.
        ValueError: If a shard is damaged or compressed, or a sample lacks its image or its caption.
    """

    def __init__(self, shards: str, text: str | None = None, images: bool = True) -> None:
        super().__init__(shards, ".tar", images)
        self._members: list[_Member] = []
        for path in self.shards:
            self._add(path, text)
        self._check_captions()

    def _add(self, path: Path, text: str | None) -> None:
        """Note the samples of a shard, in the order in which they begin."""
        samples: dict[str, dict[str, tuple[_Member, str]]] = {}
        for member, content in _members(path):
            key, kind = _key_and_kind(member.name)
            sample = samples.setdefault(key, {})
            if kind in sample:
                raise ValueError(f"{member} is a second {kind} of its sample: a name occurs twice.")
            sample[kind] = member, _text(member, content)
        for sample in samples.values():
            self.captions.append(_caption_of(sample, text))
            if self.has_images:
                if "image" not in sample:
                    raise ValueError(
                        f"{next(iter(sample.values()))[0]} has no image beside it: add one, or set "
                        "images: false for a method that needs captions only."
                    )
                self._members.append(sample["image"][0])

    def files(self, indices: range) -> Iterator[tuple[str, bytes]]:
        """The images of the samples ``indices``, counted over all shards."""
        chosen = (self._members[i] for i in indices)
        for path, members in itertools.groupby(chosen, key=lambda member: member.path):
            with path.open("rb") as shard:
                for member in members:
                    shard.seek(member.offset)
                    yield str(member), shard.read(member.size)


def _key_and_kind(name: str) -> tuple[str, str]:
    """What the members of a sample have in common, and ``image``, ``txt``, ``json`` or ``""``."""
    folder, _, file = name.rpartition("/")
    stem, _, kind = file.partition(".")
    kind = "image" if f".{kind.lower()}" in ENDINGS else kind.lower()
    return f"{folder}/{stem}", kind if stem and kind in ("image", "txt", "json") else ""


def _members(path: Path) -> Iterator[tuple[_Member, bytes]]:
    """Images, of which nothing is read yet, and captions of a shard, with their content."""
    advice = "copy or download it again; a compressed one must be unpacked to a plain .tar."
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                kind = _key_and_kind(info.name)[1]
                if info.isreg() and kind:
                    file = None if kind == "image" else archive.extractfile(info)
                    content = b"" if file is None else file.read()
                    yield _Member(path, info.name, info.offset_data, info.size), content
            end = archive.offset  # tarfile also stops at what it cannot read, without a word
        with path.open("rb") as shard:
            shard.seek(end)
            block = shard.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path} is no tar file, or a damaged one ({error}): {advice}") from error
    if block != bytes(tarfile.BLOCKSIZE):
        raise ValueError(f"{path} is truncated or damaged at byte {end:,}: {advice}")


def _text(member: _Member, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{member} is no text in UTF-8 ({error}).") from error


def _caption_of(sample: dict[str, tuple[_Member, str]], key: str | None) -> str:
    """The caption of a sample; its members by kind."""
    if "txt" in sample and key is None:
        return sample["txt"][1].strip()
    keys = _CAPTIONS if key is None else (key,)
    if "json" not in sample:
        wanted = ".txt or .json" if key is None else ".json"
        raise ValueError(
            f"{next(iter(sample.values()))[0]} has no caption: there is no {wanted} beside it."
        )
    member, text = sample["json"]
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{member} is no JSON ({error}).") from error
    found = [entries[k] for k in keys if k in entries] if isinstance(entries, dict) else []
    if not found or not isinstance(found[0], str):
        raise ValueError(
            f"{member} has no caption: give it a {' or a '.join(keys)}, or name another key as the "
            "option text."
        )
    return found[0]


def find_shards(shards: str, ending: str) -> list[Path]:
    """The files that an option names, in the order of their names.

    Args:
        shards: A file, a folder, or a pattern with ``*``.
        ending: Of the files of a folder, such as ``.tar``.

    Raises:
        FileNotFoundError: If there are none.
    """
    place = Path(shards).expanduser()
    if place.is_file():
        return [place]
    pattern = f"{glob.escape(str(place))}/*{ending}" if place.is_dir() else str(place)
    found = sorted(path for path in map(Path, glob.glob(pattern)) if path.is_file())
    if not found:
        raise FileNotFoundError(
            f"There is no file {pattern}: the option shards takes a {ending} file, a folder of "
            f"such files, or a pattern such as data/train-*{ending}."
        )
    return found
