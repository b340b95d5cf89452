import os
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import jsonargparse
import pytest
import torch
from pictures import encoded, listing, noise, numbered, plain, write_folder, write_zip

from lit_distill.datamodules import CIFAR10DataModule, ImageDataModule, ImageFolderDataModule

CATS_AND_DOGS = {f"{'cat' if i < 20 else 'dog'}/{i:02d}.png": encoded(plain(i)) for i in range(40)}


def own(root, image_size=8, **options):
    return ImageFolderDataModule(str(root), image_size, batch_size=4, **options)


def levels(data, split):
    return data.images(split)[0][:, 0, 0, 0].tolist()


@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_each_image_is_in_one_split_and_each_class_in_all(tmp_path, write):
    data = own(write(tmp_path / "pets.zip", CATS_AND_DOGS), held_out=0.2)
    assert data.name == "pets" and data.num_classes == 2
    found = {split: levels(data, split) for split in ("train", "val", "test")}
    assert {split: len(part) for split, part in found.items()} == {"train": 32, "val": 4, "test": 4}
    assert sorted(chain(*found.values())) == list(range(40))
    for split, part in found.items():
        assert data.images(split)[1].tolist() == [int(i >= 20) for i in part]
        assert sum(i < 20 for i in part) == len(part) / 2


@pytest.mark.parametrize(("count", "held"), [(3, 1), (9, 1), (20, 1), (60, 3)])
def test_held_out_images(tmp_path, count, held):
    data = own(write_folder(tmp_path / "own", numbered(count)))
    sizes = [len(data.images(split)[0]) for split in ("train", "val", "test")]
    assert sizes == [count - 2 * held, held, held]


def test_too_few_images(tmp_path):
    root = write_folder(tmp_path / "own", numbered(2))
    with pytest.raises(ValueError, match=r"has 2 images: too few to keep 1 for validation"):
        own(root).setup("fit")
    for share in (0, 1, -0.5):
        with pytest.raises(ValueError, match=f"held_out={share}: it must be between 0 and 1"):
            own(root, held_out=share)


def test_batches_of_pictures_of_all_kinds(tmp_path):
    files = {f"{i}.png": encoded(noise(5 + i, 30 - i)) for i in range(10)}
    files |= {f"{i}.jpg": encoded(noise(40 + i)) for i in range(10)}
    root = write_folder(tmp_path / "own", files)
    for channels in (1, 3):
        data = own(root, 16, channels=channels, flip=True, workers=2)
        assert data.image_shape == (channels, 16, 16) and data.num_classes is None
        batches = list(data.train_dataloader())
        assert len(batches) == 9 and set(batches[0]) == {"image"}
        images = torch.cat([batch["image"] for batch in batches])
        assert images.shape == (36, channels, 16, 16) and images.dtype == torch.float32
        assert -1 <= images.min() < -0.5 and 0.5 < images.max() <= 1


def test_labels_for_a_conditional_method(tmp_path):
    conditional = SimpleNamespace(image_shape=(3, 8, 8), num_classes=2)
    unlabelled = own(write_folder(tmp_path / "plain", numbered(5)))
    with pytest.raises(
        ValueError, match=r"knows 2 classes.*'plain' has no labels.*sub-folders.*dataset\.json"
    ):
        unlabelled.check_model(conditional)
    with pytest.raises(ValueError, match="contains no labels"):
        own(tmp_path / "plain", labels=True).setup("fit")
    pets = write_folder(tmp_path / "pets", CATS_AND_DOGS)
    own(pets).check_model(conditional)
    assert own(pets, labels=False).num_classes is None
    with pytest.raises(ValueError, match=r"knows 3 classes.* has 2 classes") as error:
        own(pets).check_model(SimpleNamespace(image_shape=None, num_classes=3))
    assert "sub-folders" not in str(error.value)


def test_splits_are_no_classes(tmp_path):
    files = {f"{split}/{i}.png": encoded(plain(i)) for split in ("train", "val") for i in range(9)}
    root = write_folder(tmp_path / "own", files)
    with pytest.raises(ValueError, match="sub-folders train, val, which look like splits"):
        own(root).setup("fit")
    own(root / "train").setup("fit")
    own(root, labels=False).setup("fit")


def test_an_empty_folder_and_none(tmp_path):
    (tmp_path / "own").mkdir()
    with pytest.raises(ValueError, match="own contains no image"):
        own(tmp_path / "own").setup("fit")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a zip file"):
        own(tmp_path / "none").setup("fit")


def test_broken_images(tmp_path):
    files = {**numbered(20), "003.png": b"", "0070.png": encoded(noise(8))[:40]}
    root = write_folder(tmp_path / "own", files)
    with pytest.raises(ValueError, match=r"2 of 19 images are broken: 003\.png .*0070\.png"):
        own(root).setup("fit")
    with pytest.warns(UserWarning, match="2 of 19 images are broken"):
        assert len(own(root, broken="skip").images("train")[0]) == 17


def test_the_cache_gives_the_same_batches(tmp_path):
    root = write_folder(tmp_path / "own", CATS_AND_DOGS)
    plainly = list(own(root, seed=3, flip=True).train_dataloader())
    for _ in range(2):
        cached = own(root, seed=3, flip=True, workers=1, cache=str(tmp_path / "cache"))
        for expected, got in zip(plainly, cached.train_dataloader(), strict=True):
            assert all(torch.equal(expected[key], got[key]) for key in ("image", "label"))
    caches = sorted(path.name[:14] for path in (tmp_path / "cache").glob("*/"))
    assert caches == ["own-train-8x3-"]  # the other splits were not asked for


def test_a_zip_in_edms_format_is_read_as_cifar10_is(tmp_path):
    names = {f"{i // 10:05d}/img{i:08d}.png": encoded(noise(32)) for i in range(20)}
    labels = [(name, i % 10) for i, name in enumerate(names)]
    path = write_zip(
        tmp_path / "cifar10-32x32-test.zip", {**names, "dataset.json": listing(labels)}
    )
    images, labels = CIFAR10DataModule(root=str(tmp_path)).images("test")
    data = own(path, 32, crop="exact", labels=True)
    assert data.num_classes == 10
    train, _ = data.images("train")
    val, test = data.images("val"), data.images("test")
    places = [5, 15]  # the middle of each half
    assert torch.equal(val[0], images[places[:1]]) and torch.equal(test[0], images[places[1:]])
    assert val[1].tolist() == [5] and test[1].tolist() == [5]
    assert torch.equal(train, images[[i for i in range(20) if i not in places]])


def test_options_reach_the_command_line(tmp_path):
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(ImageDataModule, "data")
    options = [f"--data.root={tmp_path}", "--data.image_size=8", "--data.crop=none"]
    options += ["--data.broken=skip", "--data.labels=false", "--data.flip=true"]
    name = "--data=lit_distill.datamodules.ImageFolderDataModule"
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    data = instantiate(parser.parse_args([name, *options])).data
    assert isinstance(data, ImageFolderDataModule) and data.root == Path(tmp_path)
    assert (data.frame.crop, data.broken, data.labels, data.flip) == ("none", "skip", False, True)
    with pytest.raises(ValueError, match="crop='top'"):
        own(tmp_path, crop="top")


@pytest.mark.skipif("LIT_DISTILL_DATA" not in os.environ, reason="LIT_DISTILL_DATA is not set")
def test_real_cifar10_as_own_images(tmp_path):
    path = Path(os.environ["LIT_DISTILL_DATA"], "cifar10", "cifar10-32x32-test.zip")
    data = ImageFolderDataModule(str(path), 32, crop="exact", cache=str(tmp_path))
    images, labels = data.images("val")
    assert images.shape == (500, 3, 32, 32) and data.num_classes == 10
    assert torch.bincount(labels).min() > 30
