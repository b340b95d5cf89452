"""Captioned images in parquet and webdataset shards."""

import io
import json
import os
import pickle
import shutil
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from small_text import text_folder

from lit_distill.datamodules import (
    CaptionedFolder,
    CaptionedImages,
    CaptionedParquet,
    CaptionedWebDataset,
    LatentTextDataModule,
)

TEXTS = ["one", "two", "one", "a picture of three", "four", "five", "six"]
SHAPE = (3, 8, 8)


def picture(i, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (10 + i, 12), (30 * i, 200, 0)).save(file, kind)
    return file.getvalue()


IMAGES = [picture(i) for i in range(len(TEXTS))]


def write_parquet(path, images=IMAGES, texts=TEXTS, names=("image", "text"), **options):
    values = [None if image is None else {"bytes": image, "path": None} for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({names[0]: pa.array(values, kind), names[1]: texts})
    pq.write_table(table, path, **options)
    return str(path)


def write_tar(path, members, kind="w"):
    with tarfile.open(path, kind) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def samples(first, last):
    """An image and a text each."""
    return [
        member
        for i in range(first, last)
        for member in ((f"{i:04}.png", IMAGES[i]), (f"{i:04}.txt", f"{TEXTS[i]}\n".encode()))
    ]


def parquet_shards(folder):
    folder.mkdir()
    write_parquet(folder / "train-0.parquet", IMAGES[:4], TEXTS[:4], row_group_size=3)
    write_parquet(folder / "train-1.parquet", IMAGES[4:], TEXTS[4:], row_group_size=2)
    return CaptionedParquet(str(folder))


def tar_shards(folder):
    folder.mkdir()
    write_tar(folder / "00000.tar", samples(0, 3))
    write_tar(folder / "00001.tar", samples(3, 7))
    return CaptionedWebDataset(str(folder))


def folder_of_files(folder):
    folder.mkdir()
    for i, image in enumerate(IMAGES):
        (folder / f"{i}.png").write_bytes(image)
    lines = [json.dumps({"file_name": f"{i}.png", "text": t}) for i, t in enumerate(TEXTS)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return CaptionedFolder(str(folder))


@pytest.mark.parametrize("shards", [parquet_shards, tar_shards])
def test_shards_hold_what_a_folder_holds(shards, tmp_path):
    expected = folder_of_files(tmp_path / "files")
    source = shards(tmp_path / "shards")
    assert source.captions == expected.captions == TEXTS and source.name == "shards"
    every = expected.images(range(7), SHAPE)
    assert len(every.flatten(1).unique(dim=0)) == 7
    assert torch.equal(source.images(range(7), SHAPE), every)
    for part in (range(2, 5), range(5, 7), range(0, 1), range(6, 7), range(3, 4)):  # also back
        assert torch.equal(source.images(part, SHAPE), every[part.start : part.stop])
    copied = pickle.loads(pickle.dumps(source))  # as a spawned process gets it
    assert torch.equal(copied.images(range(3, 6), SHAPE), every[3:6])


@pytest.mark.parametrize("shards", [parquet_shards, tar_shards])
def test_identity_tells_other_data(shards, tmp_path):
    first = shards(tmp_path / "a")
    copied = type(first)(str(shutil.copytree(tmp_path / "a", tmp_path / "b")))  # times and all
    assert first.identity() == copied.identity()
    path = copied.shards[1]
    if path.suffix == ".tar":
        path.rename(path.with_name("00002.tar"))
        other = CaptionedWebDataset(str(tmp_path / "b"))
    else:
        write_parquet(path, IMAGES[:3], TEXTS[4:])  # the same captions
        other = CaptionedParquet(str(tmp_path / "b"))
    assert other.captions == first.captions and other.identity() != first.identity()


@pytest.mark.parametrize("shards", [parquet_shards, tar_shards])
def test_identity_tells_a_shard_that_was_replaced_by_one_of_its_size(shards, tmp_path):
    source = shards(tmp_path / "a")
    before, shard = source.identity(), source.shards[1]
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    assert source.identity() != before


@pytest.mark.parametrize("shards", [parquet_shards, tar_shards])
def test_latents_of_shards_are_cached_as_those_of_a_folder(shards, tmp_path):
    pipeline = text_folder(tmp_path / "pipeline", channels=3)
    found = []
    for source in (folder_of_files(tmp_path / "files"), shards(tmp_path / "shards")):
        options = {"shard_size": 3, "batch_size": 2}
        data = LatentTextDataModule(source, pipeline, str(tmp_path / f"c{len(found)}"), **options)
        data.prepare_data()
        data.setup("fit")
        found.append(data._gather_items(torch.arange(7)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_captions_alone_need_no_images(tmp_path):
    table = pa.table({"caption": TEXTS})
    pq.write_table(table, tmp_path / "x.parquet")
    source = CaptionedParquet(str(tmp_path / "x.parquet"), images=False)
    assert source.captions == TEXTS and not source.has_images and source.name == "x"
    texts = [(f"{i}.txt", text.encode()) for i, text in enumerate(TEXTS)]
    source = CaptionedWebDataset(write_tar(tmp_path / "x.tar", texts), images=False)
    assert source.captions == TEXTS and not source.has_images


def test_a_yaml_names_them(tmp_path):
    parser = ArgumentParser()
    parser.add_argument("--source", type=CaptionedImages)
    write_parquet(tmp_path / "x.parquet", names=("jpg", "prompt"))
    write_tar(tmp_path / "x.tar", samples(0, 7))
    for name, options in [
        ("CaptionedParquet", {"image": "jpg", "text": "prompt"}),
        ("CaptionedWebDataset", {"images": False}),
    ]:
        init_args = {"shards": str(tmp_path), **options}
        given = {"class_path": f"lit_distill.datamodules.{name}", "init_args": init_args}
        made = parser.instantiate_classes(parser.parse_object({"source": given})).source
        assert type(made).__name__ == name and made.captions == TEXTS


# --- Parquet --------------------------------------------------------------------------------------


def test_columns_have_names_of_their_own_and_images_may_be_bytes(tmp_path):
    table = pa.table({"jpg": IMAGES, "prompt": TEXTS, "text": ["x"] * 7})
    pq.write_table(table, tmp_path / "x.parquet")
    source = CaptionedParquet(str(tmp_path), image="jpg", text="prompt")
    assert source.captions == TEXTS
    assert [content for _, content in source.files(range(7))] == IMAGES


def test_a_pattern_takes_a_part_of_a_folder(tmp_path):
    write_parquet(tmp_path / "test-0.parquet")
    write_parquet(tmp_path / "train-0.parquet", IMAGES[:2], TEXTS[:2])
    assert CaptionedParquet(f"{tmp_path}/train-*.parquet").captions == TEXTS[:2]
    with pytest.raises(FileNotFoundError, match=r"no file .*val-.*option shards takes a .parquet"):
        CaptionedParquet(f"{tmp_path}/val-*.parquet")


def test_a_row_group_is_not_held_in_memory(tmp_path):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (200, 100_000), generator=generator, dtype=torch.uint8)
    images = [bytes(row.numpy()) for row in noise]  # 20 MB in one row group, which do not compress
    # What is read as one is a page; pyarrow's own are of up to 1024 rows.
    path = write_parquet(tmp_path / "x.parquet", images, ["x"] * 200, write_batch_size=10)
    assert pq.ParquetFile(path).num_row_groups == 1
    files = CaptionedParquet(path).files(range(200))
    before, held = pa.total_allocated_bytes(), []
    for image in images:
        assert next(files)[1] == image
        held.append(pa.total_allocated_bytes() - before)
    assert max(held) < 8e6


def test_rows_are_read_in_turn_once(tmp_path, monkeypatch):
    source = CaptionedParquet(write_parquet(tmp_path / "x.parquet"))
    opened = []
    begin = source._from
    monkeypatch.setattr(source, "_from", lambda index: opened.append(index) or begin(index))
    for i in range(7):
        source.images(range(i, i + 1), SHAPE)
    assert opened == [0]


@pytest.mark.parametrize("statistics", [True, False])
def test_a_row_without_an_image_is_named_at_once(tmp_path, statistics):
    images = [*IMAGES[:4], None, *IMAGES[5:]]
    path = write_parquet(
        tmp_path / "x.parquet", images, write_statistics=statistics, row_group_size=3
    )
    with pytest.raises(ValueError, match=r"x.parquet, row 4 \(from 0\) has a caption and no image"):
        CaptionedParquet(path)
    assert CaptionedParquet(path, images=False).captions == TEXTS


def test_a_row_without_a_caption_is_named(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", texts=[*TEXTS[:5], None, "x"], row_group_size=2)
    with pytest.raises(ValueError, match=r"x.parquet, row 5 \(from 0\) has no caption: .*None"):
        CaptionedParquet(path)


def test_missing_and_foreign_columns_are_named(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", names=("picture", "words"))
    with pytest.raises(
        ValueError, match=r"no column text or caption; .* are picture, words: .*opt"
    ):
        CaptionedParquet(path)
    with pytest.raises(ValueError, match=r"x.parquet has no column image; .*option image"):
        CaptionedParquet(path, text="words")
    with pytest.raises(ValueError, match=r"column words of .*x.parquet holds string, neither"):
        CaptionedParquet(path, image="words", text="words")


def test_an_empty_shard_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x.parquet holds no captions"):
        CaptionedParquet(write_parquet(tmp_path / "x.parquet", [], pa.array([], pa.string())))


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = Path(write_parquet(tmp_path / "x.parquet", write_page_checksum=True))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"x.parquet is no parquet file, or a damaged one"):
        CaptionedParquet(str(path))
    at = whole.index(b"IHDR")  # within the page of images
    path.write_bytes(whole[:at] + b"oops" + whole[at + 4 :])
    source = CaptionedParquet(str(path))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"x.parquet is no parquet file, or a damaged one"):
            source.images(range(7), SHAPE)
    path.write_bytes(whole)
    assert source.images(range(7), SHAPE).shape == (7, *SHAPE)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_what_is_no_image_is_named(tmp_path, kind):
    if kind == "parquet":
        source = CaptionedParquet(write_parquet(tmp_path / "x.parquet", [*IMAGES[:6], b"no"]))
        where = r"x.parquet, row 6 \(from 0\)"
    else:
        members = [("a.png", b"no"), ("a.txt", b"x")]
        source = CaptionedWebDataset(write_tar(tmp_path / "x.tar", samples(0, 6) + members))
        where = "a.png in .*x.tar"
    with pytest.raises(ValueError, match=f"{where} cannot be read as an image"):
        source.images(range(4, 7), SHAPE)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'lit-distill\[parquet\]'"):
        CaptionedParquet(path)


# --- Webdataset -----------------------------------------------------------------------------------


def test_captions_may_stand_in_json(tmp_path):
    members = [
        ("./a/x.json", b'{"caption": "one", "width": 3}'),  # before its image, in a folder
        ("./a/x.JPG", picture(1, "JPEG")),
        ("./b/x.jpg", picture(2, "JPEG")),  # another sample
        ("./b/x.seg.png", IMAGES[0]),  # another field of it
        ("./b/._x.jpg", b"what macOS adds"),
        ("./b/x.json", b'{"text": "two", "title": "deux"}'),
        ("./b/x.cls", b"7"),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    source = CaptionedWebDataset(path)
    assert source.captions == ["one", "two"]
    assert [content for _, content in source.files(range(2))] == [members[1][1], members[2][1]]
    members[0] = ("./a/x.json", b'{"title": "un"}')
    source = CaptionedWebDataset(write_tar(tmp_path / "x.tar", members), text="title")
    assert source.captions == ["un", "deux"]


def test_text_beats_json_unless_a_key_is_named(tmp_path):
    members = [*samples(0, 1), ("0000.json", b'{"text": "x", "title": "y"}')]
    path = write_tar(tmp_path / "x.tar", members)
    assert CaptionedWebDataset(path).captions == ["one"]
    assert CaptionedWebDataset(path, text="title").captions == ["y"]


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([("b.png", IMAGES[0])], "b.png in .*x.tar has no caption: there is no .txt or .json"),
        ([("b.txt", b"x")], "b.txt in .*x.tar has no image beside it.*images: false"),
        ([("b.png", IMAGES[0]), ("b.json", b"{")], "b.json in .*x.tar is no JSON"),
        (
            [("b.png", IMAGES[0]), ("b.json", b'{"title": "x"}')],
            "b.json in .*x.tar has no caption: give it a text or a caption",
        ),
        ([("b.png", IMAGES[0]), ("b.txt", b"\xff\xff")], "b.txt in .*x.tar is no text in UTF-8"),
        ([("0000.jpg", IMAGES[0])], "0000.jpg in .*x.tar is a second image of its sample"),
    ],
)
def test_samples_that_are_not_whole_are_named(tmp_path, members, sentence):
    path = write_tar(tmp_path / "x.tar", samples(0, 2) + members)
    with pytest.raises(ValueError, match=sentence):
        CaptionedWebDataset(path)


@pytest.mark.parametrize("lost", ["image", "text", "end", "header"])
def test_a_damaged_tar_file_is_named(tmp_path, lost):
    path = Path(write_tar(tmp_path / "x.tar", samples(0, 7)))
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        places = {member.name: member for member in archive}
    png, txt = places["0006.png"], places["0006.txt"]
    cut = {
        "image": whole[: png.offset_data + 20],
        "text": whole[: txt.offset_data + 2],
        "end": whole[: txt.offset],  # between two members: a whole tar file but for its end
        "header": whole[: png.offset] + b"oops" + whole[png.offset + 4 :],
    }
    path.write_bytes(cut[lost])
    with pytest.raises(ValueError, match=r"x.tar is (truncated or damaged|no tar file, or a dam)"):
        CaptionedWebDataset(str(path))


@pytest.mark.parametrize("content", [b"", b"no tar file" * 100])
def test_a_foreign_file_is_named(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.tar is no tar file, or a damaged one"):
        CaptionedWebDataset(str(tmp_path))


def test_a_compressed_tar_file_is_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", samples(0, 7), "w:gz")
    with pytest.raises(ValueError, match=r"x.tar is no tar file.*compressed one must be unpacked"):
        CaptionedWebDataset(path)
    with pytest.raises(FileNotFoundError, match=r"no file .*\*.tar"):
        CaptionedWebDataset(str(tmp_path / "nowhere"))


def test_an_empty_tar_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x.tar holds no captions"):
        CaptionedWebDataset(write_tar(tmp_path / "x.tar", []))
