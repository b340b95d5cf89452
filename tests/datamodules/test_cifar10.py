import hashlib
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from lit_distill.datamodules import CIFAR10DataModule

RANDOM = np.random.default_rng(0)


def pixels(count, size=32):
    return RANDOM.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write_zip(path, images, labels, kind="png", listing=None):
    names = [f"{i // 10:05d}/img{i:08d}.{kind}" for i in range(len(images))]
    pairs = [[name, int(label)] for name, label in zip(names, labels, strict=True)]
    with zipfile.ZipFile(path, "w") as archive:
        for name, image in zip(names, images, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, kind, lossless=True)
            archive.writestr(name, buffer.getvalue())
        if listing != "none":
            # listed in another order than that of the names
            archive.writestr("dataset.json", json.dumps(listing or {"labels": pairs[::-1]}))


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_zips_in_the_format_of_edm(tmp_path, kind):
    train, test = pixels(20), pixels(6)
    write_zip(tmp_path / "cifar10-32x32-train.zip", train, range(10, 30), kind)
    write_zip(tmp_path / "cifar10-32x32-test.zip", test, range(6), kind)
    with pytest.raises(ValueError, match="one class below 10"):
        CIFAR10DataModule(root=str(tmp_path)).setup("fit")
    write_zip(tmp_path / "cifar10-32x32-train.zip", train, [i % 10 for i in range(20)], kind)
    data = CIFAR10DataModule(root=str(tmp_path))
    data.setup("fit")
    images, labels = data.images("train")
    assert images.shape == (18, 3, 32, 32) and data.images("val")[0].shape == (2, 3, 32, 32)
    assert torch.equal(images, torch.from_numpy(train[:18]).permute(0, 3, 1, 2))
    assert labels.tolist() == [i % 10 for i in range(18)]
    assert data.images("val")[1].tolist() == [8, 9]
    assert torch.equal(data.images("test")[0], torch.from_numpy(test).permute(0, 3, 1, 2))


def write_batches(root, monkeypatch):
    """The five training batches and the test batch of torchvision's layout, with 4 images each."""
    from torchvision.datasets import CIFAR10

    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = {"train_list": [f"data_batch_{i}" for i in range(1, 6)], "test_list": ["test_batch"]}
    written = {}
    for attribute, files in names.items():
        sums, parts = [], []
        for file in files:
            images, labels = pixels(4), RANDOM.integers(0, 10, 4)
            rows = images.transpose(0, 3, 1, 2).reshape(4, -1)
            blob = pickle.dumps({"data": rows, "labels": labels.tolist()})
            (folder / file).write_bytes(blob)
            sums.append([file, hashlib.md5(blob).hexdigest()])
            parts.append((images, labels))
        monkeypatch.setattr(CIFAR10, attribute, sums)
        written[attribute] = [np.concatenate(column) for column in zip(*parts, strict=True)]
    meta = pickle.dumps({"label_names": [str(i) for i in range(10)]})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(
        CIFAR10,
        "meta",
        {"filename": "batches.meta", "key": "label_names", "md5": hashlib.md5(meta).hexdigest()},
    )
    return written


def test_files_of_torchvision(tmp_path, monkeypatch):
    written = write_batches(tmp_path, monkeypatch)
    data = CIFAR10DataModule(root=str(tmp_path))
    data.setup("fit")
    images, labels = written["train_list"]
    got, got_labels = data.images("train")
    assert torch.equal(got, torch.from_numpy(images[:18]).permute(0, 3, 1, 2))
    assert got_labels.tolist() == labels[:18].tolist()
    test, _ = written["test_list"]
    assert torch.equal(data.images("test")[0], torch.from_numpy(test).permute(0, 3, 1, 2))
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-1])  # must not be unpickled
    with pytest.raises(ValueError, match=r"cifar-10-batches-py are not CIFAR-10's.*again"):
        CIFAR10DataModule(root=str(tmp_path)).setup("fit")


def test_missing_data(tmp_path, monkeypatch):
    monkeypatch.delenv("LIT_DISTILL_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"option root.*LIT_DISTILL_DATA"):
        CIFAR10DataModule().setup("fit")
    with pytest.raises(FileNotFoundError, match=r"cifar10-32x32-train.zip.*root.*LIT_DISTILL_DATA"):
        CIFAR10DataModule(root=str(tmp_path)).setup("fit")


def test_broken_zips(tmp_path):
    path = tmp_path / "cifar10-32x32-test.zip"
    data = CIFAR10DataModule(root=str(tmp_path))
    write_zip(path, pixels(20), [0] * 20)
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in [
        b"no zip",
        whole[:middle],
        whole[:middle] + bytes(64) + whole[middle + 64 :],  # a member fails its checksum
    ]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"test.zip cannot be read .*again"):
            data.setup("test")
    write_zip(path, pixels(2), [0] * 2, listing="none")
    with pytest.raises(ValueError, match=r"contains no dataset.json"):
        data.setup("test")
    for listing in [{"labels": None}, {"other": 1}, [1], {"labels": [["name"]]}]:
        write_zip(path, pixels(2), [0] * 2, listing=listing)
        with pytest.raises(ValueError, match=r"dataset.json in .* does not list"):
            data.setup("test")
    write_zip(path, pixels(2), [0] * 2, listing={"labels": [["00000/absent.png", 1]]})
    with pytest.raises(ValueError, match=r"cannot be read .*absent.png"):
        data.setup("test")
    write_zip(path, pixels(2, size=16), [0] * 2)
    with pytest.raises(ValueError, match=r"has shape \(16, 16, 3\).*another data set"):
        data.setup("test")


def test_download_is_asked_for_only_where_files_are_missing(tmp_path, monkeypatch):
    import torchvision.datasets

    asked = []
    monkeypatch.setattr(
        torchvision.datasets, "CIFAR10", lambda root, download: asked.append((root, download))
    )
    CIFAR10DataModule(root=str(tmp_path / "new")).prepare_data()
    assert not asked
    CIFAR10DataModule(root=str(tmp_path / "new"), download=True).prepare_data()
    assert asked == [(tmp_path / "new", True)]
    write_zip(tmp_path / "cifar10-32x32-train.zip", pixels(2), [0] * 2)
    CIFAR10DataModule(root=str(tmp_path), download=True).prepare_data()
    assert len(asked) == 1


@pytest.mark.skipif("LIT_DISTILL_DATA" not in os.environ, reason="LIT_DISTILL_DATA is not set")
def test_real_cifar10():
    data = CIFAR10DataModule()
    images, labels = data.images("test")
    assert images.shape == (10_000, 3, 32, 32)
    assert torch.bincount(labels).tolist() == [1_000] * 10  # as published
    means = images.double().mean((0, 2, 3)) / 255
    assert (means - torch.tensor([0.4942, 0.4851, 0.4504])).abs().max() < 1e-3


@pytest.mark.full
@pytest.mark.skipif("LIT_DISTILL_DATA" not in os.environ, reason="LIT_DISTILL_DATA is not set")
def test_real_cifar10_training_split():
    data = CIFAR10DataModule()
    sizes = {split: len(data.images(split)[0]) for split in ("train", "val")}
    assert sizes == {"train": 45_000, "val": 5_000}
    labels = torch.cat([data.images("train")[1], data.images("val")[1]])
    assert torch.bincount(labels).tolist() == [5_000] * 10
