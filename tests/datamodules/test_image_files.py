import pytest
from pictures import encoded, listing, numbered, plain, write_folder, write_zip

from lit_distill.datamodules.image_files import find_images

PICTURE = encoded(plain(7))


@pytest.fixture(params=["folder", "zip"])
def write(request, tmp_path):
    """Writes files into a folder, or into a zip file."""
    if request.param == "folder":
        return lambda files: write_folder(tmp_path / "own", files)
    return lambda files: write_zip(tmp_path / "own.zip", files)


def contents(files):
    with files.reader() as read:
        return [read(name) for name in files.names]


def test_images_are_listed_by_name_and_nothing_else_is(write):
    others = {"notes.txt": b"", ".hidden.png": b"", "__MACOSX/a.png": b"", ".git/b.png": b""}
    pictures = {"b.PNG": b"b", "a.jpg": b"a", "c.webp": b"c"}
    files = find_images(write({**others, **pictures}))
    assert files.names == ("a.jpg", "b.PNG", "c.webp")
    assert (files.labels, files.num_classes, files.labels_from) == (None, None, None)
    assert contents(files) == [b"a", b"b", b"c"]


@pytest.mark.parametrize("above", ["", "pets/", "all/pets/"])
def test_sub_folders_are_classes(write, above):
    names = [f"{above}dog/1.png", f"{above}cat/2.png", f"{above}cat/old/1.png"]
    files = find_images(write(dict.fromkeys(names, PICTURE)))
    assert files.names == tuple(sorted(names))
    assert files.labels == (0, 0, 1) and files.num_classes == 2
    assert files.labels_from == "folders" and files.folders == ("cat", "dog")
    assert find_images(files.path, labels=False).labels is None


def test_one_folder_is_no_class(write):
    files = find_images(write({"img/0.png": PICTURE, "img/1.png": PICTURE, "readme.txt": b""}))
    assert files.labels is None
    with pytest.raises(ValueError, match=r"no labels.*labels: true.*sub-folders.*dataset\.json"):
        find_images(files.path, labels=True)


def test_images_beside_classes(write):
    path = write({"a/0.png": PICTURE, "1.png": PICTURE})
    with pytest.raises(ValueError, match=r"beside folders .* labels: false"):
        find_images(path)
    assert find_images(path, labels=False).names == ("1.png", "a/0.png")


def test_a_listing_says_which_images_and_classes(write):
    labels = [("01/b.png", 4), ("00/a.png", 1)]
    names = ["00/a.png", "01/b.png", "01/not_listed.png"]
    files = find_images(
        write({"dataset.json": listing(labels), **dict.fromkeys(names, PICTURE)}), labels=True
    )
    assert files.names == ("00/a.png", "01/b.png")
    assert files.labels == (1, 4) and files.num_classes == 5
    assert files.labels_from == "dataset.json"
    assert files.part([1]).labels == (4,) and files.part([1]).num_classes == 5


def test_a_listing_without_labels(write):
    files = find_images(write({"dataset.json": listing(None), "0/a.png": b"", "1/b.png": b""}))
    assert files.names == ("0/a.png", "1/b.png") and files.labels is None
    with pytest.raises(ValueError, match="contains no labels"):
        find_images(files.path, labels=True)


@pytest.mark.parametrize(
    "wrong", [b"{", b"[1]", b'{"labels": [["a"]]}', b'{"labels": [["a", [1, 0]]]}', b"{}"]
)
def test_a_listing_of_another_kind(write, wrong):
    with pytest.raises(ValueError, match=r"dataset\.json in .*own.* does not list the images"):
        find_images(write({"dataset.json": wrong, "a.png": PICTURE}))


def test_listed_images_that_are_absent(write):
    with pytest.raises(ValueError, match=r"lists 2 images that are not there, the first is b\.png"):
        find_images(
            write({"dataset.json": listing([("b.png", 1), ("c.png", 1)]), "a.png": PICTURE})
        )


def test_nothing_to_read(write, tmp_path):
    with pytest.raises(ValueError, match=r"own.* contains no image: .*\.jpg, "):
        find_images(write({"readme.txt": b""}))
    with pytest.raises(FileNotFoundError, match=r"neither a folder nor a zip file .*absent"):
        find_images(tmp_path / "absent")
    (tmp_path / "text.zip").write_text("text")
    with pytest.raises(ValueError, match=r"text\.zip cannot be read .*again"):
        find_images(tmp_path / "text.zip")


def test_a_stamp_is_another_if_the_file_is(write):
    first = find_images(write(numbered(2)))
    again = find_images(write({**numbered(1), "001.png": encoded(plain(99))}))
    assert first.names == again.names
    assert first.stamps[1] != again.stamps[1]
