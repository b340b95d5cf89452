import multiprocessing
import os
import resource
import shutil
import time

import numpy as np
import pytest
import torch
from pictures import encoded, listing, noise, numbered, plain, write_folder, write_zip

from lit_distill.datamodules import decoding
from lit_distill.datamodules.decoding import read_images
from lit_distill.datamodules.frame import Frame
from lit_distill.datamodules.image_files import find_images

FRAME = Frame(8, 1)


@pytest.fixture
def count_decoded(monkeypatch):
    """The number of pictures that were decoded, as a list of one number."""
    decoded = [0]
    pixels = Frame.pixels

    def counted(frame, content):
        decoded[0] += 1
        return pixels(frame, content)

    monkeypatch.setattr(Frame, "pixels", counted)
    return decoded


def levels(images):
    assert images.dtype == torch.uint8
    return images[:, 0, 0, 0].tolist()


def inside(cache):
    """What the cache holds, without lock files."""
    return sorted(path.name for path in cache.rglob("*") if path.suffix != ".lock")


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("cached", [False, True])
def test_images_and_labels_in_the_order_of_the_names(tmp_path, kind, cached, monkeypatch):
    monkeypatch.setattr(decoding, "_CHUNK", 7)
    labels = [(name, 3 - number % 4) for number, name in enumerate(numbered(20))]
    pictures = {**numbered(20), "dataset.json": listing(reversed(labels))}
    write = write_folder if kind == "folder" else write_zip
    files = find_images(write(tmp_path / f"own.{kind}", pictures))
    images, classes = read_images(files, FRAME, cache=tmp_path / "cache" if cached else None)
    assert images.shape == (20, 1, 8, 8) and levels(images) == list(range(20))
    assert classes.tolist() == [label for _, label in labels] and classes.dtype == torch.int64
    part, classes = read_images(files.part(range(1, 20, 2)), FRAME)
    assert levels(part) == list(range(1, 20, 2)) and classes.tolist() == [2, 0] * 5


def test_the_cache_is_built_once_and_is_a_plain_array(tmp_path, count_decoded):
    files = find_images(write_folder(tmp_path / "own", numbered(12)))
    first, _ = read_images(files, FRAME, cache=tmp_path / "cache")
    assert count_decoded == [12]
    images, labels = read_images(files, FRAME, cache=tmp_path / "cache")
    assert count_decoded == [12] and labels is None
    assert torch.equal(first, images) and torch.equal(images, read_images(files, FRAME)[0])
    (path,) = (tmp_path / "cache").glob("images-8x1-*/images.npy")
    assert np.array_equal(np.load(path, allow_pickle=False), images.numpy())
    images += 1  # whatever is done to them, the file stays
    assert levels(read_images(files, FRAME, cache=tmp_path / "cache")[0]) == list(range(12))


def test_other_options_and_parts_have_caches_of_their_own(tmp_path, count_decoded):
    files = find_images(write_folder(tmp_path / "own", numbered(6)))
    choices = [(FRAME, "a"), (Frame(8), "a"), (Frame(4, 1), "a"), (FRAME, "b")]
    for _ in range(2):
        for frame, name in choices:
            read_images(files, frame, cache=tmp_path / "cache", name=name)
    assert count_decoded == [24]


@pytest.mark.parametrize("change", ["content", "time", "added", "removed", "renamed"])
def test_the_cache_follows_its_source(tmp_path, change, count_decoded):
    own, cache = write_folder(tmp_path / "own", numbered(6)), tmp_path / "cache"
    read_images(find_images(own), FRAME, cache=cache)
    if change == "content":
        (own / "002.png").write_bytes(encoded(plain(99, 9)))
    elif change == "time":
        os.utime(own / "002.png", (1, 1))
    elif change == "added":
        (own / "100.png").write_bytes(encoded(plain(100)))
    elif change == "removed":
        (own / "002.png").unlink()
    else:
        (own / "002.png").rename(own / "200.png")
    files = find_images(own)
    images, _ = read_images(files, FRAME, cache=cache)
    assert count_decoded == [6 + len(files)]
    assert torch.equal(images, read_images(files, FRAME)[0])
    assert len(list(cache.glob("*/images.npy"))) == 1  # in the place of the old one


@pytest.mark.parametrize("damage", ["cut", "no array", "no list", "other list"])
def test_a_damaged_cache_is_built_again(tmp_path, damage):
    files = find_images(write_folder(tmp_path / "own", numbered(6)))
    read_images(files, FRAME, cache=tmp_path / "cache")
    (array,) = (tmp_path / "cache").glob("*/images.npy")
    if damage == "cut":
        array.write_bytes(array.read_bytes()[:-1])
    elif damage == "no array":
        array.unlink()
    elif damage == "no list":
        (array.parent / "about.json").unlink()
    else:
        (array.parent / "about.json").write_text("[]")
    assert levels(read_images(files, FRAME, cache=tmp_path / "cache")[0]) == list(range(6))


def broken_files(folder, total=15):
    """Pictures of which eight are broken in ways of their own."""
    whole = encoded(noise(64), "jpeg")
    bad = {
        "b0.png": b"",
        "b1.jpg": whole[: len(whole) // 2],
        "b2.png": b"<html>not found</html>",
        "b3.png": encoded(noise(64))[:-4000],
        "b4.tiff": encoded(np.zeros((8, 8), np.float32), "tiff"),
        "b5.gif": b"GIF89a" + bytes(30),
        "b6.webp": encoded(noise(8), "webp")[:20],
        "b7.bmp": b"BM" + bytes(100),
    }
    return write_folder(folder, {**numbered(total - len(bad)), **bad})


@pytest.mark.parametrize("cached", [False, True])
def test_broken_images_are_counted_and_named(tmp_path, cached, count_decoded):
    files = find_images(broken_files(tmp_path / "own"))
    cache = tmp_path / "cache" if cached else None
    what = r"8 of 15 images are broken: b0\.png \(cannot identify.*b1\.jpg \(.*truncated.*3 more"
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"own cannot be read as a whole: {what}.*skip does"):
            read_images(files, FRAME, cache=cache)
        with pytest.warns(UserWarning, match=rf"{what}.* left out"):
            images, _ = read_images(files, FRAME, "skip", cache)
        assert levels(images) == list(range(7))
    assert count_decoded == [15 if cached else 60]


def test_labels_of_broken_images_are_left_out(tmp_path):
    pictures = {f"{'ab'[i % 2]}/{i}.png": encoded(plain(i)) for i in range(6)}
    files = find_images(write_folder(tmp_path / "own", {**pictures, "a/2.png": b""}))
    with pytest.warns(UserWarning, match="1 of 6 images are broken: a/2.png"):
        images, labels = read_images(files, FRAME, "skip")
    assert levels(images) == [0, 4, 1, 3, 5] and labels.tolist() == [0, 0, 1, 1, 1]


def test_files_that_cannot_be_opened(tmp_path):
    own = write_folder(tmp_path / "own", numbered(3))
    (own / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"1 of 4 images are broken: link\.png \(.*No such file"):
        read_images(find_images(own), FRAME)


@pytest.mark.parametrize("cached", [False, True])
def test_nothing_but_broken_images(tmp_path, cached):
    files = find_images(write_folder(tmp_path / "own", {"a.png": b"", "b.png": b""}))
    with pytest.raises(ValueError, match="2 of 2 images are broken"):
        read_images(files, FRAME, "skip", tmp_path / "cache" if cached else None)
    assert not cached or inside(tmp_path / "cache") == []


def test_a_full_disk_leaves_no_half_cache(tmp_path, count_decoded):
    files = find_images(write_folder(tmp_path / "own", numbered(300)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, hard))  # as a disk that gets full meanwhile
    try:
        with pytest.raises(OSError, match=r"cache .*could not be written.*Make room.*cache: null"):
            read_images(files, FRAME, cache=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert count_decoded[0] > 0 and inside(tmp_path / "cache") == []
    assert len(read_images(files, FRAME, cache=tmp_path / "cache")[0]) == 300


def test_a_disk_without_room_is_seen_before_the_work(tmp_path, monkeypatch, count_decoded):
    files = find_images(write_folder(tmp_path / "own", numbered(6)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 6 * 64 - 1))
    with pytest.raises(OSError, match=r"No space left.*Make room"):
        read_images(files, FRAME, cache=tmp_path / "cache")
    assert count_decoded == [0] and inside(tmp_path / "cache") == []


def test_a_cache_where_none_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    files = find_images(write_folder(tmp_path / "own", numbered(6)))
    with pytest.raises(OSError, match=r"file/cache could not be written .*option cache"):
        read_images(files, FRAME, cache=tmp_path / "file" / "cache")


def build_slowly(folder, wait, answer):
    """In a process of its own: note each decoded picture, and what was read."""
    pixels = Frame.pixels

    def slowly(frame, content):
        with (folder / "decoded").open("a") as file:
            file.write("x")
        time.sleep(wait)
        return pixels(frame, content)

    Frame.pixels = slowly
    answer.put(levels(read_images(find_images(folder / "own"), FRAME, cache=folder / "cache")[0]))


def test_of_several_processes_one_builds_and_a_killed_one_leaves_no_trace(tmp_path):
    write_folder(tmp_path / "own", numbered(40))
    decoded, cache = tmp_path / "decoded", tmp_path / "cache"
    fork = multiprocessing.get_context("fork")
    answer = fork.Queue()
    killed = fork.Process(target=build_slowly, args=(tmp_path, 60, answer))
    killed.start()
    while not decoded.exists():
        assert killed.is_alive()
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert list(cache.glob("*.part")) and not list(cache.rglob("about.json"))
    decoded.unlink()
    three = [fork.Process(target=build_slowly, args=(tmp_path, 0.01, answer)) for _ in range(3)]
    for process in three:
        process.start()
    assert [answer.get(timeout=60) for _ in three] == 3 * [list(range(40))]
    for process in three:
        process.join()
    assert len(decoded.read_text()) == 40
    assert [path.name for path in cache.iterdir() if path.suffix == ".part"] == []
